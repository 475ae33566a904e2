//! Who is there: sessions that open and end, and patience that runs out.

use crate::cause::{Cause, Gone};
use crate::core::Core;
use crate::generation::{Live, MemberState};
use crate::jobs::{CommandError, Job, Phase};
use crate::record::Ending;
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{Register, StopMode, ToWorker};

/// Presence
impl Core {
    /// A worker has opened a session; `session` grows from session to session.
    pub fn handle_connected(
        &mut self,
        worker: WorkerId,
        session: u64,
        register: Register,
        now_ms: u64,
    ) -> Result<(), CommandError> {
        if !self.workers.knows(worker) {
            return Err(CommandError::UnknownWorker(worker));
        }
        let (running, held) = (register.running, register.held);
        let engagement = running.map(|r| (r.job, r.generation));
        self.workers.connect(worker, session, register, now_ms);
        if let Some(old) = self.workers.engaged(worker).filter(|old| Some(*old) != engagement) {
            self.handle_forgotten(worker, old, running.is_some(), now_ms);
        }
        self.notice_absence(worker, engagement, now_ms);
        if let Some(running) = running {
            self.handle_return(worker, (running.job, running.generation), running.step);
        }
        if let Some(held) = held
            && self
                .jobs
                .get(&held.job)
                .is_none_or(|j| j.record.state.is_final() || j.record.started != held.generation)
        {
            self.workers.set_held(worker, None);
            self.send(worker, ToWorker::Release { job: held.job });
        }
        self.schedule(now_ms);
        Ok(())
    }

    /// A worker that was in `old` has come back without it.
    fn handle_forgotten(&mut self, worker: WorkerId, old: (JobId, Generation), elsewhere: bool, now_ms: u64) {
        if elsewhere {
            self.handle_member_lost(worker, old, Gone::Elsewhere, now_ms);
            return;
        }
        let until_ms = now_ms + self.config.report_grace_ms;
        let Some(job) = self.jobs.get_mut(&old.0) else { return self.workers.release(worker, old) };
        match &mut job.phase {
            // It has not been told yet.
            Phase::Reserved(workers) if job.record.generation == old.1 && workers.contains(&worker) => {}
            Phase::Live(live) if live.generation == old.1 => {
                let state = live.rank_of(worker).map(|rank| &mut live.members[rank].state);
                if let Some(state @ (MemberState::Present | MemberState::Away { .. })) = state {
                    // Its last report may still be on the way.
                    *state = MemberState::Forgotten { until_ms };
                }
            }
            _ => self.workers.release(worker, old),
        }
    }

    /// A worker has come back, and is in the middle of nothing but `engagement`: where it could not be reached, it is known
    /// now not to be at work any more, once its last report has had time to come.
    fn notice_absence(&mut self, worker: WorkerId, engagement: Option<(JobId, Generation)>, now_ms: u64) {
        let until_ms = now_ms + self.config.report_grace_ms;
        for (id, job) in &mut self.jobs {
            let Some(live) = job.live_mut().filter(|l| Some((*id, l.generation)) != engagement) else {
                continue;
            };
            if let Some(rank) = live.rank_of(worker)
                && match live.members[rank].state {
                    MemberState::Away { .. } => true,
                    MemberState::Gone(how) => !how.is_certain(),
                    _ => false,
                }
            {
                live.members[rank].state = MemberState::Forgotten { until_ms };
            }
        }
    }

    /// A worker has come back in the middle of `running`.
    fn handle_return(&mut self, worker: WorkerId, running: (JobId, Generation), step: u64) {
        let (job, generation) = running;
        self.workers.engage(worker, running);
        if !self.is_current(worker, job, generation) {
            self.stale_messages += 1;
            self.send(worker, ToWorker::Stop { job, generation, mode: StopMode::Abort });
            return;
        }
        let Some(known) = self.jobs.get_mut(&job) else { return };
        known.record.step = known.record.step.max(step);
        let ending = known.record.ending.clone();
        let Some(live) = known.live_mut() else { return };
        if let Some(rank) = live.rank_of(worker) {
            live.members[rank].state = MemberState::Present;
        }
        // After a restart of the coordinator, the record says what the ranks were being told.
        let mode = live.stop.or_else(|| ending.as_ref().map(Ending::stop_mode));
        if let Some(mode) = mode {
            live.stop = Some(mode);
            self.send(worker, ToWorker::Stop { job, generation, mode });
        }
        self.log(job, format!("{worker} is back at step {step}"));
    }

    /// A session has ended. An older one than the worker's newest does not matter. `process_ended` says that the worker's
    /// host has told that nobody holds its port any more.
    pub fn handle_disconnected(&mut self, worker: WorkerId, session: u64, process_ended: bool, now_ms: u64) {
        if !self.workers.disconnect(worker, session, now_ms) {
            return;
        }
        let Some(engagement) = self.workers.engaged(worker) else { return self.schedule(now_ms) };
        let until_ms = now_ms + self.config.away_grace_ms;
        if !process_ended
            && self.is_current(worker, engagement.0, engagement.1)
            && let Some(job) = self.jobs.get_mut(&engagement.0)
            && job.record.ending.is_none()
            && let Some(live) = job.live_mut()
            && let Some(rank) = live.rank_of(worker)
        {
            live.members[rank].state = MemberState::Away { since_ms: now_ms, until_ms };
            return;
        }
        let how = if process_ended { Gone::ProcessEnded } else { Gone::Unreachable };
        self.handle_member_lost(worker, engagement, how, now_ms);
        self.schedule(now_ms);
    }

    /// Time passes: who has been away or deaf for too long is lost.
    pub fn handle_tick(&mut self, now_ms: u64) {
        let (mut lost, mut waits) = (Vec::new(), Vec::new());
        for (id, job) in &mut self.jobs {
            waits.extend(job.flight.as_mut().and_then(|board| Some((*id, board.poll_log(now_ms)?))));
            let Some(live) = job.live() else { continue };
            let lease_ms = job.record.orphan_timeout_ms + self.config.lease_margin_ms;
            let engagement = (*id, live.generation);
            lost.extend(overdue(live, lease_ms, now_ms).map(|(worker, how)| (worker, engagement, how)));
        }
        for (id, line) in waits {
            self.log(id, line);
        }
        for (worker, engagement, how) in lost {
            if how == Gone::Deaf {
                let reason = "it did not stop when told to; start it again".to_owned();
                self.send(worker, ToWorker::Dismiss { reason });
                self.workers.leaving(worker);
            }
            self.handle_member_lost(worker, engagement, how, now_ms);
        }
        let running: Vec<_> =
            self.jobs.iter().filter(|(_, j)| j.live().is_some()).map(|(id, _)| *id).collect();
        for id in running {
            self.let_leavers_go(id, now_ms);
            self.admit(id, now_ms);
        }
        self.schedule(now_ms);
    }

    /// A worker does not take part any longer in what it was engaged in.
    fn handle_member_lost(
        &mut self,
        worker: WorkerId,
        engagement: (JobId, Generation),
        how: Gone,
        now_ms: u64,
    ) {
        let (id, generation) = engagement;
        let current = self.is_current(worker, id, generation);
        if how != Gone::Accused {
            // An accused worker is connected and may still be at work: it is free once it has said that it is not.
            self.workers.release(worker, engagement);
        }
        if !current {
            let reserved = self.jobs.get(&id).is_some_and(|j| match &j.phase {
                Phase::Reserved(workers) => j.record.generation == generation && workers.contains(&worker),
                _ => false,
            });
            if reserved {
                self.drop_reservation(id);
            }
            let gone = self.jobs.get_mut(&id).and_then(Job::live_mut).filter(|l| l.generation == generation);
            if how.is_certain()
                && let Some(live) = gone
                && let Some(rank) = live.rank_of(worker)
                && matches!(live.members[rank].state, MemberState::Gone(_))
            {
                // Now it is known for certain, which may be what the next membership waits for.
                live.members[rank].state = MemberState::Gone(how);
                self.settle(id, now_ms);
            }
            return;
        }
        let Some(rank) = self.jobs.get(&id).and_then(Job::live).and_then(|l| l.rank_of(worker)) else {
            return;
        };
        if let Some(live) = self.jobs.get_mut(&id).and_then(Job::live_mut) {
            live.members[rank].state = MemberState::Gone(how);
        }
        let cause = Cause::Gone { who: self.who(worker, rank), how };
        self.log(id, cause.to_string());
        self.begin_ending(id, Ending::Next { cause, mode: StopMode::Abort }, now_ms);
    }
}

/// The members of which nothing more is expected.
///
/// Who is away is waited for as long as others may be stepping with it, which shows in that none of them has ended; if all
/// are away, as long as workers may step without a coordinator.
fn overdue(live: &Live, lease_ms: u64, now_ms: u64) -> impl Iterator<Item = (WorkerId, Gone)> {
    let deaf = live.abort_by_ms.is_some_and(|by| by <= now_ms);
    let over = live.is_fenced() || live.stop == Some(StopMode::Abort);
    let all_away =
        !live.members.iter().any(|m| matches!(m.state, MemberState::Present | MemberState::Forgotten { .. }));
    live.members.iter().filter_map(move |member| {
        let how = match member.state {
            MemberState::Forgotten { until_ms } if until_ms <= now_ms => Gone::Forgot,
            MemberState::Away { until_ms, .. } if over && until_ms <= now_ms => Gone::Unreachable,
            MemberState::Away { since_ms, .. } if all_away && since_ms + lease_ms <= now_ms => {
                Gone::LeaseOver
            }
            MemberState::Present if member.accused_until_ms.is_some_and(|by| by <= now_ms) => Gone::Accused,
            MemberState::Present if deaf => Gone::Deaf,
            _ => return None,
        };
        Some((member.worker, how))
    })
}
