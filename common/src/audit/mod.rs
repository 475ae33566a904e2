//! The audit of a job: which samples each logical shard was really given in each committed step, and the proof that
//! every sample counted exactly once per epoch.
//!
//! Lanes hash the sample ids that they were handed, all ranks learn all shards' hashes when a phase is committed, and
//! rank 0 reports them with the step. The coordinator keeps them in `audit.jsonl`, with a line for every generation:
//! what an older generation committed beyond the position from which a newer one starts has been undone. [`check`]
//! works out the same from the job file alone and compares. It shares the sampler's permutation with the training, and
//! sees to it by itself that this is a permutation.

mod check;
mod line;
mod samples;

pub use check::{Checker, Proof, Violation, check};
pub use line::{AuditEntry, AuditLine, AuditStart};
pub use samples::{ShardSamples, StepAudit};
