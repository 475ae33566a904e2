//! Jobs and workers as lists show them.

use super::hub::Hub;
use crate::data_dir::DataDir;
use crate::jobs_dir::cut;
use lockstep_common::wire::{CheckpointFailure, JobSummary, WorkerSummary};
use lockstep_core::JobRecord;

/// As much of an error as anybody reads; the job's log has it too.
const MAX_REASON_BYTES: usize = 4 << 10;

impl Hub {
    /// A job as lists show it.
    pub(crate) fn job_summary(&self, dir: &DataDir, job: &JobRecord) -> JobSummary {
        let folder =
            |step| dir.job(job.id).checkpoints().join(format!("step-{step:012}")).display().to_string();
        let unwritable = self.unwritable().filter(|_| !job.state.is_final());
        let reason = unwritable.or_else(|| self.core.unreachable(job.id, self.now_ms()));
        JobSummary {
            id: job.id,
            name: job.name.clone(),
            state: job.state,
            reason: cut(reason.as_ref().unwrap_or(&job.reason), MAX_REASON_BYTES).into_owned(),
            generation: job.generation,
            step: job.step,
            total_steps: job.total_steps,
            epoch: job.epoch,
            workers: job.members.clone(),
            metrics: job.metrics.clone(),
            weights_digest: job.weights_digest.clone(),
            checkpoint: job.checkpoint.map(folder),
            age_s: self.now_ms().saturating_sub(job.submitted_ms) / 1000,
            eta_s: self.core.eta_s(job.id).map(|s| s.ceil() as u64),
            flight: None,
            stragglers: self.core.stragglers(job.id),
            checkpoint_failure: self.unstored.row(job.id).map(|row| CheckpointFailure {
                step: row.step,
                error: cut(&row.error, MAX_REASON_BYTES).into_owned(),
                checkpoints: row.checkpoints,
                first_step: row.first_step,
                stored: job.checkpoint,
            }),
        }
    }

    /// A job as `status` shows it: with what its ranks wait for.
    pub(crate) fn job_status(&self, dir: &DataDir, job: &JobRecord) -> JobSummary {
        JobSummary { flight: self.core.flight(job.id, self.now_ms()), ..self.job_summary(dir, job) }
    }

    /// All jobs.
    pub(crate) fn job_summaries(&self, dir: &DataDir) -> Vec<JobSummary> {
        self.core.jobs().map(|j| self.job_summary(dir, j)).collect()
    }

    /// All workers.
    pub(crate) fn worker_summaries(&self) -> Vec<WorkerSummary> {
        let now_ms = self.now_ms();
        self.core
            .workers()
            .map(|w| WorkerSummary {
                id: w.record.id,
                host: w.register.map_or_else(|| w.record.host.clone(), |r| r.host.clone()),
                device: w.register.map(|r| r.device.clone()).unwrap_or_default(),
                state: w.activity.as_str().to_owned(),
                job: w.engaged.map(|(job, _)| job),
                addresses: w.register.map(|r| r.offered()).unwrap_or_default(),
                metrics: w.register.and_then(|r| r.metrics),
                watched: w.record.port,
                silent_s: now_ms.saturating_sub(w.heard_ms) / 1000,
            })
            .collect()
    }
}
