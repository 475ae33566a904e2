//! Jobs on whitened images.

use super::*;

const MOVES: &str = "augment = [{ name = \"pad-crop\", pixels = 2 }, { name = \"flip\" }]";

fn whitened(more: &str) -> JobSpec {
    let text = job_text(&classifier("sync"), "");
    let text = text.replace("train = \"tiny/train\"", "train = \"tiny/white\"");
    let data = format!("[data]\nscale = \"gcn\"\nwhiten = \"zca\"\n{more}");
    JobSpec::parse("test.toml", &text.replace("[data]", &data)).unwrap()
}

#[test]
fn whitened_images_end_with_the_same_weights_on_every_number_of_workers_and_threads() {
    let job = whitened(MOVES);
    let alone = train::<f32>(&job, 1, 1);
    for (ranks, threads) in [(1, 4), (2, 1), (3, 2), (4, 1)] {
        let other = train::<f32>(&job, ranks, threads);
        assert_eq!(
            (other.digest, other.losses),
            (alone.digest.clone(), alone.losses.clone()),
            "{ranks} ranks"
        );
        assert_eq!(other.evaluation, alone.evaluation, "{ranks} ranks");
    }
    assert!(alone.losses.last() < alone.losses.first(), "{:?}", alone.losses);
    let mut plain = job;
    plain.data.whiten = None;
    assert_ne!(train::<f32>(&plain, 1, 1).digest, alone.digest);
}

/// The decoders of training and test samples.
fn decoders(job: &JobSpec, threads: usize) -> (tempfile::TempDir, [Decoder<f64>; 2]) {
    let (folder, store) = tiny();
    let cache = Arc::new(ShardCache::in_place().with_local([store.shards_dir().to_owned()]));
    let pool = Arc::new(Pool::new(threads).unwrap());
    let decoder = |purpose| {
        let manifest = Arc::new(store.manifest(&job.data.train).unwrap());
        let reader = DatasetReader::new(manifest, cache.clone()).unwrap();
        let basis = Basis::read(&job.data, &reader).unwrap();
        Decoder::new(reader, &job.data, purpose, &basis, job.seed, Device::Cpu, pool.clone()).unwrap()
    };
    let decoders = [Use::Train, Use::Evaluate(job.evaluation.crops)].map(decoder);
    (folder, decoders)
}

fn numbers(images: &Tensor) -> Vec<f64> {
    Vec::try_from(images.flatten(0, -1)).unwrap()
}

/// A sample by the formulas: its contrast normalized, centred, times the matrix.
fn by_hand(sample: u64) -> Vec<f64> {
    let (_folder, store) = tiny();
    let manifest = Arc::new(store.manifest("tiny/white").unwrap());
    let cache = Arc::new(ShardCache::in_place().with_local([store.shards_dir().to_owned()]));
    let reader = DatasetReader::new(manifest, cache).unwrap();
    let map = reader.whitening().unwrap().unwrap();
    let raw: Vec<f64> = reader.sample(sample).unwrap().bytes().iter().map(|x| f64::from(*x)).collect();
    let mean = raw.iter().sum::<f64>() / 64.0;
    let norm = raw.iter().map(|x| (x - mean).powi(2)).sum::<f64>().sqrt();
    let centred: Vec<f64> = raw.iter().zip(&map.mean).map(|(x, m)| 55.0 * (x - mean) / norm - m).collect();
    (0..64).map(|j| (0..64).map(|i| centred[i] * map.matrix[i * 64 + j]).sum()).collect()
}

#[track_caller]
fn assert_near(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-9, "{found} is not {expected}");
    }
}

#[test]
fn training_samples_move_once_they_are_whitened_and_test_samples_do_not() {
    let job = whitened(MOVES);
    let (_folder, [train, test]) = decoders(&job, 2);
    for (epoch, sample) in [(0, 0), (0, 41), (1, 41), (2, 69)] {
        let plain = by_hand(sample);
        assert_near(&numbers(&test.viewed(sample..sample + 1).unwrap().images), &plain);
        let mut stream = Stream::new(job.seed, "augment", &[epoch, sample]);
        let (down, right) = (stream.below(5) as isize - 2, stream.below(5) as isize - 2);
        let flip = stream.bernoulli(0.5);
        let moved: Vec<f64> = (0..64)
            .map(|at| {
                let (y, x) = (at / 8, if flip { 7 - at % 8 } else { at % 8 });
                let (y, x) = (y + down, x + right);
                if (0..8).contains(&y) && (0..8).contains(&x) { plain[(y * 8 + x) as usize] } else { 0.0 }
            })
            .collect();
        assert_near(&numbers(&train.augmented(epoch, vec![sample], 1).unwrap().images), &moved);
    }
}

#[test]
fn a_sample_gets_the_same_bits_in_any_batch_and_on_any_threads() {
    let job = whitened(MOVES);
    let samples: Vec<u64> = (0..70).rev().collect();
    let apart: Vec<f64> = {
        let (_folder, [train, _]) = decoders(&job, 1);
        let one = |sample: &u64| numbers(&train.augmented(3, vec![*sample], 1).unwrap().images);
        samples.iter().flat_map(one).collect()
    };
    for threads in [1, 3] {
        let (_folder, [train, _]) = decoders(&job, threads);
        assert_eq!(
            numbers(&train.augmented(3, samples.clone(), 70).unwrap().images),
            apart,
            "{threads} threads"
        );
    }
}
