//! Calling a peer, one bidirectional stream per request.

use super::NetError;
use crate::wire::{Refusal, Request, Response, read_frame, read_preamble, write_frame, write_preamble};
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, RecvStream, SendStream};
use std::net::SocketAddr;

/// Connects to the first of `addresses` that answers as `server_name`.
pub async fn connect(
    endpoint: &Endpoint,
    config: &ClientConfig,
    addresses: &[SocketAddr],
    server_name: &str,
) -> Result<Connection, NetError> {
    let mut failure = NetError::Address("nothing".to_owned());
    for &address in addresses {
        let failed = |cause: String| NetError::Connect { address: address.to_string(), cause };
        match endpoint.connect_with(config.clone(), address, server_name) {
            Err(e) => failure = failed(e.to_string()),
            Ok(connecting) => match connecting.await {
                Ok(connection) => return Ok(connection),
                Err(e) => failure = failed(explain(&e)),
            },
        }
    }
    Err(failure)
}

/// A connection error in words that say what to do.
pub fn explain(error: &ConnectionError) -> String {
    let text = error.to_string();
    match error {
        ConnectionError::TimedOut => {
            "nobody answers there; check the address and that the process runs".to_owned()
        }
        ConnectionError::ApplicationClosed(close) => {
            format!("the peer closed the connection: {}", String::from_utf8_lossy(&close.reason))
        }
        ConnectionError::LocallyClosed => "the connection was closed on this side".to_owned(),
        _ if text.contains("OtherCluster") => {
            "the coordinator belongs to another cluster than the token; use a token made by this coordinator"
                .to_owned()
        }
        _ if text.contains("UnknownIssuer")
            || text.contains("unknown CA")
            || text.contains("BadSignature") =>
        {
            "the two sides belong to different clusters (their certificates have different authorities)"
                .to_owned()
        }
        _ if text.contains("application protocol") => "the peer is not a Lockstep process".to_owned(),
        _ => text,
    }
}

/// A request's stream, open for what follows its first answer.
pub struct Exchange {
    /// Towards the peer.
    pub send: SendStream,
    /// From the peer.
    pub recv: RecvStream,
}

impl Exchange {
    /// Opens a stream with `request` on it. Raw bytes may follow before the answer is awaited.
    pub async fn open(connection: &Connection, request: &Request) -> Result<Self, NetError> {
        let (mut send, recv) = connection.open_bi().await.map_err(|e| lost(connection, &e))?;
        write_preamble(&mut send).await?;
        write_frame(&mut send, request).await?;
        Ok(Self { send, recv })
    }

    /// The first answer; a refusal is an error.
    pub async fn answer(&mut self) -> Result<Response, NetError> {
        read_preamble(&mut self.recv).await?;
        self.next_answer().await
    }

    /// A further answer on the same stream.
    pub async fn next_answer(&mut self) -> Result<Response, NetError> {
        match read_frame(&mut self.recv).await? {
            Response::Refused(Refusal { reason, message }) => Err(NetError::Refused { reason, message }),
            response => Ok(response),
        }
    }

    /// Asks `request`, which has nothing to follow, and returns the first answer.
    pub async fn ask(connection: &Connection, request: &Request) -> Result<Response, NetError> {
        let mut exchange = Self::open(connection, request).await?;
        // The peer may have answered and closed its side already; then there is nothing to finish.
        let _ = exchange.send.finish();
        exchange.answer().await
    }
}

fn lost(connection: &Connection, error: &ConnectionError) -> NetError {
    NetError::Connect { address: connection.remote_address().to_string(), cause: explain(error) }
}
