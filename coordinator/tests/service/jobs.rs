//! A job's life, seen from workers and operators.

use crate::cluster::{Cluster, JOB, PATIENCE, Sent, checkpoint, part};
use lockstep_common::audit::{self, AuditLine, ShardSamples, StepAudit};
use lockstep_common::checkpoint::{MANIFEST_FILE, OPTIMIZER_FILE, WEIGHTS_FILE, encode_tensors};
use lockstep_common::digest::TensorBytes;
use lockstep_common::ids::{Generation, JobId, LogicalShard, Rank};
use lockstep_common::job::JobSpec;
use lockstep_common::net::{Exchange, NetError};
use lockstep_common::sampler::Sampler;
use lockstep_common::wire::{
    FileHead, FrameError, FromWorker, JobState, LogLine, NOT_STORED, Outcome, Request, Response, Resumption,
    Running, StepRecord, StopMode, ToWorker,
};
use lockstep_coordinator::data_dir::DataDir;
use lockstep_coordinator::service::{Scope, TakenUp};
use std::collections::BTreeMap;

fn steps(job: JobId, generation: Generation, range: std::ops::RangeInclusive<u64>) -> FromWorker {
    let record = |step| {
        let values = [("loss".to_owned(), 1.0 / step as f64)].into();
        let shards = shards_of(step);
        StepRecord {
            generation,
            step,
            epoch: step.div_ceil(3),
            total_steps: 4,
            samples: 8,
            seconds: 0.1,
            values,
            shards,
        }
    };
    FromWorker::Steps { job, generation, records: range.map(record).collect() }
}

/// What a step of `JOB` gives its shards: 20 samples, 8 a step.
fn shards_of(step: u64) -> Vec<ShardSamples> {
    let sampler = Sampler::new(1, 20, 8, 4, true).unwrap();
    let (epoch, step) = ((step - 1) / 3, (step - 1) % 3);
    let shard = |s| ShardSamples::of(&sampler.shard_samples(epoch, step, LogicalShard(s)));
    let mut audit = StepAudit::default();
    audit.add_phase((0..4).map(shard), true);
    audit.into_shards()
}

fn finished(job: JobId, generation: Generation) -> FromWorker {
    let metrics = [("test_top1".to_owned(), 0.9)].into();
    let outcome = Outcome::Finished { weights_digest: "abc".to_owned(), step: 4, epoch: 1, metrics };
    FromWorker::Ended { job, generation, outcome, held: None }
}

#[tokio::test]
async fn two_workers_drive_a_job_to_its_end() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(&(JOB.to_owned() + "[workers]\nmin = 2\n")).await;
    assert_eq!(cluster.status(job).await.reason, "needs 2 workers, 0 are free");
    let (mut a, mut b) = (cluster.worker().await, cluster.worker().await);
    let (first, second) = (a.start().await, b.start().await);
    assert_eq!((first.rank, second.rank), (Rank(0), Rank(1)));
    assert_eq!(first.peers, second.peers);
    assert_eq!(first.datasets[0].name, "tiny/train");
    assert_eq!(first.toml, JOB.to_owned() + "[workers]\nmin = 2\n");

    let generation = first.generation;
    a.say(&steps(job, generation, 1..=4)).await;
    let values = [("test_top1".to_owned(), 0.9)].into();
    a.say(&FromWorker::Metrics { job, generation, step: 4, epoch: 1, values }).await;
    a.say(&FromWorker::Log { job, generation, line: "hello".to_owned() }).await;
    let (whole, rest) = (checkpoint(job, 4), part(job, 4, &[], &[]).other());
    let (one, other) = tokio::join!(a.put(job, generation, 4, &whole), b.put(job, generation, 4, &rest));
    assert_eq!((one.unwrap(), other.unwrap()), (Response::Done, Response::Done));
    a.say(&finished(job, generation)).await;
    b.say(&finished(job, generation)).await;
    let status = cluster.wait(job, |j| j.state.is_final()).await;
    assert_eq!(status.state, JobState::Finished, "{}", status.reason);
    assert_eq!(status.weights_digest.as_deref(), Some("abc"));
    assert_eq!((status.step, status.total_steps, status.metrics["test_top1"]), (4, 4, 0.9));
    let folder = status.checkpoint.unwrap();
    for file in [MANIFEST_FILE, WEIGHTS_FILE, OPTIMIZER_FILE] {
        assert!(std::path::Path::new(&folder).join(file).is_file(), "{file}");
    }

    let metrics = std::fs::read_to_string(cluster.dir.job(job).metrics()).unwrap();
    let lines: Vec<serde_json::Value> = metrics.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 5);
    assert_eq!(
        (&lines[1]["step"], &lines[1]["generation"], &lines[1]["loss"]),
        (&2.into(), &1.into(), &0.5.into())
    );
    assert_eq!(lines[4]["test_top1"], 0.9);
    let log = std::fs::read_to_string(cluster.dir.job(job).log()).unwrap();
    assert!(log.contains(": hello\n") && log.contains("g1 starts from the initial weights"), "{log}");
    for line in [
        "lockstep_steps_total{job=\"j1\"} 4",
        "lockstep_samples_total{job=\"j1\"} 32",
        "lockstep_loss{job=\"j1\"} 0.25",
        "lockstep_generation{job=\"j1\"} 1",
        "lockstep_jobs{state=\"finished\"} 1",
        "lockstep_workers{state=\"idle\"} 2",
        "lockstep_checkpoint_seconds_count 1",
    ] {
        cluster.wait_for_metric(line).await;
    }
    assert!(cluster.http("/api/jobs").await.contains("\"weights_digest\":\"abc\""));
    assert!(cluster.http("/readyz").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn the_next_generation_resumes_from_the_newest_good_checkpoint() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(JOB).await;
    let mut worker = cluster.worker().await;
    let generation = worker.start().await.generation;
    for step in [1, 2] {
        worker.put(job, generation, step, &checkpoint(job, step)).await.unwrap();
    }
    let newest = cluster.dir.job(job).checkpoints().join("step-000000000002").join(WEIGHTS_FILE);
    let mut bytes = std::fs::read(&newest).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&newest, bytes).unwrap();

    let outcome = Outcome::Lost { error: "step 3: peer gone".to_owned(), culprit: None };
    worker.say(&FromWorker::Ended { job, generation, outcome, held: None }).await;
    let again = worker.start().await;
    assert_eq!(again.generation, Generation(generation.0 + 1));
    assert_eq!(again.resume, Resumption::Checkpoint { step: 1 });
    let log = std::fs::read_to_string(cluster.dir.job(job).log()).unwrap();
    assert!(log.contains("warning: checkpoint of step 2 refused") && log.contains(WEIGHTS_FILE), "{log}");

    let get = |generation, step| Request::GetCheckpoint { job, generation, step };
    let files = worker.fetch(&get(again.generation, 1)).await.unwrap();
    let names: Vec<_> = files.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, [WEIGHTS_FILE, OPTIMIZER_FILE, MANIFEST_FILE]);
    let error = worker.fetch(&get(again.generation, 2)).await.unwrap_err().to_string();
    assert!(error.contains(WEIGHTS_FILE), "{error}");
    assert!(worker.fetch(&get(generation, 1)).await.unwrap_err().to_string().contains("no part in g1"));
}

#[tokio::test]
async fn a_checkpoint_of_an_old_generation_or_with_other_bytes_is_refused() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(JOB).await;
    let mut worker = cluster.worker().await;
    let generation = worker.start().await.generation;
    let error = worker.put(job, Generation(9), 1, &checkpoint(job, 1)).await.unwrap_err().to_string();
    assert!(error.contains("no part in g9 of j1"), "{error}");

    let mut flipped = checkpoint(job, 1);
    *flipped.files[0].2.last_mut().unwrap() ^= 1;
    let error = worker.put(job, generation, 1, &flipped).await.unwrap_err().to_string();
    assert!(error.contains(WEIGHTS_FILE), "{error}");
    let mut truncated = checkpoint(job, 1);
    truncated.files[1].2.pop();
    assert!(
        worker.put(job, generation, 1, &truncated).await.unwrap_err().to_string().contains(OPTIMIZER_FILE)
    );
    assert!(
        worker.put(job, generation, 2, &checkpoint(job, 1)).await.is_err(),
        "it says that it is of another step"
    );
    let others = checkpoint(JobId(2), 1);
    assert!(worker.put(job, generation, 1, &others).await.is_err(), "it says that it is of another job");
    let other = Sent { digest: "0".repeat(64), ..checkpoint(job, 1) };
    let error = worker.put(job, generation, 1, &other).await.unwrap_err().to_string();
    assert!(error.contains("the digest of its weights"), "{error}");
    let error = worker.put(job, generation, 1, &checkpoint(job, 1).other()).await.unwrap_err().to_string();
    assert!(error.contains("where the job was"), "{error}");
    assert_eq!(cluster.dir.job(job).checkpoint_store().unwrap().list().unwrap(), []);
    assert_eq!(cluster.status(job).await.state, JobState::Running, "the job goes on");
}

fn tensor(name: &str) -> TensorBytes<'_> {
    let bytes = name.as_bytes().to_vec();
    TensorBytes {
        name: name.into(),
        dtype: "U8".into(),
        shape: vec![bytes.len()].into(),
        bytes: bytes.into(),
    }
}

#[tokio::test]
async fn the_parts_of_all_ranks_become_one_checkpoint() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(&(JOB.to_owned() + "[workers]\nmin = 2\n")).await;
    let (mut a, mut b) = (cluster.worker().await, cluster.worker().await);
    let generation = a.start().await.generation;
    b.start().await;
    let all = [tensor("conv"), tensor("fc")];
    let first = part(job, 3, &all, &all[1..]);
    let second = part(job, 3, &all, &all[..1]).other();
    let (one, other) = tokio::join!(a.put(job, generation, 3, &first), b.put(job, generation, 3, &second));
    assert_eq!((one.unwrap(), other.unwrap()), (Response::Done, Response::Done));
    let files = cluster.dir.job(job).checkpoint_store().unwrap().load(3).unwrap();
    assert_eq!(files.file(WEIGHTS_FILE).unwrap(), encode_tensors(all.clone()).unwrap());
    assert_eq!(files.manifest.weights_digest, first.digest);
    // One whose connection broke before it heard of that sends its part again.
    assert_eq!(b.put(job, generation, 3, &second).await.unwrap(), Response::Done);

    let twice = part(job, 4, &all, &all);
    let again = twice.clone().other();
    let (one, other) = tokio::join!(a.put(job, generation, 4, &twice), b.put(job, generation, 4, &again));
    for error in [one.unwrap_err(), other.unwrap_err()] {
        assert!(error.to_string().contains("two tensors named `conv`"), "{error}");
    }
}

#[tokio::test]
async fn a_checkpoint_of_which_a_part_cannot_come_any_more_is_refused() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(&(JOB.to_owned() + "[workers]\nmin = 2\n")).await;
    let (mut a, mut b) = (cluster.worker().await, cluster.worker().await);
    let generation = a.start().await.generation;
    b.start().await;
    let outcome = Outcome::Lost { error: "x".to_owned(), culprit: None };
    let lost = FromWorker::Ended { job, generation, outcome, held: None };
    let sent = checkpoint(job, 3);
    let (put, ()) = tokio::join!(a.put(job, generation, 3, &sent), b.say(&lost));
    let error = put.unwrap_err().to_string();
    assert!(error.contains("is not stored: a rank is gone"), "{error}");
    assert_eq!(cluster.dir.job(job).checkpoint_store().unwrap().list().unwrap(), []);
}

/// Only the job's log said so, a line for each rank of each checkpoint.
#[tokio::test]
async fn checkpoints_that_the_disk_does_not_take_are_in_the_status_until_one_is_stored() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(JOB).await;
    let mut worker = cluster.worker().await;
    let generation = worker.start().await.generation;
    worker.put(job, generation, 1, &checkpoint(job, 1)).await.unwrap();
    let (folder, aside) = (cluster.dir.job(job).checkpoints(), cluster.folder.path().join("aside"));
    std::fs::rename(&folder, &aside).unwrap();
    std::fs::write(&folder, "a file where the folder should be").unwrap();
    for step in [2, 3, 3] {
        let refused = worker.put(job, generation, step, &checkpoint(job, step)).await.unwrap_err();
        assert!(matches!(&refused, NetError::Refused { reason, .. } if reason == NOT_STORED), "{refused:?}");
        assert!(refused.to_string().contains(&*folder.to_string_lossy()), "{refused}");
    }
    let status =
        cluster.wait(job, |j| j.checkpoint_failure.as_ref().is_some_and(|f| f.checkpoints == 2)).await;
    let failure = status.checkpoint_failure.unwrap();
    assert_eq!((failure.first_step, failure.step, failure.stored), (2, 3, Some(1)));
    assert!(failure.error.contains(&*folder.to_string_lossy()), "{failure:?}");
    assert_eq!(status.state, JobState::Running);
    cluster.wait_for_metric("lockstep_checkpoints_unstored{job=\"j1\"} 2").await;

    std::fs::remove_file(&folder).unwrap();
    std::fs::rename(&aside, &folder).unwrap();
    worker.put(job, generation, 4, &checkpoint(job, 4)).await.unwrap();
    cluster.wait(job, |j| j.checkpoint_failure.is_none()).await;
    cluster.wait_for_metric("lockstep_checkpoints_unstored{job=\"j1\"} 0").await;
    let log = std::fs::read_to_string(cluster.dir.job(job).log()).unwrap();
    let told: Vec<_> = log.lines().filter(|line| line.contains("could not be stored")).collect();
    assert_eq!(told.len(), 2, "{log}");
    assert!(told[0].contains("the checkpoint of step 2 could not be stored: "), "{log}");
    assert!(told[1].contains("step 4 is stored; before it, 2 from step 2 on could not be stored: "), "{log}");
}

#[tokio::test]
async fn pause_cancel_and_logs_follow_a_job_to_its_end() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(JOB).await;
    let mut worker = cluster.worker().await;
    let generation = worker.start().await.generation;
    cluster.ask(&Request::Pause { job }).await;
    assert_eq!(worker.order().await, ToWorker::Stop { job, generation, mode: StopMode::Checkpoint });
    worker.put(job, generation, 2, &checkpoint(job, 2)).await.unwrap();
    worker
        .say(&FromWorker::Ended { job, generation, outcome: Outcome::Stopped { step: 2 }, held: None })
        .await;
    cluster.wait(job, |j| j.state == JobState::Paused).await;

    let operator = cluster.operator().await;
    let mut followed = operator.open(&Request::Logs { job, follow: true, from: 1 }).await.unwrap();
    let first = followed.answer().await.unwrap();
    assert!(matches!(&first, Response::Lines(lines) if lines[0].number == 1), "{first:?}");
    cluster.ask(&Request::Resume { job }).await;
    assert_eq!(worker.start().await.resume, Resumption::Checkpoint { step: 2 });
    cluster.ask(&Request::Cancel { job }).await;
    let generation = Generation(2);
    assert_eq!(worker.order().await, ToWorker::Stop { job, generation, mode: StopMode::Abort });
    worker
        .say(&FromWorker::Ended { job, generation, outcome: Outcome::Stopped { step: 2 }, held: None })
        .await;
    let mut last: Option<LogLine> = None;
    loop {
        match followed.next_answer().await {
            Ok(Response::Lines(lines)) => last = lines.last().cloned(),
            Err(NetError::Frame(FrameError::Closed)) => break,
            other => panic!("{other:?}"),
        }
    }
    let last = last.unwrap().text;
    assert!(last.contains("g2 is over: cancelled"), "{last}");
}

#[tokio::test]
async fn artifacts_land_in_their_folder_and_nowhere_else() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(JOB).await;
    let mut worker = cluster.worker().await;
    let generation = worker.start().await.generation;
    for (name, good) in [("grid-1.png", true), ("../escaped.png", false)] {
        let file = FileHead { name: name.to_owned(), bytes: 3 };
        let request = Request::PutArtifact { job, generation, file };
        let mut exchange = Exchange::open(&worker.connection, &request).await.unwrap();
        let _ = exchange.send.write_all(b"png").await;
        assert_eq!(exchange.answer().await.is_ok(), good, "{name}");
    }
    let folder = cluster.dir.job(job).artifacts();
    assert_eq!(std::fs::read(folder.join("grid-1.png")).unwrap(), b"png");
    assert!(!cluster.dir.job(job).root().join("escaped.png").exists());
}

#[tokio::test]
async fn a_bad_job_file_is_refused_with_file_line_and_nearest_name() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator().await;
    let line_of = |toml: &str, what: &str| toml.lines().position(|l| l.contains(what)).unwrap() + 1;
    for (good, bad, part) in [
        ("tiny/train", "tiny/trian", "unknown dataset `tiny/trian`; did you mean `tiny/train`?"),
        ("steps = 4", "stesp = 4", "unknown field `stesp`, expected"),
        (
            "classes = 10",
            "classes = 9",
            "`classes` is 9 and dataset `tiny/train` has 10; make it at least 10",
        ),
        ("name = \"nin\"", "name = \"nin\"\nin_channels = 3", "dataset `tiny/train` have 1; make it 1"),
    ] {
        let toml = JOB.replace(good, bad);
        let line = line_of(&toml, bad.lines().last().unwrap());
        let error =
            operator.ask(&Request::Submit { file: "/x/tiny.toml".to_owned(), toml }).await.unwrap_err();
        let error = error.to_string();
        assert!(error.starts_with(&format!("/x/tiny.toml:{line}: ")), "{error}");
        assert!(error.contains(part), "{error}");
    }
    assert!(matches!(cluster.ask(&Request::Jobs).await, Response::Jobs(jobs) if jobs.is_empty()));
    let error = operator.ask(&Request::Status { job: JobId(9) }).await.unwrap_err().to_string();
    assert_eq!(error, "there is no job j9; `coordinator jobs` lists them");
    // A mistake is not an intrusion.
    assert!(!cluster.http("/metrics").await.contains("lockstep_refused_connections_total"));
}

#[tokio::test]
async fn old_reports_are_ignored_and_counted() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(JOB).await;
    let mut worker = cluster.worker().await;
    let generation = worker.start().await.generation;
    let outcome = Outcome::Lost { error: "x".to_owned(), culprit: None };
    worker.say(&FromWorker::Ended { job, generation, outcome, held: None }).await;
    worker.start().await;
    worker.say(&steps(job, generation, 1..=3)).await;
    cluster.wait_for_metric("lockstep_stale_messages_total 1").await;
    assert_eq!(cluster.status(job).await.step, 0);
    assert_eq!(cluster.status(job).await.metrics, BTreeMap::new());
}

/// The coordinator is killed between writing and acknowledging; another generation starts before what it had reached.
#[tokio::test]
async fn every_step_is_audited_once_through_a_restart_and_a_new_generation() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(JOB).await;
    let mut worker = cluster.worker().await;
    let assignment = worker.start().await;
    let generation = assignment.generation;
    worker.put(job, generation, 1, &checkpoint(job, 1)).await.unwrap();
    worker.say(&steps(job, generation, 1..=2)).await;
    assert_eq!(worker.heard(PATIENCE).await, Some(ToWorker::Heard { reports: 1 }));

    let cluster = cluster.restart().await;
    let running = Running { job, generation, rank: assignment.rank, step: 3 };
    let mut worker = cluster.session(worker.identity.clone(), worker.id, Some(running)).await.unwrap();
    worker.say(&steps(job, generation, 1..=2)).await;
    worker.say(&steps(job, generation, 3..=3)).await;
    let outcome = Outcome::Lost { error: "x".to_owned(), culprit: None };
    worker.say(&FromWorker::Ended { job, generation, outcome, held: None }).await;
    let again = worker.start().await;
    assert_eq!(again.resume, Resumption::Checkpoint { step: 1 });
    worker.say(&steps(job, again.generation, 2..=4)).await;
    worker.say(&finished(job, again.generation)).await;
    cluster.wait(job, |j| j.state == JobState::Finished).await;

    let text = std::fs::read_to_string(cluster.dir.job(job).audit()).unwrap();
    let line = |line: &str| match AuditLine::from_json(line.as_bytes()).unwrap() {
        AuditLine::Start(start) => format!("{} from {}", start.generation, start.from),
        AuditLine::Entry(entry) => format!("{} {}", entry.generation, entry.step),
    };
    let lines: Vec<_> = text.lines().map(line).collect();
    assert_eq!(lines, ["g1 from step 0", "g1 1", "g1 2", "g1 3", "g2 from step 1", "g2 2", "g2 3", "g2 4"]);
    let spec = JobSpec::parse("tiny.toml", JOB).unwrap();
    let proof = audit::check(&spec, 20, text.as_bytes()).unwrap();
    assert!(proof.is_complete() && proof.undone == 2, "{proof:?}");
}

#[tokio::test]
async fn what_a_worker_repeats_after_a_broken_session_is_noted_once() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(JOB).await;
    let mut worker = cluster.worker().await;
    let assignment = worker.start().await;
    let generation = assignment.generation;
    let metrics = |step| {
        let values = [("test_top1".to_owned(), step as f64 / 10.0)].into();
        FromWorker::Metrics { job, generation, step, epoch: 1, values }
    };
    let line = |text: &str| FromWorker::Log { job, generation, line: text.to_owned() };
    for report in [line("first"), metrics(1), line("second"), metrics(2)] {
        worker.say(&report).await;
    }
    cluster.wait(job, |j| j.metrics.get("test_top1") == Some(&0.2)).await;

    // It has heard of the first report only.
    let running = Running { job, generation, rank: assignment.rank, step: 2 };
    let mut worker = cluster.session(worker.identity.clone(), worker.id, Some(running)).await.unwrap();
    for report in [metrics(1), line("second"), metrics(2), line("third"), metrics(3)] {
        worker.say(&report).await;
    }
    cluster.wait(job, |j| j.metrics.get("test_top1") == Some(&0.3)).await;
    let text = std::fs::read_to_string(cluster.dir.job(job).metrics()).unwrap();
    assert_eq!(text.lines().count(), 3, "{text}");
    let log = std::fs::read_to_string(cluster.dir.job(job).log()).unwrap();
    for text in ["first", "second", "third"] {
        assert_eq!(log.matches(&format!(": {text}\n")).count(), 1, "{log}");
    }
}

#[tokio::test]
async fn a_failed_job_with_a_good_checkpoint_is_taken_up_by_the_same_job_file() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(JOB).await;
    let mut worker = cluster.worker().await;
    let generation = worker.start().await.generation;
    let failed = || Outcome::Failed { error: "no space left".to_owned() };
    worker.put(job, generation, 2, &checkpoint(job, 2)).await.unwrap();
    worker.say(&FromWorker::Ended { job, generation, outcome: failed(), held: None }).await;
    let reason = cluster.wait(job, |j| j.state == JobState::Failed).await.reason;

    let scope = || Scope::Job { toml: JOB.to_owned() };
    let (identity, id) = (worker.identity.clone(), worker.id);
    let cluster = cluster.restart_with(scope(), |_| ()).await;
    assert_eq!(cluster.service.taken_up(), Some(&TakenUp { job, failure: Some(reason.clone()) }));
    assert!(reason.contains("no space left"), "{reason}");
    let mut worker = cluster.session(identity, id, None).await.unwrap();
    let again = worker.start().await;
    assert_eq!((again.job, again.resume), (job, Resumption::Checkpoint { step: 2 }));

    let outcome = failed();
    worker.say(&FromWorker::Ended { job, generation: again.generation, outcome, held: None }).await;
    cluster.wait(job, |j| j.state == JobState::Failed).await;
    let spoil = |dir: &DataDir| {
        let weights = dir.job(job).checkpoints().join("step-000000000002").join(WEIGHTS_FILE);
        std::fs::write(weights, b"damaged").unwrap();
    };
    let cluster = cluster.restart_with(scope(), spoil).await;
    assert_eq!(cluster.service.taken_up(), None, "there is nothing to go on from");
    assert_eq!(cluster.submit(JOB).await, JobId(2));
}

#[tokio::test]
async fn figures_that_are_no_numbers_are_not_kept_and_spoil_nothing() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(JOB).await;
    let mut worker = cluster.worker().await;
    let generation = worker.start().await.generation;
    worker.say(&steps(job, generation, 1..=1)).await;
    let values = [("loss".to_owned(), f64::NAN), ("test_loss".to_owned(), f64::INFINITY)].into();
    let record = StepRecord { generation, step: 2, seconds: f64::NAN, values, ..StepRecord::default() };
    worker.say(&FromWorker::Steps { job, generation, records: vec![record] }).await;
    let values = [("test_top1".to_owned(), 0.5), ("test_loss".to_owned(), f64::NAN)].into();
    worker.say(&FromWorker::Metrics { job, generation, step: 2, epoch: 1, values }).await;
    let expected = BTreeMap::from([("test_top1".to_owned(), 0.5)]);
    assert_eq!(cluster.wait(job, |j| j.metrics.contains_key("test_top1")).await.metrics, expected);

    let cluster = cluster.restart().await;
    assert_eq!(cluster.status(job).await.metrics, expected);
    let text = std::fs::read_to_string(cluster.dir.job(job).metrics()).unwrap();
    assert!(text.lines().all(|l| serde_json::from_str::<serde_json::Value>(l).is_ok()), "{text}");
}
