//! The other process: this test program again, told by its environment what to do.
//!
//! It listens, prints its invitation, swaps descriptors with whoever answers, and plays its role.

use super::super::arena::Arena;
use super::super::doorbell::Doorbell;
use super::super::introduce::{Invitation, Listener, Offer, Peer, connect};
use super::super::ring::{Consumer, Producer, ring_bytes};
use super::super::segment::Segment;
use super::{Frames, send_frames, sleep_until, spin_until};
use bytes::Bytes;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const ROLE: &str = "LOCKSTEP_SHM_TEST_ROLE";
const PREFIX: &str = "invitation ";

/// What the child does once introduced.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Role {
    /// Sends `count` frames of a seed.
    Send { seed: u64, most: usize, count: usize },
    /// Sends `count` frames of `len` bytes as fast as it can.
    Flood { len: usize, count: usize },
    /// Sends each of `count` frames back.
    Echo { spin: bool, count: usize },
    /// Listens a second time, and waits for its end.
    Wait,
}

impl Role {
    fn to_text(self) -> String {
        match self {
            Self::Send { seed, most, count } => format!("send {seed} {most} {count}"),
            Self::Flood { len, count } => format!("flood {len} {count}"),
            Self::Echo { spin, count } => format!("echo {} {count}", spin as u8),
            Self::Wait => "wait".to_owned(),
        }
    }

    fn from_text(text: &str) -> Self {
        let mut words = text.split(' ');
        let name = words.next().unwrap();
        let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
        match (name, &numbers[..]) {
            ("send", &[seed, most, count]) => Self::Send { seed, most: most as usize, count: count as usize },
            ("flood", &[len, count]) => Self::Flood { len: len as usize, count: count as usize },
            ("echo", &[spin, count]) => Self::Echo { spin: spin == 1, count: count as usize },
            ("wait", []) => Self::Wait,
            other => panic!("no such role: {other:?}"),
        }
    }
}

/// One side of a pair.
pub(super) struct Side {
    pub(super) capacity: usize,
    pub(super) ring: Arc<Segment>,
    pub(super) doorbell: Doorbell,
    pub(super) arena: Arena,
}

impl Side {
    pub(super) fn new(capacity: usize) -> Self {
        let ring = Arc::new(Segment::create("lockstep-test", ring_bytes(capacity)).unwrap());
        Self { capacity, ring, doorbell: Doorbell::create().unwrap(), arena: Arena::create().unwrap() }
    }

    pub(super) fn offer(&self) -> Offer<'_> {
        Offer { ring: &self.ring, doorbell: &self.doorbell, arena: &self.arena }
    }

    pub(super) fn producer(&self) -> Producer {
        Producer::new(self.ring.clone(), 0, self.capacity).unwrap()
    }

    pub(super) fn consumer(&self, theirs: Arc<Segment>) -> Consumer {
        Consumer::new(theirs, 0, self.capacity).unwrap()
    }
}

pub(super) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

/// A child in its role, introduced. Killed on drop.
pub(super) struct Partner {
    pub(super) child: Child,
    pub(super) side: Side,
    pub(super) peer: Peer,
    /// Further lines that the child printed.
    pub(super) lines: Box<dyn Iterator<Item = String>>,
}

impl Partner {
    pub(super) async fn start(role: Role, capacity: usize) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "shm::tests::child::entry", "--ignored", "--nocapture", "--test-threads=1"])
            .env(ROLE, format!("{capacity} {}", role.to_text()))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut lines = Box::new(stdout.lines().map(Result::unwrap));
        let invitation = lines.find_map(|line| parse(&line)).unwrap();
        let side = Side::new(capacity);
        let peer = connect(&invitation, &side.offer(), soon()).await.unwrap();
        Self { child, side, peer, lines }
    }
}

impl Drop for Partner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The invitation in a line that a child printed.
pub(super) fn parse(line: &str) -> Option<Invitation> {
    let (name, secret) = line.split_once(PREFIX)?.1.split_once(' ')?;
    let mut invitation = Invitation { name: [0; 16], secret: [0; 32] };
    hex::decode_to_slice(name, &mut invitation.name).unwrap();
    hex::decode_to_slice(secret, &mut invitation.secret).unwrap();
    Some(invitation)
}

fn print(listener: &Listener) {
    let Invitation { name, secret } = listener.invitation();
    println!("{PREFIX}{} {}", hex::encode(name), hex::encode(secret));
}

#[test]
#[ignore = "the other process of tests that start it"]
fn entry() {
    let Ok(text) = std::env::var(ROLE) else { return };
    let (capacity, role) = text.split_once(' ').unwrap();
    let side = Side::new(capacity.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let peer = runtime.block_on(async {
        let listener = Listener::bind().unwrap();
        print(&listener);
        listener.accept(&side.offer(), soon()).await.unwrap()
    });
    let mut producer = side.producer();
    match Role::from_text(role) {
        Role::Send { seed, most, count } => {
            send_frames(&mut producer, &side.doorbell, &peer.doorbell, Frames::new(seed, most), count);
        }
        Role::Flood { len, count } => {
            let payload = [Bytes::from(vec![7; len])];
            for _ in 0..count {
                spin_until(|| producer.push(&[1; _], &payload).unwrap());
                peer.doorbell.ring();
            }
        }
        Role::Echo { spin, count } => {
            let mut consumer = side.consumer(peer.ring);
            for _ in 0..count {
                if spin {
                    spin_until(|| !consumer.is_empty());
                } else {
                    sleep_until(&side.doorbell, || !consumer.is_empty());
                }
                let frame = consumer.pop(|header, payload| (*header, Bytes::copy_from_slice(payload)));
                let (header, payload) = frame.unwrap().unwrap().value;
                assert!(producer.push(&header, &[payload]).unwrap());
                peer.doorbell.ring();
            }
        }
        Role::Wait => runtime.block_on(async {
            let second = Listener::bind().unwrap();
            print(&second);
            peer.lifeline.broken().await;
        }),
    }
    // The peer takes out the last frames, then goes.
    runtime.block_on(peer.lifeline.broken());
}
