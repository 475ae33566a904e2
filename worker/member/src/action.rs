//! What comes out of the machine.

use lockstep_common::ids::{Generation, JobId};
use lockstep_common::wire::{Assignment, Following, FromWorker, StopMode};

/// Something that the shell has to do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Begin a session; none runs. Its end is [`Member::handle_session_ended`](crate::Member::handle_session_ended).
    Begin {
        /// What to take part in.
        assignment: Box<Assignment>,
        /// Where its state comes from.
        start: Start,
    },
    /// Have the session end in good order.
    Stop {
        /// How.
        mode: StopMode,
    },
    /// Have the session end at once.
    Abort {
        /// Why, for people.
        reason: String,
    },
    /// Begin to follow a job; nobody is followed. How far that is, is
    /// [`Member::handle_followed`](crate::Member::handle_followed).
    Follow(Box<Following>),
    /// Follow nobody any more, and drop the copy.
    Unfollow,
    /// Drop what is kept of the last session.
    Drop,
    /// Report to the coordinator, now or once it is back.
    Tell(FromWorker),
    /// Ask the coordinator that is there for a word; the answer is [`Member::handle_word`](crate::Member::handle_word).
    Ping {
        /// When, by the machine's clock.
        sent_ms: u64,
    },
    /// Leave for good. Nothing comes after it.
    Leave(Leave),
}

/// Where a session's state comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// From the job file or a checkpoint, as the assignment says, or from the peers that it names.
    Elsewhere,
    /// From what the last session has left: it is at the assignment's position.
    Kept,
    /// From the copy that follows the job, brought up to the assignment's position; from the peers that the assignment
    /// names where that fails.
    Followed,
}

/// Why a worker leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leave {
    /// It was asked to, and has nothing left to do but hand in its reports.
    Done,
    /// It was asked to, and the coordinator has been away for too long to wait for it.
    CoordinatorAway,
    /// The coordinator will not have it back.
    Dismissed {
        /// Why.
        reason: String,
    },
}

/// Why an order was not obeyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// A newer generation of the job has been seen.
    Stale {
        /// The job.
        job: JobId,
        /// The order's generation.
        generation: Generation,
        /// The newest one seen.
        newest: Generation,
    },
    /// It has been obeyed already.
    Repeated,
    /// It concerns a session that does not run.
    NotRunning {
        /// The job.
        job: JobId,
        /// Its generation.
        generation: Generation,
    },
    /// A session runs.
    Busy,
    /// This worker is leaving.
    Leaving,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stale { job, generation, newest } => {
                write!(f, "{generation} of {job} is over, {newest} has begun")
            }
            Self::Repeated => write!(f, "it has been obeyed already"),
            Self::NotRunning { job, generation } => write!(f, "{generation} of {job} does not run here"),
            Self::Busy => write!(f, "a session runs"),
            Self::Leaving => write!(f, "this worker is leaving"),
        }
    }
}
