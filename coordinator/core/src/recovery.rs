//! The end of a membership, and what becomes of its job.

use crate::cause::Cause;
use crate::core::Core;
use crate::generation::{Live, MemberState, Verdict, verdict};
use crate::jobs::{Job, Phase};
use crate::record::{Ending, JobRecord};
use lockstep_common::ids::{JobId, WorkerId};
use lockstep_common::wire::{JobState, Outcome, StopMode, ToWorker};

impl Core {
    /// Ends the job's membership for this reason, unless it is being ended for a weightier one already, and tells the
    /// ranks so.
    pub(crate) fn begin_ending(&mut self, id: JobId, ending: Ending, now_ms: u64) {
        let abort_by_ms = now_ms + self.config.abort_ms;
        let rejoin_by_ms = now_ms + self.config.rejoin_ms;
        // One that has not been heard of since this coordinator started may only now be trying again.
        let took_over_ms = self.took_over_ms;
        let return_by_ms = took_over_ms.map_or(0, |at| at + self.config.away_grace_ms);
        let mode = ending.stop_mode();
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let failure = match &ending {
            Ending::Next { cause, .. } => cause.is_failure(),
            Ending::Fail { .. } => true,
            Ending::Cancel | Ending::Pause => false,
        };
        if let Some(board) = job.flight.as_mut().filter(|_| failure) {
            board.handle_failure(now_ms);
        }
        let record = &mut job.record;
        if record.ending.as_ref().is_none_or(|old| ending.outweighs(old)) {
            match &ending {
                Ending::Next { cause, .. } if cause.is_failure() => {
                    record.reason = format!("recovers: {cause}")
                }
                Ending::Next { cause, .. } => record.reason = cause.to_string(),
                Ending::Fail { error } => record.reason.clone_from(error),
                Ending::Cancel => record.reason = "is being cancelled".to_owned(),
                Ending::Pause => record.reason = "writes a checkpoint and stops".to_owned(),
            }
            if !matches!(ending, Ending::Next { .. }) {
                record.state = JobState::Stopping;
            }
            record.ending = Some(ending);
        }
        let Some(live) = job.live_mut() else { return };
        let generation = live.generation;
        let news = match live.stop {
            Some(told) if strength(told) >= strength(mode) => None,
            _ => Some(mode),
        };
        let told: Vec<_> = if news.is_some() { live.present().collect() } else { Vec::new() };
        live.stop = news.or(live.stop);
        if mode == StopMode::Abort {
            live.abort_by_ms.get_or_insert(abort_by_ms);
            for member in &mut live.members {
                if let MemberState::Away { since_ms, until_ms } = &mut member.state {
                    let unseen = took_over_ms == Some(*since_ms);
                    let by_ms = if unseen { rejoin_by_ms.max(return_by_ms) } else { rejoin_by_ms };
                    *until_ms = (*until_ms).min(by_ms);
                }
            }
        }
        self.persist(id);
        for worker in told {
            self.send(worker, ToWorker::Stop { job: id, generation, mode });
        }
        self.settle(id, now_ms);
    }

    /// Decides what becomes of the job, if its membership is over.
    pub(crate) fn settle(&mut self, id: JobId, now_ms: u64) {
        let (max_fruitless, fruitless_ms) = (self.config.max_fruitless, self.config.fruitless_ms);
        let Some(job) = self.jobs.get(&id) else { return };
        let host = |worker| self.workers.host(worker).to_owned();
        let Some(verdict) = job.live().and_then(|live| verdict(&job.record, live, host)) else { return };
        self.bench(id, now_ms);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.phase = Phase::Idle;
        job.pace_s = None;
        job.leave_at_ms = None;
        if matches!(verdict, Verdict::Finished | Verdict::Cancelled | Verdict::Paused) {
            (job.flight, job.failed_flight) = (None, None);
        }
        let record = &mut job.record;
        record.members.clear();
        record.placement = None;
        record.ending = None;
        let is_stored = record.checkpoint >= Some(record.step);
        let (state, reason) = match verdict {
            Verdict::Finished => (JobState::Finished, "its last step is done".to_owned()),
            Verdict::Failed { error } => (JobState::Failed, error),
            Verdict::Cancelled => (JobState::Cancelled, "cancelled by an operator".to_owned()),
            Verdict::Paused => (JobState::Paused, paused(record)),
            Verdict::Again { cause } => {
                let reason = cause.to_string();
                if cause.is_failure() {
                    count_failure(job, &reason, now_ms);
                }
                let JobRecord { fruitless, fruitless_since_ms, first_error, .. } = &job.record;
                let for_ms = now_ms.saturating_sub(*fruitless_since_ms);
                if *fruitless >= max_fruitless && for_ms >= fruitless_ms {
                    let error = format!(
                        "{fruitless} attempts in a row came no further, in {} s; first error: {first_error}",
                        for_ms / 1000
                    );
                    (JobState::Failed, error)
                } else {
                    (JobState::Queued, reason)
                }
            }
        };
        let generation = job.record.generation;
        let line = match state {
            JobState::Queued => format!("{generation} is over: {reason}"),
            _ => format!("{generation} is over: {state}: {reason}"),
        };
        job.record.state = state;
        job.record.reason = reason;
        self.log(id, line);
        self.persist(id);
        let spoilt = self.jobs.get(&id).is_some_and(|job| job.spoilt == Some(job.record.generation));
        if state.is_final() || state == JobState::Paused && is_stored || spoilt {
            self.let_go(id);
        }
        self.schedule(now_ms);
    }

    /// Leaves the worker out for a while that was cut off from its peers in the membership that is over, if one was.
    fn bench(&mut self, id: JobId, now_ms: u64) {
        let config = self.config;
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Phase::Live(live) = &job.phase else { return };
        if live.steps_since_ms.is_some_and(|since_ms| now_ms >= since_ms + config.bench_forget_ms) {
            live.members.iter().for_each(|member| job.bench.absolve(member.worker));
        }
        let Some(rank) = cut_off(live) else { return };
        let worker = live.members[rank].worker;
        let seconds = job.bench.seat(worker, &config, now_ms).div_ceil(1000);
        let who = self.who(worker, rank);
        self.log(id, format!("{who} is left out for {seconds} s: the others and it cannot reach each other"));
    }

    /// Nobody need keep or follow the job's state any longer.
    pub(crate) fn let_go(&mut self, id: JobId) {
        let followers = self.workers.followers(id).into_iter().map(|(worker, _)| worker);
        for worker in self.workers.holders(id).into_iter().chain(followers) {
            self.drop_memory(worker, id);
        }
    }
}

/// A rank that is told to stop in a stronger way obeys; a weaker one changes nothing.
fn strength(mode: StopMode) -> u8 {
    match mode {
        StopMode::Boundary => 0,
        StopMode::Checkpoint => 1,
        StopMode::Abort => 2,
    }
}

/// The rank that the others cannot reach, though it lives and the coordinator can reach it: the one that most accuse,
/// if it accuses others itself. It is left out for a while, since no membership with it could step.
fn cut_off(live: &Live) -> Option<usize> {
    let accuses_others = |(rank, state): (usize, &MemberState)| match state {
        MemberState::Ended(Outcome::Lost { culprit: Some(culprit), .. }) => culprit.index() != rank,
        _ => false,
    };
    let ranks = live.members.iter().enumerate();
    let suspects = ranks.filter(|(rank, m)| m.accusers > 0 && accuses_others((*rank, &m.state)));
    suspects.max_by_key(|(rank, m)| (m.accusers, *rank)).map(|(rank, _)| rank)
}

/// How a paused job is: what its newest checkpoint lacks is kept by its workers, as long as they have nothing else to do.
fn paused(record: &JobRecord) -> String {
    match record.checkpoint {
        Some(checkpoint) if checkpoint >= record.step => "paused by an operator".to_owned(),
        newest => {
            let newest =
                newest.map_or("no checkpoint".to_owned(), |step| format!("a checkpoint of step {step}"));
            format!(
                "paused by an operator after step {}, with {newest}: a rank was lost, or the checkpoint could not be stored; \
                 the rest is in the memory of its workers",
                record.step
            )
        }
    }
}

fn count_failure(job: &mut Job, reason: &str, now_ms: u64) {
    let record = &mut job.record;
    if record.step > record.failed_at {
        record.fruitless = 0;
    }
    // It may have gone back to a checkpoint meanwhile, and get on from there.
    record.failed_at = record.step;
    if record.fruitless == 0 {
        record.first_error = reason.to_owned();
        record.fruitless_since_ms = now_ms;
    }
    record.fruitless += 1;
}

/// Members that are let go
impl Core {
    /// The members that are being shut down leave at the next boundary, if it is time for that.
    pub(crate) fn let_leavers_go(&mut self, id: JobId, now_ms: u64) {
        let Some(job) = self.jobs.get_mut(&id).filter(|j| j.leave_at_ms.is_some_and(|at| at <= now_ms))
        else {
            return;
        };
        job.leave_at_ms = None;
        let Some(live) = job.live() else { return };
        let is_leaving = |worker: &WorkerId| self.workers.is_leaving(*worker);
        let stay = live.present().filter(|w| !is_leaving(w)).count();
        let Some((rank, leaver)) = live
            .members
            .iter()
            .enumerate()
            .find(|(_, m)| m.state == MemberState::Present && is_leaving(&m.worker))
            .map(|(rank, m)| (rank, m.worker))
        else {
            return;
        };
        // Too few to go on with might have to leave too before others come: then the state must be on disk.
        let enough = job.record.state_in_memory && stay >= job.record.min_workers.max(1) as usize;
        let mode = if enough { StopMode::Boundary } else { StopMode::Checkpoint };
        let cause = Cause::Leaves { who: self.who(leaver, rank) };
        self.begin_ending(id, Ending::Next { cause, mode }, now_ms);
    }
}
