//! What goes wrong, and when: drawn from the seed before anything happens, but for how long a process that has left stays
//! away.

use crate::cluster::Cluster;
use crate::network::{COORDINATOR, NodeId};
use crate::plan::Setup;
use crate::scheduler::{Event, Scheduler};
use lockstep_common::ids::WorkerId;
use lockstep_common::rng::Stream;

/// Something that befalls the cluster, or the end of it. Numbers choose among what is there at that time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Misfortune {
    /// `kill -9`; whether the host answers for the dead process.
    Kill {
        who: u64,
        told: bool,
    },
    KillAll,
    Start(WorkerId),
    /// SIGSTOP.
    Freeze {
        who: u64,
        ms: u64,
    },
    Thaw(NodeId),
    /// SIGTERM.
    Terminate {
        who: u64,
    },
    Join,
    KillCoordinator {
        away_ms: u64,
    },
    /// The coordinator dies at its so many-th write from now.
    Doom(u64),
    FreezeCoordinator {
        ms: u64,
    },
    StartCoordinator,
    /// No packet passes between two; the coordinator is one of them once in a while.
    Cut {
        a: u64,
        b: u64,
        ms: u64,
    },
    Mend(NodeId, NodeId),
    /// No packet passes between one and all others.
    Isolate {
        who: u64,
        ms: u64,
    },
    /// A connection breaks for no reason.
    Tear,
    /// The coordinator's wall clock is set, forwards or backwards.
    SetClock {
        forwards: bool,
        ms: u64,
    },
    FillCheckpoints {
        ms: u64,
    },
    FillRecords {
        ms: u64,
    },
    Empty,
    Slow {
        times: u64,
        ms: u64,
    },
    Pause,
    Resume,
    CalmDown,
}

/// The schedule.
pub(crate) struct Chaos {
    all: Vec<Option<Misfortune>>,
    over: bool,
}

impl Chaos {
    pub(crate) fn new(seed: u64, setup: &Setup, clock: &mut Scheduler) -> Self {
        let mut chance = Stream::new(seed, "chaos", &[]);
        let mut chaos = Self { all: Vec::new(), over: false };
        // Some days have a theme.
        let theme = chance.below(40);
        for _ in 0..setup.misfortunes {
            let at_ms = 500 + chance.below(setup.calm_at_ms - 500);
            let kind = if theme < KINDS && chance.below(2) == 0 { theme } else { chance.below(KINDS) };
            let misfortune = draw(kind, &mut chance, setup);
            chaos.later(at_ms, misfortune, clock);
        }
        chaos.later(setup.calm_at_ms, Misfortune::CalmDown, clock);
        chaos
    }

    /// Has something happen after so many milliseconds.
    pub(crate) fn later(&mut self, ms: u64, misfortune: Misfortune, clock: &mut Scheduler) {
        clock.after(ms, Event::Chaos(self.all.len()));
        self.all.push(Some(misfortune));
    }

    pub(crate) fn take(&mut self, number: usize) -> Option<Misfortune> {
        let misfortune = self.all.get_mut(number)?.take()?;
        let still = matches!(
            misfortune,
            Misfortune::Start(_) | Misfortune::StartCoordinator | Misfortune::Resume | Misfortune::CalmDown
        );
        (still || !self.over).then_some(misfortune)
    }

    /// Nothing goes wrong any more.
    pub(crate) fn end(&mut self) {
        self.over = true;
    }
}

const KINDS: u64 = 20;

fn draw(kind: u64, chance: &mut Stream, setup: &Setup) -> Misfortune {
    let mut between = |low: u64, high: u64| low + chance.below(high - low + 1);
    let lease_ms = setup.orphan_timeout_s * 1000;
    // Short, around the patience of connections, or around that of leases.
    let ms = match between(0, 5) {
        0 | 1 => between(50, 3_000),
        2 | 3 => between(3_000, 12_000),
        4 => between(10_000, 40_000),
        _ => lease_ms + between(0, 40_000),
    };
    let who = between(0, 1 << 20);
    match kind {
        0..=2 => Misfortune::Kill { who, told: between(0, 3) > 0 },
        3 => Misfortune::KillAll,
        4 | 5 => Misfortune::Freeze { who, ms },
        6 => Misfortune::Terminate { who },
        7 | 8 => Misfortune::Join,
        9 => Misfortune::KillCoordinator { away_ms: ms },
        10 => Misfortune::Doom(between(1, 12)),
        11 => Misfortune::FreezeCoordinator { ms },
        12 | 13 => Misfortune::Cut { a: who, b: between(0, 1 << 20), ms },
        14 => Misfortune::Isolate { who, ms },
        15 => Misfortune::Tear,
        16 => Misfortune::SetClock { forwards: between(0, 1) == 0, ms: between(1_000, 4_000_000) },
        17 => Misfortune::FillCheckpoints { ms },
        18 if between(0, 1) == 0 => Misfortune::FillRecords { ms },
        18 => Misfortune::Pause,
        _ => Misfortune::Slow { times: between(5, 40), ms: between(500, 8_000) },
    }
}

impl Cluster {
    pub(crate) fn befall(&mut self, misfortune: Misfortune) {
        if !matches!(misfortune, Misfortune::Start(_) | Misfortune::Thaw(_)) {
            self.note(|| format!("{misfortune:?}"));
        }
        match misfortune {
            Misfortune::Kill { who, told } => {
                if let Some(worker) = self.living(who) {
                    self.kill(worker, told);
                    let away_ms = self.world.clock.between(100, 15_000);
                    self.later(away_ms, Misfortune::Start(worker));
                }
            }
            Misfortune::KillAll => {
                for worker in self.workers.clone() {
                    self.kill(worker, true);
                    let away_ms = self.world.clock.between(100, 15_000);
                    self.later(away_ms, Misfortune::Start(worker));
                }
            }
            Misfortune::Start(worker) => self.start(worker),
            Misfortune::Freeze { who, ms } => {
                if let Some(worker) = self.living(who) {
                    self.freeze(NodeId(worker.0));
                    self.later(ms, Misfortune::Thaw(NodeId(worker.0)));
                }
            }
            Misfortune::Thaw(node) => self.thaw(node),
            Misfortune::Terminate { who } => {
                if let Some(worker) = self.living(who)
                    && self.world.net.is_up(NodeId(worker.0))
                    && let Some(process) = self.processes.get_mut(&worker)
                {
                    process.handle_departure(&mut self.world);
                }
            }
            Misfortune::Join => {
                if self.world.net.is_up(COORDINATOR)
                    && let Some(hub) = &mut self.hub
                {
                    hub.enroll(&mut self.store, &mut self.world);
                }
            }
            Misfortune::KillCoordinator { away_ms } => {
                self.kill_coordinator();
                self.later(away_ms, Misfortune::StartCoordinator);
            }
            Misfortune::Doom(writes) => {
                if let Some(hub) = &mut self.hub {
                    hub.doom = Some(writes);
                }
            }
            Misfortune::FreezeCoordinator { ms } => {
                self.freeze(COORDINATOR);
                self.later(ms, Misfortune::Thaw(COORDINATOR));
            }
            Misfortune::StartCoordinator => self.start_coordinator(),
            Misfortune::Cut { a, b, ms } => {
                let nodes = self.nodes();
                let a = nodes[a as usize % nodes.len()];
                let b = nodes[b as usize % nodes.len()];
                self.cut(a, b, ms);
            }
            Misfortune::Mend(a, b) => self.world.net.cut(a, b, false, &mut self.world.clock),
            Misfortune::Isolate { who, ms } => {
                let nodes = self.nodes();
                let lonely = nodes[who as usize % nodes.len()];
                for other in nodes.into_iter().filter(|node| *node != lonely) {
                    self.cut(lonely, other, ms);
                }
            }
            Misfortune::Tear => self.world.net.tear(&mut self.world.clock),
            Misfortune::SetClock { forwards: true, ms } => self.wall_offset_ms += ms,
            Misfortune::SetClock { forwards: false, ms } => self.wall_offset_ms -= ms,
            Misfortune::FillCheckpoints { ms } => {
                self.store.checkpoints_full = true;
                self.later(ms, Misfortune::Empty);
            }
            Misfortune::FillRecords { ms } => {
                self.store.records_full = true;
                self.later(ms, Misfortune::Empty);
            }
            Misfortune::Empty => {
                (self.store.records_full, self.store.checkpoints_full) = (false, false);
            }
            Misfortune::Slow { times: 1, .. } => self.world.net.slowness = 1,
            Misfortune::Slow { times, ms } => {
                self.world.net.slowness = times;
                self.later(ms, Misfortune::Slow { times: 1, ms });
            }
            Misfortune::Pause | Misfortune::Resume => {
                let pause = misfortune == Misfortune::Pause;
                if self.world.net.is_up(COORDINATOR)
                    && let Some(hub) = &mut self.hub
                {
                    hub.pause(pause, &mut self.store, &mut self.world);
                    if pause {
                        let rest_ms = self.world.clock.between(1_000, 15_000);
                        self.later(rest_ms, Misfortune::Resume);
                    }
                }
            }
            Misfortune::CalmDown => self.calm_down(),
        }
    }

    fn cut(&mut self, a: NodeId, b: NodeId, ms: u64) {
        if a != b {
            self.world.net.cut(a, b, true, &mut self.world.clock);
            self.later(ms, Misfortune::Mend(a, b));
        }
    }

    /// One of the workers whose processes live.
    fn living(&self, who: u64) -> Option<WorkerId> {
        let living: Vec<_> = self.processes.keys().copied().collect();
        (!living.is_empty()).then(|| living[who as usize % living.len()])
    }

    /// The coordinator and all workers.
    fn nodes(&self) -> Vec<NodeId> {
        std::iter::once(COORDINATOR).chain(self.workers.iter().map(|w| NodeId(w.0))).collect()
    }
}
