//! The store: full, with entries that cannot be read, and with many of them.

use crate::cluster::{Cluster, JOB, PATIENCE};
use lockstep_common::ids::JobId;
use lockstep_common::net::NetError;
use lockstep_common::wire::{FromWorker, JobState, Outcome, Request, ToWorker};
use lockstep_coordinator::client::ClientError;
use lockstep_coordinator::data_dir::DataDir;
use lockstep_coordinator::service::Scope;
use lockstep_coordinator::store::Store;
use lockstep_core::JobRecord;
use parking_lot::Mutex;
use redb::{Database, ReadableDatabase, TableDefinition};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

const JOBS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("jobs");

/// A small file system in memory.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None`, with the reason printed, where it cannot be had.
    #[allow(clippy::print_stdout, reason = "a test that is skipped says why")]
    fn mount(path: &Path) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(path).output();
        let problem = match mount {
            Ok(output) if output.status.success() => return Some(Self(path.to_owned())),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(e) => e.to_string(),
        };
        println!("skipped: a small tmpfs cannot be mounted here: {problem}");
        None
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    fn fill(&self) {
        let mut file = File::create(self.filler()).unwrap();
        for size in [1 << 16, 1 << 12, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
    }

    fn free(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// What the process logs from now on.
fn captured_log() -> Arc<Mutex<Vec<u8>>> {
    struct Writer(Arc<Mutex<Vec<u8>>>);
    impl Write for Writer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Arc::new(Mutex::default());
    let (writer, of_store) = (log.clone(), tracing_subscriber::EnvFilter::new("lockstep_coordinator=info"));
    let make = move || Writer(writer.clone());
    tracing_subscriber::fmt().with_env_filter(of_store).with_ansi(false).with_writer(make).init();
    log
}

#[tokio::test]
async fn a_full_disk_holds_everything_up_until_it_has_room_again() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(&folder.path().join("data")) else { return };
    let log = captured_log();
    let cluster = Cluster::start_in(folder).await;
    let job = cluster.submit(JOB).await;
    let mut worker = cluster.worker().await;
    let generation = worker.start().await.generation;

    disk.fill();
    let large = format!("{JOB}# {}\n", "x".repeat(1 << 19));
    let request = Request::Submit { file: "large.toml".to_owned(), toml: large };
    match cluster.operator().await.ask(&request).await.unwrap_err() {
        ClientError::Net(NetError::Refused { reason, message }) => {
            assert_eq!(reason, "store");
            assert!(message.contains("see that its disk has space"), "{message}");
        }
        other => panic!("{other}"),
    }
    cluster.wait_for_http("/readyz", 503).await;
    let values = [("test_top1".to_owned(), 0.5)].into();
    worker.say(&FromWorker::Metrics { job, generation, step: 4, epoch: 1, values }).await;
    cluster.wait(job, |j| j.metrics.contains_key("test_top1")).await;
    assert_eq!(worker.heard(Duration::ZERO).await, None, "nothing of this is durable yet");

    disk.free();
    assert_eq!(worker.heard(PATIENCE).await, Some(ToWorker::Heard { reports: 1 }));
    cluster.wait_for_http("/readyz", 200).await;
    let outcome = Outcome::Finished {
        weights_digest: "abc".to_owned(),
        step: 4,
        epoch: 1,
        metrics: [("test_top1".to_owned(), 0.5)].into(),
    };
    worker.say(&FromWorker::Ended { job, generation, outcome, held: None }).await;
    cluster.wait(job, |j| j.state == JobState::Finished).await;
    let text = String::from_utf8(log.lock().clone()).unwrap();
    for line in ["nothing new starts until it can be written", "the store can be written again"] {
        assert_eq!(text.matches(line).count(), 1, "`{line}` in\n{text}");
    }

    let cluster = cluster.restart().await;
    assert_eq!(cluster.status(job).await.state, JobState::Finished);
    assert_eq!(cluster.status(JobId(2)).await.name, "tiny", "what was asked was done in the end");
    cluster.service.stop().await;
}

/// Puts entries under the numbers of jobs.
fn put_raw(dir: &DataDir, entries: impl IntoIterator<Item = (u64, Vec<u8>)>) {
    let database = Database::create(dir.store()).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut table = transaction.open_table(JOBS).unwrap();
        for (number, value) in entries {
            table.insert(number, value.as_slice()).unwrap();
        }
    }
    transaction.commit().unwrap();
}

#[tokio::test]
async fn an_unreadable_job_is_left_out_and_kept() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(JOB).await;
    let unreadable = br#"{"id": 2, "metrics": {"loss": null}}"#;
    let spoil = |dir: &DataDir| put_raw(dir, [(2, unreadable.to_vec())]);
    let cluster = cluster.restart_with(Scope::All, spoil).await;
    let ids: Vec<_> = cluster.operator().await.jobs().await.unwrap().iter().map(|j| j.id).collect();
    assert_eq!(ids, [job]);
    assert_eq!(cluster.submit(JOB).await, JobId(3), "its number stays taken");

    cluster.service.stop().await;
    let database = Database::create(cluster.dir.store()).unwrap();
    let table = database.begin_read().unwrap().open_table(JOBS).unwrap();
    assert_eq!(table.get(2).unwrap().unwrap().value(), unreadable);
}

#[tokio::test]
async fn more_jobs_than_fit_a_message_are_listed_all_the_same() {
    const COUNT: u64 = 2000;
    let cluster = Cluster::start().await;
    cluster.submit(JOB).await;
    let multiply = |dir: &DataDir| {
        let first = Store::open(&dir.store()).unwrap().jobs().unwrap().records.remove(0);
        let ended = |n| JobRecord {
            id: JobId(n),
            state: JobState::Failed,
            reason: "long ".repeat(2000),
            ..first.clone()
        };
        put_raw(dir, (1..=COUNT).map(|n| (n, serde_json::to_vec(&ended(n)).unwrap())));
    };
    let cluster = cluster.restart_with(Scope::All, multiply).await;
    let jobs = cluster.operator().await.jobs().await.unwrap();
    assert!(jobs.iter().map(|j| j.id.0).eq(1..=COUNT), "{} jobs", jobs.len());
    let bytes: usize = jobs.iter().map(|j| j.reason.len()).sum();
    assert!(bytes > lockstep_common::wire::MAX_FRAME_BYTES && jobs[0].reason.ends_with('…'), "{bytes}");
}
