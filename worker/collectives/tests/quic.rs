//! Groups over real QUIC on the loopback interface.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use lockstep_collectives::quic::{MeshConfig, PROTOCOL_VERSION, Peer};
use lockstep_collectives::{CollectiveError, Group, ReduceOp, Tag, TagKind};
use lockstep_common::ids::{Generation, Rank, WorkerId};
use lockstep_common::net::{self, Authority, Role};
use lockstep_common::placement::Placement;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::cluster::{GENERATION, JOB, Worker, mesh, worker, workers};
use support::{Draw, assert_same, in_ranks, leaves_of, placement_strategy, reference};

const TIMEOUT: Duration = Duration::from_secs(20);

fn gradient(step: u64) -> Tag {
    Tag::new(step, 0, TagKind::Gradient)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn results_over_quic_equal_the_reference_tree(
        placement in placement_strategy(7), len in prop_oneof![0usize..40, 60_000usize..400_000], seed: u64,
    ) {
        let leaves: Vec<Vec<f32>> =
            (0..placement.shards()).map(|s| f32::leaf(seed, s, len, ReduceOp::Sum)).collect();
        let moments: Vec<Vec<f64>> =
            (0..placement.shards()).map(|s| f64::leaf(seed, s, 65, ReduceOp::Moments)).collect();
        let workers = workers(placement.world_size());
        let groups = mesh(&workers, &placement, TIMEOUT);
        in_ranks(&groups, |group| {
            let sum = group.all_reduce(gradient(1), leaves_of(group, &leaves), ReduceOp::Sum).unwrap();
            let tag = Tag::new(1, 0, TagKind::BatchNorm { backward: false });
            let merged = group.all_reduce(tag, leaves_of(group, &moments), ReduceOp::Moments).unwrap();
            assert_same(&merged.wait().unwrap(), &reference(&moments, ReduceOp::Moments));
            assert_same(&sum.wait().unwrap(), &reference(&leaves, ReduceOp::Sum));
        });
    }
}

/// Four buckets make more than a lane may run ahead of a rank that has started none of them.
#[test]
fn a_rank_far_ahead_waits_for_the_other() {
    const LEN: usize = 12_000_000;
    let placement = Placement::even(2, 2);
    let workers = workers(2);
    let groups = mesh(&workers, &placement, TIMEOUT);
    let start = |group: &Group, step| {
        group.all_reduce(gradient(step), vec![vec![step as f32; LEN]], ReduceOp::Sum).unwrap()
    };
    let ahead: Vec<_> = (1..=4).map(|step| start(&groups[0], step)).collect();
    let tag = |index| Tag::new(0, 0, TagKind::Broadcast).index(index);
    let go = |index| {
        groups[0].broadcast(tag(index), Rank(0), Some(b"go".to_vec())).unwrap().wait().unwrap();
        let sent = groups[1].broadcast(tag(index), Rank(0), None).unwrap();
        assert_eq!(*sent.wait().unwrap(), b"go"[..]);
    };
    // Broadcasts of the rank that is ahead, on the small lane, pass the buckets, also when the bulk lane is read no
    // further: all that could have come by then has.
    go(0);
    let stands = || {
        let before = groups[1].stats().bytes_received;
        std::thread::sleep(Duration::from_millis(100));
        (groups[1].stats().bytes_received == before).then_some(before)
    };
    let received = std::iter::repeat_with(stands).flatten().next().unwrap();
    // Nearly 64 MB: frames count for a little more than they are.
    assert!(received > 60 << 20, "{received}");
    (1..4).for_each(go);
    assert!(ahead.iter().all(|pending| !pending.is_ready()));
    let behind: Vec<_> = (1..=4).map(|step| start(&groups[1], step)).collect();
    for (pending, step) in ahead.iter().chain(&behind).zip([1.0, 2.0, 3.0, 4.0].into_iter().cycle()) {
        let sum = pending.wait().unwrap();
        assert_eq!(sum.len(), LEN);
        assert!(sum.iter().all(|&v| v == 2.0 * step));
    }
}

/// A short vector travels in one frame, a long one in chunks.
#[test]
fn death_of_a_rank_in_mid_collective_names_it_on_all_others() {
    std::thread::scope(|scope| {
        for len in [10, 1_000_000] {
            scope.spawn(move || check_death(len));
        }
    });
}

fn check_death(len: usize) {
    let mut workers = workers(3);
    let mut groups = mesh(&workers, &Placement::even(3, 3), TIMEOUT);
    let tag = Tag::new(41, 1, TagKind::Gradient).index(3);
    let survivors: Vec<_> = groups[..2]
        .iter()
        .map(|group| group.all_reduce(tag, vec![vec![1f32; len]], ReduceOp::Sum).unwrap())
        .collect();
    // As after `kill -9`: nothing is sent any more, not even a goodbye of the connection.
    let (dead, group) = (workers.pop().unwrap(), groups.pop().unwrap());
    dead.runtime.shutdown_background();
    std::mem::forget(group);
    for (group, pending) in groups.iter().zip(survivors) {
        let error = pending.wait().unwrap_err();
        assert_eq!(error.culprit(), Some(Rank(2)), "{error}");
        let text = error.to_string();
        assert!(text.contains("lost rank 2 in gradient bucket 3 of step 41, phase 1"), "{text}");
        let next = group.barrier(Tag::new(42, 0, TagKind::Barrier)).err().unwrap();
        assert_eq!(next, error);
    }
}

#[test]
fn an_abort_reaches_the_others_with_its_first_cause() {
    let workers = workers(3);
    let groups = mesh(&workers, &Placement::even(3, 3), TIMEOUT);
    let barrier = Tag::new(1, 0, TagKind::Barrier);
    let waiting: Vec<_> = groups[..2].iter().map(|group| group.barrier(barrier).unwrap()).collect();
    groups[2].abort(CollectiveError::Aborted("the loss of step 1 is not a number".to_owned()));
    groups[2].abort(CollectiveError::Aborted("a second cause".to_owned()));
    for pending in waiting {
        match pending.wait().unwrap_err() {
            CollectiveError::Forwarded { message, .. } => {
                assert_eq!(message, "the loss of step 1 is not a number");
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_rank_that_closes_leaves_nothing_behind_undelivered() {
    const LEN: usize = 3_000_000;
    let workers = workers(2);
    let mut groups = mesh(&workers, &Placement::even(2, 2), TIMEOUT);
    let stays = groups.remove(0);
    let leaves = groups.remove(0);
    let tag = Tag::new(1, 0, TagKind::Broadcast);
    drop(leaves.broadcast(tag, Rank(1), Some(vec![7; LEN])).unwrap());
    leaves.close(TIMEOUT);
    assert_eq!(*stays.broadcast(tag, Rank(1), None).unwrap().wait().unwrap(), vec![7; LEN]);
    let error = match stays.barrier(Tag::new(2, 0, TagKind::Barrier)) {
        Ok(barrier) => barrier.wait().unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(error.culprit(), Some(Rank(1)), "{error}");
}

#[test]
fn another_generation_is_refused_with_the_reason() {
    let workers = workers(2);
    let placement = Placement::even(2, 2);
    // Worker 1 is at the newer generation; worker 0 still dials for the older one.
    let _newer = workers[1].lobby.expect(JOB, Generation(GENERATION.0 + 1));
    let config = workers[0].config(0, vec![workers[1].peer(1)], &placement, TIMEOUT);
    let error = workers[0].connect(config).err().unwrap();
    assert_eq!(error.culprit(), Some(Rank(1)));
    assert!(error.to_string().contains("refused: g4 of j1 is over, it is at g5"), "{error}");
}

#[test]
fn a_worker_that_is_not_the_expected_one_is_refused() {
    let workers = workers(2);
    let placement = Placement::even(2, 2);
    let mut peer = workers[1].peer(1);
    peer.worker = WorkerId(99);
    let error = workers[0].connect(workers[0].config(0, vec![peer], &placement, TIMEOUT)).err().unwrap();
    assert!(error.to_string().contains("is not w99, by its certificate"), "{error}");
}

#[test]
fn a_peer_that_never_comes_is_named_when_time_is_up() {
    let workers = workers(2);
    let placement = Placement::even(2, 2);
    let limit = Duration::from_millis(300);
    let started = Instant::now();
    let config = workers[1].config(1, vec![workers[0].peer(0)], &placement, limit);
    let error = workers[1].connect(config).err().unwrap();
    assert_eq!(error.to_string(), "no connection to rank 0: it has not dialled this rank in time");
    assert!(started.elapsed() >= limit);
}

/// A way to `to` that passes on what comes from one sender. Any other is refused by the kernel, as by a NAT.
fn nat(to: SocketAddr, stalled: &Arc<AtomicBool>) -> SocketAddr {
    let outer = UdpSocket::bind("127.0.0.1:0").unwrap();
    let inner = UdpSocket::bind("127.0.0.1:0").unwrap();
    inner.connect(to).unwrap();
    let address = outer.local_addr().unwrap();
    let stalled = stalled.clone();
    std::thread::spawn(move || {
        let mut bytes = vec![0; 1 << 16];
        let (len, sender) = outer.recv_from(&mut bytes).unwrap();
        outer.connect(sender).unwrap();
        inner.send(&bytes[..len]).unwrap();
        let pass = |from: UdpSocket, to: UdpSocket| {
            let stalled = stalled.clone();
            std::thread::spawn(move || {
                let mut bytes = vec![0; 1 << 16];
                // It ends with the test's process.
                while let Ok(len) = from.recv(&mut bytes) {
                    if !stalled.load(Relaxed) {
                        let _ = to.send(&bytes[..len]);
                    }
                }
            })
        };
        pass(outer.try_clone().unwrap(), inner.try_clone().unwrap());
        pass(inner, outer);
    });
    address
}

#[test]
fn a_peer_behind_a_nat_that_refuses_probes_is_not_taken_for_dead() {
    let workers = workers(2);
    let placement = Placement::even(2, 2);
    let stalled = Arc::new(AtomicBool::new(false));
    let through = nat(workers[1].peer(1).addresses[0], &stalled);
    let groups = std::thread::scope(|scope| {
        let peer = Peer { addresses: vec![through], ..workers[1].peer(1) };
        let config = workers[0].config(0, vec![peer], &placement, TIMEOUT);
        let dials = scope.spawn(|| workers[0].connect(config).unwrap());
        let config = workers[1].config(1, vec![workers[0].peer(0)], &placement, TIMEOUT);
        [workers[1].connect(config).unwrap(), dials.join().unwrap()]
    });
    let meet = |step| {
        in_ranks(&groups, |group| group.barrier(Tag::new(step, 0, TagKind::Barrier)).unwrap().wait().unwrap())
    };
    // Long enough for each to find out what its probes are worth.
    let begin = Instant::now();
    (1..).take_while(|_| begin.elapsed() < Duration::from_secs(1)).for_each(|step| drop(meet(step)));
    stalled.store(true, Relaxed);
    std::thread::sleep(Duration::from_secs(2));
    stalled.store(false, Relaxed);
    meet(0);
}

/// Ranks 0 and 1 cannot hear each other any more, rank 2 hears both.
#[test]
fn a_cut_between_two_of_three_ranks_is_named_within_the_time_out() {
    const LIMIT: Duration = Duration::from_secs(10);
    let workers = workers(3);
    let placement = Placement::even(3, 3);
    let cut = Arc::new(AtomicBool::new(false));
    let through = nat(workers[1].peer(1).addresses[0], &cut);
    let groups: Vec<Group> = std::thread::scope(|scope| {
        let connect = |rank: usize| {
            let mut peers: Vec<_> =
                (0..3).filter(|&r| r != rank).map(|r| workers[r].peer(r as u32)).collect();
            if rank == 0 {
                peers[0].addresses = vec![through];
            }
            let config = workers[rank].config(rank as u32, peers, &placement, LIMIT);
            let worker = &workers[rank];
            scope.spawn(move || worker.connect(config).unwrap())
        };
        let connecting: Vec<_> = (0..3).map(connect).collect();
        connecting.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let sum = |group: &Group, step| {
        let tag = Tag::new(step, 1, TagKind::Gradient).index(3);
        group.all_reduce(tag, vec![vec![1f32; 1_000_000]], ReduceOp::Sum).and_then(|sum| sum.wait())
    };
    in_ranks(&groups, |group| drop(sum(group, 1).unwrap()));
    cut.store(true, Relaxed);
    let started = Instant::now();
    let errors = in_ranks(&groups, |group| (2..).find_map(|step| sum(group, step).err()).unwrap());
    assert!(started.elapsed() < LIMIT, "{:?}", started.elapsed());
    for (rank, error) in errors.iter().enumerate() {
        assert!([Some(Rank(0)), Some(Rank(1))].contains(&error.culprit()), "rank {rank}: {error}");
        let text = error.to_string();
        assert!(text.contains("gradient bucket 3 of step 2, phase 1"), "rank {rank}: {text}");
    }
}

/// Another rank may prepare for long, but its worker answers meanwhile: one that does not is not there.
#[test]
fn a_peer_that_cannot_be_reached_is_named_after_the_time_out() {
    const LIMIT: Duration = Duration::from_secs(2);
    let workers = workers(2);
    let placement = Placement::even(2, 2);
    // Somebody holds the port and answers nothing, as behind a cut link.
    let mute = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = mute.local_addr().unwrap();
    let peer = Peer { addresses: vec![address], ..workers[1].peer(1) };
    let config = MeshConfig {
        connect_timeout: Duration::from_secs(900),
        ..workers[0].config(0, vec![peer], &placement, LIMIT)
    };
    let started = Instant::now();
    let error = workers[0].connect(config).err().unwrap();
    assert!(started.elapsed() >= LIMIT && started.elapsed() < LIMIT * 3 / 2, "{:?}", started.elapsed());
    assert_eq!(error.culprit(), Some(Rank(1)));
    let expected = format!("no connection to rank 1: it cannot be reached: {address} has not answered");
    assert!(error.to_string().starts_with(&expected), "{error}");
}

#[test]
fn a_fall_to_an_address_that_is_not_preferred_is_told_of() {
    let workers = workers(2);
    let placement = Placement::even(2, 2);
    let mute = UdpSocket::bind("127.0.0.1:0").unwrap();
    let preferred = mute.local_addr().unwrap();
    let mut peer = workers[1].peer(1);
    peer.addresses.insert(0, preferred);
    let told = Arc::new(Mutex::new(Vec::new()));
    let listener = told.clone();
    let dials = MeshConfig {
        notices: Arc::new(move |line: &str| listener.lock().unwrap().push(line.to_owned())),
        ..workers[0].config(0, vec![peer], &placement, TIMEOUT)
    };
    std::thread::scope(|scope| {
        let dials = scope.spawn(|| workers[0].connect(dials).unwrap());
        let answers = workers[1].config(1, vec![workers[0].peer(0)], &placement, TIMEOUT);
        drop((workers[1].connect(answers).unwrap(), dials.join().unwrap()));
    });
    let told = told.lock().unwrap();
    let expected = format!("not the preferred address: {preferred} has not answered");
    assert!(matches!(&told[..], [line] if line.contains(&expected)), "{told:?}");
}

#[test]
fn a_peer_that_answers_may_prepare_for_longer_than_the_time_out() {
    const LIMIT: Duration = Duration::from_millis(500);
    let workers = workers(2);
    let placement = Placement::even(2, 2);
    let config = |rank: usize| MeshConfig {
        connect_timeout: TIMEOUT,
        ..workers[rank].config(rank as u32, vec![workers[1 - rank].peer(1 - rank as u32)], &placement, LIMIT)
    };
    std::thread::scope(|scope| {
        let (dials, prepares) = (config(0), &workers[1]);
        let early = scope.spawn(|| workers[0].connect(dials).unwrap());
        std::thread::sleep(3 * LIMIT);
        let late = prepares.connect(config(1)).unwrap();
        drop((early.join().unwrap(), late));
    });
}

/// A connection that says it is `rank` of the group and waits.
fn knock(caller: &Worker, called: &Worker, rank: u32) -> quinn::Connection {
    let peer = called.peer(1);
    caller.runtime.block_on(async {
        let tls = caller.client_config.clone();
        let dialled = caller.endpoint.connect_with(tls, peer.addresses[0], &peer.server_name);
        let connection = dialled.unwrap().await.unwrap();
        let (mut send, recv) = connection.open_bi().await.unwrap();
        let mut hello = [&b"LKSH"[..], &PROTOCOL_VERSION.to_le_bytes()].concat();
        hello.extend(JOB.0.to_le_bytes());
        hello.extend(GENERATION.0.to_le_bytes());
        hello.extend(rank.to_le_bytes());
        send.write_all(&hello).await.unwrap();
        std::mem::forget((send, recv));
        connection
    })
}

fn until_put_off(connections: &[quinn::Connection], count: usize) {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let reasons: Vec<_> = connections.iter().filter_map(|one| one.close_reason()).collect();
        assert!(
            reasons.iter().all(|why| why.to_string().contains("too many of your connections")),
            "{reasons:?}"
        );
        if reasons.len() == count {
            return;
        }
        assert!(Instant::now() < deadline, "{reasons:?}");
        std::thread::yield_now();
    }
}

/// In a large world all are early, and what one worker sends must not push the others out.
#[test]
fn early_connections_of_many_workers_wait_and_too_many_of_one_are_put_off() {
    const OTHERS: u32 = 140;
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open(folder.path()).unwrap();
    let [called, mut many] = [1, 2].map(|id| worker(&authority, WorkerId(id)));
    let name = |many: &mut Worker, id: u32| {
        let identity = authority.issue(Role::Worker(WorkerId(100 + u64::from(id)))).unwrap();
        many.client_config = net::client_config(&identity).unwrap();
    };
    let mut waiting = vec![];
    for rank in 0..OTHERS {
        name(&mut many, rank);
        waiting.push(knock(&many, &called, rank));
    }
    name(&mut many, OTHERS);
    let pushy: Vec<_> = (0..10).map(|_| knock(&many, &called, OTHERS)).collect();
    until_put_off(&pushy, 2);
    let mut incoming = called.lobby.expect(JOB, GENERATION);
    let admitted = called.runtime.block_on(async {
        let mut ranks = BTreeMap::new();
        while ranks.len() <= OTHERS as usize {
            let accepted = incoming.recv().await.unwrap();
            ranks.insert(accepted.rank(), accepted);
        }
        ranks
    });
    assert!(admitted.keys().copied().eq((0..=OTHERS).map(Rank)));
    until_put_off(&waiting, 0);
}

#[test]
fn a_rank_that_is_put_off_comes_again() {
    let workers = workers(2);
    let placement = Placement::even(2, 2);
    let config = |rank: usize| {
        workers[rank].config(rank as u32, vec![workers[1 - rank].peer(1 - rank as u32)], &placement, TIMEOUT)
    };
    let knocks = || (0..8).map(|_| knock(&workers[0], &workers[1], 7)).collect::<Vec<_>>();
    std::thread::scope(|scope| {
        let before = knocks();
        let dials = config(0);
        let dialler = scope.spawn(|| workers[0].connect(dials).unwrap());
        // It is there when the first of the others has had to go.
        until_put_off(&before, 1);
        let after = knocks();
        let last = workers[1].connect(config(1)).unwrap();
        drop((dialler.join().unwrap(), last, before, after));
    });
}

/// A peer with a valid certificate that speaks the greeting, then rubbish.
#[test]
fn rubbish_ends_the_group_and_names_the_rank() {
    let frame = |len: u32| {
        let mut frame = b"LKSF".to_vec();
        frame.extend(GENERATION.0.to_le_bytes());
        frame.extend(0u32.to_le_bytes());
        frame.extend([0; 17 + 2 + 16]);
        frame.extend(len.to_le_bytes());
        frame
    };
    let cases = [
        (b"GET / HTTP/1.1\r\nHost: a.very.long.name.for.a.host.example\r\n\r\n".to_vec(), "magic number"),
        (frame(u32::MAX), "a payload of 4294967295 bytes"),
        (frame(8)[..30].to_vec(), "ends inside a frame"),
    ];
    for (bytes, expected) in cases {
        let workers = workers(2);
        let placement = Placement::even(2, 2);
        let group = std::thread::scope(|scope| {
            let config = workers[1].config(1, vec![workers[0].peer(0)], &placement, TIMEOUT);
            let honest = scope.spawn(|| workers[1].connect(config).unwrap());
            workers[0].runtime.block_on(async {
                let peer = workers[1].peer(1);
                let tls = workers[0].client_config.clone();
                let dialled = workers[0].endpoint.connect_with(tls, peer.addresses[0], &peer.server_name);
                let connection = dialled.unwrap().await.unwrap();
                let (mut send, mut recv) = connection.open_bi().await.unwrap();
                let mut hello = [&b"LKSH"[..], &PROTOCOL_VERSION.to_le_bytes()].concat();
                hello.extend(JOB.0.to_le_bytes());
                hello.extend(GENERATION.0.to_le_bytes());
                hello.extend(0u32.to_le_bytes());
                send.write_all(&hello).await.unwrap();
                recv.read_exact(&mut [0; 26]).await.unwrap();
                for lane in [0u8, 1] {
                    let mut stream = connection.open_uni().await.unwrap();
                    stream.write_all(&[lane]).await.unwrap();
                    if lane == 0 {
                        stream.write_all(&bytes).await.unwrap();
                    }
                    stream.finish().unwrap();
                }
                // The honest side accepts its group, reads the rubbish and closes.
                connection.accept_uni().await.unwrap();
                let closed = connection.closed().await;
                assert!(closed.to_string().contains("rank 0 broke the protocol"), "{closed}");
            });
            honest.join().unwrap()
        });
        let error = group.failure().unwrap();
        assert_eq!(error.culprit(), Some(Rank(0)));
        assert!(error.to_string().contains(expected), "{error}");
    }
}
