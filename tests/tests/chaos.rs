//! A short run of `make chaos`.

use lockstep_tests::chaos::schedule::Extent;
use lockstep_tests::chaos::workload::Workload;
use lockstep_tests::chaos::{Options, run};
use std::time::Duration;

#[test]
fn jobs_end_as_undisturbed_ones_whatever_befalls_their_processes() {
    let options = Options {
        seed: 4,
        extent: Extent::Events(24),
        mean: Duration::from_secs(2),
        workload: Workload::Small,
        hosts: true,
    };
    let account = run(&options, &|line| println!("{line}"));
    println!("{account}");
    assert!(account.is_good(), "the account above says what was wrong");
    // A run in which little happens would prove little.
    let done = account.done();
    assert!(done.len() >= 6, "{done:?}");
    assert!(account.figures.death_s.count >= 3, "{:?}", account.figures);
}
