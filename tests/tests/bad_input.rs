//! What people type wrong, and what machines lack: one line that says what to do, and the right exit code.

use lockstep_tests::cluster::Cluster;
use lockstep_tests::job::{Job, gan};
use lockstep_tests::place::Place;
use lockstep_tests::process::{Ended, Process, command};
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;

/// One line of standard error starts with `error: `; hints may follow, and nothing else.
#[track_caller]
fn one_line(ended: &Ended) {
    let errors = ended.stderr.lines().filter(|line| line.starts_with("error: ")).count();
    assert_eq!(errors, 1, "{}", ended.stderr);
    let others =
        ended.stderr.lines().filter(|l| !l.starts_with("error: ") && !l.starts_with("hint: ")).count();
    assert_eq!(others, 0, "{}", ended.stderr);
}

/// A job file with `from` replaced must be refused with these words, at the line of `to`.
#[track_caller]
fn job_refused(place: &Place, job: &str, from: &str, to: &str, words: &[&str]) {
    assert!(job.contains(from), "{from:?} is not in the job file");
    let text = job.replacen(from, to, 1);
    let path = place.job_file(&text);
    let mut parts = words.to_vec();
    let line = text.lines().position(|line| !to.is_empty() && to.lines().any(|l| line == l)).map(|n| n + 1);
    let place_of = line.map(|line| format!("error: {}:{line}: ", path.display()));
    parts.extend(place_of.as_deref());
    let ended = place.coordinator(["run", &path.to_string_lossy(), "--workers", "1"]).refused(1, &parts);
    one_line(&ended);
    assert_eq!(ended.stdout, "");
}

#[test]
fn mistakes_in_a_job_file_name_file_line_and_nearest_name() {
    let place = Place::new();
    let job = Job::default().to_string();
    for (from, to, words) in [
        ("momentum = 0.9", "momentun = 0.9", &["`momentun`", "`momentum`"][..]),
        ("seed = 7", "sed = 7", &["`sed`", "`seed`"]),
        ("width = 4", "widht = 4", &["`widht`", "`width`"]),
        ("width = 4", "width = \"wide\"", &["`width` is \"wide\"", "whole number"]),
        ("steps = 20", "steps = \"many\"", &["invalid type"]),
        ("steps = 20", "steps = -1", &["-1"]),
        ("steps = 20", "steps = 0", &["`steps` is 0", "at least 1"]),
        (
            "global_batch = 32",
            "global_batch = 30",
            &["30", "not a multiple of `logical_shards` = 4", "28 or 32"],
        ),
        ("name = \"small-cnn\"", "name = \"smal-cnn\"", &["unknown model `smal-cnn`", "`small-cnn`"]),
        ("name = \"small-cnn\"", "name = \"gan-generator\"", &["does not fit `[model]`"]),
        (
            "train = \"tiny/train\"",
            "train = \"tiny/trian\"",
            &["unknown dataset `tiny/trian`", "`tiny/train`"],
        ),
        ("train = \"tiny/train\"", "train = \"../../etc\"", &["../../etc"]),
        ("name = \"sgd\"", "name = \"sdg\"", &["`sdg`", "`sgd`"]),
        ("batch_norm = \"sync\"", "batch_norm = \"synch\"", &["`synch`", "`sync`"]),
        ("lr = 0.05", "lr = 0.0", &["`lr` is 0", "above 0"]),
        ("min = 1", "min = 9", &["`min` is 9", "4 logical shards"]),
        ("steps = 20", "steps = = 20", &[]),
        ("[optimizer]", "[optimiser]", &["`optimiser`", "`optimizer`"]),
    ] {
        job_refused(&place, &job, from, to, words);
    }
    job_refused(&place, &job, "steps = 20\n", "", &["job.toml: ", "neither `epochs` nor `steps`"]);
    job_refused(&place, &job, "[optimizer]\nname = \"sgd\"\nlr = 0.05\nmomentum = 0.9\n", "", &["optimizer"]);
    job_refused(
        &place,
        &gan(5, 16),
        "[discriminator]",
        "[discrimnator]",
        &["`discrimnator`", "`discriminator`"],
    );
}

#[test]
fn a_submitted_job_file_is_checked_as_a_local_one() {
    let cluster = Cluster::start(Place::new());
    let path = cluster.place.job_file(Job::default().to_string().replace("tiny/test", "tiny/tset"));
    let ended = cluster.place.coordinator(["submit", &path.to_string_lossy()]);
    one_line(&ended.refused(1, &["job.toml:16: unknown dataset `tiny/tset`", "`tiny/test`"]));
    assert_eq!(cluster.place.json(&["jobs"]).as_array().map(Vec::len), Some(0));
}

#[test]
fn a_dataset_that_does_not_fit_the_model_is_refused_with_file_and_line() {
    let place = Place::new();
    let job = Job::default().to_string().replace("width = 4", "width = 4\nin_channels = 3");
    let line = job.lines().position(|l| l.starts_with("in_channels")).expect("the option") + 1;
    let ended = place.start_run(job, 1).wait();
    one_line(&ended.refused(1, &[&format!("job.toml:{line}: `in_channels` is 3"), "make it 1"]));
    let refused = |model: &str, words: &[&str]| {
        let job = Job::default().to_string().replace("name = \"small-cnn\"\nwidth = 4", model);
        let ended = place.start_run(job, 1).wait().refused(1, words);
        one_line(&ended);
    };
    refused("name = \"nin\"", &["`in_channels` is 3", "make it 1, or set `channels = 3` in `[data]`"]);
    refused("name = \"mlp\"\ninputs = 100", &["`inputs` of `mlp` is 100", "make it "]);
}

#[test]
fn output_that_is_not_taken_is_no_success() {
    let place = Place::new();
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").expect("a full device");
    let mut dataset = place.command();
    dataset.args(["dataset", "ls"]);
    let mut models = command("worker");
    models.args(["models"]);
    for mut command in [dataset, models] {
        let ended = command.stdout(full()).output().expect("it starts");
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{said}");
        let errors: Vec<_> = said.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors, ["error: cannot write to standard output: No space left on device (os error 28)"]);
    }
}

#[test]
fn usage_errors_end_with_2_and_failures_with_1() {
    let place = Place::empty();
    for args in [
        &["frobnicate"][..],
        &["run"],
        &["run", "x.toml", "--workers", "0"],
        &["status", "seven"],
        &[],
        &["run", "x.toml", "--devices", "cpu,gpu"],
    ] {
        let ended = place.coordinator(args);
        assert_eq!(ended.status.code(), Some(2), "{args:?}: {}", ended.stderr);
    }
    let mut worker = command("worker");
    worker.args(["join"]);
    Process::start(worker).wait().refused(2, &["--coordinator"]);
    one_line(&place.coordinator(["run", "no-such.toml"]).refused(1, &["cannot read `no-such.toml`"]));
    let file = place.job_file(Job::default());
    let too_many = ["run", &file.to_string_lossy(), "--workers", "9"];
    one_line(&place.coordinator(too_many).refused(1, &["1 to 4 workers, not 9"]));
    let too_many = ["run", &file.to_string_lossy(), "--devices", "cpu,cpu,cpu,cpu,cpu"];
    one_line(&place.coordinator(too_many).refused(1, &["1 to 4 workers, and `--devices` names 5"]));
}

#[test]
fn commands_without_a_coordinator_say_how_to_start_one() {
    let place = Place::empty();
    for args in [&["jobs"][..], &["workers"], &["status", "j1"], &["token", "new"]] {
        one_line(
            &place
                .coordinator(args)
                .refused(1, &["no coordinator is running", "coordinator serve --data-dir"]),
        );
    }
    one_line(&place.coordinator(["checkpoint", "ls", "j1"]).refused(1, &["there is no job j1"]));
}

#[test]
fn unknown_jobs_are_named() {
    let cluster = Cluster::start(Place::empty());
    for command in ["status", "logs", "cancel", "pause", "resume"] {
        cluster.place.coordinator([command, "j7"]).refused(1, &["j7"]);
    }
}

#[test]
fn a_worker_without_a_coordinator_says_so() {
    let other = Cluster::start(Place::empty());
    let token = other.token();
    let place = Place::empty();
    let free = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket").local_addr().expect("its address");
    let mut worker = command("worker");
    worker.args(["join", "--coordinator", &free.to_string(), "--data-dir"]).arg(place.file("worker"));
    worker.env("LOCKSTEP_TOKEN", &token);
    let ended =
        Process::start(worker).wait().refused(1, &["error: ", &free.to_string(), "check the address"]);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);

    let mut worker = command("worker");
    worker.args(["join", "--coordinator", "no such host", "--data-dir"]).arg(place.file("worker"));
    worker.env("LOCKSTEP_TOKEN", &token);
    Process::start(worker).wait().refused(1, &["no such host", "has no address"]);
}

#[test]
fn a_port_in_use_is_named() {
    let cluster = Cluster::start(Place::empty());
    let place = Place::empty();
    let taken = cluster.address();
    let serve = place.coordinator(["serve", "--listen", &taken, "--http", "127.0.0.1:0"]);
    one_line(&serve.refused(1, &[&taken, "another process has this port"]));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = listener.local_addr().expect("its address").to_string();
    let serve = place.coordinator(["serve", "--listen", "127.0.0.1:0", "--http", &taken]);
    one_line(&serve.refused(1, &[&taken, "choose another address"]));
}

#[test]
fn a_second_coordinator_on_the_same_directory_is_refused_and_harms_nothing() {
    let mut cluster = Cluster::start(Place::new());
    let _worker = cluster.worker();
    let pid = cluster.coordinator.id().to_string();
    let serve = cluster.place.coordinator(["serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
    one_line(&serve.refused(1, &["in use by another coordinator", &pid]));
    let file = cluster.place.job_file(Job::default());
    let run = cluster.place.coordinator(["run", &file.to_string_lossy()]);
    one_line(&run.refused(1, &["in use by another coordinator", &pid]));
    let id = cluster.submit(Job { steps: 3, ..Job::default() });
    cluster.until_finished(&id);
}

#[test]
fn a_source_that_is_no_dataset_is_refused() {
    let place = Place::empty();
    let source = place.file("source");
    let add = |source: &std::path::Path| {
        place.coordinator(["dataset", "add", "tiny", "--format", "idx", &source.to_string_lossy()])
    };
    one_line(&add(&source).refused(1, &["source"]));
    fs::create_dir(&source).expect("a folder");
    one_line(&add(&source).refused(1, &["no IDX files at", "train-images-idx3-ubyte"]));
    lockstep_tests::data::write_idx(&source, 50, 10, 8);
    let images = source.join("train-images-idx3-ubyte");
    let whole = fs::read(&images).expect("the images");
    fs::write(&images, &whole[..whole.len() - 1]).expect("truncated images");
    one_line(&add(&source).refused(1, &["train-images-idx3-ubyte"]));
    fs::write(&images, b"PNG").expect("something else");
    one_line(&add(&source).refused(1, &["train-images-idx3-ubyte"]));
    assert_eq!(
        place.json(&["dataset", "ls"]).as_array().map(Vec::len),
        Some(0),
        "nothing half-added is left"
    );
    fs::write(&images, &whole).expect("the images");
    add(&source).ok();
}

#[test]
fn a_dataset_whose_files_are_gone_ends_the_run_with_one_line() {
    let place = Place::new();
    fs::remove_dir_all(place.dir().join("datasets/shards")).expect("the shards go");
    place.start_run(Job::default(), 1).wait().refused(1, &["error: j1 failed", "dataset verify tiny"]);
}

#[test]
fn a_data_directory_that_cannot_be_written_is_named() {
    let place = Place::empty();
    let blocker = place.file("data");
    fs::write(&blocker, b"a file where the folder should be").expect("a file");
    one_line(&place.coordinator(["jobs"]).refused(1, &[&blocker.to_string_lossy()]));

    let place = Place::empty();
    fs::create_dir(place.dir()).expect("a folder");
    fs::set_permissions(place.dir(), fs::Permissions::from_mode(0o500)).expect("permissions");
    let serve = place.coordinator(["dataset", "ls"]);
    // The superuser may write anywhere.
    if !is_root() {
        one_line(&serve.refused(1, &[&place.dir().to_string_lossy()]));
    }
    fs::set_permissions(place.dir(), fs::Permissions::from_mode(0o700)).expect("permissions");
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0)
}
