//! `worker join`: enrols, keeps the session with the coordinator alive, runs what is assigned.

use crate::cli::{DeviceArg, JoinArgs};
use crate::control::{self, ControlFeed};
use crate::data::source;
use crate::identity::{self, Home};
use crate::mesh::Mesh;
use crate::metrics::Metrics;
use crate::network;
use crate::session::{self, Environment, SessionHandle};
use anyhow::{Context, Result, bail};
use lockstep_common::http::{self, Readiness};
use lockstep_common::net::{
    Exchange, Identity, NetError, Role, bind, bind_as, client_config, connect, host_key, interface_addresses,
    resolve, server_config,
};
use lockstep_common::wire::{
    FrameError, FromWorker, Outcome, Register, Request, Response, StopMode, ToWorker, read_frame, write_frame,
};
use quinn::{Connection, Endpoint};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Pauses between attempts to reach a coordinator that is away.
const RECONNECT_PAUSE: Duration = Duration::from_millis(500);

/// How long a leaving worker waits for a coordinator that is away to take its checkpoint.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a leaving worker tries to hand in its last reports.
const FAREWELL: Duration = Duration::from_secs(5);

/// Joins and works until a signal, a dismissal or the end of standard input (where asked for).
pub(crate) fn join(args: JoinArgs) -> Result<()> {
    if let DeviceArg::Cuda(index) = args.device {
        crate::train::device::enable_cuda(index)?;
    }
    let runtime = network::runtime()?;
    let result = runtime.block_on(Agent::start(args));
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn default_home() -> Result<PathBuf> {
    let home = std::env::var_os("HOME").context("HOME is not set; pass --data-dir")?;
    Ok(PathBuf::from(home).join(".lockstep").join("worker"))
}

/// Why the worker stops.
enum Departure {
    Signal(&'static str),
    ParentGone,
}

struct Agent {
    args: JoinArgs,
    identity: Identity,
    endpoint: Endpoint,
    environment: Environment,
    feed: ControlFeed,
    readiness: Readiness,
    metrics_address: Option<SocketAddr>,
    threads: u32,
    current: Option<SessionHandle>,
    /// Since when this worker has been leaving, counted anew when its last job has ended.
    leaving: Option<Instant>,
    /// Whether there is nobody left to say farewell to.
    orphaned: bool,
}

impl Agent {
    async fn start(args: JoinArgs) -> Result<()> {
        let base = args.data_dir.clone().map_or_else(default_home, Ok)?;
        let home = Home::claim(&base)?;
        // On a port of its own: a closed endpoint's socket lives on for a moment, in the way of the one below.
        let enrolment = bind(SocketAddr::new(args.listen.ip(), 0), None)?;
        let identity = identity::obtain(&enrolment, &args.coordinator, args.token.as_deref(), &home).await;
        enrolment.wait_idle().await;
        drop(enrolment);
        let identity = identity?;
        let Some(Role::Worker(worker)) = identity.role() else {
            bail!("the stored identity is not a worker's")
        };

        let mut server = server_config(&identity, false)?;
        server.transport_config(Arc::new(lockstep_collectives::quic::transport_config()));
        let endpoint = bind_as(&identity, args.listen, server)?;
        let metrics = Metrics::new()?;
        let readiness = Readiness::default();
        let metrics_address = match args.metrics {
            Some(address) => {
                let routes = http::routes(metrics.registry().clone(), readiness.clone());
                Some(http::serve(address, routes).await?)
            }
            None => None,
        };
        let runtime = tokio::runtime::Handle::current();
        let (control, feed) = control::channel(runtime.clone());
        let threads = args
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get() as u32));
        let shards = source::cache(home.path(), args.cache_bytes, &args.datasets, control.clone())?;
        let environment = Environment {
            control,
            metrics,
            mesh: Mesh::listen(endpoint.clone(), client_config(&identity)?),
            runtime,
            shards,
            device: args.device,
            threads: threads.max(1) as usize,
        };
        tracing::info!(
            "this is worker {worker} on {}, listening on {}",
            identity::host_name(),
            endpoint.local_addr()?
        );
        let mut agent = Self {
            args,
            identity,
            endpoint,
            environment,
            feed,
            readiness,
            metrics_address,
            threads,
            current: None,
            leaving: None,
            orphaned: false,
        };
        let result = agent.serve(&home).await;
        agent.endpoint.close(0u32.into(), b"leaving");
        if !agent.orphaned {
            let _ = tokio::time::timeout(Duration::from_secs(1), agent.endpoint.wait_idle()).await;
        }
        result
    }

    /// Keeps a session with the coordinator until this worker has left.
    async fn serve(&mut self, home: &Home) -> Result<()> {
        let (departures, mut departure) = mpsc::channel(4);
        watch_for_departure(departures, self.args.exit_on_stdin_close)?;
        let mut away = false;
        let mut ever_welcome = false;
        loop {
            let opened = tokio::select! {
                event = next_event(&mut departure, self.leaving.is_some(), self.current.as_ref()) => {
                    self.handle(event);
                    None
                }
                opened = self.open_session() => Some(opened),
            };
            match opened {
                None => {}
                Some(Ok((connection, exchange))) => {
                    if away {
                        tracing::info!("the coordinator is back");
                    }
                    (away, ever_welcome) = (false, true);
                    self.readiness.set(true);
                    self.feed.restart();
                    let _ = self.feed.connection.send(Some(connection.clone()));
                    let end = self.converse(exchange, &mut departure).await;
                    self.readiness.set(false);
                    let _ = self.feed.connection.send(None);
                    connection.close(0u32.into(), b"session ended");
                    if let Ok(Some(reason)) = end {
                        bail!("dismissed by the coordinator: {reason}");
                    }
                }
                Some(Err(NetError::Refused { reason, message })) if reason == "unknown_worker" => {
                    identity::forget(home);
                    bail!("{message}");
                }
                Some(Err(error)) if !ever_welcome => return Err(error.into()),
                Some(Err(error)) => tracing::debug!("{error}"),
            }
            if self.has_left() {
                return Ok(());
            }
            if self.leaving.is_some_and(|since| since.elapsed() > PATIENCE) {
                tracing::warn!("the coordinator is away: left without a checkpoint of the last steps");
                return Ok(());
            }
            if !away && self.leaving.is_none() {
                away = true;
                tracing::warn!(
                    "lost the coordinator at {}; a running job goes on, trying to reconnect",
                    self.args.coordinator
                );
            }
            tokio::select! {
                event = next_event(&mut departure, self.leaving.is_some(), self.current.as_ref()) => self.handle(event),
                () = tokio::time::sleep(RECONNECT_PAUSE) => {}
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Depart(departure) => {
                self.leaving.get_or_insert_with(Instant::now);
                match departure {
                    Departure::Signal(name) => {
                        tracing::info!("{name}: leaving after the step in progress");
                        // At once, so that nothing new is assigned here and nobody takes the end for a failure.
                        self.environment.control.tell(FromWorker::Leaving);
                        if let Some(session) = &self.current {
                            session.stop(StopMode::Checkpoint);
                        }
                    }
                    Departure::ParentGone => {
                        if let Some(session) = self.current.take() {
                            session.abort("this worker's coordinator is gone");
                        }
                        self.orphaned = true;
                    }
                }
            }
            Event::SessionEnded => {
                self.current = None;
                self.leaving = Some(Instant::now());
            }
        }
    }

    /// Whether this worker has said all it had to say, or waited long enough for somebody to say it to.
    fn has_left(&self) -> bool {
        let Some(since) = self.leaving else { return false };
        self.orphaned || self.current.is_none() && (self.feed.is_drained() || since.elapsed() > FAREWELL)
    }

    async fn open_session(&self) -> Result<(Connection, Exchange), NetError> {
        let addresses = resolve(&self.args.coordinator)?;
        let config = client_config(&self.identity)?;
        let connection =
            connect(&self.endpoint, &config, &addresses, &Role::Coordinator.server_name()).await?;
        let bound = self.endpoint.local_addr().unwrap_or(self.args.listen);
        let register = Register {
            host: identity::host_name(),
            device: self.args.device.to_string(),
            threads: self.threads,
            host_key: host_key(),
            addresses: interface_addresses(bound, connection.remote_address()),
            advertised: self.args.advertise.clone(),
            metrics: self.metrics_address,
            running: self.current.as_ref().and_then(SessionHandle::running),
        };
        let mut exchange = Exchange::open(&connection, &Request::Session(register)).await?;
        match exchange.answer().await? {
            Response::Welcome => Ok((connection, exchange)),
            _ => Err(NetError::UnexpectedAnswer),
        }
    }

    /// Carries messages both ways until the stream breaks (`Err`), the coordinator dismisses this worker or this
    /// worker has left.
    async fn converse(
        &mut self,
        exchange: Exchange,
        departure: &mut mpsc::Receiver<Departure>,
    ) -> Result<Option<String>, FrameError> {
        let Exchange { mut send, mut recv } = exchange;
        // Reading a frame is not cancel-safe, so a task of its own does it.
        let (incoming, mut inbox) = mpsc::channel(64);
        let reader = tokio::spawn(async move {
            loop {
                let message = read_frame::<ToWorker>(&mut recv).await;
                let broken = message.is_err();
                if incoming.send(message).await.is_err() || broken {
                    return;
                }
            }
        });
        let end = loop {
            if self.orphaned {
                break Ok(None);
            }
            if self.has_left() {
                let _ = send.finish();
                let _ = tokio::time::timeout(FAREWELL, send.stopped()).await;
                break Ok(None);
            }
            tokio::select! {
                event = next_event(departure, self.leaving.is_some(), self.current.as_ref()) => self.handle(event),
                message = inbox.recv() => match message {
                    Some(Ok(ToWorker::Dismiss { reason })) => break Ok(Some(reason)),
                    Some(Ok(ToWorker::Heard { reports })) => self.feed.heard(reports),
                    Some(Ok(message)) => self.obey(message),
                    Some(Err(error)) => break Err(error),
                    None => break Err(FrameError::Closed),
                },
                outgoing = self.feed.next() => {
                    if let Err(error) = write_frame(&mut send, outgoing.message()).await {
                        break Err(error);
                    }
                    self.feed.sent(&outgoing);
                }
            }
        };
        reader.abort();
        end
    }

    fn obey(&mut self, message: ToWorker) {
        match message {
            ToWorker::Start(assignment) => {
                if self.leaving.is_some() {
                    let (job, generation) = (assignment.job, assignment.generation);
                    let outcome = Outcome::Stopped { step: 0 };
                    self.environment.control.tell(FromWorker::Ended { job, generation, outcome });
                    return;
                }
                let previous = self.current.take();
                if let Some(previous) = &previous {
                    previous.abort("a newer generation has begun");
                }
                self.current = Some(session::start(self.environment.clone(), *assignment, previous));
            }
            ToWorker::Stop { job, generation, mode } => match &self.current {
                Some(session) if session.is(job, generation) => session.stop(mode),
                _ => tracing::debug!("told to stop {job} {generation}, which does not run here"),
            },
            ToWorker::Heard { .. } | ToWorker::Dismiss { .. } => {}
        }
    }
}

enum Event {
    Depart(Departure),
    SessionEnded,
}

async fn next_event(
    departure: &mut mpsc::Receiver<Departure>,
    leaving: bool,
    current: Option<&SessionHandle>,
) -> Event {
    let ended = async {
        match current {
            Some(session) if leaving => session.ended().await,
            _ => std::future::pending().await,
        }
    };
    tokio::select! {
        Some(reason) = departure.recv() => Event::Depart(reason),
        () = ended => Event::SessionEnded,
    }
}

fn watch_for_departure(departures: mpsc::Sender<Departure>, stdin: bool) -> Result<()> {
    for (kind, name) in [(SignalKind::terminate(), "SIGTERM"), (SignalKind::interrupt(), "SIGINT")] {
        let mut stream = signal(kind).context("cannot listen for signals")?;
        let departures = departures.clone();
        tokio::spawn(async move {
            if stream.recv().await.is_some() {
                let _ = departures.send(Departure::Signal(name)).await;
            }
            // A second signal of the kind does not wait for a checkpoint.
            if stream.recv().await.is_some() {
                std::process::exit(1);
            }
        });
    }
    if stdin {
        std::thread::spawn(move || {
            let mut sink = [0; 256];
            while matches!(std::io::Read::read(&mut std::io::stdin(), &mut sink), Ok(n) if n > 0) {}
            let _ = departures.blocking_send(Departure::ParentGone);
        });
    }
    Ok(())
}
