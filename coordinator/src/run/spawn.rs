//! The worker processes of `coordinator run`.

use anyhow::{Context, Result, bail};
use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};

/// How often one worker is started again.
const MAX_RESTARTS: u32 = 3;

/// Before a worker is started again, times the attempt.
const RESTART_PAUSE: Duration = Duration::from_millis(500);

/// The exit code of a worker that would not work if it were started again.
const UNUSABLE: i32 = 2;

/// How long workers may take to leave.
const LEAVE_TIME: Duration = Duration::from_secs(5);

/// How workers are started.
#[derive(Clone, Debug)]
pub(super) struct Recipe {
    pub(super) program: PathBuf,
    pub(super) coordinator: SocketAddr,
    pub(super) token: String,
    pub(super) datasets: PathBuf,
    /// In turn; none means the CPU.
    pub(super) devices: Vec<String>,
    pub(super) threads: u32,
}

/// A place for a worker, with its process while it has one.
struct Slot {
    number: u32,
    dir: PathBuf,
    log: PathBuf,
    process: Process,
    restarts: u32,
}

enum Process {
    Alive(Child),
    Due(Instant),
    GivenUp,
}

/// The local workers.
pub(super) struct Fleet {
    recipe: Recipe,
    slots: Vec<Slot>,
}

/// Something that happened to a worker.
pub(super) enum Incident {
    /// It died and is started again.
    Died(String),
    /// It died too often.
    GivenUp(String),
    /// It says that it cannot work as it was started.
    Unusable(String),
}

impl Fleet {
    /// Starts a worker in each place, given by its data directory and its log.
    pub(super) fn start(recipe: Recipe, places: Vec<(PathBuf, PathBuf)>) -> Result<Self> {
        let mut fleet = Self { recipe, slots: Vec::new() };
        for (number, (dir, log)) in (1..).zip(places) {
            let process = Process::Alive(fleet.recipe.spawn(number, &dir, &log)?);
            fleet.slots.push(Slot { number, dir, log, process, restarts: 0 });
        }
        Ok(fleet)
    }

    /// Looks after the workers: notes who died, starts again who is due.
    pub(super) fn tend(&mut self) -> Result<Vec<Incident>> {
        let mut incidents = Vec::new();
        for slot in &mut self.slots {
            match &mut slot.process {
                Process::Alive(child) => {
                    if let Some(status) = child.try_wait().context("cannot see whether a worker is alive")? {
                        incidents.push(slot.died(status));
                    }
                }
                Process::Due(at) if *at <= Instant::now() => {
                    slot.process = Process::Alive(self.recipe.spawn(slot.number, &slot.dir, &slot.log)?);
                }
                Process::Due(_) | Process::GivenUp => {}
            }
        }
        Ok(incidents)
    }

    /// How many workers there are or will be again.
    pub(super) fn size(&self) -> u32 {
        self.slots.iter().filter(|s| !matches!(s.process, Process::GivenUp)).count() as u32
    }

    /// Lets all workers go; those that do not are killed.
    pub(super) async fn dismiss(self) {
        let mut leaving = Vec::new();
        for slot in self.slots {
            if let Process::Alive(mut child) = slot.process {
                drop(child.stdin.take()); // It leaves when its standard input ends.
                leaving.push(child);
            }
        }
        let deadline = tokio::time::Instant::now() + LEAVE_TIME;
        for mut child in leaving {
            if tokio::time::timeout_at(deadline, child.wait()).await.is_err() {
                // It may have ended by itself just now.
                let _ = child.kill().await;
            }
        }
    }
}

impl Slot {
    fn died(&mut self, status: ExitStatus) -> Incident {
        let last = last_line(&self.log);
        if status.code() == Some(UNUSABLE) {
            self.process = Process::GivenUp;
            let why =
                last.as_deref().map_or("it cannot work here", |line| line.trim_start_matches("error: "));
            return Incident::Unusable(format!("worker {}: {why}", self.number));
        }
        let last = last.map(|line| format!(": {line}")).unwrap_or_default();
        let what = format!("worker {} ended ({status}){last}", self.number);
        let log = self.log.display();
        if self.restarts >= MAX_RESTARTS {
            self.process = Process::GivenUp;
            return Incident::GivenUp(format!(
                "{what}; it has been started {} times, see {log}",
                MAX_RESTARTS + 1
            ));
        }
        self.restarts += 1;
        self.process = Process::Due(Instant::now() + RESTART_PAUSE * self.restarts);
        Incident::Died(format!("{what}; starting it again, see {log}"))
    }
}

impl Recipe {
    /// Starts worker `number`, counted from 1.
    fn spawn(&self, number: u32, dir: &Path, log: &Path) -> Result<Child> {
        let file = OpenOptions::new().create(true).append(true).open(log);
        let file = file.with_context(|| format!("cannot write `{}`", log.display()))?;
        let mut command = Command::new(&self.program);
        command
            .arg("join")
            .arg("--coordinator")
            .arg(self.coordinator.to_string())
            .arg("--data-dir")
            .arg(dir)
            .arg("--datasets")
            .arg(&self.datasets)
            .arg("--metrics")
            .arg("127.0.0.1:0")
            .arg("--listen")
            .arg("127.0.0.1:0")
            .arg("--threads")
            .arg(self.threads.to_string())
            .arg("--exit-on-stdin-close")
            // Not as an argument, which every user of the host could see.
            .env("LOCKSTEP_TOKEN", &self.token)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(file)
            // Ctrl-C at the terminal is the coordinator's to handle.
            .process_group(0)
            .kill_on_drop(true);
        if let Some(device) = self.devices.iter().cycle().nth(number as usize - 1) {
            command.args(["--device", device]);
        }
        command.spawn().with_context(|| format!("cannot start `{}`", self.program.display()))
    }
}

/// The `worker` program: beside this one, or else in `PATH`.
pub(super) fn worker_program() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let beside = own.with_file_name("worker");
    if beside.is_file() {
        return Ok(beside);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path).map(|folder| folder.join("worker")).find(|p| p.is_file()) {
        Some(found) => Ok(found),
        None => bail!(
            "the program `worker` is neither at `{}` nor in PATH; `make build` makes it",
            beside.display()
        ),
    }
}

fn last_line(log: &Path) -> Option<String> {
    let text = std::fs::read(log).ok()?;
    let text = String::from_utf8_lossy(&text);
    text.lines().rev().find(|line| !line.trim().is_empty()).map(str::to_owned)
}
