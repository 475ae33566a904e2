//! How a `classify` job is evaluated.

use super::{DataSpec, JobSpec, Task};
use crate::dataset::{Manifest, SampleShape};
use serde::{Deserialize, Serialize};

/// How a `classify` job is evaluated on its test set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluationSpec {
    /// Parts of each image whose softmax is averaged.
    pub crops: Crops,
}

/// How many parts of an image a network judges; the softmax of all of them is averaged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum Crops {
    /// The image as `[data] evaluate` prepares it.
    #[default]
    One,
    /// Corners and centre of one square, and their mirror images.
    ///
    /// Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural networks", 2012, section 4.1.
    Ten,
    /// The same with the whole square besides: what [`Self::HundredFortyFour`] takes of one square at one size.
    ///
    /// Szegedy et al., "Rethinking the Inception architecture for computer vision", 2016, table 4, and "Inception-v4,
    /// Inception-ResNet and the impact of residual connections on learning", 2017, table 3, give results for 12 crops and do
    /// not say which. This reading divides the 144 of their other results by 4 sizes and 3 squares.
    Twelve,
    /// Four sizes, three squares of each, and of each square corners, centre and whole, and their mirror images.
    ///
    /// Szegedy et al., "Going deeper with convolutions", 2015, section 7.
    HundredFortyFour,
}

impl Crops {
    /// How many they are.
    pub fn count(self) -> u32 {
        match self {
            Self::One => 1,
            Self::Ten => 10,
            Self::Twelve => 12,
            Self::HundredFortyFour => 144,
        }
    }
}

/// Another number of crops than there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`crops` is {0}; it must be 1, 10, 12 or 144")]
pub struct UnknownCrops(pub u32);

impl TryFrom<u32> for Crops {
    type Error = UnknownCrops;

    fn try_from(count: u32) -> Result<Self, UnknownCrops> {
        let all = [Self::One, Self::Ten, Self::Twelve, Self::HundredFortyFour];
        all.into_iter().find(|crops| crops.count() == count).ok_or(UnknownCrops(count))
    }
}

impl From<Crops> for u32 {
    fn from(crops: Crops) -> Self {
        crops.count()
    }
}

impl JobSpec {
    /// Whether the job trains nothing and only evaluates the weights that it names.
    pub fn only_evaluates(&self) -> bool {
        self.steps == Some(0)
    }

    /// What keeps a job of no steps from being an evaluation: what it lacks.
    pub(super) fn lacks_for_evaluation(&self) -> Option<&'static str> {
        let has_weights = self.model.as_ref().is_some_and(|model| model.weights.is_some());
        match self.task {
            Task::Classify if self.data.test.is_none() => Some("a `test` set in `[data]`"),
            Task::Classify if !has_weights => Some("`weights` in `[model]`"),
            Task::Classify => None,
            Task::Gan => Some("`task = \"classify\"`"),
        }
    }
}

impl DataSpec {
    /// The shape of every view of a sample of `data` when a network gets it in an evaluation; or the key that does not fit
    /// the dataset, and what is wrong. Of several crops each is a square of the size that `evaluate` gives.
    pub fn test_shape(&self, data: &Manifest, crops: Crops) -> Result<SampleShape, (&'static str, String)> {
        if let Some(what) = self.unwhitenable(data, crops) {
            return Err(("whiten", what));
        }
        let shape = self.shape(data, "evaluate", &self.evaluate)?;
        if crops != Crops::One && shape.height != shape.width {
            let (SampleShape { height, width, .. }, name) = (shape, &data.name);
            let what = format!(
                "{} crops are squares, and the images of `{name}` have {height} x {width} pixels then; end `evaluate` with a \
                 `center-crop`",
                crops.count()
            );
            return Err(("evaluate", what));
        }
        Ok(shape)
    }
}
