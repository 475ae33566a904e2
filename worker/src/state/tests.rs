//! State over real QUIC on the loopback interface.

use super::desk::Desk;
use super::fetch::{chunks, states};
use super::follow::{Follower, Ready};
use super::heal::heal;
use super::pack::{Copied, Packed};
use super::station::OpenDesk;
use crate::cli::DeviceArg;
use crate::control;
use crate::data::pool::Pool;
use crate::data::source;
use crate::kept::{Kept, State};
use crate::ledger::Ledger;
use crate::mesh::Mesh;
use crate::metrics::Metrics;
use crate::session::Environment;
use crate::tasks::TaskPlan;
use crate::train::error::TrainError;
use crate::train::replica::Replica;
use crate::train::tests::recovery::{fresh, group, job_texts, jobs, until_a_death};
use crate::train::tests::{GAN, classifier, job};
use crate::train::wishes::Wishes;
use lockstep_collectives::quic::transport_config;
use lockstep_common::ids::{Generation, JobId, Rank, WorkerId};
use lockstep_common::job::JobSpec;
use lockstep_common::net::{Authority, Role, bind, client_config, server_config};
use lockstep_common::placement::Placement;
use lockstep_common::wire::{Assignment, Following, Peer, Position, Resumption};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use tokio::runtime::Runtime;

const JOB: JobId = JobId(1);
const GENERATION: Generation = Generation(4);

/// A worker of the cluster, on a runtime of its own.
struct Worker {
    id: WorkerId,
    endpoint: quinn::Endpoint,
    environment: Environment,
    runtime: Runtime,
    _home: TempDir,
}

fn workers(count: u64) -> Vec<Worker> {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open(folder.path()).unwrap();
    (1..=count).map(|id| worker(&authority, WorkerId(id))).collect()
}

fn worker(authority: &Authority, id: WorkerId) -> Worker {
    let identity = authority.issue(Role::Worker(id)).unwrap();
    let mut server = server_config(&identity, false).unwrap();
    server.transport_config(Arc::new(transport_config()));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let inside = runtime.enter();
    let endpoint = bind(SocketAddr::from(([127, 0, 0, 1], 0)), Some(server)).unwrap();
    // There is no coordinator: whatever is asked of one fails.
    let (control, _) = control::channel(runtime.handle().clone());
    let home = tempfile::tempdir().unwrap();
    let environment = Environment {
        metrics: Metrics::new().unwrap(),
        mesh: Mesh::listen(endpoint.clone(), client_config(&identity).unwrap()),
        runtime: runtime.handle().clone(),
        shards: source::cache(home.path(), 1 << 30, &[], control.clone()).unwrap(),
        control,
        device: DeviceArg::Cpu,
        threads: 1,
        decoders: Arc::new(Pool::new(1).unwrap()),
        worker: id,
        kept: Arc::new(Kept::default()),
    };
    drop(inside);
    Worker { id, endpoint, environment, runtime, _home: home }
}

fn peers(workers: &[Worker]) -> Vec<Peer> {
    let peer = |(rank, worker): (u32, &Worker)| Peer {
        rank: Rank(rank),
        worker: worker.id,
        host: format!("host-{rank}"),
        host_key: None,
        device: "cpu".to_owned(),
        addresses: vec![worker.endpoint.local_addr().unwrap()],
    };
    (0..).zip(workers).map(peer).collect()
}

fn assignment(workers: &[Worker], rank: u32) -> Assignment {
    Assignment {
        job: JOB,
        generation: GENERATION,
        rank: Rank(rank),
        placement: Placement::even(4, workers.len() as u32),
        peers: peers(workers),
        file: String::new(),
        toml: String::new(),
        datasets: Vec::new(),
        resume: Resumption::Fresh,
    }
}

impl Worker {
    fn open_desk(&self, workers: &[Worker], rank: u32) -> OpenDesk {
        self.environment.mesh.station().open(&assignment(workers, rank))
    }

    /// Opens a desk that shows `replica`, changed by `spoil`.
    fn show(
        &self,
        workers: &[Worker],
        rank: u32,
        replica: &Replica,
        job: &JobSpec,
        spoil: impl Fn(&mut Packed),
    ) -> OpenDesk {
        let open = self.open_desk(workers, rank);
        let mut packed = Copied::of(replica, &TaskPlan::new(job)).unwrap().pack(JOB).unwrap();
        spoil(&mut packed);
        open.desk.show(packed, &Ledger::default());
        open
    }

    fn heal(&self, workers: &[Worker], rank: u32, sources: &[u32], job: &JobSpec, at: Position) -> Healed {
        let plan = TaskPlan::new(job);
        let replica = fresh::<f32>(job, 1).remove(0);
        let sources: Vec<Rank> = sources.iter().copied().map(Rank).collect();
        let mesh = &self.environment.mesh;
        self.runtime.block_on(heal(mesh, &assignment(workers, rank), at, &sources, &plan, replica))
    }
}

type Healed = Result<(State, Vec<String>), TrainError>;

/// A job whose state has several chunks.
fn large() -> JobSpec {
    job(&GAN.replace("hidden = 10", "hidden = 2000").replace("hidden = 8", "hidden = 500"), "")
}

#[track_caller]
fn assert_equal(job: &JobSpec, one: &Replica, other: &Replica) {
    let plan = TaskPlan::new(job);
    assert_eq!(one.position(), other.position());
    assert_eq!(one.figures(), other.figures());
    assert_eq!(one.updates(), other.updates());
    assert_eq!(one.weights_digest().unwrap(), other.weights_digest().unwrap());
    assert!(one.optimizer_state(&plan).unwrap() == other.optimizer_state(&plan).unwrap());
}

#[test]
fn a_rank_that_is_behind_gets_the_sources_bits_in_the_middle_of_a_step() {
    for job in jobs() {
        let phases = TaskPlan::new(&job).phases.len();
        let (replicas, _) = until_a_death::<f32>(&job, 3, phases - 1);
        let workers = workers(3);
        let show = |rank: usize| workers[rank].show(&workers, rank as u32, &replicas[rank], &job, |_| {});
        let _open = [show(0), show(1)];
        let (healed, complaints) =
            workers[2].heal(&workers, 2, &[0, 1], &job, replicas[0].position()).unwrap();
        assert_equal(&job, &healed.replica, &replicas[0]);
        assert_eq!(complaints, [""; 0]);
        assert_eq!(healed.ledger.settled, None, "what follows a step was for others to do");
    }
}

fn unavailable(healed: Healed) -> (String, Option<Rank>) {
    match healed {
        Err(TrainError::Unavailable { what, culprit }) => (what, culprit),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it healed"),
    }
}

#[test]
fn a_flipped_byte_is_refused_by_name_and_fetched_from_another_source() {
    let job = large();
    let replica = fresh::<f32>(&job, 1).remove(0);
    let spoil = |packed: &mut Packed| {
        (0..packed.manifest.chunk_count()).for_each(|c| {
            packed.flip(packed.manifest.range(c).start);
        })
    };
    let workers = workers(3);
    let _bad = workers[1].show(&workers, 1, &replica, &job, spoil);
    let (what, culprit) = unavailable(workers[2].heal(&workers, 2, &[1], &job, Position::at(0)));
    assert!(what.contains("rank 1 (w2 on host-1) sent chunk") && what.contains("than its hash"), "{what}");
    assert_eq!(culprit, Some(Rank(1)));
    let _good = workers[0].show(&workers, 0, &replica, &job, |_| {});
    let (healed, complaints) = workers[2].heal(&workers, 2, &[0, 1], &job, Position::at(0)).unwrap();
    assert_equal(&job, &healed.replica, &replica);
    assert_eq!(complaints.len(), 1, "{complaints:?}");
    assert!(complaints[0].starts_with("rank 1 (w2 on host-1) sent chunk"), "{complaints:?}");
}

#[test]
fn sources_that_hold_different_states_are_refused_and_the_odd_one_named() {
    let job = job(&classifier("sync"), "");
    let mut other = job.clone();
    other.seed += 1;
    let (right, wrong) = (fresh::<f32>(&job, 1).remove(0), fresh::<f32>(&other, 1).remove(0));
    let workers = workers(4);
    let _open = [
        workers[0].show(&workers, 0, &right, &job, |_| {}),
        workers[1].show(&workers, 1, &wrong, &job, |_| {}),
        workers[2].show(&workers, 2, &right, &job, |_| {}),
    ];
    let heal = |sources: &[u32]| match workers[3].heal(&workers, 3, sources, &job, Position::at(0)) {
        Err(TrainError::Differ { what, culprit }) => (what, culprit),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it healed"),
    };
    let (what, culprit) = heal(&[0, 1, 2]);
    assert_eq!(what, "rank 1 (w2 on host-1) holds another state than the other ranks");
    assert_eq!(culprit, Some(Rank(1)));
    let (what, culprit) = heal(&[0, 1]);
    assert!(what.contains("rank 0 (w1 on host-0) and rank 1 (w2 on host-1) hold different states"), "{what}");
    assert_eq!(culprit, None);
}

#[test]
fn a_state_of_another_position_or_job_is_refused() {
    let right = job(&classifier("sync"), "");
    let replica = fresh::<f32>(&right, 1).remove(0);
    let workers = workers(2);
    let _open = workers[0].show(&workers, 0, &replica, &right, |_| {});
    let (what, culprit) = unavailable(workers[1].heal(&workers, 1, &[0], &right, Position::at(1)));
    assert_eq!(what, "the state of rank 0 (w1 on host-0) is at step 0 instead of step 1");
    assert_eq!(culprit, Some(Rank(0)));
    let (what, _) = unavailable(workers[1].heal(&workers, 1, &[0], &job(GAN, ""), Position::at(0)));
    assert!(what.contains("has another tensor `weights/"), "{what}");
}

#[test]
fn a_source_that_dies_is_done_without() {
    let job = large();
    let replica = fresh::<f32>(&job, 1).remove(0);
    let workers = workers(3);
    let show = |rank: usize| workers[rank].show(&workers, rank as u32, &replica, &job, |_| {});
    let _open = [show(0), show(1)];
    workers[2].runtime.block_on(async {
        let visit = Arc::new(workers[2].environment.mesh.visit((JOB, GENERATION), Rank(2)));
        let mut found = states(visit, peers(&workers)[..2].to_vec()).await.unwrap();
        let (manifest, id) = (Arc::new(found[0].1.clone()), found[0].1.id().unwrap());
        let sources: Vec<_> = found.drain(..).map(|(source, ..)| source).collect();
        workers[0].endpoint.close(0u32.into(), b"killed");
        let fetched = chunks(&sources, &manifest, id).await.unwrap();
        assert_eq!((fetched.bytes.len() as u64, fetched.complaints.len()), (manifest.bytes, 0));
        workers[1].endpoint.close(0u32.into(), b"killed");
        let error = chunks(&sources, &manifest, id).await.err().unwrap();
        assert!(error.what.contains("chunks of the state are missing: rank"), "{}", error.what);
        assert_eq!(error.culprit, None);
    });
}

#[test]
fn only_ranks_of_the_generation_get_the_state_it_starts_from() {
    let job = job(&classifier("sync"), "");
    let replica = fresh::<f32>(&job, 1).remove(0);
    let workers = workers(3);
    // The generation is of the first two only.
    let _open = workers[0].show(&workers[..2], 0, &replica, &job, |_| {});
    let claim = |rank: u32| {
        let visit = Arc::new(workers[2].environment.mesh.visit((JOB, GENERATION), Rank(rank)));
        let error = workers[2].runtime.block_on(states(visit, peers(&workers)[..1].to_vec())).err();
        error.unwrap().what
    };
    for rank in [0, 1, 2] {
        assert!(claim(rank).contains("not the worker that has this rank"), "{}", claim(rank));
    }
    // A follower gets in, and no answer to this.
    assert!(claim(u32::MAX).contains("nobody hands over the state"), "{}", claim(u32::MAX));
    let old = workers[1].environment.mesh.visit((JOB, Generation(3)), Rank(1));
    let error = workers[1].runtime.block_on(states(Arc::new(old), peers(&workers)[..1].to_vec())).err();
    assert!(error.unwrap().what.contains("g3 of j1 is over here"));
}

#[test]
fn a_visitor_that_talks_nonsense_disturbs_nobody() {
    let job = job(&classifier("sync"), "");
    let replica = fresh::<f32>(&job, 1).remove(0);
    let workers = workers(2);
    let _open = workers[0].show(&workers, 0, &replica, &job, |_| {});
    workers[1].runtime.block_on(async {
        let visit = workers[1].environment.mesh.visit((JOB, GENERATION), Rank(1));
        for nonsense in [&[255u8; 64][..], &[4, 0, 0, 0, 1], &[0, 0, 0, 0], b""] {
            let peer = crate::mesh::peer(&peers(&workers)[0]);
            let connection = visit.call(peer).await.unwrap();
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            send.write_all(nonsense).await.unwrap();
            send.finish().unwrap();
            assert!(recv.read_to_end(1).await.is_err(), "it is closed, and nothing is said");
        }
    });
    workers[1].heal(&workers, 1, &[0], &job, Position::at(0)).unwrap();
}

fn follow(
    workers: &[Worker],
    follower: usize,
    toml: &str,
    ready: impl FnOnce(Ready) + Send + 'static,
) -> Follower {
    let following = Following {
        job: JOB,
        generation: GENERATION,
        file: "test.toml".to_owned(),
        toml: toml.to_owned(),
        datasets: Vec::new(),
        sources: peers(&workers[..follower]),
    };
    Follower::start(workers[follower].environment.clone(), following, ready)
}

/// Two ranks train while a third worker follows them. They stop some steps after it was ready; returns their replica and
/// the follower.
fn train_followed(workers: &[Worker], toml: &str) -> (Replica, Follower) {
    let job = JobSpec::parse("test.toml", toml).unwrap();
    let open = [workers[0].open_desk(&workers[..2], 0), workers[1].open_desk(&workers[..2], 1)];
    let is_ready = Arc::new(AtomicBool::new(false));
    let told = is_ready.clone();
    let follower = follow(workers, 2, toml, move |ready| {
        assert_eq!((ready.job, ready.generation), (JOB, GENERATION));
        assert!(ready.position > Position::default(), "it did not give up");
        told.store(true, Ordering::Relaxed);
    });
    let mut replicas = group::<f32, _>(&job, fresh::<f32>(&job, 2), |rank, mut bench| {
        let desk: Arc<Desk> = open[rank as usize].desk.clone();
        bench.trainer = bench.trainer.followed_at(desk.clone());
        let mut more = 7;
        loop {
            more -= u32::from(is_ready.load(Ordering::Relaxed) && rank == 0);
            let wishes = Wishes { snapshot: desk.is_wanted(), boundary: more == 0, ..Wishes::default() };
            let done = bench.try_step(wishes).unwrap();
            if done.wishes.snapshot {
                let copied = Copied::of(&bench.trainer.replica, &bench.trainer.plan).unwrap();
                desk.copy(copied, &Ledger::default()).unwrap();
            }
            if done.wishes.stop().is_some() {
                return bench.trainer.into_replica();
            }
        }
    });
    (replicas.remove(0), follower)
}

fn endless(toml: &str) -> String {
    toml.replace("epochs = 2", "epochs = 100000")
}

#[test]
fn a_follower_ends_with_the_members_bits() {
    for toml in job_texts() {
        let workers = workers(3);
        let (replica, follower) = train_followed(&workers, &endless(&toml));
        let copy = follower.finish(replica.position(), &AtomicBool::new(false)).unwrap();
        let job = JobSpec::parse("test.toml", &toml).unwrap();
        assert_equal(&job, &copy.replica, &replica);
        assert_eq!(copy.ledger.settled, None);
    }
}

#[test]
fn a_copy_that_cannot_get_where_it_should_is_given_up_at_once() {
    let toml = endless(&job_texts()[0]);
    for away in [-1, 1] {
        let workers = workers(3);
        let (replica, follower) = train_followed(&workers, &toml);
        let position = Position::at(replica.step.saturating_add_signed(away));
        let start = std::time::Instant::now();
        assert!(follower.finish(position, &AtomicBool::new(false)).is_none());
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
}

#[test]
fn a_worker_that_finds_nobody_to_follow_is_ready_all_the_same() {
    let workers = workers(3);
    // The members have ended that generation.
    drop([workers[0].open_desk(&workers[..2], 0), workers[1].open_desk(&workers[..2], 1)]);
    let (told, ready) = std::sync::mpsc::channel();
    let follower = follow(&workers, 2, &job_texts()[0], move |ready| told.send(ready).unwrap());
    let ready = ready.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!(ready, Ready { job: JOB, generation: GENERATION, position: Position::default() });
    assert!(follower.finish(Position::at(3), &AtomicBool::new(false)).is_none());
}
