//! `worker predict`: what a trained classifier takes images for.

use super::args::PredictArgs;
use super::candidates::{self, shown};
use super::eval::basis;
use crate::cli::DeviceArg;
use crate::data::preparation::Preparation;
use crate::evaluation::candidate::Candidate;
use crate::evaluation::judge::{answers, finite};
use crate::evaluation::stores::Stores;
use crate::evaluation::views::top;
use crate::train::Number;
use crate::train::device::{device, enable_cuda};
use anyhow::{Context, Result, anyhow};
use lockstep_common::dataset::{InspectImage, SampleShape};
use lockstep_common::job::{Augment, Crops, DataSpec, Precision};
use lockstep_common::output::output;
use lockstep_common::rng::Stream;
use lockstep_common::shown::shown as escaped;
use lockstep_images::{Inspector, Source, Workbench};
use serde::Serialize;
use std::io::Write;
use std::path::Path;
use tch::Tensor;

/// Classes that are told.
const TOLD: usize = 5;

/// What an image is taken for.
#[derive(Serialize)]
struct Answer {
    image: String,
    predictions: Vec<Prediction>,
}

#[derive(Serialize)]
struct Prediction {
    class: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    probability: f64,
}

/// Prints the most probable classes of the images that `args` name; of all of them or of none.
pub(crate) fn predict(args: &PredictArgs) -> Result<()> {
    if let DeviceArg::Cuda(index) = args.common.device {
        enable_cuda(index)?;
    }
    let paths = std::slice::from_ref(&args.checkpoint);
    let candidates = candidates::read(paths, &args.common, args.dataset.as_deref())?;
    let candidate = candidates.first().context("no checkpoint is named")?;
    let answers = match candidate.job.precision {
        Precision::F64 => judge_all::<f64>(args, candidate)?,
        Precision::F32 | Precision::Bf16 => judge_all::<f32>(args, candidate)?,
    };
    let mut out = output();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&answers)?)?;
        return Ok(());
    }
    for Answer { image, predictions } in answers {
        writeln!(out, "{}", escaped(&image))?;
        for Prediction { class, name, probability } in predictions {
            let name = name.unwrap_or_default();
            let line = format!("  {:>6.2}%  {class:>4}  {}", probability * 100.0, escaped(&name));
            writeln!(out, "{}", line.trim_end())?;
        }
    }
    Ok(())
}

fn judge_all<T: Number>(args: &PredictArgs, candidate: &Candidate) -> Result<Vec<Answer>> {
    let stores = Stores::find(&args.common.datasets, std::slice::from_ref(&args.checkpoint));
    let crops = args.common.crops.unwrap_or(candidate.job.evaluation.crops);
    let Prepared { preparation, names } = prepared::<T>(args, candidate, &stores, crops)?;
    let device = device(args.common.device);
    tch::set_num_threads(args.common.threads().try_into().unwrap_or(1));
    let mut task = candidate
        .network(device)
        .and_then(|network| Ok(network.lane()?))
        .with_context(|| shown(&args.checkpoint))?;
    let mut bench = Workbench::new()?;
    let mut told = Vec::new();
    for path in &args.images {
        let named = || format!("image `{}`", path.display());
        let numbers = numbers(&preparation, &mut bench, path).with_context(named)?;
        let SampleShape { channels, height, width } = preparation.shape();
        let shape = [preparation.views() as i64, channels.into(), height.into(), width.into()];
        let images = Tensor::f_from_slice(&numbers)?.f_view(shape)?.f_to_device(device)?;
        let views = tch::no_grad(|| answers(task.as_mut(), &images, preparation.views(), &|| Ok(())));
        let views = views.with_context(named)?.pop().context("the network gave no answer")?;
        let views = finite(views).with_context(|| shown(&args.checkpoint)).with_context(named)?;
        let probabilities = views.probabilities();
        let predictions = top(&probabilities, TOLD).into_iter().map(|class| Prediction {
            class,
            name: names.as_ref().and_then(|names| names.get(class)).cloned(),
            probability: probabilities[class],
        });
        told.push(Answer { image: path.display().to_string(), predictions: predictions.collect() });
    }
    Ok(told)
}

/// The numbers of an image's views.
fn numbers<T: Number>(preparation: &Preparation<T>, bench: &mut Workbench, path: &Path) -> Result<Vec<T>> {
    let bytes = std::fs::read(path)?;
    // Training takes what an import has seen whole; here nobody has.
    Inspector.inspect(&bytes).map_err(|what| anyhow!(what))?;
    let mut numbers = vec![T::default(); preparation.len() * preparation.views()];
    // Nothing in an evaluation is random.
    let mut stream = Stream::new(0, "predict", &[]);
    preparation
        .run(bench, Source::Encoded(&bytes), &mut stream, &mut numbers)
        .map_err(|what| anyhow!(what))?;
    preparation.finish(std::slice::from_mut(&mut stream), &mut numbers);
    Ok(numbers)
}

struct Prepared<T> {
    preparation: Preparation<T>,
    /// The classes', if a dataset tells them.
    names: Option<Vec<String>>,
}

/// How an image becomes what the network gets of a test sample.
fn prepared<T: Number>(
    args: &PredictArgs,
    candidate: &Candidate,
    stores: &Stores,
    crops: Crops,
) -> Result<Prepared<T>> {
    let data = &candidate.job.data;
    let given = |name: &String| !name.is_empty();
    let name = args.dataset.as_ref().or(data.test.as_ref()).or(Some(&data.train)).filter(|name| given(name));
    let own = name.map(|name| stores.manifest(name)).transpose()?;
    let basis = basis(stores, data)?;
    let shape = match &own {
        Some(own) => data.test_shape(own, crops).map_err(|(_, what)| anyhow!(what))?,
        None => told_shape(data, candidate.channels()?).context(
            "which images does the network take? say it with --center-crop N, --dataset NAME or --job FILE",
        )?,
    };
    candidate.check_channels(shape.channels).with_context(|| shown(&args.checkpoint))?;
    let preparation = Preparation::for_pictures(data, crops, shape, basis.as_ref())?;
    let names = own
        .and_then(|own| own.class_names)
        .or_else(|| basis.and_then(|basis| basis.manifest().class_names.clone()));
    Ok(Prepared { preparation, names })
}

/// The shape that the options and the network's number of channels alone give.
fn told_shape(data: &DataSpec, channels: Option<u32>) -> Option<SampleShape> {
    match data.evaluate.last() {
        Some(Augment::CenterCrop { size }) => Some(SampleShape {
            channels: data.channels.or(channels).unwrap_or(3),
            height: *size,
            width: *size,
        }),
        _ => None,
    }
}
