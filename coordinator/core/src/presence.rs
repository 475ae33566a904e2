//! Who is there: sessions that open and end, and patience that runs out.

use crate::cause::{Cause, Gone};
use crate::core::{Action, Core};
use crate::generation::{Live, Member, MemberState};
use crate::jobs::{CommandError, Job, Phase};
use crate::record::Ending;
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{Held, Register, StopMode, ToWorker};
use std::net::SocketAddr;

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
        // Of another process, perhaps: what is known of that one says nothing of this one.
        self.handle_listening(worker, session, None);
        let before = self.workers.engaged(worker);
        if let Some(present) = engagement {
            // First of all, so that it does not count as idle in between.
            self.workers.engage(worker, present);
        }
        if let Some(old) = before.filter(|old| Some(*old) != engagement) {
            self.handle_forgotten(worker, old, running.is_some(), now_ms);
        }
        self.notice_absence(worker, engagement, now_ms);
        if let Some(running) = running {
            self.handle_return(worker, (running.job, running.generation), running.step, now_ms);
        }
        if let Some(held) = held {
            match self.outcome_of(worker, held.job, held.generation) {
                Some(generation) => self.workers.set_held(worker, Some(Held { generation, ..held })),
                None => self.drop_memory(worker, held.job),
            }
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
                && is_unclear(&live.members[rank].state)
            {
                live.members[rank].state = MemberState::Forgotten { until_ms };
            }
        }
    }

    /// A worker has come back in the middle of `running`.
    fn handle_return(&mut self, worker: WorkerId, running: (JobId, Generation), step: u64, now_ms: u64) {
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
            if mode == StopMode::Abort {
                live.abort_by_ms.get_or_insert(now_ms + self.config.abort_ms);
            }
            self.send(worker, ToWorker::Stop { job, generation, mode });
        }
        self.log(job, format!("{worker} is back at step {step}"));
    }

    /// The worker's process listens at `port`, and its host would say so if it did not; `None` if it would not.
    pub fn handle_listening(&mut self, worker: WorkerId, session: u64, port: Option<SocketAddr>) {
        if self.workers.session(worker) == Some(session)
            && let Some(record) = self.workers.set_port(worker, port)
        {
            let record = record.clone();
            self.actions.push_back(Action::PersistWorker(record));
        }
    }

    /// The workers that cannot be reached and of which it is not known whether they are still at work, with where their
    /// processes listened. Whether those ports are closed is worth knowing, because nobody takes their jobs over before.
    pub fn absent(&self) -> Vec<(WorkerId, SocketAddr)> {
        let live = self.jobs.values().filter_map(Job::live).filter(|live| !live.is_fenced());
        let away = live.flat_map(|live| &live.members).filter(|member| is_unclear(&member.state));
        away.filter_map(|member| Some((member.worker, self.workers.port(member.worker)?))).collect()
    }

    /// What a job waits for of which no member can be reached, in a line for people.
    pub fn unreachable(&self, id: JobId, now_ms: u64) -> Option<String> {
        let job = self.jobs.get(&id)?;
        let live = job.live().filter(|live| !live.is_fenced())?;
        let lease_ms = job.record.orphan_timeout_ms + self.config.lease_margin_ms;
        let since = |member: &Member| match member.state {
            MemberState::Away { since_ms, .. } => Some(since_ms),
            _ => None,
        };
        let last_ms = live.members.iter().map(since).collect::<Option<Vec<_>>>()?.into_iter().max()?;
        let who =
            live.members.iter().enumerate().map(|(rank, member)| self.who(member.worker, rank).to_string());
        let left_s = (last_ms + lease_ms).saturating_sub(now_ms).div_ceil(1000);
        Some(format!(
            "{} cannot be reached and may be stepping all the same (`orphan_timeout_s`): the job goes on when one of them \
             is back, and elsewhere after {left_s} s at the latest",
            who.collect::<Vec<_>>().join(", ")
        ))
    }

    /// Nobody holds `port` any more, where `worker` listened.
    pub fn handle_port_closed(&mut self, worker: WorkerId, port: SocketAddr, now_ms: u64) {
        if self.workers.session(worker).is_some() || self.workers.port(worker) != Some(port) {
            return; // It has come back, with another process.
        }
        let of = |(id, job): (&JobId, &Job)| {
            let live = job.live()?;
            let member = &live.members[live.rank_of(worker)?];
            is_unclear(&member.state).then_some((*id, live.generation))
        };
        let engagements: Vec<_> = self.jobs.iter().filter_map(of).collect();
        for engagement in engagements {
            self.handle_member_lost(worker, engagement, Gone::ProcessEnded, now_ms);
        }
        self.schedule(now_ms);
    }

    /// A session has ended. An older one than the worker's newest does not matter. `process_ended` says that the worker's
    /// host has told that nobody holds its port any more.
    pub fn handle_disconnected(&mut self, worker: WorkerId, session: u64, process_ended: bool, now_ms: u64) {
        if !self.workers.disconnect(worker, session, now_ms) {
            return;
        }
        let Some(engagement) = self.workers.engaged(worker) else { return self.schedule(now_ms) };
        if !process_ended
            && self.is_current(worker, engagement.0, engagement.1)
            && let Some(live) = self.jobs.get_mut(&engagement.0).and_then(Job::live_mut)
            && let Some(rank) = live.rank_of(worker)
        {
            // Whatever was asked of it, it may be at work.
            let grace_ms = match live.stop {
                Some(StopMode::Abort) => self.config.rejoin_ms,
                _ => self.config.away_grace_ms,
            };
            live.members[rank].state = MemberState::Away { since_ms: now_ms, until_ms: now_ms + grace_ms };
            return self.schedule(now_ms);
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
            // Of what is to be over for good, nobody takes over what somebody unseen may still be at.
            let for_good = matches!(job.record.ending, Some(Ending::Cancel | Ending::Fail { .. }));
            let over = live.is_fenced() || for_good && live.stop == Some(StopMode::Abort);
            lost.extend(overdue(live, over, lease_ms, now_ms).map(|(worker, how)| (worker, engagement, how)));
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

/// Whether the rank cannot be reached and may be at work all the same.
fn is_unclear(state: &MemberState) -> bool {
    match state {
        MemberState::Away { .. } => true,
        MemberState::Gone(how) => !how.is_certain(),
        _ => false,
    }
}

/// The members of which nothing more is expected.
///
/// Who is away is waited for until the membership is known to be `over`; if all are away, as long as workers may step
/// without a coordinator.
fn overdue(live: &Live, over: bool, lease_ms: u64, now_ms: u64) -> impl Iterator<Item = (WorkerId, Gone)> {
    let deaf = live.abort_by_ms.is_some_and(|by| by <= now_ms);
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
