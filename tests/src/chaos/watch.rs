//! Looking on at a job: what its `metrics.jsonl` gets and what `coordinator status` says, and when.

use crate::place::Report;
use crate::process::Process;
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Between two questions.
const INTERVAL: Duration = Duration::from_millis(250);

/// After so long a question is given up: the coordinator may have been stopped.
const PATIENCE: Duration = Duration::from_secs(3);

/// A committed step, as `metrics.jsonl` has it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Line {
    /// When it was seen there.
    pub seen: Duration,
    /// The membership.
    pub generation: u64,
    /// The step.
    pub step: u64,
    /// How long it took.
    pub seconds: f64,
    /// The bits of its loss.
    pub loss: u64,
}

/// An answer of `coordinator status`.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// When the question was asked.
    pub asked: Duration,
    /// When the answer came.
    pub came: Duration,
    /// `running`, `finished`, ...
    pub state: String,
    /// The membership.
    pub generation: u64,
    /// Its members' numbers, such as `w3`.
    pub members: Vec<String>,
}

/// Looks at one job.
pub struct Watch {
    metrics: PathBuf,
    read: u64,
    torn: Vec<u8>,
    asking: Option<Process>,
    asked: Duration,
    progressed: Duration,
    furthest: u64,
    /// What it saw.
    pub seen: Seen,
}

/// All that was seen of a job.
#[derive(Default)]
pub struct Seen {
    /// Steps in the order of the file.
    pub lines: Vec<Line>,
    /// Lines of the file that are no JSON.
    pub damaged: Vec<String>,
    /// Answers in their order.
    pub answers: Vec<Answer>,
    /// The last one in full.
    pub report: Option<Report>,
}

impl Watch {
    /// Begins with nothing seen.
    pub fn new(metrics: PathBuf, now: Duration) -> Self {
        let seen = Seen::default();
        let (read, torn, furthest) = (0, Vec::new(), 0);
        Self { metrics, read, torn, asking: None, asked: Duration::ZERO, progressed: now, furthest, seen }
    }

    /// When the job last got further than ever before, or else when it was submitted.
    pub fn progressed(&self) -> Duration {
        self.progressed
    }

    /// The furthest step.
    pub fn furthest(&self) -> u64 {
        self.furthest
    }

    /// Asks for the status by the command that `ask` makes, and takes the answer. Just after a coordinator has
    /// `restarted` no time is lost: what was asked before is asked anew, and what finds nobody yet at once again.
    pub fn ask(&mut self, now: Duration, restarted: Duration, ask: impl Fn() -> Command) {
        let unanswered = self.seen.answers.last().is_none_or(|answer| answer.asked < restarted);
        let over = match &mut self.asking {
            None => unanswered || now >= self.asked + INTERVAL,
            Some(process) => {
                let ended = process.status().is_some();
                if ended {
                    let report = serde_json::from_str(&process.stdout()).ok();
                    report.into_iter().for_each(|report| self.note(now, report));
                    self.asking = None;
                }
                !ended && (now > self.asked + PATIENCE || self.asked < restarted)
            }
        };
        if over {
            self.asking = Some(Process::start(ask()));
            self.asked = now;
        }
    }

    fn note(&mut self, came: Duration, report: Report) {
        let asked = self.asked;
        let (state, generation, members) = (report.state.clone(), report.generation, report.workers.clone());
        self.seen.answers.push(Answer { asked, came, state, generation, members });
        self.seen.report = Some(report);
    }

    /// Reads what has been added to the file.
    pub fn read(&mut self, now: Duration) {
        let Ok(mut file) = File::open(&self.metrics) else { return };
        let added = file.seek(SeekFrom::Start(self.read)).and_then(|_| file.read_to_end(&mut self.torn));
        self.read += added.unwrap_or(0) as u64;
        let whole = self.torn.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let lines: Vec<u8> = self.torn.drain(..whole).collect();
        for text in lines.split(|byte| *byte == b'\n').filter(|text| !text.is_empty()) {
            match serde_json::from_slice::<Value>(text) {
                Ok(value) => self.seen.lines.extend(line(now, &value)),
                Err(_) => self.seen.damaged.push(String::from_utf8_lossy(text).into_owned()),
            }
        }
        let furthest = self.seen.lines.iter().rev().take(1000).map(|line| line.step).max().unwrap_or(0);
        if furthest > self.furthest {
            (self.furthest, self.progressed) = (furthest, now);
        }
    }
}

impl Seen {
    /// The members of a generation, as far as they were seen.
    pub fn members(&self, generation: u64) -> &[String] {
        let running = |a: &&Answer| a.generation == generation && a.state == "running";
        let answers = self.answers.iter().filter(running);
        answers.map(|a| &a.members[..]).max_by_key(|members| members.len()).unwrap_or_default()
    }

    /// The newest generation that was seen until `at`.
    pub fn generation(&self, at: Duration) -> u64 {
        let lines = self.lines.iter().filter(|line| line.seen <= at).map(|line| line.generation);
        let answers = self.answers.iter().filter(|a| a.came <= at).map(|a| a.generation);
        lines.chain(answers).max().unwrap_or(0)
    }

    /// When each step was committed.
    ///
    /// Steps are told in batches, and late while the coordinator is away. A step was committed before it was seen,
    /// and before the next one of its generation by as long as that one took.
    pub fn committed(&self) -> Vec<Duration> {
        let mut times: Vec<_> = self.lines.iter().map(|line| line.seen).collect();
        for i in (0..times.len().saturating_sub(1)).rev() {
            let (line, next) = (self.lines[i], self.lines[i + 1]);
            if line.generation == next.generation && line.step + 1 == next.step {
                let took = Duration::try_from_secs_f64(next.seconds).unwrap_or_default();
                times[i] = times[i].min(times[i + 1].saturating_sub(took));
            }
        }
        times
    }
}

/// A line about a step; those of evaluations have no `seconds`.
fn line(seen: Duration, value: &Value) -> Option<Line> {
    Some(Line {
        seen,
        generation: value["generation"].as_u64()?,
        step: value["step"].as_u64()?,
        seconds: value["seconds"].as_f64()?,
        loss: value["loss"].as_f64()?.to_bits(),
    })
}
