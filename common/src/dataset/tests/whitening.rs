//! Whitenings: against one found by another route, and what is refused.

use super::*;
use crate::dataset::{
    CacheError, DatasetError, DatasetReader, FetchError, ReadError, ShardCache, ShardFetch, ShardState,
    WhiteningMap,
};
use crate::rng::Stream;
use parking_lot::Mutex;
use std::sync::Arc;

/// Of images of 1 × 5 × 7.
const D: usize = 35;
const SAMPLES: usize = 300;
const BIAS: f64 = 0.1;

/// No eigenvalue of a covariance is above its trace, which is at most 55² for images of norm 55, and none is below 0.1.
const CONDITION: f64 = (55.0 * 55.0 + BIAS) / BIAS;

/// Images whose neighbouring pixels are alike, as pictures' are. The last one is constant.
fn raw_images() -> Vec<[u8; D]> {
    let mut stream = Stream::new(4, "images", &[]);
    let mut image = || {
        let mut value = stream.below(256) as i64;
        std::array::from_fn(|_| {
            value = (value + stream.below(61) as i64 - 30).clamp(0, 255);
            value as u8
        })
    };
    let mut all: Vec<_> = (1..SAMPLES).map(|_| image()).collect();
    all.push([9; D]);
    all
}

/// A store with them as `d/train`.
fn imported() -> Fixture {
    let fixture = Fixture::new();
    let source = fixture.source("source");
    let header = |kind: u8, sizes: &[u32]| {
        let sizes = sizes.iter().flat_map(|n| n.to_be_bytes());
        [0, 0, 8, kind].into_iter().chain(sizes).collect::<Vec<u8>>()
    };
    let images = [header(3, &[SAMPLES as u32, 5, 7]), raw_images().concat()].concat();
    let labels = [header(1, &[SAMPLES as u32]), vec![0; SAMPLES]].concat();
    std::fs::write(source.join("train-images-idx3-ubyte"), images).unwrap();
    std::fs::write(source.join("train-labels-idx1-ubyte"), labels).unwrap();
    fixture.import(&source);
    fixture
}

fn whitened() -> (Fixture, Manifest) {
    let fixture = imported();
    let outcome = fixture.store.whiten("d/train", "d/white", |_| {}).unwrap();
    assert!(matches!(outcome, ImportOutcome::Added(_)));
    let manifest = outcome.manifest().clone();
    (fixture, manifest)
}

fn read(fixture: &Fixture, manifest: &Manifest) -> WhiteningMap {
    let cache = ShardCache::in_place().with_local([fixture.store.shards_dir().to_owned()]);
    let reader = DatasetReader::new(Arc::new(manifest.clone()), Arc::new(cache)).unwrap();
    reader.whitening().unwrap().unwrap()
}

/// The images as floats, by the definition of contrast normalization.
fn normalized() -> Vec<Vec<f64>> {
    let normalize = |image: &[u8; D]| {
        let mean = image.iter().map(|x| f64::from(*x)).sum::<f64>() / D as f64;
        let centred: Vec<f64> = image.iter().map(|x| f64::from(*x) - mean).collect();
        let norm = centred.iter().map(|x| x * x).sum::<f64>().sqrt();
        centred.iter().map(|x| if norm < 1e-9 { 0.0 } else { 55.0 * x / norm }).collect()
    };
    raw_images().iter().map(normalize).collect()
}

type Matrix = Vec<Vec<f64>>;

fn times(a: &Matrix, b: &Matrix) -> Matrix {
    let element = |row: &[f64], j: usize| row.iter().zip(b).map(|(x, b)| x * b[j]).sum();
    a.iter().map(|row| (0..b[0].len()).map(|j| element(row, j)).collect()).collect()
}

fn transposed(a: &Matrix) -> Matrix {
    (0..a[0].len()).map(|j| a.iter().map(|row| row[j]).collect()).collect()
}

fn mean_and_covariance(rows: &Matrix) -> (Vec<f64>, Matrix) {
    let n = rows.len() as f64;
    let mean: Vec<f64> = (0..D).map(|i| rows.iter().map(|row| row[i]).sum::<f64>() / n).collect();
    let moment =
        |i: usize, j: usize| rows.iter().map(|row| (row[i] - mean[i]) * (row[j] - mean[j])).sum::<f64>() / n;
    let covariance = (0..D).map(|i| (0..D).map(|j| moment(i, j)).collect()).collect();
    (mean, covariance)
}

/// Eigenvalues, and eigenvectors as columns, of a symmetric matrix: Jacobi's rotations, until nothing is left to rotate.
fn eigen(mut a: Matrix) -> (Vec<f64>, Matrix) {
    let mut vectors: Matrix = (0..D).map(|i| (0..D).map(|j| f64::from(i == j)).collect()).collect();
    for _sweep in 0..30 {
        for p in 0..D {
            for q in p + 1..D {
                if a[p][q].abs() < 1e-300 {
                    continue;
                }
                let theta = 0.5 * (2.0 * a[p][q]).atan2(a[q][q] - a[p][p]);
                let (s, c) = theta.sin_cos();
                for row in a.iter_mut() {
                    (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                }
                let (above, below) = a.split_at_mut(q);
                for (x, y) in above[p].iter_mut().zip(&mut below[0]) {
                    (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
                }
                for row in &mut vectors {
                    (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                }
            }
        }
    }
    ((0..D).map(|i| a[i][i]).collect(), vectors)
}

#[track_caller]
fn assert_near(found: &Matrix, expected: &Matrix, tolerance: f64) {
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        for (j, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!((found - expected).abs() <= tolerance, "[{i}, {j}]: {found} is not {expected}");
        }
    }
}

#[test]
fn the_map_is_that_of_the_eigenvectors() {
    let (fixture, manifest) = whitened();
    let WhiteningMap { mean, matrix } = read(&fixture, &manifest);
    let (expected_mean, mut c) = mean_and_covariance(&normalized());
    assert_near(&vec![mean], &vec![expected_mean], 1e-12);
    (0..D).for_each(|i| c[i][i] += BIAS);

    let p: Matrix = matrix.chunks_exact(D).map(<[f64]>::to_vec).collect();
    let (values, vectors) = eigen(c.clone());
    assert!(values.iter().all(|l| *l > 0.09 && *l < CONDITION * BIAS), "{values:?}");
    let scaled: Matrix =
        vectors.iter().map(|row| row.iter().zip(&values).map(|(v, l)| v / l.sqrt()).collect()).collect();
    // P's entries are at most 0.1^(-1/2) = 3.2; rounding is amplified by the condition, D terms a sum.
    let tolerance = 3.2 * D as f64 * CONDITION * f64::EPSILON;
    assert_near(&p, &times(&scaled, &transposed(&vectors)), tolerance);

    let identity: Matrix = (0..D).map(|i| (0..D).map(|j| f64::from(i == j)).collect()).collect();
    assert_near(&times(&times(&p, &c), &p), &identity, D as f64 * CONDITION * f64::EPSILON);
    assert_eq!(p, transposed(&p), "symmetric to the last bit");
}

#[test]
fn whitened_training_images_are_uncorrelated_but_for_the_bias() {
    let (fixture, manifest) = whitened();
    let WhiteningMap { mean, matrix } = read(&fixture, &manifest);
    let p: Matrix = matrix.chunks_exact(D).map(<[f64]>::to_vec).collect();
    let centred: Matrix =
        normalized().iter().map(|row| row.iter().zip(&mean).map(|(x, m)| x - m).collect()).collect();
    let (new_mean, covariance) = mean_and_covariance(&times(&centred, &p));
    assert!(new_mean.iter().all(|m| m.abs() < 1e-12), "{new_mean:?}");
    // P (C - 0.1 I) P = I - 0.1 P².
    let squared = times(&p, &p);
    let expected: Matrix =
        (0..D).map(|i| (0..D).map(|j| f64::from(i == j) - BIAS * squared[i][j]).collect()).collect();
    assert_near(&covariance, &expected, D as f64 * CONDITION * f64::EPSILON);
}

/// Pinned: a dataset's id stands for its whitening, on every machine and in every release.
#[test]
fn the_fit_has_the_same_bits_on_every_machine_and_on_any_threads() {
    let ids = [1, 2, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let manifest = pool.install(|| whitened().1);
        manifest.whitening.unwrap().shards[0].hash.clone()
    });
    assert!(ids.iter().all(|id| id.starts_with("1553b38eea3a71bb")), "{ids:?}");
}

#[test]
fn a_whitened_dataset_has_the_samples_of_the_other_and_is_verified_with_its_whitening() {
    let (fixture, manifest) = whitened();
    let source = fixture.store.manifest("d/train").unwrap();
    assert_eq!((&manifest.shards, source.whitening.as_ref()), (&source.shards, None));
    assert_ne!(manifest.id, source.id);
    assert_eq!(fixture.store.manifest("d/white").unwrap(), manifest);
    let good = read(&fixture, &manifest);

    let shard = &manifest.whitening.as_ref().unwrap().shards[0];
    let path = fixture.store.shard_path(&shard.hash).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[500] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let report = fixture.store.verify("d/white").unwrap();
    assert_eq!(
        report.bad().map(|bad| (&bad.path, &bad.state)).collect::<Vec<_>>(),
        [(&path, &ShardState::Flipped)]
    );
    assert!(fixture.store.verify("d/train").unwrap().is_good());

    let again = fixture.store.whiten("d/train", "d/white", |_| {}).unwrap();
    assert_eq!(again, ImportOutcome::Unchanged(manifest.clone()));
    assert!(fixture.store.verify("d/white").unwrap().is_good());
    assert_eq!(read(&fixture, &manifest), good);
}

/// A coordinator that sends shards from a store and flips a bit of some.
struct Damaging(Store, Mutex<u32>);

impl ShardFetch for Damaging {
    fn fetch(&self, dataset: &str, hash: &str) -> Result<Vec<u8>, FetchError> {
        assert_eq!(dataset, "d/white");
        let mut bytes = std::fs::read(self.0.shard_path(hash).unwrap()).unwrap();
        let mut left = self.1.lock();
        if *left > 0 {
            *left -= 1;
            bytes[300] ^= 16;
        }
        Ok(bytes)
    }
}

#[test]
fn a_fetched_whitening_with_a_flipped_bit_is_refused() {
    let (fixture, manifest) = whitened();
    let fetched = |damaged| {
        let folder = fixture.dir.path().join(format!("cache-{damaged}"));
        let source = Arc::new(Damaging(fixture.store.clone(), Mutex::new(damaged)));
        let cache = Arc::new(ShardCache::new(&folder, 1 << 20).unwrap().with_fetch(source));
        let reader = DatasetReader::new(Arc::new(manifest.clone()), cache.clone()).unwrap();
        (reader.whitening(), cache.hash_failures())
    };
    let (map, failures) = fetched(2);
    assert_eq!((map.unwrap(), failures), (Some(read(&fixture, &manifest)), 2));
    let (refused, failures) = fetched(3);
    assert!(matches!(refused, Err(ReadError::Shard(CacheError::Fetch { .. }))), "{refused:?}");
    assert_eq!(failures, 3);
}

#[test]
fn a_manifest_whose_whitening_has_another_number_of_rows_is_refused() {
    let (_fixture, manifest) = whitened();
    let changed = |change: &dyn Fn(&mut Manifest)| {
        let mut manifest = manifest.clone();
        change(&mut manifest);
        manifest.with_id().unwrap().validate().map_err(|problem| problem.to_string())
    };
    assert_eq!(changed(&|_| {}), Ok(()));
    let refused = changed(&|m| m.whitening.as_mut().unwrap().shards[0].samples -= 1).unwrap_err();
    assert!(refused.contains("do not add up"), "{refused}");
    let refused = changed(&|m| m.shape.width = 4096).unwrap_err();
    assert!(refused.contains("cannot be whitened"), "{refused}");
}

#[test]
fn what_cannot_be_whitened_is_refused_in_one_line() {
    let (fixture, _) = whitened();
    let (large, _) = Fixture::with_dataset(2);
    let encoded = fixture.store.manifest("d/train").unwrap();
    let shape = crate::dataset::SampleShape { channels: 3, height: 5, width: 7 };
    let encoded = Manifest {
        name: "d/pictures".parse().unwrap(),
        encoding: crate::dataset::Encoding::Image,
        shape,
        mean: vec![0.0; 3],
        std: vec![1.0; 3],
        ..encoded
    };
    let staging = crate::durable::TemporaryDir::new_in(fixture.store.shards_dir()).unwrap();
    fixture.store.publish(vec![(encoded.with_id().unwrap(), staging)]).unwrap();
    for (fixture, name, new, told) in [
        (&large, "d/train", "d/white", "its images have 65536 numbers, and at most 4096 can be whitened"),
        (&fixture, "d/pictures", "d/other", "its images are JPEG or PNG files"),
        (
            &fixture,
            "d/train",
            "d/train",
            "`d/train` already exists and is another dataset; choose another name",
        ),
        (&fixture, "d/train", "d/pictures", "`d/pictures` already exists and is another dataset"),
    ] {
        let error = fixture.store.whiten(name, new, |_| {}).unwrap_err();
        assert!(matches!(error, DatasetError::Whitening { .. }), "{error:?}");
        let line = error.to_string();
        assert!(
            line.starts_with(&format!("dataset `{name}` cannot be whitened: ")) && line.contains(told),
            "{line}"
        );
        assert_eq!(line.lines().count(), 1);
    }
    let unknown = fixture.store.whiten("d/trian", "d/new", |_| {}).unwrap_err().to_string();
    assert!(unknown.contains("did you mean `d/train`?"), "{unknown}");
}
