//! What a job file must satisfy beyond its types.

use super::{
    AverageSpec, Crops, JobSpec, ModelRole, ModelSpec, OptimizerSpec, Precision, ScheduleSpec, Task,
    WireFormat, catalogue,
};
use crate::suggest::did_you_mean;

/// A value that is out of range, and where it stands.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) path: Vec<String>,
    pub(super) what: String,
}

impl Fault {
    pub(super) fn at(path: &[&str], what: impl Into<String>) -> Self {
        Self { path: path.iter().map(|s| (*s).to_owned()).collect(), what: what.into() }
    }
}

fn require(condition: bool, path: &[&str], what: impl FnOnce() -> String) -> Result<(), Fault> {
    if condition { Ok(()) } else { Err(Fault::at(path, what())) }
}

/// More logical shards than this would make one message per shard and layer a burden, and no cluster needs it.
const MAX_LOGICAL_SHARDS: u32 = 4096;

/// A week: who is away for longer does not come back by itself.
const MAX_ORPHAN_S: u64 = 604_800;

pub(super) fn check(job: &JobSpec) -> Result<(), Fault> {
    require(!job.name.is_empty() && job.name.len() <= 100, &["name"], || {
        "`name` must have 1 to 100 characters".to_owned()
    })?;
    require(job.name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)), &["name"], || {
        format!("`name` is {:?}; it takes letters, digits, `-`, `_` and `.`", job.name)
    })?;
    check_length(job)?;
    check_batch(job)?;
    check_networks(job)?;
    check_optimizer(&job.optimizer, &["optimizer"])?;
    check_schedule(&job.schedule)?;
    let smoothing = job.loss.label_smoothing;
    require((0.0..1.0).contains(&smoothing), &["loss", "label_smoothing"], || {
        format!("`label_smoothing` is {smoothing}; it must be at least 0 and below 1")
    })?;
    for (key, bound) in [("value", job.clip.value), ("norm", job.clip.norm)] {
        require(bound.is_none_or(|b| b > 0.0 && b.is_finite()), &["clip", key], || {
            format!("`{key}` must be above 0 and finite")
        })?;
    }
    let grid = job.gan.grid;
    require(grid >= 1 && grid.isqrt().pow(2) == grid && grid <= 1024, &["gan", "grid"], || {
        format!("`grid` is {grid}; it must be a square number up to 1024, such as 64")
    })?;
    require((1..=1000).contains(&job.gan.discriminator_steps), &["gan", "discriminator_steps"], || {
        "`discriminator_steps` must be 1 to 1000".to_owned()
    })?;
    check_average(job)?;
    require(
        job.evaluation.crops == Crops::One || job.task == Task::Classify,
        &["evaluation", "crops"],
        || "`crops` are for the evaluation of `classify` jobs only; remove `[evaluation]`".to_owned(),
    )?;
    check_workers(job)?;
    require(job.collective.bucket_bytes >= 1024, &["collective", "bucket_bytes"], || {
        format!("`bucket_bytes` is {}; it must be at least 1024", job.collective.bucket_bytes)
    })?;
    require((0.5..=3600.0).contains(&job.collective.timeout_s), &["collective", "timeout_s"], || {
        format!("`timeout_s` is {}; it must be 0.5 to 3600 seconds", job.collective.timeout_s)
    })?;
    check_wire(job)?;
    require(job.checkpoint.keep >= 1, &["checkpoint", "keep"], || "`keep` must be at least 1".to_owned())?;
    if let Some((key, what)) = job.data.problem() {
        return Err(Fault::at(&["data", key], what));
    }
    Ok(())
}

fn check_wire(job: &JobSpec) -> Result<(), Fault> {
    let (wire, rank) = (job.collective.wire, job.collective.wire_rank);
    require(wire == WireFormat::F32 || job.precision != Precision::F64, &["collective", "wire"], || {
        "a compressed `wire` carries 32-bit gradients, and this job has `precision = \"f64\"`; remove one of them"
            .to_owned()
    })?;
    require(rank.is_none() || wire == WireFormat::PowerSgd, &["collective", "wire_rank"], || {
        "`wire_rank` is for `wire = \"powersgd\"` only; remove it".to_owned()
    })?;
    require(rank.is_none_or(|r| (1..=64).contains(&r)), &["collective", "wire_rank"], || {
        "`wire_rank` must be 1 to 64".to_owned()
    })
}

fn check_length(job: &JobSpec) -> Result<(), Fault> {
    match (job.epochs, job.steps) {
        (Some(_), Some(_)) => {
            Err(Fault::at(&["steps"], "`epochs` and `steps` are both given; keep one of them"))
        }
        (None, None) => Err(Fault::at(&[], "neither `epochs` nor `steps` is given; add one of them")),
        (Some(0), _) => Err(Fault::at(&["epochs"], "`epochs` is 0; it must be at least 1")),
        (_, Some(0)) => match job.lacks_for_evaluation() {
            Some(lack) => Err(Fault::at(
                &["steps"],
                format!("`steps` is 0; it must be at least 1, as a job that only evaluates needs {lack}"),
            )),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

fn check_batch(job: &JobSpec) -> Result<(), Fault> {
    let (batch, v) = (job.global_batch, job.logical_shards);
    require((1..=MAX_LOGICAL_SHARDS).contains(&v), &["logical_shards"], || {
        format!("`logical_shards` is {v}; it must be 1 to {MAX_LOGICAL_SHARDS}")
    })?;
    require(batch >= 1, &["global_batch"], || "`global_batch` is 0; it must be at least 1".to_owned())?;
    require(batch.is_multiple_of(v), &["global_batch"], || {
        let lower = (batch / v).max(1) * v;
        format!(
            "`global_batch` is {batch}, not a multiple of `logical_shards` = {v}; {lower} or {} is",
            lower + v
        )
    })?;
    let pieces = job.accumulation;
    require(pieces >= 1 && (batch / v).is_multiple_of(pieces), &["accumulation"], || {
        format!("`accumulation` is {pieces}; it must divide the {} samples of a logical shard", batch / v)
    })?;
    require(pieces == 1 || job.task == Task::Classify, &["accumulation"], || {
        "`accumulation` is for `classify` jobs only; remove it".to_owned()
    })
}

fn check_networks(job: &JobSpec) -> Result<(), Fault> {
    let (wanted, unwanted): (&[(&str, ModelRole)], &[&str]) = match job.task {
        Task::Classify => (&[("model", ModelRole::Classifier)], &["generator", "discriminator"]),
        Task::Gan => {
            (&[("generator", ModelRole::Generator), ("discriminator", ModelRole::Discriminator)], &["model"])
        }
    };
    let task = match job.task {
        Task::Classify => "classify",
        Task::Gan => "gan",
    };
    let networks = job.networks();
    for name in unwanted {
        require(networks.iter().all(|(n, _)| n != name), &[name], || {
            format!("a `{task}` job has no section `[{name}]`; remove it")
        })?;
    }
    for (section, role) in wanted {
        let Some((_, model)) = networks.iter().find(|(n, _)| n == section) else {
            return Err(Fault::at(&["task"], format!("a `{task}` job needs a section `[{section}]`")));
        };
        check_model(section, model, *role)?;
    }
    Ok(())
}

/// The keys that every model takes.
const OWN_KEYS: [&str; 4] = ["batch_norm", "optimizer", "weights", "weights_blake3"];

fn check_model(section: &str, model: &ModelSpec, role: ModelRole) -> Result<(), Fault> {
    let fitting = || catalogue().iter().filter(|m| m.role == role).map(|m| m.name);
    let Some(entry) = catalogue().iter().find(|m| m.name == model.name) else {
        let hint = did_you_mean(&model.name, fitting());
        let what = format!("unknown model `{}`{hint} (`worker models` lists them)", model.name);
        return Err(Fault::at(&[section, "name"], what));
    };
    require(entry.role == role, &[section, "name"], || {
        let names: Vec<_> = fitting().map(|n| format!("`{n}`")).collect();
        format!("model `{}` does not fit `[{section}]`; {} would", model.name, names.join(" or "))
    })?;
    for (key, value) in &model.options {
        let Some(option) = entry.options.iter().find(|option| option.name == key) else {
            let known = entry.options.iter().map(|option| option.name).chain(OWN_KEYS);
            let what =
                format!("unknown option `{key}` of model `{}`{}", model.name, did_you_mean(key, known));
            return Err(Fault::at(&[section, key], what));
        };
        if let Some(problem) = option.kind.problem(value) {
            return Err(Fault::at(&[section, key], format!("`{key}` is {value}; {problem}")));
        }
    }
    if let Some((key, problem)) = model.contradiction() {
        return Err(Fault::at(&[section, key], format!("`{key}` {problem}")));
    }
    check_weights(section, model)?;
    match &model.optimizer {
        Some(own) => check_optimizer(own, &[section, "optimizer"]),
        None => Ok(()),
    }
}

/// A file's bytes decide about the result, so a job names them and not only the file.
fn check_weights(section: &str, model: &ModelSpec) -> Result<(), Fault> {
    match (&model.weights, &model.weights_blake3) {
        (None, None) => Ok(()),
        (Some(file), None) => Err(Fault::at(
            &[section, "weights"],
            format!(
                "`weights` needs `weights_blake3`, the file's hash; `worker weights {file}` prints it, and `b3sum` where \
                 that does not know the network"
            ),
        )),
        (None, Some(_)) => {
            Err(Fault::at(&[section, "weights_blake3"], "`weights_blake3` needs `weights`, a file"))
        }
        (Some(_), Some(hash)) => {
            let is_hash = hash.len() == 64 && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            require(is_hash, &[section, "weights_blake3"], || {
                format!("`weights_blake3` is {hash:?}; it must be 64 hexadecimal digits in lower case")
            })
        }
    }
}

fn check_optimizer(optimizer: &OptimizerSpec, path: &[&str]) -> Result<(), Fault> {
    let at = |key| [path, &[key]].concat();
    let range = |key: &'static str, value: f64, ok: bool, range: &str| {
        require(ok, &at(key), || format!("`{key}` is {value}; it must be {range}"))
    };
    let lr = optimizer.lr();
    range("lr", lr, lr > 0.0 && lr.is_finite(), "above 0 and finite")?;
    let decay = optimizer.weight_decay();
    range("weight_decay", decay, decay >= 0.0 && decay.is_finite(), "at least 0")?;
    for group in optimizer.groups() {
        let name = &group.parameters;
        require(group.lr_factor >= 0.0 && group.lr_factor.is_finite(), &at("groups"), || {
            format!("`lr_factor` of `{name}` is {}; it must be at least 0", group.lr_factor)
        })?;
        require(group.weight_decay.is_none_or(|d| d >= 0.0 && d.is_finite()), &at("groups"), || {
            format!("`weight_decay` of `{name}` must be at least 0")
        })?;
    }
    match optimizer {
        OptimizerSpec::Sgd { momentum, momentum_final, nesterov, .. } => {
            range("momentum", *momentum, (0.0..1.0).contains(momentum), "at least 0 and below 1")?;
            if let Some(end) = momentum_final {
                range("momentum_final", *end, (0.0..1.0).contains(end), "at least 0 and below 1")?;
            }
            require(!nesterov || *momentum > 0.0, &at("nesterov"), || {
                "`nesterov` needs a `momentum` above 0".to_owned()
            })
        }
        OptimizerSpec::Adam { beta1, beta2, eps, .. } | OptimizerSpec::Adamw { beta1, beta2, eps, .. } => {
            range("beta1", *beta1, (0.0..1.0).contains(beta1), "at least 0 and below 1")?;
            range("beta2", *beta2, (0.0..1.0).contains(beta2), "at least 0 and below 1")?;
            range("eps", *eps, *eps > 0.0 && eps.is_finite(), "above 0")
        }
        OptimizerSpec::Rmsprop { alpha, eps, momentum, .. } => {
            range("alpha", *alpha, (0.0..1.0).contains(alpha), "at least 0 and below 1")?;
            range("momentum", *momentum, (0.0..1.0).contains(momentum), "at least 0 and below 1")?;
            range("eps", *eps, *eps > 0.0 && eps.is_finite(), "above 0")
        }
    }
}

fn check_average(job: &JobSpec) -> Result<(), Fault> {
    require(job.average.is_none() || job.task == Task::Classify, &["average"], || {
        "an average of the weights is for the evaluation of `classify` jobs only; remove `[average]`"
            .to_owned()
    })?;
    match job.average {
        Some(AverageSpec::Ema { decay, .. }) => {
            require((0.0..1.0).contains(&decay), &["average", "decay"], || {
                format!("`decay` is {decay}; it must be at least 0 and below 1, such as 0.9999")
            })
        }
        Some(AverageSpec::Polyak { .. }) | None => Ok(()),
    }
}

fn check_schedule(schedule: &ScheduleSpec) -> Result<(), Fault> {
    let positive = |key: &'static str, value: f64| {
        require(value > 0.0 && value.is_finite(), &["schedule", key], || {
            format!("`{key}` is {value}; it must be above 0 and finite")
        })
    };
    let factor = |key: &'static str, value: f64| {
        require((0.0..=1.0).contains(&value), &["schedule", key], || {
            format!("`{key}` is {value}; it must be 0 to 1")
        })
    };
    match schedule {
        ScheduleSpec::Constant { .. } => Ok(()),
        ScheduleSpec::Step { every_epochs, gamma, .. } => {
            positive("every_epochs", *every_epochs)?;
            positive("gamma", *gamma)
        }
        ScheduleSpec::Milestones { epochs, gamma, .. } => {
            let ascends = epochs.is_sorted_by(|a, b| a < b);
            require(ascends && epochs.iter().all(|e| *e > 0.0), &["schedule", "epochs"], || {
                "`epochs` must be above 0 and in ascending order, each once".to_owned()
            })?;
            positive("gamma", *gamma)
        }
        ScheduleSpec::Polynomial { power, final_factor, .. } => {
            positive("power", *power)?;
            factor("final_factor", *final_factor)
        }
        ScheduleSpec::Cosine { final_factor, .. } => factor("final_factor", *final_factor),
        ScheduleSpec::Exponential { decay, floor, .. } => {
            require(*decay >= 1.0 && decay.is_finite(), &["schedule", "decay"], || {
                format!(
                    "`decay` is {decay}; the rate is divided by it at each step, so it must be at least 1, such as 1.001"
                )
            })?;
            factor("floor", *floor)
        }
    }
}

fn check_workers(job: &JobSpec) -> Result<(), Fault> {
    let (min, v) = (job.workers.min, job.logical_shards);
    require(min >= 1, &["workers", "min"], || "`min` is 0; it must be at least 1".to_owned())?;
    require(min <= v, &["workers", "min"], || {
        format!("`min` is {min}, but {v} logical shards occupy at most {v} workers; raise `logical_shards`")
    })?;
    require(job.workers.max.is_none_or(|max| max >= min), &["workers", "max"], || {
        format!("`max` is below `min` = {min}")
    })?;
    let orphan = job.workers.orphan_timeout_s;
    require((1..=MAX_ORPHAN_S).contains(&orphan), &["workers", "orphan_timeout_s"], || {
        format!("`orphan_timeout_s` is {orphan}; it must be 1 to {MAX_ORPHAN_S} seconds")
    })
}
