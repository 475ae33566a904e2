//! Finding addresses: of a named host, and of this host as others may reach it.

use super::NetError;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};

/// The addresses of `host:port`.
pub fn resolve(address: &str) -> Result<Vec<SocketAddr>, NetError> {
    let found: Vec<_> =
        address.to_socket_addrs().map_err(|_| NetError::Address(address.to_owned()))?.collect();
    if found.is_empty() { Err(NetError::Address(address.to_owned())) } else { Ok(found) }
}

/// The address by which this host reaches `peer`, which is the one that its network knows it by.
///
/// It asks the routing table by connecting a UDP socket; nothing is sent.
pub fn local_addresses(peer: SocketAddr, port: u16) -> Vec<SocketAddr> {
    let any: IpAddr = if peer.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
    UdpSocket::bind((any, 0))
        .and_then(|s| s.connect(peer).and_then(|()| s.local_addr()))
        .map(|a| vec![SocketAddr::new(a.ip(), port)])
        .unwrap_or_default()
}
