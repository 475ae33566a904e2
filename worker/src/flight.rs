//! Tells the coordinator where this rank's collectives are, above all when they get nowhere.

use crate::control::Control;
use crate::metrics::Metrics;
use lockstep_collectives::{FlightSnapshot, Group, Past, Waiting};
use lockstep_common::ids::{Generation, JobId};
use lockstep_common::wire::{FlightReport, FromWorker, InFlight, Missing, PastCollective};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// Between two looks at the group.
const LOOK: Duration = Duration::from_millis(200);

/// After this long without progress the coordinator is told, and again each time it has passed.
const STUCK: Duration = Duration::from_secs(1);

/// How often it is told all the same: the last word of a rank that falls silent is then not much older.
const REGULAR: Duration = Duration::from_secs(5);

/// A job's group, from its formation until this rank leaves it.
pub(crate) type SharedGroup = Mutex<Option<Group>>;

/// Watches a group until it is dropped.
pub(crate) struct Watch {
    task: JoinHandle<()>,
    control: Control,
    metrics: Metrics,
    job: JobId,
    generation: Generation,
}

impl Watch {
    /// Begins to watch.
    pub(crate) fn start(
        runtime: &Handle,
        control: &Control,
        metrics: &Metrics,
        (job, generation): (JobId, Generation),
        group: Arc<SharedGroup>,
    ) -> Self {
        let (tell, observe) = (control.clone(), metrics.clone());
        let task = runtime.spawn(async move {
            let mut pace = Pace::new(Instant::now());
            let mut looks = tokio::time::interval(LOOK);
            loop {
                looks.tick().await;
                // It is locked while the group closes, which needs this thread to go on.
                let seen = group.try_lock().and_then(|group| {
                    let group = group.as_ref()?;
                    let wait = group.oldest_wait().unwrap_or_default();
                    observe.collective_wait(wait);
                    pace.due(Instant::now(), wait, group.flight_events()).then(|| group.flight())
                });
                if let Some(snapshot) = seen {
                    tell.tell_news(FromWorker::Flight { job, generation, report: report(snapshot) });
                }
            }
        });
        Self { task, control: control.clone(), metrics: metrics.clone(), job, generation }
    }

    /// The group has failed: tells what was in flight then.
    pub(crate) fn failed(self, group: &Group) {
        self.task.abort();
        let (job, generation) = (self.job, self.generation);
        self.control.tell_news(FromWorker::Flight { job, generation, report: report(group.flight()) });
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
        self.metrics.collective_wait(Duration::ZERO);
    }
}

/// When the coordinator is to be told.
struct Pace {
    told: Instant,
    /// Whether it was told of a standstill, so that it must hear of the end of it.
    told_of_standstill: bool,
    moved: Instant,
    events: u64,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { told: now, told_of_standstill: false, moved: now, events: 0 }
    }

    /// Whether to tell now, when the oldest collective has waited for `wait` and there have been `events`.
    fn due(&mut self, now: Instant, wait: Duration, events: u64) -> bool {
        if events != self.events {
            (self.moved, self.events) = (now, events);
        }
        let standstill = wait >= STUCK || now - self.moved >= STUCK;
        let since = now - self.told;
        let due = since >= REGULAR
            || standstill && (since >= STUCK || !self.told_of_standstill)
            || !standstill && self.told_of_standstill;
        if due {
            (self.told, self.told_of_standstill) = (now, standstill);
        }
        due
    }
}

fn report(snapshot: FlightSnapshot) -> FlightReport {
    let milliseconds = |d: Duration| d.as_millis() as u64;
    let waiting = |w: &Waiting| InFlight {
        name: w.tag.to_string(),
        signature: w.signature.clone(),
        bytes: w.bytes,
        waits_ms: milliseconds(w.waited),
        missing: w.missing.iter().map(|&(rank, entered)| Missing { rank, entered }).collect(),
    };
    let past = |p: &Past| PastCollective {
        name: p.tag.to_string(),
        signature: p.signature.clone(),
        bytes: p.bytes,
        took_us: p.took.as_micros() as u64,
        ago_ms: milliseconds(p.ago),
        completed: p.completed,
    };
    let report = FlightReport {
        in_flight: snapshot.in_flight.iter().take(FlightReport::MAX_IN_FLIGHT).map(waiting).collect(),
        in_flight_count: snapshot.in_flight.len() as u32,
        last: snapshot.last.iter().take(FlightReport::MAX_LAST).map(past).collect(),
        gets_on: snapshot.idle < STUCK,
        failure: snapshot.failure.map(|cause| cause.to_string()),
    };
    report.bounded()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The looks, one each 200 ms, at which the coordinator is told.
    fn told(looks: impl IntoIterator<Item = (u64, u64)>) -> Vec<usize> {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        let due = |(look, (wait_ms, events)): (usize, (u64, u64))| {
            pace.due(start + LOOK * look as u32, Duration::from_millis(wait_ms), events).then_some(look)
        };
        looks.into_iter().enumerate().filter_map(due).collect()
    }

    #[test]
    fn a_rank_that_moves_tells_every_five_seconds() {
        assert_eq!(told((0..60).map(|look| (10, look + 1))), [25, 50]);
    }

    #[test]
    fn a_wait_is_told_every_second_and_its_end_at_once() {
        // Other collectives go on while one waits.
        let waits = (0..18).map(|look| (look * 200, look + 1));
        let over = (18..30).map(|look| (0, look + 1));
        assert_eq!(told(waits.chain(over)), [5, 10, 15, 18]);
    }

    #[test]
    fn a_rank_that_enters_nothing_tells_so() {
        assert_eq!(told((0..20).map(|look| (0, (look + 1).min(3)))), [7, 12, 17]);
    }
}
