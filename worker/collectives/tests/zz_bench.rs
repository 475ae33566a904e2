#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod support;
use lockstep_collectives::*;
use lockstep_common::placement::Placement;
use std::time::{Duration, Instant};
use support::{cluster::{mesh, workers}, in_ranks};
#[test]
fn bench() {
    for ranks in [2] {
        for shards in [2] {
        let placement = Placement::even(shards, ranks);
        let workers = workers(ranks);
        let groups = mesh(&workers, &placement, Duration::from_secs(20));
        let local = Group::in_process(&placement, lockstep_common::job::Reduction::Exact, Duration::from_secs(20)).unwrap();
        for (name, groups) in [("quic", &groups), ("local", &local)] {
        for len in [1000usize, 250_000, 6_500_000] {
            let n = if len > 1_000_000 { 15 } else { 100 };
            let times = in_ranks(groups, |group| {
                let mut times = vec![];
                for step in 0..n {
                    let own = placement.range(group.rank()).len();
                    let leaves = vec![vec![1f32; len]; own];
                    let tag = Tag::new(step, len as u16, TagKind::Gradient);
                    group.barrier(Tag::new(step, len as u16, TagKind::Barrier)).unwrap().wait().unwrap();
                    let t = Instant::now();
                    group.all_reduce(tag, leaves, ReduceOp::Sum).unwrap().wait().unwrap();
                    times.push(t.elapsed());
                }
                times.sort();
                times
            });
            let t = &times[0];
            println!("{name} ranks {ranks} V {shards} len {len}: median {:?} min {:?} p90 {:?}", t[t.len()/2], t[0], t[t.len()*9/10]);
        }
        }
        let w = &groups[0];
        println!("{:?}", w.stats());
        }
    }
}
