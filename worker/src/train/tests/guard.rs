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
            assert!(replica.is_sealed() && replica.examine().unwrap().1);
            replica.vouch(Rank(0), &plan).unwrap();
            let mut state: Vec<_> = replica.weight_tensors().collect();
            state.extend(replica.optimizer_tensors(&plan).unwrap());
            for (name, tensor) in state.iter().filter(|(name, _)| !name.ends_with("/updates")) {
                flip(tensor);
                assert!(!replica.examine().unwrap().1, "{name}");
                flip(tensor);
                assert!(replica.examine().unwrap().1, "{name}");
            }
            flip(&state[0].1);
            let error = replica.vouch(Rank(0), &plan).unwrap_err();
            assert!(matches!(error, TrainError::Unavailable { culprit: Some(Rank(0)), .. }), "{error}");
            assert!(error.to_string().starts_with("rank 0 found its state changed"), "{error}");
            assert!(!replica.is_whole(), "it is not to be kept");
        });
    }
}

/// Steps until one fails; the verdict, the position and the weights.
fn until_a_mismatch(bench: &mut Bench<f32>, odd: Option<u64>) -> (Mismatch, Position, String) {
    loop {
        let replica = &bench.trainer.replica;
        let before = (replica.position(), replica.weights_digest().unwrap());
        if odd == Some(replica.step) {
            replica.flip_bit().unwrap();
        }
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
    for job in jobs() {
        let (digest, _) = to_the_end::<f32>(&job, fresh::<f32>(&job, 1));
        for (ranks, at) in [(1, 4), (2, 0), (2, 7), (3, 5)] {
            let odd = ranks - 1;
            let ends = group::<f32, _>(&job, fresh::<f32>(&job, ranks), |rank, mut bench| {
                let found = until_a_mismatch(&mut bench, (rank == odd).then_some(at));
                (found, bench.trainer.into_replica())
            });
            let mut right = Vec::new();
            for (rank, ((mismatch, position, weights), replica)) in (0..).map(Rank).zip(ends) {
                assert_eq!((position, replica.position()), (Position::at(at), Position::at(at)), "{rank}");
                assert_eq!(mismatch.culprit(), Some(Rank(odd)));
                assert_eq!(mismatch.is_true(rank), rank != Rank(odd));
                if mismatch.is_true(rank) {
                    assert_eq!(replica.weights_digest().unwrap(), weights, "nothing has been applied");
                    right.push(replica);
                }
            }
            if !right.is_empty() {
                assert_eq!(to_the_end::<f32>(&job, right).0, digest);
            }
        }
    }
}
