//! A job's folder: its file, log, metrics, checkpoints and artifacts.

use crate::audit_log::append;
use lockstep_common::checkpoint::{CheckpointError, CheckpointStore};
use lockstep_common::durable::{self, FileError};
use lockstep_common::ids::Generation;
use lockstep_common::wire::{LogLine, StepRecord};
use serde::Serialize;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The longest line of a log; the rest of it is cut off.
const MAX_LINE_BYTES: usize = 4 << 10;

/// The longest line that is sent: one of the log with its time, or whatever else somebody has put there.
const MAX_SENT_LINE_BYTES: usize = MAX_LINE_BYTES + 100;

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

    /// What each logical shard was given in each step.
    pub fn audit(&self) -> PathBuf {
        self.root.join("audit.jsonl")
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
        let line = cut(text, MAX_LINE_BYTES).replace(['\n', '\r'], " ");
        append(&self.log(), format!("{time} {line}\n").as_bytes())
    }

    /// Adds committed steps to `metrics.jsonl`.
    pub(crate) fn append_steps(&self, records: &[StepRecord]) -> Result<(), FileError> {
        let lines = records.iter().map(|r| MetricsLine {
            generation: r.generation,
            step: r.step,
            epoch: r.epoch,
            samples: Some(r.samples),
            seconds: Some(r.seconds),
            values: &r.values,
        });
        append(&self.metrics(), &json_lines(lines))
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

/// At most `max_bytes` of `text`, which ends in `…` if something is missing.
pub(crate) fn cut(text: &str, max_bytes: usize) -> Cow<'_, str> {
    const MARK: &str = "…";
    if text.len() <= max_bytes {
        return Cow::Borrowed(text);
    }
    let end = text.floor_char_boundary(max_bytes.saturating_sub(MARK.len()));
    Cow::Owned(format!("{}{MARK}", &text[..end]))
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

    /// Whole lines that have not been read yet, until they have `limit_bytes` or there are no more.
    pub(crate) fn read(&mut self, limit_bytes: usize) -> Result<Vec<LogLine>, FileError> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(FileError::new("read", &self.path, e)),
        };
        let failed = FileError::on("read", &self.path);
        let mut lines = Vec::new();
        let mut bytes_read = 0;
        let result = file.seek(SeekFrom::Start(self.offset)).and_then(|_| {
            let mut reader = BufReader::new(file);
            while bytes_read < limit_bytes {
                let mut bytes = Vec::new();
                let read = reader.read_until(b'\n', &mut bytes)?;
                if bytes.pop() != Some(b'\n') {
                    break;
                }
                self.offset += read as u64;
                bytes_read += read;
                let text = cut(&String::from_utf8_lossy(&bytes), MAX_SENT_LINE_BYTES).into_owned();
                lines.push(LogLine { number: self.number, text });
                self.number += 1;
            }
            Ok(())
        });
        result.map_err(failed).map(|()| lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> (tempfile::TempDir, JobDir) {
        let folder = tempfile::tempdir().unwrap();
        let dir = JobDir::new(folder.path().to_owned());
        (folder, dir)
    }

    fn step(step: u64, loss: f64) -> StepRecord {
        let values = [("loss".to_owned(), loss)].into();
        StepRecord { step, seconds: f64::INFINITY, values, ..StepRecord::default() }
    }

    #[test]
    fn long_lines_are_cut_between_characters() {
        assert_eq!(cut("äöü", 6), "äöü");
        assert_eq!(cut("äöüß", 7), "äö…");
        assert_eq!(cut("abcdefgh", 7), "abcd…");
        let (_folder, dir) = folder();
        dir.append_log(&"ä".repeat(5000)).unwrap();
        dir.append_log("short").unwrap();
        let lines = LogReader::new(&dir).read(1 << 20).unwrap();
        assert!(lines[0].text.ends_with("ä…") && lines[0].text.len() < 4200, "{}", lines[0].text.len());
        assert!(lines[1].text.ends_with(" short"));
    }

    #[test]
    fn a_log_is_read_in_parts_of_bounded_size() {
        let (_folder, dir) = folder();
        (0..100).for_each(|_| dir.append_log(&"x".repeat(9000)).unwrap());
        let mut reader = LogReader::new(&dir);
        let (mut next, mut parts) = (0, 0);
        loop {
            let lines = reader.read(64 << 10).unwrap();
            if lines.is_empty() {
                break;
            }
            assert!(lines.iter().map(|l| l.text.len()).sum::<usize>() < 80 << 10);
            for line in lines {
                assert_eq!(line.number, next);
                next += 1;
            }
            parts += 1;
        }
        assert!(next == 100 && parts > 5, "{next} lines in {parts} parts");
    }

    #[test]
    fn figures_that_are_no_numbers_leave_the_lines_valid_json() {
        let (_folder, dir) = folder();
        dir.append_steps(&[step(1, f64::NAN), step(2, f64::NEG_INFINITY)]).unwrap();
        let text = std::fs::read_to_string(dir.metrics()).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert!(lines.iter().all(|l| l["loss"].is_null() && l["step"].is_u64()), "{text}");
    }
}
