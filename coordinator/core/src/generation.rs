//! One membership of a job, from its start until every rank has ended or is gone.

use crate::record::{Ending, JobRecord};
use lockstep_common::ids::{Generation, WorkerId};
use lockstep_common::wire::{Outcome, StopMode};

/// What a rank does.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum MemberState {
    /// Connected and at work.
    Present,
    /// Not connected. It may be at work all the same: a job does not need its coordinator.
    Away {
        /// When it counts as lost.
        until_ms: u64,
        /// Whether it is the coordinator that was away.
        restart: bool,
    },
    /// It has said how it ended.
    Ended(Outcome),
    /// Lost.
    Gone,
}

#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) worker: WorkerId,
    pub(crate) state: MemberState,
}

/// A membership at work.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    pub(crate) generation: Generation,
    /// By rank.
    pub(crate) members: Vec<Member>,
    /// What the ranks have been told, if they have been told to stop.
    pub(crate) stop: Option<StopMode>,
    /// When ranks that were told to abort and still have not ended count as lost.
    pub(crate) abort_by_ms: Option<u64>,
}

impl Live {
    pub(crate) fn new(generation: Generation, workers: &[WorkerId], state: &MemberState) -> Self {
        let members = workers.iter().map(|&worker| Member { worker, state: state.clone() }).collect();
        Self { generation, members, stop: None, abort_by_ms: None }
    }

    pub(crate) fn rank_of(&self, worker: WorkerId) -> Option<usize> {
        self.members.iter().position(|m| m.worker == worker)
    }

    /// The connected ranks that have not ended.
    pub(crate) fn present(&self) -> impl Iterator<Item = WorkerId> {
        self.members.iter().filter(|m| m.state == MemberState::Present).map(|m| m.worker)
    }
}

/// What becomes of a job whose membership is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Finished,
    Failed { error: String },
    Cancelled,
    Paused,
    Again { reason: String, planned: bool },
}

/// Judges a membership; `None` while a rank is still at work.
///
/// The order matters. An error that would come back outweighs all else. A finished job is finished, whatever was asked
/// of it in its last moments.
pub(crate) fn verdict(record: &JobRecord, members: &[Member]) -> Option<Verdict> {
    if members.iter().any(|m| matches!(m.state, MemberState::Present | MemberState::Away { .. })) {
        return None;
    }
    if let Some(Ending::Fail { error }) = &record.ending {
        return Some(Verdict::Failed { error: error.clone() });
    }
    if let Some(digest) = &record.weights_digest {
        return Some(match differing_rank(digest, members) {
            Some(rank) => Verdict::Failed {
                error: format!(
                    "rank {rank} ({}) ended with other weights than rank 0: the replicas have diverged; check that \
                     host's memory and that all workers run the same release",
                    members[rank].worker
                ),
            },
            None => Verdict::Finished,
        });
    }
    Some(match &record.ending {
        Some(Ending::Cancel) => Verdict::Cancelled,
        Some(Ending::Pause) => Verdict::Paused,
        Some(Ending::Recover { reason, planned }) => {
            Verdict::Again { reason: reason.clone(), planned: *planned }
        }
        Some(Ending::Fail { .. }) | None => {
            Verdict::Again { reason: "all workers left before the last step".to_owned(), planned: false }
        }
    })
}

fn differing_rank(expected: &str, members: &[Member]) -> Option<usize> {
    members.iter().position(|m| match &m.state {
        MemberState::Ended(Outcome::Finished { weights_digest, .. }) => weights_digest != expected,
        _ => false,
    })
}
