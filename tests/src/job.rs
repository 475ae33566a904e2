//! Job files for tests.

/// A small classification job; `to_string` gives its file.
#[derive(Clone, Debug)]
pub struct Job {
    /// The job's name.
    pub name: &'static str,
    /// Steps in all.
    pub steps: u64,
    /// Samples per step.
    pub global_batch: u32,
    /// V.
    pub logical_shards: u32,
    /// `f32` or `f64`.
    pub precision: &'static str,
    /// `sync`, `local` or `none`.
    pub batch_norm: &'static str,
    /// Channels of the first layer: how long a step takes.
    pub width: u32,
    /// Steps between checkpoints.
    pub every_steps: u64,
    /// Checkpoints kept.
    pub keep: u32,
    /// The fewest workers.
    pub min_workers: u32,
    /// The most workers.
    pub max_workers: u32,
    /// The form in which gradients travel.
    pub wire: &'static str,
}

impl Default for Job {
    fn default() -> Self {
        Self {
            name: "small",
            steps: 20,
            global_batch: 32,
            logical_shards: 4,
            precision: "f32",
            batch_norm: "sync",
            width: 4,
            every_steps: 10,
            keep: 3,
            min_workers: 1,
            max_workers: 4,
            wire: "f32",
        }
    }
}

impl std::fmt::Display for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, steps, global_batch, logical_shards, precision, batch_norm, width, .. } = self;
        let Self { every_steps, keep, min_workers, max_workers, wire, .. } = self;
        write!(
            f,
            r#"name = "{name}"
task = "classify"
seed = 7
steps = {steps}
global_batch = {global_batch}
logical_shards = {logical_shards}
precision = "{precision}"

[model]
name = "small-cnn"
width = {width}
batch_norm = "{batch_norm}"

[data]
train = "tiny/train"
test = "tiny/test"
augment = [{{ name = "pad-crop", pixels = 2 }}, {{ name = "flip" }}]

[optimizer]
name = "sgd"
lr = 0.05
momentum = 0.9

[schedule]
name = "cosine"
warmup_steps = 5

[workers]
min = {min_workers}
max = {max_workers}

[collective]
bucket_bytes = 4096
wire = "{wire}"

[checkpoint]
every_steps = {every_steps}
keep = {keep}
"#
        )
    }
}

/// A small GAN job on the small dataset of `side` × `side` pixels.
pub fn gan(steps: u64, side: u32) -> String {
    let pixels = side * side;
    format!(
        r#"name = "small-gan"
task = "gan"
seed = 3
steps = {steps}
global_batch = 32
logical_shards = 4

[generator]
name = "gan-generator"
latent = 16
hidden = 32
outputs = {pixels}

[discriminator]
name = "gan-discriminator"
inputs = {pixels}
hidden = 24

[data]
train = "tiny/train"
scale = "unit"

[gan]
grid = 16

[optimizer]
name = "sgd"
lr = 0.05
momentum = 0.5

[checkpoint]
every_steps = 10
"#
    )
}

/// The job file with `line` in place of the one that sets `key`, wherever that is.
#[track_caller]
pub fn set(job: &str, key: &str, line: &str) -> String {
    let is_key = |l: &&str| l.strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('='));
    let old = job.lines().find(is_key).unwrap_or_else(|| panic!("the job has no `{key}`"));
    job.replacen(old, line, 1)
}
