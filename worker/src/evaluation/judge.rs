//! A network judges test samples.

use super::views::Views;
use crate::data::batch::{Decoder, ViewBatch};
use crate::tasks::LaneTask;
use crate::train::Number;
use crate::train::error::TrainError;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Samples at a time where each is seen once.
const BATCH: u64 = 100;

/// Views at a time where a sample has several: three samples of 10 or 12, a quarter of one of 144.
const VIEWS: i64 = 36;

/// What a network says of a sample, and its class.
#[derive(Clone, Debug)]
pub(crate) struct Judged {
    pub(crate) label: usize,
    pub(crate) views: Views,
}

/// How many samples of so many views each are judged at a time, unless somebody says otherwise.
pub(crate) fn batch(views: usize) -> u64 {
    if views == 1 { BATCH } else { (VIEWS as u64 / views as u64).max(1) }
}

/// Judges `samples` of `data`. `progress` is called between passes through the network, and may end it with an error.
pub(crate) fn judge<T: Number>(
    task: &mut dyn LaneTask,
    data: &Decoder<T>,
    samples: Range<u64>,
    progress: &dyn Fn() -> Result<(), TrainError>,
) -> Result<Vec<Judged>, TrainError> {
    let ViewBatch { images, labels } = data.viewed(samples)?;
    let answers = answers(task, &images, data.views(), progress)?;
    labels
        .into_iter()
        .zip(answers)
        .map(|(label, views)| {
            // Refused before, as the data set's classes are known; a row of the logits must not be overrun all the same.
            let label = usize::try_from(label).ok().filter(|label| *label < views.classes());
            let label = label
                .ok_or_else(|| TrainError::Fatal("a sample's class is none of the network's".to_owned()))?;
            Ok(Judged { label, views })
        })
        .collect()
}

/// What a network says of images of `views` rows each.
pub(crate) fn answers(
    task: &mut dyn LaneTask,
    images: &Tensor,
    views: usize,
    progress: &dyn Fn() -> Result<(), TrainError>,
) -> Result<Vec<Views>, TrainError> {
    let rows = images.size().first().copied().unwrap_or(0);
    let at_a_time = if views == 1 { rows.max(1) } else { VIEWS };
    let (mut logits, mut classes): (Vec<f64>, _) = (Vec::new(), 0);
    for from in (0..rows).step_by(at_a_time as usize) {
        let part = images.f_narrow(0, from, at_a_time.min(rows - from))?;
        let answer = task.logits(&part)?;
        classes = answer.size().last().copied().unwrap_or(0);
        if classes < 1 {
            return Err(TrainError::Fatal("the network has no classes".to_owned()));
        }
        let answer =
            answer.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?.f_contiguous()?.f_view([-1])?;
        logits.extend(Vec::<f64>::try_from(&answer)?);
        progress()?;
    }
    let classes = classes as usize;
    Ok(logits.chunks_exact((classes * views).max(1)).map(|part| Views::new(classes, part.to_vec())).collect())
}
