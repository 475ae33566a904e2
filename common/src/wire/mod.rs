//! What processes say to each other: a preamble with the protocol version, then size-capped frames of bincode.

mod codec;
mod messages;

pub use codec::{
    FrameError, MAX_FRAME_BYTES, PROTOCOL, decode, encode, read_frame, read_preamble, write_frame,
    write_preamble,
};
pub use messages::{
    Assignment, CheckpointHead, DatasetBrief, FileHead, FromWorker, JobState, JobSummary, LogLine, Outcome,
    Peer, Refusal, Register, Request, Response, Resumption, Running, StepRecord, StopMode, ToWorker,
    TokenPurpose, WorkerSummary,
};
