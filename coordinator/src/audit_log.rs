//! A job's `audit.jsonl`, as the coordinator adds to it.
//!
//! A worker hears that its report was taken care of when its lines are written, so a killed coordinator loses none that
//! it acknowledged; they are on the disk within a second, and before any checkpoint is visible that goes beyond them.

use lockstep_common::audit::{AuditEntry, AuditLine, AuditStart};
use lockstep_common::durable::{self, FileError};
use lockstep_common::ids::Generation;
use lockstep_common::wire::{Position, StepRecord};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// The audit of one job.
#[derive(Debug)]
pub(crate) struct AuditLog {
    path: PathBuf,
    /// The newest generation that has started.
    newest: Option<Generation>,
    /// Steps 1 to this one are in it and have not been undone.
    audited: u64,
    /// Lines that are not written yet.
    pending: String,
    /// Whether something is written that may not be on the disk yet.
    unsynced: bool,
}

impl AuditLog {
    /// The audit in the file at `path`, which need not exist. A half line at its end is what a killed coordinator was
    /// writing: nobody was told that it is there, and it is removed.
    pub(crate) fn open(path: PathBuf) -> Result<Self, FileError> {
        let mut log = Self { path, newest: None, audited: 0, pending: String::new(), unsynced: false };
        let failed = |action| FileError::on(action, &log.path);
        let file = match OpenOptions::new().read(true).write(true).open(&log.path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(log),
            Err(e) => return Err(failed("read")(e)),
        };
        let (mut whole, mut bytes) = (0, Vec::new());
        let mut reader = BufReader::new(&file);
        loop {
            bytes.clear();
            whole += match reader.read_until(b'\n', &mut bytes).map_err(failed("read"))? {
                0 => break,
                read if bytes.last() == Some(&b'\n') => read as u64,
                _ => {
                    file.set_len(whole).map_err(failed("truncate"))?;
                    break;
                }
            };
            match AuditLine::from_json(&bytes) {
                Ok(AuditLine::Start(start)) => {
                    (log.newest, log.audited) = (Some(start.generation), start.audited);
                }
                Ok(AuditLine::Entry(entry)) => log.audited = entry.step,
                // `coordinator audit` names it.
                Err(_) => {}
            }
        }
        Ok(log)
    }

    /// Whether every line is written.
    pub(crate) fn is_written(&self) -> bool {
        self.pending.is_empty()
    }

    /// A generation starts `from` a position on the training set with this digest. Afterwards that is on the disk;
    /// told again of the same generation, nothing happens.
    pub(crate) fn start(
        &mut self,
        generation: Generation,
        from: Position,
        dataset: &str,
    ) -> Result<(), FileError> {
        if self.newest.is_some_and(|newest| newest >= generation) {
            // It may have been written and not have come to the disk.
            return self.sync();
        }
        self.write()?;
        let audited = self.audited.min(from.step);
        let line = AuditLine::Start(AuditStart { generation, from, audited, dataset: dataset.to_owned() });
        if let Some(folder) = self.path.parent() {
            durable::create_dir_all(folder)?;
        }
        append(&self.path, line.to_json().as_bytes())?;
        (self.newest, self.audited, self.unsynced) = (Some(generation), audited, true);
        self.sync()
    }

    /// Takes down committed steps, in order, without those that were told before, and returns the rest. They are not
    /// [written](Self::write) yet.
    pub(crate) fn take<'a>(&mut self, records: &'a [StepRecord]) -> &'a [StepRecord] {
        let new = &records[records.partition_point(|record| record.step <= self.audited)..];
        for record in new {
            let StepRecord { generation, step, epoch, .. } = *record;
            let entry = AuditEntry { generation, step, epoch, shards: record.shards.clone() };
            self.pending += &AuditLine::Entry(entry).to_json();
            self.audited = step;
        }
        new
    }

    /// Writes all lines, or none and leaves it at that until the next time.
    pub(crate) fn write(&mut self) -> Result<(), FileError> {
        if !self.pending.is_empty() {
            append(&self.path, self.pending.as_bytes())?;
            self.pending.clear();
            self.unsynced = true;
        }
        Ok(())
    }

    /// Sees to it that all lines are on the disk.
    pub(crate) fn sync(&mut self) -> Result<(), FileError> {
        self.write()?;
        if self.unsynced {
            let synced = File::open(&self.path).and_then(|file| file.sync_data());
            synced.map_err(FileError::on("flush", &self.path))?;
            self.unsynced = false;
        }
        Ok(())
    }
}

/// Adds all of `bytes` to a file or nothing: half a line would spoil the next one too.
pub(crate) fn append(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let append = || {
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        let length = file.metadata()?.len();
        file.write_all(bytes).inspect_err(|_| {
            // If this fails too, the reader meets a broken line, which it must expect after a power cut anyway.
            let _ = file.set_len(length);
        })
    };
    append().map_err(FileError::on("append to", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::audit::ShardSamples;

    fn records(generation: u64, steps: std::ops::RangeInclusive<u64>) -> Vec<StepRecord> {
        let record = |step| StepRecord {
            generation: Generation(generation),
            step,
            shards: vec![ShardSamples::of(&[step])],
            ..StepRecord::default()
        };
        steps.map(record).collect()
    }

    /// The steps of the file's entries, and the starts as negative positions.
    fn written(path: &Path) -> Vec<i64> {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = |line: &str| match AuditLine::from_json(line.as_bytes()).unwrap() {
            AuditLine::Start(start) => -(start.from.step as i64),
            AuditLine::Entry(entry) => entry.step as i64,
        };
        text.lines().map(line).collect()
    }

    fn start(log: &mut AuditLog, generation: u64, step: u64) {
        log.start(Generation(generation), Position::at(step), "d").unwrap();
    }

    #[test]
    fn repeated_reports_and_starts_are_written_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jobs/j1/audit.jsonl");
        let mut log = AuditLog::open(path.clone()).unwrap();
        start(&mut log, 1, 0);
        start(&mut log, 1, 0);
        assert_eq!(log.take(&records(1, 1..=3)).len(), 3);
        assert_eq!(log.take(&records(1, 2..=4)), records(1, 4..=4));
        assert_eq!(log.take(&records(1, 2..=4)), []);
        log.write().unwrap();
        assert_eq!(written(&path), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_new_generation_takes_the_steps_beyond_its_start_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let mut log = AuditLog::open(path.clone()).unwrap();
        start(&mut log, 1, 0);
        log.take(&records(1, 1..=5));
        start(&mut log, 2, 3);
        assert_eq!(log.take(&records(2, 4..=4)).len(), 1);
        // What the second one's members know to be done and was not reported.
        start(&mut log, 3, 6);
        assert_eq!(log.take(&records(2, 3..=6)).len(), 2);
        log.write().unwrap();
        assert_eq!(written(&path), [0, 1, 2, 3, 4, 5, -3, 4, -6, 5, 6]);
    }

    #[test]
    fn a_reopened_audit_goes_on_where_it_was_and_drops_half_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let mut log = AuditLog::open(path.clone()).unwrap();
        start(&mut log, 1, 0);
        log.take(&records(1, 1..=5));
        log.write().unwrap();
        let whole = std::fs::read(&path).unwrap();
        for missing in 1..60 {
            std::fs::write(&path, &whole[..whole.len() - missing]).unwrap();
            let mut log = AuditLog::open(path.clone()).unwrap();
            start(&mut log, 1, 0);
            assert_eq!(log.take(&records(1, 3..=6)), records(1, 5..=6), "{missing} bytes missing");
            log.write().unwrap();
            assert_eq!(written(&path), [0, 1, 2, 3, 4, 5, 6]);
        }
        let mut log = AuditLog::open(path.clone()).unwrap();
        start(&mut log, 2, 2);
        let mut log = AuditLog::open(path.clone()).unwrap();
        assert_eq!(log.take(&records(2, 1..=3)), records(2, 3..=3));
        start(&mut log, 2, 2);
        log.write().unwrap();
        assert_eq!(written(&path), [0, 1, 2, 3, 4, 5, 6, -2, 3]);
    }

    #[test]
    fn lines_that_cannot_be_written_are_written_later() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("missing/audit.jsonl");
        let mut log = AuditLog::open(path.clone()).unwrap();
        log.take(&records(1, 1..=2));
        assert!(log.write().unwrap_err().to_string().contains("audit.jsonl"));
        assert!(!log.is_written());
        std::fs::create_dir(folder.path().join("missing")).unwrap();
        log.take(&records(1, 3..=3));
        log.write().unwrap();
        assert!(log.is_written());
        assert_eq!(written(&path), [1, 2, 3]);
    }
}
