//! What must hold, whatever happens.

use crate::chain::{Exchange, State};
use crate::plan::Workload;
use crate::words::Part;
use lockstep_common::ids::{Generation, JobId, WorkerId};
use lockstep_common::wire::{JobState, Position};
use lockstep_core::JobRecord;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// The error of a checkpoint that was refused because the disk was full.
pub(crate) const NO_SPACE: &str = "no space";

/// Looks at everything and remembers the first breach.
#[derive(Default)]
pub(crate) struct Judge {
    breach: Option<String>,
    cases: BTreeMap<JobId, Case>,
    /// Steps that a newer generation did again.
    pub(crate) recomputed: u64,
    /// Generations that made at least one update.
    pub(crate) generations: u64,
}

/// All that is known of a job.
struct Case {
    workload: Rc<Workload>,
    /// When each generation began to step, and from where.
    stepping: BTreeMap<Generation, (u64, State)>,
    /// The state after each update, by the generation that made it.
    states: BTreeMap<(Generation, Position), State>,
    /// The samples of each committed step and phase, by the generation that made it.
    counted: BTreeMap<Generation, BTreeMap<Position, Vec<u64>>>,
    /// The newest generation that the coordinator has made durable.
    newest: Generation,
    /// Whether a checkpoint was refused for lack of space.
    no_space: bool,
    ended: Option<JobState>,
}

impl Judge {
    /// The first thing that was not as it must be.
    pub(crate) fn breach(&self) -> Option<&str> {
        self.breach.as_deref()
    }

    /// Notes a breach; only the first counts.
    pub(crate) fn object(&mut self, what: impl FnOnce() -> String) {
        if self.breach.is_none() {
            self.breach = Some(what());
        }
    }

    fn must(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.object(what);
        }
    }

    /// A job has been submitted.
    pub(crate) fn submitted(&mut self, job: JobId, workload: Rc<Workload>) {
        let case = Case {
            workload,
            stepping: BTreeMap::new(),
            states: BTreeMap::new(),
            counted: BTreeMap::new(),
            newest: Generation(0),
            no_space: false,
            ended: None,
        };
        self.cases.insert(job, case);
    }

    /// A worker is told to go on from `start`, and has `kept` what it had of the job's newest generation.
    pub(crate) fn started(
        &mut self,
        worker: WorkerId,
        job: JobId,
        start: Position,
        kept: Option<(Generation, Position)>,
    ) {
        let Some(case) = self.cases.get(&job) else { return };
        let newest = case.stepping.keys().next_back().copied();
        let thrown_away = kept.filter(|(of, kept)| Some(*of) == newest && *kept > start);
        self.must(thrown_away.is_none(), || {
            format!("all or none: {worker} has {thrown_away:?} of {job} and is told to go on from {start}")
        });
    }

    /// A rank has told its part: its generation steps.
    pub(crate) fn stepped(&mut self, job: JobId, generation: Generation, from: State, now_ms: u64) {
        let Some(case) = self.cases.get_mut(&job) else { return };
        if let Some((_, first)) = case.stepping.get(&generation) {
            let known = *case.states.get(&(generation, from.position)).unwrap_or(first);
            let same = known == from || known.position != from.position;
            self.must(same, || {
                format!("identical: {generation} of {job} has ranks at {from:?} and at {known:?}")
            });
            return;
        }
        let last = case.stepping.keys().next_back().copied();
        case.stepping.insert(generation, (now_ms, from));
        let of_last = case.states.range((last.unwrap_or_default(), Position::default())..);
        let furthest =
            of_last.take_while(|((g, _), _)| Some(*g) == last).map(|(_, s)| s.position.step).last();
        self.recomputed += furthest.unwrap_or(0).saturating_sub(from.position.step);
        self.generations += 1;
        let expected = case_reference(&self.cases, job, from.position);
        self.must(expected == Some(from.chain), || {
            format!("exact: {generation} of {job} starts from a state that is none of {}", from.position)
        });
    }

    /// A rank has made an update out of these parts.
    pub(crate) fn updated(
        &mut self,
        (worker, rank): (WorkerId, u32),
        (job, generation): (JobId, Generation),
        (before, after): (State, State),
        parts: &BTreeMap<u32, Rc<Part>>,
    ) {
        let Some(case) = self.cases.get_mut(&job) else { return };
        let mut breaches = Vec::new();
        if let Some(foreign) =
            parts.values().find(|p| p.generation != generation || p.position != before.position)
        {
            breaches
                .push(format!("fence: it counts a part of {} at {}", foreign.generation, foreign.position));
        }
        let mut samples = Vec::new();
        let mut shards = BTreeSet::new();
        for (shard, of_shard) in parts.values().flat_map(|p| &p.shards) {
            if !shards.insert(*shard) {
                breaches.push(format!("every sample once: shard {shard} counts twice"));
            }
            if *of_shard != case.workload.samples(before.position, *shard, 0) {
                breaches.push(format!("every sample once: shard {shard} has other samples than it should"));
            }
            samples.extend(of_shard);
        }
        if shards.len() != case.workload.shards as usize {
            breaches.push(format!("every sample once: only the shards {shards:?} count"));
        }
        if case.workload.reference(after.position) != Some(after.chain) {
            breaches.push(format!("exact: its state is none of {}", after.position));
        }
        let known = *case.states.entry((generation, after.position)).or_insert(after);
        if known != after {
            breaches.push("identical: another rank of its generation has another state".to_owned());
        }
        // What all ranks have said before a newer generation began may still be counted by a rank that was asleep: the
        // newer one makes that update too. But nobody may be found any more who goes on with the old one.
        let newer = case
            .stepping
            .range(generation..)
            .filter(|(g, _)| **g > generation)
            .map(|(g, (at, _))| (*at, *g))
            .min();
        if let Some((at_ms, newer)) = newer
            && parts.values().all(|p| p.sent_ms > at_ms)
        {
            breaches.push(format!("fence: {newer} has begun to step before"));
        }
        samples.sort_unstable();
        case.counted.entry(generation).or_default().entry(before.position).or_insert(samples);
        if let Some(breach) = breaches.into_iter().next() {
            self.object(|| {
                format!(
                    "{worker} as rank {rank} of {generation} of {job} updates at {}: {breach}",
                    before.position
                )
            });
        }
    }

    /// Ranks have compared their digests.
    pub(crate) fn compared(&mut self, job: JobId, parts: &BTreeMap<u32, Rc<Part>>) {
        let digests: BTreeSet<_> = parts.values().map(|p| p.digest).collect();
        let position = parts.values().next().map(|p| p.position);
        debug_assert!(parts.values().all(|p| p.exchange == Exchange::Digest));
        self.must(digests.len() == 1, || format!("identical: the replicas of {job} differ at {position:?}"));
    }

    /// A job's record has become durable.
    pub(crate) fn recorded(&mut self, job: &JobRecord) {
        let Some(case) = self.cases.get_mut(&job.id) else { return };
        let (newest, ended) = (case.newest, case.ended);
        let (id, state) = (job.id, job.state);
        case.newest = newest.max(job.generation);
        if state.is_final() {
            case.ended = Some(state);
        }
        let audited = match ended {
            None if state == JobState::Finished => case.audit(id, job.weights_digest.as_deref()),
            None if state.is_final() && !(case.no_space && job.reason.ends_with(NO_SPACE)) => {
                Some(format!("{id} ended as {state}: {}", job.reason))
            }
            _ => None,
        };
        let distinct: BTreeSet<_> = job.members.iter().collect();
        self.must(job.generation >= newest, || format!("{id} went from {newest} back to {}", job.generation));
        self.must(distinct.len() == job.members.len(), || {
            format!("{id} has {:?} as its members", job.members)
        });
        self.must(ended.is_none_or(|ended| ended == state), || format!("{id} was {ended:?} and is {state}"));
        self.must(audited.is_none(), || audited.clone().unwrap_or_default());
    }

    /// The job's last checkpoint was refused: the disk was full. That ends it, and is not held against it.
    pub(crate) fn no_space(&mut self, job: JobId) {
        if let Some(case) = self.cases.get_mut(&job) {
            case.no_space = true;
        }
    }
}

fn case_reference(cases: &BTreeMap<JobId, Case>, job: JobId, position: Position) -> Option<u64> {
    cases.get(&job)?.workload.reference(position)
}

impl Case {
    /// The job has ended: what counts is, of each generation, what a later one has not begun before.
    fn audit(&self, id: JobId, digest: Option<&str>) -> Option<String> {
        if digest != Some(&self.workload.final_digest()) {
            return Some(format!("exact: {id} finished with other weights than the undisturbed run's"));
        }
        let mut history: BTreeMap<Position, &Vec<u64>> = BTreeMap::new();
        for (generation, (_, from)) in &self.stepping {
            drop(history.split_off(&from.position));
            history.extend(self.counted.get(generation).into_iter().flatten().map(|(p, s)| (*p, s)));
        }
        let mut seen: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        for (position, samples) in &history {
            let epoch = self.workload.epoch(*position);
            samples.iter().for_each(|sample| *seen.entry((epoch, *sample)).or_default() += 1);
        }
        let (epochs, samples) = self.workload.epochs();
        let twice = seen.values().any(|times| *times != 1);
        (twice || seen.len() as u64 != epochs * samples).then(|| {
            format!(
                "every sample once: the history of {id} has {} of {epochs} x {samples} samples",
                seen.len()
            )
        })
    }
}
