//! Programs that are killed, stopped and started again.

use crate::process::{is_stopped, signal_pid};
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// A program under a name. What all its processes say goes into one file; dropping it kills the process.
pub struct Actor {
    name: String,
    log: PathBuf,
    child: Option<Child>,
    started: Duration,
}

impl Actor {
    /// One that is not running, with its log in `logs`.
    pub fn new(name: String, logs: &Path) -> Self {
        let log = logs.join(format!("{name}.log"));
        Self { name, log, child: None, started: Duration::ZERO }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// When the newest process was started.
    pub fn started(&self) -> Duration {
        self.started
    }

    /// Whether there is a process.
    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// Whether the process has been stopped, by whomever.
    pub fn is_stopped(&self) -> bool {
        self.child.as_ref().is_some_and(|child| is_stopped(child.id()))
    }

    /// What all its processes have said.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Starts a process.
    pub fn start(&mut self, mut command: Command, now: Duration) {
        let append = || -> File {
            let log = OpenOptions::new().create(true).append(true).open(&self.log);
            log.unwrap_or_else(|e| panic!("{}: {e}", self.log.display()))
        };
        command.stdin(Stdio::null()).stdout(append()).stderr(append());
        let child = command.spawn().unwrap_or_else(|e| panic!("cannot start {}: {e}", self.name));
        self.child = Some(child);
        self.started = now;
    }

    /// Sends the process a signal, if there is one.
    pub fn signal(&self, signal: i32) {
        if let Some(child) = &self.child {
            signal_pid(child.id(), signal);
        }
    }

    /// Sends `kill -9`; [`Self::reap`] waits for the end.
    pub fn strike(&mut self) {
        if let Some(child) = &mut self.child {
            // An error means that it has just ended, which is what is wanted.
            let _ = child.kill();
        }
    }

    /// Waits for the end of a process that has been struck.
    pub fn reap(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.wait().expect("a killed child can be waited for");
        }
    }

    /// How the process ended, once it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.child.as_mut()?.try_wait().expect("a child can be waited for")?;
        self.child = None;
        Some(status)
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        self.strike();
        self.reap();
    }
}
