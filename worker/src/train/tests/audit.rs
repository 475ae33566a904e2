//! What the lanes are given is what the audit's checker works out from the job file, and anything else is noticed.

use super::recovery::{fresh, group, until_a_death};
use super::*;
use lockstep_common::audit::{self, AuditEntry, AuditLine, AuditStart, Proof, ShardSamples, Violation};
use lockstep_common::ids::Generation;

const SAMPLES: u64 = 70;

/// What rank 0 would report of each step from its replica's on.
fn shards<T: Number>(bench: &mut Bench<T>) -> Vec<(u64, Vec<ShardSamples>)> {
    let mut steps = Vec::new();
    while bench.trainer.replica.step < bench.total {
        let done = bench.try_step(Wishes::default()).unwrap();
        steps.push((bench.trainer.replica.step, done.shards));
    }
    steps
}

fn check(job: &JobSpec, from: u64, steps: &[(u64, Vec<ShardSamples>)]) -> Result<Proof, Violation> {
    let per_step = TaskPlan::new(job).minibatches as u64;
    let per_epoch = SAMPLES.div_ceil(u64::from(job.global_batch)).div_ceil(per_step);
    let (generation, dataset) = (Generation(1), String::new());
    let start = AuditStart { generation, from: Position::at(from), audited: 0, dataset };
    let entry = |(step, shards): &(u64, Vec<ShardSamples>)| {
        let (step, epoch, shards) = (*step, (*step - 1) / per_epoch + 1, shards.clone());
        AuditLine::Entry(AuditEntry { generation, step, epoch, shards })
    };
    let lines = std::iter::once(AuditLine::Start(start)).chain(steps.iter().map(entry));
    audit::check(job, SAMPLES, lines.map(|line| line.to_json()).collect::<String>().as_bytes())
}

fn jobs() -> [JobSpec; 2] {
    [job(&classifier("sync"), ""), job(GAN, "")]
}

#[test]
fn every_sample_is_proven_to_count_once_on_any_number_of_workers() {
    for job in jobs() {
        for ranks in [1, 3] {
            for steps in group::<f32, _>(&job, fresh::<f32>(&job, ranks), |_, mut bench| shards(&mut bench)) {
                let proof = check(&job, 0, &steps).unwrap();
                assert!(proof.is_complete() && proof.samples == 2 * SAMPLES, "{proof:?}");
            }
        }
    }
}

#[test]
fn a_rank_whose_loader_is_a_step_ahead_is_named_by_step_and_shard() {
    let job = job(&classifier("sync"), "");
    let ahead = |only: Option<u32>| {
        let all = group::<f32, _>(&job, fresh::<f32>(&job, 3), |rank, mut bench| {
            if only.is_none_or(|only| only == rank) {
                bench.loader.next(&AtomicBool::new(false)).unwrap();
            }
            let done = bench.try_step(Wishes::default()).unwrap();
            check(&job, 0, &[(1, done.shards)]).unwrap_err().to_string()
        });
        assert!(all.iter().all(|other| *other == all[0]), "{all:?}");
        all[0].clone()
    };
    assert!(ahead(None).starts_with("step 1, shard 0: other samples"));
    // Of four shards the first rank has two.
    assert!(ahead(Some(2)).starts_with("step 1, shard 3: other samples"));
}

#[test]
fn a_step_that_two_generations_did_together_is_audited_whole() {
    let job = job(GAN, "");
    let undisturbed = group::<f32, _>(&job, fresh::<f32>(&job, 3), |_, mut bench| shards(&mut bench));
    let (replicas, _) = until_a_death::<f32>(&job, 5, 2);
    assert_eq!(replicas[0].position(), Position { step: 5, phase: 2 });
    let resumed = group::<f32, _>(&job, replicas, |_, mut bench| shards(&mut bench));
    assert_eq!(resumed[0], undisturbed[0][5..]);
}
