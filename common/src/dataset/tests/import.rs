use super::*;
use crate::dataset::{DatasetError, DatasetReader, ShardCache, ShardState};
use std::sync::Arc;

fn files(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[test]
fn a_folder_gives_both_splits_and_every_sample_comes_back() {
    let f = Fixture::new();
    let source = f.source("source");
    write_pair(&source, "train", 150, Compression::Gzip);
    write_pair(&source, "t10k", 20, Compression::Plain);
    let mut reports = Vec::new();
    let outcomes =
        f.store.import_idx("d", &source, |p| reports.push((p.dataset.to_string(), p.done, p.total))).unwrap();
    assert!(outcomes.iter().all(|o| matches!(o, ImportOutcome::Added(_))));
    assert_eq!(reports.last().unwrap(), &("d/test".to_owned(), 20, Some(20)));
    assert!(reports.contains(&("d/train".to_owned(), 150, Some(150))));

    let names: Vec<_> = f.store.list().unwrap().iter().map(|m| m.name.to_string()).collect();
    assert_eq!(names, ["d/test", "d/train"]);
    let cache = ShardCache::new(&f.dir.path().join("cache"), 0)
        .unwrap()
        .with_local([f.store.shards_dir().to_path_buf()]);
    let cache = Arc::new(cache);
    for (name, samples) in [("d/train", 150), ("d/test", 20)] {
        let manifest = f.store.manifest(name).unwrap();
        assert_eq!((manifest.samples, manifest.classes), (samples, 10));
        assert_eq!(manifest.shards.len() as u64, samples.div_ceil(64));
        assert!(f.store.verify(name).unwrap().is_good());
        let reader = DatasetReader::new(Arc::new(manifest), cache.clone()).unwrap();
        for i in (0..samples).rev() {
            let sample = reader.sample(i).unwrap();
            assert_eq!(u64::from(sample.label), i % 10);
            assert!(sample.bytes().iter().enumerate().all(|(at, &b)| b == pixel(i as u32, at)), "sample {i}");
        }
        assert!(reader.sample(samples).unwrap_err().to_string().contains("no sample"));
    }
}

#[test]
fn statistics_are_those_of_the_pixels() {
    let (_f, manifest) = Fixture::with_dataset(10);
    let all: Vec<f64> =
        (0..10).flat_map(|i| (0..PIXELS).map(move |at| f64::from(pixel(i, at)) / 255.0)).collect();
    let mean = all.iter().sum::<f64>() / all.len() as f64;
    let variance = all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / all.len() as f64;
    assert!((manifest.mean[0] - mean).abs() < 1e-12, "{:?} {mean}", manifest.mean);
    assert!((manifest.std[0] - variance.sqrt()).abs() < 1e-12, "{:?} {}", manifest.std, variance.sqrt());
}

#[test]
fn the_path_of_one_pair_gives_one_dataset() {
    let f = Fixture::new();
    let source = f.source("source");
    write_pair(&source, "letters", 3, Compression::Plain);
    let outcomes = f.store.import_idx("letters", &source.join("letters"), |_| ()).unwrap();
    assert_eq!(outcomes[0].manifest().name.as_str(), "letters");
}

#[test]
fn adding_the_same_again_changes_nothing_and_repairs_what_is_damaged() {
    let (f, manifest) = Fixture::with_dataset(100);
    let source = f.dir.path().join("source");
    flip(&f.store.shard_path(&manifest.shards[0].hash).unwrap());
    std::fs::remove_file(f.store.shard_path(&manifest.shards[1].hash).unwrap()).unwrap();
    assert!(!f.store.verify("d/train").unwrap().is_good());
    assert_eq!(f.import(&source), [ImportOutcome::Unchanged(manifest)]);
    assert!(f.store.verify("d/train").unwrap().is_good());
}

#[test]
fn other_content_under_the_same_name_is_refused_and_leaves_no_trace() {
    let (f, manifest) = Fixture::with_dataset(100);
    let source = f.source("other");
    write_pair(&source, "train", 99, Compression::Plain);
    let error = f.store.import_idx("d", &source, |_| ()).unwrap_err();
    assert!(matches!(&error, DatasetError::Conflict { .. }), "{error}");
    assert!(error.to_string().contains("under another name"), "{error}");
    assert_eq!(f.store.manifest("d/train").unwrap(), manifest);
    assert_eq!(files(f.store.shards_dir()), 2);
}

#[test]
fn what_a_killed_import_left_is_invisible_and_swept() {
    let (f, _) = Fixture::with_dataset(1);
    let left = f.store.shards_dir().join(".lockstep-tmp-killed");
    std::fs::create_dir(&left).unwrap();
    std::fs::write(left.join("part"), b"half a shard").unwrap();
    let store = Store::open(&f.dir.path().join("store")).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    assert!(!left.exists());
}

#[test]
fn damaged_sources_are_refused_by_name_and_nothing_becomes_visible() {
    const IMAGES: &str = "train-images-idx3-ubyte";
    const LABELS: &str = "train-labels-idx1-ubyte";
    fn edit(dir: &Path, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = dir.join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(path, bytes).unwrap();
    }
    let check = |compression, damage: &dyn Fn(&Path), expected: &[&str]| {
        let f = Fixture::new();
        let source = f.source("source");
        write_pair(&source, "train", 5, compression);
        damage(&source);
        let error = f.store.import_idx("d", &source, |_| ()).unwrap_err().to_string();
        for part in expected {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
        assert!(!error.contains('\n'), "{error}");
        assert!(f.store.list().unwrap().is_empty());
        assert_eq!(files(f.store.shards_dir()), 0, "{error}");
    };
    use Compression::{Gzip, Plain};
    check(Plain, &|d| edit(d, IMAGES, |b| b[0] = 1), &[IMAGES, "does not begin as an IDX"]);
    check(Plain, &|d| edit(d, IMAGES, |b| b[2] = 0x0d), &[IMAGES, "0x0d"]);
    check(Plain, &|d| edit(d, IMAGES, |b| b[3] = 4), &[IMAGES, "4 dimensions where 3"]);
    check(Plain, &|d| edit(d, IMAGES, |b| b[8..12].fill(0xff)), &[IMAGES, "too large"]);
    check(Plain, &|d| edit(d, IMAGES, |b| b[8..12].fill(0)), &[IMAGES, "empty"]);
    check(Plain, &|d| edit(d, IMAGES, |b| b.truncate(10)), &[IMAGES, "header is incomplete"]);
    check(Plain, &|d| edit(d, IMAGES, |b| b.push(0)), &[IMAGES, "goes on after its 5 records"]);
    check(Plain, &|d| edit(d, LABELS, |b| b.push(0)), &[LABELS, "goes on after its 5 records"]);
    check(Plain, &|d| edit(d, LABELS, |b| b[7] = 4), &[LABELS, "4 labels", IMAGES, "5 images"]);
    check(Plain, &|d| truncate(&d.join(IMAGES), PIXELS + 1), &[IMAGES, "record 3 of 5"]);
    check(Plain, &|d| std::fs::remove_file(d.join(LABELS)).unwrap(), &[LABELS, "nor with `.gz`", IMAGES]);
    check(Plain, &|d| std::fs::remove_file(d.join(IMAGES)).unwrap(), &["no IDX files"]);
    let (images_gz, labels_gz) = (format!("{IMAGES}.gz"), format!("{LABELS}.gz"));
    check(Gzip, &|d| truncate(&d.join(&images_gz), 1), &[IMAGES, "truncated"]);
    check(Gzip, &|d| truncate(&d.join(&images_gz), 1000), &[IMAGES, "truncated"]);
    check(Gzip, &|d| truncate(&d.join(&labels_gz), 4), &[LABELS, "truncated"]);
    check(Gzip, &|d| edit(d, &labels_gz, |b| *b.last_mut().unwrap() ^= 1), &[LABELS, "gzip data is damaged"]);
}

#[test]
fn verify_names_every_shard_that_is_not_good() {
    let (f, manifest) = Fixture::with_dataset(250);
    let path = |i: usize| f.store.shard_path(&manifest.shards[i].hash).unwrap();
    flip(&path(0));
    std::fs::remove_file(path(1)).unwrap();
    truncate(&path(2), 1);
    let report = f.store.verify("d/train").unwrap();
    let states: Vec<_> = report.shards.iter().map(|s| s.state.clone()).collect();
    let expected = manifest.shards[2].bytes;
    assert_eq!(
        states,
        [
            ShardState::Flipped,
            ShardState::Missing,
            ShardState::WrongSize { expected, found: expected - 1 },
            ShardState::Good
        ]
    );
    assert_eq!(report.bad().count(), 3);
    let text = report.bad().next().unwrap().to_string();
    assert!(text.contains(&manifest.shards[0].hash) && text.contains("flipped"), "{text}");
}

#[test]
fn unknown_and_impossible_names_get_an_answer_that_helps() {
    let (f, manifest) = Fixture::with_dataset(1);
    let error = |name: &str| f.store.manifest(name).unwrap_err().to_string();
    assert!(error("d/trian").contains("did you mean `d/train`?"), "{}", error("d/trian"));
    assert!(error("zebra").contains("coordinator dataset"), "{}", error("zebra"));
    assert!(error("../d").contains("not a dataset name"), "{}", error("../d"));
    assert!(f.store.shard_path("../manifests/d@train.json").is_err());
    assert!(f.store.shard_path(&manifest.shards[0].hash).unwrap().exists());
}

#[test]
fn a_damaged_manifest_is_refused_by_path() {
    let (f, _) = Fixture::with_dataset(1);
    let path = f.dir.path().join("store/manifests/d@train.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"samples\": 1", "\"samples\": 2")).unwrap();
    let error = f.store.manifest("d/train").unwrap_err().to_string();
    assert!(error.contains("d@train.json") && error.contains("does not match its id"), "{error}");
    truncate(&path, 10);
    assert!(f.store.manifest("d/train").unwrap_err().to_string().contains("does not parse"));
}
