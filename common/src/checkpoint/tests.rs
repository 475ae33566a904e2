//! Tests on real folders: every way in which a checkpoint can be damaged.

use super::*;
use crate::digest::{TensorBytes, weights_digest};
use crate::ids::{Generation, JobId};
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;

const FILES: [&str; 3] = [WEIGHTS_FILE, OPTIMIZER_FILE, MANIFEST_FILE];

struct Fixture {
    dir: TempDir,
    store: CheckpointStore,
}

impl Fixture {
    fn new(steps: impl IntoIterator<Item = u64>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::open(&dir.path().join("checkpoints")).unwrap();
        let fixture = Self { dir, store };
        for step in steps {
            fixture.write(step, step as u8);
        }
        fixture
    }

    fn write(&self, step: u64, value: u8) -> CheckpointManifest {
        let mut writer = CheckpointWriter::new(&self.store, info(step)).unwrap();
        writer.add(WEIGHTS_FILE, &encode_tensors(weights(value)).unwrap()).unwrap();
        writer.add(OPTIMIZER_FILE, &encode_tensors(optimizer(value)).unwrap()).unwrap();
        writer.finish().unwrap()
    }

    fn path(&self, step: u64, file: &str) -> PathBuf {
        self.store.step_dir(step).join(file)
    }

    fn steps(&self) -> Vec<u64> {
        self.store.list().unwrap().iter().map(|e| e.step).collect()
    }

    fn edit(&self, step: u64, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = self.path(step, file);
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(path, bytes).unwrap();
    }
}

fn tensor(name: &str, value: u8) -> TensorBytes<'static> {
    TensorBytes {
        name: name.to_owned().into(),
        dtype: "F32".into(),
        shape: vec![2, 1].into(),
        bytes: vec![value; 8].into(),
    }
}

fn weights(value: u8) -> Vec<TensorBytes<'static>> {
    vec![tensor("fc.weight", value), tensor("bn.running_mean", value.wrapping_add(1))]
}

fn optimizer(value: u8) -> Vec<TensorBytes<'static>> {
    vec![tensor("sgd/momentum_buffer/fc.weight", value.wrapping_add(2))]
}

fn info(step: u64) -> CheckpointInfo {
    CheckpointInfo {
        job_id: JobId(3),
        job_name: "fashion-nin".into(),
        job_text: "name = \"fashion-nin\"\n".into(),
        task: "classify".into(),
        seed: 1,
        step,
        epoch: step / 100,
        step_in_epoch: step % 100,
        phase_updates: BTreeMap::from([("classify".into(), step)]),
        generation: Generation(2),
        metrics: BTreeMap::from([("loss".into(), 0.1 + 0.2)]),
        created_unix_s: 1_800_000_000,
    }
}

#[test]
fn a_checkpoint_comes_back_whole() {
    let f = Fixture::new([]);
    let manifest = f.write(1200, 7);
    assert!(f.dir.path().join("checkpoints/step-000000001200").is_dir());
    assert_eq!(manifest.info, info(1200));
    assert_eq!(manifest.weights_digest, weights_digest(weights(7)));
    let loaded = f.store.load(1200).unwrap();
    assert_eq!(loaded.manifest, manifest);
    let mut expected = weights(7);
    expected.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(decode_tensors(loaded.file(WEIGHTS_FILE).unwrap()).unwrap(), expected);
    assert_eq!(decode_tensors(loaded.file(OPTIMIZER_FILE).unwrap()).unwrap(), optimizer(7));
}

#[test]
fn metrics_that_json_cannot_hold_do_not_spoil_the_checkpoint() {
    let f = Fixture::new([]);
    let mut diverged = info(5);
    diverged.metrics = BTreeMap::from([("loss".into(), f64::NAN), ("lr".into(), 0.1)]);
    let mut writer = CheckpointWriter::new(&f.store, diverged).unwrap();
    writer.add(WEIGHTS_FILE, &encode_tensors(weights(0)).unwrap()).unwrap();
    writer.add(OPTIMIZER_FILE, &encode_tensors([]).unwrap()).unwrap();
    writer.finish().unwrap();
    assert_eq!(f.store.load(5).unwrap().manifest.info.metrics, BTreeMap::from([("lr".into(), 0.1)]));
}

#[test]
fn an_unfinished_checkpoint_is_invisible_and_swept() {
    let f = Fixture::new([1]);
    let mut writer = CheckpointWriter::new(&f.store, info(2)).unwrap();
    writer.add(WEIGHTS_FILE, &encode_tensors(weights(2)).unwrap()).unwrap();
    assert_eq!(f.steps(), [1]);
    // A killed process runs no destructors: its folder stays, and its lock is gone.
    let left = f.dir.path().join("checkpoints/.lockstep-tmp-killed");
    std::fs::create_dir(&left).unwrap();
    std::fs::write(left.join(WEIGHTS_FILE), b"half").unwrap();
    let store = CheckpointStore::open(&f.dir.path().join("checkpoints")).unwrap();
    assert!(!left.exists());
    assert_eq!(store.latest_good().unwrap().good.unwrap().info.step, 1);
    // The writer that is alive was spared by the sweep.
    writer.add(OPTIMIZER_FILE, &encode_tensors(optimizer(2)).unwrap()).unwrap();
    writer.finish().unwrap();
    assert_eq!(f.steps(), [2, 1]);
}

#[test]
fn a_checkpoint_without_its_files_cannot_be_finished() {
    let f = Fixture::new([]);
    let mut writer = CheckpointWriter::new(&f.store, info(1)).unwrap();
    writer.add(WEIGHTS_FILE, &encode_tensors(weights(1)).unwrap()).unwrap();
    assert!(matches!(
        writer.finish(),
        Err(CheckpointError::Manifest { problem: ManifestProblem::Files, .. })
    ));
    let mut writer = CheckpointWriter::new(&f.store, info(1)).unwrap();
    assert!(matches!(writer.add(WEIGHTS_FILE, b"not tensors"), Err(CheckpointError::Tensors { .. })));
    for name in ["", ".hidden", "../escape", "a/b", MANIFEST_FILE] {
        assert!(matches!(writer.add(name, b""), Err(CheckpointError::FileName(_))), "{name}");
    }
    drop(writer);
    assert_eq!(f.steps(), [0; 0]);
}

#[test]
fn any_damage_is_refused_by_file_and_the_previous_one_used() {
    let check = |file: &str, damage: &dyn Fn(&Path), expected: &str| {
        let f = Fixture::new([100, 200]);
        damage(&f.path(200, file));
        let latest = f.store.latest_good().unwrap();
        assert_eq!(latest.good.unwrap().info.step, 100, "{file}");
        let [refused] = &latest.refused[..] else { panic!("{file}: {:?}", latest.refused) };
        let reason = refused.to_string();
        assert_eq!(refused.entry.step, 200);
        assert!(reason.contains(file) && reason.contains("step-000000000200"), "{reason}");
        assert!(reason.contains(expected), "`{expected}` is not in: {reason}");
        assert!(f.store.verify(200).is_err() && f.store.load(200).is_err());
    };
    let with = |path: &Path, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = std::fs::read(path).unwrap();
        change(&mut bytes);
        std::fs::write(path, bytes).unwrap();
    };
    for file in FILES {
        check(file, &|p| std::fs::remove_file(p).unwrap(), "is missing");
        check(file, &|p| with(p, &|b| b.clear()), "");
    }
    for file in [WEIGHTS_FILE, OPTIMIZER_FILE] {
        check(file, &|p| with(p, &|b| b.truncate(b.len() - 1)), "truncated");
        check(file, &|p| with(p, &|b| b.push(0)), "grown");
        check(file, &|p| with(p, &|b| *b.last_mut().unwrap() ^= 1), "flipped");
    }
    check(MANIFEST_FILE, &|p| with(p, &|b| b.truncate(b.len() / 2)), "does not parse");
}

#[test]
fn a_flipped_bit_anywhere_in_any_file_is_refused_or_changes_nothing() {
    let f = Fixture::new([100]);
    let whole = f.store.load(100).unwrap();
    for file in FILES {
        let length = std::fs::read(f.path(100, file)).unwrap().len();
        for at in 0..length {
            f.edit(100, file, |b| b[at] ^= 1);
            if let Ok(loaded) = f.store.load(100) {
                assert_eq!((file, &loaded), (MANIFEST_FILE, &whole), "byte {at}");
            }
            f.edit(100, file, |b| b[at] ^= 1);
        }
    }
}

#[test]
fn a_folder_under_another_steps_name_is_refused() {
    let f = Fixture::new([100]);
    std::fs::rename(f.store.step_dir(100), f.store.step_dir(300)).unwrap();
    let error = f.store.verify(300).unwrap_err().to_string();
    assert!(error.contains("of step 100"), "{error}");
}

/// The files of a checkpoint as they travel.
fn travelling(files: &CheckpointFiles) -> Vec<(String, Vec<u8>)> {
    let manifest = (MANIFEST_FILE.to_owned(), files.manifest.to_json().unwrap());
    files.files.iter().cloned().chain([manifest]).collect()
}

#[test]
fn a_checkpoint_survives_the_journey_and_any_damage_on_it_is_noticed() {
    let files = Fixture::new([100]).store.load(100).unwrap();
    let whole = travelling(&files);
    assert_eq!(CheckpointFiles::from_parts(whole.clone()).unwrap(), files);
    for (file, (name, _)) in whole.iter().enumerate() {
        let mut flipped = whole.clone();
        let middle = flipped[file].1.len() / 2;
        flipped[file].1[middle] ^= 1;
        assert!(CheckpointFiles::from_parts(flipped).is_err(), "{name}");
        let mut missing = whole.clone();
        missing.remove(file);
        assert!(CheckpointFiles::from_parts(missing).is_err(), "{name}");
    }
}

#[test]
fn a_manifest_that_vouches_for_other_weights_is_refused() {
    let mut files = Fixture::new([100]).store.load(100).unwrap();
    let rebuilt = CheckpointManifest::new(files.manifest.info, "0".repeat(64), files.manifest.files);
    files.manifest = rebuilt.unwrap();
    let error = CheckpointFiles::from_parts(travelling(&files)).unwrap_err();
    assert!(
        matches!(error, CheckpointError::Tensors { problem: TensorsError::Digest { .. }, .. }),
        "{error}"
    );
}

#[test]
fn the_same_step_again_keeps_a_good_one_and_replaces_a_bad_one() {
    let f = Fixture::new([100]);
    let first = f.store.load(100).unwrap();
    f.write(100, 100);
    assert_eq!(f.store.load(100).unwrap(), first);
    f.edit(100, WEIGHTS_FILE, |b| b.truncate(3));
    f.write(100, 100);
    assert_eq!(f.store.load(100).unwrap(), first);
    f.write(100, 9);
    assert_eq!(f.store.verify(100).unwrap().weights_digest, weights_digest(weights(9)));
}

#[test]
fn prune_keeps_the_newest() {
    let f = Fixture::new([1, 2, 3, 4]);
    assert_eq!(f.store.prune(5, None).unwrap(), [0; 0]);
    assert_eq!(f.store.prune(2, None).unwrap(), [2, 1]);
    assert_eq!(f.steps(), [4, 3]);
    assert_eq!(f.store.prune(0, None).unwrap(), [3]);
    assert_eq!(f.steps(), [4]);
}

#[test]
fn prune_never_removes_the_only_good_one() {
    let f = Fixture::new([1, 2, 3, 4]);
    for step in [3, 4] {
        f.edit(step, WEIGHTS_FILE, |b| b.truncate(1));
    }
    assert_eq!(f.store.prune(2, None).unwrap(), [1]);
    assert_eq!(f.store.latest_good().unwrap().good.unwrap().info.step, 2);
}

#[test]
fn an_unknown_step_is_answered_with_those_there_are() {
    let f = Fixture::new([100, 200]);
    let error = f.store.verify(150).unwrap_err().to_string();
    assert!(error.contains("step 150") && error.contains("200, 100"), "{error}");
}

#[test]
fn export_writes_the_weights_and_never_overwrites() {
    let f = Fixture::new([100]);
    let path = f.dir.path().join("out.safetensors");
    assert_eq!(f.store.export(100, false, &path).unwrap(), weights_digest(weights(100)));
    let exported = std::fs::read(&path).unwrap();
    let is_count = |t: &TensorBytes<'_>| t.name.ends_with(BATCH_COUNT);
    let (counts, own): (Vec<_>, Vec<_>) = decode_tensors(&exported).unwrap().into_iter().partition(is_count);
    assert_eq!(weights_digest(own), weights_digest(weights(100)));
    assert_eq!(counts.len(), 1, "one batch norm");
    assert_eq!(*counts[0].bytes, 100u64.to_le_bytes());
    let error = f.store.export(100, false, &path).unwrap_err();
    assert!(matches!(error, CheckpointError::Exists(_)), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), exported);
}

#[test]
fn folders_that_are_not_checkpoints_are_left_out() {
    let f = Fixture::new([1]);
    for name in ["step-5", "step-00000000000x", "notes"] {
        std::fs::create_dir(f.dir.path().join("checkpoints").join(name)).unwrap();
    }
    assert_eq!(f.steps(), [1]);
}

#[test]
fn open_files_are_whole_or_refused_by_name() {
    let f = Fixture::new([100]);
    let whole: Vec<_> = f.store.open_files(100).unwrap();
    let names: Vec<_> = whole.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, [WEIGHTS_FILE, OPTIMIZER_FILE, MANIFEST_FILE]);
    let on_disk: Vec<_> = names.iter().map(|name| std::fs::read(f.path(100, name)).unwrap()).collect();
    for (mut file, expected) in whole.into_iter().zip(on_disk) {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut file.file, &mut bytes).unwrap();
        assert_eq!((file.bytes, &bytes), (expected.len() as u64, &expected), "{}", file.name);
    }
    for file in [WEIGHTS_FILE, OPTIMIZER_FILE] {
        f.edit(100, file, |b| *b.last_mut().unwrap() ^= 1);
        let error = f.store.open_files(100).unwrap_err().to_string();
        assert!(error.contains(file) && error.contains("flipped"), "{error}");
        f.edit(100, file, |b| *b.last_mut().unwrap() ^= 1);
    }
    f.edit(100, OPTIMIZER_FILE, |b| b.push(0));
    assert!(f.store.open_files(100).unwrap_err().to_string().contains("grown"));
}

#[test]
fn prune_takes_the_word_for_a_checkpoint_that_was_just_checked() {
    let f = Fixture::new([1, 2, 3]);
    // Nobody would notice this damage without reading the file.
    f.edit(3, WEIGHTS_FILE, |b| *b.last_mut().unwrap() ^= 1);
    assert_eq!(f.store.prune(1, Some(3)).unwrap(), [2, 1]);
}

#[test]
fn averages_are_exported_in_the_place_of_the_weights() {
    let f = Fixture::new([100]);
    let path = f.dir.path().join("average.safetensors");
    let error = f.store.export(100, true, &path).unwrap_err();
    assert!(matches!(error, CheckpointError::NoAverage(100)), "{error}");
    assert!(!path.exists());

    let mut writer = CheckpointWriter::new(&f.store, info(200)).unwrap();
    writer.add(WEIGHTS_FILE, &encode_tensors(weights(2)).unwrap()).unwrap();
    let averages = weights(7).into_iter().map(|t| {
        let name = format!("{AVERAGE_PREFIX}{}", t.name).into();
        TensorBytes { name, ..t }
    });
    writer.add(OPTIMIZER_FILE, &encode_tensors(averages.chain(optimizer(2))).unwrap()).unwrap();
    writer.finish().unwrap();
    let digest = f.store.export(200, true, &path).unwrap();
    assert_eq!(digest, weights_digest(weights(7)));
    let exported = std::fs::read(&path).unwrap();
    let exported: Vec<_> = decode_tensors(&exported).unwrap();
    for weight in weights(7) {
        assert!(exported.contains(&weight), "{}", weight.name);
    }
}
