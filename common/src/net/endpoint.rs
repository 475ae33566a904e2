//! QUIC endpoints and their TLS configurations.

use super::NetError;
use super::authority::Identity;
use super::pinned::PinnedAuthority;
use super::reset;
use super::socket::{self, GatheringSocket, MAX_DATAGRAM_BYTES};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, Endpoint, EndpointConfig, IdleTimeout, ServerConfig, TokioRuntime, TransportConfig, VarInt,
};
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::server::WebPkiClientVerifier;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// The application protocol. It never changes: versions are told apart in the preamble of each stream, where
/// both sides can say so in words.
pub const ALPN: &[u8] = b"lockstep";

/// ring's suites, AES-128 first: a fifth faster than AES-256 and as far out of anybody's reach.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|&suite| suite != TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

fn bad(e: impl std::fmt::Display) -> NetError {
    NetError::Certificate(e.to_string())
}

fn roots(identity: &Identity) -> Result<Arc<RootCertStore>, NetError> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.ca().clone()).map_err(bad)?;
    Ok(Arc::new(roots))
}

/// Opens a UDP socket at `address` and an endpoint on it. With a `server`, it also accepts.
pub fn bind(address: SocketAddr, server: Option<ServerConfig>) -> Result<Endpoint, NetError> {
    open(address, server, EndpointConfig::default())
}

/// [`bind`] for a process that accepts as `identity`: its peers learn at once when it has been restarted.
pub fn bind_as(identity: &Identity, address: SocketAddr, server: ServerConfig) -> Result<Endpoint, NetError> {
    open(address, Some(server), reset::endpoint_config(identity))
}

fn open(
    address: SocketAddr,
    server: Option<ServerConfig>,
    mut datagrams: EndpointConfig,
) -> Result<Endpoint, NetError> {
    let open = move || {
        datagrams.max_udp_payload_size(MAX_DATAGRAM_BYTES).map_err(std::io::Error::other)?;
        let socket = GatheringSocket::start(socket::open(address)?)?;
        Endpoint::new_with_abstract_socket(datagrams, server, socket, Arc::new(TokioRuntime))
    };
    open().map_err(|source: std::io::Error| {
        let hint = match source.kind() {
            std::io::ErrorKind::AddrInUse => {
                "; another process has this port: choose another or stop that one"
            }
            std::io::ErrorKind::AddrNotAvailable => "; this machine has no such address",
            std::io::ErrorKind::PermissionDenied => "; choose a port above 1023",
            _ => "",
        };
        NetError::Bind { address, source, hint }
    })
}

/// Accepts members of the cluster. With `enrolment`, also newcomers without a certificate, for whom the caller must
/// answer nothing but an enrolment.
pub fn server_config(identity: &Identity, enrolment: bool) -> Result<ServerConfig, NetError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(identity)?, provider());
    let verifier = if enrolment { verifier.allow_unauthenticated() } else { verifier };
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(bad)?
        .with_client_cert_verifier(verifier.build().map_err(bad)?)
        .with_single_cert(identity.chain(), identity.private_key())
        .map_err(bad)?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).map_err(bad)?));
    config.transport_config(Arc::new(transport()?));
    Ok(config)
}

/// Calls members of the cluster as `identity`.
pub fn client_config(identity: &Identity) -> Result<ClientConfig, NetError> {
    let tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(bad)?
        .with_root_certificates(roots(identity)?)
        .with_client_auth_cert(identity.chain(), identity.private_key())
        .map_err(bad)?;
    finish_client(tls)
}

/// Calls the coordinator of the cluster whose CA certificate has this BLAKE3 `fingerprint`, without a certificate.
pub fn enrolment_config(fingerprint: [u8; 32]) -> Result<ClientConfig, NetError> {
    let verifier = PinnedAuthority { fingerprint, provider: provider() };
    let tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(bad)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    finish_client(tls)
}

fn finish_client(mut tls: rustls::ClientConfig) -> Result<ClientConfig, NetError> {
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).map_err(bad)?));
    config.transport_config(Arc::new(transport()?));
    Ok(config)
}

/// How often each side of an idle control connection sends something.
pub const CONTROL_KEEP_ALIVE: Duration = Duration::from_millis(500);

/// Control connections: a silent peer is given up after 6 s, twelve keep-alives.
fn transport() -> Result<TransportConfig, NetError> {
    let mut transport = TransportConfig::default();
    transport.keep_alive_interval(Some(CONTROL_KEEP_ALIVE));
    transport.max_idle_timeout(Some(IdleTimeout::try_from(Duration::from_secs(6)).map_err(bad)?));
    // A worker asks for a few dataset shards at a time; followers of logs hold one stream each.
    transport.max_concurrent_bidi_streams(VarInt::from_u32(256));
    transport.max_concurrent_uni_streams(VarInt::from_u32(16));
    transport.stream_receive_window(VarInt::from_u32(4 << 20));
    transport.receive_window(VarInt::from_u32(16 << 20));
    Ok(transport)
}
