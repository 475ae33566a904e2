//! Nobody uninvited: tokens, certificates, versions.

use crate::cluster::{Cluster, loopback, options};
use lockstep_common::net::{
    Authority, Exchange, NetError, Role, SigningRequest, bind, client_config, connect,
};
use lockstep_common::token::Token;
use lockstep_common::wire::{
    FrameError, PROTOCOL, Request, Response, TokenPurpose, read_frame, read_preamble, write_frame,
};
use lockstep_coordinator::service::Service;
use lockstep_coordinator::store::{Store, TokenRecord};

fn refusal<T>(result: Result<T, NetError>) -> String {
    match result {
        Err(NetError::Refused { message, .. }) => message,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("this should have been refused"),
    }
}

#[tokio::test]
async fn a_token_admits_as_often_as_it_says_and_the_role_is_the_tokens() {
    let cluster = Cluster::start().await;
    let token = cluster.token(TokenPurpose::Worker, 2).await;
    let (first, second) = (cluster.enroll(&token).await.unwrap(), cluster.enroll(&token).await.unwrap());
    assert_eq!(first.0.role(), first.1.map(Role::Worker));
    assert_ne!(first.1, second.1);
    let message = refusal(cluster.enroll(&token).await);
    assert_eq!(message, "the token has been used up; make a new one with `coordinator token new`");
    cluster.wait_for_metric("lockstep_refused_connections_total{reason=\"token_used_up\"} 1").await;

    let token = cluster.token(TokenPurpose::Operator, 1).await;
    let (identity, worker) = cluster.enroll(&token).await.unwrap();
    assert_eq!((identity.role(), worker), (Some(Role::Operator), None));
}

#[tokio::test]
async fn a_wrong_secret_and_an_unknown_token_are_refused_alike() {
    let cluster = Cluster::start().await;
    let good = cluster.token(TokenPurpose::Worker, 1).await;
    let wrong = Token { secret: [7; 32], ..good.clone() };
    let unknown = Token { id: [7; 8], ..good.clone() };
    let message = refusal(cluster.enroll(&wrong).await);
    assert_eq!(message, refusal(cluster.enroll(&unknown).await));
    cluster.wait_for_metric("lockstep_refused_connections_total{reason=\"token_unknown\"} 2").await;
    cluster.enroll(&good).await.expect("the tries have not used the token up");
}

#[tokio::test]
async fn an_expired_token_is_refused() {
    let cluster = Cluster::start().await;
    let token = cluster.token(TokenPurpose::Worker, 1).await;
    let Cluster { folder, dir, service } = cluster;
    service.stop().await;
    let mut store = Store::open(&dir.store()).unwrap();
    let record = store.token(&token.id_hex()).unwrap().unwrap();
    let now_ms = record.expires_ms;
    store.put_token(&token.id_hex(), &TokenRecord { expires_ms: now_ms - 61_000, ..record }, now_ms).unwrap();
    drop(store);
    let service = Service::start(options(&dir)).await.unwrap();
    let cluster = Cluster { folder, dir, service };
    assert!(refusal(cluster.enroll(&token).await).starts_with("the token has expired"));
    cluster.wait_for_metric("lockstep_refused_connections_total{reason=\"token_expired\"} 1").await;
}

#[tokio::test]
async fn a_token_of_another_cluster_is_told_apart_before_it_is_shown() {
    let (cluster, other) = (Cluster::start().await, Cluster::start().await);
    let foreign = other.token(TokenPurpose::Worker, 1).await;
    let error = cluster.enroll(&foreign).await.err().unwrap().to_string();
    assert!(error.contains("another cluster than the token"), "{error}");
    cluster.wait_for_metric("lockstep_refused_connections_total{reason=\"handshake\"} 1").await;
    other.enroll(&foreign).await.expect("its secret was not spent");
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused() {
    let cluster = Cluster::start().await;
    let folder = tempfile::tempdir().unwrap();
    let foreign = Authority::open(folder.path()).unwrap();
    let ours = Authority::open(&cluster.dir.ca()).unwrap();
    // It trusts our coordinator, but its own certificate is not of our authority.
    let key = SigningRequest::new().unwrap();
    let certificate = foreign.sign(key.der(), Role::Operator).unwrap();
    let identity = key.complete(certificate, ours.certificate().to_vec());
    let refused = match cluster.connect(&identity).await {
        Ok((_endpoint, connection)) => Exchange::ask(&connection, &Request::Jobs).await.is_err(),
        Err(_) => true,
    };
    assert!(refused);
    cluster.wait_for_metric("lockstep_refused_connections_total{reason=\"handshake\"} 1").await;

    // And one of another cluster altogether does not trust us.
    let stranger = foreign.issue(Role::Operator).unwrap();
    let error = cluster.connect(&stranger).await.err().unwrap().to_string();
    assert!(error.contains("different clusters"), "{error}");
}

#[tokio::test]
async fn without_a_certificate_nothing_but_enrolment_is_answered() {
    let cluster = Cluster::start().await;
    let token = cluster.token(TokenPurpose::Worker, 1).await;
    let (_endpoint, connection) = cluster.connect_without_certificate(token.ca).await.unwrap();
    for request in [Request::Jobs, Request::Manifest { dataset: "tiny/train".to_owned() }] {
        assert!(refusal(Exchange::ask(&connection, &request).await).contains("needs a certificate"));
    }
    cluster.wait_for_metric("lockstep_refused_connections_total{reason=\"no_certificate\"} 2").await;
}

#[tokio::test]
async fn workers_and_operators_may_ask_only_for_what_is_theirs() {
    let cluster = Cluster::start().await;
    let worker = cluster.worker().await;
    let message = refusal(worker.ask(&Request::Workers).await);
    assert_eq!(message, format!("worker {} may not ask for this", worker.id));
    let operator = cluster.operator().await;
    let manifest = Request::Manifest { dataset: "tiny/train".to_owned() };
    assert!(operator.ask(&manifest).await.unwrap_err().to_string().contains("only a worker"));
    cluster.wait_for_metric("lockstep_refused_connections_total{reason=\"not_authorised\"} 2").await;
}

#[tokio::test]
async fn a_peer_of_another_version_is_told_so_and_hears_ours() {
    let cluster = Cluster::start().await;
    let token = cluster.token(TokenPurpose::Worker, 1).await;
    let (_endpoint, connection) = cluster.connect_without_certificate(token.ca).await.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    let theirs = PROTOCOL + 41;
    send.write_all(&[&b"LKST"[..], &theirs.to_le_bytes()].concat()).await.unwrap();
    write_frame(&mut send, &Request::Jobs).await.unwrap();
    read_preamble(&mut recv).await.expect("the coordinator says its own version");
    let Response::Refused(refusal) = read_frame(&mut recv).await.unwrap() else { panic!("not refused") };
    assert!(refusal.message.contains(&format!("protocol {theirs}")), "{}", refusal.message);
    cluster.wait_for_metric("lockstep_refused_connections_total{reason=\"protocol_version\"} 1").await;
}

#[tokio::test]
async fn garbage_on_a_stream_is_refused_and_the_coordinator_lives() {
    let cluster = Cluster::start().await;
    let token = cluster.token(TokenPurpose::Worker, 1).await;
    let (_endpoint, connection) = cluster.connect_without_certificate(token.ca).await.unwrap();
    let preamble = [&b"LKST"[..], &PROTOCOL.to_le_bytes()].concat();
    let huge = [&preamble[..], &u32::MAX.to_le_bytes()].concat();
    let nonsense = [&preamble[..], &[3, 0, 0, 0, 255, 255, 255]].concat();
    for (bytes, reason) in
        [(&b"GET / HTTP/1.1\r\n"[..], "not_lockstep"), (&huge[..], "malformed"), (&nonsense[..], "malformed")]
    {
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        send.write_all(bytes).await.unwrap();
        read_preamble(&mut recv).await.unwrap();
        match read_frame(&mut recv).await {
            Ok(Response::Refused(refusal)) => assert_eq!(refusal.reason, reason),
            other => panic!("{other:?}"),
        }
    }
    cluster.enroll(&token).await.unwrap();
}

#[tokio::test]
async fn nobody_there_is_said_in_words() {
    let cluster = Cluster::start().await;
    let token = cluster.token(TokenPurpose::Operator, 1).await;
    let (identity, _) = cluster.enroll(&token).await.unwrap();
    let address = cluster.service.address();
    cluster.service.stop().await;
    let endpoint = bind(loopback(), None).unwrap();
    let name = Role::Coordinator.server_name();
    let config = client_config(&identity).unwrap();
    let error = connect(&endpoint, &config, &[address], &name).await.err().unwrap();
    assert!(matches!(error, NetError::Connect { .. } | NetError::Frame(FrameError::Io(_))), "{error}");
    assert!(error.to_string().contains("nobody answers there"), "{error}");
}
