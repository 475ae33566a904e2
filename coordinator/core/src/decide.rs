//! Which waiting job starts on which workers, and why another one waits.

use lockstep_common::ids::{JobId, WorkerId};
use std::fmt;

/// A job in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The job.
    pub job: JobId,
    /// It does not start with fewer workers.
    pub min: u32,
    /// It takes no more workers.
    pub max: u32,
}

/// What becomes of a waiting job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It starts on these workers, in the order of their ranks.
    Start(Vec<WorkerId>),
    /// It stays in the queue.
    Wait(WaitReason),
}

/// Why a job stays in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitReason {
    /// It is first, and there are too few idle workers.
    Workers {
        /// How many it needs.
        needed: u32,
        /// How many are idle.
        free: u32,
    },
    /// An earlier job waits.
    Behind {
        /// Its place in the queue, from 1.
        position: usize,
    },
}

impl fmt::Display for WaitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workers { needed, free } => {
                let workers = if *needed == 1 { "worker" } else { "workers" };
                let are = if *free == 1 { "is" } else { "are" };
                write!(f, "needs {needed} {workers}, {free} {are} free")
            }
            Self::Behind { position } => write!(f, "position {position} in the queue"),
        }
    }
}

/// Decides over the whole `queue`, the earliest job first, with `idle` workers in ascending order.
///
/// First come, first served, and all or nothing: a job takes its workers at once, up to its maximum. A later job never
/// overtakes one that waits, so that a job that needs many workers is not starved by small ones.
pub fn decide(queue: &[Waiting], idle: &[WorkerId]) -> Vec<(JobId, Decision)> {
    let mut free = idle;
    let mut waiting = 0;
    let mut decisions = Vec::with_capacity(queue.len());
    for job in queue {
        let count = free.len().min(job.max as usize);
        let decision = if waiting > 0 {
            waiting += 1;
            Decision::Wait(WaitReason::Behind { position: waiting })
        } else if count == 0 || count < job.min as usize {
            waiting = 1;
            Decision::Wait(WaitReason::Workers { needed: job.min, free: free.len() as u32 })
        } else {
            let (taken, rest) = free.split_at(count);
            free = rest;
            Decision::Start(taken.to_vec())
        };
        decisions.push((job.job, decision));
    }
    decisions
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The decisions for jobs (min, max) and idle workers, in words.
    fn check(jobs: &[(u32, u32)], idle: &[u64], expected: &[&str]) {
        let queue: Vec<_> =
            jobs.iter().zip(1..).map(|(&(min, max), n)| Waiting { job: JobId(n), min, max }).collect();
        let idle: Vec<_> = idle.iter().copied().map(WorkerId).collect();
        let words: Vec<_> = decide(&queue, &idle)
            .into_iter()
            .map(|(job, decision)| match decision {
                Decision::Start(workers) => {
                    let names: Vec<_> = workers.iter().map(ToString::to_string).collect();
                    format!("{job} on {}", names.join(" "))
                }
                Decision::Wait(reason) => format!("{job} {reason}"),
            })
            .collect();
        assert_eq!(words, expected);
    }

    #[test]
    fn jobs_start_in_order_with_all_their_workers_or_wait() {
        check(&[], &[1], &[]);
        check(&[(1, 8)], &[], &["j1 needs 1 worker, 0 are free"]);
        check(&[(2, 8)], &[4], &["j1 needs 2 workers, 1 is free"]);
        check(
            &[(2, 2), (1, 2), (1, 1)],
            &[1, 3, 5],
            &["j1 on w1 w3", "j2 on w5", "j3 needs 1 worker, 0 are free"],
        );
    }

    #[test]
    fn a_small_job_never_overtakes_a_large_one() {
        check(
            &[(4, 8), (1, 1), (1, 1)],
            &[1, 2],
            &["j1 needs 4 workers, 2 are free", "j2 position 2 in the queue", "j3 position 3 in the queue"],
        );
    }
}
