//! Replicas that outlive their group: whatever happened to it, the run ends with the undisturbed run's bits.

use super::*;

/// A step's figures, or why it failed.
type Step = Result<BTreeMap<String, f64>, TrainError>;

/// Runs the ranks of one group, each from its replica on, and returns what `work` makes of each.
pub(crate) fn group<T: Number, R: Send>(
    job: &JobSpec,
    replicas: Vec<Replica>,
    work: impl Fn(u32, Bench<T>) -> R + Sync,
) -> Vec<R> {
    let (folder, store) = tiny();
    let placement = Placement::even(job.logical_shards, replicas.len() as u32);
    let groups = Group::in_process(&placement, job.reduction, Duration::from_secs(60)).unwrap();
    std::thread::scope(|scope| {
        let run = |(rank, (group, replica))| {
            let (work, store, folder) = (&work, &store, folder.path());
            scope.spawn(move || {
                let cache = ShardCache::new(&folder.join(format!("cache-{rank}")), 1 << 30).unwrap();
                let cache = Arc::new(cache.with_local([store.shards_dir().to_owned()]));
                work(rank, Bench::<T>::new(job, TaskPlan::new(job), group, store, &cache, 1, replica))
            })
        };
        let runs: Vec<_> = (0u32..).zip(groups.into_iter().zip(replicas)).map(run).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    })
}

pub(crate) fn fresh<T: Number>(job: &JobSpec, ranks: u32) -> Vec<Replica> {
    let plan = TaskPlan::new(job);
    (0..ranks).map(|_| Replica::new(&plan, T::KIND, Device::Cpu).unwrap()).collect()
}

/// Steps until the run ends or a step fails.
fn steps<T: Number>(bench: &mut Bench<T>) -> Vec<Step> {
    let mut steps = Vec::new();
    while bench.trainer.replica.step < bench.total && !matches!(steps.last(), Some(Err(_))) {
        steps.push(bench.try_step(Wishes::default()).map(|done| done.figures));
    }
    steps
}

/// Runs `job` with three ranks of which the last dies in `step`, after it has taken part in `phases` of it. Returns the
/// survivors' replicas and the steps' figures.
pub(crate) fn until_a_death<T: Number>(
    job: &JobSpec,
    step: u64,
    phases: usize,
) -> (Vec<Replica>, Vec<BTreeMap<String, f64>>) {
    let survivors = group::<T, _>(job, fresh::<T>(job, 3), |rank, mut bench| {
        if rank < 2 {
            let mut done = steps(&mut bench);
            let failed = done.pop().unwrap();
            assert!(matches!(failed, Err(TrainError::Collective(_))), "{failed:?}");
            let figures = done.into_iter().map(Result::unwrap).collect::<Vec<_>>();
            return Some((bench.trainer.into_replica(), figures));
        }
        while bench.trainer.replica.step < step {
            bench.step();
        }
        if phases > 0 {
            let mut plan = TaskPlan::new(job);
            plan.phases.truncate(phases);
            bench.trainer.plan = Arc::new(plan);
            bench.step();
        }
        let died = CollectiveError::Aborted("this rank was killed".to_owned());
        bench.trainer.group.abort(died);
        None
    });
    let (replicas, mut figures): (Vec<_>, Vec<_>) = survivors.into_iter().flatten().unzip();
    (replicas, figures.swap_remove(0))
}

/// Runs `job` to its end from `replicas`; the digest and the steps' figures, the same on all ranks.
pub(crate) fn to_the_end<T: Number>(
    job: &JobSpec,
    replicas: Vec<Replica>,
) -> (String, Vec<BTreeMap<String, f64>>) {
    let mut ends = group::<T, _>(job, replicas, |_, mut bench| {
        let figures = steps(&mut bench).into_iter().map(Result::unwrap).collect::<Vec<_>>();
        (bench.trainer.compare_replicas().unwrap(), figures)
    });
    let end = ends.swap_remove(0);
    assert!(ends.iter().all(|other| *other == end));
    end
}

/// The files of classifiers and a GAN, so that both optimizers, running statistics, clipping and several phases are there.
pub(crate) fn job_texts() -> Vec<String> {
    let sgd = "[discriminator.optimizer]\nname = \"sgd\"\nlr = 0.05\nmomentum = 0.9";
    let clip = "[clip]\nnorm = 0.5";
    vec![
        job_text(&format!("{}\n{clip}", classifier("sync")), ""),
        job_text(&classifier("local"), ""),
        job_text(&format!("{GAN}\n{sgd}"), ""),
    ]
}

pub(crate) fn jobs() -> Vec<JobSpec> {
    job_texts().iter().map(|text| JobSpec::parse("test.toml", text).unwrap()).collect()
}

#[test]
fn survivors_go_on_in_the_middle_of_a_step_with_the_same_bits_and_figures() {
    for job in jobs() {
        let (digest, undisturbed) = to_the_end::<f32>(&job, fresh::<f32>(&job, 3));
        for phases in 0..TaskPlan::new(&job).phases.len() {
            let (replicas, mut figures) = until_a_death::<f32>(&job, 5, phases);
            for replica in &replicas {
                assert!(replica.is_whole());
                assert_eq!(replica.position(), Position { step: 5, phase: phases as u16 }, "{}", job.name);
            }
            let (resumed, rest) = to_the_end::<f32>(&job, replicas);
            assert_eq!(resumed, digest, "{:?} after {phases} phases", job.task);
            figures.extend(rest);
            assert_eq!(figures, undisturbed, "{:?} after {phases} phases", job.task);
        }
    }
}

/// The negative control: applied phases must not be applied again.
#[test]
fn a_step_that_begins_anew_with_half_of_it_applied_ends_elsewhere() {
    let job = job(GAN, "");
    let (digest, _) = to_the_end::<f32>(&job, fresh::<f32>(&job, 3));
    let (mut replicas, _) = until_a_death::<f32>(&job, 5, 1);
    for replica in &mut replicas {
        let plan = TaskPlan::new(&job);
        let (weights, optimizer) = (replica.weights().unwrap(), replica.optimizer_state(&plan).unwrap());
        replica.restore(&plan, Position::at(5), &unpacked(&weights), &unpacked(&optimizer)).unwrap();
    }
    assert_ne!(to_the_end::<f32>(&job, replicas).0, digest);
}

#[test]
fn a_replica_in_which_an_update_failed_is_not_whole() {
    let job = job(&classifier("sync"), "");
    let mut replica = fresh::<f32>(&job, 1).remove(0);
    let update = PhaseUpdate {
        phase: 0,
        commits: true,
        network: 0,
        lr: 0.1,
        gradients: vec![("no.such.parameter".to_owned(), Tensor::from_slice(&[1f32]))],
        statistics: Vec::new(),
        figures: BTreeMap::new(),
    };
    assert!(replica.apply(update, &job.clip, true).is_err());
    assert!(!replica.is_whole());
    assert_eq!(replica.position(), Position::at(0));
}
