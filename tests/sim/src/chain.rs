//! A replica's state, as far as it matters here: two hashes that no two histories share.

use lockstep_common::ids::Generation;
use lockstep_common::wire::Position;

/// What a replica holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// How far it is.
    pub(crate) position: Position,
    /// Stands for weights and optimizers: a hash over the samples of all updates so far. It is a function of the job alone.
    pub(crate) chain: u64,
    /// A hash over the generations that made the updates. Replicas of one generation agree on it too, as they must where a
    /// reduction is not exact.
    pub(crate) lineage: u64,
}

/// What ranks exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Exchange {
    /// The gradients of a phase.
    Update,
    /// The replicas' digests between two steps.
    Digest,
}

/// One exchange of one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) session: u64,
    pub(crate) position: Position,
    pub(crate) exchange: Exchange,
}

impl State {
    /// Before the first update.
    pub(crate) fn initial() -> Self {
        Self { position: Position::default(), chain: 0, lineage: 0 }
    }

    /// After the next phase's update with the gradients `contribution`, made by `generation`, if a step has `phases`.
    pub(crate) fn after(&self, contribution: u64, generation: Generation, phases: u16) -> Self {
        let Position { step, phase } = self.position;
        let position =
            if phase + 1 < phases { Position { step, phase: phase + 1 } } else { Position::at(step + 1) };
        Self {
            position,
            chain: hash(&[self.chain, step, u64::from(phase), contribution]),
            lineage: hash(&[self.lineage, step, u64::from(phase), generation.0]),
        }
    }
}

/// A hash of numbers.
pub(crate) fn hash(numbers: &[u64]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    numbers.iter().for_each(|n| {
        hasher.update(&n.to_le_bytes());
    });
    let bytes = hasher.finalize();
    u64::from_le_bytes(bytes.as_bytes()[..8].try_into().unwrap_or_default())
}

/// The sum of all shards' gradients, each given by its samples, in the order of the shards.
pub(crate) fn contribution<'a>(shards: impl Iterator<Item = (u32, &'a [u64])>) -> u64 {
    let mut numbers = Vec::new();
    for (shard, samples) in shards {
        numbers.extend([u64::from(shard), samples.len() as u64]);
        numbers.extend(samples);
    }
    hash(&numbers)
}
