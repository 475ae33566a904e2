//! The process that a person starts: it starts the ranks, introduces them to each other and gathers their figures.

use super::args::AllreduceArgs;
use super::peer::{Door, SecondHost};
use super::rank::worker_of;
use super::report::Times;
use super::talk::{FromRank, ToRank};
use anyhow::{Context, Result, anyhow, bail};
use lockstep_common::ids::Rank;
use lockstep_common::net::{Authority, Role};
use lockstep_common::one_line::one_line;
use lockstep_common::wire::{FrameError, read_frame, read_preamble, write_frame, write_preamble};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::timeout;

/// How long ranks may take to start and to say who they are.
const START: Duration = Duration::from_secs(30);

/// How long after one rank's complaint another rank's death may come to light: the cause of the complaint.
const HINDSIGHT: Duration = Duration::from_millis(500);

/// A rank as the leader sees it.
struct Led {
    output: Box<dyn AsyncWrite + Send + Unpin>,
    /// Where other ranks reach it, but for the port.
    address: IpAddr,
    listen: IpAddr,
}

/// What a rank did.
enum Event {
    Said(FromRank),
    /// It is gone, and how.
    Gone(String),
}

type Events = UnboundedReceiver<(Rank, Event)>;

/// Runs the whole benchmark and prints what it came to.
pub(super) async fn lead(args: &AllreduceArgs) -> Result<()> {
    let authority = Authority::ephemeral()?;
    let second = match args.listen {
        None => None,
        Some(listen) => Some(Door::open(&authority, listen)?.await_host(args.ranks_here()).await?),
    };
    let result = lead_ranks(args, &authority, second.as_ref()).await;
    if let Some(second) = second {
        second.dismiss(result.as_ref().err()).await;
    }
    result
}

async fn lead_ranks(args: &AllreduceArgs, authority: &Authority, second: Option<&SecondHost>) -> Result<()> {
    let (events, mut incoming) = unbounded_channel();
    let mut ranks = Vec::new();
    for _ in 0..args.ranks_here() {
        let rank = Rank(ranks.len() as u32);
        let (child, input, output) = start_rank()?;
        tokio::spawn(hear(rank, output, events.clone(), ended(child)));
        let here = second.map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |host| host.here);
        ranks.push(Led { output: Box::new(input), address: here, listen: here });
    }
    if let Some(host) = second {
        for _ in 0..host.ranks {
            let rank = Rank(ranks.len() as u32);
            let (send, recv) = timeout(START, host.connection.accept_bi())
                .await
                .context("the other host's ranks have not started in time")?
                .context("the other host is gone")?;
            let connection = host.connection.clone();
            let gone =
                async move { format!("the connection to its host was lost: {}", connection.closed().await) };
            tokio::spawn(hear(rank, recv, events.clone(), gone));
            ranks.push(Led { output: Box::new(send), address: host.there, listen: unspecified(host.there) });
        }
    }
    drop(events);

    introduce(authority, &mut ranks, &mut incoming, args).await?;
    let plan = args.plan(ranks.len() as u32);
    let mut times = Times::new(plan, ranks.len());
    let mut running = ranks.len();
    while running > 0 {
        let (rank, said) = next(&mut incoming).await?;
        match said {
            FromRank::Measured { size, column, nanoseconds } => times
                .take(rank.index(), size, column, nanoseconds)
                .with_context(|| format!("{rank} has measured what it was not asked for"))?,
            FromRank::Finished => running -= 1,
            _ => bail!("{rank} spoke out of turn"),
        }
    }
    times.print(if second.is_some() { 2 } else { 1 }, args.json)
}

/// Certifies every rank, then tells all of them where the others are.
async fn introduce(
    authority: &Authority,
    ranks: &mut [Led],
    incoming: &mut Events,
    args: &AllreduceArgs,
) -> Result<()> {
    let mut ports = vec![None; ranks.len()];
    let greet = async {
        while ports.contains(&None) {
            let (rank, said) = next(incoming).await?;
            let led = &mut ranks[rank.index()];
            match said {
                FromRank::Hello { csr } => {
                    let worker = worker_of(rank);
                    let certificate = authority.sign(&csr, Role::Worker(worker))?;
                    let ca = authority.certificate().to_vec();
                    write_preamble(&mut led.output).await?;
                    let enrolled = ToRank::Enrolled { worker, certificate, ca, listen: led.listen };
                    write_frame(&mut led.output, &enrolled).await?;
                }
                FromRank::Listening { port } => ports[rank.index()] = Some(port),
                _ => bail!("{rank} spoke out of turn"),
            }
        }
        Ok(())
    };
    timeout(START, greet).await.context("the ranks have not started in time")??;
    let address = |(led, port): (&Led, &Option<u16>)| port.map(|port| SocketAddr::new(led.address, port));
    let addresses: Vec<SocketAddr> = ranks.iter().zip(&ports).filter_map(address).collect();
    let plan = args.plan(ranks.len() as u32);
    if plan.shards < ranks.len() as u32 {
        bail!(
            "{} logical shards for {} ranks: use at least one logical shard per rank",
            plan.shards,
            ranks.len()
        );
    }
    for (led, rank) in ranks.iter_mut().zip((0..).map(Rank)) {
        let start = ToRank::Start { rank, addresses: addresses.clone(), plan: plan.clone() };
        write_frame(&mut led.output, &start).await?;
    }
    Ok(())
}

/// What a rank says next; an error that names the rank when one fails or dies.
async fn next(incoming: &mut Events) -> Result<(Rank, FromRank)> {
    let (rank, event) = incoming.recv().await.context("all ranks are gone")?;
    let complaint = match event {
        Event::Gone(how) => bail!("{rank} {how}"),
        Event::Said(FromRank::Failed { message }) => anyhow!("{rank}: {message}"),
        Event::Said(said) => return Ok((rank, said)),
    };
    // Those whom it left behind may be heard before the rank that died.
    let death = async {
        loop {
            match incoming.recv().await {
                Some((rank, Event::Gone(how))) => break Some(anyhow!("{rank} {how}")),
                Some(_) => {}
                None => break None,
            }
        }
    };
    Err(timeout(HINDSIGHT, death).await.ok().flatten().unwrap_or(complaint))
}

/// Passes on what a rank says; after its last words, nothing; if it ends without them, how it ended.
async fn hear(
    rank: Rank,
    mut input: impl AsyncRead + Unpin,
    events: UnboundedSender<(Rank, Event)>,
    gone: impl Future<Output = String>,
) {
    let mut listen = async || -> Result<(), FrameError> {
        read_preamble(&mut input).await?;
        loop {
            let said: FromRank = read_frame(&mut input).await?;
            let last = matches!(said, FromRank::Finished | FromRank::Failed { .. });
            // The leader has given up: there is nobody to tell.
            let _ = events.send((rank, Event::Said(said)));
            if last {
                return Ok(());
            }
        }
    };
    let how = match listen().await {
        Ok(()) => {
            // The process is still this task's to see to its end.
            gone.await;
            return;
        }
        Err(FrameError::Io(_) | FrameError::Closed) => gone.await,
        Err(error) => format!("cannot be understood: {}", one_line([error])),
    };
    let _ = events.send((rank, Event::Gone(how)));
}

/// Starts the process of a rank of this host.
pub(super) fn start_rank() -> Result<(Child, ChildStdin, ChildStdout)> {
    let program = std::env::current_exe().context("cannot find this program to start the ranks")?;
    let mut command = Command::new(program);
    command.args(["bench", "rank"]).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    if std::env::var_os("LOCKSTEP_LOG").is_none() {
        // Their reports of ordinary events would hide the table.
        command.env("LOCKSTEP_LOG", "warn");
    }
    let mut child = command.spawn().context("cannot start a rank")?;
    let input = child.stdin.take().context("a rank has no standard input")?;
    let output = child.stdout.take().context("a rank has no standard output")?;
    Ok((child, input, output))
}

/// How a rank's process ended, once it has.
pub(super) async fn ended(mut child: Child) -> String {
    let process = child.id().map(|id| format!(" (process {id})")).unwrap_or_default();
    match child.wait().await {
        Ok(status) => format!("ended{process}: {status}"),
        Err(error) => format!("ended{process}: {error}"),
    }
}

fn unspecified(like: IpAddr) -> IpAddr {
    if like.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() }
}
