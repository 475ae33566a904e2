//! A coordinator that serves, and workers that join it.

use crate::place::{Place, Report};
use crate::process::{Process, command};
use crate::scrape::Scrape;
use crate::wait::until;
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// A serving coordinator over a [`Place`].
pub struct Cluster {
    /// Its data directory and commands.
    pub place: Place,
    /// The process.
    pub coordinator: Process,
    workers: u32,
}

impl Cluster {
    /// Starts a coordinator on free ports.
    pub fn start(place: Place) -> Self {
        let coordinator = serve(&place, "127.0.0.1:0");
        Self { place, coordinator, workers: 0 }
    }

    /// Where workers connect to.
    pub fn address(&self) -> String {
        endpoint(&self.place, "coordinator").expect("a running coordinator says where it is")
    }

    /// Where its metrics are.
    pub fn http(&self) -> String {
        endpoint(&self.place, "http").expect("a running coordinator says where its metrics are")
    }

    /// The coordinator's metrics.
    pub fn scrape(&self) -> Scrape {
        Scrape::of(&self.http())
    }

    /// Kills the coordinator with -9.
    pub fn stop(&mut self) {
        self.coordinator.kill();
    }

    /// Kills the coordinator with -9 and starts another one on the same directory and port.
    pub fn restart(&mut self) {
        let address = self.address();
        self.coordinator.kill();
        self.coordinator = serve(&self.place, &address);
    }

    /// A token for workers.
    pub fn token(&self) -> String {
        self.new_token(&[])
    }

    /// A token made with these options.
    #[track_caller]
    pub fn new_token(&self, options: &[&str]) -> String {
        let ended = self.place.coordinator(["token", "new"].iter().chain(options)).ok();
        ended.stdout.trim().to_owned()
    }

    /// The folder of the worker that joins next.
    pub fn next_worker_dir(&mut self) -> PathBuf {
        self.workers += 1;
        self.place.file(&format!("worker-{}", self.workers))
    }

    /// `worker join` with a token, a folder of its own and metrics, ready for further arguments.
    pub fn join_command(&mut self, token: &str) -> Command {
        let mut command = command("worker");
        command.args(["join", "--coordinator", &self.address(), "--threads", "1"]);
        command.args(["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]);
        command.arg("--data-dir").arg(self.next_worker_dir()).env("LOCKSTEP_TOKEN", token);
        command
    }

    /// Starts a worker and waits until the coordinator counts it.
    pub fn worker(&mut self) -> Process {
        let token = self.token();
        let command = self.join_command(&token);
        self.join(command)
    }

    /// Starts the worker of `command` and waits until the coordinator counts it.
    #[track_caller]
    pub fn join(&self, command: Command) -> Process {
        let before = self.present();
        let mut worker = Process::start(command);
        worker.until("being there", || (self.present() > before).then_some(()));
        worker
    }

    /// How many workers are there, idle or busy.
    pub fn present(&self) -> usize {
        let workers = self.place.json(&["workers"]);
        let there = |w: &&Value| w["state"] != "away";
        workers.as_array().expect("a list of workers").iter().filter(there).count()
    }

    /// Submits a job and returns its id.
    #[track_caller]
    pub fn submit(&self, job: impl ToString) -> String {
        let path = self.place.job_file(job);
        let answer = self.place.json(&["submit", &path.to_string_lossy()]);
        answer["job"].as_str().expect("the job's id").to_owned()
    }

    /// What `status --json` says.
    #[track_caller]
    pub fn status(&self, job: &str) -> Report {
        serde_json::from_value(self.place.json(&["status", job])).expect("a status")
    }

    /// Waits until the job's status satisfies `wanted`.
    #[track_caller]
    pub fn until_status(&self, job: &str, what: &str, wanted: impl Fn(&Report) -> bool) -> Report {
        until(&format!("{job} to be {what}; its log:\n{}", self.place.log(job)), || {
            let status = self.status(job);
            let hopeless = ["failed", "cancelled", "finished"].contains(&status.state.as_str());
            let met = wanted(&status);
            assert!(met || !hopeless, "{status:?} instead of {what}; its log:\n{}", self.place.log(job));
            met.then_some(status)
        })
    }

    /// Waits until the job has finished, with every sample counted once.
    #[track_caller]
    pub fn until_finished(&self, job: &str) -> Report {
        let status = self.until_status(job, "finished", |status| status.state == "finished");
        self.place.prove(job);
        status
    }

    /// Waits until the job has a checkpoint and has committed this step, by its metrics file.
    #[track_caller]
    pub fn until_step(&self, job: &str, step: u64) {
        until(&format!("{job} to reach step {step}; its log:\n{}", self.place.log(job)), || {
            let last = self.place.metrics(job).last()?["step"].as_u64()?;
            (last >= step).then_some(())
        });
    }

    /// The metrics of the workers that are there.
    pub fn scrape_workers(&self) -> Vec<Scrape> {
        let workers = self.place.json(&["workers"]);
        let there = workers.as_array().expect("a list of workers").iter().filter(|w| w["state"] != "away");
        there.filter_map(|w| w["metrics"].as_str()).map(Scrape::of).collect()
    }
}

fn endpoint(place: &Place, key: &str) -> Option<String> {
    let text = fs::read_to_string(place.dir().join("endpoint.json")).ok()?;
    let endpoint: Value = serde_json::from_str(&text).ok()?;
    endpoint[key].as_str().map(str::to_owned)
}

fn serve(place: &Place, listen: &str) -> Process {
    let mut command = place.command();
    command.args(["serve", "--listen", listen, "--http", "127.0.0.1:0"]);
    let mut process = Process::start(command);
    process.until("serving", || {
        let text = fs::read_to_string(place.dir().join("endpoint.json")).ok()?;
        // A killed predecessor's file may still be there.
        let endpoint: Value = serde_json::from_str(&text).ok()?;
        reqwest::blocking::get(format!("http://{}/healthz", endpoint["http"].as_str()?)).ok().map(drop)
    });
    process
}
