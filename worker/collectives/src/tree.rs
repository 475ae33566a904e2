//! The one tree in whose order everything is added.
//!
//! The node over `[lo, hi)` splits at `lo` plus the largest power of two below `hi - lo`, so subtrees over
//! aligned ranges of leaves are the same in trees of any size. A rank that owns a contiguous range of leaves
//! can finish the largest subtrees inside it alone; the other ranks need only those nodes.

use lockstep_common::ids::Rank;
use lockstep_common::job::Reduction;
use lockstep_common::placement::Placement;
use std::ops::Range;

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
    /// What becomes of all ranks' nodes.
    pub(crate) ranks: Union,
    /// The same in two steps, for a rank that shares its host with others in a world of several hosts.
    pub(crate) hosts: Option<HostPlan>,
}

/// How parties, each with some nodes, make the root of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Union {
    /// How many nodes each party contributes.
    pub(crate) nodes: Vec<usize>,
    /// All nodes in the tree's order: which party's, and which of its nodes.
    pub(crate) order: Vec<(usize, usize)>,
    /// Merges among them, numbered as in `order`, which leave the root at 0.
    pub(crate) merges: Vec<Merge>,
}

/// What the ranks of a host make of their nodes, and what the hosts make of theirs.
#[derive(Debug)]
pub(crate) struct HostPlan {
    /// For each of this host's nodes, what this host's ranks (numbered among themselves) make it of.
    pub(crate) within: Vec<Union>,
    /// What becomes of all hosts' nodes.
    pub(crate) among: Union,
}

impl Plan {
    /// The plan of `rank` under `placement`, when each rank is on the host with that number in `hosts`.
    pub(crate) fn new(placement: &Placement, rank: Rank, reduction: Reduction, hosts: &[usize]) -> Self {
        let range = placement.range(rank);
        let world = placement.world_size() as usize;
        let rank_of =
            |leaf: u32| (0..world).find(|&r| placement.range(Rank(r as u32)).contains(&leaf)).unwrap_or(0);
        let whole = 0..placement.shards();
        let mut plan = Self { local: vec![], kept: vec![], ranks: Union::empty(world), hosts: None };
        let mine = hosts.get(rank.index()).copied().unwrap_or(0);
        let mates: Vec<usize> = (0..world).filter(|&r| hosts.get(r) == Some(&mine)).collect();
        let count = hosts.iter().max().map_or(1, |last| last + 1);
        let two_steps = count > 1 && count < world;
        match reduction {
            Reduction::Exact => {
                let cover = Cover::new(whole.clone(), &rank_of);
                for (_, node) in cover.nodes.iter().filter(|(owner, _)| *owner == rank.index()) {
                    plan.kept.push((node.start - range.start) as usize);
                    merges(node.start, node.end, range.start, &mut plan.local);
                }
                plan.ranks = cover.union(world, &[]);
                if two_steps {
                    let cover = Cover::new(whole, &|leaf| hosts[rank_of(leaf)]);
                    let own = cover.nodes.iter().filter(|(host, _)| *host == mine);
                    let mut before = vec![0; mates.len()];
                    let within = own.map(|(_, node)| {
                        let mate_of = |leaf| mates.iter().position(|&r| r == rank_of(leaf)).unwrap_or(0);
                        let union = Cover::new(node.clone(), &mate_of).union(mates.len(), &before);
                        before.iter_mut().zip(&union.nodes).for_each(|(before, nodes)| *before += nodes);
                        union
                    });
                    plan.hosts = Some(HostPlan { within: within.collect(), among: cover.union(count, &[]) });
                }
            }
            Reduction::Fast => {
                if !range.is_empty() {
                    plan.kept.push(0);
                    merges(0, range.len() as u32, 0, &mut plan.local);
                }
                let owns = |r: usize| !placement.range(Rank(r as u32)).is_empty();
                plan.ranks = Union::one_each((0..world).map(owns));
                if two_steps {
                    let some = |host| (0..world).any(|r| hosts[r] == host && owns(r));
                    plan.hosts = Some(HostPlan {
                        within: vec![Union::one_each(mates.iter().map(|&r| owns(r)))],
                        among: Union::one_each((0..count).map(some)),
                    });
                }
            }
        }
        plan
    }
}

impl Union {
    fn empty(parties: usize) -> Self {
        Self { nodes: vec![0; parties], order: vec![], merges: vec![] }
    }

    /// One node from every party that has any.
    fn one_each(parties: impl Iterator<Item = bool>) -> Self {
        let nodes: Vec<usize> = parties.map(usize::from).collect();
        let order: Vec<_> =
            nodes.iter().enumerate().filter(|(_, nodes)| **nodes > 0).map(|(party, _)| (party, 0)).collect();
        let mut all = Vec::new();
        merges(0, order.len() as u32, 0, &mut all);
        Self { nodes, order, merges: all }
    }

    /// The most nodes any party contributes.
    pub(crate) fn most_nodes(&self) -> usize {
        self.nodes.iter().copied().max().unwrap_or(0)
    }
}

/// The largest subtrees that lie within one owner's leaves, in the tree's order, and how they are merged.
struct Cover {
    nodes: Vec<(usize, Range<u32>)>,
    merges: Vec<Merge>,
}

impl Cover {
    fn new(range: Range<u32>, owner: &impl Fn(u32) -> usize) -> Self {
        let mut cover = Self { nodes: vec![], merges: vec![] };
        if !range.is_empty() {
            cover.walk(range, owner);
        }
        cover
    }

    /// Visits the node over `range` and returns its place among the nodes.
    fn walk(&mut self, range: Range<u32>, owner: &impl Fn(u32) -> usize) -> usize {
        let first = owner(range.start);
        if range.clone().all(|leaf| owner(leaf) == first) {
            self.nodes.push((first, range));
            return self.nodes.len() - 1;
        }
        let middle = split(range.start, range.end);
        let into = self.walk(range.start..middle, owner);
        let from = self.walk(middle..range.end, owner);
        self.merges.push(Merge { into, from });
        into
    }

    /// `before` says how many nodes of each party are used elsewhere already.
    fn union(self, parties: usize, before: &[usize]) -> Union {
        let mut nodes = vec![0; parties];
        let order = self.nodes.iter().map(|(party, _)| {
            let index = before.get(*party).copied().unwrap_or(0) + nodes[*party];
            nodes[*party] += 1;
            (*party, index)
        });
        let order = order.collect();
        Union { nodes, order, merges: self.merges }
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
        let cases = (1..20).flat_map(|shards| (1..=shards.min(8)).map(move |ranks| (shards, ranks)));
        for (shards, ranks) in cases {
            let placement = Placement::even(shards, ranks);
            // All on one host, hosts of neighbours, and hosts whose ranks are not neighbours.
            for hosts in [|_: u32, _: u32| 0, |r, n| usize::from(r >= n / 2), |r, _| r as usize % 3] {
                let hosts: Vec<usize> = (0..ranks).map(|r| hosts(r, ranks)).collect();
                let plan = |rank| Plan::new(&placement, rank, Reduction::Exact, &hosts);
                let plans: Vec<_> = (0..ranks).map(|r| plan(Rank(r))).collect();
                let nodes: Vec<Vec<String>> = plans
                    .iter()
                    .zip(0..)
                    .map(|(plan, r)| {
                        let mut leaves: Vec<_> = placement.range(Rank(r)).map(|s| s.to_string()).collect();
                        apply(&mut leaves, &plan.local);
                        assert_eq!(plan.kept.len(), plan.ranks.nodes[r as usize]);
                        plan.kept.iter().map(|&k| leaves[k].clone()).collect()
                    })
                    .collect();
                let unite = |union: &Union, parties: &[Vec<String>]| {
                    let mut all: Vec<_> = union.order.iter().map(|&(p, n)| parties[p][n].clone()).collect();
                    apply(&mut all, &union.merges);
                    all[0].clone()
                };
                assert_eq!(unite(&plans[0].ranks, &nodes), reference(0, shards), "{shards} on {ranks}");
                let Some(two) = &plans[0].hosts else { continue };
                let count = hosts.iter().max().unwrap() + 1;
                let by_host: Vec<Vec<String>> = (0..count)
                    .map(|host| {
                        let mates: Vec<_> = (0..ranks as usize).filter(|&r| hosts[r] == host).collect();
                        let nodes: Vec<_> = mates.iter().map(|&r| nodes[r].clone()).collect();
                        let within = &plans[mates[0]].hosts.as_ref().unwrap().within;
                        within.iter().map(|union| unite(union, &nodes)).collect()
                    })
                    .collect();
                assert_eq!(unite(&two.among, &by_host), reference(0, shards), "{shards} on {hosts:?}");
            }
        }
    }

    #[test]
    fn aligned_ranks_contribute_one_node_each() {
        let nodes = |ranks, reduction| {
            let hosts = vec![0; ranks as usize];
            Plan::new(&Placement::even(8, ranks), Rank(1), reduction, &hosts).ranks.nodes
        };
        assert_eq!(nodes(4, Reduction::Exact), [1, 1, 1, 1]);
        assert_eq!(nodes(3, Reduction::Exact), [2, 2, 1]);
        assert_eq!(nodes(3, Reduction::Fast), [1, 1, 1]);
    }
}
