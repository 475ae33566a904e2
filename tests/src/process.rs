//! Processes under test: found, started, watched, and killed when dropped.

use crate::wait::{PATIENCE, until, within};
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// The path of `coordinator` or `worker` beside the running test or program.
pub fn program(name: &str) -> PathBuf {
    let running = std::env::current_exe().expect("the running program has a path");
    // target/PROFILE/deps/TEST-HASH or target/PROFILE/PROGRAM
    let folder = running.parent().expect("the running program lies in a folder");
    let profile = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let program = profile.join(name);
    assert!(program.is_file(), "`{}` is missing: run `cargo build --release` first", program.display());
    program
}

/// A command for `coordinator` or `worker` that takes nothing from this process's environment by accident.
pub fn command(name: &str) -> Command {
    let mut command = Command::new(program(name));
    let variables =
        ["LOCKSTEP_DATA_DIR", "LOCKSTEP_TOKEN", "LOCKSTEP_LOG", "LOCKSTEP_WORKER_DIR", "LOCKSTEP_FAULTS"];
    for variable in variables {
        command.env_remove(variable);
    }
    command
}

/// A started process. Dropping it kills it and every process that it has started.
pub struct Process {
    name: String,
    child: Child,
    output: TempDir,
}

/// A process that has ended.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Process {
    /// Starts `command`; its standard input is empty.
    pub fn start(mut command: Command) -> Self {
        let output = tempfile::tempdir().expect("a folder for a process's output");
        let file = |name: &str| File::create(output.path().join(name)).expect("a file for output");
        command.stdin(Stdio::null()).stdout(file("stdout")).stderr(file("stderr"));
        let name = format!("{command:?}");
        let child = command.spawn().unwrap_or_else(|e| panic!("cannot start {name}: {e}"));
        Self { name, child, output }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        self.read("stdout")
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        self.read("stderr")
    }

    fn read(&self, stream: &str) -> String {
        let bytes = std::fs::read(self.output.path().join(stream)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until `look` finds something; fails at once if the process ends before.
    #[track_caller]
    pub fn until<T>(&mut self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        within(PATIENCE, || {
            if let Some(found) = look() {
                return Some(found);
            }
            if let Some(status) = self.status() {
                // It may have happened just before the end.
                return Some(look().unwrap_or_else(|| {
                    panic!("{} ended with {status} before {what}:\n{}", self.name, self.stderr())
                }));
            }
            None
        })
        .unwrap_or_else(|| panic!("{} did not come to {what}; its log:\n{}", self.name, self.stderr()))
    }

    /// Waits until standard error holds `text`.
    #[track_caller]
    pub fn until_stderr(&mut self, text: &str) {
        self.until_stderr_times(text, 1);
    }

    /// Waits until standard error holds `text` so many times.
    #[track_caller]
    pub fn until_stderr_times(&mut self, text: &str, times: usize) {
        let path = self.output.path().join("stderr");
        self.until(&format!("{times} times {text:?}"), || {
            let log = std::fs::read(&path).unwrap_or_default();
            (String::from_utf8_lossy(&log).matches(text).count() >= times).then_some(())
        });
    }

    /// Sends it a signal, such as `libc::SIGTERM`.
    pub fn signal(&self, signal: i32) {
        signal_pid(self.id(), signal);
    }

    /// `kill -9`, of this process alone.
    pub fn kill(&mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a killed child can be waited for");
    }

    /// The processes that it has started.
    pub fn children(&self) -> Vec<u32> {
        children_of(self.id())
    }

    /// `kill -9` of it and of every process that it has started.
    pub fn kill_all(&mut self) {
        // The parent first: it must not have the time to start anything again.
        let children = self.children();
        self.kill();
        for child in &children {
            signal_pid(*child, libc::SIGKILL);
        }
        until("killed processes to be gone", || children.iter().all(|pid| is_gone(*pid)).then_some(()));
    }

    /// How it ended, if it does within `limit`; it is killed otherwise.
    pub fn wait_for(mut self, limit: Duration) -> Option<Ended> {
        let status = within(limit, || self.status())?;
        Some(Ended { status, stdout: self.stdout(), stderr: self.stderr() })
    }

    /// How it ended, once it has.
    pub fn status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(mut self) -> Ended {
        let status = within(2 * PATIENCE, || self.status());
        let status =
            status.unwrap_or_else(|| panic!("{} does not end; its log:\n{}", self.name, self.stderr()));
        Ended { status, stdout: self.stdout(), stderr: self.stderr() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let children = self.children();
        // An error means that it is gone, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
        children.into_iter().for_each(|pid| signal_pid(pid, libc::SIGKILL));
    }
}

impl Ended {
    /// Requires exit code 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(self.status.success(), "{}:\n{}\n{}", self.status, self.stdout, self.stderr);
        self
    }

    /// Requires this exit code and every one of `parts` in standard error.
    #[track_caller]
    pub fn refused(self, code: i32, parts: &[&str]) -> Self {
        assert_eq!(self.status.code(), Some(code), "{}\n{}", self.stdout, self.stderr);
        for part in parts {
            assert!(self.stderr.contains(part), "{part:?} is not in:\n{}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "it panicked:\n{}", self.stderr);
        self
    }
}

/// Sends a signal to a process that may be gone.
pub fn signal_pid(pid: u32, signal: i32) {
    // Through `kill` the program: the workspace has no unsafe code outside of the shim.
    let status =
        Command::new("kill").arg(format!("-{signal}")).arg(pid.to_string()).stderr(Stdio::null()).status();
    status.expect("`kill` is on every system");
}

fn stat(pid: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // "PID (NAME) STATE PPID ..."; the name may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// Whether a process has ended.
pub fn is_gone(pid: u32) -> bool {
    stat(pid).is_none_or(|(state, _)| state == 'Z')
}

/// Whether a process has been stopped by a signal.
pub fn is_stopped(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| state == 'T')
}

/// The processes whose environment says `name=value`.
pub fn marked(name: &str, value: &str) -> Vec<u32> {
    let mark = format!("{name}={value}");
    let is_marked = |pid: &u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    };
    pids().filter(|pid| is_marked(pid) && !is_gone(*pid)).collect()
}

fn children_of(parent: u32) -> Vec<u32> {
    pids().filter(|pid| stat(*pid).is_some_and(|(state, ppid)| ppid == parent && state != 'Z')).collect()
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").expect("/proc can be listed");
    entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
}
