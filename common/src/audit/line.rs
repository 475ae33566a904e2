//! The lines of `audit.jsonl`.

use super::samples::ShardSamples;
use crate::ids::Generation;
use crate::wire::Position;
use serde::{Deserialize, Serialize};

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AuditLine {
    /// A generation starts.
    Start(AuditStart),
    /// A step is committed.
    Entry(AuditEntry),
}

/// A generation starts: what older ones committed beyond `from` has been undone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditStart {
    /// Which.
    pub generation: Generation,
    /// How far the state is from which it starts.
    pub from: Position,
    /// The last step before this line that is in the audit and has not been undone. If it is below `from`, the
    /// generation's first reports fill the gap: its members know of what the last generation had no time to report.
    pub audited: u64,
    /// The digest of the training set's manifest.
    pub dataset: String,
}

/// A committed step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditEntry {
    /// The generation that committed it.
    pub generation: Generation,
    /// The step, from 1.
    pub step: u64,
    /// Its epoch, from 1.
    pub epoch: u64,
    /// What each logical shard was given.
    pub shards: Vec<ShardSamples>,
}

impl AuditLine {
    /// The line, with its end.
    pub fn to_json(&self) -> String {
        // Numbers and strings in structures: there is nothing in them that JSON cannot hold.
        serde_json::to_string(self).unwrap_or_default() + "\n"
    }

    /// The line in `json`, without its end.
    pub fn from_json(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back_as_what_they_were() {
        let from = Position { step: 4, phase: 1 };
        let start = AuditStart { generation: Generation(2), from, audited: 3, dataset: "ab".to_owned() };
        let shards = vec![ShardSamples { count: 16, hash: (1 << 52) - 1 }, ShardSamples::default()];
        let entry = AuditEntry { generation: Generation(2), step: 5, epoch: 1, shards };
        for line in [AuditLine::Start(start), AuditLine::Entry(entry)] {
            let json = line.to_json();
            assert_eq!(AuditLine::from_json(json.trim_end().as_bytes()).unwrap(), line, "{json}");
        }
        for bad in ["", "{}", "{\"generation\":1}", "null", "{\"generation\":1,\"step\":1,\"epoch\":1}"] {
            assert!(AuditLine::from_json(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
