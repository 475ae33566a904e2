//! What is done to each sample of a job: from its bytes to the numbers that a network gets.

use super::whitening::{Move, Whitening, together};
use crate::train::Number;
use crate::train::error::TrainError;
use lockstep_common::dataset::{DatasetReader, Manifest, SampleShape, contrast_table};
use lockstep_common::job::{Augment, ChannelOrder, Crops, DataSpec, PixelScale};
use lockstep_common::rng::Stream;
use lockstep_images::{CropPlan, Picture, Pipeline, Source, Workbench};
use std::sync::Arc;

/// What samples are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Training: augmented.
    Train,
    /// Evaluation: the same every time.
    Evaluate(Crops),
}

/// What the preparation of every sample, those of the test set too, takes from the training set.
pub(crate) struct Basis<T> {
    train: Manifest,
    whitening: Option<Arc<Whitening<T>>>,
}

impl<T: Number> Basis<T> {
    /// Reads it where the job needs it. Blocks while shards are fetched.
    pub(crate) fn read(data: &DataSpec, train: &DatasetReader) -> Result<Self, TrainError> {
        let basis = Self::without_whitening(train.manifest().clone());
        if data.whiten.is_none() {
            return Ok(basis);
        }
        if let Some(what) = data.lacking_whitening(train.manifest()) {
            return Err(TrainError::Fatal(what));
        }
        let map = train.whitening().map_err(|e| TrainError::Fatal(e.to_string()))?;
        Ok(Self { whitening: map.map(|map| Arc::new(Whitening::new(&map))), ..basis })
    }

    /// Of a job that does not whiten.
    pub(crate) fn without_whitening(train: Manifest) -> Self {
        Self { train, whitening: None }
    }

    /// The training set.
    pub(crate) fn manifest(&self) -> &Manifest {
        &self.train
    }
}

/// How samples become numbers.
pub(crate) struct Preparation<T> {
    pipeline: Pipeline,
    /// Where the views of a sample lie, if there are several.
    crops: Option<CropPlan>,
    /// Of every view.
    shape: SampleShape,
    scaling: Scaling<T>,
    order: ChannelOrder,
    /// What follows then, if images are whitened.
    whitened: Option<Whitened<T>>,
}

/// What is done to numbers.
struct Whitened<T> {
    whitening: Arc<Whitening<T>>,
    moves: Vec<Move>,
}

/// How raw values become numbers.
enum Scaling<T> {
    /// Per channel: the number for each raw value.
    Fixed(Vec<[T; 256]>),
    /// Each image by its own mean and norm.
    Contrast,
}

impl<T: Number> Preparation<T> {
    /// For the samples of `own`.
    pub(crate) fn new(
        data: &DataSpec,
        purpose: Use,
        own: &Manifest,
        basis: &Basis<T>,
    ) -> Result<Self, TrainError> {
        let (steps, shape, crops) = match purpose {
            Use::Train => (&data.augment, data.training_shape(own), Crops::One),
            Use::Evaluate(crops) => (&data.evaluate, data.test_shape(own, crops), crops),
        };
        let shape = shape.map_err(|(_, what)| TrainError::Fatal(what))?;
        // A whitening is fitted to whole images: what a job does to them besides comes behind it.
        let (before, behind) =
            if data.whiten.is_some() { (&[][..], &steps[..]) } else { (&steps[..], &[][..]) };
        let pipeline = Pipeline::new(data.channels, before.to_vec());
        let preparation =
            Self::over(pipeline, crops, shape, data, data.statistics(&basis.train)).map_err(|channels| {
                let what = format!(
                    "dataset `{}` has {} channels, the training set {channels}",
                    own.name, shape.channels
                );
                TrainError::Fatal(what)
            })?;
        preparation.whitened(basis, behind)
    }

    /// The same with the whitening of `basis`, if there is one, and `steps` behind it.
    fn whitened(self, basis: &Basis<T>, steps: &[Augment]) -> Result<Self, TrainError> {
        let Some(whitening) = basis.whitening.clone() else { return Ok(self) };
        if whitening.len() != self.len() {
            let what = format!(
                "the whitening of dataset `{}` is of images of {}, and these are of {}",
                basis.train.name, basis.train.shape, self.shape
            );
            return Err(TrainError::Fatal(what));
        }
        let moves: Option<Vec<Move>> = steps.iter().map(Move::of).collect();
        let moves = moves.ok_or_else(|| {
            TrainError::Fatal("only `flip` and `pad-crop` can come behind a whitening".to_owned())
        })?;
        Ok(Self { whitened: Some(Whitened { whitening, moves }), ..self })
    }

    /// For pictures of any size and colour, so that the network gets what it gets of test samples, `shape`: where the job's
    /// steps leave the size as it is, the shorter side is resized and the middle taken. `basis` is needed where pixels are
    /// standardized by the training set's statistics, or whitened.
    pub(crate) fn for_pictures(
        data: &DataSpec,
        crops: Crops,
        shape: SampleShape,
        basis: Option<&Basis<T>>,
    ) -> Result<Self, TrainError> {
        let channels = shape.channels as usize;
        let statistics = match (basis, &data.mean, &data.std) {
            (Some(basis), _, _) => data.statistics(&basis.train),
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
        let preparation = Self::over(pipeline, crops, shape, data, statistics).map_err(|given| {
            let what =
                format!("images have {channels} channels, and mean and standard deviation are of {given}");
            TrainError::Fatal(what)
        })?;
        match basis {
            Some(basis) => preparation.whitened(basis, &[]),
            None => Ok(preparation),
        }
    }

    /// Fails with the channels of the statistics if they are others than those of `shape`.
    fn over(
        pipeline: Pipeline,
        crops: Crops,
        shape: SampleShape,
        data: &DataSpec,
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
        let scaling = match data.scale {
            PixelScale::Unit => fixed(&|_, unit| unit),
            // A constant channel carries nothing; it becomes zero.
            PixelScale::Standardize => {
                fixed(&|c, unit| if std[c] > 0.0 { (unit - mean[c]) / std[c] } else { 0.0 })
            }
            PixelScale::Gcn => Scaling::Contrast,
        };
        let crops = CropPlan::new(crops, shape.height as usize);
        Ok(Self { pipeline, crops, shape, scaling, order: data.channel_order, whitened: None })
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

    /// How many of `samples` one of `threads` threads had best prepare at a time.
    pub(crate) fn together(&self, samples: usize, threads: usize) -> usize {
        if self.whitened.is_some() { together(samples, threads) } else { 1 }
    }

    /// Does what is done to numbers, behind [`Self::run`], to samples that lie one after the other; each has its stream. Every
    /// sample gets the same bits whichever others are there.
    pub(crate) fn finish(&self, streams: &mut [Stream], values: &mut [T]) {
        let Some(Whitened { whitening, moves }) = &self.whitened else { return };
        whitening.apply(values);
        for (stream, image) in streams.iter_mut().zip(values.chunks_exact_mut(self.len())) {
            moves.iter().for_each(|step| step.apply(self.shape, stream, image));
        }
    }

    /// Writes a sample's views one after the other, up to what [`Self::finish`] does. `values` has room for just that. All that
    /// is random comes from `stream`. Fails with the end of a sentence.
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
                contrast = vec![contrast_table(picture.values()).map(T::from_f64); channels];
                &contrast
            }
        };
        for (place, values) in values.chunks_exact_mut(plane).enumerate() {
            let c = match self.order {
                ChannelOrder::Rgb => place,
                ChannelOrder::Bgr => channels - 1 - place,
            };
            let table = &table[c];
            let raw = picture.values().iter().skip(c).step_by(channels);
            for (value, raw) in values.iter_mut().zip(raw) {
                *value = table[usize::from(*raw)];
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of an image of 2 x 2 pixels, given channel by channel.
    fn normalized(channels: u32, image: &[u8]) -> Vec<f64> {
        prepared(&spec(PixelScale::Gcn), channels, image)
    }

    fn spec(scale: PixelScale) -> DataSpec {
        DataSpec {
            train: String::new(),
            test: None,
            channels: None,
            augment: Vec::new(),
            evaluate: Vec::new(),
            channel_order: ChannelOrder::Rgb,
            scale,
            whiten: None,
            mean: None,
            std: None,
        }
    }

    fn prepared(data: &DataSpec, channels: u32, image: &[u8]) -> Vec<f64> {
        let shape = SampleShape { channels, height: 2, width: 2 };
        let preparation = Preparation::<f64>::for_pictures(data, Crops::One, shape, None).unwrap();
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

    /// As Caffe's networks want them: bytes less 104, 117 and 123, blue first.
    #[test]
    fn channels_come_in_the_order_that_is_asked_for_each_with_its_own_mean() {
        let (mean, std) = ([123.0, 117.0, 104.0].map(|m| m / 255.0), [1.0 / 255.0; 3]);
        let rgb =
            DataSpec { mean: Some(mean.into()), std: Some(std.into()), ..spec(PixelScale::Standardize) };
        let bgr = DataSpec { channel_order: ChannelOrder::Bgr, ..rgb.clone() };
        let (red, green, blue) = ([1, 2, 3, 4], [50, 60, 70, 80], [100, 150, 200, 250]);
        let less = |plane: [u8; 4], mean: f64| plane.map(|raw| f64::from(raw) - mean);
        let image = [red, green, blue].concat();
        let [red, green, blue] = [less(red, 123.0), less(green, 117.0), less(blue, 104.0)];
        assert_near(&prepared(&rgb, 3, &image), &[red, green, blue].concat());
        assert_near(&prepared(&bgr, 3, &image), &[blue, green, red].concat());
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
