//! The coordinator's disk is full: training goes on, `status` says what is not stored, and nothing is lost that was.

use lockstep_tests::cluster::Cluster;
use lockstep_tests::job::Job;
use lockstep_tests::place::{Place, report};
use lockstep_tests::process::Process;
use lockstep_tests::wait::until;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

#[test]
fn a_full_disk_fails_the_job_with_one_line() {
    let place = Place::new();
    let Some(_small) = SmallDisk::mount(place.dir().join("jobs"), "256k") else { return };
    let job = Job { width: 32, ..Job::default() };
    let ended = place.start_run(&job, 1).wait();
    let log = place.log("j1");
    let ended = ended.refused(1, &["error: j1 failed"]);
    assert!(
        ended.stderr.contains("o space left") || ended.stderr.contains("disk"),
        "{}\n{log}",
        ended.stderr
    );
}

#[test]
fn a_job_that_a_full_disk_failed_goes_on_from_its_checkpoint_once_there_is_room() {
    let place = Place::new();
    let Some(small) = SmallDisk::mount(place.dir().join("jobs"), "8m") else { return };
    let job = Job { steps: 120, ..Job::default() };
    let mut run = place.start_run(&job, 1);
    run.until("a checkpoint", || (!place.checkpoints("j1").is_empty()).then_some(()));
    small.fill();
    let failed = run.wait().refused(1, &["error: j1 failed", "hint: the same command goes on"]);
    assert_eq!(failed.stderr.matches("ERROR cannot append").count(), 1, "{}", failed.stderr);

    small.free();
    let newest = place.checkpoints("j1")[0];
    assert!(newest < job.steps, "the last checkpoint had no room");
    let ended = place.start_run(&job, 1).wait().ok();
    let resumed = format!("resuming j1 from step {newest} after its failure: ");
    assert!(ended.stderr.contains(&resumed), "`{resumed}` is not in: {}", ended.stderr);
    assert_eq!(report(&ended).digest(), Place::new().run(&job, 1).digest());
}

/// A cluster of two workers whose job has a checkpoint, and whose coordinator's disk has then become full.
fn filled(job: &Job) -> Option<(Cluster, SmallDisk, [Process; 2], String)> {
    let place = Place::new();
    let small = SmallDisk::mount(place.dir().join("jobs"), "8m")?;
    let mut cluster = Cluster::start(place);
    let workers = [cluster.worker(), cluster.worker()];
    let id = cluster.submit(job);
    until("a checkpoint", || (!cluster.place.checkpoints(&id).is_empty()).then_some(()));
    small.fill();
    Some((cluster, small, workers, id))
}

/// Waits until `status` says that the last step's checkpoint is not stored.
fn until_last_is_unstored(cluster: &Cluster, id: &str, job: &Job) {
    until("the last checkpoint to fail", || {
        let failure = &cluster.place.json(&["status", id])["checkpoint_failure"];
        (failure["step"].as_u64() == Some(job.steps)).then_some(())
    });
}

/// Only the job's log had it, which was on the same disk, with a line for each rank and checkpoint.
#[test]
fn a_last_checkpoint_without_room_is_in_the_status_and_stored_once_there_is_room() {
    let job = Job { steps: 120, min_workers: 2, ..Job::default() };
    let Some((cluster, small, _workers, id)) = filled(&job) else { return };
    until_last_is_unstored(&cluster, &id, &job);
    let [status, jobs] =
        [&["status", &id][..], &["jobs"]].map(|args| cluster.place.coordinator(args).ok().stdout);
    for shown in [&status, &jobs] {
        for part in ["could not be stored", "o space left", "training goes on", "the newest is of step"] {
            assert!(shown.contains(part), "{part:?} is not in:\n{shown}");
        }
    }
    small.free();
    let finished = cluster.until_finished(&id);
    assert_eq!(finished.digest(), Place::new().run(&job, 2).digest());
    assert!(cluster.place.json(&["status", &id])["checkpoint_failure"].is_null());
    let log = cluster.coordinator.stderr();
    let told =
        log.lines().filter(|line| line.contains("the checkpoint of") && line.contains("could not be stored"));
    assert_eq!(told.count(), 2, "the first, and the count at the end:\n{log}");
    assert!(log.contains(&format!("the checkpoint of step {} is stored; before it, ", job.steps)), "{log}");
}

/// The reason was a worker's.
#[test]
fn a_job_that_a_full_disk_failed_blames_the_disk_and_can_be_resumed() {
    let job = Job { steps: 120, min_workers: 2, ..Job::default() };
    let Some((cluster, small, _workers, id)) = filled(&job) else { return };
    until_last_is_unstored(&cluster, &id, &job);
    let failed = until("its failure", || Some(cluster.status(&id)).filter(|status| status.state == "failed"));
    assert!(
        failed.reason.starts_with("the coordinator's disk has not taken the last checkpoint: "),
        "{failed:?}"
    );
    let folder = cluster.place.job_dir(&id);
    for part in ["o space left", &*folder.to_string_lossy(), "free space there", "resume the job"] {
        assert!(failed.reason.contains(part), "{part:?} is not in {failed:?}");
    }
    let shown = cluster.place.coordinator(["status", &id]).ok();
    assert!(shown.stderr.contains(&format!("`coordinator resume {id}`")), "{}", shown.stderr);
    small.free();
    cluster.place.json(&["resume", &id]);
    assert_eq!(cluster.until_finished(&id).digest(), Place::new().run(&job, 2).digest());
}

/// A small file system in memory, while this lives.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None`, with the reason printed, where it cannot be had.
    #[allow(clippy::print_stdout, reason = "a test that is skipped says why")]
    fn mount(path: PathBuf, size: &str) -> Option<Self> {
        if !is_root() {
            println!("skipped: mounting a small tmpfs needs root");
            return None;
        }
        fs::create_dir_all(&path).expect("a folder");
        let size = format!("size={size}");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&path).status();
        if !mount.is_ok_and(|status| status.success()) {
            println!("skipped: tmpfs cannot be mounted here");
            return None;
        }
        Some(Self(path))
    }

    /// Leaves no free byte.
    fn fill(&self) {
        let mut file = fs::File::create(self.filler()).expect("a file");
        while file.write_all(&[0; 4096]).is_ok() {}
    }

    /// Undoes [`Self::fill`].
    fn free(&self) {
        fs::remove_file(self.filler()).expect("removed");
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0)
}
