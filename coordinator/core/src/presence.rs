//! Who is there: sessions that open and end, and patience that runs out.

use crate::core::Core;
use crate::generation::MemberState;
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
        let running = register.running;
        let engagement = running.map(|r| (r.job, r.generation));
        self.workers.connect(worker, session, register, now_ms);
        if let Some(old) = self.workers.engaged(worker).filter(|old| Some(*old) != engagement) {
            self.handle_forgotten(worker, old, running.is_some(), now_ms);
        }
        if let Some(running) = running {
            self.handle_return(worker, (running.job, running.generation), running.step);
        }
        self.schedule();
        Ok(())
    }

    /// A worker that was in `old` has come back without it.
    fn handle_forgotten(&mut self, worker: WorkerId, old: (JobId, Generation), elsewhere: bool, now_ms: u64) {
        if elsewhere {
            self.handle_member_lost(worker, old, "came back with other work", false, now_ms);
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
                    let restart = matches!(state, MemberState::Away { restart: true, .. });
                    *state = MemberState::Away { until_ms, restart };
                }
            }
            _ => self.workers.release(worker, old),
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

    /// A session has ended. An older one than the worker's newest does not matter.
    pub fn handle_disconnected(&mut self, worker: WorkerId, session: u64, now_ms: u64) {
        if !self.workers.disconnect(worker, session, now_ms) {
            return;
        }
        let Some(engagement) = self.workers.engaged(worker) else { return };
        let until_ms = now_ms + self.config.away_grace_ms;
        if self.is_current(worker, engagement.0, engagement.1)
            && let Some(job) = self.jobs.get_mut(&engagement.0)
            && job.record.ending.is_none()
            && let Some(live) = job.live_mut()
            && let Some(rank) = live.rank_of(worker)
        {
            live.members[rank].state = MemberState::Away { until_ms, restart: false };
            return;
        }
        self.handle_member_lost(worker, engagement, "lost its connection", false, now_ms);
        self.schedule();
    }

    /// Time passes: who has been away or deaf for too long is lost.
    pub fn handle_tick(&mut self, now_ms: u64) {
        let (mut lost, mut dismissed, mut waits) = (Vec::new(), Vec::new(), Vec::new());
        for (id, job) in &mut self.jobs {
            waits.extend(job.flight.as_mut().and_then(|board| Some((*id, board.poll_log(now_ms)?))));
            let Some(live) = job.live() else { continue };
            let engagement = (*id, live.generation);
            let deaf = live.abort_by_ms.is_some_and(|by| by <= now_ms);
            for member in &live.members {
                match member.state {
                    MemberState::Away { until_ms, restart } if until_ms <= now_ms => {
                        lost.push((member.worker, engagement, "did not come back", restart));
                    }
                    MemberState::Present if deaf => {
                        lost.push((member.worker, engagement, "did not stop", false));
                        dismissed.push(member.worker);
                    }
                    _ => {}
                }
            }
        }
        for (id, line) in waits {
            self.log(id, line);
        }
        for worker in dismissed {
            let reason = "it did not stop when told to; start it again".to_owned();
            self.send(worker, ToWorker::Dismiss { reason });
            self.workers.leaving(worker);
        }
        for (worker, engagement, what, restart) in lost {
            self.handle_member_lost(worker, engagement, what, restart, now_ms);
        }
        self.schedule();
    }

    /// A worker does not take part any longer in what it was engaged in.
    fn handle_member_lost(
        &mut self,
        worker: WorkerId,
        engagement: (JobId, Generation),
        what: &str,
        planned: bool,
        now_ms: u64,
    ) {
        let (id, generation) = engagement;
        let current = self.is_current(worker, id, generation);
        self.workers.release(worker, engagement);
        if !current {
            let reserved = self.jobs.get(&id).is_some_and(|j| match &j.phase {
                Phase::Reserved(workers) => j.record.generation == generation && workers.contains(&worker),
                _ => false,
            });
            if reserved {
                self.drop_reservation(id);
            }
            return;
        }
        let host = self.workers.host(worker).to_owned();
        let Some(live) = self.jobs.get_mut(&id).and_then(Job::live_mut) else { return };
        let Some(rank) = live.rank_of(worker) else { return };
        live.members[rank].state = MemberState::Gone;
        let reason = format!("rank {rank} ({worker} on {host}) {what}");
        self.log(id, reason.clone());
        self.begin_ending(id, Ending::Recover { reason, planned }, StopMode::Abort, now_ms);
    }
}
