//! How long it took to get over what happened.

use super::schedule::{Deed, Kind};
use super::stage::{History, Stage};
use super::watch::Seen;
use super::{Happened, Trial};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// A job was going on if its last step before an event was committed so shortly before.
const GOING_ON: Duration = Duration::from_secs(1);

/// The figures of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    /// From one member's death to the next committed step, where nothing else was amiss.
    pub death_alone_s: Summary,
    /// Steps committed twice after such a death.
    pub death_alone_recomputed_steps: Summary,
    /// From a member's death to the next committed step, whatever else happened.
    pub death_s: Summary,
    /// Steps committed twice after such a death.
    pub death_recomputed_steps: Summary,
    /// From a member's SIGSTOP, longer than the ranks' time-out, to the next committed step.
    pub zombie_s: Summary,
    /// From a member's SIGTERM to the next committed step without it.
    pub leave_s: Summary,
    /// Steps committed twice after it.
    pub leave_recomputed_steps: Summary,
    /// From a new worker's start to the first step committed with it.
    pub join_s: Summary,
    /// How long the others stood still for that, where nothing else was amiss: the time between two steps, less a
    /// usual one.
    pub join_pause_s: Summary,
    /// From a killed coordinator's new start to its answer about the job.
    pub restart_s: Summary,
    /// From its death to that answer, with the time that it was away.
    pub outage_s: Summary,
    /// Steps committed in between.
    pub outage_steps: Summary,
    /// Memberships that ended because a rank found its own state changed.
    pub flips_found: usize,
    /// Steps committed twice at a change of membership, over the whole run.
    pub recomputed_steps: u64,
    /// Steps committed, over the whole run.
    pub committed_steps: u64,
    /// Changes of membership after which there was a step.
    pub memberships: u64,
    /// Where more was done again than ought to be after what befell one member alone.
    pub wasteful: Vec<String>,
}

/// Some values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// How many.
    pub count: usize,
    /// The one in the middle.
    pub median: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<_> = values.collect();
        values.sort_by(f64::total_cmp);
        let (Some(&median), Some(&max)) = (values.get(values.len() / 2), values.last()) else {
            return Self::default();
        };
        Self { count: values.len(), median, max }
    }
}

/// A job with the times of its steps.
struct Course<'a> {
    trial: &'a Trial,
    committed: Vec<Duration>,
    /// How long a step takes, as a rule.
    step: Duration,
}

/// How a job got over something.
struct Recovery {
    /// The first step of a later membership: its place among the lines.
    first: usize,
    after: Duration,
    recomputed: u64,
    alone: bool,
    generation: u64,
}

/// Something that befell somebody.
struct Trouble<'a> {
    from: Duration,
    until: Duration,
    /// The worker; `None` if it was not one alone.
    whose: Option<&'a str>,
}

fn troubles<'a>(happened: &'a [Happened], history: &'a History) -> Vec<Trouble<'a>> {
    let trouble = |from, lasts, whose| Trouble { from, until: from + lasts, whose };
    let happened = happened.iter().filter(|h| h.skipped.is_none());
    let happened = happened.map(|h| trouble(h.at, h.event.kind.lasts(), h.worker.as_deref()));
    let deaths = history.deaths.iter().map(|d| trouble(d.at, Duration::ZERO, Some(&d.worker[..])));
    let stopped = history.struck.iter().filter(|(_, fault)| fault.deed == Deed::Stop);
    let stopped = stopped.map(|(at, fault)| trouble(*at, fault.still(), None));
    let exits = history.exits.iter().filter(|exit| !exit.asked);
    let exits = exits.map(|exit| trouble(exit.at, Duration::ZERO, Some(&exit.who[..])));
    happened.chain(deaths).chain(stopped).chain(exits).collect()
}

/// Measures a run whose ranks wait `timeout` for a silent one.
pub fn measure(trials: &[Trial], happened: &[Happened], stage: &Stage, timeout: Duration) -> Figures {
    let numbers: BTreeMap<_, _> =
        stage.programs().filter_map(|p| Some((p.name().to_owned(), worker_number(&p.said())?))).collect();
    let courses: Vec<_> = trials.iter().map(Course::new).collect();
    let troubles = troubles(happened, &stage.history);
    let recover = |at: Duration, worker: &str, role: Role| {
        let course = courses.iter().find(|course| course.spans(at))?;
        let others = troubles.iter().filter(|trouble| trouble.from != at || trouble.whose != Some(worker));
        Some((course, course.recovery(at, numbers.get(worker)?, role, others)?))
    };
    let after = |role: Role, wanted: &dyn Fn(&Kind) -> bool| -> Vec<_> {
        let events = happened.iter().filter(|h| h.skipped.is_none() && wanted(&h.event.kind));
        events.filter_map(|h| recover(h.at, h.worker.as_ref()?, role)).collect()
    };

    let deaths = stage.history.deaths.iter();
    let deaths: Vec<_> = deaths.filter_map(|d| recover(d.at, &d.worker, Role::Member)).collect();
    let zombies = after(Role::Member, &|kind| matches!(kind, Kind::Stop { still, .. } if *still > timeout));
    let leaves = after(Role::Member, &|kind| matches!(kind, Kind::Leave { .. }));
    let joins = after(Role::Newcomer, &|kind| matches!(kind, Kind::Join { .. }));
    let restarts = stage.history.restarts.iter();
    let outages: Vec<_> = restarts
        .filter_map(|&(killed, started)| {
            courses.iter().find(|course| course.spans(killed))?.outage(killed, started)
        })
        .collect();

    let time = |(_, recovery): &(&Course<'_>, Recovery)| recovery.after.as_secs_f64();
    let recomputed = |(_, recovery): &(&Course<'_>, Recovery)| recovery.recomputed as f64;
    let alone = |(_, recovery): &&(&Course<'_>, Recovery)| recovery.alone;
    let pause = |(course, recovery): &(&Course<'_>, Recovery)| course.pause_s(recovery.first);
    let wasteful = |sort: &'static str, recoveries: &[(&Course<'_>, Recovery)], bound: u64| -> Vec<_> {
        let wasteful = recoveries.iter().filter(alone).filter(|(_, recovery)| recovery.recomputed > bound);
        wasteful.map(|(course, recovery)| course.describe(sort, recovery)).collect()
    };
    Figures {
        wasteful: [wasteful("a death", &deaths, 1), wasteful("SIGTERM", &leaves, 0)].concat(),
        death_alone_s: Summary::of(deaths.iter().filter(alone).map(time)),
        death_alone_recomputed_steps: Summary::of(deaths.iter().filter(alone).map(recomputed)),
        death_s: Summary::of(deaths.iter().map(time)),
        death_recomputed_steps: Summary::of(deaths.iter().map(recomputed)),
        zombie_s: Summary::of(zombies.iter().map(time)),
        leave_s: Summary::of(leaves.iter().map(time)),
        leave_recomputed_steps: Summary::of(leaves.iter().filter(alone).map(recomputed)),
        join_s: Summary::of(joins.iter().map(time)),
        join_pause_s: Summary::of(joins.iter().filter(alone).map(pause)),
        restart_s: Summary::of(outages.iter().map(|outage| outage.restart.as_secs_f64())),
        outage_s: Summary::of(outages.iter().map(|outage| outage.whole.as_secs_f64())),
        outage_steps: Summary::of(outages.iter().map(|outage| outage.steps as f64)),
        flips_found: trials.iter().map(|trial| flips_found(&stage.place.log(&trial.id))).sum(),
        recomputed_steps: courses.iter().map(Course::recomputed).sum(),
        committed_steps: courses.iter().map(|course| course.committed.len() as u64).sum(),
        memberships: courses.iter().map(Course::memberships).sum(),
    }
}

/// Memberships that ended, by a job's log, because a rank found its own state changed.
fn flips_found(log: &str) -> usize {
    let is_one = |line: &&str| line.contains(" is over: ") && line.contains(" found its state changed ");
    log.lines().filter(is_one).count()
}

/// Whose recovery it is.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    /// A member's that is gone.
    Member,
    /// That of one who is to become a member.
    Newcomer,
}

/// A coordinator's death and return.
struct Outage {
    restart: Duration,
    whole: Duration,
    steps: usize,
}

impl<'a> Course<'a> {
    fn new(trial: &'a Trial) -> Self {
        let step_s = Summary::of(trial.seen.lines.iter().map(|line| line.seconds)).median;
        Self { trial, committed: trial.seen.committed(), step: Duration::from_secs_f64(step_s) }
    }

    fn seen(&self) -> &Seen {
        &self.trial.seen
    }

    fn spans(&self, at: Duration) -> bool {
        self.trial.submitted <= at && at < self.trial.ended
    }

    /// How the job got over what happened to a worker at that time; `None` if the worker had no part in it or there was
    /// no step any more.
    fn recovery<'t>(
        &self,
        at: Duration,
        number: &String,
        role: Role,
        mut others: impl Iterator<Item = &'t Trouble<'t>>,
    ) -> Option<Recovery> {
        let generation = self.seen().generation(at);
        let members = self.seen().members(generation);
        if role == Role::Member && !members.contains(number) {
            return None;
        }
        let leaves_nobody = role == Role::Member && members.len() == 1;
        let with = |generation: u64| role == Role::Member || self.seen().members(generation).contains(number);
        let mut steps = self.seen().lines.iter().zip(&self.committed);
        let first = steps
            .position(|(line, when)| line.generation > generation && *when > at && with(line.generation))?;
        let until = self.committed[first];
        // The last one before, not the furthest: what was lost earlier is not lost by this.
        let before = first.checked_sub(1).map_or(0, |last| self.seen().lines[last].step);
        let undisturbed = !others.any(|other| other.from <= until && other.until >= at);
        let going_on = self.committed.iter().any(|when| *when <= at && *when + GOING_ON >= at);
        Some(Recovery {
            first,
            after: until - at,
            recomputed: (before + 1).saturating_sub(self.seen().lines[first].step),
            alone: undisturbed && going_on && !leaves_nobody,
            generation,
        })
    }

    /// What was done again, and where.
    fn describe(&self, sort: &str, recovery: &Recovery) -> String {
        let Recovery { first, after, recomputed, generation, .. } = *recovery;
        let line = &self.seen().lines[first];
        let when = (self.committed[first] - after).as_secs_f64();
        let members = |generation: u64| self.seen().members(generation).join(", ");
        format!(
            "{when:.2} s: {sort} in generation {generation} of {} ({}): {recomputed} steps again, from step {} in generation {} ({})",
            self.trial.id,
            members(generation),
            line.step,
            line.generation,
            members(line.generation),
        )
    }

    /// How long the job stood still before that line, in seconds.
    fn pause_s(&self, first: usize) -> f64 {
        let before = first.checked_sub(1).map_or(Duration::ZERO, |last| self.committed[last]);
        (self.committed[first].saturating_sub(before)).saturating_sub(self.step).as_secs_f64()
    }

    fn outage(&self, killed: Duration, started: Duration) -> Option<Outage> {
        let answer = self.seen().answers.iter().find(|answer| answer.asked >= started)?;
        let steps = self.committed.iter().filter(|&&when| (killed..answer.came).contains(&when)).count();
        Some(Outage { restart: answer.came - started, whole: answer.came - killed, steps })
    }

    /// Steps that had been committed before.
    fn recomputed(&self) -> u64 {
        let mut furthest = 0;
        let mut again = 0;
        for line in &self.seen().lines {
            again += u64::from(line.step <= furthest);
            furthest = furthest.max(line.step);
        }
        again
    }

    fn memberships(&self) -> u64 {
        self.seen().lines.chunk_by(|a, b| a.generation == b.generation).count() as u64
    }
}

/// The number that the coordinator knows a worker by, from what it has said.
fn worker_number(said: &str) -> Option<String> {
    let (_, number) = said.rsplit_once("this is worker ")?;
    Some(number.split_whitespace().next()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::End;
    use super::super::watch::{Answer, Line};
    use super::super::workload::Task;
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Two members; `w2` dies at 1 s, `w1` goes on alone from a step that it repeats, `w3` joins at 3 s.
    fn trial() -> Trial {
        let line =
            |seen, generation, step| Line { seen: ms(seen), generation, step, seconds: 0.1, loss: step };
        let answer = |came, generation, members: &[&str]| Answer {
            asked: ms(came - 10),
            came: ms(came),
            state: "running".to_owned(),
            generation,
            members: members.iter().map(|&name| name.to_owned()).collect(),
        };
        let seen = Seen {
            // Told in batches: 800 and 900 ms, then 1500 and 1600.
            lines: vec![
                line(900, 1, 8),
                line(900, 1, 9),
                line(1600, 2, 9),
                line(1600, 2, 10),
                line(3500, 3, 11),
            ],
            answers: vec![
                answer(500, 1, &["w1", "w2"]),
                answer(1700, 2, &["w1"]),
                answer(3400, 3, &["w1", "w3"]),
            ],
            ..Seen::default()
        };
        let (submitted, ended, end) = (ms(100), ms(4000), End::Finished);
        Trial { id: "j1".to_owned(), task: Task::Gan, submitted, ended, end, seen }
    }

    #[test]
    fn a_steps_time_is_reckoned_back_from_the_end_of_its_batch() {
        let committed = trial().seen.committed();
        assert_eq!(committed, [800, 900, 1500, 1600, 3500].map(ms));
    }

    #[test]
    fn a_death_is_over_with_the_first_step_of_the_next_membership() {
        let trial = trial();
        let course = Course::new(&trial);
        let recovery =
            |at, number: &str, role| course.recovery(ms(at), &number.to_owned(), role, [].into_iter());
        let death = recovery(1000, "w2", Role::Member).expect("a member died");
        assert_eq!((death.after, death.recomputed, death.alone), (ms(500), 1, true));
        let join = recovery(3000, "w3", Role::Newcomer).expect("a worker joined");
        assert_eq!((join.after, join.recomputed, join.alone), (ms(500), 0, false), "nothing went on by then");
        assert_eq!(course.pause_s(join.first), 1.8);
        assert!(recovery(1000, "w3", Role::Member).is_none(), "it was no member");
        assert!(recovery(3600, "w1", Role::Member).is_none(), "no step came after it");
        assert_eq!((course.recomputed(), course.memberships()), (1, 3));
    }

    #[test]
    fn a_death_was_not_alone_where_nobody_was_left_or_others_were_in_trouble() {
        let trial = trial();
        let course = Course::new(&trial);
        let is_alone = |at, number: &str, others: &[Trouble<'_>]| {
            let number = number.to_owned();
            course.recovery(ms(at), &number, Role::Member, others.iter()).expect("a step came after it").alone
        };
        let trouble = |from, until| Trouble { from: ms(from), until: ms(until), whose: Some("w1") };
        assert!(is_alone(1000, "w2", &[trouble(0, 900), trouble(1600, 2000)]));
        assert!(!is_alone(1000, "w2", &[trouble(0, 1100)]));
        assert!(!is_alone(1000, "w2", &[trouble(1000, 1000)]), "it died together with another");
        assert!(!is_alone(1700, "w1", &[]), "it was the only member");
    }

    #[test]
    fn steps_of_an_outage_are_those_between_death_and_answer() {
        let outage = Course::new(&trial()).outage(ms(850), ms(1550)).expect("an answer came");
        assert_eq!((outage.restart, outage.whole, outage.steps), (ms(150), ms(850), 3));
    }
}
