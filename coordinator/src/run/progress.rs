//! What a person sees while a job runs.

use crate::output::{duration, note};
use indicatif::{ProgressBar, ProgressStyle};
use lockstep_common::wire::{JobState, JobSummary};
use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Between two lines when standard error is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// The rate is that of this last span.
const RATE_SPAN: Duration = Duration::from_secs(10);

/// A live bar on a terminal, a line every few seconds elsewhere, or nothing.
pub(super) struct Progress {
    look: Look,
    epochs: Option<u64>,
    images_per_step: u32,
    seen: VecDeque<(Instant, u64)>,
}

enum Look {
    Quiet,
    Lines { last: Option<Instant>, step: u64 },
    Bar(ProgressBar),
}

impl Progress {
    pub(super) fn new(quiet: bool, epochs: Option<u64>, images_per_step: u32) -> Self {
        let look = match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Look::Quiet,
            (false, false) => Look::Lines { last: None, step: 0 },
            (false, true) => {
                let bar = ProgressBar::new(0);
                if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar}\n{msg}") {
                    bar.set_style(style);
                }
                Look::Bar(bar)
            }
        };
        Self { look, epochs, images_per_step, seen: VecDeque::new() }
    }

    /// Shows how far the job is.
    pub(super) fn show(&mut self, job: &JobSummary) {
        let rate = self.rate(job.step);
        let (place, figures) = describe(job, self.epochs, rate);
        match &mut self.look {
            Look::Quiet => {}
            Look::Bar(bar) => {
                bar.set_length(job.total_steps.max(1));
                bar.set_position(job.step);
                bar.set_prefix(place);
                bar.set_message(figures);
            }
            Look::Lines { last, step } => {
                let due =
                    last.is_none_or(|at| at.elapsed() >= LINE_EVERY) && (last.is_none() || job.step != *step);
                if due {
                    (*last, *step) = (Some(Instant::now()), job.step);
                    note(if figures.is_empty() { place } else { format!("{place} | {figures}") });
                }
            }
        }
    }

    /// Writes a line without spoiling the bar.
    pub(super) fn note(&self, line: impl std::fmt::Display) {
        match &self.look {
            Look::Bar(bar) => bar.suspend(|| note(line)),
            Look::Lines { .. } | Look::Quiet => note(line),
        }
    }

    /// Takes the bar away.
    pub(super) fn finish(&self) {
        if let Look::Bar(bar) = &self.look {
            bar.finish_and_clear();
        }
    }

    /// Images per second over the last seconds.
    fn rate(&mut self, step: u64) -> Option<f64> {
        let now = Instant::now();
        if self.seen.back().is_some_and(|&(_, last)| step < last) {
            self.seen.clear(); // The job has gone back to a checkpoint.
        }
        self.seen.push_back((now, step));
        while self.seen.len() > 2 && self.seen.front().is_some_and(|(at, _)| now - *at > RATE_SPAN) {
            self.seen.pop_front();
        }
        let &(at, first) = self.seen.front()?;
        let seconds = (now - at).as_secs_f64();
        (step > first && seconds > 0.5)
            .then(|| (step - first) as f64 * f64::from(self.images_per_step) / seconds)
    }
}

/// Where the job is (epoch, step), and how it does (figures, speed, time left, workers); each fits 80 columns.
fn describe(job: &JobSummary, epochs: Option<u64>, rate: Option<f64>) -> (String, String) {
    if job.state != JobState::Running {
        return (format!("{} {}: {}", job.id, job.state, job.reason), String::new());
    }
    if job.total_steps == 0 {
        return (format!("{} starts on {} workers", job.id, job.workers.len()), String::new());
    }
    let epochs = epochs.map(|all| format!("/{all}")).unwrap_or_default();
    let place = format!("epoch {}{epochs} | step {}/{}", job.epoch.max(1), job.step, job.total_steps);
    let mut parts = Vec::new();
    parts.extend(job.metrics.get("loss").map(|loss| format!("loss {loss:.4}")));
    for (name, label) in [("top1", "train"), ("test_top1", "test")] {
        parts.extend(job.metrics.get(name).map(|top1| format!("{label} {:.1}%", top1 * 100.0)));
    }
    parts.extend(rate.map(|rate| format!("{rate:.0} images/s")));
    parts.extend(job.eta_s.map(|seconds| format!("ETA {}", duration(seconds))));
    let workers = job.workers.len();
    parts.push(if workers == 1 { "1 worker".to_owned() } else { format!("{workers} workers") });
    (place, parts.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::ids::{Generation, JobId, WorkerId};

    #[test]
    fn a_running_job_shows_all_its_figures() {
        let metrics = [("loss", 0.51234), ("top1", 0.812), ("test_top1", 0.875)];
        let job = JobSummary {
            id: JobId(1),
            name: "x".to_owned(),
            state: JobState::Running,
            reason: String::new(),
            generation: Generation(1),
            step: 120,
            total_steps: 938,
            epoch: 1,
            workers: vec![WorkerId(1), WorkerId(2)],
            metrics: metrics.map(|(k, v)| (k.to_owned(), v)).into(),
            weights_digest: None,
            checkpoint: None,
            age_s: 9,
            eta_s: Some(65),
            flight: None,
            stragglers: Vec::new(),
            checkpoint_failure: None,
        };
        let (place, figures) = describe(&job, Some(2), Some(1234.5));
        assert_eq!(place, "epoch 1/2 | step 120/938");
        assert_eq!(
            figures,
            "loss 0.5123 | train 81.2% | test 87.5% | 1234 images/s | ETA 1m 05s | 2 workers"
        );
        assert!(figures.len() <= 80);
        let waiting =
            JobSummary { state: JobState::Queued, reason: "needs 2 workers, 1 is free".to_owned(), ..job };
        assert_eq!(describe(&waiting, Some(2), None).0, "j1 queued: needs 2 workers, 1 is free");
    }
}
