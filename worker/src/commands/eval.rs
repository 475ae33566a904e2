//! `worker eval`: trained classifiers on a test set, by themselves and together.

use super::args::EvalArgs;
use super::candidates::{self, shown};
use super::progress::Progress;
use crate::cli::DeviceArg;
use crate::data::batch::Decoder;
use crate::data::pool::Pool;
use crate::data::preparation::{Basis, Use};
use crate::evaluation::candidate::Candidate;
use crate::evaluation::contest::{Division, Entrant, Entry, hold};
use crate::evaluation::judge;
use crate::evaluation::report::{Report, Subject, side_by_side};
use crate::evaluation::stores::Stores;
use crate::train::Number;
use crate::train::device::{device, enable_cuda};
use anyhow::{Context, Result, anyhow, bail};
use lockstep_common::dataset::Manifest;
use lockstep_common::job::{Crops, DataSpec, JobSpec, PixelScale, Precision};
use lockstep_common::output::output;
use serde::Serialize;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

/// The whole report.
#[derive(Serialize)]
struct Evaluations {
    checkpoints: Vec<Evaluated>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ensemble: Option<Report>,
}

/// One checkpoint's.
#[derive(Serialize)]
struct Evaluated {
    path: String,
    model: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    step: Option<u64>,
    report: Report,
}

/// Evaluates the checkpoints that `args` name and prints what they come to.
pub(crate) fn eval(args: &EvalArgs) -> Result<()> {
    if let DeviceArg::Cuda(index) = args.common.device {
        enable_cuda(index)?;
    }
    let candidates = candidates::read(&args.checkpoint, &args.common, args.dataset.as_deref())?;
    let contest = Contest::new(args, &candidates)?;
    let target = args.json.as_deref().filter(|path| path.as_os_str() != "-");
    // Found out before the work is done.
    let target = target.map(Target::open).transpose()?;
    let evaluations = contest.evaluations()?;
    match (target, &args.json) {
        (Some(target), _) => {
            print(&evaluations)?;
            target.write(&serde_json::to_string(&evaluations)?)
        }
        (None, Some(_)) => Ok(writeln!(output(), "{}", serde_json::to_string(&evaluations)?)?),
        (None, None) => print(&evaluations),
    }
}

/// A file to be written. What it held stays until it is, and one that was not there goes again unless it is.
struct Target<'a> {
    path: &'a Path,
    file: File,
    goes: bool,
}

impl<'a> Target<'a> {
    /// Fails where the file cannot be written.
    fn open(path: &'a Path) -> Result<Self> {
        let goes = !path.exists();
        let file = File::options().write(true).create(true).truncate(false).open(path);
        Ok(Self { path, file: file.with_context(|| cannot_write(path))?, goes })
    }

    fn write(mut self, text: &str) -> Result<()> {
        // A pipe has no length.
        if self.file.metadata()?.is_file() {
            self.file.set_len(0)?;
        }
        self.file.write_all(text.as_bytes()).with_context(|| cannot_write(self.path))?;
        self.goes = false;
        Ok(())
    }
}

impl Drop for Target<'_> {
    fn drop(&mut self) {
        if self.goes
            && let Err(e) = std::fs::remove_file(self.path)
        {
            tracing::warn!("`{}` is left empty: {e}", self.path.display());
        }
    }
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write `{}`", path.display())
}

fn print(evaluations: &Evaluations) -> Result<()> {
    let mut rows: Vec<_> = evaluations.checkpoints.iter().map(|e| (e.path.as_str(), &e.report)).collect();
    rows.extend(evaluations.ensemble.as_ref().map(|report| ("ensemble", report)));
    let mut out = output();
    if let Some((_, Report { dataset, samples, crops, .. })) = rows.first() {
        let crops = crops.count();
        writeln!(
            out,
            "{dataset}: {samples} images, {crops} {}\n",
            if crops == 1 { "crop" } else { "crops" }
        )?;
    }
    write!(out, "{}", side_by_side(&rows))?;
    for (name, report) in &rows {
        writeln!(out, "\n{name}\n\n{}", report.details())?;
    }
    Ok(())
}

/// What is to be evaluated on what.
struct Contest<'a> {
    args: &'a EvalArgs,
    candidates: &'a [Candidate],
    stores: Stores,
    crops: Crops,
    /// The test set's name.
    dataset: String,
    test: Manifest,
    pool: Arc<Pool>,
}

impl<'a> Contest<'a> {
    fn new(args: &'a EvalArgs, candidates: &'a [Candidate]) -> Result<Self> {
        let stores = Stores::find(&args.common.datasets, &args.checkpoint);
        let jobs = || candidates.iter().map(|candidate| &candidate.job);
        let dataset = args.dataset.clone().or_else(|| jobs().find_map(|job| job.data.test.clone()));
        let dataset =
            dataset.context("no job names a test set; --dataset NAME does, such as `fashion-mnist/test`")?;
        let test = stores.manifest(&dataset)?;
        let crops = match args.common.crops {
            Some(crops) => crops,
            None => same(jobs().map(|job| job.evaluation.crops)).context(
                "the checkpoints' jobs are evaluated with different `crops`; --crops says how many",
            )?,
        };
        for candidate in candidates {
            let classes = candidate.classes()?;
            if (test.classes as usize) > classes {
                bail!(
                    "{}: its network has {classes} classes, and dataset `{dataset}` has {}",
                    shown(&candidate.path),
                    test.classes
                );
            }
        }
        if args.ensemble {
            let classes = candidates.iter().map(Candidate::classes).collect::<Result<Vec<_>>>()?;
            same(classes.into_iter()).context("networks of different numbers of classes make no ensemble")?;
        }
        let pool = Arc::new(Pool::new(args.common.threads())?);
        Ok(Self { args, candidates, stores, crops, dataset, test, pool })
    }

    fn evaluations(&self) -> Result<Evaluations> {
        // Together they must be shown the same samples at a time; by themselves each is divided as its job is.
        let rounds: Vec<&[Candidate]> =
            if self.args.ensemble { vec![self.candidates] } else { self.candidates.chunks(1).collect() };
        let (mut checkpoints, mut ensemble) = (Vec::new(), None);
        for round in rounds {
            let entrants = round
                .iter()
                .map(|candidate| self.entrant(candidate).with_context(|| shown(&candidate.path)))
                .collect::<Result<Vec<_>>>()?;
            let Some(first) = round.first() else { continue };
            let views = self.crops.count() as usize;
            let division = Division {
                shards: first.job.logical_shards,
                batch: self.args.batch.unwrap_or_else(|| judge::batch(views)),
                threads: self.args.common.threads(),
            };
            let progress = Progress::new(self.test.samples);
            let outcome = hold(&entrants, division, &|samples| progress.add(samples))?;
            for (candidate, tally) in round.iter().zip(&outcome.each) {
                checkpoints.push(Evaluated {
                    path: candidate.path.display().to_string(),
                    model: candidate.model()?.name.clone(),
                    step: candidate.step(),
                    report: Report::new(&self.subject(candidate)?, tally),
                });
            }
            if self.args.ensemble {
                ensemble = Some(Report::new(&self.subject(first)?, &outcome.together));
            }
        }
        Ok(Evaluations { checkpoints, ensemble })
    }

    fn subject(&self, candidate: &Candidate) -> Result<Subject> {
        Ok(Subject {
            dataset: self.dataset.clone(),
            classes: candidate.classes()?,
            labels: self.test.classes as usize,
            names: self.test.class_names.clone(),
            crops: self.crops,
        })
    }

    fn entrant(&self, candidate: &Candidate) -> Result<Box<dyn Entrant>> {
        match candidate.job.precision {
            Precision::F64 => Ok(Box::new(self.entry::<f64>(candidate)?)),
            Precision::F32 | Precision::Bf16 => Ok(Box::new(self.entry::<f32>(candidate)?)),
        }
    }

    fn entry<T: Number>(&self, candidate: &Candidate) -> Result<Entry<T>> {
        let device = device(self.args.common.device);
        let JobSpec { data, seed, .. } = &candidate.job;
        let basis = basis(&self.stores, data)?;
        let basis = basis.unwrap_or_else(|| Basis::without_whitening(self.test.clone()));
        let reader = self.stores.reader(&self.dataset)?;
        let purpose = Use::Evaluate(self.crops);
        let shape = data.test_shape(&self.test, self.crops).map_err(|(_, what)| anyhow!(what))?;
        candidate.check_channels(shape.channels)?;
        let data = Decoder::new(reader, data, purpose, &basis, *seed, device, self.pool.clone())?;
        Ok(Entry { name: shown(&candidate.path), network: candidate.network(device)?, data: Arc::new(data) })
    }
}

/// The value that all have.
fn same<T: PartialEq>(mut values: impl Iterator<Item = T>) -> Option<T> {
    let first = values.next()?;
    values.all(|value| value == first).then_some(first)
}

/// What the training set decides about the preparation of images, if it does.
pub(super) fn basis<T: Number>(stores: &Stores, data: &DataSpec) -> Result<Option<Basis<T>>> {
    if data.whiten.is_some() {
        let name = &data.train;
        let train =
            stores.reader(name).with_context(|| format!("images are whitened by what fits `{name}`"))?;
        return Ok(Some(Basis::read(data, &train)?));
    }
    if data.scale != PixelScale::Standardize || data.mean.is_some() {
        return Ok(None);
    }
    if data.train.is_empty() {
        bail!(
            "how are pixels scaled? say it with --mean and --std, --train NAME, --scale unit|gcn or --job FILE"
        );
    }
    let train = stores.manifest(&data.train);
    let train = train.with_context(|| format!("pixels are scaled by the statistics of `{}`", data.train))?;
    Ok(Some(Basis::without_whitening(train)))
}
