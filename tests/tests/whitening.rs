//! Jobs on whitened images: exact, evaluated as they were trained, and refused in one line where they do not fit.

use lockstep_tests::cluster::Cluster;
use lockstep_tests::images::png;
use lockstep_tests::job::{Job, set};
use lockstep_tests::place::{Place, SIDE, flip_byte};
use lockstep_tests::process::{Ended, Process, command};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

const WHITEN: &str = "[data]\nscale = \"gcn\"\nwhiten = \"zca\"";

/// The small dataset, and its training set with a whitening as `tiny/white`.
fn place() -> Place {
    let place = Place::new();
    whiten(&place, "tiny/white").ok();
    place
}

fn whiten(place: &Place, new: &str) -> Ended {
    place.coordinator(["dataset", "whiten", "tiny/train", new])
}

fn job(steps: u64) -> String {
    let job = Job { steps, every_steps: steps, ..Job::default() }.to_string();
    job.replace("[data]", WHITEN).replace("\"tiny/train\"", "\"tiny/white\"")
}

fn shards(place: &Place) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(place.dir().join("datasets/shards")).expect("the shards");
    entries.map(|entry| entry.expect("a shard").path()).collect()
}

/// The shards of the whitening alone, which is fitted now.
fn whitening_shards(place: &Place) -> Vec<PathBuf> {
    let before = shards(place);
    whiten(place, "tiny/white").ok();
    let new: Vec<_> = shards(place).difference(&before).cloned().collect();
    assert_eq!(new.len(), 1, "256 numbers and their triangle are one shard");
    new
}

fn worker(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ended {
    let mut worker = command("worker");
    worker.args(args);
    Process::start(worker).wait()
}

fn json(ended: Ended) -> Value {
    serde_json::from_str(&ended.ok().stdout).expect("JSON")
}

#[test]
fn whitened_images_give_the_same_bits_on_1_2_and_3_workers() {
    let runs = [1, 2, 3].map(|workers| {
        let place = place();
        let digest = place.run(job(12), workers).digest();
        (digest, place.losses("j1"))
    });
    assert!(runs[0] == runs[1] && runs[0] == runs[2], "they differ: {runs:?}");
    let losses: Vec<f64> = runs[0].1.values().map(|bits| f64::from_bits(*bits)).collect();
    assert!(losses[11] < losses[0], "it learns: {losses:?}");
    let plain = place();
    let digest = plain.run(job(12).replace("whiten = \"zca\"\n", ""), 1).digest();
    assert_ne!(digest, runs[0].0, "they get other numbers than those that are not whitened");
}

#[test]
fn evaluations_and_predictions_see_the_images_that_the_job_saw() {
    let place = place();
    let still = set(&job(120), "augment", "augment = []").replace("width = 4", "width = 16");
    place.run(still, 2);
    let report =
        fs::read(place.job_dir("j1").join("artifacts/evaluation.json")).expect("the job's evaluation");
    let mut report: Value = serde_json::from_slice(&report).expect("JSON");
    let object = report.as_object_mut().expect("an object");
    assert!(object.remove("step").is_some() && object.remove("epoch").is_some());
    let checkpoint = place.checkpoint("j1", 120).to_string_lossy().into_owned();
    let found = json(worker(["eval", "--checkpoint", &checkpoint, "--threads", "3", "--json", "-"]));
    assert_eq!(found["checkpoints"][0]["report"], report);

    let source = place.file("source");
    let read = |name: &str, header: usize| fs::read(source.join(name)).expect("a file")[header..].to_vec();
    let (images, labels) = (read("t10k-images-idx3-ubyte", 16), read("t10k-labels-idx1-ubyte", 8));
    let mut args: Vec<String> = ["predict", "--checkpoint", &checkpoint, "--json"].map(str::to_owned).into();
    for (i, image) in images.chunks_exact((SIDE * SIDE) as usize).enumerate() {
        let colours: Vec<u8> = image.iter().flat_map(|grey| [*grey; 3]).collect();
        let path = place.file(&format!("{i}.png"));
        fs::write(&path, png(&colours, SIDE, SIDE)).expect("an image");
        args.push(path.to_string_lossy().into_owned());
    }
    let answers = json(worker(args));
    let taken = answers.as_array().expect("answers").iter().map(|answer| &answer["predictions"][0]["class"]);
    let mut confusion = BTreeMap::new();
    for (class, label) in taken.zip(labels) {
        *confusion.entry((u64::from(label), class.as_u64().expect("a class"))).or_insert(0) += 1;
    }
    let predicted: BTreeSet<_> = confusion.keys().map(|(_, class)| class).collect();
    assert!(predicted.len() >= 5, "predictions differ, so that they can tell: {confusion:?}");
    let confusion: Vec<[u64; 3]> = confusion.iter().map(|((label, class), n)| [*label, *class, *n]).collect();
    assert_eq!(serde_json::json!(confusion), report["confusion"]);

    let missing = place.file("elsewhere");
    fs::create_dir_all(missing.join("manifests")).expect("an empty store");
    let missing = missing.to_string_lossy().into_owned();
    let image = place.file("0.png").to_string_lossy().into_owned();
    worker(["predict", "--checkpoint", &checkpoint, "--datasets", &missing, &image])
        .refused(1, &["no dataset `tiny/test` in"]);
}

#[test]
fn a_worker_of_another_host_fetches_the_whitening_and_refuses_a_damaged_one() {
    let here = place().run(job(8), 1).digest();
    let place = Place::new();
    let damaged = whitening_shards(&place);
    let good: Vec<Vec<u8>> = damaged.iter().map(|path| fs::read(path).expect("a shard")).collect();
    damaged.iter().for_each(|path| flip_byte(path));
    let mut cluster = Cluster::start(place);
    let _worker = cluster.worker();
    let id = cluster.submit(job(8));
    let failed = cluster.until_status(&id, "failed", |status| status.state == "failed");
    for part in ["shard", "flipped", "coordinator dataset verify tiny/white"] {
        assert!(failed.reason.contains(part), "{part:?} is not in {:?}", failed.reason);
    }
    cluster.place.coordinator(["dataset", "verify", "tiny/white"]).refused(1, &["flipped"]);
    cluster.place.coordinator(["dataset", "verify", "tiny/train"]).ok();

    whiten(&cluster.place, "tiny/white").ok();
    let repaired: Vec<Vec<u8>> = damaged.iter().map(|path| fs::read(path).expect("a shard")).collect();
    assert_eq!(repaired, good, "the fit has the same bits every time");
    let id = cluster.submit(job(8));
    assert_eq!(cluster.until_finished(&id).digest(), here);
}

/// The job with `from` replaced is refused with these words in one line.
#[track_caller]
fn refused(place: &Place, from: &str, to: &str, words: &[&str]) {
    assert!(job(4).contains(from), "{from}");
    let ended = place.start_run(job(4).replace(from, to), 1).wait().refused(1, words);
    assert_eq!(
        ended.stderr.lines().filter(|line| line.starts_with("error: ")).count(),
        1,
        "{}",
        ended.stderr
    );
}

#[test]
fn jobs_that_cannot_be_whitened_are_refused_in_one_line() {
    let place = place();
    let without = ["job.toml:", "dataset `tiny/train` has no whitening", "whiten tiny/train tiny/train-zca"];
    refused(&place, "\"tiny/white\"", "\"tiny/train\"", &without);
    refused(&place, "scale = \"gcn\"\n", "", &["job.toml:", "add `scale = \"gcn\"`"]);
    let resized = "augment = [{ name = \"random-resized-crop\", size = 16 },";
    refused(&place, "augment = [", resized, &["job.toml:", "`random-resized-crop` changes pixels or sizes"]);
    refused(
        &place,
        "[optimizer]",
        "[evaluation]\ncrops = 10\n\n[optimizer]",
        &["job.toml:", "leave `crops` at 1"],
    );
    let source = place.file("larger");
    lockstep_tests::data::write_idx(&source, 20, 20, 20);
    place.add_dataset("larger", Path::new(&source));
    let sizes = ["job.toml:", "`larger/test` are of 1 x 20 x 20", "of 1 x 16 x 16"];
    refused(&place, "\"tiny/test\"", "\"larger/test\"", &sizes);
    let ended = whiten(&place, "tiny/test")
        .refused(1, &["dataset `tiny/train` cannot be whitened: `tiny/test` already"]);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
}
