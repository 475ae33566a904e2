//! Names of datasets.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The longest name in bytes: with a suffix it must fit a file name of 255 bytes.
const MAX_BYTES: usize = 200;

/// A dataset's name: segments of `a-z 0-9 . _ -` joined by `/`, each beginning with a letter or digit, such as
/// `fashion-mnist/train`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DatasetName(String);

/// A text that is not a dataset's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a dataset name; use up to {MAX_BYTES} of `a-z 0-9 . _ -` in segments joined by `/`, each \
     beginning with a letter or digit, such as `fashion-mnist/train`"
)]
pub struct InvalidName(String);

impl DatasetName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// This name with one more segment.
    pub fn join(&self, segment: &str) -> Result<Self, InvalidName> {
        format!("{}/{segment}", self.0).parse()
    }

    /// The name as one component of a path. `@` cannot occur in a name, so no two names share a stem.
    pub(super) fn file_stem(&self) -> String {
        self.0.replace('/', "@")
    }

    /// The name whose [`DatasetName::file_stem`] is `stem`.
    pub(super) fn from_file_stem(stem: &str) -> Result<Self, InvalidName> {
        stem.replace('@', "/").parse()
    }
}

impl FromStr for DatasetName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let allowed = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
        let segment = |s: &str| s.bytes().all(allowed) && s.starts_with(|c: char| c.is_ascii_alphanumeric());
        if text.len() <= MAX_BYTES && text.split('/').all(segment) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName(text.chars().take(MAX_BYTES).collect()))
        }
    }
}

impl TryFrom<String> for DatasetName {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

impl From<DatasetName> for String {
    fn from(name: DatasetName) -> Self {
        name.0
    }
}

impl fmt::Display for DatasetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_store_or_look_alike_are_refused() {
        for good in ["a", "fashion-mnist/train", "a/b/c", "voc.2007_x/0"] {
            let name: DatasetName = good.parse().unwrap();
            assert_eq!(DatasetName::from_file_stem(&name.file_stem()).unwrap(), name);
        }
        let long = "a".repeat(MAX_BYTES + 1);
        let bad =
            ["", "/", "/a", "a/", "a//b", "..", "a/../b", ".a", "-a", "A", "a b", "a\\b", "a@b", "é", &long];
        for bad in bad {
            assert!(bad.parse::<DatasetName>().is_err(), "{bad}");
        }
    }
}
