//! What a coordinator knows survives it, and belongs to one coordinator at a time.

use crate::cluster::{Cluster, JOB, options};
use lockstep_common::ids::JobId;
use lockstep_common::wire::{FromWorker, JobState, Outcome, Request, Response, Running, TokenPurpose};
use lockstep_coordinator::client::Client;
use lockstep_coordinator::service::Service;
use std::collections::BTreeMap;

#[tokio::test]
async fn jobs_tokens_and_workers_survive_a_restart() {
    let cluster = Cluster::start().await;
    let token = cluster.token(TokenPurpose::Worker, 2).await;
    let (identity, id) = cluster.enroll(&token).await.unwrap();
    let first = cluster.submit(JOB).await;
    let second = cluster.submit(JOB).await;
    cluster.ask(&Request::Cancel { job: second }).await;

    let cluster = cluster.restart().await;
    assert_eq!(cluster.status(first).await.state, JobState::Queued);
    assert_eq!(cluster.status(second).await.state, JobState::Cancelled);
    assert_eq!(cluster.submit(JOB).await, JobId(3));
    cluster.session(identity, id.unwrap(), None).await.expect("its certificate is still good");
    let (_, other) = cluster.enroll(&token).await.expect("one use of the token was left");
    assert_ne!(other, id);
    assert!(cluster.enroll(&token).await.is_err());
}

#[tokio::test]
async fn a_running_job_goes_on_undisturbed_while_the_coordinator_is_away() {
    let cluster = Cluster::start().await;
    let job = cluster.submit(JOB).await;
    let mut worker = cluster.worker().await;
    let assignment = worker.start().await;
    let (identity, id) = (worker.identity.clone(), worker.id);

    let cluster = cluster.restart().await;
    assert_eq!(cluster.status(job).await.state, JobState::Running);
    let generation = assignment.generation;
    let running = Running { job, generation, rank: assignment.rank, step: 3 };
    let mut worker = cluster.session(identity, id, Some(running)).await.unwrap();
    let status = cluster.wait(job, |j| j.step == 3).await;
    assert_eq!((status.state, status.generation), (JobState::Running, generation));
    let outcome =
        Outcome::Finished { weights_digest: "d".to_owned(), step: 4, epoch: 1, metrics: BTreeMap::new() };
    worker.say(&FromWorker::Ended { job, generation, outcome, held: None }).await;
    let status = cluster.wait(job, |j| j.state == JobState::Finished).await;
    assert_eq!(status.generation, generation);
}

#[tokio::test]
async fn a_second_coordinator_on_a_data_directory_is_refused() {
    let cluster = Cluster::start().await;
    let error = Service::start(options(&cluster.dir)).await.err().unwrap().to_string();
    let dir = cluster.dir.root().display();
    assert_eq!(
        error,
        format!("data directory `{dir}` is in use by another coordinator (pid {})", std::process::id())
    );
    cluster.ask(&Request::Jobs).await;
}

#[tokio::test]
async fn a_stopped_coordinator_is_said_to_be_stopped() {
    let cluster = Cluster::start().await;
    assert!(matches!(cluster.ask(&Request::Jobs).await, Response::Jobs(jobs) if jobs.is_empty()));
    cluster.service.stop().await;
    let error = Client::connect(&cluster.dir).await.err().unwrap().to_string();
    let dir = cluster.dir.root().display();
    let start = format!("start one with `coordinator serve --data-dir {dir}`");
    assert_eq!(error, format!("no coordinator is running on `{dir}` ({start})"));
}
