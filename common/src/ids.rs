//! Identifiers, one newtype each, so that a rank is never passed where a logical shard is meant.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

number_id!(
    /// A job in a coordinator's queue, numbered from 1 in the order of submission.
    JobId(u64), "j"
);
number_id!(
    /// A worker known to a coordinator, numbered from 1 in the order of enrolment.
    WorkerId(u64), "w"
);
number_id!(
    /// A membership of a job. It grows by one whenever the set of workers or the owner of a shard changes.
    Generation(u64), "g"
);
number_id!(
    /// A worker's place within one generation of one job, from 0.
    Rank(u32), "rank "
);
number_id!(
    /// One of the V fixed parts of every global batch, from 0.
    LogicalShard(u32), "shard "
);

/// What the processes of one host have in common: those with equal keys can share memory and reach each other over
/// loopback. Made by [`crate::net::host_key`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostKey(pub String);

impl HostKey {
    /// The part that processes of one running machine share, whatever keeps them apart.
    pub fn machine(&self) -> &str {
        self.0.split(':').next().unwrap_or_default()
    }
}

macro_rules! parse_prefixed {
    ($name:ident, $prefix:literal) => {
        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(s: &str) -> Result<Self, String> {
                let digits = s.strip_prefix($prefix).unwrap_or(s);
                digits
                    .parse()
                    .map($name)
                    .map_err(|_| format!(concat!("`{}` is not an id such as `", $prefix, "1`"), s))
            }
        }
    };
}

parse_prefixed!(JobId, "j");
parse_prefixed!(WorkerId, "w");

impl Rank {
    /// The rank as an index into per-rank tables.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl LogicalShard {
    /// The shard as an index into per-shard tables.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}
