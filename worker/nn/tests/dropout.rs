//! Dropout keyed by the sample: the mask does not depend on how a batch is cut.
#![allow(clippy::unwrap_used)]

use lockstep_common::ids::LogicalShard;
use lockstep_nn::forward::{Forward, LocalOnly};
use lockstep_nn::layers::dropout;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

fn context(step: u64, samples: std::ops::Range<u64>) -> Forward {
    Forward::training(9, step, LogicalShard(0), samples.collect(), Arc::new(LocalOnly))
}

fn ones(rows: i64) -> Tensor {
    Tensor::ones([rows, 3, 50], (Kind::Float, Device::Cpu))
}

#[test]
fn any_cut_of_the_batch_draws_the_same_mask() {
    let whole = dropout(&ones(12), 0.5, "d", &mut context(4, 0..12)).unwrap();
    let parts = [0..5, 5..5, 5..12].map(|r| {
        let rows = (r.end - r.start) as i64;
        dropout(&ones(rows), 0.5, "d", &mut context(4, r)).unwrap()
    });
    assert_eq!(Tensor::cat(&parts, 0), whole);
}

#[test]
fn step_phase_network_operation_and_use_each_draw_another_mask() {
    let base = || context(4, 0..12);
    let draw = |name, fwd: &mut Forward| dropout(&ones(12), 0.5, name, fwd).unwrap();
    let mut first = base();
    let mask = draw("d", &mut first);
    assert_eq!(draw("d", &mut base()), mask);
    assert_ne!(draw("d", &mut first), mask, "a second use in the same pass");
    assert_ne!(draw("e", &mut base()), mask);
    assert_ne!(draw("d", &mut context(5, 0..12)), mask);
    let mut other = base();
    other.phase = 1;
    assert_ne!(draw("d", &mut other), mask);
    let mut other = base();
    other.network = 1;
    assert_ne!(draw("d", &mut other), mask);
}

#[test]
fn keeps_the_expected_share_and_scales_it_to_the_same_mean() {
    let y = dropout(&ones(200), 0.8, "d", &mut context(0, 0..200)).unwrap();
    // 30,000 draws: the share kept has a standard deviation of 0.0023.
    assert!((y.mean(Kind::Double).double_value(&[]) - 1.0).abs() < 5.0 * 0.0023 / 0.8);
    assert!((y.max().double_value(&[]) - 1.25).abs() < 1e-4);
}

#[test]
fn evaluation_keeps_everything_and_a_wrong_number_of_samples_is_refused() {
    assert_eq!(dropout(&ones(2), 0.5, "d", &mut Forward::evaluation()).unwrap(), ones(2));
    let message = dropout(&ones(2), 0.5, "d", &mut context(0, 0..3)).unwrap_err().to_string();
    assert!(message.contains("expected 3 rows"), "{message}");
}
