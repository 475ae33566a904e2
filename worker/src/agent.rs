//! `worker join`: enrols, keeps the session with the coordinator alive, runs what is assigned.

use crate::cli::{DeviceArg, JoinArgs};
use crate::control::{self, ControlFeed};
use crate::data::pool::Pool;
use crate::data::source;
use crate::identity::{self, Home};
use crate::kept::Kept;
use crate::mesh::Mesh;
use crate::metrics::Metrics;
use crate::network;
use crate::session::{self, Environment, Origin, SessionEnd, SessionHandle};
use crate::state::follow::{Follower, Ready};
use crate::uptime::uptime;
use anyhow::{Context, Result, bail};
use lockstep_common::http::{self, Readiness};
use lockstep_common::ids::JobId;
use lockstep_common::net::{
    Exchange, Identity, NetError, Role, bind, bind_as, client_config, connect, host_key, interface_addresses,
    resolve, server_config,
};
use lockstep_common::wire::{FrameError, Register, Request, Response, ToWorker, read_frame, write_frame};
use lockstep_member::{Action, Leave, Member, Start};
use quinn::{Connection, Endpoint};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Pauses between attempts to reach a coordinator that is away.
const RECONNECT_PAUSE: Duration = Duration::from_millis(500);

/// How long a leaving worker tries to hand in its last reports.
const FAREWELL: Duration = Duration::from_secs(5);

/// Makes the device ready. After an error a worker with these options cannot work on this machine.
pub(crate) fn prepare(args: &JoinArgs) -> Result<()> {
    match args.device {
        DeviceArg::Cuda(index) => crate::train::device::enable_cuda(index),
        DeviceArg::Cpu => Ok(()),
    }
}

/// Joins and works until a signal, a dismissal or the end of standard input (where asked for).
pub(crate) fn join(args: JoinArgs) -> Result<()> {
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
    /// What to do; the rest of this is how.
    member: Member,
    current: Option<SessionHandle>,
    follower: Option<Follower>,
    ends: mpsc::UnboundedSender<SessionEnd>,
    readies: mpsc::UnboundedSender<Ready>,
    words: mpsc::UnboundedSender<u64>,
    /// The zero of the member's clock, since the host's start.
    started: Duration,
    /// How this worker leaves, and since when it has nothing else to do.
    leaves: Option<(Leave, Instant)>,
    /// Whether there is nobody left to say farewell to.
    orphaned: bool,
    /// Where the last session ended: its job and the last step that it has committed.
    ended: Option<(JobId, u64)>,
}

/// What happens to a worker beside its talk with the coordinator.
struct Events {
    departures: mpsc::Receiver<Departure>,
    ends: mpsc::UnboundedReceiver<SessionEnd>,
    readies: mpsc::UnboundedReceiver<Ready>,
    /// When questions were asked that the coordinator has answered.
    words: mpsc::UnboundedReceiver<u64>,
}

enum Event {
    Depart(Departure),
    SessionEnded(SessionEnd),
    Followed(Ready),
    /// The coordinator has answered what was asked then.
    Word(u64),
    /// The member wants to be told of the time.
    Tick,
}

impl Events {
    /// The next event, or a tick after `patience`. Nothing is lost when this is given up.
    async fn next(&mut self, patience: Option<Duration>) -> Event {
        let tick = async {
            match patience {
                Some(patience) => tokio::time::sleep(patience).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(departure) = self.departures.recv() => Event::Depart(departure),
            Some(end) = self.ends.recv() => Event::SessionEnded(end),
            Some(ready) = self.readies.recv() => Event::Followed(ready),
            Some(sent_ms) = self.words.recv() => Event::Word(sent_ms),
            () = tick => Event::Tick,
        }
    }
}

impl Agent {
    async fn start(args: JoinArgs) -> Result<()> {
        let (departures, mut departed) = mpsc::channel(4);
        watch_for_departure(departures, args.exit_on_stdin_close)?;
        check_addresses(&args)?;
        let base = args.data_dir.clone().map_or_else(default_home, Ok)?;
        let home = Home::claim(&base)?;
        // On a port of its own: a closed endpoint's socket lives on for a moment, in the way of the one below.
        let enrolment = bind(SocketAddr::new(args.listen.ip(), 0), None)?;
        let identity = tokio::select! {
            identity = identity::obtain(&enrolment, &args.coordinator, args.token.as_deref(), &home) => identity,
            Some(_) = departed.recv() => {
                tracing::info!("told to leave before it has joined");
                return Ok(());
            }
        };
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
        // Updates of the weights. Another agent of this process would be as content with the first one's.
        let updaters = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1) as usize);
        let _ = updaters.thread_name(|n| format!("update-{n}")).build_global();
        let shards = source::cache(home.path(), args.cache_bytes, &args.datasets, control.clone())?;
        let environment = Environment {
            control,
            metrics,
            mesh: Mesh::listen(endpoint.clone(), client_config(&identity)?),
            runtime,
            shards,
            device: args.device,
            threads: threads.max(1) as usize,
            decoders: Arc::new(Pool::new(args.decode_threads.unwrap_or(threads) as usize)?),
            worker,
            kept: Arc::new(Kept::default()),
        };
        let (ends, ended) = mpsc::unbounded_channel();
        let (readies, ready) = mpsc::unbounded_channel();
        let (words, word) = mpsc::unbounded_channel();
        let mut events = Events { departures: departed, ends: ended, readies: ready, words: word };
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
            member: Member::default(),
            current: None,
            follower: None,
            ends,
            readies,
            words,
            started: uptime(),
            leaves: None,
            orphaned: false,
            ended: None,
        };
        let result = agent.serve(&home, &mut events).await;
        agent.endpoint.close(0u32.into(), b"leaving");
        if !agent.orphaned {
            let _ = tokio::time::timeout(Duration::from_secs(1), agent.endpoint.wait_idle()).await;
        }
        result
    }

    /// Keeps a session with the coordinator until this worker has left.
    async fn serve(&mut self, home: &Home, events: &mut Events) -> Result<()> {
        let mut away = false;
        let mut ever_welcome = false;
        // Whether the last session with the coordinator ended because this worker left, and all was handed in.
        let mut parted = false;
        loop {
            let patience = self.patience();
            let register = self.register();
            let asked_ms = self.now_ms();
            let opened = tokio::select! {
                event = events.next(patience) => {
                    self.handle(event);
                    None
                }
                opened = self.open_session(register) => Some(opened),
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
                    self.member.handle_connected(asked_ms, self.now_ms());
                    self.act();
                    let end = self.converse(exchange, events).await;
                    self.readiness.set(false);
                    let _ = self.feed.connection.send(None);
                    connection.close(0u32.into(), b"session ended");
                    if let Err(error) = &end {
                        tracing::debug!("{error}");
                    }
                    self.member.handle_disconnected(self.now_ms());
                    self.act();
                    parted = end.is_ok() && self.feed.is_drained();
                }
                Some(Err(NetError::Refused { reason, message })) if reason == "unknown_worker" => {
                    identity::forget(home);
                    bail!("{message}");
                }
                Some(Err(error)) if !ever_welcome => return Err(error.into()),
                Some(Err(error)) => tracing::debug!("{error}"),
            }
            if self.has_left() {
                return match self.leaves.take() {
                    Some((Leave::Dismissed { reason }, _)) => bail!("dismissed by the coordinator: {reason}"),
                    Some((Leave::CoordinatorAway | Leave::Done, _)) if !parted => {
                        tracing::warn!("{}", self.last_words());
                        Ok(())
                    }
                    Some((Leave::CoordinatorAway | Leave::Done, _)) | None => Ok(()),
                };
            }
            if !away && !self.member.is_leaving() {
                away = true;
                let goes_on = match &self.current {
                    Some(_) => "the running job goes on",
                    None => "what is kept of a job stays",
                };
                tracing::warn!(
                    "lost the coordinator at {}; {goes_on}, trying to reconnect",
                    self.args.coordinator
                );
            }
            let patience = self.patience();
            tokio::select! {
                event = events.next(patience) => self.handle(event),
                () = tokio::time::sleep(RECONNECT_PAUSE) => {}
            }
        }
    }

    fn now_ms(&self) -> u64 {
        uptime().saturating_sub(self.started).as_millis() as u64
    }

    /// How long until the member wants to be told of the time.
    fn patience(&self) -> Option<Duration> {
        let due = self.member.poll_timeout()?;
        Some(Duration::from_millis(due.saturating_sub(self.now_ms())))
    }

    fn handle(&mut self, event: Event) {
        let now_ms = self.now_ms();
        match event {
            Event::Depart(Departure::Signal(name)) => {
                let waits = match self.environment.control.is_connected() {
                    true => "",
                    false => {
                        "; the coordinator is away, and is waited for some seconds to hand in the last steps"
                    }
                };
                tracing::info!("{name}: leaving after the step in progress{waits}");
                self.member.handle_departure(now_ms);
            }
            Event::Depart(Departure::ParentGone) => {
                if let Some(session) = self.current.take() {
                    session.abort("this worker's coordinator is gone");
                }
                self.orphaned = true;
            }
            Event::SessionEnded(SessionEnd { job, generation, outcome, held }) => {
                self.ended =
                    self.current.take().map(|session| session.progress()).map(|(job, _, step)| (job, step));
                self.member.handle_session_ended(job, generation, outcome, held, now_ms);
            }
            Event::Followed(Ready { job, generation, position }) => {
                self.member.handle_followed(job, generation, position);
            }
            Event::Word(sent_ms) => self.member.handle_word(sent_ms, now_ms),
            Event::Tick => self.member.handle_tick(now_ms),
        }
        self.act();
    }

    /// Does what the member has decided.
    fn act(&mut self) {
        while let Some(action) = self.member.poll_action() {
            match action {
                Action::Begin { assignment, start } => {
                    let (environment, ends) = (self.environment.clone(), self.ends.clone());
                    let origin = match (start, self.follower.take()) {
                        (Start::Kept, _) => Origin::Kept,
                        (Start::Followed, Some(follower)) => Origin::Followed(follower),
                        (Start::Followed, None) | (Start::Elsewhere, _) => Origin::Elsewhere,
                    };
                    self.current = Some(session::start(environment, *assignment, origin, ends));
                }
                Action::Stop { mode } => {
                    if !self.environment.control.is_connected() && !self.member.is_leaving() {
                        tracing::warn!(
                            "the coordinator has not been heard for the job's `orphan_timeout_s`: it pauses after the step in \
                             progress, its state is kept"
                        );
                    }
                    if let Some(session) = &self.current {
                        session.stop(mode);
                    }
                }
                Action::Abort { reason } => {
                    if let Some(session) = &self.current {
                        session.abort(&reason);
                    }
                }
                Action::Follow(following) => {
                    let readies = self.readies.clone();
                    let ready = move |ready| {
                        // An agent that is gone needs no word.
                        let _ = readies.send(ready);
                    };
                    self.follower = Some(Follower::start(self.environment.clone(), *following, ready));
                }
                Action::Unfollow => self.follower = None,
                Action::Drop => self.environment.kept.clear(),
                Action::Tell(report) => self.environment.control.tell(report),
                Action::Ping { sent_ms } => {
                    let (connection, words) = (self.feed.connection.borrow().clone(), self.words.clone());
                    self.environment.runtime.spawn(async move {
                        let Some(connection) = connection else { return };
                        if Exchange::ask(&connection, &Request::Ping).await.is_ok() {
                            // An agent that is gone needs no word.
                            let _ = words.send(sent_ms);
                        }
                    });
                }
                Action::Leave(how) => self.leaves = Some((how, Instant::now())),
            }
        }
        if let (Some(session), Some(until_ms)) = (&self.current, self.member.lease_until_ms()) {
            session.extend_lease(self.started + Duration::from_millis(until_ms));
        }
    }

    /// Whether this worker has said all it had to say, or waited long enough for somebody to say it to.
    fn has_left(&self) -> bool {
        self.orphaned
            || match &self.leaves {
                None => false,
                Some((Leave::Done, since)) => self.feed.is_drained() || since.elapsed() > FAREWELL,
                Some((Leave::CoordinatorAway | Leave::Dismissed { .. }, _)) => true,
            }
    }

    /// What becomes of the state of a worker that leaves without having handed over.
    fn last_words(&self) -> String {
        let running = self.current.as_ref().map(SessionHandle::progress).map(|(job, _, step)| (job, step));
        let (_, held) = self.member.register();
        let kept = held.map(|held| (held.job, held.position.step));
        let unheard = self.ended.filter(|_| !self.feed.is_drained());
        match running.or(kept).or(unheard) {
            Some((job, step)) => format!(
                "left without having handed over, as the coordinator is away: what this worker held of {job}, up to step \
                 {step}, is gone with it. {job} goes on from what its other workers hold, if there are any, and otherwise \
                 from its newest checkpoint"
            ),
            None => "left while the coordinator is away; this worker held nothing of any job".to_owned(),
        }
    }

    /// What to introduce this worker as; its addresses depend on the connection.
    fn register(&mut self) -> Register {
        if let Some((job, generation, step)) = self.current.as_ref().map(SessionHandle::progress) {
            self.member.handle_committed(job, generation, step);
        }
        let (running, held) = self.member.register();
        Register {
            host: identity::host_name(),
            device: self.args.device.to_string(),
            threads: self.threads,
            host_key: host_key(),
            addresses: Vec::new(),
            advertised: self.args.advertise.clone(),
            metrics: self.metrics_address,
            running,
            held,
        }
    }

    async fn open_session(&self, register: Register) -> Result<(Connection, Exchange), NetError> {
        let addresses = resolve(&self.args.coordinator)?;
        let config = client_config(&self.identity)?;
        let connection =
            connect(&self.endpoint, &config, &addresses, &Role::Coordinator.server_name()).await?;
        let bound = self.endpoint.local_addr().unwrap_or(self.args.listen);
        let addresses = interface_addresses(bound, connection.remote_address());
        let register = Register { addresses, ..register };
        let mut exchange = Exchange::open(&connection, &Request::Session(register)).await?;
        match exchange.answer().await? {
            Response::Welcome => Ok((connection, exchange)),
            _ => Err(NetError::UnexpectedAnswer),
        }
    }

    /// Carries messages both ways until the stream breaks (`Err`) or this worker has left.
    async fn converse(&mut self, exchange: Exchange, events: &mut Events) -> Result<(), FrameError> {
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
        // By itself, so that a coordinator that takes nothing holds up nothing else here.
        let outgoing = self.feed.outgoing();
        let (over, mut is_over) = tokio::sync::watch::channel(false);
        let mut writer = tokio::spawn(async move {
            loop {
                let next = tokio::select! {
                    next = outgoing.next() => next,
                    _ = is_over.wait_for(|over| *over) => return Ok(send),
                };
                write_frame(&mut send, next.message()).await?;
            }
        });
        let end = loop {
            if self.orphaned {
                break Ok(());
            }
            if self.has_left() {
                let _ = over.send(true);
                let Ok(Ok(Ok(mut send))) = tokio::time::timeout(FAREWELL, &mut writer).await else {
                    break Ok(());
                };
                let _ = send.finish();
                let _ = tokio::time::timeout(FAREWELL, send.stopped()).await;
                break Ok(());
            }
            let patience = self.patience();
            tokio::select! {
                event = events.next(patience) => self.handle(event),
                message = inbox.recv() => match message {
                    Some(Ok(ToWorker::Heard { reports })) => self.feed.heard(reports),
                    Some(Ok(order)) => {
                        if let Err(refused) = self.member.handle_order(order, self.now_ms()) {
                            tracing::info!("an order was not obeyed: {refused}");
                        }
                        self.act();
                    }
                    Some(Err(error)) => break Err(error),
                    None => break Err(FrameError::Closed),
                },
                written = &mut writer => break match written {
                    Ok(Err(error)) => Err(error),
                    // It was not told to end.
                    Ok(Ok(_)) | Err(_) => Err(FrameError::Closed),
                },
            }
        };
        reader.abort();
        if !writer.is_finished() {
            // To its end, so that it takes nothing from what the next session is to send.
            writer.abort();
            let _ = writer.await;
        }
        end
    }
}

/// Refuses addresses at which nobody can reach this worker.
fn check_addresses(args: &JoinArgs) -> Result<()> {
    // Whether it can be resolved is told later, by whoever connects.
    let coordinator = resolve(&args.coordinator).unwrap_or_default();
    let remote = !coordinator.is_empty() && coordinator.iter().all(|address| !address.ip().is_loopback());
    for address in &args.advertise {
        if address.ip().is_unspecified() || address.port() == 0 {
            bail!(
                "--advertise {address} is no address that others can connect to; name this host's address and its port"
            );
        }
        if remote && address.ip().is_loopback() {
            bail!(
                "--advertise {address} can be reached from this host only, and the coordinator is on another; name an address \
                 of this host's network"
            );
        }
    }
    if remote && args.listen.ip().is_loopback() {
        bail!(
            "--listen {} is of this host only, and the coordinator {} is on another; listen on 0.0.0.0 or on an address that \
             faces it",
            args.listen,
            args.coordinator
        );
    }
    Ok(())
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
