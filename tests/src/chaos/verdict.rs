//! Whether a run was a good one: each job's result, its steps, its checkpoints, and what was left behind.

use super::stage::{Exit, Stage};
use super::workload::Undisturbed;
use super::{End, Trial};
use crate::process::marked;
use crate::wait::within;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

/// How long the kernel may take to clear up after processes that have ended.
const CLEARING: Duration = Duration::from_secs(10);

/// How long a busy machine may take to load a program of a gigabyte.
const LOADING: Duration = Duration::from_secs(5);

/// Whether a job ended as the undisturbed one, step by step.
pub fn of_trial(trial: &Trial, undisturbed: &Undisturbed) -> Vec<String> {
    let id = &trial.id;
    let damaged = |line: &String| format!("{id}: a damaged line of metrics.jsonl: {line:?}");
    let mut failures: Vec<_> = trial.seen.damaged.iter().map(damaged).collect();
    let digest = trial.seen.report.as_ref().and_then(|report| report.weights_digest.as_ref());
    if trial.end == End::Finished && digest != Some(&undisturbed.digest) {
        failures.push(format!("{id} ended with the weights {digest:?}, not {}", undisturbed.digest));
    }
    let losses = &undisturbed.losses;
    for line in &trial.seen.lines {
        if losses.get(&line.step) != Some(&line.loss) {
            let (step, generation, loss) = (line.step, line.generation, f64::from_bits(line.loss));
            let expected = losses.get(&step).map(|bits| f64::from_bits(*bits));
            failures.push(format!(
                "{id}: step {step} of generation {generation} has loss {loss}, not {expected:?}"
            ));
        }
    }
    failures
}

/// Whether every checkpoint that a job that has just ended has left is whole; then frees their disk for other jobs.
pub fn of_checkpoints(id: &str, stage: &Stage) -> Option<String> {
    let verified = stage.ask(&["checkpoint", "verify", id]);
    let folder = stage.place.job_dir(id).join("checkpoints");
    let temporary = hidden(&folder);
    for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
        // A coordinator that still has a checkpoint to remove may be faster.
        let _ = fs::remove_dir_all(entry.path());
    }
    match verified {
        Some(ended) if !ended.status.success() => {
            Some(format!("{id}: its checkpoints are not whole: {}", ended.stderr.trim()))
        }
        None => Some(format!("{id}: `checkpoint verify` does not end")),
        Some(_) => temporary.first().map(|path| format!("{} was left behind", path.display())),
    }
}

/// Whether each sample counted once per epoch, by the coordinator's own audit; `false` if it has none.
pub fn audit(trials: &[Trial], stage: &Stage, failures: &mut Vec<String>) -> bool {
    let has_audit = stage.ask(&["audit", "--help"]).is_some_and(|ended| ended.status.success());
    for trial in trials.iter().filter(|_| has_audit) {
        match stage.ask(&["audit", &trial.id]) {
            Some(ended) if ended.status.success() => {}
            Some(ended) => failures.push(format!("{}: the audit fails: {}", trial.id, ended.stderr.trim())),
            None => failures.push(format!("{}: the audit does not end", trial.id)),
        }
    }
    has_audit
}

/// Whether every program left in good order when it was told to at the end.
pub fn of_ends(ends: Vec<(String, Option<ExitStatus>)>) -> Vec<String> {
    let failure = |(name, end): (String, Option<ExitStatus>)| match end {
        Some(status) if status.success() => None,
        Some(status) => Some(format!("{name} ended with {status} when told to leave at the end")),
        None => Some(format!("{name} does not leave at the end")),
    };
    ends.into_iter().filter_map(failure).collect()
}

/// Whether programs that ended by themselves in the course of the run had a reason that they could name.
pub fn of_exits(exits: &[Exit]) -> Vec<String> {
    exits.iter().filter(|exit| !exit.is_explained()).map(|exit| format!("without a reason: {exit}")).collect()
}

impl Exit {
    /// Whether it was told to leave and did, or is a worker that said why it could not go on: its coordinator was away
    /// when it started, or does not want it any longer. One that is told to leave while its program is still being loaded
    /// cannot listen yet, and ends by the signal.
    fn is_explained(&self) -> bool {
        let said_why =
            self.who != "coordinator" && self.status.code() == Some(1) && self.line.starts_with("error: ");
        let early = self.ran < LOADING && self.status.signal() == Some(libc::SIGTERM);
        let left = self.status.success() || early;
        said_why || self.asked && left
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { at, who, status, line, .. } = self;
        write!(f, "{:.1} s: {who} ended with {status}: {line}", at.as_secs_f64())
    }
}

/// Whether no program ever panicked.
pub fn of_programs(stage: &Stage) -> Vec<String> {
    let panic = |text: String| text.lines().find(|line| line.contains("panicked at")).map(str::to_owned);
    stage.programs().filter_map(|p| Some(format!("{}: {}", p.name(), panic(p.said())?))).collect()
}

/// Names that outlive a process unless it clears up: shared memory that has any, and Lockstep's Unix sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers(BTreeSet<String>);

impl Leftovers {
    /// Those of this host.
    pub fn of_this_host() -> Self {
        let segments = fs::read_dir("/dev/shm").into_iter().flatten();
        let segments = segments.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let sockets = fs::read_to_string("/proc/net/unix").unwrap_or_default();
        Self(segments.chain(sockets_in(&sockets)).collect())
    }

    fn of(stage: &Stage) -> Self {
        let mut all = Self::of_this_host();
        let hosts = stage.hosts.iter().flat_map(|hosts| (1..=hosts.count()).map(move |n| (hosts, n)));
        for (hosts, n) in hosts {
            let mut cat = Command::new("cat");
            cat.arg("/proc/net/unix");
            let sockets = hosts.on(n, &cat).output().map(|output| output.stdout).unwrap_or_default();
            all.0.extend(sockets_in(&String::from_utf8_lossy(&sockets)));
        }
        all
    }
}

fn sockets_in(table: &str) -> Vec<String> {
    let names = table.lines().filter_map(|line| line.split_whitespace().last());
    names.filter(|name| name.starts_with("@lockstep")).map(str::to_owned).collect()
}

/// Whether nothing is left of the run's processes: none of them, no segment, no socket, no temporary file.
pub fn of_leftovers(stage: &Stage, before: &Leftovers) -> Vec<String> {
    let mut failures = Vec::new();
    let orphans = || marked(super::stage::MARK, &stage.mark);
    if within(CLEARING, || orphans().is_empty().then_some(())).is_none() {
        failures.push(format!("processes are left: {:?}", orphans()));
    }
    let new = || Leftovers::of(stage).0.difference(&before.0).cloned().collect::<Vec<_>>();
    if within(CLEARING, || new().is_empty().then_some(())).is_none() {
        failures.push(format!("shared memory or sockets are left: {:?}", new()));
    }
    // What never came back could not clear up either.
    let kept = stage.workers().filter(|worker| !stage.history.lost.contains(worker));
    let folders = kept.map(|worker| stage.folder(&worker)).chain([stage.place.dir()]);
    let mut files: Vec<_> = folders.flat_map(|folder| hidden(&folder)).collect();
    files.extend(fs::read_dir(stage.place.file("tmp")).into_iter().flatten().flatten().map(|e| e.path()));
    failures.extend(files.iter().map(|path| format!("{} was left behind", path.display())));
    failures
}

/// The files and folders under `folder` whose names begin with a dot, as those of unfinished ones do.
fn hidden(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            found.push(entry.path());
        } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(hidden(&entry.path()));
        }
    }
    found
}

/// Whether a process ended by `kill -9`.
pub fn was_killed(status: ExitStatus) -> bool {
    status.signal() == Some(libc::SIGKILL)
}
