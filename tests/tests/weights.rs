//! Jobs that begin with weights from a file.

use lockstep_tests::job::Job;
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
    let other = section.replace("small-cnn", "nin");
    refused("other", other, &["these are the weights of `small-cnn`, not of `nin`"]);
    refused("classes", format!("{section}classes = 12\n"), &["weights of a `small-cnn` with `classes` = 10"]);
    let file = place.file("weights.safetensors");
    let mut bytes = fs::read(&file).expect("the weights");
    *bytes.last_mut().expect("a byte") ^= 1;
    fs::write(&file, bytes).expect("written");
    refused("flipped", section, &["its BLAKE3 is ", "and the job is for a file with "]);
}

#[test]
fn images_too_small_for_the_network_fail_the_job_with_one_line() {
    let place = Place::new();
    let section = "[model]\nname = \"inception-v4\"\nin_channels = 1\nclasses = 10\n";
    let path = place.job_file(with_model(&job("small"), section));
    let words = ["model `inception-v4`: expected images of at least 75x75 pixels, got images of "];
    place.coordinator(["run", &path.to_string_lossy(), "--workers", "1"]).refused(1, &words);
}
