//! The audits of all jobs that run.

use crate::audit_log::AuditLog;
use crate::data_dir::DataDir;
use lockstep_common::durable::FileError;
use lockstep_common::ids::JobId;
use lockstep_common::job::JobSpec;
use lockstep_common::wire::{Assignment, Position, Resumption, StepRecord};
use std::collections::HashMap;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// How long a line may be written and not on the disk. A flush takes milliseconds, and the hub has other things to do.
const SYNC_EVERY: Duration = Duration::from_secs(1);

/// Those audits, and the reports that are acknowledged once they are written.
pub(super) struct Audits {
    dir: DataDir,
    logs: HashMap<JobId, AuditLog>,
    /// Where to say that one more report was taken care of.
    unheard: Vec<UnboundedSender<u64>>,
    synced: Instant,
}

impl Audits {
    /// The audits of `running` jobs of an earlier coordinator, and of all that are started later.
    pub(super) fn open(dir: DataDir, running: impl IntoIterator<Item = JobId>) -> Result<Self, FileError> {
        let open = |job| Ok((job, AuditLog::open(dir.job(job).audit())?));
        let logs = running.into_iter().map(open).collect::<Result<_, FileError>>()?;
        Ok(Self { dir, logs, unheard: Vec::new(), synced: Instant::now() })
    }

    /// Notes that a generation starts, before anybody is told to start it.
    pub(super) fn start(&mut self, assignment: &Assignment) -> Result<(), FileError> {
        let from = match &assignment.resume {
            Resumption::Fresh => Position::default(),
            Resumption::Checkpoint { step } => Position::at(*step),
            Resumption::Peers { position, .. } => *position,
        };
        // The job file was checked when it was submitted.
        let train = JobSpec::parse(&assignment.file, &assignment.toml).map(|job| job.data.train);
        let dataset = assignment.datasets.iter().find(|d| train.as_ref().is_ok_and(|name| d.name == *name));
        let digest = dataset.map_or("", |dataset| &dataset.digest);
        self.log(assignment.job)?.start(assignment.generation, from, digest)
    }

    /// Takes down a job's committed steps and returns those that are new.
    pub(super) fn take<'a>(
        &mut self,
        job: JobId,
        records: &'a [StepRecord],
    ) -> Result<&'a [StepRecord], FileError> {
        Ok(self.log(job)?.take(records))
    }

    /// Says to `heard` that one more report was taken care of, now or once everything is written.
    pub(super) fn acknowledge(&mut self, heard: UnboundedSender<u64>) {
        self.unheard.push(heard);
    }

    /// Writes what is to be written. After a failure it is tried again the next time.
    pub(super) fn write(&mut self) -> Result<(), FileError> {
        // One that fails keeps no other from being written.
        let written: Vec<_> = self.logs.values_mut().map(AuditLog::write).collect();
        written.into_iter().collect::<Result<(), _>>()?;
        for heard in self.unheard.drain(..) {
            // Its session may have ended; the next one repeats the report.
            let _ = heard.send(1);
        }
        Ok(())
    }

    /// Brings what is written to the disk, if it is time.
    pub(super) fn sync_in_time(&mut self) -> Result<(), FileError> {
        if self.synced.elapsed() < SYNC_EVERY {
            return Ok(());
        }
        self.synced = Instant::now();
        self.logs.values_mut().try_for_each(AuditLog::sync)
    }

    /// Brings a job's audit to the disk.
    pub(super) fn sync(&mut self, job: JobId) -> Result<(), FileError> {
        self.log(job)?.sync()
    }

    /// Whether everything is written.
    pub(super) fn is_written(&self) -> bool {
        self.unheard.is_empty() && self.logs.values().all(AuditLog::is_written)
    }

    fn log(&mut self, job: JobId) -> Result<&mut AuditLog, FileError> {
        match self.logs.entry(job) {
            std::collections::hash_map::Entry::Occupied(log) => Ok(log.into_mut()),
            std::collections::hash_map::Entry::Vacant(place) => {
                Ok(place.insert(AuditLog::open(self.dir.job(job).audit())?))
            }
        }
    }
}
