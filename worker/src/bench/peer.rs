//! A second host: invited by a one-time secret, its ranks led over one connection.

use super::args::{AllreduceArgs, MAX_RANKS};
use super::lead::{ended, start_rank};
use super::talk::{FromRank, Join, Welcome};
use anyhow::{Context, Result, anyhow, bail};
use lockstep_common::net::{
    Authority, Role, bind, connect, enrolment_config, explain, resolve, server_config,
};
use lockstep_common::one_line::one_line;
use lockstep_common::token::Token;
use lockstep_common::wire::{read_frame, read_preamble, write_frame, write_preamble};
use quinn::{Connection, ConnectionError, Endpoint, RecvStream, SendStream, VarInt};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Close codes of the connection between the two hosts.
const DONE: VarInt = VarInt::from_u32(0);
const FAILED: VarInt = VarInt::from_u32(1);

/// How long a caller may take to show its secret, and a closing connection to say so.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where a second host comes in.
pub(super) struct Door {
    endpoint: Endpoint,
    listen: SocketAddr,
    secret: blake3::Hash,
}

/// The other host, admitted.
pub(super) struct SecondHost {
    endpoint: Endpoint,
    pub(super) connection: Connection,
    /// How many ranks it brings.
    pub(super) ranks: u32,
    /// This host's address as the other one knows it.
    pub(super) here: IpAddr,
    /// Its address as this host knows it.
    pub(super) there: IpAddr,
}

impl Door {
    /// Listens, and prints what to type on the other host.
    pub(super) fn open(authority: &Authority, listen: SocketAddr) -> Result<Self> {
        let identity = authority.issue(Role::Coordinator)?;
        let endpoint = bind(listen, Some(server_config(&identity, true)?))?;
        let token = Token::generate(authority.certificate())
            .map_err(|error| anyhow!("the system gives no random numbers: {error}"))?;
        let port = endpoint.local_addr()?.port();
        let address = match listen.ip() {
            ip if ip.is_unspecified() => format!("THIS-HOST:{port}"),
            ip => SocketAddr::new(ip, port).to_string(),
        };
        eprintln!("on the other host: worker bench allreduce --peer {address} --secret {token}");
        Ok(Self { endpoint, listen, secret: blake3::hash(&token.secret) })
    }

    /// Waits for a caller that knows the secret; turns others away.
    pub(super) async fn await_host(self, ranks_here: u32) -> Result<SecondHost> {
        loop {
            let incoming = self.endpoint.accept().await.context("the port was closed")?;
            let from = incoming.remote_address();
            match timeout(PATIENCE, self.admit(incoming, ranks_here)).await {
                Ok(Ok((connection, ranks))) => {
                    let here = match self.listen.ip() {
                        ip if !ip.is_unspecified() => ip,
                        _ => connection
                            .local_ip()
                            .context("this system does not tell which address was called")?,
                    };
                    let there = connection.remote_address().ip();
                    return Ok(SecondHost { endpoint: self.endpoint, connection, ranks, here, there });
                }
                Ok(Err(error)) => eprintln!("refused {from}: {}", one_line(error.chain())),
                Err(_) => eprintln!("refused {from}: it did not show its secret in time"),
            }
        }
    }

    async fn admit(&self, incoming: quinn::Incoming, ranks_here: u32) -> Result<(Connection, u32)> {
        let connection = incoming.await.map_err(|error| anyhow!(explain(&error)))?;
        let (mut send, mut recv) = connection.accept_bi().await.map_err(|error| anyhow!(explain(&error)))?;
        write_preamble(&mut send).await?;
        read_preamble(&mut recv).await?;
        let join: Join = read_frame(&mut recv).await?;
        // The comparison of two `blake3::Hash` takes the same time wherever they differ.
        let refusal = if blake3::hash(&join.secret) != self.secret {
            Some("the secret is not this benchmark's".to_owned())
        } else if join.ranks == 0 || join.ranks > MAX_RANKS - ranks_here.min(MAX_RANKS) {
            Some(format!("{ranks_here} and {} ranks: a benchmark has at most {MAX_RANKS}", join.ranks))
        } else {
            None
        };
        let Some(refusal) = refusal else {
            write_frame(&mut send, &Welcome::Accepted).await?;
            return Ok((connection, join.ranks));
        };
        write_frame(&mut send, &Welcome::Refused(refusal.clone())).await?;
        // The caller hangs up once it has read why.
        connection.closed().await;
        bail!(refusal)
    }
}

impl SecondHost {
    /// Tells the other host how it ended.
    pub(super) async fn dismiss(self, failure: Option<&anyhow::Error>) {
        match failure {
            None => self.connection.close(DONE, b""),
            Some(error) => self.connection.close(FAILED, one_line(error.chain()).as_bytes()),
        }
        // A host that is gone hears nothing.
        let _ = timeout(PATIENCE, self.endpoint.wait_idle()).await;
    }
}

/// The other host's side: starts this host's ranks and passes on what they and the leader say.
pub(super) async fn follow(leader: &str, args: &AllreduceArgs) -> Result<()> {
    let token: Token = args.secret.as_deref().unwrap_or_default().parse().map_err(|_| {
        anyhow!("this is not a whole secret; copy the line that `worker bench allreduce --listen` printed")
    })?;
    let addresses = resolve(leader)?;
    let any: IpAddr = if addresses[0].is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
    let endpoint = bind(SocketAddr::new(any, 0), None)?;
    let config = enrolment_config(token.ca)?;
    let connection = connect(&endpoint, &config, &addresses, &Role::Coordinator.server_name()).await?;
    let result = follow_on(&connection, &token, args.ranks_here()).await;
    connection.close(DONE, b"");
    let _ = timeout(PATIENCE, endpoint.wait_idle()).await;
    result
}

async fn follow_on(connection: &Connection, token: &Token, ranks: u32) -> Result<()> {
    let (mut send, mut recv) = connection.open_bi().await.map_err(|error| anyhow!(explain(&error)))?;
    write_preamble(&mut send).await?;
    write_frame(&mut send, &Join { secret: token.secret, ranks }).await?;
    read_preamble(&mut recv).await?;
    if let Welcome::Refused(why) = read_frame(&mut recv).await? {
        bail!("the other host refused: {why}");
    }
    let mut relays = JoinSet::new();
    for _ in 0..ranks {
        let (send, recv) = connection.open_bi().await.map_err(|error| anyhow!(explain(&error)))?;
        relays.spawn(relay(send, recv)?);
    }
    // The leader hangs up when all is measured, or has failed; the ranks end with this process.
    match connection.closed().await {
        ConnectionError::ApplicationClosed(close) if close.error_code == DONE => Ok(()),
        ConnectionError::ApplicationClosed(close) => bail!("{}", String::from_utf8_lossy(&close.reason)),
        other => bail!("the host that leads is gone: {}", explain(&other)),
    }
}

/// Starts a rank; the future carries its words to the leader and back until it ends.
fn relay(mut send: SendStream, mut recv: RecvStream) -> Result<impl Future<Output = ()> + Send> {
    let (child, mut input, mut output) = start_rank()?;
    Ok(async move {
        let orders = tokio::spawn(async move { tokio::io::copy(&mut recv, &mut input).await });
        let carried = tokio::io::copy(&mut output, &mut send).await;
        let how = ended(child).await;
        orders.abort();
        if carried.is_ok() {
            // Read only by a leader that still waits for this rank's last words.
            let _ = write_frame(&mut send, &FromRank::Failed { message: how }).await;
            let _ = send.shutdown().await;
        }
    })
}
