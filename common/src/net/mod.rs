//! Encrypted, mutually authenticated connections inside one cluster.
//!
//! A cluster has its own certificate authority ([`Authority`]). Every process holds a certificate whose one name
//! says what it is ([`Role`]); TLS 1.3 over QUIC checks it in both directions. The only exception is enrolment: a
//! newcomer has no certificate yet and proves itself with a [`crate::token::Token`], after it has checked the
//! coordinator against the CA fingerprint in that token.

mod address;
mod authority;
mod endpoint;
mod liveness;
mod pinned;
mod request;
mod reset;
mod socket;

pub use address::{facing, host_key, interface_addresses, resolve};
pub use authority::{Authority, Identity, Role, SigningRequest, peer_role};
pub use endpoint::{ALPN, CONTROL_KEEP_ALIVE, bind, bind_as, client_config, enrolment_config, server_config};
pub use liveness::{port_is_closed, process_ended};
pub use request::{Exchange, connect, explain};
pub use socket::receive_buffer_bytes;

use thiserror::Error;

/// Why a connection, a certificate or an address is of no use.
#[derive(Debug, Error)]
pub enum NetError {
    /// A key or certificate could not be made or read.
    #[error("certificate error: {0}")]
    Certificate(String),
    /// A key file could not be read or written.
    #[error(transparent)]
    File(#[from] crate::durable::FileError),
    /// The UDP port could not be opened.
    #[error("cannot listen on {address}: {source}{hint}")]
    Bind {
        /// The address asked for.
        address: std::net::SocketAddr,
        /// The cause.
        source: std::io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// A host name has no address.
    #[error(
        "`{0}` has no address: write it as `10.0.0.1:7777` or `host:7777`, with a host that can be found"
    )]
    Address(String),
    /// Nobody answered, or the peer was refused or refused us.
    #[error("cannot connect to {address}: {cause}")]
    Connect {
        /// Whom we called.
        address: String,
        /// What went wrong, for people.
        cause: String,
    },
    /// The peer refused the request.
    #[error("{message}")]
    Refused {
        /// The refusal's word for programs, such as `unknown_worker`; see [`crate::wire::Refusal`].
        reason: String,
        /// One line for people.
        message: String,
    },
    /// The peer's message was not understood, or the connection broke.
    #[error(transparent)]
    Frame(#[from] crate::wire::FrameError),
    /// The peer answered something else than was asked.
    #[error("the peer gave an answer that does not fit the question")]
    UnexpectedAnswer,
}
