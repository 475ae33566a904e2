//! What a job's ranks wait for, merged from what each of them has told of its collectives.
//!
//! A rank that waits tells so every second. Whoever is waited for and waits for nobody itself is a first cause.

use crate::words;
use lockstep_common::ids::{Generation, WorkerId};
use lockstep_common::wire::{FlightReport, FlightSummary, InFlight, RankFlight};
use std::collections::BTreeMap;

/// A shorter wait is what a large bucket or a small difference in speed costs.
const WAIT_MS: u64 = 1_000;

/// A wait that the job's log tells of.
const LOGGED_WAIT_MS: u64 = 5_000;

/// A rank that gets nowhere tells so every second; one that has not for three of them says nothing any more.
const SILENT_MS: u64 = 3_000;

/// The most causes that are listed. Further ones are consequences more often than not.
const MAX_CAUSES: usize = 8;

/// What the ranks of one membership have told.
pub(crate) struct Board {
    generation: Generation,
    /// Worker and host by rank.
    members: Vec<(WorkerId, String)>,
    /// By rank.
    told: Vec<Option<Told>>,
    failed_ms: Option<u64>,
    logged: bool,
}

struct Told {
    report: FlightReport,
    at_ms: u64,
}

/// A first cause and how long it has held others up.
struct Cause {
    line: String,
    waits_ms: u64,
}

/// A rank that waits, for whom, and how long it has.
struct Waiter<'a> {
    rank: u32,
    collective: &'a InFlight,
    waits_ms: u64,
    /// Whether something came all the same.
    gets_on: bool,
}

/// Getters
impl Board {
    pub(crate) fn has_failed(&self) -> bool {
        self.failed_ms.is_some()
    }

    /// What is known, if any rank has told anything. Of a failed membership it is what was known when it failed.
    pub(crate) fn summary(&self, now_ms: u64) -> Option<FlightSummary> {
        let now_ms = self.failed_ms.unwrap_or(now_ms);
        let first_told =
            self.told.iter().flatten().filter(|t| t.report.failure.is_some()).min_by_key(|t| t.at_ms);
        self.told.iter().any(Option::is_some).then(|| FlightSummary {
            generation: self.generation,
            waiting: self.causes(now_ms).into_iter().map(|cause| cause.line).collect(),
            failure: first_told.and_then(|told| told.report.failure.clone()),
            ranks: (0..self.members.len()).map(|rank| self.rank(rank, now_ms)).collect(),
        })
    }

    fn rank(&self, rank: usize, now_ms: u64) -> RankFlight {
        let (worker, host) = &self.members[rank];
        let told = self.told[rank].as_ref();
        let seconds = |ms: u64| ms as f64 / 1000.0;
        let completed = told.and_then(Told::completed);
        let in_flight = told.and_then(|t| t.report.in_flight.first());
        RankFlight {
            rank: lockstep_common::ids::Rank(rank as u32),
            worker: *worker,
            host: host.clone(),
            completed: completed.map(|(name, _)| name.to_owned()),
            completed_s: told
                .zip(completed)
                .map(|(t, (_, ago_ms))| seconds(ago_ms.saturating_add(t.age_ms(now_ms)))),
            in_flight: in_flight.map(|c| c.name.clone()),
            waits_s: told.zip(in_flight).map(|(t, c)| seconds(t.waits_ms(c, now_ms))),
            waits_for: in_flight.map(|c| c.missing.iter().map(|m| m.rank).collect()).unwrap_or_default(),
            told_s: told.map(|t| seconds(t.age_ms(now_ms))),
        }
    }

    /// The first causes, the one that has held others up longest first.
    fn causes(&self, now_ms: u64) -> Vec<Cause> {
        let waiters: Vec<_> =
            (0u32..).zip(&self.told).filter_map(|(rank, t)| t.as_ref()?.waiter(rank, now_ms)).collect();
        let waits = |rank: u32| waiters.iter().any(|w| w.rank == rank);
        let mut held_up: BTreeMap<u32, Vec<(&Waiter<'_>, bool)>> = BTreeMap::new();
        for waiter in &waiters {
            for missing in &waiter.collective.missing {
                held_up.entry(missing.rank.0).or_default().push((waiter, missing.entered));
            }
        }
        let first = held_up.iter().filter(|(rank, _)| !waits(**rank));
        let mut causes: Vec<_> = first.map(|(rank, waiters)| self.cause(*rank, waiters, now_ms)).collect();
        if causes.is_empty() {
            causes = waiters.iter().map(|waiter| circular(waiter, &waiters)).collect();
        }
        causes.sort_by_key(|cause| std::cmp::Reverse(cause.waits_ms));
        causes.truncate(MAX_CAUSES);
        causes
    }

    /// `rank` holds `waiters` up and waits for nobody.
    fn cause(&self, rank: u32, waiters: &[(&Waiter<'_>, bool)], now_ms: u64) -> Cause {
        let longest = waiters.iter().map(|(w, _)| *w).max_by_key(|w| w.waits_ms);
        let (name, waits_ms) = longest.map_or(("", 0), |w| (w.collective.name.as_str(), w.waits_ms));
        let entered = waiters.iter().any(|(w, entered)| *entered && w.collective.name == name);
        let who: Vec<_> = waiters.iter().map(|(w, _)| w.rank).collect();
        let who = match who.len() {
            1 => format!("{} waits", words::ranks(&who)),
            n if n + 1 == self.members.len() => "others wait".to_owned(),
            _ => format!("{} wait", words::ranks(&who)),
        };
        let (worker, host) = &self.members[rank as usize];
        let gets_on = self.told[rank as usize].as_ref().is_some_and(|told| told.gets_on(now_ms));
        let verb = match (entered, gets_on) {
            (true, true) => "is still in",
            (true, false) => "stopped in",
            (false, _) => "has not entered",
        };
        let seconds = waits_ms / 1000;
        let word = self.last_word(rank, waits_ms, now_ms);
        let line = format!("rank {rank} ({worker} on {host}) {verb} {name}; {who} {seconds} s; {word}");
        Cause { line, waits_ms }
    }

    fn last_word(&self, rank: u32, waits_ms: u64, now_ms: u64) -> String {
        let Some(told) = &self.told[rank as usize] else { return "it has told nothing yet".to_owned() };
        let age_ms = told.age_ms(now_ms);
        let silent = age_ms >= SILENT_MS && waits_ms + WAIT_MS >= SILENT_MS;
        match (told.completed(), silent) {
            (Some((name, _)), true) => {
                format!("silent for {} s, its last word: completed {name}", age_ms / 1000)
            }
            (None, true) => format!("silent for {} s", age_ms / 1000),
            (Some((name, ago_ms)), false) => {
                format!("its last word: completed {name}, {} s ago", ago_ms.saturating_add(age_ms) / 1000)
            }
            (None, false) => "it is there and has completed nothing yet".to_owned(),
        }
    }
}

/// Events
impl Board {
    pub(crate) fn new(generation: Generation, members: Vec<(WorkerId, String)>) -> Self {
        let told = members.iter().map(|_| None).collect();
        Self { generation, members, told, failed_ms: None, logged: false }
    }

    pub(crate) fn handle_report(&mut self, rank: usize, report: FlightReport, now_ms: u64) {
        let world = self.members.len();
        if let Some(told) = self.told.get_mut(rank) {
            let mut report = report.bounded();
            report.in_flight.iter_mut().for_each(|c| c.missing.retain(|m| m.rank.index() < world));
            *told = Some(Told { report, at_ms: now_ms });
        }
    }

    /// The membership fails; what is told later does not change when that was.
    pub(crate) fn handle_failure(&mut self, now_ms: u64) {
        self.failed_ms.get_or_insert(now_ms);
    }

    /// A line for the job's log, once for each long wait.
    pub(crate) fn poll_log(&mut self, now_ms: u64) -> Option<String> {
        if self.has_failed() {
            return None;
        }
        let first = self.causes(now_ms).into_iter().next();
        let long = first.filter(|cause| cause.waits_ms >= LOGGED_WAIT_MS);
        let news = !std::mem::replace(&mut self.logged, long.is_some());
        long.filter(|_| news).map(|cause| format!("waits: {}", cause.line))
    }
}

impl Told {
    /// How old this is. A rank tells of its failure once, and what it tells stays as it is.
    fn age_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.at_ms)
    }

    fn waits_ms(&self, collective: &InFlight, now_ms: u64) -> u64 {
        let since = if self.report.failure.is_some() { 0 } else { self.age_ms(now_ms) };
        collective.waits_ms.saturating_add(since)
    }

    /// Whether it got on when it told this, which is not long ago: a rank that waits tells so every second.
    fn gets_on(&self, now_ms: u64) -> bool {
        self.report.gets_on && self.age_ms(now_ms) < 2 * WAIT_MS && self.report.failure.is_none()
    }

    /// The newest collective that was completed, and how long before the report.
    fn completed(&self) -> Option<(&str, u64)> {
        self.report.last.iter().find(|c| c.completed).map(|c| (c.name.as_str(), c.ago_ms))
    }

    /// This rank as one that waits. What had only just begun when it told this need not have gone on; when its group
    /// failed, all that was in flight did wait.
    fn waiter(&self, rank: u32, now_ms: u64) -> Option<Waiter<'_>> {
        let failed = self.report.failure.is_some();
        let waits = |c: &&InFlight| !c.missing.is_empty() && (failed || c.waits_ms >= WAIT_MS);
        let collective = self.report.in_flight.iter().find(waits)?;
        let (waits_ms, gets_on) = (self.waits_ms(collective, now_ms), self.gets_on(now_ms));
        Some(Waiter { rank, collective, waits_ms, gets_on })
    }
}

/// Everybody who is waited for waits too: the link between them is slow, or cut, or their programs have parted.
fn circular(waiter: &Waiter<'_>, waiters: &[Waiter<'_>]) -> Cause {
    let name = &waiter.collective.name;
    let missing: Vec<_> = waiter.collective.missing.iter().map(|m| m.rank.0).collect();
    let elsewhere = waiters.iter().find(|w| missing.contains(&w.rank) && w.collective.name != *name);
    let but = match elsewhere {
        Some(other) => format!("rank {} is in {}", other.rank, other.collective.name),
        None if waiter.gets_on => "they are in it too, and something comes through: a slow link".to_owned(),
        None => "they are in it too: nothing comes through between them".to_owned(),
    };
    let (rank, seconds) = (waiter.rank, waiter.waits_ms / 1000);
    let line = format!("rank {rank} waits {seconds} s in {name} for {}; {but}", words::ranks(&missing));
    Cause { line, waits_ms: waiter.waits_ms }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::ids::Rank;
    use lockstep_common::wire::{Missing, PastCollective};

    const BUCKET_2: &str = "gradient bucket 2 of step 41, phase 0";
    const BUCKET_3: &str = "gradient bucket 3 of step 41, phase 0";

    fn board(world: u64) -> Board {
        let members = (1..=world).map(|n| (WorkerId(n), format!("host{n}"))).collect();
        Board::new(Generation(1), members)
    }

    /// In flight: name, how long, and the missing ranks, negative ones having entered.
    fn report(in_flight: &[(&str, u64, &[i32])]) -> FlightReport {
        let past = PastCollective {
            name: BUCKET_2.to_owned(),
            signature: "sum of f32".to_owned(),
            bytes: 8,
            took_us: 900,
            ago_ms: 500,
            completed: true,
        };
        let in_flight: Vec<_> = in_flight
            .iter()
            .map(|(name, waits_ms, missing)| InFlight {
                name: (*name).to_owned(),
                signature: "sum of f32".to_owned(),
                bytes: 8,
                waits_ms: *waits_ms,
                missing: missing
                    .iter()
                    .map(|&r| Missing { rank: Rank(r.unsigned_abs()), entered: r < 0 })
                    .collect(),
            })
            .collect();
        FlightReport {
            in_flight_count: in_flight.len() as u32,
            in_flight,
            last: vec![past],
            ..FlightReport::default()
        }
    }

    fn waiting(board: &Board, now_ms: u64) -> Vec<String> {
        board.summary(now_ms).unwrap().waiting
    }

    #[test]
    fn the_rank_that_others_wait_for_is_named_with_its_last_word() {
        let mut board = board(3);
        assert_eq!(board.summary(0), None);
        board.handle_report(2, report(&[]), 1_000);
        for rank in [0, 1] {
            board.handle_report(rank, report(&[(BUCKET_3, 5_500, &[2])]), 7_500);
        }
        let expected = "rank 2 (w3 on host3) has not entered gradient bucket 3 of step 41, phase 0; others wait 6 s; \
                        silent for 7 s, its last word: completed gradient bucket 2 of step 41, phase 0";
        assert_eq!(waiting(&board, 8_000), [expected]);
        // It is there, and busy with something else.
        board.handle_report(2, report(&[]), 7_600);
        let alive = "its last word: completed gradient bucket 2 of step 41, phase 0, 0 s ago";
        assert!(waiting(&board, 8_000)[0].ends_with(alive), "{:?}", waiting(&board, 8_000));
    }

    #[test]
    fn a_rank_that_stopped_in_the_middle_is_told_from_one_that_never_came() {
        let mut board = board(2);
        board.handle_report(0, report(&[(BUCKET_3, 2_000, &[-1])]), 0);
        let expected = "rank 1 (w2 on host2) stopped in gradient bucket 3 of step 41, phase 0; rank 0 waits 2 s; it has \
                        told nothing yet";
        assert_eq!(waiting(&board, 100), [expected]);
    }

    #[test]
    fn the_first_cause_is_told_and_not_who_waits_for_it() {
        let mut board = board(4);
        // Rank 1 waits for rank 3, ranks 0 and 2 for rank 1.
        board.handle_report(1, report(&[(BUCKET_2, 4_000, &[3])]), 0);
        board.handle_report(0, report(&[(BUCKET_3, 3_000, &[1, 3])]), 0);
        board.handle_report(2, report(&[(BUCKET_3, 3_000, &[1])]), 0);
        let expected =
            "rank 3 (w4 on host4) has not entered gradient bucket 2 of step 41, phase 0; ranks 0, 1 wait 4 s";
        let found = waiting(&board, 0);
        assert!(found.len() == 1 && found[0].starts_with(expected), "{found:?}");
    }

    #[test]
    fn ranks_that_wait_for_each_other_are_all_told() {
        let mut board = board(2);
        board.handle_report(0, report(&[(BUCKET_3, 3_000, &[-1])]), 0);
        board.handle_report(1, report(&[(BUCKET_3, 4_000, &[0])]), 0);
        assert_eq!(
            waiting(&board, 0),
            [
                "rank 1 waits 4 s in gradient bucket 3 of step 41, phase 0 for rank 0; they are in it too: nothing comes \
             through between them",
                "rank 0 waits 3 s in gradient bucket 3 of step 41, phase 0 for rank 1; they are in it too: nothing comes \
             through between them",
            ]
        );
        board.handle_report(1, report(&[(BUCKET_2, 4_000, &[0])]), 0);
        assert!(
            waiting(&board, 0)[1].ends_with("for rank 1; rank 1 is in gradient bucket 2 of step 41, phase 0")
        );
    }

    #[test]
    fn a_slow_link_is_not_told_as_a_standstill() {
        let moving = |in_flight| FlightReport { gets_on: true, ..report(in_flight) };
        let mut board = board(2);
        board.handle_report(0, moving(&[(BUCKET_3, 3_000, &[-1])]), 0);
        board.handle_report(1, moving(&[(BUCKET_3, 4_000, &[-0])]), 0);
        let slow = "they are in it too, and something comes through: a slow link";
        assert!(waiting(&board, 0).iter().all(|line| line.ends_with(slow)), "{:?}", waiting(&board, 0));
        assert!(waiting(&board, 2_000)[0].ends_with("nothing comes through between them"));
        board.handle_report(1, moving(&[]), 2_000);
        assert!(waiting(&board, 2_000)[0].starts_with("rank 1 (w2 on host2) is still in gradient bucket 3"));
        assert!(waiting(&board, 4_000)[0].starts_with("rank 1 (w2 on host2) stopped in gradient bucket 3"));
    }

    #[test]
    fn what_had_only_just_begun_is_no_wait() {
        let mut board = board(2);
        board.handle_report(1, report(&[(BUCKET_3, 3, &[0])]), 0);
        board.handle_report(0, report(&[(BUCKET_3, 1_500, &[1])]), 6_000);
        // Rank 1 was stopped right after its regular report: it is the one to name.
        assert!(waiting(&board, 6_000)[0].starts_with("rank 1 (w2 on host2) has not entered"));
    }

    #[test]
    fn a_long_wait_is_logged_once() {
        let mut board = board(2);
        board.handle_report(0, report(&[(BUCKET_3, 1_500, &[1])]), 0);
        assert_eq!(board.poll_log(3_400), None);
        assert!(board.poll_log(3_600).unwrap().starts_with("waits: rank 1 (w2 on host2) has not entered"));
        assert_eq!(board.poll_log(9_000), None);
        board.handle_report(0, report(&[]), 9_000);
        assert_eq!(board.poll_log(9_000), None);
        board.handle_report(0, report(&[(BUCKET_3, 5_500, &[1])]), 20_000);
        assert!(board.poll_log(20_000).is_some());
    }

    #[test]
    fn a_failed_membership_stays_as_it_was() {
        let mut board = board(3);
        let failure = |text: &str, waits: u64| FlightReport {
            failure: Some(text.to_owned()),
            ..report(&[(BUCKET_3, waits, &[2])])
        };
        board.handle_failure(10_000);
        board.handle_report(1, failure("rank 2 has not entered it", 10_000), 10_000);
        board.handle_report(0, failure("rank 1 ended the group", 9_000), 10_200);
        board.handle_failure(11_000);
        let summary = board.summary(90_000).unwrap();
        assert_eq!(summary, board.summary(10_000).unwrap());
        assert_eq!(summary.failure.as_deref(), Some("rank 2 has not entered it"));
        assert!(summary.waiting[0].contains("others wait 10 s"), "{:?}", summary.waiting);
        assert_eq!(summary.ranks[1].waits_s, Some(10.0));
        assert_eq!(summary.ranks[1].waits_for, [Rank(2)]);
        assert_eq!(board.poll_log(90_000), None);
    }

    #[test]
    fn reports_from_beyond_the_world_or_about_it_do_no_harm() {
        let mut board = board(2);
        board.handle_report(7, report(&[]), 0);
        assert_eq!(board.summary(0), None);
        board.handle_report(0, report(&[(BUCKET_3, u64::MAX, &[9, 1])]), 0);
        let found = waiting(&board, 5);
        assert!(found.len() == 1 && found[0].starts_with("rank 1 (w2 on host2)"), "{found:?}");
        board.handle_report(0, report(&[(BUCKET_3, 2_000, &[9])]), 0);
        assert_eq!(waiting(&board, 5), [""; 0]);
    }
}
