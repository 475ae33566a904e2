use super::super::introduce::{IntroduceError, Invitation, Listener, Peer, connect};
use super::child::{Partner, Role, Side, parse, soon};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::Duration;
use tokio::time::{Instant, timeout};

const CAPACITY: usize = 4096;

/// The name by which a listener shows in `/proc/net/unix`.
fn name(invitation: &Invitation) -> String {
    format!("lockstep-{}", hex::encode(invitation.name))
}

fn sockets() -> String {
    std::fs::read_to_string("/proc/net/unix").unwrap()
}

/// A connection of somebody who knows the name.
fn stranger(invitation: &Invitation) -> UnixStream {
    UnixStream::connect_addr(&SocketAddr::from_abstract_name(name(invitation)).unwrap()).unwrap()
}

async fn pair() -> (Side, Peer, Side, Peer) {
    let (a, b) = (Side::new(CAPACITY), Side::new(CAPACITY));
    let listener = Listener::bind().unwrap();
    let invitation = listener.invitation().clone();
    let (of_b, of_a) = {
        let (a, b) = (a.offer(), b.offer());
        tokio::join!(listener.accept(&a, soon()), connect(&invitation, &b, soon()))
    };
    (a, of_b.unwrap(), b, of_a.unwrap())
}

#[tokio::test]
async fn each_side_gets_the_others_memory() {
    let (a, of_b, b, of_a) = pair().await;
    for (side, peer_of_other, seen) in [(&a, &of_a, &of_b), (&b, &of_b, &of_a)] {
        let mut block = side.arena.allocate(10).unwrap();
        block.bytes_mut().fill(9);
        // SAFETY: one thread, so nobody writes meanwhile.
        assert_eq!(unsafe { peer_of_other.arena.read(block.offset(), 10) }, Some(&[9; 10][..]));
        assert!(side.producer().push(&[5; _], &[]).unwrap());
        let popped = side.consumer(peer_of_other.ring.clone()).pop(|header, _| header[0]);
        assert_eq!(popped.unwrap().unwrap().value, 5);
        side.doorbell.arm(super::Sleeper::Waiter);
        peer_of_other.doorbell.ring();
        side.doorbell.sleep(super::Sleeper::Waiter, None);
        assert!(timeout(Duration::ZERO, seen.lifeline.broken()).await.is_err());
    }
    drop(of_b);
    timeout(super::PATIENCE, of_a.lifeline.broken()).await.unwrap();
}

#[tokio::test]
async fn strangers_are_turned_away_and_the_right_peer_gets_in() {
    let (a, b) = (Side::new(CAPACITY), Side::new(CAPACITY));
    let listener = Listener::bind().unwrap();
    let right = listener.invitation().clone();
    let wrong = Invitation { secret: [0; 32], ..right.clone() };
    let silent = stranger(&right);
    drop(stranger(&right));
    let (a, b) = (a.offer(), b.offer());
    let answer = async {
        let refused = connect(&wrong, &b, soon()).await.err().unwrap();
        assert!(matches!(refused, IntroduceError::Broken(_)), "{refused}");
        connect(&right, &b, soon()).await
    };
    let (of_b, of_a) = tokio::join!(listener.accept(&a, soon()), answer);
    assert!(of_b.is_ok() && of_a.is_ok());
    let mut said = Vec::new();
    (&silent).read_to_end(&mut said).unwrap();
    assert!(said.is_empty(), "the stranger was told something");
}

#[tokio::test]
async fn an_impostor_at_the_name_gets_no_descriptors() {
    let listener = Listener::bind().unwrap();
    let real = Invitation { secret: [1; 32], ..listener.invitation().clone() };
    // The impostor has the name, but another secret, and answers as if all were well.
    let impostor = Side::new(CAPACITY);
    let victim = Side::new(CAPACITY);
    let imposed = listener.invitation().clone();
    drop(listener);
    let address = SocketAddr::from_abstract_name(name(&imposed)).unwrap();
    let socket = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
    let cheat = std::thread::spawn(move || {
        let (mut stream, _) = socket.accept().unwrap();
        let mut proof = [0; 32];
        stream.read_exact(&mut proof).unwrap();
        // The victim's own proof sent back is not a listener's proof.
        std::io::Write::write_all(&mut stream, &proof).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        (rest, impostor)
    });
    let refused = connect(&real, &victim.offer(), soon()).await.err().unwrap();
    assert!(matches!(refused, IntroduceError::Secret), "{refused}");
    assert!(cheat.join().unwrap().0.is_empty());
}

#[tokio::test]
async fn nobody_comes_before_the_deadline() {
    let side = Side::new(CAPACITY);
    let listener = Listener::bind().unwrap();
    let gone = listener.invitation().clone();
    let deadline = Instant::now() + Duration::from_millis(20);
    let late = listener.accept(&side.offer(), deadline).await.err().unwrap();
    assert!(matches!(late, IntroduceError::Deadline), "{late}");
    let refused = connect(&gone, &side.offer(), soon()).await.err().unwrap();
    assert!(matches!(refused, IntroduceError::Connect(_)), "{refused}");
    assert!(!sockets().contains(&name(&gone)));
}

/// What the listener makes of a peer that knows the secret and then sends these descriptors and sizes; and
/// whether it kept any of the descriptors.
async fn received(descriptors: usize, sizes: [u64; 2]) -> IntroduceError {
    let side = Side::new(CAPACITY);
    let listener = Listener::bind().unwrap();
    let invitation = listener.invitation().clone();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let peer = std::thread::spawn(move || {
        let mut stream = stranger(&invitation);
        let proof = blake3::keyed_hash(&invitation.secret, b"lockstep shared memory: connecting");
        std::io::Write::write_all(&mut stream, proof.as_bytes()).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(20))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let rights = vec![writer.as_fd(); descriptors];
        assert!(control.push(SendAncillaryMessage::ScmRights(&rights)));
        let sizes: Vec<u8> = sizes.iter().flat_map(|size| size.to_le_bytes()).collect();
        sendmsg(&stream, &[IoSlice::new(&sizes)], &mut control, SendFlags::NOSIGNAL).unwrap();
        stream
    });
    let error = listener.accept(&side.offer(), soon()).await.err().unwrap();
    drop(peer.join().unwrap());
    // Ends only when nobody holds the pipe's other end any more.
    assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap(), 0);
    error
}

#[tokio::test]
async fn wrong_descriptors_and_sizes_are_refused_and_closed() {
    let ring_bytes = Side::new(CAPACITY).ring.len() as u64;
    for count in [1, 2] {
        let error = received(count, [ring_bytes, 4096]).await;
        assert!(matches!(error, IntroduceError::Descriptors(got) if got == count), "{error}");
    }
    for (count, sizes, what) in [
        (4, [ring_bytes, 4096], "sent 4 descriptors instead of 3"),
        (20, [ring_bytes, 4096], "more descriptors than expected"),
        (3, [ring_bytes + 1, 4096], "its rings take 4609 bytes, ours 4608"),
        (3, [ring_bytes, 4096], "is not a memory file"),
    ] {
        let error = received(count, sizes).await;
        assert!(error.to_string().contains(what), "{error}");
    }
}

#[tokio::test]
async fn a_killed_peer_is_noticed_at_once_and_leaves_nothing() {
    let mut partner = Partner::start(Role::Wait, CAPACITY).await;
    let second = partner.lines.find_map(|line| parse(&line)).unwrap();
    assert!(sockets().contains(&name(&second)));
    assert!(timeout(Duration::ZERO, partner.peer.lifeline.broken()).await.is_err());

    let killed = Instant::now();
    partner.child.kill().unwrap();
    timeout(Duration::from_secs(1), partner.peer.lifeline.broken()).await.unwrap();
    println!("noticed after {:?}", killed.elapsed());
    partner.child.wait().unwrap();
    assert!(!sockets().contains(&name(&second)));
    let files = std::fs::read_dir("/dev/shm").unwrap().map(|entry| entry.unwrap().file_name());
    assert!(!files.into_iter().any(|file| file.to_string_lossy().contains("lockstep")));
}
