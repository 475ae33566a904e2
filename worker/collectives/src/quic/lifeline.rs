//! A TCP connection beside each QUIC connection, on which nothing is said.
//!
//! QUIC lives in the peer's process and dies with it, without a word after `kill -9`. TCP lives in the peer's kernel,
//! which closes the connection of a process that ends, however it ends. A stopped process keeps it.
//!
//! A worker listens on TCP where it listens on UDP. Whoever accepts a QUIC connection sends a random secret over it; whoever
//! has dialled connects to the same address and port over TCP and says the secret, which ties the two together. Where
//! a firewall lets only UDP through there is no lifeline, and the probe by ICMP remains (`watch.rs`).

use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// What ties a TCP connection to a QUIC connection. All zeros: no lifeline is wanted.
pub(super) type Secret = [u8; 16];

/// How long a TCP connection may take, and then the secret on it: several round trips, and a lost packet or two.
const PATIENCE: Duration = Duration::from_secs(5);

/// TCP connections that have not said their secret yet. Further ones are closed at once.
const STRANGERS: usize = 64;

/// The secrets whose TCP connections are awaited.
#[derive(Debug, Default)]
struct Awaited(Mutex<HashMap<Secret, oneshot::Sender<TcpStream>>>);

/// Where a worker's lifelines arrive.
#[derive(Debug)]
pub(super) struct Landing {
    awaited: Arc<Awaited>,
    listens: AbortHandle,
}

impl Landing {
    /// Listens on `address`, in the background of the current runtime.
    pub(super) fn listen(address: SocketAddr) -> std::io::Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let awaited = Arc::new(Awaited::default());
        let (arrivals, strangers) = (awaited.clone(), Arc::new(Semaphore::new(STRANGERS)));
        let listens = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    // No descriptor is free, say; the peer is watched in the other way.
                    tokio::time::sleep(PATIENCE / 10).await;
                    continue;
                };
                if let Ok(stranger) = strangers.clone().try_acquire_owned() {
                    let arrivals = arrivals.clone();
                    tokio::spawn(async move {
                        arrivals.admit(stream).await;
                        drop(stranger);
                    });
                }
            }
        });
        Ok(Self { awaited, listens: listens.abort_handle() })
    }

    /// A new secret for a peer, and the lifeline that it brings.
    pub(super) fn invite(&self) -> (Secret, Lifeline) {
        let mut secret = Secret::default();
        if getrandom::fill(&mut secret).is_err() {
            return (Secret::default(), Lifeline::none());
        }
        let (arrives, arrival) = oneshot::channel();
        self.awaited.0.lock().insert(secret, arrives);
        let invitation = Invitation { awaited: self.awaited.clone(), secret, arrival };
        (secret, Lifeline(Some(Way::Awaited(invitation))))
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.listens.abort();
    }
}

impl Awaited {
    /// Hands `stream` to whoever awaits the secret that is said on it.
    async fn admit(&self, mut stream: TcpStream) {
        let mut secret = Secret::default();
        if let Ok(Ok(_)) = timeout(PATIENCE, stream.read_exact(&mut secret)).await
            && let Some(arrives) = self.0.lock().remove(&secret)
        {
            // Whoever awaited it may have gone meanwhile.
            let _ = arrives.send(stream);
        }
    }
}

/// A lifeline, made or still to be made.
#[derive(Debug)]
pub(super) struct Lifeline(Option<Way>);

#[derive(Debug)]
enum Way {
    /// The peer connects.
    Awaited(Invitation),
    /// This side connects.
    Dialled(SocketAddr, Secret),
}

#[derive(Debug)]
struct Invitation {
    awaited: Arc<Awaited>,
    secret: Secret,
    arrival: oneshot::Receiver<TcpStream>,
}

impl Drop for Invitation {
    fn drop(&mut self) {
        self.awaited.0.lock().remove(&self.secret);
    }
}

impl Lifeline {
    /// None, for a peer that listens on UDP only.
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// The one that the peer at `address` has asked for.
    pub(super) fn to(address: SocketAddr, secret: Secret) -> Self {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        Self((secret != Secret::default()).then_some(Way::Dialled(address, secret)))
    }

    /// Returns when the lifeline has been made and breaks; never, where there is none.
    pub(super) async fn broken(self) {
        let made = match self.0 {
            Some(Way::Awaited(mut invitation)) => (&mut invitation.arrival).await.ok(),
            Some(Way::Dialled(address, secret)) => connect(address, secret).await,
            None => None,
        };
        match made {
            // Nobody says anything on it; what comes is its end, or an error, or somebody who breaks the protocol.
            Some(mut stream) => drop(stream.read(&mut [0]).await),
            None => std::future::pending().await,
        }
    }
}

async fn connect(address: SocketAddr, secret: Secret) -> Option<TcpStream> {
    let made = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(&secret).await?;
        Ok::<_, std::io::Error>(stream)
    };
    let made = timeout(PATIENCE, made).await.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
    made.inspect_err(|error| tracing::debug!("no lifeline over TCP to {address}: {error}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn landing() -> (Landing, SocketAddr) {
        let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = probe.local_addr().unwrap();
        drop(probe);
        (Landing::listen(address).unwrap(), address)
    }

    #[tokio::test]
    async fn a_lifeline_breaks_with_the_other_end_and_not_before() {
        let (landing, address) = landing();
        let (secret, here) = landing.invite();
        let mut here = tokio::spawn(here.broken());
        let there = tokio::spawn(Lifeline::to(address, secret).broken());
        assert!(timeout(Duration::from_millis(300), &mut here).await.is_err());
        assert!(!there.is_finished() && landing.awaited.0.lock().is_empty());
        there.abort();
        timeout(PATIENCE, here).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_stranger_who_does_not_know_the_secret_is_nobodys_lifeline() {
        let (landing, address) = landing();
        let (secret, here) = landing.invite();
        let mut here = tokio::spawn(here.broken());
        let mut wrong = secret;
        wrong[0] ^= 1;
        let mut stranger = connect(address, wrong).await.unwrap();
        // It is closed, and the other one still awaited.
        assert!(matches!(stranger.read(&mut [0]).await, Ok(0) | Err(_)));
        assert!(landing.awaited.0.lock().contains_key(&secret));
        assert!(timeout(Duration::from_millis(50), &mut here).await.is_err());
        here.abort();
        let _ = here.await;
        assert!(landing.awaited.0.lock().is_empty());
    }

    #[tokio::test]
    async fn without_a_lifeline_nothing_breaks() {
        let (landing, address) = landing();
        drop(landing);
        for lifeline in
            [Lifeline::none(), Lifeline::to(address, Secret::default()), Lifeline::to(address, [1; 16])]
        {
            assert!(timeout(Duration::from_millis(50), lifeline.broken()).await.is_err());
        }
    }
}
