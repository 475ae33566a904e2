//! The one tree in whose order everything is added.
//!
//! The node over `[lo, hi)` splits at `lo` plus the largest power of two below `hi - lo`, so subtrees over
//! aligned ranges of leaves are the same in trees of any size. A rank that owns a contiguous range of leaves
//! can finish the largest subtrees inside it alone; the other ranks need only those nodes.

use lockstep_common::ids::Rank;
use lockstep_common::job::Reduction;
use lockstep_common::placement::Placement;

/// Where the node over `[lo, hi)` splits. `hi - lo` is at least 2.
pub fn split(lo: u32, hi: u32) -> u32 {
    lo + (hi - lo).next_power_of_two() / 2
}

/// The right operand `from` is merged into the left operand `into`; `into < from`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Merge {
    pub(crate) into: usize,
    pub(crate) from: usize,
}

/// What a rank does with its own leaves, and what anyone does with everybody's nodes.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Merges among this rank's leaves, which leave its nodes at `kept`.
    pub(crate) local: Vec<Merge>,
    /// The leaves of this rank that hold its nodes after `local`, in order.
    pub(crate) kept: Vec<usize>,
    /// How many nodes each rank contributes.
    pub(crate) nodes: Vec<usize>,
    /// Merges among all ranks' nodes, laid out rank by rank, which leave the root at node 0.
    pub(crate) global: Vec<Merge>,
}

impl Plan {
    /// The plan of `rank` under `placement`.
    pub(crate) fn new(placement: &Placement, rank: Rank, reduction: Reduction) -> Self {
        match reduction {
            Reduction::Exact => Self::exact(placement, rank),
            Reduction::Fast => Self::fast(placement, rank),
        }
    }

    fn exact(placement: &Placement, rank: Rank) -> Self {
        let world = placement.world_size();
        let mut plan = Self { local: vec![], kept: vec![], nodes: vec![0; world as usize], global: vec![] };
        if placement.shards() > 0 {
            let owner = |lo, hi| {
                (0..world).map(Rank).find(|&r| {
                    let range = placement.range(r);
                    range.start <= lo && hi <= range.end
                })
            };
            plan.walk(0, placement.shards(), rank, placement.range(rank).start, &owner);
        }
        plan
    }

    /// Visits the node over `[lo, hi)` and returns its place among all ranks' nodes.
    fn walk(
        &mut self,
        lo: u32,
        hi: u32,
        rank: Rank,
        start: u32,
        owner: &impl Fn(u32, u32) -> Option<Rank>,
    ) -> usize {
        if let Some(owner) = owner(lo, hi) {
            if owner == rank {
                self.kept.push((lo - start) as usize);
                merges(lo, hi, start, &mut self.local);
            }
            let place = self.nodes.iter().sum();
            self.nodes[owner.index()] += 1;
            return place;
        }
        let middle = split(lo, hi);
        let into = self.walk(lo, middle, rank, start, owner);
        let from = self.walk(middle, hi, rank, start, owner);
        self.global.push(Merge { into, from });
        into
    }

    fn fast(placement: &Placement, rank: Rank) -> Self {
        let mut plan = Self { local: vec![], kept: vec![], nodes: vec![], global: vec![] };
        let leaves = placement.range(rank).len() as u32;
        if leaves > 0 {
            plan.kept.push(0);
            merges(0, leaves, 0, &mut plan.local);
        }
        plan.nodes =
            (0..placement.world_size()).map(|r| usize::from(!placement.range(Rank(r)).is_empty())).collect();
        let nodes = plan.nodes.iter().sum::<usize>() as u32;
        if nodes > 0 {
            merges(0, nodes, 0, &mut plan.global);
        }
        plan
    }

    /// The most nodes any rank contributes.
    pub(crate) fn most_nodes(&self) -> usize {
        self.nodes.iter().copied().max().unwrap_or(0)
    }
}

/// The merges of the whole subtree over `[lo, hi)`, children first, leaves numbered from `start`.
fn merges(lo: u32, hi: u32, start: u32, out: &mut Vec<Merge>) {
    if hi - lo < 2 {
        return;
    }
    let middle = split(lo, hi);
    merges(lo, middle, start, out);
    merges(middle, hi, start, out);
    out.push(Merge { into: (lo - start) as usize, from: (middle - start) as usize });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_at_the_largest_power_of_two() {
        for (lo, hi, middle) in [(0, 2, 1), (0, 3, 2), (0, 4, 2), (0, 5, 4), (4, 7, 6), (0, 8, 4), (0, 9, 8)]
        {
            assert_eq!(split(lo, hi), middle, "[{lo}, {hi})");
        }
    }

    /// Writes the tree as brackets, once directly and once by every rank's plan.
    #[test]
    fn every_placement_gives_the_same_brackets() {
        fn reference(lo: u32, hi: u32) -> String {
            if hi - lo == 1 {
                return lo.to_string();
            }
            let middle = split(lo, hi);
            format!("({}+{})", reference(lo, middle), reference(middle, hi))
        }
        let apply = |slots: &mut Vec<String>, merges: &[Merge]| {
            for m in merges {
                slots[m.into] = format!("({}+{})", slots[m.into], slots[m.from]);
            }
        };
        for shards in 1..20 {
            for ranks in 1..=shards {
                let placement = Placement::even(shards, ranks);
                let mut nodes = vec![];
                let mut global = vec![];
                for r in (0..ranks).map(Rank) {
                    let plan = Plan::new(&placement, r, Reduction::Exact);
                    let mut leaves: Vec<_> = placement.range(r).map(|s| s.to_string()).collect();
                    apply(&mut leaves, &plan.local);
                    assert_eq!(plan.kept.len(), plan.nodes[r.index()]);
                    nodes.extend(plan.kept.iter().map(|&k| leaves[k].clone()));
                    global = plan.global;
                }
                apply(&mut nodes, &global);
                assert_eq!(nodes[0], reference(0, shards), "{shards} shards on {ranks} ranks");
            }
        }
    }

    #[test]
    fn aligned_ranks_contribute_one_node_each() {
        let plan = Plan::new(&Placement::even(8, 4), Rank(1), Reduction::Exact);
        assert_eq!(plan.nodes, [1, 1, 1, 1]);
        let plan = Plan::new(&Placement::even(8, 3), Rank(1), Reduction::Exact);
        assert_eq!(plan.nodes, [2, 2, 1]);
        let plan = Plan::new(&Placement::even(8, 3), Rank(1), Reduction::Fast);
        assert_eq!(plan.nodes, [1, 1, 1]);
    }
}
