//! What a recipe may ask for beside the plain step: gradient accumulation, averages of the weights, parameter groups.

use super::{GAN, classifier, job, train, train_part};
use lockstep_common::job::{AverageSpec, JobSpec};
use serde_json::json;

/// All of it at once, but for averages.
fn recipe() -> JobSpec {
    let mut job = job(&classifier("sync"), "accumulation = 2");
    job.optimizer = serde_json::from_value(json!({
        "name": "rmsprop", "form": "tensorflow", "lr": 0.01, "alpha": 0.9, "eps": 1.0, "momentum": 0.9,
        "weight_decay": 4e-5, "groups": [{ "parameters": "*.bias", "lr_factor": 2.0, "weight_decay": 0.0 }],
    }))
    .unwrap();
    job.schedule = serde_json::from_value(json!({ "name": "polynomial", "power": 0.5 })).unwrap();
    job.clip.norm = Some(2.0);
    job
}

fn averaged(job: &JobSpec) -> JobSpec {
    JobSpec { average: Some(AverageSpec::Ema { decay: 0.9, warmup: true }), ..job.clone() }
}

#[test]
fn pieces_of_a_batch_add_up_to_the_batch() {
    let whole = train::<f64>(&job(&classifier("none"), ""), 2, 1);
    let pieces = train::<f64>(&job(&classifier("none"), "accumulation = 2"), 2, 1);
    assert_eq!(whole.losses.len(), pieces.losses.len());
    for (whole, pieces) in whole.losses.iter().zip(&pieces.losses) {
        assert!((whole - pieces).abs() < 1e-12 * whole.abs().max(1.0), "{whole} {pieces}");
    }
    let mlp = "task = \"classify\"\n[model]\nname = \"mlp\"\nclasses = 4\ninputs = 64\nhidden = 16\ndropout = 0.5\nbatch_norm = \"none\"";
    let whole = train::<f64>(&job(mlp, ""), 2, 1);
    let pieces = train::<f64>(&job(mlp, "accumulation = 2"), 2, 1);
    for (whole, pieces) in whole.losses.iter().zip(&pieces.losses) {
        assert!((whole - pieces).abs() < 1e-12 * whole.abs().max(1.0), "dropout: {whole} {pieces}");
    }
    // The negative control: batch norm sees the pieces.
    let whole = train::<f64>(&job(&classifier("sync"), ""), 2, 1);
    let pieces = train::<f64>(&job(&classifier("sync"), "accumulation = 2"), 2, 1);
    assert!((whole.losses[3] - pieces.losses[3]).abs() > 1e-6);
}

#[test]
fn a_recipe_ends_with_the_same_weights_on_every_number_of_workers_and_after_a_resume() {
    let job = averaged(&recipe());
    let alone = train::<f32>(&job, 1, 1);
    for ranks in [2, 3, 4] {
        let other = train::<f32>(&job, ranks, 1);
        assert_eq!((&other.digest, &other.evaluation), (&alone.digest, &alone.evaluation), "{ranks} ranks");
    }
    let saved = train_part::<f32>(&job, 3, 1, None, Some(5)).saved;
    assert!(saved.optimizer.keys().any(|name| name.contains("/average.")), "{:?}", saved.optimizer.keys());
    let resumed = train_part::<f32>(&job, 2, 1, Some(&saved), None);
    assert_eq!((resumed.digest, resumed.evaluation), (alone.digest, alone.evaluation));
}

#[test]
fn averages_are_for_the_evaluation_and_leave_the_weights_alone() {
    let plain = train::<f64>(&recipe(), 1, 1);
    let averaged = train::<f64>(&averaged(&recipe()), 1, 1);
    assert_eq!(averaged.digest, plain.digest);
    assert_ne!(averaged.evaluation, plain.evaluation);
}

#[test]
fn autocast_trains_and_ends_with_the_same_weights_on_every_number_of_workers() {
    for networks in [&classifier("sync"), GAN] {
        let whole = train::<f32>(&job(networks, ""), 1, 1);
        let half = job(networks, "precision = \"bf16\"");
        let alone = train::<f32>(&half, 1, 1);
        for (ranks, threads) in [(1, 3), (2, 1), (3, 1)] {
            assert_eq!(train::<f32>(&half, ranks, threads).digest, alone.digest, "{ranks} ranks");
        }
        assert_ne!(alone.digest, whole.digest, "autocast was not used");
        if networks != GAN {
            let last = (alone.losses.last().unwrap(), whole.losses.last().unwrap());
            // bfloat16 has 8 significant bits; the paths part slowly on a run of 18 steps.
            assert!((last.0 - last.1).abs() < 0.1 && alone.losses.last() < alone.losses.first(), "{last:?}");
        }
    }
}
