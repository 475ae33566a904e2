//! The manifest: what a dataset is, and the hashes of the shards that hold it.

use super::DatasetName;
use super::whitening::{MAX_WHITENED, Whitening};
use crate::digest::{is_blake3_hex, json_digest};
use serde::{Deserialize, Serialize};

/// The format of manifests written by this release.
const FORMAT: u32 = 1;

/// Everything about a dataset but its samples.
///
/// Fields that came after the first release are left out where they say nothing, so that ids stay what they were.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of this structure.
    pub format: u32,
    /// The dataset's id: the BLAKE3 digest of all other fields.
    pub id: String,
    /// The name under which it was added.
    pub name: DatasetName,
    /// How many samples there are.
    pub samples: u64,
    /// The shape of every sample, or the largest height and width if they differ.
    pub shape: SampleShape,
    /// The smallest height and width, if the samples differ in size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smallest: Option<SampleSize>,
    /// The type of a sample's elements.
    pub dtype: DType,
    /// How many classes there are: one more than the highest label.
    pub classes: u32,
    /// The classes' names, if the source has them.
    pub class_names: Option<Vec<String>>,
    /// How a record's payload encodes the sample.
    pub encoding: Encoding,
    /// The mean of each channel over all pixels, scaled to [0, 1].
    pub mean: Vec<f64>,
    /// The standard deviation of each channel over all pixels, scaled to [0, 1].
    pub std: Vec<f64>,
    /// Corrupt images that were left out when the dataset was imported.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skipped: u64,
    /// The shards in the order of their samples.
    pub shards: Vec<ShardEntry>,
    /// The whitening that was fitted to the samples, if one was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whitening: Option<Whitening>,
}

/// Channels, height and width of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleShape {
    /// Colour channels: 1 for grey.
    pub channels: u32,
    /// Rows of pixels.
    pub height: u32,
    /// Columns of pixels.
    pub width: u32,
}

impl SampleShape {
    /// The number of elements, or `None` if that overflows.
    pub fn elements(self) -> Option<u64> {
        u64::from(self.channels).checked_mul(u64::from(self.height))?.checked_mul(u64::from(self.width))
    }
}

impl std::fmt::Display for SampleShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} x {} x {}", self.channels, self.height, self.width)
    }
}

/// Height and width of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleSize {
    /// Rows of pixels.
    pub height: u32,
    /// Columns of pixels.
    pub width: u32,
}

impl SampleSize {
    /// The smaller of the heights and the smaller of the widths.
    pub fn min(self, other: Self) -> Self {
        Self { height: self.height.min(other.height), width: self.width.min(other.width) }
    }

    /// The larger of the heights and the larger of the widths.
    pub fn max(self, other: Self) -> Self {
        Self { height: self.height.max(other.height), width: self.width.max(other.width) }
    }
}

/// The type of a sample's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// Unsigned bytes, 0 to 255.
    U8,
}

/// How a record's payload encodes a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encoding {
    /// The elements themselves, channel by channel, row by row.
    RawU8,
    /// A JPEG or PNG file. Whatever its colours are, its shape has three channels: red, green and blue.
    Image,
}

/// One shard of a dataset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// BLAKE3 of the shard's bytes, in hex; also its file name.
    pub hash: String,
    /// The shard's size.
    pub bytes: u64,
    /// The index of its first sample in the dataset.
    pub first_sample: u64,
    /// How many samples it holds.
    pub samples: u64,
}

/// What makes a manifest unusable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestProblem {
    /// It is not JSON of the right structure.
    #[error("it does not parse ({0}); remove it and add the dataset again")]
    Syntax(String),
    /// It was written by another release.
    #[error(
        "it has format {0} and this release reads format {FORMAT}; add the dataset again with this release"
    )]
    Format(u32),
    /// It was changed after it was written.
    #[error(
        "its content does not match its id, so it was changed or damaged; remove it and add the dataset again"
    )]
    Id,
    /// Its parts contradict each other.
    #[error("{0}; remove it and add the dataset again")]
    Inconsistent(&'static str),
}

impl Manifest {
    /// The manifest as it is stored and sent.
    pub fn to_json(&self) -> Result<Vec<u8>, ManifestProblem> {
        serde_json::to_vec_pretty(self).map_err(|e| ManifestProblem::Syntax(e.to_string()))
    }

    /// Parses and checks what [`Manifest::to_json`] wrote.
    pub fn from_json(json: &[u8]) -> Result<Self, ManifestProblem> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let syntax = |e: serde_json::Error| ManifestProblem::Syntax(e.to_string());
        let Format { format } = serde_json::from_slice(json).map_err(syntax)?;
        if format != FORMAT {
            return Err(ManifestProblem::Format(format));
        }
        let manifest: Self = serde_json::from_slice(json).map_err(syntax)?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// Checks a manifest that came from a file or a peer: its id, its shape, and that its shards cover the
    /// samples without gap or overlap.
    pub fn validate(&self) -> Result<(), ManifestProblem> {
        if self.format != FORMAT {
            return Err(ManifestProblem::Format(self.format));
        }
        if self.id != self.computed_id()? {
            return Err(ManifestProblem::Id);
        }
        let inconsistent = |is: bool, what| {
            if is { Err(ManifestProblem::Inconsistent(what)) } else { Ok(()) }
        };
        let channels = self.shape.channels as usize;
        inconsistent(self.shape.elements().is_none_or(|n| n == 0), "its sample shape is empty or too large")?;
        inconsistent(
            self.mean.len() != channels || self.std.len() != channels,
            "its mean and standard deviation do not have one value per channel",
        )?;
        inconsistent(
            self.class_names.as_ref().is_some_and(|names| names.len() != self.classes as usize),
            "it does not have one name per class",
        )?;
        inconsistent(
            self.smallest.is_some_and(|s| {
                s.height == 0 || s.width == 0 || s.height > self.shape.height || s.width > self.shape.width
            }),
            "its smallest sample is empty or larger than its largest",
        )?;
        inconsistent(
            match self.encoding {
                Encoding::RawU8 => self.smallest.is_some(),
                Encoding::Image => channels != 3,
            },
            "its shape does not fit its encoding",
        )?;
        check_shards(&self.shards, self.samples)?;
        let Some(Whitening { shards, .. }) = &self.whitening else { return Ok(()) };
        let numbers =
            self.shape.elements().filter(|n| self.encoding == Encoding::RawU8 && *n <= MAX_WHITENED);
        let numbers =
            numbers.ok_or(ManifestProblem::Inconsistent("its samples cannot be whitened and are"))?;
        check_shards(shards, numbers + 1)
    }

    /// Completes a manifest whose other fields are final.
    pub(super) fn with_id(mut self) -> Result<Self, ManifestProblem> {
        self.format = FORMAT;
        self.id = self.computed_id()?;
        Ok(self)
    }

    /// The shard that holds sample `index`, or `None` past the end.
    pub fn shard_of(&self, index: u64) -> Option<&ShardEntry> {
        let after = self.shards.partition_point(|s| s.first_sample <= index);
        let shard = self.shards.get(after.checked_sub(1)?)?;
        (index - shard.first_sample < shard.samples).then_some(shard)
    }

    /// Height and width of every sample, or `None` if they differ.
    pub fn fixed_size(&self) -> Option<SampleSize> {
        let SampleShape { height, width, .. } = self.shape;
        self.smallest.is_none().then_some(SampleSize { height, width })
    }

    /// The size of all shards.
    pub fn bytes(&self) -> u64 {
        self.all_shards().map(|s| s.bytes).sum()
    }

    /// The samples' shards, then those of the whitening.
    pub fn all_shards(&self) -> impl Iterator<Item = &ShardEntry> {
        self.shards.iter().chain(self.whitening.iter().flat_map(|whitening| &whitening.shards))
    }

    fn computed_id(&self) -> Result<String, ManifestProblem> {
        json_digest(&Self { id: String::new(), ..self.clone() })
            .map_err(|e| ManifestProblem::Syntax(e.to_string()))
    }
}

/// Checks that `shards` hold `records` without gap or overlap.
fn check_shards(shards: &[ShardEntry], records: u64) -> Result<(), ManifestProblem> {
    let mut next = 0u64;
    for shard in shards {
        if !is_blake3_hex(&shard.hash) {
            return Err(ManifestProblem::Inconsistent("a shard's name is not a hash"));
        }
        if shard.samples == 0 || shard.first_sample != next {
            return Err(ManifestProblem::Inconsistent("its shards leave a gap or overlap"));
        }
        next = next.saturating_add(shard.samples);
    }
    if next == records {
        Ok(())
    } else {
        Err(ManifestProblem::Inconsistent("its shards do not add up to its samples"))
    }
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(first_sample: u64, samples: u64) -> ShardEntry {
        ShardEntry { hash: "a".repeat(64), bytes: 10, first_sample, samples }
    }

    fn manifest() -> Manifest {
        let draft = Manifest {
            format: FORMAT,
            id: String::new(),
            name: "a/b".parse().unwrap(),
            samples: 5,
            shape: SampleShape { channels: 1, height: 2, width: 2 },
            smallest: None,
            dtype: DType::U8,
            classes: 2,
            class_names: None,
            encoding: Encoding::RawU8,
            mean: vec![0.1 + 0.2],
            std: vec![1.0 / 3.0],
            skipped: 0,
            shards: vec![entry(0, 3), entry(3, 2)],
            whitening: None,
        };
        draft.with_id().unwrap()
    }

    #[test]
    fn json_round_trip_keeps_every_bit() {
        let m = manifest();
        assert_eq!(Manifest::from_json(&m.to_json().unwrap()).unwrap(), m);
    }

    proptest! {
        /// The id is computed from numbers that were written and parsed again: they must come back exactly.
        #[test]
        fn any_statistics_survive_json(mean in 0.0f64..1.0, std in 0.0f64..1.0) {
            let m = Manifest { mean: vec![mean], std: vec![std], ..manifest() }.with_id().unwrap();
            prop_assert_eq!(Manifest::from_json(&m.to_json().unwrap()), Ok(m));
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_is_refused_or_changes_nothing() {
        let m = manifest();
        let json = m.to_json().unwrap();
        for at in 0..json.len() {
            let mut damaged = json.clone();
            damaged[at] ^= 1;
            if let Ok(parsed) = Manifest::from_json(&damaged) {
                assert_eq!(parsed, m, "byte {at}");
            }
        }
        let text = String::from_utf8(json).unwrap();
        assert_eq!(
            Manifest::from_json(text.replace("\"classes\": 2", "\"classes\": 3").as_bytes()),
            Err(ManifestProblem::Id)
        );
    }

    #[test]
    fn contradictions_are_refused_even_with_a_matching_id() {
        let bad: [fn(&mut Manifest); 11] = [
            |m| m.samples = 6,
            |m| m.shards[1].first_sample = 4,
            |m| m.shards[0].samples = 0,
            |m| m.shards[0].hash = "../../etc/passwd".into(),
            |m| m.shape.width = 0,
            |m| m.shape = SampleShape { channels: u32::MAX, height: u32::MAX, width: u32::MAX },
            |m| m.mean.clear(),
            |m| m.encoding = Encoding::Image,
            |m| m.smallest = Some(SampleSize { height: 1, width: 1 }),
            |m| m.smallest = Some(SampleSize { height: 3, width: 1 }),
            |m| m.class_names = Some(vec!["only".into()]),
        ];
        for (i, damage) in bad.into_iter().enumerate() {
            let mut m = manifest();
            damage(&mut m);
            let error = m.with_id().unwrap().validate().unwrap_err();
            assert!(matches!(error, ManifestProblem::Inconsistent(_)), "case {i}: {error}");
        }
        let newer = br#"{"format": 2, "something": "new"}"#;
        assert_eq!(Manifest::from_json(newer), Err(ManifestProblem::Format(2)));
    }

    #[test]
    fn shard_of_finds_the_shard_and_nothing_past_the_end() {
        let m = manifest();
        let first = |i| m.shard_of(i).map(|s| s.first_sample);
        assert_eq!(
            [first(0), first(2), first(3), first(4), first(5)],
            [Some(0), Some(0), Some(3), Some(3), None]
        );
    }
}
