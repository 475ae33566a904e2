//! Tests of the shared memory, some of them with a second process.

mod arena;
mod child;
mod doorbell;
mod figures;
mod introduce;
mod ring;

use super::doorbell::{Doorbell, Sleeper};
use super::ring::{Consumer, Producer};
use crate::frame::HEADER_LEN;
use bytes::Bytes;
use std::time::{Duration, Instant};

/// A sleep as long as this means that a wake-up was lost.
const PATIENCE: Duration = Duration::from_secs(10);

/// Sleeps until `ready`, by the protocol of the doorbell.
fn sleep_until(bell: &Doorbell, mut ready: impl FnMut() -> bool) {
    loop {
        bell.arm(Sleeper::Waiter);
        if ready() {
            return bell.disarm();
        }
        let start = Instant::now();
        bell.sleep(Sleeper::Waiter, Some(PATIENCE));
        bell.disarm();
        assert!(start.elapsed() < PATIENCE, "a wake-up was lost");
    }
}

/// Polls until `ready`.
fn spin_until(mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        std::hint::spin_loop();
        assert!(start.elapsed() < PATIENCE, "nothing came");
    }
}

/// Random numbers from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// The frames that a seed gives: both sides know them.
struct Frames {
    random: Random,
    most: usize,
}

impl Frames {
    fn new(seed: u64, most: usize) -> Self {
        Self { random: Random(seed), most }
    }

    /// Half of the frames are short, the rest of any length. The payload comes in up to three parts.
    fn next(&mut self) -> ([u8; HEADER_LEN], Vec<Bytes>) {
        let most = if self.random.next().is_multiple_of(2) { self.most.min(100) } else { self.most };
        let len = self.random.below(most + 1);
        let mut header = [0; HEADER_LEN];
        header.fill_with(|| self.random.next() as u8);
        let first = self.random.next() as u8;
        let payload: Bytes = (0..len).map(|at| first.wrapping_add((at % 251) as u8)).collect();
        let (a, b) = (self.random.below(len + 1), self.random.below(len + 1));
        let parts =
            vec![payload.slice(..a.min(b)), payload.slice(a.min(b)..a.max(b)), payload.slice(a.max(b)..)];
        (header, parts)
    }
}

fn send_frames(producer: &mut Producer, own: &Doorbell, peers: &Doorbell, mut frames: Frames, count: usize) {
    for _ in 0..count {
        let (header, payload) = frames.next();
        if !producer.push(&header, &payload).unwrap() {
            sleep_until(own, || producer.push(&header, &payload).unwrap());
        }
        peers.ring();
    }
}

fn receive_frames(
    consumer: &mut Consumer,
    own: &Doorbell,
    peers: &Doorbell,
    mut frames: Frames,
    count: usize,
) {
    for _ in 0..count {
        let (header, payload) = frames.next();
        sleep_until(own, || !consumer.is_empty());
        let popped = consumer.pop(|got_header, got| {
            assert_eq!(*got_header, header);
            assert!(got == payload.concat());
        });
        if popped.unwrap().unwrap().starved {
            peers.ring();
        }
    }
    assert!(consumer.is_empty());
}
