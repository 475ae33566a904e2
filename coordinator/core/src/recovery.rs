//! From the end of one membership to the start of the next.

use crate::core::{Action, Core};
use crate::decide::{Decision, Waiting, decide};
use crate::generation::{MemberState, Verdict, verdict};
use crate::jobs::{Job, Phase};
use crate::record::Ending;
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{JobState, StopMode, ToWorker};

impl Core {
    /// Ends the job's membership for this reason, unless it is being ended for a weightier one already, and tells the
    /// ranks so.
    pub(crate) fn begin_ending(&mut self, id: JobId, ending: Ending, mode: StopMode, now_ms: u64) {
        let abort_by_ms = now_ms + self.config.abort_ms;
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if let (Ending::Recover { planned: false, .. } | Ending::Fail { .. }, Some(board)) =
            (&ending, &mut job.flight)
        {
            board.handle_failure(now_ms);
        }
        let record = &mut job.record;
        if record.ending.as_ref().is_none_or(|old| ending.outweighs(old)) {
            match &ending {
                Ending::Recover { reason, .. } => record.reason = format!("recovers: {reason}"),
                Ending::Fail { error } => record.reason.clone_from(error),
                Ending::Cancel => record.reason = "is being cancelled".to_owned(),
                Ending::Pause => record.reason = "writes a checkpoint and stops".to_owned(),
            }
            if !matches!(ending, Ending::Recover { .. }) {
                record.state = JobState::Stopping;
            }
            record.ending = Some(ending);
        }
        let Some(live) = job.live_mut() else { return };
        let generation = live.generation;
        let news = match (live.stop, mode) {
            (None, _) | (Some(StopMode::Checkpoint), StopMode::Abort) => Some(mode),
            _ => None,
        };
        let told: Vec<_> = if news.is_some() { live.present().collect() } else { Vec::new() };
        live.stop = news.or(live.stop);
        let mut given_up = Vec::new();
        if mode == StopMode::Abort {
            live.abort_by_ms.get_or_insert(abort_by_ms);
            // Nothing is lost by not waiting for those that are away: if they come back, they are told to stop.
            for member in live.members.iter_mut().filter(|m| matches!(m.state, MemberState::Away { .. })) {
                member.state = MemberState::Gone;
                given_up.push(member.worker);
            }
        }
        for worker in given_up {
            self.workers.release(worker, (id, generation));
        }
        self.persist(id);
        for worker in told {
            self.send(worker, ToWorker::Stop { job: id, generation, mode });
        }
        self.settle(id);
    }

    /// Decides what becomes of the job, if its membership is over.
    pub(crate) fn settle(&mut self, id: JobId) {
        let max_fruitless = self.config.max_fruitless;
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(verdict) = job.live().and_then(|live| verdict(&job.record, &live.members)) else { return };
        job.phase = Phase::Idle;
        job.pace_s = None;
        if matches!(verdict, Verdict::Finished | Verdict::Cancelled | Verdict::Paused) {
            (job.flight, job.failed_flight) = (None, None);
        }
        let record = &mut job.record;
        record.members.clear();
        record.ending = None;
        let (state, reason) = match verdict {
            Verdict::Finished => (JobState::Finished, "its last step is done".to_owned()),
            Verdict::Failed { error } => (JobState::Failed, error),
            Verdict::Cancelled => (JobState::Cancelled, "cancelled by an operator".to_owned()),
            Verdict::Paused => (JobState::Paused, "paused by an operator".to_owned()),
            Verdict::Again { reason, planned } => {
                if !planned {
                    count_failure(job, &reason);
                }
                if job.record.fruitless >= max_fruitless {
                    let first = &job.record.first_error;
                    (
                        JobState::Failed,
                        format!("{max_fruitless} attempts in a row came no further; first error: {first}"),
                    )
                } else {
                    (JobState::Queued, reason)
                }
            }
        };
        let line = format!("{} is over: {state}: {reason}", job.record.generation);
        job.record.state = state;
        job.record.reason = reason;
        self.log(id, line);
        self.persist(id);
        self.schedule();
    }

    /// Gives the job's chosen workers back, if it has chosen some and has not started.
    pub(crate) fn drop_reservation(&mut self, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if let Phase::Reserved(workers) = &job.phase {
            let engagement = (id, job.record.generation);
            for &worker in workers {
                self.workers.release(worker, engagement);
            }
            job.phase = Phase::Idle;
        }
    }

    /// Starts what can start.
    pub(crate) fn schedule(&mut self) {
        let queue: Vec<_> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.waits())
            .map(|(&id, job)| {
                let (min, max) = job.range();
                Waiting { job: id, min, max }
            })
            .collect();
        for (id, decision) in decide(&queue, &self.workers.idle()) {
            match decision {
                Decision::Start(workers) => self.reserve(id, workers),
                Decision::Wait(reason) => {
                    let Some(job) = self.jobs.get_mut(&id) else { continue };
                    let record = &mut job.record;
                    record.reason = match record.fruitless {
                        0 => reason.to_string(),
                        _ => format!("{reason}; it was stopped by: {}", record.first_error),
                    };
                }
            }
        }
    }

    fn reserve(&mut self, id: JobId, workers: Vec<WorkerId>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let generation = Generation(job.record.generation.0 + 1);
        job.record.generation = generation;
        job.record.reason = format!("starts on {} workers", workers.len());
        let workers = self.workers.by_host(workers);
        for &worker in &workers {
            self.workers.engage(worker, (id, generation));
        }
        job.phase = Phase::Reserved(workers);
        self.actions.push_back(Action::FindCheckpoint { job: id, generation });
    }
}

fn count_failure(job: &mut Job, reason: &str) {
    let record = &mut job.record;
    if record.step > record.furthest {
        record.furthest = record.step;
        record.fruitless = 0;
    }
    if record.fruitless == 0 {
        record.first_error = reason.to_owned();
    }
    record.fruitless += 1;
}
