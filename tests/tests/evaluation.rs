//! Evaluation by jobs and by `worker eval`, predictions by `worker predict`, and what they refuse.

use lockstep_tests::cluster::Cluster;
use lockstep_tests::data::write_idx;
use lockstep_tests::images::{write_cifar10, write_classes};
use lockstep_tests::job::{Job, set};
use lockstep_tests::place::{Place, TEST, flip_byte};
use lockstep_tests::process::{Ended, Process, command};
use lockstep_tests::wait::until;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

/// A job that keeps an average of its weights, and evaluates that.
fn averaged() -> String {
    format!(
        "{}\n[average]\nname = \"ema\"\ndecay = 0.9\n",
        Job { steps: 12, every_steps: 6, ..Job::default() }
    )
}

fn worker(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ended {
    let mut worker = command("worker");
    worker.args(args);
    Process::start(worker).wait()
}

/// `worker eval ARGS --json -` on checkpoints.
fn eval(checkpoints: &[&Path], args: &[&str]) -> Ended {
    let mut all = vec!["eval".to_owned()];
    for checkpoint in checkpoints {
        all.extend(["--checkpoint".to_owned(), checkpoint.to_string_lossy().into_owned()]);
    }
    all.extend(args.iter().map(|arg| (*arg).to_owned()));
    worker(all)
}

/// The same, and what it reports.
#[track_caller]
fn evaluated(checkpoints: &[&Path], args: &[&str]) -> Value {
    let ended = eval(checkpoints, &[args, &["--json", "-"]].concat()).ok();
    serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {}", ended.stdout))
}

/// A job's `evaluation.json`, without the step and the epoch.
#[track_caller]
fn evaluation(place: &Place, job: &str) -> Value {
    let json = fs::read(place.job_dir(job).join("artifacts/evaluation.json")).expect("the job's evaluation");
    let mut report: Value = serde_json::from_slice(&json).expect("JSON");
    let object = report.as_object_mut().expect("an object");
    assert!(object.remove("step").is_some() && object.remove("epoch").is_some());
    report
}

/// The only line is an error with these words.
#[track_caller]
fn refused(ended: Ended, words: &[&str]) {
    let ended = ended.refused(1, words);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    assert!(
        ended.stderr.starts_with("error: ") && ended.stdout.is_empty(),
        "{}{}",
        ended.stderr,
        ended.stdout
    );
}

#[test]
fn worker_eval_reports_bit_for_bit_what_the_job_did() {
    let place = Place::new();
    let run = place.run(averaged(), 2);
    let report = evaluation(&place, "j1");
    assert_eq!(report["samples"], TEST);
    assert_eq!(
        (report["top1"].as_f64(), report["top5"].as_f64()),
        (Some(run.metrics["test_top1"]), Some(run.metrics["test_top5"]))
    );
    let last = place.checkpoint("j1", 12);
    for threads in ["1", "3"] {
        let found = evaluated(&[&last], &["--threads", threads]);
        assert_eq!(found["checkpoints"][0]["report"], report, "{threads} threads");
        assert_eq!((&found["checkpoints"][0]["step"], found.get("ensemble")), (&12.into(), None));
    }
    // Not the average's: the weights that training goes on with.
    let weights = place.file("weights.safetensors").to_string_lossy().into_owned();
    place.coordinator(["checkpoint", "export", "j1", &weights]).ok();
    let job = place.file("job.toml").to_string_lossy().into_owned();
    let data = place.dir().join("datasets").to_string_lossy().into_owned();
    let plain = evaluated(&[Path::new(&weights)], &["--job", &job, "--datasets", &data]);
    assert_ne!(plain["checkpoints"][0]["report"], report);

    let table = eval(&[&last, &place.checkpoint("j1", 6)], &[]).ok().stdout;
    assert!(table.starts_with("tiny/test: 203 images, 1 crop\n\nCHECKPOINT"), "{table}");
    assert_eq!(table.matches("label \\ predicted").count(), 2, "{table}");
}

#[test]
fn an_ensemble_averages_its_members_and_one_alone_is_itself() {
    let place = Place::new();
    place.run(averaged(), 1);
    let [half, last] = [6, 12].map(|step| place.checkpoint("j1", step));
    let alone = evaluated(&[&last], &["--ensemble"]);
    assert_eq!(alone["ensemble"], alone["checkpoints"][0]["report"]);
    let twice = evaluated(&[&last, &last], &["--ensemble"]);
    assert_eq!(twice["ensemble"], alone["ensemble"]);
    let both = evaluated(&[&half, &last], &["--ensemble", "--crops", "10"]);
    let [first, second] = [0, 1].map(|i| both["checkpoints"][i]["report"].clone());
    assert_eq!(first, evaluated(&[&half], &["--crops", "10"])["checkpoints"][0]["report"]);
    assert!(first != second && both["ensemble"] != first && both["ensemble"] != second);
    assert_eq!((&both["ensemble"]["samples"], &both["ensemble"]["crops"]), (&TEST.into(), &10.into()));
}

/// A job that evaluates the weights of the place's job `j1`, and their file.
fn evaluates(place: &Place, job: Job) -> (String, String) {
    let file = place.file("weights.safetensors").to_string_lossy().into_owned();
    place.coordinator(["checkpoint", "export", "j1", &file]).ok();
    let section = worker(["weights", &file]).ok().stdout;
    let job = Job { name: "evaluation", steps: 0, ..job }.to_string();
    let (before, rest) = job.split_once("[model]").expect("a model");
    let (_, after) = rest.split_once("[data]").expect("data");
    (format!("{before}{section}\n[data]{after}"), file)
}

#[test]
fn an_evaluation_whose_workers_die_ends_with_the_same_report() {
    let job = Job { steps: 6, width: 16, max_workers: 2, ..Job::default() };
    let place = Place::new();
    place.run(job.clone(), 1);
    let expected = evaluation(&place, "j1");
    let (job, _) = evaluates(&place, job);
    let mut cluster = Cluster::start(place);
    let token = cluster.token();
    // Of the first two one dies in the midst of the test set, and whoever is rank 0 with the report in its hands.
    let mut armed = |faults: &str| {
        let mut command = cluster.join_command(&token);
        command.env("LOCKSTEP_FAULTS", faults);
        cluster.join(command)
    };
    let mut doomed = armed("kill:phase=evaluation");
    let _reporter = armed("kill:phase=artifact");
    let id = cluster.submit(job);
    until("the first death", || doomed.status());
    let _last = cluster.worker();
    let status = cluster.until_finished(&id);
    assert!(status.generation > 1, "{status:?}");
    assert_eq!(evaluation(&cluster.place, &id), expected);
}

#[test]
fn a_job_that_only_evaluates_gives_one_report_on_any_number_of_workers() {
    let place = Place::new();
    let trained = place.run(Job { steps: 6, width: 16, ..Job::default() }, 1);
    let (job, file) = evaluates(&place, Job::default());
    let digests =
        [1, 2].map(|workers| place.run(job.replace("\"evaluation\"", &format!("\"on-{workers}\"")), workers));
    assert_eq!(digests[0].digest(), trained.digest());
    assert_eq!(digests[1].digest(), trained.digest());
    let json =
        |id: &str| fs::read(place.job_dir(id).join("artifacts/evaluation.json")).expect("an evaluation");
    assert_eq!(json("j2"), json("j3"));
    assert_eq!(evaluation(&place, "j2"), evaluation(&place, "j1"));
    assert_eq!(digests[1].metrics["test_top1"], trained.metrics["test_top1"]);
    assert!(place.checkpoints("j2").is_empty(), "nothing was trained");
    // There is nothing to export, and the run does not advise it.
    let ended = place.start_run(job.replace("\"evaluation\"", "\"again\""), 1).wait().ok();
    assert!(ended.stderr.contains("hint: ") && !ended.stderr.contains("export"), "{}", ended.stderr);

    let crops = format!("{job}\n[evaluation]\ncrops = 12\n");
    let crops = [1, 2].map(|workers| crops.replace("\"evaluation\"", &format!("\"crops-{workers}\"")));
    place.run(&crops[0], 1);
    place.run(&crops[1], 2);
    assert_eq!(json("j5"), json("j6"));
    assert_ne!(json("j5"), json("j2"));
    let data = place.dir().join("datasets").to_string_lossy().into_owned();
    let job = place.job_file(&crops[0]).to_string_lossy().into_owned();
    let found = evaluated(&[Path::new(&file)], &["--job", &job, "--datasets", &data]);
    assert_eq!(found["checkpoints"][0]["report"], evaluation(&place, "j5"));
}

/// Images of four classes with names, and a short job on them.
fn pets(place: &Place) -> PathBuf {
    let (source, classes) = (place.file("source"), ["ant", "bee", "cat", "dog"]);
    write_classes(&source.join("train"), &classes, 30, 0);
    write_classes(&source.join("val"), &classes, 6, 1000);
    place.coordinator(["dataset", "add", "pets", "--format", "folder", &source.to_string_lossy()]).ok();
    let job = Job { steps: 30, every_steps: 0, ..Job::default() }.to_string();
    let job = set(&job, "width", "width = 4\nin_channels = 3\nclasses = 4");
    let job = set(&job, "train", "train = \"pets/train\"");
    let job = set(&job, "test", "test = \"pets/test\"");
    let steps = r#"augment = [{ name = "random-resized-crop", size = 16, area = [0.5, 1.0] }]
evaluate = [{ name = "resize", size = 18 }, { name = "center-crop", size = 16 }]"#;
    place.run(set(&job, "augment", steps), 1);
    source
}

#[test]
fn predictions_are_those_of_the_evaluation_with_names() {
    let place = Place::empty();
    let source = pets(&place);
    let checkpoint = place.checkpoint("j1", 30).to_string_lossy().into_owned();
    for crops in ["1", "144"] {
        let report = &evaluated(&[Path::new(&checkpoint)], &["--crops", crops])["checkpoints"][0]["report"];
        assert!(report.get("top5").is_none(), "there are four classes");
        let mut correct = 0;
        for class in ["ant", "bee", "cat", "dog"] {
            let images = fs::read_dir(source.join("val").join(class)).expect("the images");
            let mut args: Vec<_> = ["predict", "--checkpoint", &checkpoint, "--crops", crops, "--json"]
                .map(PathBuf::from)
                .into();
            args.extend(images.map(|entry| entry.expect("an image").path()));
            let answers: Value = serde_json::from_str(&worker(args).ok().stdout).expect("JSON");
            let answers = answers.as_array().expect("a list");
            assert_eq!(answers.len(), 6);
            for answer in answers {
                let told = answer["predictions"].as_array().expect("predictions");
                let sum: f64 = told.iter().filter_map(|one| one["probability"].as_f64()).sum();
                assert!(told.len() == 4 && (sum - 1.0).abs() < 1e-9, "{answer}");
                correct += u32::from(told[0]["name"] == class);
            }
        }
        assert_eq!(f64::from(correct) / 24.0, report["top1"].as_f64().expect("a share"), "{crops} crops");
    }
    let image = source.join("val/bee/000.png").to_string_lossy().into_owned();
    let ended = worker(["predict", "--checkpoint", &checkpoint, &image]).ok();
    assert_eq!(ended.stdout.lines().count(), 5, "{}", ended.stdout);
    assert!(
        ended.stdout.starts_with(&format!("{image}\n")) && ended.stdout.contains("  bee\n"),
        "{}",
        ended.stdout
    );
}

#[test]
fn a_grey_network_takes_a_coloured_picture_of_any_size() {
    let place = Place::new();
    place.run(Job { steps: 4, ..Job::default() }, 1);
    let file = place.file("picture.png");
    fs::write(&file, lockstep_tests::images::png(&[90; 40 * 30 * 3], 40, 30)).expect("a picture");
    let checkpoint = place.checkpoint("j1", 4).to_string_lossy().into_owned();
    let ended = worker(["predict", "--checkpoint", &checkpoint, &file.to_string_lossy()]).ok();
    assert_eq!(ended.stdout.lines().count(), 6, "{}", ended.stdout);
}

#[test]
fn checkpoints_and_data_sets_that_are_not_there_are_named() {
    let place = Place::new();
    place.run(Job { steps: 4, ..Job::default() }, 1);
    let good = place.checkpoint("j1", 4);
    let none = place.file("none");
    refused(
        eval(&[&none], &[]),
        &[&format!("checkpoint `{}`: there is no such file or folder", none.display())],
    );
    let above = good.parent().expect("a folder");
    refused(eval(&[above], &[]), &["has no manifest.json", &format!("`{}` is a checkpoint", good.display())]);
    refused(eval(&[&place.dir()], &[]), &["has no manifest.json, so it is not a checkpoint"]);
    let unknown = ["--dataset", "tiny/tset"];
    refused(
        eval(&[&good], &unknown),
        &["no dataset `tiny/tset` in ", "data/datasets`", "did you mean `tiny/test`?", "--datasets DIR"],
    );
    let elsewhere = place.file("elsewhere").to_string_lossy().into_owned();
    refused(eval(&[&good], &["--datasets", &elsewhere]), &["no dataset `tiny/test` in `", "elsewhere`"]);
    eval(&[&good], &["--crops", "7"]).refused(2, &["`crops` is 7; it must be 1, 10, 12 or 144"]);
    eval(&[], &[]).refused(2, &["--checkpoint"]);
}

#[test]
fn a_damaged_checkpoint_is_named_and_nothing_of_it_is_used() {
    let place = Place::new();
    place.run(Job { steps: 8, every_steps: 4, ..Job::default() }, 1);
    let [good, bad] = [8, 4].map(|step| place.checkpoint("j1", step));
    flip_byte(&bad.join("weights.safetensors"));
    refused(
        eval(&[&good, &bad], &["--ensemble"]),
        &["step-000000000004", "weights.safetensors` has flipped bytes"],
    );
    let file = bad.join("optimizer.safetensors");
    flip_byte(&bad.join("weights.safetensors"));
    fs::write(&file, &fs::read(&file).expect("bytes")[..100]).expect("written");
    refused(eval(&[&bad], &[]), &["optimizer.safetensors` is truncated"]);
    flip_byte(&bad.join("manifest.json"));
    refused(eval(&[&bad], &[]), &["manifest.json` cannot be used"]);
}

/// A copy of a file of weights with other tensors: names, shapes and values of `change`'s choice.
fn changed(
    file: &Path,
    name: &str,
    change: impl Fn(&str, Vec<usize>) -> Vec<(String, Vec<usize>)>,
) -> PathBuf {
    let bytes = fs::read(file).expect("the weights");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut kept = Vec::new();
    for (name, view) in tensors.tensors() {
        let element = view.data().len() / view.shape().iter().product::<usize>().max(1);
        for (name, shape) in change(&name, view.shape().to_vec()) {
            let zeros = vec![0; shape.iter().product::<usize>() * element];
            kept.push((name, view.dtype(), shape, zeros));
        }
    }
    let views = kept.iter().map(|(name, dtype, shape, bytes)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"))
    });
    let path = file.with_file_name(name);
    fs::write(&path, safetensors::serialize(views, None).expect("safetensors")).expect("written");
    path
}

/// A copy of a file of weights in which the tensors of the layer `broken` hold the largest number there is.
fn with_largest(file: &Path, broken: &str) -> PathBuf {
    let bytes = fs::read(file).expect("the weights");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors").tensors();
    let largest = |view: &TensorView<'_>| f32::MAX.to_le_bytes().repeat(view.data().len() / 4);
    let kept: Vec<_> = tensors
        .iter()
        .map(|(name, view)| {
            (name, view, if name.starts_with(broken) { largest(view) } else { view.data().to_vec() })
        })
        .collect();
    let views = kept.iter().map(|(name, view, bytes)| {
        (name, TensorView::new(view.dtype(), view.shape().to_vec(), bytes).expect("a tensor"))
    });
    let path = file.with_file_name("largest.safetensors");
    fs::write(&path, safetensors::serialize(views, None).expect("safetensors")).expect("written");
    path
}

/// Such outputs are neither more nor less than one another: the label was always among the first five, and the job finished.
#[test]
fn a_network_whose_outputs_are_not_finite_is_refused_by_job_and_commands() {
    let place = Place::new();
    place.run(Job { steps: 4, width: 16, ..Job::default() }, 1);
    let (job, file) = evaluates(&place, Job::default());
    let broken = with_largest(Path::new(&file), "fc.").to_string_lossy().into_owned();
    let section = worker(["weights", &broken]).ok().stdout;
    let (before, rest) = job.split_once("[model]").expect("a model");
    let (_, after) = rest.split_once("[data]").expect("data");
    let job = format!("{before}{section}\n[data]{after}");
    let logit = "of `tiny/test`: the network's logit of class 0 is inf";
    let ended = place.start_run(&job, 2).wait().refused(1, &["error: j2 failed: ", "sample ", logit]);
    assert!(!ended.stderr.contains("checkpoint export"), "{}", ended.stderr);
    assert!(!place.job_dir("j2").join("artifacts/evaluation.json").exists());

    let data = place.dir().join("datasets").to_string_lossy().into_owned();
    let job = place.job_file(&job).to_string_lossy().into_owned();
    let report = place.file("report.json");
    let path = report.to_string_lossy().into_owned();
    let options = ["--datasets", &data, "--job", &job, "--ensemble", "--json", &path];
    let both = [Path::new(&file), Path::new(&broken)];
    refused(eval(&both, &options), &[&format!("checkpoint `{broken}`: sample "), logit]);
    assert!(!report.exists(), "a file of no report");
    fs::write(&report, "an older one").expect("written");
    refused(eval(&both, &options), &[logit]);
    assert_eq!(fs::read_to_string(&report).expect("the older one"), "an older one");
    let picture = place.file("picture.png");
    fs::write(&picture, lockstep_tests::images::png(&[90; 16 * 16 * 3], 16, 16)).expect("a picture");
    let picture = picture.to_string_lossy();
    let args = ["predict", "--checkpoint", &broken, "--datasets", &data, "--job", &job, &picture];
    let named = format!("image `{picture}`: checkpoint `{broken}`: the network's logit of class 0 is inf");
    refused(worker(args), &[&named]);
}

#[test]
fn a_report_that_could_not_be_written_is_refused_before_the_evaluation() {
    let place = Place::new();
    place.run(Job { steps: 4, ..Job::default() }, 1);
    let good = place.checkpoint("j1", 4);
    let nowhere = place.file("none/report.json").to_string_lossy().into_owned();
    refused(eval(&[&good], &["--json", &nowhere]), &[&format!("cannot write `{nowhere}`")]);
    let report = place.file("report.json");
    let path = report.to_string_lossy().into_owned();
    fs::write(&report, [b'x'; 100_000]).expect("an older report");
    eval(&[&good], &["--json", &path]).ok();
    let found: Value = serde_json::from_slice(&fs::read(&report).expect("the report")).expect("JSON");
    assert_eq!(found, evaluated(&[&good], &[]));
}

#[test]
fn a_reader_that_has_gone_away_is_no_error() {
    let place = Place::new();
    place.run(Job { steps: 4, ..Job::default() }, 1);
    let (checkpoint, report) = (place.checkpoint("j1", 4), place.file("report.json"));
    let printed = |args: &[&OsStr]| {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut worker = command("worker");
        let ended = worker.args(args).stdout(writer).output().expect("the worker starts");
        assert!(ended.status.success(), "{args:?}: {}", String::from_utf8_lossy(&ended.stderr));
    };
    printed(&["models".as_ref()]);
    printed(&[
        "eval".as_ref(),
        "--checkpoint".as_ref(),
        checkpoint.as_ref(),
        "--json".as_ref(),
        report.as_ref(),
    ]);
    let report = fs::read_to_string(report).expect("a report");
    assert!(serde_json::from_str::<Value>(&report).is_ok(), "{report}");
}

#[test]
fn weights_of_no_network_are_told_what_they_lack() {
    let place = Place::new();
    place.run(Job { steps: 4, width: 16, ..Job::default() }, 1);
    let file = place.file("weights.safetensors");
    place.coordinator(["checkpoint", "export", "j1", &file.to_string_lossy()]).ok();
    let other = |name: &str, shape: Vec<usize>| match name {
        "fc.bias" => vec![("fc.more".to_owned(), shape)],
        "bn1.bias" => vec![(name.to_owned(), vec![15])],
        _ => vec![(name.to_owned(), shape)],
    };
    let other = changed(&file, "other.safetensors", other);
    let ended = worker(["weights", &other.to_string_lossy()]).refused(1, &[]);
    let told = [
        "are those of no network of `worker models`; nearest is `small-cnn`",
        "\n  missing: `fc.bias`\n  too much: `fc.more`\n  other shape: `bn1.bias` is [15] instead of [16]\n",
    ];
    assert!(told.iter().all(|told| ended.stderr.contains(told)), "{}", ended.stderr);
    assert_eq!((ended.stderr.lines().count(), ended.stdout.as_str()), (4, ""), "{}", ended.stderr);
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let place = Place::new();
    place.run(Job { steps: 4, width: 16, ..Job::default() }, 1);
    let file = place.file("weights.safetensors");
    place.coordinator(["checkpoint", "export", "j1", &file.to_string_lossy()]).ok();
    let data = place.dir().join("datasets").to_string_lossy().into_owned();
    let job = place.file("job.toml").to_string_lossy().into_owned();
    let with = |file: &Path, job: &str| eval(&[file], &["--datasets", &data, "--job", job]);
    with(&file, &job).ok();
    // What `worker weights` knows needs no job file, and has to be told how pixels are scaled.
    let options = ["--datasets", &data, "--dataset", "tiny/test"];
    refused(eval(&[&file], &options), &["how are pixels scaled?", "--mean and --std"]);
    let told = evaluated(&[&file], &[&options[..], &["--train", "tiny/train"]].concat());
    assert_eq!(told["checkpoints"][0]["report"]["top1"], evaluation(&place, "j1")["top1"]);

    let other = Job { width: 16, ..Job::default() }.to_string();
    let other = place
        .job_file(other.replace("small-cnn\"\nwidth = 16", "nin\"\nin_channels = 1"))
        .to_string_lossy()
        .into_owned();
    refused(
        with(&file, &other),
        &["weights.safetensors`: these are the weights of `small-cnn`, not of `nin`"],
    );
    let job = place.job_file(Job { width: 16, ..Job::default() }).to_string_lossy().into_owned();
    let fc = "fc.bias";
    let same = |name: &str, shape| (name.to_owned(), shape);
    let without = |name: &str, shape| if name == fc { vec![] } else { vec![same(name, shape)] };
    let missing = changed(&file, "missing.safetensors", without);
    refused(with(&missing, &job), &["missing.safetensors`: `fc.bias` is missing"]);
    let doubled = |name: &str, shape: Vec<usize>| match name == fc {
        true => vec![same(name, shape.clone()), same("fc.more", shape)],
        false => vec![same(name, shape)],
    };
    let extra = changed(&file, "extra.safetensors", doubled);
    refused(with(&extra, &job), &["extra.safetensors`: `fc.more` is unknown"]);
    let shorter = |name: &str, shape| vec![same(name, if name == fc { vec![7] } else { shape })];
    let shaped = changed(&file, "shaped.safetensors", shorter);
    refused(with(&shaped, &job), &["shaped.safetensors`: `fc.bias` has shape [7] instead of [10]"]);
    let cut = place.file("cut.safetensors");
    fs::write(&cut, &fs::read(&file).expect("the weights")[..1000]).expect("written");
    refused(with(&cut, &job), &["cut.safetensors`: "]);
}

#[test]
fn too_few_classes_and_images_too_small_or_of_other_colours_are_named() {
    let place = Place::empty();
    pets(&place);
    write_idx(&place.file("dots"), 20, 20, 3);
    place.add_dataset("dots", &place.file("dots"));
    let pets = place.checkpoint("j1", 30);
    refused(
        eval(&[&pets], &["--dataset", "dots/test"]),
        &["step-000000000030`: its network has 4 classes, and dataset `dots/test` has 10"],
    );

    write_idx(&place.file("tiny"), 40, 40, 16);
    place.add_dataset("tiny", &place.file("tiny"));
    write_cifar10(&place.file("cifar"), 8);
    place
        .coordinator([
            "dataset",
            "add",
            "cifar",
            "--format",
            "cifar-10",
            &place.file("cifar").to_string_lossy(),
        ])
        .ok();
    let job = Job { steps: 1, ..Job::default() }.to_string();
    place.run(job.replace("small-cnn\"\nwidth = 4", "nin\"\nwidths = \"mnist\"\nin_channels = 1"), 1);
    let grey = place.checkpoint("j2", 1);
    refused(
        eval(&[&grey], &["--dataset", "dots/test"]),
        &["step-000000000001`: model `nin`: expected images of at least 4x4 pixels, got images of 3x3"],
    );
    refused(
        eval(&[&grey], &["--dataset", "cifar/test"]),
        &["its network takes images of 1 channels and these have 3"],
    );
    refused(eval(&[&grey, &pets], &["--dataset", "tiny/test"]), &["its network has 4 classes"]);
}

#[test]
fn files_that_are_no_images_are_named_and_nothing_is_told() {
    let place = Place::empty();
    let source = pets(&place);
    let checkpoint = place.checkpoint("j1", 30).to_string_lossy().into_owned();
    let good = source.join("val/ant/000.jpg").to_string_lossy().into_owned();
    let predict =
        |image: &Path| worker(["predict", "--checkpoint", &checkpoint, &good, &image.to_string_lossy()]);
    let text = place.file("text.png");
    fs::write(&text, "not an image").expect("written");
    refused(predict(&text), &["text.png`: it is neither JPEG nor PNG"]);
    let half = place.file("half.png");
    let whole = lockstep_tests::images::png(&[5; 30 * 30 * 3], 30, 30);
    fs::write(&half, &whole[..whole.len() / 2]).expect("written");
    refused(predict(&half), &["half.png`: damaged PNG"]);
    let half = place.file("half.jpg");
    let whole = fs::read(&good).expect("a JPEG");
    // All of its header, and not all of its pixels.
    fs::write(&half, &whole[..whole.len() - 20]).expect("written");
    refused(predict(&half), &["half.jpg`: damaged JPEG: Premature end"]);
    refused(predict(&place.file("none.png")), &["none.png`: No such file"]);
    refused(predict(&source), &["source`: Is a directory"]);
}
