//! Which rank is slow, and how many logical shards each should own.
//!
//! Ranks wait for each other in every step, so the wall time of a step says nothing about any of them. What does is the
//! time that a rank computes for one of its shards.

use lockstep_common::wire::Pace;

/// A rank is slow if a shard takes it so many times the median of the others.
const SLOW: f64 = 1.5;

/// So many reports in a row make a straggler, and so many good ones end that. One report covers a second or more.
const PERSISTENT: i32 = 3;

/// Another placement must make the steps so much shorter, or the change is not worth its while.
const WORTH: f64 = 0.9;

/// The paces of one membership's ranks.
#[derive(Clone, Debug)]
pub(crate) struct Paces(Vec<Rank>);

#[derive(Clone, Debug, Default)]
struct Rank {
    newest: Option<Pace>,
    /// Slow reports in a row; below 0, good ones since it was a straggler.
    slow: i32,
    straggler: bool,
}

impl Paces {
    pub(crate) fn new(ranks: usize) -> Self {
        Self(vec![Rank::default(); ranks])
    }

    /// Takes in a report of `rank`; whether it has become a straggler or has ceased to be one, if that has changed.
    pub(crate) fn handle_report(&mut self, rank: usize, pace: Pace) -> Option<bool> {
        if !(pace.shard_seconds().is_finite() && pace.shard_seconds() > 0.0) {
            return None;
        }
        self.0.get_mut(rank)?.newest = Some(pace);
        let own = self.seconds(rank)?;
        let is_slow = own > SLOW * self.median_of_others(rank)?;
        let entry = &mut self.0[rank];
        entry.slow = if is_slow { entry.slow.max(0) + 1 } else { entry.slow.min(0) - 1 };
        let changed = match entry.straggler {
            false => entry.slow >= PERSISTENT,
            true => entry.slow <= -PERSISTENT,
        };
        entry.straggler ^= changed;
        changed.then_some(entry.straggler)
    }

    /// The ranks that are persistently slow.
    pub(crate) fn stragglers(&self) -> impl Iterator<Item = usize> {
        (0..).zip(&self.0).filter(|(_, rank)| rank.straggler).map(|(number, _)| number)
    }

    /// The newest report of `rank`.
    pub(crate) fn of(&self, rank: usize) -> Option<&Pace> {
        self.0.get(rank)?.newest.as_ref()
    }

    /// How much slower than the median of the others `rank` is.
    pub(crate) fn slowness(&self, rank: usize) -> Option<f64> {
        Some(self.seconds(rank)? / self.median_of_others(rank)?)
    }

    /// Seconds for one shard of every rank, once all have reported.
    pub(crate) fn shard_seconds(&self) -> Option<Vec<f64>> {
        (0..self.0.len()).map(|rank| self.seconds(rank)).collect()
    }

    fn seconds(&self, rank: usize) -> Option<f64> {
        self.of(rank).map(Pace::shard_seconds)
    }

    fn median_of_others(&self, rank: usize) -> Option<f64> {
        let others = (0..self.0.len()).filter(|other| *other != rank);
        let mut seconds: Vec<_> = others.filter_map(|other| self.seconds(other)).collect();
        seconds.sort_by(f64::total_cmp);
        // Of two in the middle the slower one: nobody is slow for being behind the faster half.
        seconds.get(seconds.len() / 2).copied()
    }
}

/// How many of `shards` each rank should own, at least one each, so that the slowest is done as early as can be; `None` if
/// that is not worth leaving `owned`.
///
/// Shards are given out one by one, each to the rank that has finished it first (Graham's list scheduling for equal tasks,
/// which is optimal here, since the tasks are equal).
pub(crate) fn rebalanced(shard_seconds: &[f64], owned: &[u32]) -> Option<Vec<u32>> {
    let shards: u32 = owned.iter().sum();
    let mut sizes = vec![1u32; shard_seconds.len()];
    if (sizes.len() as u32) > shards {
        return None;
    }
    for _ in sizes.len() as u32..shards {
        let done = |rank: &usize| f64::from(sizes[*rank] + 1) * shard_seconds[*rank];
        let first = (0..sizes.len()).min_by(|a, b| done(a).total_cmp(&done(b)))?;
        sizes[first] += 1;
    }
    let slowest =
        |sizes: &[u32]| sizes.iter().zip(shard_seconds).map(|(n, s)| f64::from(*n) * s).fold(0.0, f64::max);
    (slowest(&sizes) <= WORTH * slowest(owned)).then_some(sizes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(seconds: f64) -> Pace {
        Pace {
            steps: 10,
            shards: 2,
            data: 0.0,
            forward: seconds,
            backward: seconds,
            comm: 0.0,
            optimizer: 0.0,
        }
    }

    /// Reports per rank, round by round; the changes as (round, rank, straggler).
    fn changes(rounds: &[&[f64]]) -> Vec<(usize, usize, bool)> {
        let mut paces = Paces::new(rounds[0].len());
        let mut changes = Vec::new();
        for (round, seconds) in rounds.iter().enumerate() {
            for (rank, seconds) in seconds.iter().enumerate() {
                if let Some(straggler) = paces.handle_report(rank, pace(*seconds)) {
                    changes.push((round, rank, straggler));
                }
            }
        }
        changes
    }

    #[test]
    fn a_rank_that_is_slow_three_times_in_a_row_is_a_straggler_until_it_is_not() {
        let (slow, good): (&[f64], &[f64]) = (&[1.0, 1.1, 2.0, 0.9], &[1.0, 1.1, 1.2, 0.9]);
        assert_eq!(changes(&[slow, slow, good, slow, slow]), []);
        assert_eq!(changes(&[slow; 5]), [(2, 2, true)]);
        assert_eq!(changes(&[slow, slow, slow, good, good, good]), [(2, 2, true), (5, 2, false)]);
        assert_eq!(changes(&[&[1.0, 2.0][..]; 4]), [(2, 1, true)]);
    }

    #[test]
    fn a_slow_rank_gets_fewer_shards_when_the_step_gets_shorter_by_it() {
        assert_eq!(rebalanced(&[1.0, 1.0, 1.0, 2.0], &[2, 2, 2, 2]), Some(vec![3, 2, 2, 1]));
        assert_eq!(rebalanced(&[1.0, 1.0], &[4, 4]), None);
        assert_eq!(rebalanced(&[1.0, 1.05], &[4, 4]), None);
        assert_eq!(rebalanced(&[1.0, 4.0], &[4, 4]), Some(vec![7, 1]));
        assert_eq!(rebalanced(&[1.0, 9.0], &[1, 1]), None, "every rank keeps a shard");
        assert_eq!(rebalanced(&[1.0, 1.0], &[7, 1]), Some(vec![4, 4]), "and gets them back");
    }
}
