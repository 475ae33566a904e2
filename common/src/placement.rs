//! Which rank owns which logical shards.
//!
//! A placement never changes a result: the exact reduction adds the shards in one fixed tree whoever owns the
//! leaves. It only decides who computes what, so it is part of a generation.

use crate::ids::{LogicalShard, Rank};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Contiguous ranges of logical shards, one per rank, covering `0..V` without gap or overlap.
///
/// Contiguous, because a rank can then reduce whole subtrees of the tree by itself before it sends anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    ends: Vec<u32>,
}

impl Placement {
    /// Spreads `shards` over `ranks` as evenly as whole shards allow, the larger parts first.
    ///
    /// Ranks beyond the number of shards own nothing. Panics if `ranks` is 0.
    pub fn even(shards: u32, ranks: u32) -> Self {
        assert!(ranks > 0, "a placement needs at least one rank");
        let (each, larger) = (shards / ranks, shards % ranks);
        let ends = (1..=ranks).map(|r| r * each + r.min(larger)).collect();
        Self { ends }
    }

    /// Gives rank r the next `sizes[r]` shards.
    pub fn of_sizes(sizes: &[u32]) -> Self {
        let ends = sizes.iter().scan(0, |end, size| {
            *end += size;
            Some(*end)
        });
        Self { ends: ends.collect() }
    }

    /// How many shards each rank owns.
    pub fn sizes(&self) -> Vec<u32> {
        (0..self.world_size()).map(|r| self.range(Rank(r)).len() as u32).collect()
    }

    /// How many ranks there are.
    pub fn world_size(&self) -> u32 {
        self.ends.len() as u32
    }

    /// V, the number of logical shards.
    pub fn shards(&self) -> u32 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The shards that `rank` owns; empty for a rank that is not in the placement.
    pub fn range(&self, rank: Rank) -> Range<u32> {
        let i = rank.index();
        let Some(&end) = self.ends.get(i) else { return 0..0 };
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        start..end
    }

    /// The rank that owns `shard`, or `None` for a shard that does not exist.
    pub fn owner(&self, shard: LogicalShard) -> Option<Rank> {
        let i = self.ends.partition_point(|&end| end <= shard.0);
        (i < self.ends.len()).then_some(Rank(i as u32))
    }

    /// Checks a placement that came from a peer: at least one rank, ends never falling.
    pub fn is_valid(&self) -> bool {
        !self.ends.is_empty() && self.ends.windows(2).all(|w| w[0] <= w[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_say_who_owns_what() {
        let p = Placement::of_sizes(&[3, 0, 1]);
        assert_eq!((p.sizes(), p.shards(), p.owner(LogicalShard(3))), (vec![3, 0, 1], 4, Some(Rank(2))));
        assert!(p.is_valid());
    }

    #[test]
    fn even_covers_every_shard_once_with_sizes_one_apart() {
        for shards in 0..40 {
            for ranks in 1..12 {
                let p = Placement::even(shards, ranks);
                let sizes: Vec<_> = (0..ranks).map(|r| p.range(Rank(r)).len()).collect();
                assert_eq!(sizes.iter().sum::<usize>(), shards as usize);
                assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
                for s in 0..shards {
                    let owner = p.owner(LogicalShard(s)).unwrap();
                    assert!(p.range(owner).contains(&s));
                }
                assert_eq!(p.owner(LogicalShard(shards)), None);
            }
        }
    }
}
