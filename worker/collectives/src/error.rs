//! Why a collective, and with it its group, failed.

use crate::tag::Tag;
use lockstep_common::ids::Rank;
use std::fmt;
use std::time::Duration;

/// A failed collective.
///
/// All but [`TagInUse`](Self::TagInUse) and [`Misuse`](Self::Misuse) end the group: every collective of it,
/// pending or future, returns the first cause.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// The connection to a rank broke.
    #[error("lost {rank}{}: {reason}", .at.map(|at| format!(" {at}")).unwrap_or_default())]
    PeerLost {
        /// The rank that is gone.
        rank: Rank,
        /// Where this rank was then; `None` before the first collective.
        at: Option<Moment>,
        /// What the transport saw.
        reason: String,
    },
    /// A rank left the group in good order while its part was still needed.
    #[error("{rank} left the group{}", at(.tag))]
    PeerLeft {
        /// The rank that left.
        rank: Rank,
        /// The collective that needed it.
        tag: Option<Tag>,
    },
    /// A rank is connected and silent for longer than the job's time-out.
    #[error("{} {tag} after {:.1} s", stuck(.missing, *.entered), .waited.as_secs_f64())]
    TimedOut {
        /// The collective that waited.
        tag: Tag,
        /// The ranks whose part is missing.
        missing: Vec<Rank>,
        /// Whether they sent a first part; otherwise they have not entered the collective.
        entered: bool,
        /// How long this rank waited.
        waited: Duration,
    },
    /// A rank sent what the protocol does not allow.
    #[error("{rank} broke the protocol: {detail}")]
    Protocol {
        /// The sender.
        rank: Rank,
        /// What was wrong.
        detail: String,
    },
    /// A rank's part of a collective has another length, type or operation than this rank's.
    #[error("{rank} disagrees about {tag}: {detail}")]
    Mismatch {
        /// The rank with the other view.
        rank: Rank,
        /// The collective.
        tag: Tag,
        /// Both views.
        detail: String,
    },
    /// Another rank ended the group.
    #[error("{by} ended the group: {message}")]
    Forwarded {
        /// The rank that told us.
        by: Rank,
        /// The rank at fault in its view.
        culprit: Option<Rank>,
        /// Its first cause.
        message: String,
    },
    /// This rank ended the group.
    #[error("{0}")]
    Aborted(String),
    /// The tag names a collective that is still in flight.
    #[error("{0} is already in flight: every collective of a generation needs a tag of its own")]
    TagInUse(Tag),
    /// The call itself is wrong.
    #[error("{tag}: {detail}")]
    Misuse {
        /// The collective.
        tag: Tag,
        /// What to change.
        detail: String,
    },
    /// A GPU, or NCCL, failed in a reduction of device memory. NCCL does not say which rank is at fault.
    #[error("{detail} in {tag}")]
    Device {
        /// The collective.
        tag: Tag,
        /// What failed.
        detail: String,
    },
    /// The group could not be formed.
    #[error("no connection to {rank}: {detail}")]
    Connect {
        /// The rank that could not be reached.
        rank: Rank,
        /// Why.
        detail: String,
    },
    /// The group's description contradicts itself.
    #[error("this group cannot be formed: {0}")]
    Config(String),
}

/// Where in its job a rank is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// In this collective, and perhaps in younger ones.
    In(Tag),
    /// In none: this was the last that it completed.
    After(Tag),
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::In(tag) => write!(f, "in {tag}"),
            Self::After(tag) => write!(f, "after {tag}"),
        }
    }
}

impl CollectiveError {
    /// The rank at fault, where one is known.
    pub fn culprit(&self) -> Option<Rank> {
        match self {
            Self::PeerLost { rank, .. }
            | Self::PeerLeft { rank, .. }
            | Self::Protocol { rank, .. }
            | Self::Mismatch { rank, .. }
            | Self::Connect { rank, .. } => Some(*rank),
            Self::TimedOut { missing, .. } => missing.first().copied(),
            Self::Forwarded { culprit, .. } => *culprit,
            Self::Aborted(_)
            | Self::TagInUse(_)
            | Self::Misuse { .. }
            | Self::Device { .. }
            | Self::Config(_) => None,
        }
    }

    /// The first cause, without the ranks that passed it on.
    pub(crate) fn first_cause(&self) -> String {
        match self {
            Self::Forwarded { message, .. } => message.clone(),
            other => other.to_string(),
        }
    }
}

fn at(tag: &Option<Tag>) -> String {
    tag.map(|tag| format!(" in {tag}")).unwrap_or_default()
}

fn stuck(missing: &[Rank], entered: bool) -> String {
    let names: Vec<_> = missing.iter().map(Rank::to_string).collect();
    let verb = match (entered, missing.len() > 1) {
        (true, _) => "stopped in",
        (false, true) => "have not entered",
        (false, false) => "has not entered",
    };
    format!("{} {verb}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tag::TagKind;

    #[test]
    fn messages_name_rank_step_phase_and_bucket() {
        let tag = Tag::new(41, 1, TagKind::Gradient).index(3);
        let timed_out = CollectiveError::TimedOut {
            tag,
            missing: vec![Rank(2)],
            entered: false,
            waited: Duration::from_secs(10),
        };
        assert_eq!(
            timed_out.to_string(),
            "rank 2 has not entered gradient bucket 3 of step 41, phase 1 after 10.0 s"
        );
        let lost = |at| {
            let lost = CollectiveError::PeerLost { rank: Rank(1), at, reason: "timed out".into() };
            lost.to_string()
        };
        let bucket = "gradient bucket 3 of step 41, phase 1";
        assert_eq!(lost(Some(Moment::In(tag))), format!("lost rank 1 in {bucket}: timed out"));
        assert_eq!(lost(Some(Moment::After(tag))), format!("lost rank 1 after {bucket}: timed out"));
        assert_eq!(lost(None), "lost rank 1: timed out");
    }
}
