//! A slow worker is named in status and metrics and given fewer logical shards; the result does not change.

use lockstep_tests::cluster::Cluster;
use lockstep_tests::job::Job;
use lockstep_tests::place::Place;
use lockstep_tests::process::signal_pid;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Takes most of a process's time away: it runs for a fifth of it. Ends when dropped.
struct Brake {
    released: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Brake {
    fn on(pid: u32) -> Self {
        let released = Arc::new(AtomicBool::new(false));
        let wanted = released.clone();
        let thread = std::thread::spawn(move || {
            while !wanted.load(Ordering::Relaxed) {
                signal_pid(pid, libc::SIGSTOP);
                std::thread::sleep(Duration::from_millis(20));
                signal_pid(pid, libc::SIGCONT);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self { released, thread: Some(thread) }
    }
}

impl Drop for Brake {
    fn drop(&mut self) {
        self.released.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the brake has no reason to fail");
        }
    }
}

#[test]
fn a_straggler_is_named_and_gets_fewer_shards_and_the_result_stays() {
    let job = Job {
        steps: 3000,
        global_batch: 64,
        logical_shards: 8,
        width: 16,
        every_steps: 0,
        min_workers: 2,
        max_workers: 2,
        ..Job::default()
    };
    let mut cluster = Cluster::start(Place::new());
    let _fast = cluster.worker();
    let slow = cluster.worker();
    let id = cluster.submit(&job);
    cluster.until_step(&id, 1);
    let brake = Brake::on(slow.id());
    // It gets fewer shards as soon as it is named, and with those a shard takes it as long as before.
    let status = cluster.until_status(&id, "placed anew, the slow one named again", |status| {
        status.generation == 2 && !status.stragglers.is_empty()
    });
    let times = cluster.scrape().value("lockstep_straggler_ratio", r#"worker="w2""#);
    drop(brake);
    let [straggler] = &status.stragglers[..] else { panic!("{status:?}") };
    assert_eq!((&straggler["worker"], &straggler["rank"]), (&"w2".into(), &1.into()));
    assert!(times > 1.5 && straggler["times"].as_f64() > Some(1.5), "{times} {straggler}");
    let log = cluster.place.log(&id);
    assert!(log.contains("(w2 on ") && log.contains("is a straggler: a shard takes it"), "{log}");
    assert!(log.contains("logical shards instead of 4"), "{log}");
    let finished = cluster.until_finished(&id);
    assert_eq!(finished.digest(), Place::new().run(Job { min_workers: 1, ..job }, 1).digest());
    cluster.place.prove(&id);
}
