//! Faults at the engine's own door: what a transport may bring that no honest rank sends.

use crate::buffer::Pool;
use crate::engine::Engine;
use crate::frame::{Header, Stage};
use crate::transport::{Farewell, Frame, Lane, Transport};
use crate::{CollectiveError, Group, Numbers, Pending, ReduceOp, Tag, TagKind};
use crossbeam_channel::Receiver;
use lockstep_common::ids::{Generation, Rank};
use lockstep_common::job::Reduction;
use lockstep_common::placement::Placement;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

mod faults;
mod overdue;

const TIMEOUT: Duration = Duration::from_secs(20);

fn groups(ranks: u32, timeout: Duration) -> Vec<Group> {
    Group::in_process(&Placement::even(ranks, ranks), Reduction::Exact, timeout).unwrap()
}

fn tag() -> Tag {
    Tag::new(7, 0, TagKind::Gradient).index(2)
}

/// A frame that fits the sum of two `f32` on rank 0, in the name of rank 1.
fn honest() -> Header {
    Header {
        generation: Generation(0),
        source: Rank(1),
        tag: tag(),
        signature: 1,
        stage: Stage::Contribution,
        offset: 0,
        total: 8,
        payload_len: 8,
    }
}

fn deliver(group: &Group, header: Header) {
    let payload = Pool::default().copy([&[0u8; 8][..header.payload_len.min(8)]].into_iter());
    group.engine().handle_frame(Rank(1), header, payload);
}

fn start(group: &Group) -> Pending<Numbers<f32>> {
    group.all_reduce(tag(), vec![vec![1f32, 2.0]], ReduceOp::Sum).unwrap()
}

#[test]
fn an_honest_frame_completes_before_and_after_the_start() {
    for early in [false, true] {
        let groups = groups(2, TIMEOUT);
        if early {
            deliver(&groups[0], honest());
        }
        let pending = start(&groups[0]);
        if !early {
            assert!(!pending.is_ready());
            deliver(&groups[0], honest());
        }
        assert_eq!(*pending.wait().unwrap(), [1.0, 2.0]);
    }
}

/// A peer that has sent its part already: it is done, and leaves, as soon as it gets ours.
struct LeavesOnceServed(Arc<OnceLock<Weak<Engine>>>);

impl Transport for LeavesOnceServed {
    fn send(&self, to: Rank, _: Lane, _: Frame) {
        if let Some(engine) = self.0.get().and_then(Weak::upgrade) {
            engine.handle_left(to);
        }
    }

    fn abort(&self, _: &Farewell) {}

    fn leave(&self) -> Vec<Receiver<()>> {
        vec![]
    }
}

#[test]
fn a_peer_may_leave_as_soon_as_it_has_our_part() {
    let handle = Arc::new(OnceLock::new());
    let engine =
        Engine::new(Rank(0), 2, Generation(0), TIMEOUT, Some(Box::new(LeavesOnceServed(handle.clone()))));
    handle.set(Arc::downgrade(&engine)).unwrap();
    let placement = Placement::even(2, 2);
    let group = Group::over(engine, placement, Reduction::Exact, &[0, 1]);
    deliver(&group, honest());
    assert_eq!(*start(&group).wait().unwrap(), [1.0, 2.0]);
}

/// In a world of three, in rounds: the first to be served must not be missed for what came from it early.
#[test]
fn a_peer_may_leave_as_soon_as_it_has_our_part_of_a_round() {
    let handle = Arc::new(OnceLock::new());
    let transport = Box::new(LeavesOnceServed(handle.clone()));
    let engine = Engine::new(Rank(0), 3, Generation(0), TIMEOUT, Some(transport));
    handle.set(Arc::downgrade(&engine)).unwrap();
    let group = Group::over(engine, Placement::even(3, 3), Reduction::Exact, &[0, 1, 2]).direct_up_to(2);
    for (source, round) in [(1, 0), (2, 1)] {
        let header = Header { source: Rank(source), offset: round, total: 24, ..honest() };
        let payload = Pool::default().copy([&[0u8; 8][..]].into_iter());
        group.engine().handle_frame(Rank(source), header, payload);
    }
    assert_eq!(*start(&group).wait().unwrap(), [1.0, 2.0]);
}

#[test]
fn dishonest_frames_end_the_group_and_name_the_sender() {
    let cases: [(Header, &str); 7] = [
        (Header { generation: Generation(1), ..honest() }, "a frame of g1 in a group of g0"),
        (Header { source: Rank(0), ..honest() }, "in the name of rank 0"),
        (Header { signature: 2, ..honest() }, "another operation or element type"),
        (Header { total: 12, ..honest() }, "has 12 bytes, expected 8"),
        (Header { stage: Stage::Result, ..honest() }, "a result piece"),
        (Header { offset: 4, ..honest() }, "pieces that do not fit"),
        (Header { payload_len: 0, ..honest() }, "an empty piece"),
    ];
    for (header, expected) in cases {
        let groups = groups(2, TIMEOUT);
        let pending = start(&groups[0]);
        deliver(&groups[0], header);
        let error = pending.wait().unwrap_err();
        assert_eq!(error.culprit(), Some(Rank(1)));
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn dishonest_pieces_of_a_large_sum_end_the_group() {
    // Rank 0 reduces the first half, 16,384 elements, in one piece.
    const LEN: usize = 32_768;
    let piece = Header { total: LEN as u64, payload_len: LEN * 2, ..honest() };
    let cases: [(Header, usize, &str); 4] = [
        (Header { total: 3, ..piece }, LEN * 2, "it reduces 3 elements, this rank 32768"),
        (Header { offset: 1, ..piece }, LEN * 2, "wrong place or size"),
        (Header { payload_len: 4, ..piece }, 4, "wrong place or size"),
        (Header { stage: Stage::Result, ..piece }, LEN * 2, "wrong place or size"),
    ];
    for (header, len, expected) in cases {
        let groups = groups(2, TIMEOUT);
        let pending = groups[0].all_reduce(tag(), vec![vec![1f32; LEN]], ReduceOp::Sum).unwrap();
        groups[0].engine().handle_frame(Rank(1), header, Pool::default().take(len));
        let error = pending.wait().unwrap_err();
        assert_eq!(error.culprit(), Some(Rank(1)));
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn a_gather_to_one_rank_brings_the_others_nothing() {
    let groups = groups(3, TIMEOUT);
    let bytes = |rank: u32| vec![rank as u8; 1 + 300_000 * rank as usize];
    let pending: Vec<_> =
        groups.iter().map(|group| group.gather_to(tag(), Rank(1), bytes(group.rank().0)).unwrap()).collect();
    for (group, pending) in groups.iter().zip(pending) {
        let blobs = pending.wait().unwrap();
        let expected = if group.rank() == Rank(1) { (0..3).map(bytes).collect() } else { vec![] };
        assert_eq!(*blobs, expected);
    }
    // What went to the root alone: two blobs, and headers.
    let received: u64 = groups.iter().map(|group| group.stats().bytes_received).sum();
    assert!(received < 610_000, "{received}");
}

#[test]
fn a_blob_beyond_its_kind_ends_the_group() {
    let digest = Tag::new(7, 0, TagKind::Digest);
    let blob = Header { tag: digest, signature: crate::group::GATHER, ..honest() };
    let cases = [
        (Header { total: 5000, ..blob }, "5000 bytes, more than 4096"),
        (Header { total: 64, ..blob }, "pieces that do not fit"),
    ];
    for (header, expected) in cases {
        let groups = groups(2, TIMEOUT);
        let pending = groups[0].all_gather(digest, vec![1; 64]).unwrap();
        deliver(&groups[0], header);
        let error = pending.wait().unwrap_err();
        assert_eq!(error.culprit(), Some(Rank(1)));
        assert!(error.to_string().contains(expected), "{error}");
    }
    let refused = groups(2, TIMEOUT)[0].all_gather(digest, vec![1; 5000]).err().unwrap();
    assert!(matches!(refused, CollectiveError::Misuse { .. }), "{refused}");
}

/// Frames that cost nothing but their headers, for collectives that nobody starts.
#[test]
fn empty_early_frames_hold_their_sender_up() {
    let groups = groups(2, TIMEOUT);
    let engine = groups[0].engine();
    let ahead = |lane| engine.is_far_ahead(Rank(1), lane);
    for step in 0..700_000 {
        let tag = Tag::new(step, 0, TagKind::Barrier);
        engine.handle_frame(Rank(1), Header { tag, payload_len: 0, ..honest() }, Pool::default().take(0));
        if ahead(Lane::Small) {
            assert!(ahead(Lane::Bulk) && step > 400_000, "{step}");
            return;
        }
    }
    panic!("no number of frames is too many");
}

/// Pieces for a leader whose host is not ready, more than the vector has.
#[test]
fn pieces_that_come_early_from_another_host_are_counted() {
    const LEN: usize = 32_768;
    let placement = Placement::even(3, 3);
    let groups = Group::on_hosts(&placement, &[0, 0, 1], Reduction::Exact, TIMEOUT).unwrap();
    let pending = groups[0].all_reduce(tag(), vec![vec![1f32; LEN]], ReduceOp::Sum).unwrap();
    let piece = Header { source: Rank(2), total: LEN as u64, payload_len: 4, ..honest() };
    for _ in 0..3 {
        groups[0].engine().handle_frame(Rank(2), piece, Pool::default().take(4));
    }
    let error = pending.wait().unwrap_err();
    assert_eq!(error.culprit(), Some(Rank(2)));
    assert!(error.to_string().contains("more pieces than there are"), "{error}");
}

/// Receipts for a result that is not there yet: this rank must not take what lies in its place for it.
#[test]
fn a_receipt_that_comes_early_ends_the_group() {
    const LEN: usize = 32_768;
    for (hosts, waits) in [([0, 0, 1], 0), ([0, 1, 1], 1), ([0, 0, 0], 0)] {
        let placement = Placement::even(3, 3);
        let groups = Group::on_hosts(&placement, &hosts, Reduction::Exact, TIMEOUT).unwrap();
        let sender = Rank(waits + 1);
        let pending = groups[waits as usize].all_reduce(tag(), vec![vec![1f32; LEN]], ReduceOp::Sum).unwrap();
        let receipt =
            Header { source: sender, stage: Stage::Taken, total: LEN as u64, payload_len: 0, ..honest() };
        groups[waits as usize].engine().handle_frame(sender, receipt, Pool::default().take(0));
        let error = pending.wait().unwrap_err();
        assert_eq!(error.culprit(), Some(sender), "{hosts:?}: {error}");
        assert!(error.to_string().contains("an unexpected receipt"), "{hosts:?}: {error}");
    }
}

#[test]
fn a_frame_of_an_old_generation_is_dropped_and_counted() {
    let engine = Engine::new(Rank(0), 2, Generation(5), TIMEOUT, None);
    engine.handle_frame(Rank(1), Header { generation: Generation(4), ..honest() }, Pool::default().take(8));
    assert_eq!(engine.stats().stale_frames, 1);
    assert_eq!(engine.failure(), None);
}

#[test]
fn a_silent_rank_is_named_with_step_phase_and_bucket() {
    let limit = Duration::from_millis(200);
    let groups = groups(3, limit);
    let pending: Vec<_> = groups[..2].iter().map(start).collect();
    let errors: Vec<_> = pending.iter().map(|pending| pending.wait().unwrap_err()).collect();
    let first = errors.iter().find(|e| matches!(e, CollectiveError::TimedOut { .. })).unwrap();
    let text = first.to_string();
    assert!(text.starts_with("rank 2 has not entered gradient bucket 2 of step 7, phase 0 after"), "{text}");
    // Whoever did not time out itself heard the same from the one that did.
    assert!(errors.iter().all(|error| error.culprit() == Some(Rank(2))));
}

#[test]
fn an_abort_wakes_waiters_on_every_thread() {
    let groups = groups(2, TIMEOUT);
    let pending = start(&groups[0]);
    std::thread::scope(|scope| {
        let waiters: Vec<_> = (0..3).map(|_| scope.spawn(|| pending.clone().wait())).collect();
        groups[1].abort(CollectiveError::Aborted("cancelled by the user".to_owned()));
        for waiter in waiters {
            let error = waiter.join().unwrap().unwrap_err();
            assert_eq!(error.to_string(), "rank 1 ended the group: cancelled by the user");
        }
    });
}

#[test]
fn a_rank_that_left_fails_what_needs_it_and_nothing_else() {
    let mut groups = groups(3, TIMEOUT);
    drop(groups.pop());
    let broadcast = Tag::new(1, 0, TagKind::Broadcast);
    // Rank 2 has no part in it.
    let sent = groups[0].broadcast(broadcast, Rank(0), Some(vec![1])).unwrap();
    sent.wait().unwrap();
    assert_eq!(*groups[1].broadcast(broadcast, Rank(0), None).unwrap().wait().unwrap(), [1u8][..]);
    let needs = groups[0].barrier(Tag::new(2, 0, TagKind::Barrier)).unwrap();
    let error = needs.wait().unwrap_err();
    assert_eq!(error.to_string(), "rank 2 left the group in barrier 0 of step 2, phase 0");
}

#[test]
fn wrong_calls_are_refused_and_leave_the_group_intact() {
    let groups = groups(2, TIMEOUT);
    let refused =
        |leaves: Vec<Vec<f64>>, op| groups[0].all_reduce(tag(), leaves, op).err().unwrap().to_string();
    assert!(refused(vec![], ReduceOp::Sum).contains("0 vectors for the 1 logical shards"));
    assert!(refused(vec![vec![1.0; 4]], ReduceOp::Moments).contains("an odd length, not 4"));
    let first = start(&groups[0]);
    let again = groups[0].all_reduce(tag(), vec![vec![1f32, 2.0]], ReduceOp::Sum).err().unwrap();
    assert_eq!(again, CollectiveError::TagInUse(tag()));
    let root = groups[0].broadcast(tag(), Rank(2), None).err().unwrap().to_string();
    assert!(root.contains("the root is rank 2 in a group of 2"));
    let other = start(&groups[1]);
    assert_eq!(other.wait().unwrap(), first.wait().unwrap());
    assert_eq!(*first.wait().unwrap(), [2.0, 4.0]);
    let idle = Group::in_process(&Placement::even(1, 2), Reduction::Exact, TIMEOUT).unwrap();
    let error = idle[0].all_reduce(tag(), vec![vec![1f32]], ReduceOp::Sum).err().unwrap();
    assert!(error.to_string().contains("rank 1 owns no logical shard"));
}

#[test]
fn the_flight_record_says_who_is_missing_and_keeps_it_after_a_failure() {
    let groups = groups(3, TIMEOUT);
    let pending: Vec<_> = groups[..2].iter().map(start).collect();
    let waits = loop {
        // Rank 1's part is on its way.
        let snapshot = groups[0].flight();
        if snapshot.in_flight[0].missing.len() == 1 {
            break snapshot;
        }
    };
    assert_eq!(waits.in_flight[0].missing, [(Rank(2), false)]);
    assert_eq!((waits.in_flight[0].signature.as_str(), waits.in_flight[0].bytes), ("sum of f32", 8));
    assert!(waits.last.is_empty() && groups[0].oldest_wait().is_some());
    assert_eq!(groups[0].flight_events(), 1);
    start(&groups[2]).wait().unwrap();
    pending.iter().for_each(|pending| drop(pending.wait().unwrap()));
    let done = groups[0].flight();
    assert!(done.in_flight.is_empty() && done.last[0].completed && done.last[0].tag == tag());
    assert_eq!((groups[0].oldest_wait(), groups[0].flight_events()), (None, 2));

    let next = Tag::new(8, 0, TagKind::Barrier);
    let barrier = groups[0].barrier(next).unwrap();
    groups[1].abort(CollectiveError::Aborted("enough".to_owned()));
    barrier.wait().unwrap_err();
    let failed = groups[0].flight();
    assert!(failed.failure.is_some() && failed.in_flight[0].tag == next, "{failed:?}");
    assert_eq!(failed.in_flight[0].missing.len(), 2);
    assert!(!failed.last[0].completed && failed.last[1].completed);
}
