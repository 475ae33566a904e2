//! What processes say to each other.

use crate::chain::{Exchange, State};
use lockstep_common::ids::{Generation, JobId, Rank};
use lockstep_common::wire::{FromWorker, Position, Register, StopMode, ToWorker};
use std::rc::Rc;

/// A message.
#[derive(Clone, Debug)]
pub(crate) enum Message {
    /// To the coordinator: opens a session.
    Register(Box<Register>),
    /// From the coordinator: the session is open.
    Welcome,
    /// To the coordinator.
    Report(Box<FromWorker>),
    /// To the coordinator: extends the lease.
    Ping { sent_ms: u64 },
    /// The answer.
    Pong { sent_ms: u64 },
    /// From the coordinator.
    Order(Box<ToWorker>),
    /// To the coordinator: a checkpoint.
    Put { request: u64, job: JobId, generation: Generation, state: State },
    /// To the coordinator: asks for a checkpoint.
    Get { request: u64, job: JobId, generation: Generation, step: u64 },
    /// From the coordinator, to either.
    Answer { request: u64, answer: Result<Option<State>, String> },
    /// The first word between two ranks.
    Hello { job: JobId, generation: Generation, rank: Rank },
    /// A rank's part of an exchange.
    Part(Rc<Part>),
    /// A rank leaves its group because something went wrong.
    Farewell { culprit: Option<Rank>, error: String },
    /// Asks a worker for the state that it has of a job; `None` asks for any.
    Ask { job: JobId, position: Option<Position> },
    /// The answer.
    Have(Option<State>),
    /// Asks a member for its state, and for its updates from then on.
    Follow { job: JobId, generation: Generation },
    /// An update, to a follower.
    Update { before: Position, contribution: u64, generation: Generation },
    /// The connection is closed.
    Closed,
}

/// A rank's part of an exchange.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) job: JobId,
    pub(crate) generation: Generation,
    pub(crate) rank: u32,
    pub(crate) position: Position,
    pub(crate) exchange: Exchange,
    /// The shards that the rank has computed, and of which samples.
    pub(crate) shards: Vec<(u32, Vec<u64>)>,
    /// The replica's digest.
    pub(crate) digest: u64,
    /// How it wants to stop, if it does.
    pub(crate) stop: Option<StopMode>,
    /// When the rank began with it.
    pub(crate) begun_ms: u64,
}

impl Message {
    /// How much longer than a short message it takes: it carries a replica's state.
    pub(crate) fn transfer_ms(&self) -> u64 {
        match self {
            Self::Put { .. } | Self::Have(Some(_)) | Self::Answer { answer: Ok(Some(_)), .. } => 120,
            _ => 0,
        }
    }
}

/// The mode that satisfies both.
pub(crate) fn stricter(a: Option<StopMode>, b: Option<StopMode>) -> Option<StopMode> {
    let weight = |mode: &StopMode| match mode {
        StopMode::Boundary => 0,
        StopMode::Checkpoint => 1,
        StopMode::Abort => 2,
    };
    a.into_iter().chain(b).max_by_key(weight)
}

impl Message {
    /// The message in a few words.
    pub(crate) fn brief(&self) -> String {
        match self {
            Self::Register(r) => format!("registers, running {:?}, holding {:?}", r.running, r.held),
            Self::Report(report) => match &**report {
                FromWorker::Steps { job, generation, records } => {
                    let last = records.last().map_or(0, |r| r.step);
                    format!("{job} {generation} has done step {last}")
                }
                other => format!("{other:?}"),
            },
            Self::Order(order) => match &**order {
                ToWorker::Start(a) => format!("start {} {} as {}", a.job, a.generation, a.rank),
                ToWorker::Follow(f) => format!("follow {} {}", f.job, f.generation),
                other => format!("{other:?}"),
            },
            Self::Part(p) => format!(
                "{} {} rank {}'s {:?} at {}{}",
                p.job,
                p.generation,
                p.rank,
                p.exchange,
                p.position,
                if p.stop.is_some() { ", which wants to stop" } else { "" }
            ),
            Self::Put { job, generation, state, .. } => {
                format!("stores {job} {generation} at {}", state.position)
            }
            other => format!("{other:?}"),
        }
    }
}
