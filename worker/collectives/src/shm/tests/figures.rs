//! What passing frames costs. Run with
//! `cargo test --release -p lockstep-collectives figures -- --ignored --nocapture --test-threads=1`.

use super::child::{Partner, Role};
use super::{sleep_until, spin_until};
use crate::shm::ring::CAPACITY_BYTES;
use bytes::Bytes;
use std::time::Instant;

#[tokio::test]
#[ignore = "measures"]
async fn figures_of_a_frames_way_to_another_process_and_back() {
    const ROUNDS: usize = 20_000;
    for spin in [true, false] {
        let partner = Partner::start(Role::Echo { spin, count: ROUNDS }, CAPACITY_BYTES).await;
        let (mut producer, mut consumer) =
            (partner.side.producer(), partner.side.consumer(partner.peer.ring.clone()));
        let payload = [Bytes::from(vec![7; 4096])];
        let mut times = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            let start = Instant::now();
            assert!(producer.push(&[1; _], &payload).unwrap());
            partner.peer.doorbell.ring();
            if spin {
                spin_until(|| !consumer.is_empty());
            } else {
                sleep_until(&partner.side.doorbell, || !consumer.is_empty());
            }
            let got = consumer.pop(|_, payload| Bytes::copy_from_slice(payload)).unwrap().unwrap();
            times.push(start.elapsed());
            assert_eq!(got.value.len(), 4096);
        }
        times.sort();
        let at = |part: usize| times[ROUNDS * part / 100] / 2;
        let how = if spin { "spinning" } else { "sleeping" };
        println!("4 KB one way, {how}: median {:?}, 99th percentile {:?}", at(50), at(99));
    }
}

#[tokio::test]
#[ignore = "measures"]
async fn figures_of_a_flood_of_frames() {
    const COUNT: usize = 40_000;
    const LEN: usize = 128 << 10;
    let partner = Partner::start(Role::Flood { len: LEN, count: COUNT }, CAPACITY_BYTES).await;
    let mut consumer = partner.side.consumer(partner.peer.ring.clone());
    let mut target = vec![0; LEN];
    spin_until(|| !consumer.is_empty());
    let start = Instant::now();
    for _ in 0..COUNT {
        spin_until(|| !consumer.is_empty());
        consumer.pop(|_, payload| target.copy_from_slice(payload)).unwrap().unwrap();
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("128 KB frames, copied in and out: {:.2} GB/s", (COUNT * LEN) as f64 / seconds / 1e9);
}
