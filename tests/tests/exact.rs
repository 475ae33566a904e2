//! Invariant 1: the final weights and every step's loss depend on the job file, not on the workers.

use lockstep_tests::data::fashion_mnist;
use lockstep_tests::job::{Job, gan, set};
use lockstep_tests::place::{Place, SIDE};
use std::collections::BTreeMap;

/// Whoever writes a checkpoint, and however many do it, its files are the same.
#[test]
fn a_checkpoint_holds_the_same_bytes_whoever_wrote_it() {
    for wire in ["f32", "int8"] {
        let job = Job { steps: 12, every_steps: 8, wire, ..Job::default() };
        let places = [1, 2, 4].map(|workers| {
            let place = Place::new();
            place.run(&job, workers);
            place
        });
        let names = ["weights.safetensors", "optimizer.safetensors", "wire.safetensors"];
        for name in &names[..if wire == "f32" { 2 } else { 3 }] {
            for step in [8, 12] {
                let read =
                    |place: &Place| std::fs::read(place.checkpoint("j1", step).join(name)).expect("a file");
                let first = read(&places[0]);
                assert!(
                    first.len() > 1000 && places.iter().all(|p| read(p) == first),
                    "{wire}: {name} of {step}"
                );
            }
        }
    }
}

/// Runs the job in fresh data directories with each number of workers; all must give the same bits.
#[track_caller]
fn same_on(workers: &[u32], place: impl Fn() -> Place, job: &str) -> BTreeMap<u64, u64> {
    let results = workers.iter().map(|&workers| {
        let place = place();
        let report = place.run(job, workers);
        assert_eq!(report.workers.len(), 0, "a finished job holds no workers: {report:?}");
        let losses = place.losses("j1");
        assert_eq!(losses.len() as u64, report.total_steps, "every step is in metrics.jsonl");
        (workers, report.digest(), losses)
    });
    let results: Vec<_> = results.collect();
    let (_, digest, losses) = results[0].clone();
    for (workers, other_digest, other_losses) in &results[1..] {
        assert_eq!(*other_losses, losses, "losses with {workers} workers differ");
        assert_eq!(*other_digest, digest, "weights with {workers} workers differ");
    }
    losses
}

fn losses_of(bits: &BTreeMap<u64, u64>) -> Vec<f64> {
    bits.values().map(|bits| f64::from_bits(*bits)).collect()
}

#[test]
fn synchronized_batch_norm_gives_the_same_bits_on_1_2_3_and_4_workers() {
    // 24 steps of 32 run over an epoch's end: 600 = 18 × 32 + 24, an uneven last batch.
    let job = Job { steps: 24, ..Job::default() };
    let losses = losses_of(&same_on(&[1, 2, 3, 4], Place::new, &job.to_string()));
    assert!(losses[23] < losses[0], "it learns: {losses:?}");
}

#[test]
fn images_normalized_by_their_own_contrast_give_the_same_bits_on_1_and_2_workers() {
    let standardized = Job { steps: 12, ..Job::default() }.to_string();
    let job = standardized.replace("[data]", "[data]\nscale = \"gcn\"");
    let losses = same_on(&[1, 2], Place::new, &job);
    let place = Place::new();
    place.run(&standardized, 1);
    let others = place.losses("j1");
    assert_ne!(
        losses.first_key_value(),
        others.first_key_value(),
        "they get other numbers than standardized ones"
    );
    let bits = losses_of(&losses);
    assert!(bits[11] < bits[0], "it learns: {bits:?}");
}

#[test]
fn another_seed_gives_other_weights() {
    let job = Job { steps: 3, ..Job::default() }.to_string();
    let place = Place::new();
    let digests = [job.clone(), job.replace("seed = 7", "seed = 8")].map(|job| place.run(job, 1).digest());
    assert_ne!(digests[0], digests[1]);
}

#[test]
fn the_fast_reduction_depends_on_the_workers_so_these_tests_can_tell() {
    let job = Job { steps: 5, ..Job::default() }.to_string();
    let fast = job.replace("precision =", "reduction = \"fast\"\nprecision =");
    // Not 2: two equal halves of the shards are whole subtrees, which both reductions add alike.
    let digests = [1, 3].map(|workers| Place::new().run(&fast, workers).digest());
    assert_ne!(digests[0], digests[1]);
}

#[test]
fn batch_norm_per_shard_gives_the_same_bits_on_1_2_3_and_4_workers() {
    let job = Job { batch_norm: "local", ..Job::default() };
    same_on(&[1, 2, 3, 4], Place::new, &job.to_string());
}

#[test]
fn no_batch_norm_gives_the_same_bits_on_1_2_3_and_4_workers() {
    let job = Job { batch_norm: "none", ..Job::default() };
    same_on(&[1, 2, 3, 4], Place::new, &job.to_string());
}

#[test]
fn double_precision_gives_the_same_bits_on_1_and_3_workers() {
    let job = Job { precision: "f64", ..Job::default() };
    same_on(&[1, 3], Place::new, &job.to_string());
}

#[test]
fn a_last_batch_that_leaves_shards_empty_gives_the_same_bits_on_1_2_and_4_workers() {
    // 65 samples in batches of 32: the last one has one sample for four shards.
    let job = Job { steps: 6, ..Job::default() };
    same_on(&[1, 2, 4], || Place::with_tiny(65, 5, SIDE), &job.to_string());
}

#[test]
fn a_gan_gives_the_same_bits_on_1_2_3_and_4_workers_and_leaves_its_pictures() {
    same_on(&[1, 2, 3, 4], Place::new, &gan(20, SIDE));
    let place = Place::new();
    place.run(gan(19, SIDE), 2);
    let picture = place.job_dir("j1").join("artifacts/samples-epoch-0001.png");
    let bytes = std::fs::read(&picture).expect("a sample grid after the epoch");
    assert!(bytes.starts_with(b"\x89PNG\r\n"), "{} is no PNG", picture.display());
}

#[test]
fn every_test_sample_is_counted_once_whatever_the_workers() {
    // 203 test samples do not divide evenly; the accuracy is a multiple of 1/203 and the same.
    let job = Job { steps: 10, ..Job::default() }.to_string();
    let accuracies = [1, 3].map(|workers| Place::new().run(&job, workers).metrics["test_top1"]);
    assert_eq!(accuracies[0].to_bits(), accuracies[1].to_bits(), "{accuracies:?}");
    let correct = accuracies[0] * 203.0;
    assert!((correct - correct.round()).abs() < 1e-9, "{correct} of 203");
}

#[test]
fn network_in_network_on_the_real_fashion_mnist_gives_the_same_bits_on_1_and_2_workers() {
    // The demo's settings, whatever they are, at a length that a test can wait for.
    let mut job = include_str!("../../jobs/fashion-nin.toml").to_owned();
    for (key, line) in [
        ("epochs", "steps = 6"),
        ("global_batch", "global_batch = 32"),
        ("test", ""),
        ("warmup_steps", "warmup_steps = 2"),
    ] {
        job = set(&job, key, line);
    }
    let place = || {
        let place = Place::empty();
        place.add_dataset("fashion-mnist", &fashion_mnist());
        place
    };
    let losses = losses_of(&same_on(&[1, 2], place, &job));
    assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
}
