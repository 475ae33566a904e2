use super::super::doorbell::Doorbell;
use super::super::ring::{Consumer, Producer, RingError, ring_bytes};
use super::super::segment::Segment;
use super::child::{Partner, Role};
use super::{Frames, receive_frames, send_frames};
use crate::frame::HEADER_LEN;
use bytes::Bytes;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const CAPACITY: usize = 4096;

/// Offsets within a ring, as other processes see them.
const HEAD_AT: usize = 0;
const TAIL_AT: usize = 128;
const DATA_AT: usize = 512;

fn ring(capacity: usize) -> (Arc<Segment>, Producer, Consumer) {
    let segment = Arc::new(Segment::create("lockstep-test", ring_bytes(capacity)).unwrap());
    let producer = Producer::new(segment.clone(), 0, capacity).unwrap();
    let consumer = Consumer::new(segment.clone(), 0, capacity).unwrap();
    (segment, producer, consumer)
}

/// Overwrites 8 bytes of shared memory, as a defective peer might.
fn overwrite(segment: &Segment, at: usize, value: u64) {
    assert!(at + 8 <= segment.len() && at.is_multiple_of(8));
    // SAFETY: aligned and within the segment by the line above.
    let word = unsafe { AtomicU64::from_ptr(segment.as_ptr().add(at).cast()) };
    word.store(value, Ordering::SeqCst);
}

fn take(header: &[u8; HEADER_LEN], payload: &[u8]) -> ([u8; HEADER_LEN], Vec<u8>) {
    (*header, payload.to_vec())
}

fn bytes(len: usize) -> [Bytes; 1] {
    [Bytes::from(vec![3; len])]
}

#[test]
fn two_threads_pass_frames_of_any_size_through_the_rings_end() {
    const COUNT: usize = 50_000;
    let (_, mut producer, mut consumer) = ring(CAPACITY);
    let (at_producer, at_consumer) = (Doorbell::create().unwrap(), Doorbell::create().unwrap());
    let frames = || Frames::new(1, CAPACITY / 2 - 64);
    std::thread::scope(|scope| {
        scope.spawn(|| send_frames(&mut producer, &at_producer, &at_consumer, frames(), COUNT));
        receive_frames(&mut consumer, &at_consumer, &at_producer, frames(), COUNT);
    });
}

#[tokio::test]
async fn two_processes_pass_frames_of_any_size_through_the_rings_end() {
    const COUNT: usize = 20_000;
    const MOST: usize = 30_000;
    let capacity = 1 << 16;
    let partner = Partner::start(Role::Send { seed: 5, most: MOST, count: COUNT }, capacity).await;
    let mut consumer = partner.side.consumer(partner.peer.ring.clone());
    let frames = Frames::new(5, MOST);
    receive_frames(&mut consumer, &partner.side.doorbell, &partner.peer.doorbell, frames, COUNT);
}

#[test]
fn a_ring_outside_its_segment_is_refused() {
    let segment = Arc::new(Segment::create("lockstep-test", ring_bytes(CAPACITY)).unwrap());
    for (offset, capacity) in [
        (0, CAPACITY * 2),
        (512, CAPACITY),
        (8, CAPACITY / 2),
        (0, 3000),
        (0, 128),
        (usize::MAX - 511, CAPACITY),
    ] {
        let refusal = Consumer::new(segment.clone(), offset, capacity).err();
        assert_eq!(refusal, Some(RingError::Place { offset, capacity, segment: segment.len() }));
    }
}

#[test]
fn a_payload_that_could_never_fit_is_refused() {
    let (_, mut producer, _) = ring(CAPACITY);
    let refusal = Err(RingError::TooLong { len: CAPACITY / 2 - 63, most: CAPACITY / 2 - 64 });
    assert_eq!(producer.push(&[0; _], &bytes(CAPACITY / 2 - 63)), refusal);
    assert_eq!(producer.push(&[0; _], &bytes(CAPACITY / 2 - 64)), Ok(true));
}

#[test]
fn a_starved_producer_is_told_once_when_half_the_ring_is_free() {
    let (_, mut producer, mut consumer) = ring(CAPACITY);
    let told = |consumer: &mut Consumer| consumer.pop(|_, _| ()).unwrap().unwrap().starved;
    for _ in 0..CAPACITY / 512 {
        assert_eq!(producer.push(&[0; _], &bytes(512 - 64)), Ok(true));
    }
    assert_eq!(producer.push(&[0; _], &bytes(0)), Ok(false));
    let signals: Vec<bool> = (0..8).map(|_| told(&mut consumer)).collect();
    assert_eq!(signals, [false, false, false, true, false, false, false, false]);
    assert_eq!(producer.push(&[0; _], &bytes(0)), Ok(true));
    assert!(!told(&mut consumer));
}

#[test]
fn overwritten_cursors_lengths_and_kinds_are_named() {
    // Three frames of 1000 bytes fit.
    let full = 3 * 1088;
    let kind_and_len = |len: u32| u64::from(len) | 0x6d61_7246 << 32;

    for tail in [CAPACITY as u64 + 64, u64::MAX - 63, 65, 1] {
        let (segment, _producer, mut consumer) = ring(CAPACITY);
        overwrite(&segment, TAIL_AT, tail);
        let error = Err(RingError::Cursor { ours: 0, theirs: tail, capacity: CAPACITY });
        assert!(!consumer.is_empty());
        assert_eq!(consumer.pop(take), error);
        assert_eq!(consumer.pop(take), error);
    }
    for head in [full + 64, u64::MAX - 4095, 7] {
        let (segment, mut producer, _consumer) = ring(CAPACITY);
        while producer.push(&[0; _], &bytes(1000)).unwrap() {}
        overwrite(&segment, HEAD_AT, head);
        let error = RingError::Cursor { ours: full, theirs: head, capacity: CAPACITY };
        assert_eq!(producer.push(&[0; _], &bytes(1000)), Err(error));
    }
    for len in [65, 1 << 11, 1 << 20, u32::MAX] {
        let (segment, mut producer, mut consumer) = ring(CAPACITY);
        assert_eq!(producer.push(&[0; _], &bytes(64)), Ok(true));
        overwrite(&segment, DATA_AT + 56, kind_and_len(len));
        assert_eq!(consumer.pop(take), Err(RingError::Length { at: 0, len }));
    }
    for kind in [0, 0x7069_6b53, u32::MAX] {
        let (segment, mut producer, mut consumer) = ring(CAPACITY);
        assert_eq!(producer.push(&[0; _], &bytes(64)), Ok(true));
        overwrite(&segment, DATA_AT + 56, 64 | u64::from(kind) << 32);
        assert_eq!(consumer.pop(take), Err(RingError::Kind { at: 0, kind }));
    }
}

#[test]
fn a_skip_marker_without_a_frame_behind_it_is_refused() {
    let (segment, mut producer, mut consumer) = ring(CAPACITY);
    assert_eq!(producer.push(&[0; _], &bytes(64)), Ok(true));
    assert!(consumer.pop(take).unwrap().is_some());
    assert_eq!(producer.push(&[0; _], &bytes(64)), Ok(true));
    overwrite(&segment, DATA_AT + 128 + 56, 0x7069_6b53 << 32);
    assert_eq!(consumer.pop(take), Err(RingError::Kind { at: 128, kind: 0x7069_6b53 }));
}

proptest! {
    #[test]
    fn a_ring_is_a_queue(steps in prop::collection::vec(prop::option::of(0..=448usize), 1..200)) {
        let (_, mut producer, mut consumer) = ring(1024);
        let mut model = VecDeque::new();
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Some(len) => {
                    let (header, payload) = ([number as u8; HEADER_LEN], vec![number as u8; len]);
                    if producer.push(&header, &[Bytes::from(payload.clone())]).unwrap() {
                        model.push_back((header, payload));
                    } else {
                        prop_assert!(!model.is_empty(), "an empty ring has room for every frame");
                    }
                }
                None => {
                    prop_assert_eq!(consumer.is_empty(), model.is_empty());
                    prop_assert_eq!(consumer.pop(take).unwrap().map(|popped| popped.value), model.pop_front());
                }
            }
        }
    }

    #[test]
    fn an_overwritten_ring_gives_frames_within_it_or_an_error(
        lens in prop::collection::vec(0..=448usize, 1..12),
        popped_before in 0..4usize,
        damage in prop::collection::vec((0..1536usize / 8, damage()), 1..6),
    ) {
        let (segment, mut producer, mut consumer) = ring(1024);
        for len in lens {
            producer.push(&[9; _], &bytes(len)).unwrap();
        }
        for _ in 0..popped_before {
            consumer.pop(|_, _| ()).unwrap();
        }
        for (word, value) in damage {
            // Half of the damage goes where it hurts most.
            let at = if word.is_multiple_of(2) { word * 8 } else { [HEAD_AT, TAIL_AT, DATA_AT + 56][word / 2 % 3] };
            overwrite(&segment, at, value);
        }
        let data = segment.as_ptr() as usize + DATA_AT..segment.as_ptr() as usize + DATA_AT + 1024;
        let mut frames = 0;
        while let Ok(Some(_)) = consumer.pop(|_, payload| {
            let payload = payload.as_ptr_range();
            assert!(data.start <= payload.start as usize && payload.end as usize <= data.end);
        }) {
            frames += 1;
            prop_assert!(frames <= 1024 / 64, "more frames than the ring has room for");
        }
        let pushed = (0..100).take_while(|_| producer.push(&[9; _], &bytes(1)) == Ok(true)).count();
        // A forged cursor can free what was pushed before it was read, but once.
        prop_assert!(pushed <= 2 * 1024 / 128);
    }
}

/// Values that are almost right.
fn damage() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0..40u64).prop_map(|lines| lines * 64),
        (0..40u64).prop_map(|lines| 0u64.wrapping_sub(lines * 64)),
        (0..2000u64).prop_map(|len| len | 0x6d61_7246 << 32),
        Just(0x7069_6b53 << 32),
    ]
}
