//! Interruptions of every kind change no bit of the result.

use lockstep_tests::job::Job;
use lockstep_tests::place::{Place, Report, flip_byte, report};
use lockstep_tests::process::{Process, signal_pid};
use std::fs;
use std::path::Path;
use std::process::Command;

/// A job that lasts some seconds, so that it can be interrupted.
fn long() -> Job {
    Job { steps: 240, every_steps: 20, ..Job::default() }
}

/// What the job gives when nothing happens to it.
fn undisturbed(job: &Job) -> String {
    Place::new().run(job, 1).digest()
}

/// Starts the job on two workers and lets it come to some checkpoints.
fn started(place: &Place, job: &Job) -> Process {
    let mut run = place.start_run(job, 2);
    run.until("two checkpoints", || (place.checkpoints("j1").len() >= 2).then_some(()));
    run
}

/// A data directory whose job was killed in mid-run, with at least two checkpoints.
fn killed(job: &Job) -> Place {
    let place = Place::new();
    let mut run = started(&place, job);
    run.kill_all();
    assert_eq!(run.stdout(), "", "it was killed before its end");
    place
}

/// Runs the same command again; returns its report and standard error.
#[track_caller]
fn again(place: &Place, job: &Job, workers: u32) -> (Report, String) {
    let ended = place.start_run(job, workers).wait().ok();
    (place.finished(&ended), ended.stderr)
}

#[test]
fn a_run_whose_processes_are_all_killed_resumes_to_the_undisturbed_digest() {
    let job = long();
    let place = killed(&job);
    let newest = place.checkpoints("j1")[0];
    assert!(newest < job.steps, "it was killed in mid-run, after step {newest}");
    let (report, stderr) = again(&place, &job, 2);
    assert!(stderr.contains(&format!("resuming j1 from step {newest}")), "{stderr}");
    assert_eq!(report.digest(), undisturbed(&job));
    assert_eq!(report.job, "j1");
    // Steps that were done twice gave the same loss twice, which this checks.
    assert_eq!(place.losses("j1").len() as u64, job.steps);
}

#[test]
fn a_killed_run_resumes_on_another_number_of_workers() {
    let job = long();
    let place = killed(&job);
    assert_eq!(again(&place, &job, 3).0.digest(), undisturbed(&job));
}

/// What the shards keep of their gradients goes with the checkpoint.
#[test]
fn a_killed_run_with_lossy_wires_resumes_on_another_number_of_workers() {
    for wire in ["int8", "powersgd"] {
        let job = Job { wire, ..long() };
        let place = killed(&job);
        assert_eq!(again(&place, &job, 3).0.digest(), undisturbed(&job), "{wire}");
    }
}

#[test]
fn a_damaged_checkpoint_is_refused_by_name_and_the_previous_good_one_used() {
    let job = long();
    let original = killed(&job);
    let [newest, previous] = original.checkpoints("j1")[..2] else { panic!("two checkpoints are kept") };
    let expected = undisturbed(&job);
    for file in ["manifest.json", "weights.safetensors", "optimizer.safetensors"] {
        for damage in ["flipped", "truncated", "removed"] {
            let place = copy(&original);
            let path = place.checkpoint("j1", newest).join(file);
            match damage {
                "flipped" => flip_byte(&path),
                "truncated" => truncate(&path),
                _ => fs::remove_file(&path).expect("the file is there"),
            }
            // Only the few steps from the checkpoint matter here, not a whole run: stop once it has resumed.
            let mut run = place.start_run(&job, 1);
            run.until_stderr("resuming");
            let stderr = run.stderr();
            let refusal = format!("checkpoint of step {newest} refused: ");
            let line = stderr.lines().find(|l| l.contains(&refusal)).unwrap_or_else(|| panic!("{stderr}"));
            assert!(line.contains(file), "{damage} {file}: {line}");
            assert!(
                stderr.contains(&format!("resuming j1 from step {previous}")),
                "{damage} {file}: {stderr}"
            );
            if file == "weights.safetensors" && damage == "flipped" {
                assert_eq!(report(&run.wait().ok()).digest(), expected, "from the previous checkpoint");
                assert!(
                    place.log("j1").contains(&refusal),
                    "the job's log says so too:\n{}",
                    place.log("j1")
                );
            }
        }
    }
}

#[test]
fn without_any_good_checkpoint_a_run_starts_over_and_says_so() {
    let job = long();
    let place = killed(&job);
    for step in place.checkpoints("j1") {
        truncate(&place.checkpoint("j1", step).join("weights.safetensors"));
    }
    let (report, stderr) = again(&place, &job, 2);
    assert!(stderr.contains("resuming j1 from the start"), "{stderr}");
    assert_eq!(report.digest(), undisturbed(&job));
}

#[test]
fn interrupt_and_terminate_leave_a_checkpoint_of_the_step_in_progress() {
    let job = long();
    let expected = undisturbed(&job);
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let place = Place::new();
        let run = started(&place, &job);
        run.signal(signal);
        let ended = run.wait().refused(1, &["stopped at step", "type the same command to go on"]);
        let stopped = report(&ended);
        assert_eq!(stopped.state, "paused");
        assert!(stopped.step < job.steps, "{stopped:?}");
        assert_eq!(place.checkpoints("j1")[0], stopped.step, "the newest checkpoint is of the last step");
        let (report, stderr) = again(&place, &job, 2);
        assert!(stderr.contains(&format!("resuming j1 from step {}", stopped.step)), "{stderr}");
        assert_eq!(report.digest(), expected);
        let steps = place.metrics("j1").iter().filter(|line| line.get("seconds").is_some()).count();
        assert_eq!(steps as u64, job.steps, "no step was done twice");
    }
}

#[test]
fn a_finished_job_runs_anew_and_fresh_ignores_an_unfinished_one() {
    let job = Job { steps: 5, ..Job::default() };
    let place = Place::new();
    let first = place.run(&job, 1);
    let second = place.run(&job, 1);
    assert_eq!((first.job.as_str(), second.job.as_str()), ("j1", "j2"));
    assert_eq!(first.digest(), second.digest());

    let job = long();
    let place = killed(&job);
    let mut command = place.command();
    command.arg("run").arg(place.job_file(&job)).args(["--workers", "2", "--fresh"]);
    let fresh = report(&Process::start(command).wait().ok());
    assert_eq!(fresh.job, "j2");
    assert_eq!(place.losses("j2").len() as u64, job.steps, "it began at step 1");
}

#[test]
fn a_killed_worker_of_a_run_is_replaced_and_the_digest_stays() {
    let job = long();
    let place = Place::new();
    let mut run = started(&place, &job);
    let workers = run.children();
    assert_eq!(workers.len(), 2, "{workers:?}");
    signal_pid(workers[0], libc::SIGKILL);
    run.until_stderr("starting it again");
    let report = report(&run.wait().ok());
    assert!(report.generation > 1, "the membership changed: {report:?}");
    assert_eq!(report.digest(), undisturbed(&job));
}

fn truncate(path: &Path) {
    let bytes = fs::read(path).expect("the file is there");
    fs::write(path, &bytes[..bytes.len() - 1]).expect("the file can be written");
}

fn copy(original: &Place) -> Place {
    let place = Place::empty();
    let status = Command::new("cp").arg("-r").arg(original.dir()).arg(place.dir()).status();
    assert!(status.expect("`cp` is on every system").success());
    place
}
