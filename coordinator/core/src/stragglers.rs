//! Slow ranks: named, and given fewer logical shards where that makes the steps shorter.

use crate::cause::Cause;
use crate::core::Core;
use crate::generation::MemberState;
use crate::pace::rebalanced;
use crate::record::Ending;
use lockstep_common::ids::{JobId, Rank, WorkerId};
use lockstep_common::placement::Placement;
use lockstep_common::wire::{JobState, Pace, StopMode, Straggler};

impl Core {
    /// The job's ranks that are persistently slow.
    pub fn stragglers(&self, id: JobId) -> Vec<Straggler> {
        let Some((job, live)) = self.jobs.get(&id).and_then(|job| Some((job, job.live()?))) else {
            return Vec::new();
        };
        let straggler = |rank: usize| {
            let worker = live.members.get(rank)?.worker;
            Some(Straggler {
                rank: Rank(rank as u32),
                worker,
                host: self.workers.host(worker).to_owned(),
                times: job.paces.slowness(rank)?,
                pace: *job.paces.of(rank)?,
            })
        };
        job.paces.stragglers().filter_map(straggler).collect()
    }

    pub(crate) fn handle_pace(&mut self, worker: WorkerId, id: JobId, pace: Pace, now_ms: u64) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(rank) = job.live().and_then(|live| live.rank_of(worker)) else { return };
        let changed = job.paces.handle_report(rank, pace);
        let times = job.paces.slowness(rank).unwrap_or_default();
        let who = self.who(worker, rank);
        match changed {
            Some(true) => self.log(
                id,
                format!(
                    "{who} is a straggler: a shard takes it {times:.1} times as long as the others (data {:.3} s, forward \
                     {:.3} s, backward {:.3} s a step)",
                    pace.data, pace.forward, pace.backward
                ),
            ),
            Some(false) => self.log(id, format!("{who} is as fast as the others again")),
            None => {}
        }
        self.rebalance(id, now_ms);
    }

    /// Ends the membership at the next boundary if another placement would make the steps worth that much shorter.
    fn rebalance(&mut self, id: JobId, now_ms: u64) {
        let Some(job) = self.jobs.get(&id) else { return };
        let Some(live) = job.live().filter(|live| live.stop.is_none()) else { return };
        let uneven = {
            let sizes = live.placement.sizes();
            sizes.iter().max().zip(sizes.iter().min()).is_some_and(|(most, least)| most - least > 1)
        };
        let calm = job.record.ending.is_none() && job.record.state == JobState::Running;
        // A placement that was made for a straggler is looked at again when there is none any more.
        let reason = job.paces.stragglers().next().is_some() || uneven;
        let whole = live.members.iter().all(|m| m.state == MemberState::Present);
        if !calm || !reason || !whole || now_ms < job.rebalance_from_ms || !job.record.state_in_memory {
            return;
        }
        let owned = live.placement.sizes();
        let Some(sizes) = job.paces.shard_seconds().and_then(|seconds| rebalanced(&seconds, &owned)) else {
            return;
        };
        let less = (0..owned.len()).filter(|rank| sizes[*rank] < owned[*rank]);
        let Some(rank) = less.max_by_key(|rank| owned[*rank] - sizes[*rank]) else { return };
        let wanted = live.members.iter().map(|m| m.worker).zip(sizes.iter().copied()).collect();
        let cause = Cause::Rebalance {
            who: self.who(live.members[rank].worker, rank),
            from: owned[rank],
            to: sizes[rank],
        };
        let rebalance_from_ms = now_ms + self.config.rebalance_ms;
        if let Some(job) = self.jobs.get_mut(&id) {
            job.wanted = Some(wanted);
            job.rebalance_from_ms = rebalance_from_ms;
        }
        self.begin_ending(id, Ending::Next { cause, mode: StopMode::Boundary }, now_ms);
    }
}

/// The placement of `shards` on `workers`: as wanted, if it is these workers that it is wanted for, else even.
pub(crate) fn placement(shards: u32, workers: &[WorkerId], wanted: Option<&[(WorkerId, u32)]>) -> Placement {
    let size = |worker: &WorkerId| wanted?.iter().find(|(w, _)| w == worker).map(|(_, size)| *size);
    let sizes: Option<Vec<u32>> = workers.iter().map(size).collect();
    match sizes {
        Some(sizes) if sizes.iter().sum::<u32>() == shards => Placement::of_sizes(&sizes),
        _ => Placement::even(shards, workers.len() as u32),
    }
}
