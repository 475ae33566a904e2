//! One rank, in a process of its own.

use super::args::Plan;
use super::measure::{Payload, ROUNDS, Way};
use super::talk::{FromRank, ToRank};
use crate::mesh::Mesh;
use anyhow::{Context, Result, bail};
use lockstep_common::ids::{Generation, JobId, Rank, WorkerId};
use lockstep_common::job::CollectiveSpec;
use lockstep_common::net::{Role, SigningRequest, bind_as, client_config, server_config};
use lockstep_common::one_line::one_line;
use lockstep_common::placement::Placement;
use lockstep_common::wire::{
    Assignment, Peer, Resumption, read_frame, read_preamble, write_frame, write_preamble,
};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::runtime::Runtime;

/// How long a rank waits at its end for the others to have what it sent.
const CLOSE: Duration = Duration::from_secs(5);

/// How long the cause of a failure may take to reach the other ranks: some round trips, far below the time in which they
/// would notice this process's end by themselves.
const FAREWELL: Duration = Duration::from_millis(300);

/// Does what it is told on standard input, and tells the leader also of its failure.
pub(super) fn run(runtime: &Runtime) -> Result<()> {
    let (mut to_leader, from_leader) = {
        let _entered = runtime.enter();
        const ALONE: &str = "a rank of a benchmark is started by `worker bench allreduce`";
        let input = std::io::stdin().as_fd().try_clone_to_owned().context(ALONE)?;
        let output = std::io::stdout().as_fd().try_clone_to_owned().context(ALONE)?;
        (
            pipe::Sender::from_owned_fd(output).context(ALONE)?,
            pipe::Receiver::from_owned_fd(input).context(ALONE)?,
        )
    };
    let last = match serve(runtime, &mut to_leader, from_leader) {
        Ok(()) => FromRank::Finished,
        Err(error) => FromRank::Failed { message: one_line(error.chain()) },
    };
    // A leader that is gone has nothing to be told.
    let _ = runtime.block_on(write_frame(&mut to_leader, &last));
    Ok(())
}

fn serve(runtime: &Runtime, out: &mut pipe::Sender, mut input: pipe::Receiver) -> Result<()> {
    let (rank, addresses, plan, mesh, endpoint) = runtime.block_on(async {
        write_preamble(out).await?;
        let signing = SigningRequest::new()?;
        write_frame(out, &FromRank::Hello { csr: signing.der().to_vec() }).await?;
        read_preamble(&mut input).await?;
        let ToRank::Enrolled { worker, certificate, ca, listen } = read_frame(&mut input).await? else {
            bail!("the leader did not enrol this rank")
        };
        let identity = signing.complete(certificate, ca);
        if identity.role() != Some(Role::Worker(worker)) {
            bail!("the leader's certificate is not this rank's")
        }
        let mut server = server_config(&identity, false)?;
        server.transport_config(Arc::new(lockstep_collectives::quic::transport_config()));
        let endpoint = bind_as(&identity, SocketAddr::new(listen, 0), server)?;
        let port = endpoint.local_addr()?.port();
        let mesh = Mesh::listen(endpoint.clone(), client_config(&identity)?);
        write_frame(out, &FromRank::Listening { port }).await?;
        let ToRank::Start { rank, addresses, plan } = read_frame(&mut input).await? else {
            bail!("the leader did not say what to measure")
        };
        Ok((rank, addresses, plan, mesh, endpoint))
    })?;
    runtime.spawn(async move {
        // The leader says nothing more: whatever comes is its end, which a rank does not outlive.
        let _ = read_frame::<ToRank>(&mut input).await;
        std::process::exit(1);
    });
    let mut ways = Vec::new();
    for (index, column) in plan.columns.iter().enumerate() {
        let assignment = assignment(rank, index, &addresses, plan.shards);
        let collective = CollectiveSpec { backend: column.backend, ..CollectiveSpec::default() };
        let group =
            runtime.block_on(mesh.group(&assignment, column.reduction, &collective, Arc::new(|_| {})));
        ways.push(Way::new(group.with_context(|| column.name())?, *column));
    }
    let measured = measure(runtime, out, &plan, &mut ways);
    match measured {
        Ok(()) => ways.into_iter().for_each(|way| way.close(CLOSE)),
        // The others must hear the cause before they see that this process has ended.
        Err(_) => {
            drop(ways);
            let _ = runtime.block_on(async { tokio::time::timeout(FAREWELL, endpoint.wait_idle()).await });
        }
    }
    measured
}

/// The group of one column is to the mesh a job of its own.
fn assignment(rank: Rank, column: usize, addresses: &[SocketAddr], shards: u32) -> Assignment {
    let peer = |(n, address): (u32, &SocketAddr)| Peer {
        host_key: None,
        device: "cpu".to_owned(),
        rank: Rank(n),
        worker: worker_of(Rank(n)),
        host: address.ip().to_string(),
        addresses: vec![*address],
    };
    Assignment {
        job: JobId(column as u64),
        generation: Generation(1),
        rank,
        placement: Placement::even(shards, addresses.len() as u32),
        peers: (0..).zip(addresses).map(peer).collect(),
        file: String::new(),
        toml: String::new(),
        datasets: Vec::new(),
        resume: Resumption::Fresh,
    }
}

/// The worker that has `rank`.
pub(super) fn worker_of(rank: Rank) -> WorkerId {
    WorkerId(u64::from(rank.0))
}

fn measure(runtime: &Runtime, out: &mut pipe::Sender, plan: &Plan, ways: &mut [Way]) -> Result<()> {
    tracing::info!("measuring");
    for (size_index, &size) in plan.sizes.iter().enumerate() {
        let Some(first) = ways.first() else { return Ok(()) };
        let payload = Payload::new(first.group(), size);
        let mut counts = Vec::new();
        for way in ways.iter_mut() {
            counts.push(way.prepare(&payload, plan.effort)?);
        }
        let mut times = vec![Vec::new(); ways.len()];
        for round in 0..ROUNDS {
            for ((way, &count), times) in ways.iter_mut().zip(&counts).zip(&mut times) {
                for _ in count * round / ROUNDS..count * (round + 1) / ROUNDS {
                    times.push(way.once(&payload)?.as_nanos() as u64);
                }
            }
        }
        for (column, nanoseconds) in times.into_iter().enumerate() {
            let (size, column) = (size_index as u32, column as u32);
            runtime.block_on(write_frame(out, &FromRank::Measured { size, column, nanoseconds }))?;
        }
    }
    Ok(())
}
