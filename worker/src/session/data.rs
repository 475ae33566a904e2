//! A job's datasets, ready to be read.

use super::Environment;
use crate::data::batch::Decoder;
use crate::data::loader::{Loader, Timetable};
use crate::data::preparation::{Basis, Use};
use crate::data::source;
use crate::tasks::TaskPlan;
use crate::train::Number;
use crate::train::device::device;
use crate::train::error::TrainError;
use lockstep_common::dataset::DatasetReader;
use lockstep_common::job::JobSpec;
use lockstep_common::sampler::Sampler;
use lockstep_common::wire::DatasetBrief;
use lockstep_nn::models;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// A job's datasets, open, and when which samples come.
pub(super) struct Data<T> {
    pub(super) train: Decoder<T>,
    pub(super) test: Option<Arc<Decoder<T>>>,
    pub(super) timetable: Timetable,
}

impl<T: Number> Data<T> {
    pub(super) fn open(
        environment: &Environment,
        job: &JobSpec,
        datasets: &[DatasetBrief],
        plan: &TaskPlan,
    ) -> Result<Self, TrainError> {
        let (control, device) = (&environment.control, device(environment.device));
        let open = |name: &str| source::open(name, datasets, &environment.shards, control);
        let train = open(&job.data.train)?;
        check_classes(job, &train)?;
        let basis = Basis::read(&job.data, &train)?;
        let decoder = |reader, purpose| {
            let pool = environment.decoders.clone();
            Decoder::<T>::new(reader, &job.data, purpose, &basis, job.seed, device, pool)
        };
        let test = match &job.data.test {
            Some(name) => {
                let test = open(name)?;
                check_classes(job, &test)?;
                Some(Arc::new(decoder(test, Use::Evaluate(job.evaluation.crops))?))
            }
            None => None,
        };
        let sampler =
            Sampler::new(job.seed, train.len(), u64::from(job.global_batch), job.logical_shards, true);
        let timetable = Timetable {
            sampler: Arc::new(sampler.map_err(|e| TrainError::Fatal(e.to_string()))?),
            per_step: plan.minibatches as u64,
        };
        Ok(Self { train: decoder(train, Use::Train)?, test, timetable })
    }
}

/// Brings what one step needs into the cache. Its samples are from all over the dataset, so that is most of it.
pub(crate) fn warm_up<T: Number>(
    environment: &Environment,
    job: &JobSpec,
    datasets: &[DatasetBrief],
    plan: &TaskPlan,
) -> Result<(), TrainError> {
    let Data { train, timetable, .. } = Data::<T>::open(environment, job, datasets, plan)?;
    let loader = Loader::start(train, timetable, 0..job.logical_shards, 0..1)?;
    loader.next(&AtomicBool::new(false)).map(drop)
}

/// A label beyond the network's last logit would only fail deep inside libtorch.
pub(crate) fn check_classes(job: &JobSpec, data: &DatasetReader) -> Result<(), TrainError> {
    let Some(model) = &job.model else { return Ok(()) };
    let classes = models::classes(model)?;
    let needed = i64::from(data.manifest().classes);
    if needed > classes {
        return Err(TrainError::Fatal(format!(
            "dataset `{}` has {needed} classes and the model {classes}; set `classes = {needed}` in `[model]`",
            data.manifest().name
        )));
    }
    Ok(())
}
