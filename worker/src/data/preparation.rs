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
    scaling: Scaling<T>,
}

/// How raw values become numbers.
enum Scaling<T> {
    /// Per channel: the number for each raw value.
    Fixed(Vec<[T; 256]>),
    /// Each image by its own mean and norm.
    Contrast,
}

/// The Euclidean norm that an image's contrast is normalized to: pylearn2's for CIFAR, `gcn=55.`.
const CONTRAST_NORM: f64 = 55.0;

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
        let fixed = |number: &dyn Fn(usize, f64) -> f64| {
            let table = |c| std::array::from_fn(|raw| T::from_f64(number(c, raw as f64 / 255.0)));
            Scaling::Fixed((0..channels).map(table).collect())
        };
        let scaling = match scale {
            PixelScale::Unit => fixed(&|_, unit| unit),
            // A constant channel carries nothing; it becomes zero.
            PixelScale::Standardize => {
                fixed(&|c, unit| if std[c] > 0.0 { (unit - mean[c]) / std[c] } else { 0.0 })
            }
            PixelScale::Gcn => Scaling::Contrast,
        };
        Ok(Self { pipeline, crops: CropPlan::new(crops, shape.height as usize), shape, scaling })
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
        let contrast;
        let table = match &self.scaling {
            Scaling::Fixed(table) => table,
            Scaling::Contrast => {
                contrast = vec![contrast_table(picture.values()); channels];
                &contrast
            }
        };
        for ((c, table), values) in table.iter().enumerate().zip(values.chunks_exact_mut(plane)) {
            let raw = picture.values().iter().skip(c).step_by(channels);
            for (value, raw) in values.iter_mut().zip(raw) {
                *value = table[usize::from(*raw)];
            }
        }
        Ok(())
    }
}

/// The number for each raw value x of an image of the values `image`: 55 (x - m) / |image - m|, where m is the image's mean.
/// Zero for a constant image, which has no contrast.
///
/// The sums are of whole numbers and exact: an image and its mirror image get the same table.
fn contrast_table<T: Number>(image: &[u8]) -> [T; 256] {
    let count = image.len() as u64;
    let (sum, squares) = image.iter().fold((0_u64, 0_u64), |(sum, squares), raw| {
        let raw = u64::from(*raw);
        (sum + raw, squares + raw * raw)
    });
    // count² times the variance: more than 64 bits for the largest images.
    let spread = u128::from(count) * u128::from(squares) - u128::from(sum) * u128::from(sum);
    let factor = if spread == 0 { 0.0 } else { CONTRAST_NORM / (spread as f64 * count as f64).sqrt() };
    std::array::from_fn(|raw| {
        let centred = (raw as u64 * count) as f64 - sum as f64;
        T::from_f64(factor * centred)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of an image of 2 x 2 pixels, given channel by channel.
    fn normalized(channels: u32, image: &[u8]) -> Vec<f64> {
        let data = DataSpec {
            train: String::new(),
            test: None,
            channels: None,
            augment: Vec::new(),
            evaluate: Vec::new(),
            scale: PixelScale::Gcn,
            mean: None,
            std: None,
        };
        let shape = SampleShape { channels, height: 2, width: 2 };
        let preparation = Preparation::<f64>::for_pictures(&data, Crops::One, shape, None).unwrap();
        let mut values = vec![f64::NAN; image.len()];
        let source = Source::Planes(shape, image);
        let mut stream = Stream::new(1, "augment", &[0, 0]);
        preparation.run(&mut Workbench::new().unwrap(), source, &mut stream, &mut values).unwrap();
        values
    }

    fn assert_near(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
        }
    }

    #[test]
    fn contrast_is_normalized_over_pixels_and_channels_as_by_hand() {
        // Less its mean, 3: -3, -1, 1, 3, of norm sqrt(20).
        let root = 20_f64.sqrt();
        assert_near(&normalized(1, &[0, 2, 4, 6]), &[-3.0, -1.0, 1.0, 3.0].map(|x| 55.0 * x / root));
        // Three constant channels: mean 20; -10, 0 and 10 four times each, of norm sqrt(800).
        let colours = [[10; 4], [20; 4], [30; 4]].concat();
        let expected = [[-1.0; 4], [0.0; 4], [1.0; 4]].concat();
        let expected: Vec<f64> = expected.iter().map(|x| 550.0 * x / 800_f64.sqrt()).collect();
        assert_near(&normalized(3, &colours), &expected);
    }

    #[test]
    fn an_image_without_contrast_becomes_zero() {
        for raw in [0, 7, 255] {
            assert_eq!(normalized(1, &[raw; 4]), [0.0; 4]);
        }
    }

    #[test]
    fn a_mirror_image_gets_the_same_bits() {
        let [a, b, c, d] = normalized(1, &[1, 250, 33, 7])[..] else { panic!("four numbers") };
        assert_eq!(normalized(1, &[250, 1, 7, 33]), [b, a, d, c]);
    }
}
