//! The start of a membership: who takes part, and from where.

use crate::addresses::{pairing, routes};
use crate::cause::StartReason;
use crate::core::{Action, Core};
use crate::decide::{Decision, WaitReason, Waiting, decide};
use crate::generation::{Live, MemberState};
use crate::jobs::Phase;
use crate::stragglers::placement;
use lockstep_common::ids::{Generation, JobId, Rank, WorkerId};
use lockstep_common::wire::{Assignment, JobState, Peer, Position, Resumption, ToWorker};

/// What a job's workers do before their first step.
pub(crate) const CONNECTING: &str = "its workers load data and connect";

impl Core {
    /// Starts what can start, and lets workers that nobody waits for get ready to join what runs.
    pub(crate) fn schedule(&mut self, now_ms: u64) {
        let mut decisions = self.decisions(now_ms);
        let is_short = |d: &Decision| matches!(d, Decision::Wait(WaitReason::Workers { .. }));
        if decisions.iter().any(|(_, d)| is_short(d)) {
            let followers = self.workers.all_followers();
            for &worker in &followers {
                if let Some(job) = self.workers.unfollow(worker) {
                    self.drop_memory(worker, job);
                }
            }
            if !followers.is_empty() {
                decisions = self.decisions(now_ms);
            }
        }
        let none_waits = decisions.iter().all(|(_, d)| matches!(d, Decision::Start(_)));
        for (id, decision) in decisions {
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
        if none_waits {
            self.invite(now_ms);
        }
    }

    fn decisions(&self, now_ms: u64) -> Vec<(JobId, Decision)> {
        let idle = self.workers.idle();
        let mut queue: Vec<_> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.waits())
            .map(|(&id, job)| {
                let keeps = |w: &WorkerId| {
                    let kept = self.workers.kept(*w, id, job.record.started);
                    kept.is_some_and(|at| job.record.checkpoint.is_none_or(|step| step <= at.step))
                };
                let without = |barred: Vec<WorkerId>| {
                    let mut kept: Vec<_> =
                        idle.iter().copied().filter(|w| keeps(w) && !barred.contains(w)).collect();
                    if !kept.is_empty() {
                        let ready = self.workers.followers(id).into_iter().filter(|(_, f)| f.ready.is_some());
                        kept.extend(ready.map(|(worker, _)| worker));
                    }
                    let (min, max) = job.range(!kept.is_empty());
                    Waiting { job: id, min, max, kept, barred }
                };
                let waiting = without(job.bench.barred(now_ms));
                let usable = idle.iter().filter(|w| !waiting.barred.contains(w)).count();
                match usable < waiting.min as usize {
                    true => without(job.bench.barred_in_need(now_ms)),
                    false => waiting,
                }
            })
            .collect();
        // Jobs in the middle of their work go on with their workers before anybody else gets them.
        queue.sort_by_key(|waiting| waiting.kept.is_empty());
        decide(&queue, &idle)
    }

    fn reserve(&mut self, id: JobId, workers: Vec<WorkerId>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let generation = Generation(job.record.generation.0 + 1);
        job.record.generation = generation;
        job.record.reason = format!("starts on {} workers", workers.len());
        let kept = workers.iter().filter_map(|w| self.workers.kept(*w, id, job.record.started)).max();
        let checkpoint = job.record.checkpoint;
        let workers = self.workers.by_host(workers);
        for &worker in &workers {
            self.workers.engage(worker, (id, generation));
        }
        job.phase = Phase::Reserved(workers);
        match kept {
            Some(position) if checkpoint.is_none_or(|step| step <= position.step) => {
                self.start(id, generation, StartReason::Kept(position));
            }
            _ => self.actions.push_back(Action::FindCheckpoint { job: id, generation }),
        }
    }

    /// The answer to [`Action::FindCheckpoint`]: the step of the newest good checkpoint, or why none can be looked for.
    pub fn handle_checkpoint_found(
        &mut self,
        id: JobId,
        generation: Generation,
        found: Result<Option<u64>, String>,
        now_ms: u64,
    ) {
        let Some(job) = self.jobs.get_mut(&id).filter(|j| j.record.generation == generation) else { return };
        let Phase::Reserved(workers) = &job.phase else { return };
        let record = &mut job.record;
        let kept = workers.iter().filter_map(|w| self.workers.kept(*w, id, record.started)).max();
        let found_step = found.clone().ok().flatten();
        let reason = match (kept, found) {
            (_, Err(error)) => {
                record.state = JobState::Failed;
                record.reason.clone_from(&error);
                self.log(id, format!("failed: {error}"));
                self.drop_reservation(id);
                self.persist(id);
                self.let_go(id);
                self.schedule(now_ms);
                return;
            }
            (Some(kept), Ok(Some(checkpoint))) if checkpoint > kept.step => {
                StartReason::CheckpointFurther { checkpoint, kept }
            }
            (Some(kept), Ok(_)) => StartReason::Kept(kept),
            (None, Ok(Some(step))) => StartReason::CheckpointOnly(step),
            (None, Ok(None)) if record.started == Generation(0) => StartReason::FirstStart,
            (None, Ok(None)) => StartReason::NothingLeft,
        };
        record.checkpoint = found_step;
        self.start(id, generation, reason);
    }

    /// Sends the reserved workers to work.
    fn start(&mut self, id: JobId, generation: Generation, reason: StartReason) {
        let Some(job) = self.jobs.get(&id) else { return };
        let Phase::Reserved(workers) = &job.phase else { return };
        let workers = workers.clone();
        let started = job.record.started;
        let (resume, step) = match reason {
            StartReason::FirstStart | StartReason::NothingLeft => (Resumption::Fresh, 0),
            StartReason::CheckpointOnly(step) | StartReason::CheckpointFurther { checkpoint: step, .. } => {
                (Resumption::Checkpoint { step }, step)
            }
            StartReason::Kept(position) => {
                (self.resumption_from_peers(id, started, &workers, position), position.step)
            }
        };
        let names: Vec<_> = workers.iter().map(|w| format!("{w} on {}", self.workers.host(*w))).collect();
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let record = &mut job.record;
        record.state = JobState::Running;
        record.reason = match record.fruitless {
            0 => CONNECTING.to_owned(),
            times => format!(
                "{CONNECTING}, after {times} attempts in a row that came no further; the first error: {}",
                record.first_error
            ),
        };
        record.members.clone_from(&workers);
        match resume {
            Resumption::Peers { .. } => {
                if !std::mem::take(&mut record.undelivered) {
                    record.resumed_from.clear();
                }
                record.resumed_from.push(started);
            }
            Resumption::Fresh | Resumption::Checkpoint { .. } => {
                (record.undelivered, record.resumed_from) = (false, Vec::new());
            }
        }
        record.started = generation;
        record.step = step;
        record.weights_digest = None;
        let placement = placement(record.logical_shards, &workers, job.wanted.take().as_deref());
        record.placement = Some(placement.clone());
        job.phase = Phase::Live(Live::new(generation, &workers, placement, &MemberState::Present));
        let hosts = workers.iter().map(|w| (*w, self.workers.host(*w).to_owned()));
        job.begin_flight(generation, hosts.collect());
        self.log(id, format!("{generation} starts from {reason} on {}", names.join(", ")));
        if workers.len() > 1 {
            let named = names.into_iter().zip(workers.iter().map(|w| self.workers.register(*w)));
            pairing(&named.collect::<Vec<_>>()).into_iter().for_each(|line| self.log(id, line));
        }
        self.persist(id);
        for assignment in self.assignments(id, generation, &workers, &resume) {
            let worker = workers[assignment.rank.index()];
            self.send(worker, ToWorker::Start(Box::new(assignment)));
        }
        // From now on the members speak for the state; what others keep of it is of the past.
        for worker in self.workers.holders(id) {
            self.workers.set_held(worker, None);
            if !workers.contains(&worker) {
                self.drop_memory(worker, id);
            }
        }
        for (worker, _) in self.workers.followers(id) {
            self.follow(worker, id);
        }
    }

    fn resumption_from_peers(
        &self,
        id: JobId,
        started: Generation,
        workers: &[WorkerId],
        position: Position,
    ) -> Resumption {
        let has = |w: &WorkerId| self.workers.kept(*w, id, started) == Some(position);
        let sources = (0..).map(Rank).zip(workers).filter(|(_, w)| has(w)).map(|(rank, _)| rank).collect();
        Resumption::Peers { position, sources }
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

    fn assignments(
        &self,
        id: JobId,
        generation: Generation,
        workers: &[WorkerId],
        resume: &Resumption,
    ) -> Vec<Assignment> {
        let Some(job) = self.jobs.get(&id) else { return Vec::new() };
        let Some(live) = job.live() else { return Vec::new() };
        let record = &job.record;
        let ranked = workers.iter().zip(0..).map(|(w, r)| (*w, Rank(r)));
        ranked
            .map(|(worker, rank)| Assignment {
                job: id,
                generation,
                rank,
                placement: live.placement.clone(),
                peers: self.peers_of(worker, workers),
                file: record.file.clone(),
                toml: record.toml.clone(),
                datasets: record.datasets.clone(),
                resume: resume.clone(),
            })
            .collect()
    }

    /// The ranks of a membership of `workers`, and how `from` reaches them.
    pub(crate) fn peers_of(&self, from: WorkerId, workers: &[WorkerId]) -> Vec<Peer> {
        let register = |worker| self.workers.register(worker);
        let peer = |(to, rank): (WorkerId, Rank)| {
            let routes = register(from).zip(register(to)).map(|(from, to)| routes(from, to));
            Peer {
                rank,
                worker: to,
                host: self.workers.host(to).to_owned(),
                device: register(to).map(|r| r.device.clone()).unwrap_or_default(),
                host_key: register(to).and_then(|r| r.host_key.clone()),
                addresses: routes.unwrap_or_default().into_iter().map(|route| route.address).collect(),
            }
        };
        workers.iter().zip(0..).map(|(w, r)| peer((*w, Rank(r)))).collect()
    }
}
