//! What processes say to each other: a preamble with the protocol version, then size-capped frames of bincode.

mod codec;
mod flight;
mod messages;
mod requests;
mod summary;

pub use codec::{
    FrameError, MAX_FRAME_BYTES, PROTOCOL, decode, encode, read_frame, read_preamble, write_frame,
    write_preamble,
};
pub use flight::{FlightReport, FlightSummary, InFlight, Missing, PastCollective, RankFlight};
pub use messages::{
    Assignment, DatasetBrief, Following, FromWorker, Held, InterfaceAddress, LEASE_GRACE_MS, LEASE_MARGIN_MS,
    MAX_ADDRESSES, Outcome, Pace, Peer, Position, Register, Resumption, Running, StepRecord, StopMode,
    ToWorker,
};
pub use requests::{
    CheckpointPart, FileHead, NOT_STORED, PartFile, Refusal, Request, Response, TokenPurpose,
};
pub use summary::{CheckpointFailure, JobState, JobSummary, LogLine, Straggler, WorkerSummary};
