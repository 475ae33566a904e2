//! What one seed's cluster is like: its workers, its jobs, and how long its bad times last.

use crate::chain::{State, contribution};
use lockstep_common::ids::LogicalShard;
use lockstep_common::rng::Stream;
use lockstep_common::sampler::Sampler;
use lockstep_common::wire::Position;
use lockstep_core::NewJob;

/// What is broken on purpose, to see that the judge notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breakage {
    /// Workers do not look at generations: neither among ranks, nor when their lease has run out.
    NoFence,
    /// A worker commits the step that it was in the middle of, however long it has been stopped meanwhile.
    NoLeaseAtCommit,
    /// A replica that is behind takes the state of any worker for the one that it needs.
    WrongReplica,
    /// A rank that took part in an earlier generation takes the samples of the step after.
    ShiftedSampler,
}

/// What to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Everything is drawn from this.
    pub seed: u64,
    /// What is broken, if something is.
    pub breakage: Option<Breakage>,
}

/// How a seed's cluster is made.
pub(crate) struct Setup {
    pub(crate) workers: u64,
    pub(crate) jobs: Vec<Workload>,
    /// Until then things go wrong.
    pub(crate) calm_at_ms: u64,
    /// Misfortunes until then.
    pub(crate) misfortunes: u64,
    /// The seconds for which a rank steps without its coordinator.
    pub(crate) orphan_timeout_s: u64,
}

/// A job, as far as it matters here.
pub(crate) struct Workload {
    pub(crate) shards: u32,
    pub(crate) phases: u16,
    pub(crate) total_steps: u64,
    pub(crate) checkpoint_every: u64,
    pub(crate) min_workers: u32,
    pub(crate) max_workers: u32,
    /// How long a shard's computation takes.
    pub(crate) shard_ms: u64,
    /// Whether replicas hand over their whole state from memory to memory.
    pub(crate) state_in_memory: bool,
    sampler: Sampler,
    orphan_timeout_s: u64,
    /// The undisturbed run's chain, by minibatches applied.
    reference: Vec<u64>,
}

impl Setup {
    pub(crate) fn new(seed: u64) -> Self {
        let mut chance = Stream::new(seed, "setup", &[]);
        let mut between = |low: u64, high: u64| low + chance.below(high - low + 1);
        let workers = between(1, 5);
        let orphan_timeout_s = [10, 20, 60][between(0, 2) as usize];
        let count = if between(0, 2) == 0 { 2 } else { 1 };
        let jobs = (0..count)
            .map(|job| {
                let min = between(1, workers.min(3)) as u32;
                let max = between(u64::from(min), 6) as u32;
                let numbers =
                    [between(0, 1), between(60, 400), between(1, 12), between(2, 40), between(20, 800)];
                let state_in_memory = between(0, 5) > 0;
                Workload::new(seed * 8 + job, numbers, (min, max), (orphan_timeout_s, state_in_memory))
            })
            .collect();
        Self {
            workers,
            jobs,
            calm_at_ms: between(10_000, 150_000),
            misfortunes: between(1, 80),
            orphan_timeout_s,
        }
    }
}

impl Workload {
    fn new(
        seed: u64,
        [phases, samples, epochs, checkpoint_every, shard_ms]: [u64; 5],
        (min_workers, max_workers): (u32, u32),
        (orphan_timeout_s, state_in_memory): (u64, bool),
    ) -> Self {
        let (shards, batch) = (8, 16);
        let phases = phases as u16 + 1;
        // Whole steps in an epoch, so that the last epoch is complete.
        let samples =
            if phases == 2 && !samples.div_ceil(batch).is_multiple_of(2) { samples + batch } else { samples };
        let Ok(sampler) = Sampler::new(seed, samples, batch, shards, true) else {
            unreachable!("the numbers above are good")
        };
        let minibatches = epochs * sampler.steps_per_epoch();
        let mut workload = Self {
            shards,
            phases,
            total_steps: minibatches / u64::from(phases),
            checkpoint_every,
            min_workers,
            max_workers,
            shard_ms,
            state_in_memory,
            sampler,
            orphan_timeout_s,
            reference: vec![State::initial().chain],
        };
        let mut state = State::initial();
        while state.position.step < workload.total_steps {
            let samples: Vec<_> = (0..shards).map(|s| workload.samples(state.position, s, 0)).collect();
            let gradients = contribution((0..).zip(samples.iter().map(Vec::as_slice)));
            state = state.after(gradients, Default::default(), workload.phases);
            workload.reference.push(state.chain);
        }
        workload
    }

    /// The place of a position in the order of minibatches.
    fn minibatch(&self, position: Position) -> u64 {
        position.step * u64::from(self.phases) + u64::from(position.phase)
    }

    /// The epoch that the minibatch of this position belongs to, from 0.
    pub(crate) fn epoch(&self, position: Position) -> u64 {
        self.sampler.position(self.minibatch(position)).epoch
    }

    /// The samples of a shard in the phase that comes next at this position, or in one so many phases later.
    pub(crate) fn samples(&self, position: Position, shard: u32, later: u64) -> Vec<u64> {
        let place = self.sampler.position(self.minibatch(position) + later);
        self.sampler.shard_samples(place.epoch, place.step_in_epoch, LogicalShard(shard))
    }

    /// What an undisturbed replica's chain is at this position.
    pub(crate) fn reference(&self, position: Position) -> Option<u64> {
        self.reference.get(self.minibatch(position) as usize).copied()
    }

    /// What the final weights' digest must be.
    pub(crate) fn final_digest(&self) -> String {
        format!("{:016x}", self.reference.last().copied().unwrap_or_default())
    }

    /// All epochs of the job, and the samples of each.
    pub(crate) fn epochs(&self) -> (u64, u64) {
        let samples = (0..self.sampler.steps_per_epoch()).map(|s| self.sampler.batch_size(s)).sum();
        (self.total_steps * u64::from(self.phases) / self.sampler.steps_per_epoch(), samples)
    }

    /// The job as it is submitted.
    pub(crate) fn job(&self) -> NewJob {
        let toml = format!(
            "name = \"sim\"\ntask = \"classify\"\nseed = 1\nsteps = {}\nglobal_batch = 16\nlogical_shards = {}\n\
             [model]\nname = \"mlp\"\n[data]\ntrain = \"d/train\"\n[optimizer]\nname = \"sgd\"\nlr = 0.1\n\
             [workers]\nmin = {}\nmax = {}\norphan_timeout_s = {}\n",
            self.total_steps, self.shards, self.min_workers, self.max_workers, self.orphan_timeout_s
        );
        NewJob {
            file: "sim.toml".to_owned(),
            toml,
            name: "sim".to_owned(),
            logical_shards: self.shards,
            min_workers: self.min_workers,
            max_workers: self.max_workers,
            keep_checkpoints: 3,
            datasets: Vec::new(),
            wait_for: None,
            state_in_memory: self.state_in_memory,
            orphan_timeout_ms: self.orphan_timeout_s * 1000,
        }
    }
}
