//! What a rank wants beside the step itself. The ranks agree on it with the step, so that all do it after the same one.

use lockstep_common::wire::StopMode;

/// A rank's wishes, or those of all ranks together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wishes {
    /// To end the generation after this step.
    pub(crate) boundary: bool,
    /// The same, with a checkpoint.
    pub(crate) checkpoint: bool,
    /// To copy the state after this step, for one that wants to join.
    pub(crate) snapshot: bool,
    /// To have no checkpoint after this step: the one before is still on its way.
    pub(crate) busy: bool,
    /// Rank 0's: the step up to which the coordinator has been heard to know the records.
    pub(crate) heard: u64,
}

/// How many numbers wishes are.
const NUMBERS: usize = 5;

impl Wishes {
    /// How the generation ends after this step, if it does.
    pub(crate) fn stop(&self) -> Option<StopMode> {
        match (self.checkpoint, self.boundary) {
            (true, _) => Some(StopMode::Checkpoint),
            (false, true) => Some(StopMode::Boundary),
            (false, false) => None,
        }
    }

    /// As addends of a sum over the logical shards, for the rank's shard in `slot`.
    pub(crate) fn to_numbers(self, slot: usize) -> [f64; NUMBERS] {
        let flag = |wish: bool| if wish { 1.0 } else { 0.0 };
        // Steps are far below 2^53, and all other shards add zeros.
        let heard = if slot == 0 { self.heard as f64 } else { 0.0 };
        [flag(self.boundary), flag(self.checkpoint), flag(self.snapshot), flag(self.busy), heard]
    }

    /// Adds the wishes in `sums` of [`Self::to_numbers`].
    pub(crate) fn add(&mut self, sums: &[f64]) {
        let [boundary, checkpoint, snapshot, busy, heard] =
            std::array::from_fn(|place| sums.get(place).copied().unwrap_or_default());
        self.boundary |= boundary > 0.0;
        self.checkpoint |= checkpoint > 0.0;
        self.snapshot |= snapshot > 0.0;
        self.busy |= busy > 0.0;
        self.heard = self.heard.max(heard as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_ranks_wish_is_everybodys_and_a_checkpoint_outweighs_a_boundary() {
        let first = Wishes { boundary: true, heard: 41, ..Wishes::default() };
        let second = Wishes { checkpoint: true, busy: true, ..Wishes::default() };
        let sum = |wishes: &[(Wishes, usize)]| {
            let mut sums = [0.0; NUMBERS];
            for (wish, slot) in wishes {
                sums.iter_mut().zip(wish.to_numbers(*slot)).for_each(|(sum, number)| *sum += number);
            }
            let mut together = Wishes::default();
            together.add(&sums);
            together
        };
        let none = Wishes::default();
        assert_eq!(sum(&[(none, 0), (none, 1)]).stop(), None);
        assert_eq!(sum(&[(first, 0), (first, 1), (none, 0)]).stop(), Some(StopMode::Boundary));
        let all = sum(&[(first, 0), (first, 1), (second, 0)]);
        assert_eq!((all.stop(), all.heard), (Some(StopMode::Checkpoint), 41));
        assert!(all.busy && !all.snapshot);
    }
}
