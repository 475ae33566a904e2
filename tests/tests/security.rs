//! Invariant 8: nobody uninvited gets in, and both sides say so.

use lockstep_common::ids::WorkerId;
use lockstep_common::net::{
    Authority, Exchange, Identity, Role, SigningRequest, bind, client_config, connect, enrolment_config,
    server_config,
};
use lockstep_common::token::Token;
use lockstep_common::wire::{PROTOCOL, Request, TokenPurpose};
use lockstep_tests::cluster::Cluster;
use lockstep_tests::job::Job;
use lockstep_tests::place::Place;
use lockstep_tests::process::{Process, command};
use lockstep_tests::wait::until;
use serde_json::json;
use std::net::{SocketAddr, UdpSocket};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Runtime::new().expect("a tokio runtime")
}

/// A worker with this token must be refused with these words, and the coordinator must count and log it.
#[track_caller]
fn refused(cluster: &mut Cluster, token: &str, words: &str, reason: &str) {
    let command = cluster.join_command(token);
    Process::start(command).wait().refused(1, &["error: ", words]);
    counted(cluster, reason);
}

/// The coordinator has counted and logged a refusal for this reason.
#[track_caller]
fn counted(cluster: &mut Cluster, reason: &str) {
    let label = format!("reason=\"{reason}\"");
    let count = || cluster.scrape().sum("lockstep_refused_connections_total", &label).filter(|n| *n > 0.0);
    until(&format!("{label} in the metrics; log:\n{}", cluster.coordinator.stderr()), count);
    cluster.coordinator.until_stderr(&format!("({reason})"));
    assert_eq!(cluster.present(), 0, "nobody was let in");
}

/// Asks one request over a connection with this configuration; the answer or the error as text.
fn ask(cluster: &Cluster, config: &quinn::ClientConfig, request: &Request) -> String {
    let address: SocketAddr = cluster.address().parse().expect("an address");
    runtime().block_on(async {
        let endpoint = bind(ANY, None).expect("a client's endpoint");
        let name = Role::Coordinator.server_name();
        let asked = match connect(&endpoint, config, &[address], &name).await {
            Ok(connection) => Exchange::ask(&connection, request).await,
            Err(e) => Err(e),
        };
        asked.map_or_else(|e| e.to_string(), |answer| format!("{answer:?}"))
    })
}

#[test]
fn a_wrong_token_is_refused() {
    let mut cluster = Cluster::start(Place::empty());
    // Of this cluster's authority, so that the handshake succeeds, and never given out.
    let authority = Authority::open(&cluster.place.dir().join("ca")).expect("the authority");
    let invented = Token::generate(authority.certificate()).expect("a token").to_string();
    refused(&mut cluster, &invented, "the token is not of this coordinator", "token_unknown");

    // A real token's name with another secret.
    let mut guessed: Token = cluster.token().parse().expect("a token");
    guessed.secret[0] ^= 1;
    refused(&mut cluster, &guessed.to_string(), "the token is not of this coordinator", "token_unknown");
}

#[test]
fn a_garbled_or_missing_token_is_refused_before_anything_is_sent() {
    let mut cluster = Cluster::start(Place::empty());
    let token = cluster.token();
    for garbled in [&token[..token.len() - 1], &token[1..], "hello"] {
        let command = cluster.join_command(garbled);
        Process::start(command).wait().refused(1, &["not a whole join token", "coordinator token new"]);
    }
    let mut command = cluster.join_command("");
    command.env_remove("LOCKSTEP_TOKEN");
    Process::start(command).wait().refused(1, &["not enrolled yet", "coordinator token new"]);
}

#[test]
fn an_expired_token_is_refused() {
    let mut cluster = Cluster::start(Place::empty());
    let token = cluster.new_token(&["--ttl", "1s"]);
    let made = std::time::Instant::now();
    until("the token's second to pass", || (made.elapsed().as_millis() > 1000).then_some(()));
    refused(&mut cluster, &token, "the token has expired; make a new one", "token_expired");
}

#[test]
fn a_token_is_good_for_so_many_uses_and_no_more() {
    let mut cluster = Cluster::start(Place::empty());
    let token = cluster.new_token(&["--uses", "1"]);
    let command = cluster.join_command(&token);
    let worker = cluster.join(command);
    worker.signal(libc::SIGTERM);
    worker.wait().ok();
    refused(&mut cluster, &token, "the token has been used up; make a new one", "token_used_up");
}

/// `--json` was refused here, of all commands the one that scripts begin with.
#[test]
fn a_token_for_scripts_is_json_with_all_that_a_worker_needs() {
    let mut cluster = Cluster::start(Place::empty());
    let made = cluster.place.json(&["token", "new", "--uses", "1", "--ttl", "5m"]);
    let told = [&made["purpose"], &made["uses"], &made["ttl_s"]];
    assert_eq!(told, [&json!("worker"), &json!(1), &json!(300)], "{made}");
    let address = made["coordinator"].as_str().expect("where to join");
    assert!(address.ends_with(&cluster.address()[cluster.address().rfind(':').expect("a port")..]), "{made}");
    let command = cluster.join_command(made["token"].as_str().expect("a token"));
    cluster.join(command);
    let operators = cluster.place.json(&["token", "new", "--operator"]);
    assert_eq!(operators["purpose"], "operator", "{operators}");
}

#[test]
fn a_token_of_another_cluster_is_refused_on_both_sides() {
    let other = Cluster::start(Place::empty());
    let token = other.token();
    let mut cluster = Cluster::start(Place::empty());
    refused(&mut cluster, &token, "the coordinator belongs to another cluster than the token", "handshake");
}

#[test]
fn tokens_are_for_one_purpose() {
    let mut cluster = Cluster::start(Place::empty());
    let operators = cluster.new_token(&["--operator"]);
    let command = cluster.join_command(&operators);
    Process::start(command).wait().refused(1, &["operator's token"]);
    assert_eq!(cluster.present(), 0);

    let workers = cluster.token();
    let elsewhere = Place::empty();
    let login = elsewhere.coordinator(["login", "--coordinator", &cluster.address(), "--token", &workers]);
    login.refused(1, &["this token is for workers"]);
    elsewhere.coordinator(["jobs"]).refused(1, &["no coordinator"]);
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let mut cluster = Cluster::start(Place::empty());
    let token: Token = cluster.token().parse().expect("a token");
    let config = enrolment_config(token.ca).expect("a configuration");
    let new_token = Request::NewToken { purpose: TokenPurpose::Operator, ttl_s: 60, uses: 1 };
    for request in [Request::Jobs, new_token] {
        let answer = ask(&cluster, &config, &request);
        assert!(answer.contains("needs a certificate"), "{answer}");
    }
    counted(&mut cluster, "no_certificate");
}

#[test]
fn a_certificate_of_a_foreign_authority_is_refused() {
    let mut cluster = Cluster::start(Place::empty());
    let own = Authority::open(&cluster.place.dir().join("ca")).expect("the authority");
    let foreign = Authority::open(&cluster.place.file("foreign")).expect("another authority");
    for role in [Role::Operator, Role::Worker(WorkerId(1))] {
        // It trusts the right coordinator, so that it is the coordinator that has to refuse.
        let request = SigningRequest::new().expect("a key");
        let certificate = foreign.sign(request.der(), role).expect("a certificate");
        let identity = request.complete(certificate, own.certificate().to_vec());
        let answer = ask(&cluster, &client_config(&identity).expect("a configuration"), &Request::Jobs);
        assert!(!answer.starts_with("Jobs"), "{answer}");
    }
    counted(&mut cluster, "handshake");
}

#[test]
fn a_worker_may_not_do_what_operators_do() {
    let mut cluster = Cluster::start(Place::new());
    let worker = cluster.worker();
    worker.signal(libc::SIGTERM);
    worker.wait().ok();
    let folder = cluster.place.file("worker-1").join("slot-1");
    let identity = Identity::load(&folder, "worker").expect("the worker's folder").expect("its identity");
    let config = client_config(&identity).expect("a configuration");
    let submit = Request::Submit { file: "job.toml".to_owned(), toml: Job::default().to_string() };
    for request in [Request::Jobs, Request::Workers, submit] {
        let answer = ask(&cluster, &config, &request);
        assert!(answer.contains("may not ask for this"), "{answer}");
    }
    counted(&mut cluster, "not_authorised");
    assert_eq!(cluster.place.json(&["jobs"]).as_array().map(Vec::len), Some(0));
}

#[test]
fn a_certificate_for_a_worker_that_never_enrolled_is_refused() {
    let mut cluster = Cluster::start(Place::empty());
    let authority = Authority::open(&cluster.place.dir().join("ca")).expect("the authority");
    let slot = cluster.place.file("worker-1").join("slot-1");
    authority.issue(Role::Worker(WorkerId(9))).and_then(|i| i.save(&slot, "worker")).expect("an identity");
    let mut command = cluster.join_command("");
    command.env_remove("LOCKSTEP_TOKEN");
    Process::start(command).wait().refused(1, &["w9"]);
    counted(&mut cluster, "unknown_worker");
}

#[test]
fn garbage_harms_nobody() {
    let mut cluster = Cluster::start(Place::new());
    let socket = UdpSocket::bind(ANY).expect("a socket");
    for length in [0usize, 1, 20, 1200, 9000] {
        let noise: Vec<u8> = (0..length).map(|i| (i * 31 + length) as u8).collect();
        socket.send_to(&noise, cluster.address()).expect("the datagram leaves");
    }
    let token: Token = cluster.token().parse().expect("a token");
    let config = enrolment_config(token.ca).expect("a configuration");
    let address: SocketAddr = cluster.address().parse().expect("an address");
    runtime().block_on(async {
        let endpoint = bind(ANY, None).expect("a client's endpoint");
        let name = Role::Coordinator.server_name();
        let connection = connect(&endpoint, &config, &[address], &name).await.expect("a connection");
        for noise in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"LKST\x01\0\0\0\xff\xff\xff\xff",
            b"LKST\x01\0\0\0\x04\0\0\0\xee\xee\xee\xee",
        ] {
            let (mut send, mut recv) = connection.open_bi().await.expect("a stream");
            send.write_all(noise).await.expect("the stream takes it");
            let _ = send.finish();
            let answer = recv.read_to_end(1 << 16).await.expect("an answer");
            assert!(answer.starts_with(b"LKST"), "the coordinator says who it is and why not");
        }
    });
    counted(&mut cluster, "not_lockstep");
    counted(&mut cluster, "malformed");
    let _worker = cluster.worker();
    let id = cluster.submit(Job { steps: 3, ..Job::default() });
    cluster.until_finished(&id);
}

#[test]
fn another_protocol_version_is_told_so_by_the_coordinator() {
    let mut cluster = Cluster::start(Place::empty());
    let token: Token = cluster.token().parse().expect("a token");
    let config = enrolment_config(token.ca).expect("a configuration");
    let address: SocketAddr = cluster.address().parse().expect("an address");
    let answer = runtime().block_on(async {
        let endpoint = bind(ANY, None).expect("a client's endpoint");
        let name = Role::Coordinator.server_name();
        let connection = connect(&endpoint, &config, &[address], &name).await.expect("a connection");
        let (mut send, mut recv) = connection.open_bi().await.expect("a stream");
        send.write_all(&preamble(PROTOCOL + 1)).await.expect("the stream takes it");
        let _ = send.finish();
        recv.read_to_end(1 << 16).await.expect("an answer")
    });
    assert!(answer.starts_with(&preamble(PROTOCOL)), "{answer:?}");
    let words = format!("speaks protocol {}", PROTOCOL + 1);
    assert!(String::from_utf8_lossy(&answer).contains(&words), "{}", String::from_utf8_lossy(&answer));
    counted(&mut cluster, "protocol_version");
}

#[test]
fn a_worker_tells_that_its_coordinator_is_of_another_version() {
    let folder = Place::empty();
    let authority = Authority::open(&folder.file("ca")).expect("an authority");
    let token = Token::generate(authority.certificate()).expect("a token").to_string();
    let identity = authority.issue(Role::Coordinator).expect("an identity");
    let runtime = runtime();
    let server = server_config(&identity, true).expect("a configuration");
    let endpoint = runtime.block_on(async { bind(ANY, Some(server)) }).expect("a server's endpoint");
    let address = endpoint.local_addr().expect("an address").to_string();
    let newer = async move {
        let connection = endpoint.accept().await.expect("a caller").await.expect("a connection");
        let (mut send, _recv) = connection.accept_bi().await.expect("a stream");
        send.write_all(&preamble(PROTOCOL + 1)).await.expect("the stream takes it");
        connection.closed().await;
    };
    let _server = runtime.spawn(newer);
    let mut worker = command("worker");
    worker.args(["join", "--coordinator", &address, "--data-dir"]).arg(folder.file("worker"));
    worker.env("LOCKSTEP_TOKEN", token);
    let words = format!("speaks protocol {}, this program speaks {PROTOCOL}", PROTOCOL + 1);
    Process::start(worker).wait().refused(1, &[&words, "the same release"]);
}

fn preamble(version: u32) -> Vec<u8> {
    [&b"LKST"[..], &version.to_le_bytes()].concat()
}
