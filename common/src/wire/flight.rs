//! Where a job's collectives are: what each rank tells of its own, and what the coordinator makes of it.

use crate::ids::{Generation, Rank, WorkerId};
use serde::{Deserialize, Serialize};

/// Where one rank's collectives are. All times end when the report was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlightReport {
    /// Those in flight, the oldest first; when the group has failed, those that were in flight then. At most
    /// [`FlightReport::MAX_IN_FLIGHT`].
    pub in_flight: Vec<InFlight>,
    /// How many there are in flight, the ones left out too.
    pub in_flight_count: u32,
    /// Those that have ended, the newest first. At most [`FlightReport::MAX_LAST`].
    pub last: Vec<PastCollective>,
    /// Whether something came, or it computed, in the second before.
    pub gets_on: bool,
    /// The first cause of the group's end, if it has failed.
    pub failure: Option<String>,
}

impl FlightReport {
    /// The most collectives in flight that a report lists.
    pub const MAX_IN_FLIGHT: usize = 8;
    /// The most ended collectives that a report lists.
    pub const MAX_LAST: usize = 16;
    /// The most missing ranks that are listed of one collective.
    pub const MAX_MISSING: usize = 64;
    /// The longest name of a collective, in bytes.
    pub const MAX_NAME_BYTES: usize = 128;
    /// The longest cause of a failure, in bytes.
    pub const MAX_FAILURE_BYTES: usize = 1024;

    /// The report with whatever is beyond these limits cut off, whoever made it.
    pub fn bounded(mut self) -> Self {
        self.in_flight.truncate(Self::MAX_IN_FLIGHT);
        self.last.truncate(Self::MAX_LAST);
        for collective in &mut self.in_flight {
            collective.missing.truncate(Self::MAX_MISSING);
            cut(&mut collective.name, Self::MAX_NAME_BYTES);
            cut(&mut collective.signature, Self::MAX_NAME_BYTES);
        }
        for collective in &mut self.last {
            cut(&mut collective.name, Self::MAX_NAME_BYTES);
            cut(&mut collective.signature, Self::MAX_NAME_BYTES);
        }
        if let Some(failure) = &mut self.failure {
            cut(failure, Self::MAX_FAILURE_BYTES);
        }
        self
    }
}

fn cut(text: &mut String, max_bytes: usize) {
    text.truncate(text.floor_char_boundary(max_bytes));
}

/// A collective that a rank is in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InFlight {
    /// Such as `gradient bucket 3 of step 41, phase 0`; the same on all ranks.
    pub name: String,
    /// Operation and element type, such as `sum of f32`.
    pub signature: String,
    /// The size of this rank's part.
    pub bytes: u64,
    /// How long ago this rank entered it, in milliseconds.
    pub waits_ms: u64,
    /// The ranks whose part is missing.
    pub missing: Vec<Missing>,
}

/// A rank whose part of a collective is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// The rank.
    pub rank: Rank,
    /// Whether it has sent a first part.
    pub entered: bool,
}

/// A collective that has ended on a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastCollective {
    /// Such as `gradient bucket 3 of step 41, phase 0`.
    pub name: String,
    /// Operation and element type, such as `sum of f32`.
    pub signature: String,
    /// The size of this rank's part.
    pub bytes: u64,
    /// From entering it to its end, in microseconds.
    pub took_us: u64,
    /// How long ago it ended, in milliseconds.
    pub ago_ms: u64,
    /// Whether it ended well.
    pub completed: bool,
}

/// What a job's ranks wait for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlightSummary {
    /// The membership that it is about.
    pub generation: Generation,
    /// What is being waited for, the first cause first; of a failed membership, what was when it failed.
    pub waiting: Vec<String>,
    /// Why the membership failed, if it has.
    pub failure: Option<String>,
    /// Its ranks in order.
    pub ranks: Vec<RankFlight>,
}

/// Where a rank is, as far as it has told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankFlight {
    /// The rank.
    pub rank: Rank,
    /// The worker.
    pub worker: WorkerId,
    /// Its host's name.
    pub host: String,
    /// The newest collective that it has completed.
    pub completed: Option<String>,
    /// How long ago.
    pub completed_s: Option<f64>,
    /// The oldest collective that it is in.
    pub in_flight: Option<String>,
    /// For how long.
    pub waits_s: Option<f64>,
    /// The ranks that this collective waits for.
    pub waits_for: Vec<Rank>,
    /// How long ago it told this; `None` if it has told nothing yet.
    pub told_s: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::encode;

    #[test]
    fn the_largest_report_stays_small() {
        let long = "ä".repeat(4000);
        let missing = vec![Missing { rank: Rank(u32::MAX), entered: true }; 1000];
        let waits = InFlight {
            name: long.clone(),
            signature: long.clone(),
            bytes: u64::MAX,
            waits_ms: u64::MAX,
            missing,
        };
        let past = PastCollective {
            name: long.clone(),
            signature: long.clone(),
            bytes: u64::MAX,
            took_us: u64::MAX,
            ago_ms: u64::MAX,
            completed: true,
        };
        let report = FlightReport {
            in_flight: vec![waits; 100],
            in_flight_count: u32::MAX,
            last: vec![past; 1000],
            gets_on: true,
            failure: Some(long),
        };
        let bytes = encode(&report.bounded()).unwrap().len();
        assert!(bytes < 16 << 10, "{bytes} bytes");
    }
}
