//! What happens when: drawn from a seed alone, so that one seed gives the same schedule on every machine.

use crate::hosts::Way;
use lockstep_common::rng::Stream;
use std::fmt;
use std::time::Duration;

/// Places for workers; each holds one at a time.
pub const SEATS: usize = 6;
/// Workers at the start, on the first seats.
pub const WORKERS: usize = 4;
/// Hosts that workers are on, besides the coordinator's.
pub const HOSTS: usize = 3;

/// Fewer workers than these are never left in good order.
const FEWEST: usize = 3;

/// One thing that happens.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its number, from 1.
    pub number: usize,
    /// When, from the first committed step.
    pub at: Duration,
    /// What.
    pub kind: Kind,
}

/// What can happen.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// `kill -9` of a worker, which comes back with the same identity; with a fault armed, perhaps.
    Kill {
        /// Where it sits.
        seat: usize,
        /// How long it is away.
        away: Duration,
        /// What then befalls it at an exact point of a step.
        fault: Option<Fault>,
    },
    /// `kill -9` of a worker that never comes back; another one takes its place.
    Replace {
        /// Where it sits.
        seat: usize,
    },
    /// SIGSTOP of a worker, later SIGCONT.
    Stop {
        /// Where it sits.
        seat: usize,
        /// How long it stands still.
        still: Duration,
    },
    /// SIGTERM of a worker.
    Leave {
        /// Where it sits.
        seat: usize,
        /// How long it is away; for good without it.
        away: Option<Duration>,
    },
    /// A further worker joins.
    Join {
        /// Where it sits.
        seat: usize,
    },
    /// `kill -9` of the coordinator.
    KillCoordinator {
        /// How long it is away.
        away: Duration,
    },
    /// SIGSTOP of the coordinator, later SIGCONT.
    StopCoordinator {
        /// How long it stands still.
        still: Duration,
    },
    /// `kill -9` of all workers at once.
    KillWorkers {
        /// How long they are away.
        away: Duration,
    },
    /// `kill -9` of all workers and the coordinator at once.
    PowerCut {
        /// How long they are away.
        away: Duration,
    },
    /// The disk of the checkpoints is full for a while.
    DiskFull {
        /// For how long.
        lasts: Duration,
    },
    /// A host's network is cut for a while.
    Cut {
        /// The host, from 0.
        host: usize,
        /// What still comes through.
        way: Way,
        /// For how long.
        lasts: Duration,
    },
}

/// What befalls a worker at an exact point of a step, by its own hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What.
    pub deed: Deed,
    /// Where in the step.
    pub point: &'static str,
    /// In which step, counted from the furthest that is known when the worker starts.
    pub steps_ahead: u64,
}

/// What a worker does to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// SIGKILL.
    Kill,
    /// SIGSTOP; it is continued later.
    Stop,
    /// One bit of a weight is flipped.
    Flip,
}

/// The points of a step at which a worker can be struck.
pub const POINTS: [&str; 8] =
    ["data", "forward", "backward", "reduce", "optimizer", "checkpoint", "heal", "boundary"];
/// Those at which a bit can be flipped so that the worker's own rank knows.
pub const FLIP_POINTS: [&str; 3] = ["boundary", "reduce", "copy"];

impl Kind {
    /// A word for it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kill { fault: None, .. } => "kill",
            Self::Kill { fault: Some(_), .. } => "kill-and-arm",
            Self::Replace { .. } => "replace",
            Self::Stop { .. } => "stop",
            Self::Leave { .. } => "leave",
            Self::Join { .. } => "join",
            Self::KillCoordinator { .. } => "kill-coordinator",
            Self::StopCoordinator { .. } => "stop-coordinator",
            Self::KillWorkers { .. } => "kill-workers",
            Self::PowerCut { .. } => "power-cut",
            Self::DiskFull { .. } => "disk-full",
            Self::Cut { .. } => "cut",
        }
    }

    /// The seat of the one worker that it concerns.
    pub fn seat(&self) -> Option<usize> {
        match self {
            Self::Kill { seat, .. }
            | Self::Replace { seat }
            | Self::Stop { seat, .. }
            | Self::Leave { seat, .. }
            | Self::Join { seat } => Some(*seat),
            _ => None,
        }
    }

    /// How long it takes until it is undone.
    pub fn lasts(&self) -> Duration {
        match self {
            Self::Kill { away, .. }
            | Self::KillCoordinator { away }
            | Self::KillWorkers { away }
            | Self::PowerCut { away } => *away,
            Self::Stop { still, .. } | Self::StopCoordinator { still } => *still,
            Self::Leave { away, .. } => away.unwrap_or_default(),
            Self::DiskFull { lasts } | Self::Cut { lasts, .. } => *lasts,
            Self::Replace { .. } | Self::Join { .. } => Duration::ZERO,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill { seat, away, fault } => {
                write!(f, "kill -9 of seat {seat}'s worker, back after {away:.1?}")?;
                fault.map_or(Ok(()), |fault| write!(f, ", {fault}"))
            }
            Self::Replace { seat } => write!(f, "kill -9 of seat {seat}'s worker, another in its place"),
            Self::Stop { seat, still } => write!(f, "SIGSTOP of seat {seat}'s worker for {still:.1?}"),
            Self::Leave { seat, away: Some(away) } => {
                write!(f, "SIGTERM of seat {seat}'s worker, back after {away:.1?}")
            }
            Self::Leave { seat, away: None } => write!(f, "SIGTERM of seat {seat}'s worker, for good"),
            Self::Join { seat } => write!(f, "a further worker joins on seat {seat}"),
            Self::KillCoordinator { away } => write!(f, "kill -9 of the coordinator, back after {away:.1?}"),
            Self::StopCoordinator { still } => write!(f, "SIGSTOP of the coordinator for {still:.1?}"),
            Self::KillWorkers { away } => write!(f, "kill -9 of all workers, back after {away:.1?}"),
            Self::PowerCut { away } => write!(f, "kill -9 of everything, back after {away:.1?}"),
            Self::DiskFull { lasts } => write!(f, "the checkpoints' disk is full for {lasts:.1?}"),
            Self::Cut { host, way, lasts } => write!(f, "host {host} is cut ({way:?}) for {lasts:.1?}"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let deed = match self.deed {
            Deed::Kill => "kills itself",
            Deed::Stop => "stops itself",
            Deed::Flip => "has a bit flipped",
        };
        match self.point {
            "checkpoint" | "heal" | "copy" => write!(f, "then {deed} in its first `{}`", self.point),
            point => write!(f, "then {deed} in `{point}` {} steps on", self.steps_ahead),
        }
    }
}

/// How much of a schedule is wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Extent {
    /// So many events.
    Events(usize),
    /// Events for so long.
    Lasting(Duration),
}

/// The events of a seed, `mean` apart on average.
///
/// `timeout` is how long ranks wait for a silent one: workers are stopped and hosts are cut for both less and more.
pub fn draw(seed: u64, extent: Extent, mean: Duration, timeout: Duration) -> Vec<Event> {
    let mut draw = Draw {
        stream: Stream::new(seed, "chaos", &[]),
        timeout,
        seats: std::array::from_fn(|seat| (seat < WORKERS).then_some(Duration::ZERO)),
        hosts: [Duration::ZERO; HOSTS],
        coordinator: Duration::ZERO,
        disk: Duration::ZERO,
    };
    let mut events = Vec::new();
    let mut at = Duration::ZERO;
    loop {
        at += mean.mul_f64(draw.stream.uniform_in(0.25, 1.75));
        let complete = match extent {
            Extent::Events(count) => events.len() >= count,
            Extent::Lasting(limit) => at > limit,
        };
        if complete {
            return events;
        }
        let kind = draw.kind(at);
        events.push(Event { number: events.len() + 1, at, kind });
    }
}

/// What an event is, before its details are drawn.
#[derive(Clone, Copy)]
enum Sort {
    Kill,
    Struck,
    Replace,
    StopBriefly,
    StopLong,
    Leave,
    Join,
    KillCoordinator,
    StopCoordinator,
    KillWorkers,
    PowerCut,
    DiskFull,
    CutBriefly,
    CutLong,
}

/// How often each sort is drawn, of the sum.
const WEIGHTS: [(Sort, u64); 14] = [
    (Sort::Kill, 16),
    (Sort::Struck, 14),
    (Sort::Replace, 8),
    (Sort::StopBriefly, 9),
    (Sort::StopLong, 5),
    (Sort::Leave, 10),
    (Sort::Join, 9),
    (Sort::KillCoordinator, 9),
    (Sort::StopCoordinator, 3),
    (Sort::KillWorkers, 3),
    (Sort::PowerCut, 2),
    (Sort::DiskFull, 5),
    (Sort::CutBriefly, 8),
    (Sort::CutLong, 4),
];

/// What is expected to be where while events are drawn, so that most of them make sense when they happen.
struct Draw {
    stream: Stream,
    timeout: Duration,
    /// Until when each seat's worker is disturbed; `None` if nobody sits there.
    seats: [Option<Duration>; SEATS],
    hosts: [Duration; HOSTS],
    coordinator: Duration,
    disk: Duration,
}

impl Draw {
    fn kind(&mut self, at: Duration) -> Kind {
        loop {
            let sum = WEIGHTS.iter().map(|(_, weight)| weight).sum();
            let mut lot = self.stream.below(sum);
            let sort = WEIGHTS.iter().find(|(_, weight)| {
                let hit = lot < *weight;
                lot = lot.saturating_sub(*weight);
                hit
            });
            if let Some(kind) = sort.and_then(|(sort, _)| self.try_kind(*sort, at)) {
                return kind;
            }
        }
    }

    /// An event of this sort, if it makes sense now.
    fn try_kind(&mut self, sort: Sort, at: Duration) -> Option<Kind> {
        let kind = match sort {
            Sort::Kill => Kind::Kill { seat: self.busy_seat(at)?, away: self.between(0.1, 4.0), fault: None },
            Sort::Struck => {
                let seat = self.busy_seat(at)?;
                let deed = match self.stream.below(6) {
                    0 => Deed::Stop,
                    1 | 2 => Deed::Flip,
                    _ => Deed::Kill,
                };
                let points = if deed == Deed::Flip { &FLIP_POINTS[..] } else { &POINTS };
                let point = points[self.stream.below(points.len() as u64) as usize];
                let fault = Fault { deed, point, steps_ahead: 1 + self.stream.below(60) };
                Kind::Kill { seat, away: Duration::ZERO, fault: Some(fault) }
            }
            Sort::Replace => Kind::Replace { seat: self.busy_seat(at)? },
            Sort::StopBriefly => Kind::Stop { seat: self.busy_seat(at)?, still: self.brief() },
            Sort::StopLong => Kind::Stop { seat: self.busy_seat(at)?, still: self.long() },
            Sort::Leave => {
                let seat = self.busy_seat(at)?;
                let for_good = self.stream.below(2) == 0 && self.seats.iter().flatten().count() > FEWEST;
                Kind::Leave { seat, away: (!for_good).then(|| self.between(0.1, 4.0)) }
            }
            Sort::Join => Kind::Join { seat: self.seats.iter().position(Option::is_none)? },
            Sort::KillCoordinator if self.coordinator <= at => {
                Kind::KillCoordinator { away: self.between(0.0, 4.0) }
            }
            Sort::StopCoordinator if self.coordinator <= at => {
                Kind::StopCoordinator { still: self.between(0.2, 8.0) }
            }
            Sort::KillWorkers => Kind::KillWorkers { away: self.between(0.1, 2.0) },
            Sort::PowerCut if self.coordinator <= at => Kind::PowerCut { away: self.between(0.1, 2.0) },
            Sort::DiskFull if self.disk <= at => Kind::DiskFull { lasts: self.between(1.0, 8.0) },
            Sort::CutBriefly => self.cut(at, Self::brief)?,
            Sort::CutLong => self.cut(at, Self::long)?,
            Sort::KillCoordinator | Sort::StopCoordinator | Sort::PowerCut | Sort::DiskFull => return None,
        };
        self.expect(&kind, at + kind.lasts());
        Some(kind)
    }

    /// What is expected after an event: whom it disturbs, and until when.
    fn expect(&mut self, kind: &Kind, until: Duration) {
        match kind {
            Kind::Leave { seat, away: None } => self.seats[*seat] = None,
            Kind::Kill { seat, .. }
            | Kind::Replace { seat }
            | Kind::Stop { seat, .. }
            | Kind::Leave { seat, .. }
            | Kind::Join { seat } => self.seats[*seat] = Some(until),
            Kind::KillCoordinator { .. } | Kind::StopCoordinator { .. } => self.coordinator = until,
            Kind::KillWorkers { .. } => self.all_seats(until),
            Kind::PowerCut { .. } => {
                self.all_seats(until);
                self.coordinator = until;
            }
            Kind::DiskFull { .. } => self.disk = until,
            Kind::Cut { host, .. } => self.hosts[*host] = until,
        }
    }

    fn all_seats(&mut self, until: Duration) {
        self.seats.iter_mut().flatten().for_each(|busy| *busy = until.max(*busy));
    }

    /// A seat whose worker is undisturbed.
    fn busy_seat(&mut self, at: Duration) -> Option<usize> {
        let undisturbed =
            |&seat: &usize| self.seats[seat].is_some_and(|disturbed_until| disturbed_until <= at);
        let seats: Vec<_> = (0..SEATS).filter(undisturbed).collect();
        (!seats.is_empty()).then(|| seats[self.stream.below(seats.len() as u64) as usize])
    }

    fn cut(&mut self, at: Duration, lasts: fn(&mut Self) -> Duration) -> Option<Kind> {
        let whole: Vec<_> = (0..HOSTS).filter(|&host| self.hosts[host] <= at).collect();
        if whole.is_empty() {
            return None;
        }
        let host = whole[self.stream.below(whole.len() as u64) as usize];
        let way = Way::ALL[self.stream.below(Way::ALL.len() as u64) as usize];
        Some(Kind::Cut { host, way, lasts: lasts(self) })
    }

    /// Too short for the ranks' time-out.
    fn brief(&mut self) -> Duration {
        self.timeout.mul_f64(self.stream.uniform_in(0.05, 0.7))
    }

    /// Longer than the ranks' time-out.
    fn long(&mut self) -> Duration {
        self.timeout.mul_f64(self.stream.uniform_in(1.2, 2.2))
    }

    fn between(&mut self, low_s: f64, high_s: f64) -> Duration {
        Duration::from_secs_f64(self.stream.uniform_in(low_s, high_s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEAN: Duration = Duration::from_secs(2);
    const TIMEOUT: Duration = Duration::from_secs(4);

    #[test]
    fn one_seed_gives_one_schedule_and_another_seed_another() {
        let of = |seed| draw(seed, Extent::Events(200), MEAN, TIMEOUT);
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
        let longer = draw(1, Extent::Events(300), MEAN, TIMEOUT);
        assert_eq!(of(1), longer[..200], "a longer schedule begins alike");
    }

    #[test]
    fn events_come_as_often_as_asked_for() {
        let hour = Duration::from_secs(3600);
        let events = draw(5, Extent::Lasting(hour), MEAN, TIMEOUT);
        assert!((1700..1900).contains(&events.len()), "{} in an hour", events.len());
        assert!(events.iter().all(|event| event.at <= hour));
    }

    #[test]
    fn every_sort_of_event_is_drawn_and_seats_are_taken_and_left_in_turn() {
        let events = draw(3, Extent::Events(1000), MEAN, TIMEOUT);
        let mut seen = std::collections::BTreeSet::new();
        let mut taken = [true, true, true, true, false, false];
        for event in &events {
            seen.insert(event.kind.name());
            match &event.kind {
                Kind::Join { seat } => assert!(!std::mem::replace(&mut taken[*seat], true), "{event:?}"),
                Kind::Leave { seat, away: None } => {
                    assert!(std::mem::replace(&mut taken[*seat], false), "{event:?}");
                }
                _ => {}
            }
            assert!(taken.iter().filter(|&&taken| taken).count() >= FEWEST, "{event:?}");
        }
        assert_eq!(seen.len(), 12, "{seen:?}");
        let stops = events.iter().filter_map(|e| match e.kind {
            Kind::Stop { still, .. } => Some(still > TIMEOUT),
            _ => None,
        });
        let (long, brief): (Vec<_>, Vec<_>) = stops.partition(|&long| long);
        assert!(!long.is_empty() && !brief.is_empty());
    }
}
