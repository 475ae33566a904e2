//! What is done to each sample of a job: from its bytes to the numbers that a network gets.

use crate::train::Number;
use crate::train::error::TrainError;
use lockstep_common::dataset::{Manifest, SampleShape};
use lockstep_common::job::{Augment, Crops, DataSpec, PixelScale};
use lockstep_common::rng::Stream;
use lockstep_images::{CropPlan, Picture, Pipeline, Source, Workbench};

/// What samples are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Training: augmented.
    Train,
    /// Evaluation: the same every time.
    Evaluate(Crops),
}

/// How samples become numbers.
pub(crate) struct Preparation<T> {
    pipeline: Pipeline,
    /// Where the views of a sample lie, if there are several.
    crops: Option<CropPlan>,
    /// Of every view.
    shape: SampleShape,
    /// Per channel: the number for each raw value.
    table: Vec<[T; 256]>,
}

impl<T: Number> Preparation<T> {
    /// For the samples of `own`. `train` is the training set, by whose statistics the test set is scaled too.
    pub(crate) fn new(
        data: &DataSpec,
        purpose: Use,
        own: &Manifest,
        train: &Manifest,
    ) -> Result<Self, TrainError> {
        let (steps, shape, crops) = match purpose {
            Use::Train => (&data.augment, data.training_shape(own), Crops::One),
            Use::Evaluate(crops) => (&data.evaluate, data.test_shape(own, crops), crops),
        };
        let shape = shape.map_err(|(_, what)| TrainError::Fatal(what))?;
        let pipeline = Pipeline::new(data.channels, steps.clone());
        Self::over(pipeline, crops, shape, data.scale, data.statistics(train)).map_err(|channels| {
            let what = format!(
                "dataset `{}` has {} channels, the training set {channels}",
                own.name, shape.channels
            );
            TrainError::Fatal(what)
        })
    }

    /// For pictures of any size and colour, so that the network gets what it gets of test samples, `shape`: where the job's
    /// steps leave the size as it is, the shorter side is resized and the middle taken. `train` is needed where pixels are
    /// standardized by its statistics.
    pub(crate) fn for_pictures(
        data: &DataSpec,
        crops: Crops,
        shape: SampleShape,
        train: Option<&Manifest>,
    ) -> Result<Self, TrainError> {
        let channels = shape.channels as usize;
        let statistics = match (train, &data.mean, &data.std) {
            (Some(train), _, _) => data.statistics(train),
            (None, Some(mean), Some(std)) => (mean.clone(), std.clone()),
            (None, _, _) => (vec![0.0; channels], vec![1.0; channels]),
        };
        let mut steps = data.evaluate.clone();
        if shape.height == shape.width && !matches!(steps.last(), Some(Augment::CenterCrop { .. })) {
            let size = shape.height;
            if steps.is_empty() {
                steps.push(Augment::Resize { size });
            }
            steps.push(Augment::CenterCrop { size });
        }
        let pipeline = Pipeline::new(Some(shape.channels), steps);
        Self::over(pipeline, crops, shape, data.scale, statistics).map_err(|given| {
            let what =
                format!("images have {channels} channels, and mean and standard deviation are of {given}");
            TrainError::Fatal(what)
        })
    }

    /// Fails with the channels of the statistics if they are others than those of `shape`.
    fn over(
        pipeline: Pipeline,
        crops: Crops,
        shape: SampleShape,
        scale: PixelScale,
        (mean, std): (Vec<f64>, Vec<f64>),
    ) -> Result<Self, usize> {
        let channels = shape.channels as usize;
        if mean.len() != channels || std.len() != channels {
            return Err(mean.len());
        }
        let table = (0..channels)
            .map(|c| {
                std::array::from_fn(|raw| {
                    let unit = raw as f64 / 255.0;
                    T::from_f64(match scale {
                        PixelScale::Unit => unit,
                        // A constant channel carries nothing; it becomes zero.
                        PixelScale::Standardize if std[c] > 0.0 => (unit - mean[c]) / std[c],
                        PixelScale::Standardize => 0.0,
                    })
                })
            })
            .collect();
        Ok(Self { pipeline, crops: CropPlan::new(crops, shape.height as usize), shape, table })
    }

    /// The shape of every view of a sample.
    pub(crate) fn shape(&self) -> SampleShape {
        self.shape
    }

    /// How many views a sample has.
    pub(crate) fn views(&self) -> usize {
        self.crops.as_ref().map_or(1, CropPlan::count)
    }

    /// The numbers of one view.
    pub(crate) fn len(&self) -> usize {
        [self.shape.channels, self.shape.height, self.shape.width].map(|n| n as usize).iter().product()
    }

    /// Writes a sample's views one after the other. `values` has room for just that. All that is random comes from `stream`.
    /// Fails with the end of a sentence.
    pub(crate) fn run(
        &self,
        bench: &mut Workbench,
        source: Source<'_>,
        stream: &mut Stream,
        values: &mut [T],
    ) -> Result<(), String> {
        let Some(plan) = &self.crops else {
            let picture = self.pipeline.run(bench, source, stream).map_err(|e| e.to_string())?;
            return self.scale(&picture, values);
        };
        let mut views = values.chunks_exact_mut(self.len());
        let mut result = Ok(());
        let see = |picture: &Picture| {
            if let (Ok(()), Some(values)) = (&result, views.next()) {
                result = self.scale(picture, values);
            }
        };
        self.pipeline.parts(bench, source, plan, see).map_err(|e| e.to_string())?;
        result
    }

    fn scale(&self, picture: &Picture, values: &mut [T]) -> Result<(), String> {
        let found = [picture.channels(), picture.height(), picture.width()];
        let expected = [self.shape.channels, self.shape.height, self.shape.width].map(|n| n as usize);
        if found != expected {
            return Err(format!("it is {found:?} where {expected:?} is expected"));
        }
        let plane = picture.height() * picture.width();
        let channels = picture.channels();
        for ((c, table), values) in self.table.iter().enumerate().zip(values.chunks_exact_mut(plane)) {
            let raw = picture.values().iter().skip(c).step_by(channels);
            for (value, raw) in values.iter_mut().zip(raw) {
                *value = table[usize::from(*raw)];
            }
        }
        Ok(())
    }
}
