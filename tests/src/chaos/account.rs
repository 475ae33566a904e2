//! What is told of a run: a summary for people, an object for scripts, and all there is to know after a failure.

use super::figures::{Figures, Summary};
use super::stage::Stage;
use super::{End, Happened, Options, Trial};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// Lines of each log that are told after a failure.
const TAIL: usize = 40;

/// A run that is over.
pub struct Account {
    /// What was wanted.
    pub options: Options,
    /// How long it took.
    pub took: Duration,
    /// Whether the workers were on several hosts.
    pub spread: bool,
    /// Whether checkpoints had a disk of their own.
    pub small_disk: bool,
    /// Whether the coordinator could prove that each sample counted once.
    pub audited: bool,
    /// When the first event was due to be reckoned from.
    pub began: Duration,
    /// The events.
    pub happened: Vec<Happened>,
    /// The jobs.
    pub trials: Vec<Trial>,
    /// All that was wrong.
    pub failures: Vec<String>,
    /// The measurements.
    pub figures: Figures,
    /// The processes, all ended, and their files.
    pub stage: Stage,
}

impl Account {
    /// Whether nothing was wrong.
    pub fn is_good(&self) -> bool {
        self.failures.is_empty()
    }

    /// How many events were done, by their sort.
    pub fn done(&self) -> BTreeMap<&'static str, usize> {
        let mut done = BTreeMap::new();
        for happened in self.happened.iter().filter(|happened| happened.skipped.is_none()) {
            *done.entry(happened.event.kind.name()).or_default() += 1;
        }
        done
    }

    /// The run as one object.
    pub fn json(&self) -> Value {
        let events = self.happened.iter().map(|happened| {
            json!({
                "number": happened.event.number,
                "at_s": happened.at.as_secs_f64(),
                "what": happened.event.kind.to_string(),
                "worker": happened.worker,
                "skipped": happened.skipped,
            })
        });
        let jobs = self.trials.iter().map(|trial| {
            let report = trial.seen.report.as_ref();
            json!({
                "job": trial.id,
                "task": format!("{:?}", trial.task).to_lowercase(),
                "state": report.map(|report| report.state.clone()),
                "seconds": (trial.ended - trial.submitted).as_secs_f64(),
                "generations": report.map(|report| report.generation),
                "weights_digest": report.and_then(|report| report.weights_digest.clone()),
            })
        });
        let history = &self.stage.history;
        json!({
            "seed": self.options.seed,
            "workload": format!("{:?}", self.options.workload).to_lowercase(),
            "mean_s": self.options.mean.as_secs_f64(),
            "took_s": self.took.as_secs_f64(),
            "several_hosts": self.spread,
            "small_disk": self.small_disk,
            "audited": self.audited,
            "passed": self.is_good(),
            "failures": self.failures,
            "done": self.done(),
            "faults_struck": history.struck.len(),
            "exits": history.exits.iter().filter(|exit| !exit.asked).map(ToString::to_string).collect::<Vec<_>>(),
            "figures": self.figures,
            "jobs": jobs.collect::<Vec<_>>(),
            "events": events.collect::<Vec<_>>(),
        })
    }

    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let figures = &self.figures;
        writeln!(f, "{:<62} {:>6} {:>9} {:>9}", "", "count", "median", "max")?;
        let rows: [(&str, Summary); 12] = [
            ("a death, nothing else amiss: to the next step, s", figures.death_alone_s),
            ("  steps committed twice after it", figures.death_alone_recomputed_steps),
            ("a death in the midst of other things: to the next step, s", figures.death_s),
            ("  steps committed twice after it", figures.death_recomputed_steps),
            ("a long SIGSTOP: to the next step, s", figures.zombie_s),
            ("SIGTERM: to the next step without it, s", figures.leave_s),
            ("  steps committed twice after it, nothing else amiss", figures.leave_recomputed_steps),
            ("a join: from its start to the first step with it, s", figures.join_s),
            ("  the others' pause, nothing else amiss, s", figures.join_pause_s),
            ("a coordinator's restart: to its answer about the job, s", figures.restart_s),
            ("  with the time that it was away, s", figures.outage_s),
            ("  steps committed meanwhile", figures.outage_steps),
        ];
        for (name, Summary { count, median, max }) in rows {
            writeln!(f, "{name:<62} {count:>6} {median:>9.3} {max:>9.3}")?;
        }
        let Figures { recomputed_steps, committed_steps, memberships, flips_found, .. } = figures;
        writeln!(
            f,
            "{committed_steps} steps in {memberships} memberships, {recomputed_steps} of them done again; {flips_found} flipped \
             bits were found"
        )?;
        figures.wasteful.iter().try_for_each(|case| writeln!(f, "  {case}"))
    }

    /// What helps to find out why.
    fn evidence(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\nevents, by the run's clock (the first was reckoned from {:.1} s):",
            self.began.as_secs_f64()
        )?;
        for Happened { event, at, worker, skipped } in &self.happened {
            let worker = worker.as_ref().map(|worker| format!(" [{worker}]")).unwrap_or_default();
            let skipped = skipped.map(|reason| format!(" (skipped: {reason})")).unwrap_or_default();
            writeln!(f, "{:8.2} s  {:>4}. {}{worker}{skipped}", at.as_secs_f64(), event.number, event.kind)?;
        }
        for (at, fault) in &self.stage.history.struck {
            writeln!(f, "{:8.2} s  a fault struck: {fault}", at.as_secs_f64())?;
        }
        if let Some(last) = self.trials.last() {
            section(f, &format!("log of {}", last.id), &self.stage.place.log(&last.id))?;
            let report = last.seen.report.as_ref();
            writeln!(f, "its last status: {report:?}")?;
        }
        self.stage.programs().try_for_each(|program| section(f, program.name(), &program.said()))
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Options { seed, workload, mean, .. } = &self.options;
        let skipped = self.happened.iter().filter(|happened| happened.skipped.is_some()).count();
        writeln!(
            f,
            "chaos: seed {seed}, {workload:?} jobs, an event every {:.1} s, {:.0} s in all",
            mean.as_secs_f64(),
            self.took.as_secs_f64()
        )?;
        let done = self.done();
        let sorts: Vec<_> = done.iter().map(|(name, count)| format!("{count} {name}")).collect();
        let sum: usize = done.values().sum();
        writeln!(f, "{sum} events ({}), {skipped} skipped", sorts.join(", "))?;
        let reasons: std::collections::BTreeSet<_> = self.happened.iter().filter_map(|h| h.skipped).collect();
        reasons.iter().try_for_each(|reason| writeln!(f, "  skipped: {reason}"))?;
        let exits = self.stage.history.exits.iter().filter(|exit| !exit.asked).count();
        let struck = self.stage.history.struck.len();
        writeln!(f, "{struck} faults struck; {exits} workers gave up with a reason and were started again")?;
        if !self.audited {
            writeln!(f, "not audited: this coordinator has no `audit`")?;
        }
        for end in [End::Finished, End::NoRoom, End::Unfinished] {
            let jobs = self.trials.iter().filter(|trial| trial.end == end).count();
            if jobs > 0 {
                writeln!(f, "{jobs} of {} jobs {}", self.trials.len(), end.words())?;
            }
        }
        self.table(f)?;
        if self.is_good() {
            return writeln!(
                f,
                "passed: every job ended with the undisturbed run's weights, nothing was left behind"
            );
        }
        writeln!(f, "\nFAILED, seed {seed}:")?;
        self.failures.iter().try_for_each(|failure| writeln!(f, "- {failure}"))?;
        self.evidence(f)
    }
}

fn section(f: &mut fmt::Formatter<'_>, title: &str, text: &str) -> fmt::Result {
    let lines: Vec<_> = text.lines().collect();
    let tail = &lines[lines.len().saturating_sub(TAIL)..];
    writeln!(f, "\n--- {title}, the last {} of {} lines", tail.len(), lines.len())?;
    tail.iter().try_for_each(|line| writeln!(f, "{line}"))
}
