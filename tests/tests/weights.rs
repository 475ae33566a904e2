//! Jobs that begin with weights from a file.

use lockstep_tests::job::{Job, set};
use lockstep_tests::place::Place;
use lockstep_tests::process::{Process, command};
use std::fs;

/// What `worker weights` prints of an export of a job's newest checkpoint.
fn section(place: &Place, job: &str) -> String {
    let file = place.file("weights.safetensors").to_string_lossy().into_owned();
    place.coordinator(["checkpoint", "export", job, &file]).ok();
    let mut describe = command("worker");
    describe.args(["weights", &file]);
    Process::start(describe).wait().ok().stdout
}

/// The job with `section` as its `[model]`.
fn with_model(job: &Job, section: &str) -> String {
    let text = job.to_string();
    let (before, rest) = text.split_once("[model]").expect("a model");
    let (_, after) = rest.split_once("[data]").expect("data behind it");
    format!("{before}{section}\n[data]{after}")
}

/// `small-cnn` with its default width, which `worker weights` knows.
fn job(name: &'static str) -> Job {
    Job { name, steps: 6, width: 16, ..Job::default() }
}

#[test]
fn weights_of_a_file_begin_a_job_whose_result_depends_on_them_and_not_on_the_workers() {
    let place = Place::new();
    place.run(job("first"), 1);
    let section = section(&place, "j1");
    assert!(section.contains("name = \"small-cnn\"") && section.contains("weights_blake3"), "{section}");
    let again = place.run(with_model(&job("again"), &section), 1).digest();
    assert_eq!(place.run(with_model(&job("twice"), &section), 2).digest(), again);
    assert_ne!(place.run(job("seeded"), 1).digest(), again);
}

#[test]
fn weights_that_do_not_fit_fail_the_job_with_one_line_that_names_them() {
    let place = Place::new();
    place.run(job("first"), 1);
    let section = section(&place, "j1");
    let refused = |name: &'static str, section: String, words: &[&str]| {
        let path = place.job_file(with_model(&job(name), &section));
        let mut parts = vec!["weights.safetensors`: "];
        parts.extend(words);
        let ended = place.coordinator(["run", &path.to_string_lossy(), "--workers", "2"]).refused(1, &parts);
        let errors = ended.stderr.lines().filter(|line| line.starts_with("error: ")).count();
        assert_eq!(errors, 1, "{}", ended.stderr);
    };
    let other = section.replace("small-cnn", "nin") + "in_channels = 1\n";
    refused("other", other, &["these are the weights of `small-cnn`, not of `nin`"]);
    refused("classes", format!("{section}classes = 12\n"), &["weights of a `small-cnn` with `classes` = 10"]);
    let file = place.file("weights.safetensors");
    let mut bytes = fs::read(&file).expect("the weights");
    *bytes.last_mut().expect("a byte") ^= 1;
    fs::write(&file, bytes).expect("written");
    refused("flipped", section, &["its BLAKE3 is ", "and the job is for a file with "]);
}

/// They were found by the first worker, after it had been started and had built the network.
#[test]
fn images_too_small_for_the_network_are_refused_before_a_worker_starts() {
    let place = Place::new();
    let section = |name: &str| format!("[model]\nname = \"{name}\"\nin_channels = 1\nclasses = 10\n");
    let refused = |job: String, line: &str, words: &[&str]| {
        let at = job.lines().position(|l| l == line).expect("the line") + 1;
        let path = place.job_file(&job);
        let place_of = format!("error: {}:{at}: ", path.display());
        let ended = place.coordinator(["run", &path.to_string_lossy(), "--workers", "1"]);
        ended.refused(1, &[words, &[&place_of]].concat());
        assert!(!place.job_dir("j1").exists());
    };
    let small = with_model(&job("small"), &section("inception-v4"));
    let v4 = "name = \"inception-v4\"";
    let train =
        "75 x 75 pixels, and gets those of dataset `tiny/train` as 16 x 16; enlarge them in `augment`";
    refused(small.clone(), v4, &[train]);
    let with = |key: &str, size: u32| {
        set(&small, "augment", &format!("{key} = [{{ name = \"resize\", size = {size} }}]"))
    };
    refused(with("augment", 74), v4, &["`tiny/train` as 74 x 74"]);
    let test = "gets those of dataset `tiny/test` as 16 x 16; enlarge them in `evaluate`";
    refused(with("augment", 75), v4, &[test]);
    let v3 = |job: String| job.replace("\"inception-v4\"", "\"inception-v3\"\naux = true");
    let head = "299 x 299 pixels to train with `aux`, and gets those of dataset `tiny/train` as 75 x 75; set `aux = false`, or \
                enlarge";
    refused(v3(with("augment", 75)), "aux = true", &[head]);
    refused(v3(with("augment", 74)), "name = \"inception-v3\"", &["as 74 x 74; enlarge them"]);

    // A job that only evaluates gets none of the training set's.
    let weights = format!("aux = true\nweights = \"none\"\nweights_blake3 = \"{}\"", "0".repeat(64));
    let only = set(&v3(with("evaluate", 75)), "steps", "steps = 0").replace("aux = true", &weights);
    let path = place.job_file(only);
    let ended = place.coordinator(["run", &path.to_string_lossy(), "--workers", "1"]);
    ended.refused(1, &["error: j1 failed: ", "weights `none`: "]);
}
