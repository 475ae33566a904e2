//! Workers that come while a job runs: they get the job's state in the background and join at a step's boundary.

use crate::cause::Cause;
use crate::core::Core;
use crate::jobs::Job;
use crate::record::Ending;
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{Following, JobState, Peer, Position, StopMode, ToWorker};

impl Core {
    /// Has idle workers get ready to join jobs that run and can use them. Nobody may wait for workers.
    pub(crate) fn invite(&mut self, now_ms: u64) {
        let open: Vec<_> = self.jobs.iter().filter(|(_, job)| is_open(job)).map(|(id, _)| *id).collect();
        for id in open {
            let Some(job) = self.jobs.get(&id) else { continue };
            // After a restart the members come back first: nobody is there to follow before.
            let Some(live) = job.live().filter(|live| live.present().next().is_some()) else { continue };
            let members = live.members.len();
            let (_, max) = job.range(true);
            let coming = self.workers.followers(id).len();
            let room = (max as usize).saturating_sub(members + coming);
            let barred = job.bench.barred(now_ms);
            let newcomers: Vec<_> =
                self.workers.idle().into_iter().filter(|w| !barred.contains(w)).take(room).collect();
            if newcomers.is_empty() {
                continue;
            }
            if job.record.state_in_memory {
                newcomers.into_iter().for_each(|worker| self.follow(worker, id));
            } else if job.record.step > 0 {
                // They start from a checkpoint with everybody else.
                let cause = Cause::Joins { workers: newcomers };
                self.begin_ending(id, Ending::Next { cause, mode: StopMode::Checkpoint }, now_ms);
            }
        }
    }

    /// Has `worker` get ready to join the job's present membership.
    pub(crate) fn follow(&mut self, worker: WorkerId, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        let record = &job.record;
        let following = Following {
            job: id,
            generation: record.generation,
            file: record.file.clone(),
            toml: record.toml.clone(),
            datasets: record.datasets.clone(),
            sources: self.reachable(worker, &record.members),
        };
        self.workers.follow(worker, id, record.generation);
        self.send(worker, ToWorker::Follow(Box::new(following)));
    }

    /// Those of `members` of which it is known where `from` reaches them.
    fn reachable(&self, from: WorkerId, members: &[WorkerId]) -> Vec<Peer> {
        let known = |peer: &Peer| self.workers.register(peer.worker).is_some();
        self.peers_of(from, members).into_iter().filter(known).collect()
    }

    /// A worker is ready to join.
    pub(crate) fn handle_following(
        &mut self,
        worker: WorkerId,
        of: (JobId, Generation),
        position: Position,
        now_ms: u64,
    ) {
        if self.workers.ready(worker, of, position, now_ms) {
            self.log(of.0, format!("{worker} is ready to join, at {position}"));
            self.admit(of.0, now_ms);
        }
    }

    /// Ends the membership at the next boundary if workers are ready to join and no others are about to be.
    pub(crate) fn admit(&mut self, id: JobId, now_ms: u64) {
        if !self.jobs.get(&id).is_some_and(is_open) {
            return;
        }
        let followers = self.workers.followers(id);
        let ready: Vec<_> = followers.iter().filter_map(|(w, f)| Some((*w, f.ready?.0))).collect();
        let Some(first) = ready.iter().map(|(_, since)| *since).min() else { return };
        if ready.len() == followers.len() || first + self.config.gather_ms <= now_ms {
            let cause = Cause::Joins { workers: ready.into_iter().map(|(worker, _)| worker).collect() };
            self.begin_ending(id, Ending::Next { cause, mode: StopMode::Boundary }, now_ms);
        }
    }
}

/// Whether the job runs and nobody ends its membership.
fn is_open(job: &Job) -> bool {
    job.record.state == JobState::Running
        && job.record.ending.is_none()
        && job.live().is_some_and(|live| live.stop.is_none())
}
