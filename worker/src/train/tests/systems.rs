//! Every classification system, at the smallest images that it takes: two steps end with the same bits on one and on two
//! workers, with all that its recipes ask for.

use super::{job, train, unpacked};
use lockstep_common::job::{Augment, AverageSpec, JobSpec, MemoryFormat};
use serde_json::json;

/// A job of two steps of four images of `side` × `side` pixels in two logical shards.
fn system(model: &str, side: u32) -> JobSpec {
    let mut job = job(&format!("task = \"classify\"\n[model]\n{model}\nclasses = 4"), "");
    (job.epochs, job.steps, job.global_batch, job.logical_shards) = (None, Some(2), 4, 2);
    (job.data.channels, job.data.test) = (Some(3), None);
    job.data.augment = vec![Augment::Resize { size: side }, Augment::Flip {}];
    job.data.evaluate = vec![Augment::Resize { size: side }];
    job.optimizer = serde_json::from_value(json!({
        "name": "rmsprop", "form": "tensorflow", "lr": 0.045, "alpha": 0.9, "eps": 1.0, "momentum": 0.9,
        "weight_decay": 4e-5, "no_decay_norm_bias": true, "groups": [{ "parameters": "*.bias", "lr_factor": 2.0 }],
    }))
    .unwrap();
    job.average = Some(AverageSpec::Ema { decay: 0.9, warmup: true });
    (job.loss.label_smoothing, job.clip.norm) = (0.1, Some(2.0));
    job
}

fn same_bits(model: &str, side: u32) {
    let job = system(model, side);
    let (alone, two) = (train::<f32>(&job, 1, 1), train::<f32>(&job, 2, 1));
    assert!(alone.losses.iter().all(|loss| loss.is_finite()), "{model}: {:?}", alone.losses);
    assert_eq!(two.losses, alone.losses, "{model}");
    assert_eq!(two.digest, alone.digest, "{model}");
    assert_eq!(two.saved.optimizer, alone.saved.optimizer, "{model}: optimizer and averages");
}

#[test]
fn nin_ends_with_the_same_bits() {
    same_bits("name = \"nin\"\nbatch_norm = \"none\"", 4);
    same_bits("name = \"nin\"\nwidths = \"imagenet\"", 39);
}

#[test]
fn googlenet_ends_with_the_same_bits() {
    same_bits("name = \"googlenet\"", 15);
    same_bits("name = \"googlenet\"\nvariant = \"paper\"\nbatch_norm = \"none\"", 31);
}

#[test]
fn bn_inception_ends_with_the_same_bits() {
    same_bits("name = \"bn-inception\"", 7);
}

#[test]
fn inception_v3_ends_with_the_same_bits() {
    same_bits("name = \"inception-v3\"\naux = false", 75);
}

#[test]
fn inception_v4_ends_with_the_same_bits() {
    same_bits("name = \"inception-v4\"", 75);
}

#[test]
fn inception_resnet_v1_ends_with_the_same_bits() {
    same_bits("name = \"inception-resnet-v1\"", 75);
}

#[test]
fn inception_resnet_v2_ends_with_the_same_bits() {
    same_bits("name = \"inception-resnet-v2\"\nvariant = \"paper\"", 75);
}

/// Batch norm, branches, auxiliary heads and dropout keep the layout, and the bits on any number of workers.
#[test]
fn channels_last_computes_the_same_and_ends_with_the_same_bits() {
    for (model, side) in [("name = \"googlenet\"", 32), ("name = \"nin\"\nbatch_norm = \"none\"", 8)] {
        let contiguous = system(model, side);
        let channels_last = JobSpec { memory_format: MemoryFormat::ChannelsLast, ..contiguous.clone() };
        let (expected, exact) = (train::<f64>(&contiguous, 1, 1), train::<f64>(&channels_last, 1, 1));
        for (ours, theirs) in exact.losses.iter().zip(&expected.losses) {
            assert!((ours - theirs).abs() < 1e-10 * theirs.abs(), "{model}: {ours} {theirs}");
        }
        let alone = train::<f32>(&channels_last, 1, 1);
        assert_eq!(train::<f32>(&channels_last, 2, 1).digest, alone.digest, "{model}");
        assert_ne!(
            train::<f32>(&contiguous, 1, 1).digest,
            alone.digest,
            "{model}: the same kernels computed"
        );
        // A checkpoint's bytes are in the order of elements, whatever lay how in memory.
        let (ours, theirs) = (unpacked(&exact.saved.weights), unpacked(&expected.saved.weights));
        for ((name, ours), theirs) in ours.iter().zip(theirs.values()) {
            let error = (ours - theirs).abs().max().double_value(&[]);
            assert!(error < 1e-8, "{model}: {name} differs by {error:e}");
        }
    }
}
