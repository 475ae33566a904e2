//! A replica that has changed by itself is known before anything that was computed from it is applied.

use super::recovery::{fresh, group, jobs, to_the_end};
use super::*;
use crate::train::mismatch::Mismatch;
use lockstep_common::ids::Rank;

/// Flips the lowest bit of the first element of `tensor`, in place.
fn flip(tensor: &Tensor) {
    let mut raw = lockstep_nn::bytes::RawTensor::copy_from(tensor).unwrap();
    raw.bytes[0] ^= 1;
    tch::no_grad(|| tensor.detach().copy_(&raw.to_tensor().unwrap()));
}

#[test]
fn a_change_of_any_tensor_is_seen_and_an_update_is_none() {
    for job in jobs() {
        let plan = TaskPlan::new(&job);
        group::<f32, _>(&job, fresh::<f32>(&job, 1), |_, mut bench| {
            bench.step();
            let replica = &mut bench.trainer.replica;
            assert!(replica.is_sealed() && replica.examine(true).unwrap().1);
            replica.vouch(Rank(0), &job.checks).unwrap();
            let mut state: Vec<_> = replica.weight_tensors().collect();
            state.extend(replica.optimizer_tensors(&plan).unwrap());
            for (name, tensor) in state.iter().filter(|(name, _)| !name.ends_with("/updates")) {
                flip(tensor);
                assert!(!replica.examine(true).unwrap().1, "{name}");
                flip(tensor);
                assert!(replica.examine(true).unwrap().1, "{name}");
            }
            flip(&state[0].1);
            let error = replica.vouch(Rank(0), &job.checks).unwrap_err();
            assert!(matches!(error, TrainError::Unavailable { culprit: Some(Rank(0)), .. }), "{error}");
            assert!(error.to_string().starts_with("after step 1 rank 0 found its state changed"), "{error}");
            assert!(!replica.is_whole(), "it is not to be kept");
        });
    }
}

/// What changes by itself.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Weight,
    /// The last of the last optimizer's tensors: a sum of gradients or their squares.
    OptimizerState,
}

/// Steps until one fails, with a bit flipped before a step if this rank is the odd one; the verdict, and the position and the
/// weights with which that step began.
fn until_a_mismatch(bench: &mut Bench<f32>, odd: Option<(Part, u64)>) -> (Mismatch, Position, String) {
    loop {
        let replica = &bench.trainer.replica;
        match odd {
            Some((Part::Weight, step)) if step == replica.step => replica.flip_bit().unwrap(),
            Some((Part::OptimizerState, step)) if step == replica.step => {
                let state = replica.optimizer_tensors(&bench.trainer.plan).unwrap();
                let is_sum =
                    |(name, _): &&(String, Tensor)| name.contains("/momentum") || name.contains("/exp_avg.");
                flip(&state.iter().rfind(is_sum).unwrap().1);
            }
            _ => {}
        }
        let before = (replica.position(), replica.weights_digest().unwrap());
        match bench.try_step(Wishes::default()) {
            Ok(_) => {}
            Err(TrainError::Mismatch(mismatch)) => {
                assert!(bench.trainer.group.failure().is_none(), "the others come to it by themselves");
                return (mismatch, before.0, before.1);
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_flipped_bit_is_found_in_the_next_phase_and_the_others_go_on_as_if_nothing_had_been() {
    let cases = [
        (Part::Weight, 1, 4),
        (Part::Weight, 2, 0),
        (Part::Weight, 3, 5),
        (Part::OptimizerState, 1, 4),
        (Part::OptimizerState, 2, 7),
        (Part::OptimizerState, 3, 5),
    ];
    for job in jobs() {
        let (digest, _) = to_the_end::<f32>(&job, fresh::<f32>(&job, 1));
        for (part, ranks, at) in cases {
            let odd = ranks - 1;
            let ends = group::<f32, _>(&job, fresh::<f32>(&job, ranks), |rank, mut bench| {
                let found = until_a_mismatch(&mut bench, (rank == odd).then_some((part, at)));
                (found, bench.trainer.into_replica())
            });
            let mut right = Vec::new();
            for (rank, ((mismatch, begun, weights), replica)) in (0..).map(Rank).zip(ends) {
                match part {
                    Part::Weight => {
                        assert_eq!(
                            (begun, replica.position()),
                            (Position::at(at), Position::at(at)),
                            "{rank}"
                        );
                        assert_eq!(replica.weights_digest().unwrap(), weights, "nothing has been applied");
                    }
                    // No gradient comes from it. So the update itself finds out, and the rank tells at the next one.
                    Part::OptimizerState => {
                        let soon = Position::at(at)..=Position::at(at + 1);
                        assert!(soon.contains(&replica.position()), "{rank}: {}", replica.position());
                    }
                }
                assert_eq!(mismatch.culprit(), Some(Rank(odd)));
                // After a wrong update the odd one's seal bears nobody out, and one of two alone is no majority.
                let has_others = ranks > if part == Part::Weight { 1 } else { 2 };
                assert_eq!(mismatch.is_right(rank), has_others && rank != Rank(odd), "{part:?}, {ranks}");
                if mismatch.is_right(rank) {
                    right.push(replica);
                }
            }
            if !right.is_empty() {
                assert_eq!(to_the_end::<f32>(&job, right).0, digest);
            }
        }
    }
}
