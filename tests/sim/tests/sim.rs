//! Many seeds of the simulated cluster, one seed twice, and clusters that are broken on purpose.

use lockstep_sim::{Breakage, Plan, first_failure, run, run_traced, try_seeds};

/// The last things that happened, and how to see all of them.
fn explain(seed: u64) -> String {
    let report = run_traced(Plan { seed, breakage: None });
    let tail = &report.lines[report.lines.len().saturating_sub(40)..];
    format!(
        "seed {seed}: {}\n{}\nall of it: cargo run --release -p lockstep-sim -- --trace {seed}",
        report.breach.unwrap_or_default(),
        tail.join("\n")
    )
}

#[test]
fn whatever_happens_every_job_finishes_as_if_nothing_had() {
    let verdict = try_seeds(0..2_000);
    let first = verdict.failures.first().map(|report| explain(report.plan.seed));
    assert!(
        first.is_none(),
        "{} of {} seeds failed; {}",
        verdict.failures.len(),
        verdict.seeds,
        first.unwrap()
    );
    assert!(
        verdict.recomputed > 0 && verdict.generations > 2 * verdict.seeds,
        "too little went wrong: {verdict:?}"
    );
}

#[test]
fn the_same_seed_is_the_same_day() {
    for seed in 0..20 {
        let plan = Plan { seed, breakage: None };
        let (once, again) = (run(plan), run_traced(plan));
        assert_eq!((once.trace_hash, once.events), (again.trace_hash, again.events), "seed {seed}");
    }
    assert_ne!(
        run(Plan { seed: 1, breakage: None }).trace_hash,
        run(Plan { seed: 2, breakage: None }).trace_hash
    );
}

/// Something in the first 20,000 seeds shows that this is broken, and says so in these words.
fn shows(breakage: Breakage, words: &str) {
    let report = first_failure(0..20_000, breakage);
    let breach = report.and_then(|report| report.breach).unwrap_or_default();
    assert!(breach.contains(words), "{breakage:?} shows as `{breach}`");
}

#[test]
fn workers_that_ignore_generations_are_found_out() {
    shows(Breakage::NoFence, "fence:");
}

#[test]
fn one_that_slept_through_its_lease_is_found_out() {
    shows(Breakage::NoLeaseAtCommit, "fence:");
}

#[test]
fn healing_from_the_wrong_replica_is_found_out() {
    shows(Breakage::WrongReplica, "exact:");
}

#[test]
fn a_sampler_that_is_one_step_ahead_is_found_out() {
    shows(Breakage::ShiftedSampler, "every sample once:");
}
