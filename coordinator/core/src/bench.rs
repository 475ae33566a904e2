//! Workers that a job's other workers cannot reach, though the coordinator can: they sit out for a while, and for twice as
//! long each time, since every membership with them costs the others a time-out.

use crate::core::Config;
use lockstep_common::ids::WorkerId;
use std::collections::BTreeMap;

/// A worker's place on the bench.
#[derive(Clone, Copy, Debug)]
struct Seat {
    /// How often it was cut off since it last stepped with the others for a while.
    times: u32,
    /// It sits out until then in any case, ...
    free_ms: u64,
    /// ... and until then as long as the job has enough workers without it.
    until_ms: u64,
}

/// The workers that a job leaves out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bench(BTreeMap<WorkerId, Seat>);

impl Bench {
    /// Has a worker that was cut off from its peers sit out; for how many milliseconds.
    pub(crate) fn seat(&mut self, worker: WorkerId, config: &Config, now_ms: u64) -> u64 {
        let times = self.0.get(&worker).map_or(1, |seat| seat.times.saturating_add(1));
        let doublings = (times - 1).min(u64::BITS - 1);
        let long_ms = config.bench_ms.saturating_mul(1 << doublings).min(config.max_bench_ms);
        let seat = Seat { times, free_ms: now_ms + config.bench_ms, until_ms: now_ms + long_ms };
        self.0.insert(worker, seat);
        long_ms
    }

    /// A worker has stepped with the others for a while: it can be reached.
    pub(crate) fn absolve(&mut self, worker: WorkerId) {
        self.0.remove(&worker);
    }

    /// Who sits out while the job has enough workers.
    pub(crate) fn barred(&self, now_ms: u64) -> Vec<WorkerId> {
        self.0.iter().filter(|(_, seat)| seat.until_ms > now_ms).map(|(worker, _)| *worker).collect()
    }

    /// Who sits out though the job lacks workers: nobody steps meanwhile who could be held up.
    pub(crate) fn barred_in_need(&self, now_ms: u64) -> Vec<WorkerId> {
        self.0.iter().filter(|(_, seat)| seat.free_ms > now_ms).map(|(worker, _)| *worker).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_doubles_up_to_a_bound_and_begins_anew_for_one_that_has_stepped() {
        let (config, worker) = (Config { bench_ms: 10, max_bench_ms: 45, ..Config::default() }, WorkerId(3));
        let mut bench = Bench::default();
        for long_ms in [10, 20, 40, 45, 45] {
            assert_eq!(bench.seat(worker, &config, 100), long_ms);
            assert_eq!(bench.barred(100 + long_ms - 1), [worker]);
            assert_eq!(bench.barred(100 + long_ms), []);
            assert_eq!((bench.barred_in_need(109), bench.barred_in_need(110)), (vec![worker], vec![]));
        }
        bench.absolve(worker);
        assert_eq!(bench.barred(100), []);
        assert_eq!(bench.seat(worker, &config, 100), 10);
        let mut forever = Bench::default();
        assert!((0..100).all(|_| forever.seat(worker, &config, 0) <= 45), "nothing overflows");
    }
}
