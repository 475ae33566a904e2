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
    let ViewBatch { images, labels } = data.viewed(samples.clone())?;
    let answers = answers(task, &images, data.views(), progress)?;
    samples
        .zip(labels)
        .zip(answers)
        .map(|((sample, label), views)| {
            let named = |e| TrainError::Fatal(format!("sample {sample} of `{}`: {e}", data.manifest().name));
            let views = finite(views).map_err(named)?;
            // Refused before, as the dataset's classes are known; a row of the logits must not be overrun all the same.
            let label = usize::try_from(label).ok().filter(|label| *label < views.classes());
            let label = label
                .ok_or_else(|| TrainError::Fatal("a sample's class is none of the network's".to_owned()))?;
            Ok(Judged { label, views })
        })
        .collect()
}

/// Refuses an answer that holds a logit that is no finite number: of such no class is the most probable.
pub(crate) fn finite(views: Views) -> Result<Views, TrainError> {
    match views.not_finite() {
        None => Ok(views),
        Some((class, logit)) => Err(TrainError::Fatal(format!(
            "the network's logit of class {class} is {logit}; its weights have diverged or are damaged, or its images are not scaled \
             as in training"
        ))),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::TaskPlan;
    use crate::train::tests::{classifier, job};
    use lockstep_nn::vars::Vars;

    #[test]
    fn the_answer_to_an_image_is_the_average_of_its_views_softmax() {
        let plan = TaskPlan::new(&job(&classifier("sync"), "precision = \"f64\""));
        let vars = plan.build(Kind::Double, Device::Cpu).unwrap();
        let frozen = || vars.iter().map(Vars::frozen).collect::<Result<Vec<_>, _>>().unwrap();
        let mut task = plan.lane(&mut frozen(), &mut frozen()).unwrap();
        // Two images of 40 views: more than go through the network at a time.
        let images = Tensor::arange(80 * 64, (Kind::Double, Device::Cpu)).sin().view([80, 1, 8, 8]) * 3.0;
        let found = answers(task.as_mut(), &images, 40, &|| Ok(())).unwrap();
        assert_eq!(found.len(), 2);
        for (i, views) in (0..).zip(found) {
            let logits = task.logits(&images.narrow(0, i * 40, 40)).unwrap();
            let by_hand = logits.softmax(-1, Kind::Double).mean_dim([0i64].as_slice(), false, Kind::Double);
            for (class, probability) in (0..).zip(views.probabilities()) {
                assert!((by_hand.double_value(&[class]) - probability).abs() < 1e-13);
            }
        }
    }

    #[test]
    fn logits_that_are_not_finite_are_refused() {
        for (broken, told) in [(f64::NAN, "NaN"), (f64::INFINITY, "inf"), (f64::NEG_INFINITY, "-inf")] {
            // The second view's third class.
            let error = finite(Views::new(3, vec![0.0, 1.0, 2.0, 0.5, 0.5, broken])).unwrap_err().to_string();
            assert!(error.starts_with(&format!("the network's logit of class 2 is {told};")), "{error}");
        }
        let views = Views::new(3, vec![0.0, -1e300, 1e300]);
        assert_eq!(finite(views.clone()).unwrap(), views);
    }

    #[test]
    fn a_pass_through_the_network_can_be_the_last() {
        let plan = TaskPlan::new(&job(&classifier("sync"), ""));
        let vars = plan.build(Kind::Float, Device::Cpu).unwrap();
        let frozen = || vars.iter().map(Vars::frozen).collect::<Result<Vec<_>, _>>().unwrap();
        let mut task = plan.lane(&mut frozen(), &mut frozen()).unwrap();
        let images = Tensor::zeros([144, 1, 8, 8], (Kind::Float, Device::Cpu));
        let passes = std::cell::Cell::new(0);
        let progress = || {
            passes.set(passes.get() + 1);
            if passes.get() == 2 { Err(TrainError::Aborted) } else { Ok(()) }
        };
        assert!(matches!(answers(task.as_mut(), &images, 144, &progress), Err(TrainError::Aborted)));
        assert_eq!(passes.get(), 2);
    }
}
