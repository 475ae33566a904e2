//! One membership of a job, from its start until every rank has ended or is gone.

use crate::cause::{Cause, Gone, Who};
use crate::record::{Ending, JobRecord};
use lockstep_common::ids::{Generation, Rank, WorkerId};
use lockstep_common::placement::Placement;
use lockstep_common::wire::{Outcome, StopMode};

/// What a rank does.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum MemberState {
    /// Connected and at work.
    Present,
    /// Not connected. It may be at work all the same: a job does not need its coordinator.
    Away {
        /// Since when.
        since_ms: u64,
        /// How long it is waited for once others have ended.
        until_ms: u64,
    },
    /// It has come back without its work; how that ended may still be told.
    Forgotten {
        /// How long that is waited for.
        until_ms: u64,
    },
    /// It has said how it ended.
    Ended(Outcome),
    /// Not waited for any longer.
    Gone(Gone),
}

impl MemberState {
    /// Whether the membership is not over before something becomes of this rank.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self, Self::Present | Self::Away { .. } | Self::Forgotten { .. })
    }

    /// Whether it is sure that the rank does not step in this membership any more. A step needs all ranks, so from then on
    /// none of them commits one.
    fn is_fence(&self) -> bool {
        match self {
            Self::Ended(_) => true,
            Self::Gone(how) => how.is_certain(),
            _ => false,
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) worker: WorkerId,
    pub(crate) state: MemberState,
    /// When it counts as gone if it still has not ended: a peer has named it as the culprit.
    pub(crate) accused_until_ms: Option<u64>,
    /// How many peers have named it.
    pub(crate) accusers: u32,
}

/// A membership at work.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    pub(crate) generation: Generation,
    /// By rank.
    pub(crate) members: Vec<Member>,
    pub(crate) placement: Placement,
    /// What the ranks have been told, if they have been told to stop.
    pub(crate) stop: Option<StopMode>,
    /// When ranks that were told to abort and still have not ended count as lost.
    pub(crate) abort_by_ms: Option<u64>,
    /// When its first step was reported.
    pub(crate) steps_since_ms: Option<u64>,
}

impl Live {
    pub(crate) fn new(
        generation: Generation,
        workers: &[WorkerId],
        placement: Placement,
        state: &MemberState,
    ) -> Self {
        let member = |&worker| Member { worker, state: state.clone(), accused_until_ms: None, accusers: 0 };
        let members = workers.iter().map(member).collect();
        Self { generation, members, placement, stop: None, abort_by_ms: None, steps_since_ms: None }
    }

    pub(crate) fn rank_of(&self, worker: WorkerId) -> Option<usize> {
        self.members.iter().position(|m| m.worker == worker)
    }

    /// The connected ranks that have not ended.
    pub(crate) fn present(&self) -> impl Iterator<Item = WorkerId> {
        self.members.iter().filter(|m| m.state == MemberState::Present).map(|m| m.worker)
    }

    /// Whether it is sure that no rank commits a step of this membership any more.
    pub(crate) fn is_fenced(&self) -> bool {
        self.members.iter().any(|m| m.state.is_fence())
    }
}

/// What becomes of a job whose membership is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Finished,
    Failed { error: String },
    Cancelled,
    Paused,
    Again { cause: Cause },
}

/// Judges a membership; `None` while a rank is still at work.
///
/// The order matters. An error that would come back outweighs all else. A finished job is finished, whatever was asked
/// of it in its last moments. No other membership takes over before it is sure that this one is over.
pub(crate) fn verdict(record: &JobRecord, live: &Live, host: impl Fn(WorkerId) -> String) -> Option<Verdict> {
    let members = &live.members;
    if members.iter().any(|m| m.state.is_open()) {
        return None;
    }
    if let Some(Ending::Fail { error }) = &record.ending {
        return Some(Verdict::Failed { error: error.clone() });
    }
    if let Some(digest) = &record.weights_digest {
        return Some(match differing_rank(digest, members) {
            Some(rank) => {
                let worker = members[rank].worker;
                let who = Who { rank: Rank(rank as u32), worker, host: host(worker) };
                Verdict::Failed {
                    error: format!(
                        "{who} ended with other weights than rank 0: the replicas have diverged; check that host's memory \
                         and that all workers run the same release"
                    ),
                }
            }
            None => Verdict::Finished,
        });
    }
    match &record.ending {
        Some(Ending::Cancel) => Some(Verdict::Cancelled),
        Some(Ending::Pause) => live.is_fenced().then_some(Verdict::Paused),
        Some(Ending::Next { cause, .. }) => live.is_fenced().then(|| Verdict::Again { cause: cause.clone() }),
        Some(Ending::Fail { .. }) | None => {
            live.is_fenced().then_some(Verdict::Again { cause: Cause::AllLeft })
        }
    }
}

fn differing_rank(expected: &str, members: &[Member]) -> Option<usize> {
    members.iter().position(|m| match &m.state {
        MemberState::Ended(Outcome::Finished { weights_digest, .. }) => weights_digest != expected,
        _ => false,
    })
}
