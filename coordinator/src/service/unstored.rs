//! Checkpoints that could not be stored. A full disk refuses every one until somebody frees it: the first of a row is told,
//! the others are counted.

use lockstep_common::ids::JobId;
use std::collections::BTreeMap;

/// The rows of failures that go on, by job.
#[derive(Debug, Default)]
pub(super) struct Unstored(BTreeMap<JobId, Row>);

/// Failures in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// The step of the first.
    pub(super) first_step: u64,
    /// The step of the newest.
    pub(super) step: u64,
    /// What kept that from being stored.
    pub(super) error: String,
    /// How many checkpoints they are.
    pub(super) checkpoints: u64,
}

impl Unstored {
    /// The job's checkpoint of `step` could not be stored. Returns a line for its log, if it is the first in a row.
    pub(super) fn failed(&mut self, job: JobId, step: u64, error: &str) -> Option<String> {
        if let Some(row) = self.0.get_mut(&job) {
            // The last one is tried again and again.
            row.checkpoints += u64::from(row.step != step);
            (row.step, row.error) = (step, error.to_owned());
            return None;
        }
        self.0.insert(job, Row { first_step: step, step, error: error.to_owned(), checkpoints: 1 });
        Some(format!(
            "the checkpoint of step {step} could not be stored: {error}; further failures are counted until one is stored"
        ))
    }

    /// The job's checkpoint of `step` is stored. Returns a line for its log, if others before it were not.
    pub(super) fn stored(&mut self, job: JobId, step: u64) -> Option<String> {
        let Row { checkpoints, first_step, error, .. } = self.0.remove(&job)?;
        let failed = match checkpoints {
            1 => format!("that of step {first_step} could not be stored"),
            _ => format!("{checkpoints} from step {first_step} on could not be stored"),
        };
        Some(format!("the checkpoint of step {step} is stored; before it, {failed}: {error}"))
    }

    /// The job's row of failures, if there is one.
    pub(super) fn row(&self, job: JobId) -> Option<&Row> {
        self.0.get(&job)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const J1: JobId = JobId(1);

    #[test]
    fn a_row_of_failures_is_told_once_and_counted_when_it_ends() {
        let mut unstored = Unstored::default();
        assert_eq!(unstored.stored(J1, 10), None);
        let told = unstored.failed(J1, 20, "full");
        assert!(
            told.is_some_and(|line| line.starts_with("the checkpoint of step 20 could not be stored: full"))
        );
        assert_eq!([30, 40, 40].map(|step| unstored.failed(J1, step, "still full")), [None, None, None]);
        assert!(unstored.failed(JobId(2), 5, "full").is_some(), "each job has its own row");
        let row = unstored.row(J1).expect("a row");
        assert_eq!(
            (row.first_step, row.step, row.checkpoints, row.error.as_str()),
            (20, 40, 3, "still full")
        );
        assert_eq!(
            unstored.stored(J1, 50).as_deref(),
            Some(
                "the checkpoint of step 50 is stored; before it, 3 from step 20 on could not be stored: still full"
            )
        );
        assert_eq!(unstored.row(J1), None);
        assert_eq!(unstored.stored(J1, 60), None);
        assert!(unstored.failed(J1, 70, "full again").is_some(), "a new row");
    }
}
