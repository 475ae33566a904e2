//! A data directory with a dataset in it, and `coordinator run` on it.

use crate::data::write_idx;
use crate::process::{Ended, Process, command};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Samples in the small dataset's training set: not a multiple of any test's batch.
pub const TRAIN: u32 = 600;
/// Samples in its test set.
pub const TEST: u32 = 203;
/// Rows and columns of its images.
pub const SIDE: u32 = 16;

/// A temporary data directory.
pub struct Place {
    root: TempDir,
}

/// The object that `run` ends with and `status --json` prints.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Report {
    /// `j1` and so on.
    pub job: String,
    /// `finished`, `running`, ...
    pub state: String,
    /// Why.
    pub reason: String,
    /// The last committed step.
    pub step: u64,
    /// All steps.
    pub total_steps: u64,
    /// The membership's number.
    pub generation: u64,
    /// Figures by name.
    pub metrics: BTreeMap<String, f64>,
    /// The final weights.
    pub weights_digest: Option<String>,
    /// The folder of the newest checkpoint.
    pub checkpoint: Option<String>,
    /// The members.
    pub workers: Vec<String>,
    /// Slow ranks; `run` does not tell.
    #[serde(default)]
    pub stragglers: Vec<Value>,
}

impl Report {
    /// The digest of a job that has finished.
    #[track_caller]
    pub fn digest(&self) -> String {
        assert_eq!(self.state, "finished", "{self:?}");
        self.weights_digest.clone().expect("a finished job has a digest")
    }
}

impl Place {
    /// An empty data directory.
    pub fn empty() -> Self {
        Self { root: tempfile::tempdir().expect("a temporary folder") }
    }

    /// A data directory with the small dataset as `tiny`.
    pub fn new() -> Self {
        Self::with_tiny(TRAIN, TEST, SIDE)
    }

    /// A data directory with a small dataset of these sizes as `tiny`.
    pub fn with_tiny(train: u32, test: u32, side: u32) -> Self {
        let place = Self::empty();
        let source = place.file("source");
        write_idx(&source, train, test, side);
        place.add_dataset("tiny", &source);
        place
    }

    /// Imports a dataset.
    pub fn add_dataset(&self, name: &str, source: &Path) {
        let args = ["dataset", "add", name, "--format", "idx"].map(OsStr::new);
        self.coordinator(args.into_iter().chain([source.as_os_str()])).ok();
    }

    /// Leaves all files where they are, and says where.
    pub fn keep(self) -> PathBuf {
        self.root.keep()
    }

    /// The data directory.
    pub fn dir(&self) -> PathBuf {
        self.root.path().join("data")
    }

    /// A path beside the data directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Writes a job file beside the data directory.
    pub fn job_file(&self, text: impl ToString) -> PathBuf {
        let path = self.file("job.toml");
        fs::write(&path, text.to_string()).expect("the job file");
        path
    }

    /// The command `coordinator --data-dir DIR`.
    pub fn command(&self) -> Command {
        let mut command = command("coordinator");
        command.arg("--data-dir").arg(self.dir());
        command
    }

    /// Runs `coordinator ARGS` to its end.
    #[track_caller]
    pub fn coordinator(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ended {
        let mut command = self.command();
        command.args(args);
        Process::start(command).wait()
    }

    /// Runs `coordinator ARGS --json` and parses what it prints.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let ended = self.coordinator(args.iter().chain([&"--json"])).ok();
        serde_json::from_str(ended.stdout.trim()).unwrap_or_else(|e| panic!("{e}: {:?}", ended.stdout))
    }

    /// Starts `coordinator run` on the job.
    pub fn start_run(&self, job: impl ToString, workers: u32) -> Process {
        let mut command = self.command();
        command.arg("run").arg(self.job_file(job)).args(["--workers", &workers.to_string()]);
        Process::start(command)
    }

    /// Runs the job to its end, which must be a good one.
    #[track_caller]
    pub fn run(&self, job: impl ToString, workers: u32) -> Report {
        self.finished(&self.start_run(job, workers).wait().ok())
    }

    /// The report of a run that has finished, with every sample counted once.
    #[track_caller]
    pub fn finished(&self, ended: &Ended) -> Report {
        let report = report(ended);
        if report.state == "finished" {
            self.prove(&report.job);
        }
        report
    }

    /// Proves by the job's audit that every step, and in each epoch every sample, counted exactly once.
    #[track_caller]
    pub fn prove(&self, job: &str) -> Value {
        let proof = self.json(&["audit", job]);
        assert_eq!((&proof["ok"], &proof["complete"]), (&true.into(), &true.into()), "{proof}");
        proof
    }

    /// A job's folder.
    pub fn job_dir(&self, job: &str) -> PathBuf {
        self.dir().join("jobs").join(job)
    }

    /// A job's log.
    pub fn log(&self, job: &str) -> String {
        fs::read_to_string(self.job_dir(job).join("log")).unwrap_or_default()
    }

    /// The lines of a job's `metrics.jsonl`.
    pub fn metrics(&self, job: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.job_dir(job).join("metrics.jsonl")).unwrap_or_default();
        // A line that is still being written does not count.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| serde_json::from_str(line).expect("a line of metrics.jsonl")).collect()
    }

    /// The bits of each step's loss, by step; a step that was done again must have given the same.
    #[track_caller]
    pub fn losses(&self, job: &str) -> BTreeMap<u64, u64> {
        let mut losses = BTreeMap::new();
        for line in self.metrics(job).iter().filter(|line| line.get("seconds").is_some()) {
            let (Some(step), Some(loss)) = (line["step"].as_u64(), line["loss"].as_f64()) else {
                panic!("a step without a loss: {line}")
            };
            let earlier = losses.insert(step, loss.to_bits());
            assert!(earlier.is_none_or(|bits| bits == loss.to_bits()), "step {step} gave two losses");
        }
        losses
    }

    /// The steps of a job's complete checkpoints, the newest first.
    pub fn checkpoints(&self, job: &str) -> Vec<u64> {
        let Ok(entries) = fs::read_dir(self.job_dir(job).join("checkpoints")) else { return Vec::new() };
        let step = |name: &str| name.strip_prefix("step-")?.parse().ok();
        let mut steps: Vec<u64> = entries.filter_map(|e| step(e.ok()?.file_name().to_str()?)).collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        steps
    }

    /// The folder of a checkpoint.
    pub fn checkpoint(&self, job: &str, step: u64) -> PathBuf {
        self.job_dir(job).join("checkpoints").join(format!("step-{step:012}"))
    }
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}

/// The report on the last line of a run's standard output.
#[track_caller]
pub fn report(ended: &Ended) -> Report {
    let line = ended.stdout.lines().last().unwrap_or_else(|| panic!("no report:\n{}", ended.stderr));
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))
}

/// Changes one bit in the middle of a file.
pub fn flip_byte(path: &Path) {
    let mut bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}
