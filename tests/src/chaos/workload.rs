//! What is trained meanwhile: short jobs of eight logical shards, one network and a GAN in turn, over and over.

use crate::data::fashion_mnist;
use crate::job::{Job, gan, set};
use crate::place::{Place, SIDE};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How large the jobs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Small networks on the tests' small dataset: some milliseconds a step, many epochs.
    Small,
    /// The demo's networks on Fashion-MNIST.
    Demo,
}

/// What a job trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Task {
    /// One network with synchronized batch norm.
    Classify,
    /// Two networks with an optimizer each, in alternating phases.
    Gan,
}

/// How a job ends when nothing happens to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undisturbed {
    /// Of the final weights.
    pub digest: String,
    /// The bits of each step's loss.
    pub losses: BTreeMap<u64, u64>,
    /// How long it took on this machine.
    pub took: Duration,
}

/// How long an undisturbed run may take on a machine that has other things to do.
const UNDISTURBED: Duration = Duration::from_secs(900);

impl Workload {
    /// A data directory with the dataset in it.
    pub fn place(self) -> Place {
        match self {
            Self::Small => Place::new(),
            Self::Demo => {
                let place = Place::empty();
                place.add_dataset("fashion-mnist", &fashion_mnist());
                place
            }
        }
    }

    /// How long ranks wait for a silent one.
    pub fn timeout(self) -> Duration {
        match self {
            Self::Small => Duration::from_secs(4),
            Self::Demo => Duration::from_secs(6),
        }
    }

    /// The job file.
    ///
    /// Where all members of a job are replaced, nobody can tell but by its lease that the last membership is over, so
    /// that is short.
    pub fn job(self, task: Task) -> String {
        let timeout_s = self.timeout().as_secs_f64();
        let collective = format!("[collective]\ntimeout_s = {timeout_s:.1}");
        let workers = "[workers]\norphan_timeout_s = 15";
        match (self, task) {
            (Self::Small, Task::Classify) => {
                let job = Job { steps: 400, logical_shards: 8, max_workers: 6, ..Job::default() };
                let job = Job { width: 16, every_steps: 20, keep: 2, ..job };
                job.to_string().replace("[collective]", &collective).replace("[workers]", workers)
            }
            (Self::Small, Task::Gan) => {
                let job = set(&gan(400, SIDE), "logical_shards", "logical_shards = 8");
                set(&job, "every_steps", "every_steps = 20") + &format!("\n{collective}\n{workers}\n")
            }
            (Self::Demo, Task::Classify) => {
                let job = include_str!("../../../jobs/fashion-nin.toml");
                let job = set(job, "epochs", "steps = 100");
                let job = set(&job, "test", "");
                let job = set(&job, "every_steps", "every_steps = 20");
                job.replace("[collective]", &collective).replace("[workers]", workers)
            }
            (Self::Demo, Task::Gan) => {
                let job = set(include_str!("../../../jobs/fashion-gan.toml"), "epochs", "steps = 300");
                set(&job, "every_steps", "every_steps = 20") + &format!("\n{collective}\n{workers}\n")
            }
        }
    }

    /// Runs the job on one worker, in peace.
    pub fn undisturbed(self, task: Task) -> Undisturbed {
        let place = self.place();
        let began = Instant::now();
        let ended = place.start_run(self.job(task), 1).wait_for(UNDISTURBED);
        let report = place.finished(&ended.expect("an undisturbed run ends").ok());
        Undisturbed { digest: report.digest(), losses: place.losses(&report.job), took: began.elapsed() }
    }
}

impl Task {
    /// The task of the job after this one.
    pub fn next(self) -> Self {
        match self {
            Self::Classify => Self::Gan,
            Self::Gan => Self::Classify,
        }
    }
}
