//! Faults on purpose: a rank that dies, stops or has a bit flipped at a chosen point of a chosen step.
//!
//! The tests' only door into a worker: `LOCKSTEP_FAULTS` holds faults, separated by `;`, such as
//! `kill:rank=1,step=7,phase=backward` or `flip:rank=2,step=40`. Without `rank` every rank is meant, without `step`
//! every step. A fault happens once in a process, unless it says `always`. Steps count from 1. A step's points see the
//! number of the step in progress, `checkpoint`, `boundary`, `evaluation`, `artifact` and `copy` that of the step that is
//! committed. `flip` changes a weight at `boundary`, `reduce` or `copy`, as bad memory does, or a reduced gradient at
//! `optimizer`, as bad arithmetic does; the first if it does not say.

use lockstep_common::ids::Rank;
use lockstep_common::suggest::did_you_mean;
use rustix::process::{Signal, getpid, kill_process};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// The variable that holds them.
pub(crate) const VARIABLE: &str = "LOCKSTEP_FAULTS";

/// Where a rank can be killed or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// A step's batches are being waited for.
    Data,
    /// A lane begins forward.
    Forward,
    /// A lane begins backward.
    Backward,
    /// The lanes are done; the last reductions are on their way.
    Reduce,
    /// Everything is reduced; the optimizer begins.
    Optimizer,
    /// A checkpoint's files are packed and about to be sent.
    Checkpoint,
    /// State comes from a peer.
    Heal,
    /// A step is committed.
    Boundary,
    /// A lane has judged some test samples.
    Evaluation,
    /// A file for people to look at is about to be sent.
    Artifact,
    /// The state is about to be copied for one that wants to join.
    Copy,
}

const POINTS: [(&str, Point); 11] = [
    ("data", Point::Data),
    ("forward", Point::Forward),
    ("backward", Point::Backward),
    ("reduce", Point::Reduce),
    ("optimizer", Point::Optimizer),
    ("checkpoint", Point::Checkpoint),
    ("heal", Point::Heal),
    ("boundary", Point::Boundary),
    ("evaluation", Point::Evaluation),
    ("artifact", Point::Artifact),
    ("copy", Point::Copy),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// SIGKILL.
    Kill(Point),
    /// SIGSTOP.
    Stop(Point),
    /// One bit of a weight, or of a gradient at the optimizer.
    Flip(Point),
}

#[derive(Debug)]
struct Fault {
    action: Action,
    rank: Option<u32>,
    step: Option<u64>,
    always: bool,
    happened: AtomicBool,
}

static FAULTS: OnceLock<Vec<Fault>> = OnceLock::new();

/// The rank that this process has now.
static RANK: AtomicU32 = AtomicU32::new(u32::MAX);

/// Takes the faults from the environment. The error is one line.
pub(crate) fn arm() -> Result<(), String> {
    let Some(text) = std::env::var_os(VARIABLE) else { return Ok(()) };
    let faults = parse(&text.to_string_lossy()).map_err(|problem| format!("{VARIABLE}: {problem}"))?;
    tracing::warn!("{VARIABLE} is set: this worker will fail on purpose");
    // It is called once.
    let _ = FAULTS.set(faults);
    Ok(())
}

/// From now on this process has this rank.
pub(crate) fn set_rank(rank: Rank) {
    RANK.store(rank.0, Ordering::Relaxed);
}

/// Has the fault happen that is meant for this point of this step, if there is one.
pub(crate) fn point(point: Point, step: u64) {
    let Some(faults) = FAULTS.get() else { return };
    let signal =
        match due(faults, step, |action| matches!(action, Action::Kill(p) | Action::Stop(p) if p == point)) {
            Some(Action::Kill(_)) => Signal::KILL,
            Some(Action::Stop(_)) => Signal::STOP,
            Some(Action::Flip(_)) | None => return,
        };
    if let Err(error) = kill_process(getpid(), signal) {
        tracing::error!("a fault on purpose did not happen: {error}");
    }
}

/// Whether a bit is to be changed at this point of this step.
pub(crate) fn flips(point: Point, step: u64) -> bool {
    FAULTS.get().is_some_and(|faults| due(faults, step, |action| action == Action::Flip(point)).is_some())
}

fn due(faults: &[Fault], step: u64, wanted: impl Fn(Action) -> bool) -> Option<Action> {
    let rank = RANK.load(Ordering::Relaxed);
    let meant = |fault: &&Fault| {
        wanted(fault.action)
            && fault.rank.is_none_or(|r| r == rank)
            && fault.step.is_none_or(|s| s == step)
            && (!fault.happened.swap(true, Ordering::Relaxed) || fault.always)
    };
    faults.iter().find(meant).map(|fault| fault.action)
}

fn parse(text: &str) -> Result<Vec<Fault>, String> {
    text.split(';').map(str::trim).filter(|fault| !fault.is_empty()).map(parse_fault).collect()
}

fn parse_fault(text: &str) -> Result<Fault, String> {
    let (name, conditions) = text.split_once(':').unwrap_or((text, ""));
    let (mut rank, mut step, mut point, mut always) = (None, None, None, false);
    for condition in conditions.split(',').map(str::trim).filter(|c| !c.is_empty()) {
        let (key, value) = condition.split_once('=').unwrap_or((condition, ""));
        let number = || value.parse().map_err(|_| format!("`{condition}` in `{text}` is no number"));
        match key {
            "rank" => {
                let number = number()?;
                rank =
                    Some(u32::try_from(number).map_err(|_| format!("`{condition}` in `{text}` is no rank"))?);
            }
            "step" => step = Some(number()?),
            "phase" => {
                let known = POINTS.iter().find(|(name, _)| *name == value);
                let unknown = || {
                    format!(
                        "`{text}` has no phase `{value}`{}",
                        did_you_mean(value, POINTS.iter().map(|p| p.0))
                    )
                };
                point = Some(known.ok_or_else(unknown)?.1);
            }
            "always" => always = true,
            _ => {
                let hint = did_you_mean(key, ["rank", "step", "phase", "always"]);
                return Err(format!("`{text}` has a condition `{key}`, which there is not{hint}"));
            }
        }
    }
    let action = match (name, point) {
        ("kill", Some(point)) => Action::Kill(point),
        ("stop", Some(point)) => Action::Stop(point),
        ("flip", None) => Action::Flip(Point::Boundary),
        ("flip", Some(point @ (Point::Boundary | Point::Reduce | Point::Optimizer | Point::Copy))) => {
            Action::Flip(point)
        }
        ("kill" | "stop", None) => return Err(format!("`{text}` does not say at which `phase`")),
        ("flip", Some(_)) => {
            return Err(format!("`{text}`: a bit is flipped at `boundary`, `reduce`, `optimizer` or `copy`"));
        }
        _ => {
            let hint = did_you_mean(name, ["kill", "stop", "flip"]);
            return Err(format!("`{name}` is no fault{hint}; `kill`, `stop` and `flip` are"));
        }
    };
    Ok(Fault { action, rank, step, always, happened: AtomicBool::new(false) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_happens_at_its_point_once_or_always() {
        set_rank(Rank(1));
        let at = |faults: &[Fault], point, step| due(faults, step, |a| a == Action::Kill(point));
        let once = parse("kill:rank=1,step=7,phase=backward").unwrap();
        assert_eq!(at(&once, Point::Backward, 6), None);
        assert_eq!(at(&once, Point::Forward, 7), None);
        assert_eq!(at(&once, Point::Backward, 7), Some(Action::Kill(Point::Backward)));
        assert_eq!(at(&once, Point::Backward, 7), None, "it has happened");
        let always = parse(" stop:phase=heal ; kill:step=2,phase=data,always ;").unwrap();
        assert_eq!(always.len(), 2);
        for _ in 0..2 {
            assert_eq!(at(&always, Point::Data, 2), Some(Action::Kill(Point::Data)));
        }
        let others = parse("kill:rank=2,phase=data").unwrap();
        assert_eq!(at(&others, Point::Data, 1), None, "another rank is meant");
        let flips = parse("flip:step=40;flip:step=41,phase=optimizer").unwrap();
        for (step, point) in [(40, Point::Boundary), (41, Point::Optimizer)] {
            assert_eq!(due(&flips, step, |a| a == Action::Flip(Point::Reduce)), None);
            assert!(due(&flips, step, |a| a == Action::Flip(point)).is_some());
        }
    }

    #[test]
    fn nonsense_is_refused_in_one_line() {
        let cases = [
            ("kil:phase=data", "did you mean `kill`?"),
            ("kill", "does not say at which `phase`"),
            ("kill:step=3", "does not say at which `phase`"),
            ("stop:phase=bakward", "did you mean `backward`?"),
            ("flip:step=x", "`step=x` in `flip:step=x` is no number"),
            ("flip:rank=99999999999", "is no rank"),
            ("flip:phase=data", "at `boundary`, `reduce`, `optimizer` or `copy`"),
            ("flip:stp=1", "did you mean `step`?"),
        ];
        for (text, part) in cases {
            let error = parse(text).unwrap_err();
            assert!(error.contains(part) && error.lines().count() == 1, "{error}");
        }
    }
}
