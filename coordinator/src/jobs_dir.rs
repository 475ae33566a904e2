//! A job's folder: its file, log, metrics, checkpoints and artifacts.

use lockstep_common::checkpoint::{CheckpointError, CheckpointStore};
use lockstep_common::durable::{self, FileError};
use lockstep_common::ids::Generation;
use lockstep_common::wire::{LogLine, StepRecord};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A job's folder.
#[derive(Clone, Debug)]
pub struct JobDir {
    root: PathBuf,
}

/// A line of `metrics.jsonl`. The generation tells a step that was done again from its first attempt.
#[derive(Serialize)]
struct MetricsLine<'a> {
    generation: Generation,
    step: u64,
    epoch: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    samples: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<f64>,
    #[serde(flatten)]
    values: &'a BTreeMap<String, f64>,
}

impl JobDir {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The job's log.
    pub fn log(&self) -> PathBuf {
        self.root.join("log")
    }

    /// One JSON object for each step and evaluation.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// The folder of checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The folder of files for people to look at.
    pub fn artifacts(&self) -> PathBuf {
        self.root.join("artifacts")
    }

    /// What the local worker `number` of `coordinator run` writes to standard error.
    pub fn worker_log(&self, number: u32) -> PathBuf {
        self.root.join(format!("worker-{number}.log"))
    }

    /// The job's checkpoints.
    pub fn checkpoint_store(&self) -> Result<CheckpointStore, CheckpointError> {
        CheckpointStore::open(&self.checkpoints())
    }

    /// Makes the folder with the job's file in it, if it is not there.
    pub(crate) fn create(&self, toml: &str) -> Result<(), FileError> {
        let path = self.root.join("job.toml");
        if path.exists() {
            return Ok(());
        }
        durable::create_dir_all(&self.root)?;
        durable::write_atomic(&path, toml.as_bytes())
    }

    /// Adds a line to the log, with the time before it.
    pub(crate) fn append_log(&self, text: &str) -> Result<(), FileError> {
        let time = humantime::format_rfc3339_seconds(SystemTime::now());
        let line = text.replace(['\n', '\r'], " ");
        append(&self.log(), format!("{time} {line}\n").as_bytes())
    }

    /// Adds committed steps to `metrics.jsonl`.
    pub(crate) fn append_steps(
        &self,
        generation: Generation,
        records: &[StepRecord],
    ) -> Result<(), FileError> {
        let lines = records.iter().map(|r| MetricsLine {
            generation,
            step: r.step,
            epoch: r.epoch,
            samples: Some(r.samples),
            seconds: Some(r.seconds),
            values: &r.values,
        });
        append(&self.metrics(), &json_lines(lines))
    }

    /// The generation and step of the last line about a step in `metrics.jsonl`, if it can be read.
    pub(crate) fn last_noted_step(&self) -> Option<(Generation, u64)> {
        #[derive(Deserialize)]
        struct Noted {
            generation: Generation,
            step: u64,
            #[serde(rename = "seconds")]
            _seconds: f64,
        }
        let file = File::open(self.metrics()).ok()?;
        let noted = |line: std::io::Result<String>| serde_json::from_str::<Noted>(&line.ok()?).ok();
        BufReader::new(file).lines().filter_map(noted).last().map(|n| (n.generation, n.step))
    }

    /// Adds figures that belong to a step, such as those of an evaluation, to `metrics.jsonl`.
    pub(crate) fn append_values(
        &self,
        generation: Generation,
        step: u64,
        epoch: u64,
        values: &BTreeMap<String, f64>,
    ) -> Result<(), FileError> {
        let line = MetricsLine { generation, step, epoch, samples: None, seconds: None, values };
        append(&self.metrics(), &json_lines(std::iter::once(line)))
    }

    /// Writes a file for people to look at.
    pub(crate) fn write_artifact(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, FileError> {
        let folder = self.artifacts();
        durable::create_dir_all(&folder)?;
        let path = folder.join(name);
        durable::write_atomic(&path, bytes)?;
        Ok(path)
    }
}

fn json_lines<'a>(lines: impl Iterator<Item = MetricsLine<'a>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in lines {
        if serde_json::to_writer(&mut bytes, &line).is_ok() {
            bytes.push(b'\n');
        }
    }
    bytes
}

fn append(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.and_then(|mut f| f.write_all(bytes)).map_err(FileError::on("append to", path))
}

/// Reads a log from its beginning, line by line, as it grows.
pub(crate) struct LogReader {
    path: PathBuf,
    offset: u64,
    number: u64,
}

impl LogReader {
    pub(crate) fn new(dir: &JobDir) -> Self {
        Self { path: dir.log(), offset: 0, number: 0 }
    }

    /// Up to `limit` whole lines that have not been read yet.
    pub(crate) fn read(&mut self, limit: usize) -> Result<Vec<LogLine>, FileError> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(FileError::new("read", &self.path, e)),
        };
        let failed = FileError::on("read", &self.path);
        let mut lines = Vec::new();
        let result = file.seek(SeekFrom::Start(self.offset)).and_then(|_| {
            let mut reader = BufReader::new(file);
            while lines.len() < limit {
                let mut bytes = Vec::new();
                let read = reader.read_until(b'\n', &mut bytes)?;
                if bytes.pop() != Some(b'\n') {
                    break;
                }
                self.offset += read as u64;
                let text = String::from_utf8_lossy(&bytes).into_owned();
                lines.push(LogLine { number: self.number, text });
                self.number += 1;
            }
            Ok(())
        });
        result.map_err(failed).map(|()| lines)
    }
}
