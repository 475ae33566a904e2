//! Audits of made-up runs, whole and with every fault that the checker is there for.

use super::*;

const SAMPLES: u64 = 70;

/// Nine steps an epoch for a classifier, the last of six samples; of a GAN with two discriminator phases five.
fn job(task: &str) -> JobSpec {
    let networks = match task {
        "classify" => "[model]\nname = \"nin\"",
        _ => {
            "[generator]\nname = \"gan-generator\"\n[discriminator]\nname = \"gan-discriminator\"\n[gan]\ndiscriminator_steps = 2"
        }
    };
    let text = format!(
        "name = \"t\"\ntask = \"{task}\"\nseed = 5\nepochs = 2\nglobal_batch = 8\nlogical_shards = 4\n{networks}\n\
         [data]\ntrain = \"tiny/train\"\n[optimizer]\nname = \"sgd\"\nlr = 0.1\n"
    );
    JobSpec::parse("t.toml", &text).unwrap()
}

fn start(generation: u64, step: u64) -> AuditLine {
    let from = Position::at(step);
    let dataset = String::new();
    AuditLine::Start(AuditStart { generation: Generation(generation), from, audited: 0, dataset })
}

/// What lanes are given whose sampler is `sampler`.
fn given(job: &JobSpec, sampler: &Sampler, generation: u64, step: u64) -> AuditEntry {
    let phases = job.phase_minibatches();
    let per_step = phases.iter().max().unwrap() + 1;
    let steps = sampler.steps_per_epoch().div_ceil(per_step as u64);
    let (epoch, first) = ((step - 1) / steps, (step - 1) % steps * per_step as u64);
    let mut audit = StepAudit::default();
    let mut seen = Vec::new();
    for minibatch in phases {
        if sampler.batch_size(first + minibatch as u64) == 0 {
            continue;
        }
        let samples = |shard| sampler.shard_samples(epoch, first + minibatch as u64, LogicalShard(shard));
        audit.add_phase((0..4).map(|s| ShardSamples::of(&samples(s))), !seen.contains(&minibatch));
        seen.push(minibatch);
    }
    AuditEntry { generation: Generation(generation), step, epoch: epoch + 1, shards: audit.into_shards() }
}

fn sampler(seed: u64) -> Sampler {
    Sampler::new(seed, SAMPLES, 8, 4, true).unwrap()
}

fn entry(job: &JobSpec, generation: u64, step: u64) -> AuditLine {
    AuditLine::Entry(given(job, &sampler(5), generation, step))
}

fn entries(job: &JobSpec, generation: u64, steps: std::ops::RangeInclusive<u64>) -> Vec<AuditLine> {
    steps.map(|step| entry(job, generation, step)).collect()
}

fn text(lines: &[AuditLine]) -> String {
    lines.iter().map(AuditLine::to_json).collect()
}

/// The proof for a classifier's audit.
fn prove(lines: &[AuditLine]) -> Result<Proof, Violation> {
    check(&job("classify"), SAMPLES, text(lines).as_bytes())
}

/// The violation that a classifier's audit shows, which must say all of `parts`.
#[track_caller]
fn refuse(lines: &[AuditLine], parts: &[&str]) {
    let message = prove(lines).unwrap_err().to_string();
    assert!(parts.iter().all(|part| message.contains(part)), "{message:?} should say {parts:?}");
    assert_eq!(message.lines().count(), 1);
}

#[test]
fn an_undisturbed_run_is_proven() {
    for (task, steps) in [("classify", 18), ("gan", 10)] {
        let job = job(task);
        let lines = [vec![start(1, 0)], entries(&job, 1, 1..=steps)].concat();
        let proof = check(&job, SAMPLES, text(&lines).as_bytes()).unwrap();
        assert!(proof.is_complete(), "{proof:?}");
        let expected =
            Proof { steps, total_steps: steps, epochs: 2, samples: 140, generations: 1, undone: 0 };
        assert_eq!(proof, expected);
    }
}

#[test]
fn a_run_in_progress_is_proven_as_far_as_it_has_come() {
    let job = job("classify");
    let proof = prove(&[vec![start(1, 0)], entries(&job, 1, 1..=12)].concat()).unwrap();
    assert_eq!((proof.steps, proof.epochs, proof.samples, proof.is_complete()), (12, 1, 70 + 24, false));
    assert_eq!(prove(&[]).unwrap().steps, 0);
}

#[test]
fn steps_that_were_undone_and_done_again_count_once() {
    let job = job("classify");
    let lines = [
        vec![start(1, 0)],
        entries(&job, 1, 1..=7),
        vec![start(2, 5)],
        entries(&job, 2, 6..=9),
        vec![start(3, 0)],
        entries(&job, 3, 1..=18),
    ];
    let proof = prove(&lines.concat()).unwrap();
    assert_eq!((proof.steps, proof.samples, proof.generations, proof.undone), (18, 140, 3, 2 + 9));
}

/// Its rank 0 died with reports that it had not made; the members of the next generation make them.
#[test]
fn what_a_generation_left_unreported_is_told_by_the_next() {
    let job = job("classify");
    let whole = [
        vec![start(1, 0)],
        entries(&job, 1, 1..=3),
        vec![start(2, 5)],
        entries(&job, 1, 4..=5),
        entries(&job, 2, 6..=18),
    ];
    assert!(prove(&whole.concat()).unwrap().is_complete());
    let lost = [vec![start(1, 0)], entries(&job, 1, 1..=3), vec![start(2, 5)], entries(&job, 2, 6..=18)];
    refuse(&lost.concat(), &["step 4 is missing", "line 6", "step 6"]);
    let claimed = [vec![start(1, 0)], entries(&job, 1, 1..=3), vec![start(2, 5)], entries(&job, 2, 4..=5)];
    refuse(&claimed.concat(), &["step 4", "g2 starts from step 5"]);
}

#[test]
fn a_missing_step_is_named() {
    let mut lines = [vec![start(1, 0)], entries(&job("classify"), 1, 1..=18)].concat();
    lines.remove(7);
    refuse(&lines, &["step 7 is missing", "step 8"]);
}

#[test]
fn a_step_that_counts_twice_is_named() {
    let job = job("classify");
    let mut lines = [vec![start(1, 0)], entries(&job, 1, 1..=9)].concat();
    lines.insert(6, lines[5].clone());
    refuse(&lines, &["step 5 counted twice", "line 7", "g1"]);
    let again = [vec![start(1, 0)], entries(&job, 1, 1..=5), vec![start(2, 5)], entries(&job, 2, 5..=9)];
    refuse(&again.concat(), &["step 5 counted twice", "g2"]);
}

#[test]
fn a_step_of_a_dead_generation_beyond_the_agreed_position_is_named() {
    let job = job("classify");
    let zombie = [vec![start(1, 0)], entries(&job, 1, 1..=5), vec![start(2, 5)], entries(&job, 1, 6..=6)];
    refuse(&zombie.concat(), &["step 6 was committed by g1", "g2 starts from step 5"]);
    refuse(&entries(&job, 1, 1..=1), &["step 1 was committed by g1, which never started"]);
    refuse(&[start(2, 0), start(2, 0)], &["g2 starts after g2"]);
}

#[test]
fn a_shard_that_was_lost_or_given_twice_is_named() {
    let job = job("classify");
    let damaged = |change: &dyn Fn(&mut Vec<ShardSamples>)| {
        let mut lines = [vec![start(1, 0)], entries(&job, 1, 1..=4)].concat();
        let AuditLine::Entry(entry) = &mut lines[3] else { panic!("an entry") };
        change(&mut entry.shards);
        lines
    };
    refuse(&damaged(&|s| s[2] = ShardSamples::default()), &["step 3, shard 2: 0 samples", "instead of 2"]);
    refuse(&damaged(&|s| s[1] = s[0]), &["step 3, shard 1: other samples"]);
    refuse(&damaged(&|s| s[3].hash ^= 1), &["step 3, shard 3: other samples"]);
    refuse(&damaged(&|s| s.truncate(3)), &["step 3 has 3 shards instead of 4"]);
}

/// The sampler of the workers, and not the checker's, is off by one.
#[test]
fn a_sampler_shifted_by_one_is_named() {
    let job = job("classify");
    let mut shifted = given(&job, &sampler(5), 1, 3);
    shifted.step = 2;
    let lines = [vec![start(1, 0)], entries(&job, 1, 1..=1), vec![AuditLine::Entry(shifted)]].concat();
    refuse(&lines, &["step 2, shard 0: other samples", "epoch 1"]);
    let one_on = |shard: u32| {
        let order: Vec<u64> = (0..4).flat_map(|s| sampler(5).shard_samples(0, 0, LogicalShard(s))).collect();
        let next = sampler(5).shard_samples(0, 1, LogicalShard(0));
        let order = [order, next].concat();
        ShardSamples::of(&order[2 * shard as usize + 1..][..2])
    };
    let mut audit = StepAudit::default();
    audit.add_phase((0..4).map(one_on), true);
    let entry = AuditEntry { generation: Generation(1), step: 1, epoch: 1, shards: audit.into_shards() };
    refuse(&[start(1, 0), AuditLine::Entry(entry)], &["step 1, shard 0: other samples"]);
    let reseeded = AuditLine::Entry(given(&job, &sampler(6), 1, 1));
    refuse(&[start(1, 0), reseeded], &["step 1, shard 0"]);
}

#[test]
fn a_gans_generator_that_saw_another_minibatch_is_named() {
    let job = job("gan");
    let mut audit = StepAudit::default();
    for (place, first) in [(0, true), (1, true), (1, false)] {
        let shards = (0..4).map(|s| ShardSamples::of(&sampler(5).shard_samples(0, place, LogicalShard(s))));
        audit.add_phase(shards, first);
    }
    let entry = AuditEntry { generation: Generation(1), step: 1, epoch: 1, shards: audit.into_shards() };
    let lines = [start(1, 0), AuditLine::Entry(entry)];
    let message = check(&job, SAMPLES, text(&lines).as_bytes()).unwrap_err().to_string();
    assert!(message.starts_with("step 1, shard 0: other samples"), "{message}");
}

#[test]
fn a_truncated_last_line_does_not_count_and_any_other_is_named() {
    let job = job("classify");
    let whole = text(&[vec![start(1, 0)], entries(&job, 1, 1..=3)].concat());
    for missing in 1..100 {
        let proof = check(&job, SAMPLES, &whole.as_bytes()[..whole.len() - missing]).unwrap();
        assert_eq!(proof.steps, 2, "{missing} bytes missing");
    }
    let mut lines: Vec<_> = whole.lines().collect();
    lines[2] = &lines[2][..lines[2].len() - 9];
    let message = check(&job, SAMPLES, (lines.join("\n") + "\n").as_bytes()).unwrap_err().to_string();
    assert!(message.starts_with("line 3 is damaged"), "{message}");
}

#[test]
fn a_step_beyond_the_last_or_in_another_epoch_is_named() {
    let job = job("classify");
    let lines = [vec![start(1, 0)], entries(&job, 1, 1..=19)].concat();
    refuse(&lines, &["step 19 of a job of 18 steps"]);
    let AuditLine::Entry(entry) = entry(&job, 1, 1) else { panic!("an entry") };
    refuse(
        &[start(1, 0), AuditLine::Entry(AuditEntry { epoch: 2, ..entry })],
        &["of epoch 2; it is of epoch 1"],
    );
}
