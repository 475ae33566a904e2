//! Finding addresses: of a named host, and of this host as others may reach it.

use super::NetError;
use crate::ids::HostKey;
use crate::wire::{InterfaceAddress, MAX_ADDRESSES};
use if_addrs::{IfAddr, IfOperStatus, Interface};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::unix::fs::MetadataExt;

/// The addresses of `host:port`.
pub fn resolve(address: &str) -> Result<Vec<SocketAddr>, NetError> {
    let found: Vec<_> =
        address.to_socket_addrs().map_err(|_| NetError::Address(address.to_owned()))?.collect();
    if found.is_empty() { Err(NetError::Address(address.to_owned())) } else { Ok(found) }
}

/// The address by which this host reaches `peer`, which is the one that its network knows it by.
///
/// It asks the routing table by connecting a UDP socket; nothing is sent.
pub fn facing(peer: SocketAddr) -> Option<IpAddr> {
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let any: IpAddr = if peer.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
    let socket = UdpSocket::bind((any, 0)).and_then(|s| s.connect(peer).and_then(|()| s.local_addr()));
    socket.map(|own| own.ip()).ok()
}

/// Where an endpoint bound to `bound` can be reached, by interface: first the address that faces `peer`, then the
/// others, loopback last. Without link-local addresses, which mean nothing on another link.
pub fn interface_addresses(bound: SocketAddr, peer: SocketAddr) -> Vec<InterfaceAddress> {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_else(|error| {
        tracing::warn!(
            "cannot list the network interfaces: {error}; offering the address that faces {peer} only"
        );
        Vec::new()
    });
    usable(&interfaces, bound, facing(peer))
}

fn usable(interfaces: &[Interface], bound: SocketAddr, facing: Option<IpAddr>) -> Vec<InterfaceAddress> {
    let any = bound.ip().is_unspecified();
    let listens = |ip: IpAddr| if any { bound.is_ipv6() || ip.is_ipv4() } else { ip == bound.ip() };
    let mut found: Vec<_> = interfaces
        .iter()
        .filter(|i| !matches!(i.oper_status, IfOperStatus::Down | IfOperStatus::NotPresent))
        .filter(|i| listens(i.ip()) && !i.is_link_local())
        .map(|i| InterfaceAddress {
            address: SocketAddr::new(i.ip(), bound.port()),
            interface: i.name.clone(),
            prefix_bits: match &i.addr {
                IfAddr::V4(v4) => v4.prefixlen,
                IfAddr::V6(v6) => v6.prefixlen,
            },
        })
        .collect();
    let fallback = if any { facing } else { Some(bound.ip()) };
    if let Some(ip) = fallback.filter(|ip| found.iter().all(|f| f.address.ip() != *ip)) {
        let prefix_bits = if ip.is_ipv4() { 32 } else { 128 };
        let address = SocketAddr::new(ip, bound.port());
        found.push(InterfaceAddress { address, interface: String::new(), prefix_bits });
    }
    found.sort_by_key(|f| (facing != Some(f.address.ip()), f.address.ip().is_loopback()));
    found.truncate(MAX_ADDRESSES);
    found
}

/// The key of this host. Equal for two processes exactly if they can share memory: they have one running kernel, one
/// network namespace, which Unix sockets' names belong to, and one user of one user namespace. `None` where the kernel
/// does not tell.
pub fn host_key() -> Option<HostKey> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = |kind| Some(std::fs::metadata(format!("/proc/self/ns/{kind}")).ok()?.ino());
    let (network, users) = (namespace("net")?, namespace("user")?);
    let user = rustix::process::geteuid().as_raw();
    Some(HostKey(format!("{}:{network}:{users}:{user}", boot.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use if_addrs::{Ifv4Addr, Ifv6Addr};

    fn interface(name: &str, address: &str, prefixlen: u8) -> Interface {
        let addr = match address.parse().unwrap() {
            IpAddr::V4(ip) => {
                IfAddr::V4(Ifv4Addr { ip, netmask: [0, 0, 0, 0].into(), prefixlen, broadcast: None })
            }
            IpAddr::V6(ip) => {
                IfAddr::V6(Ifv6Addr { ip, netmask: [0u16; 8].into(), prefixlen, broadcast: None })
            }
        };
        let oper_status = IfOperStatus::Up;
        Interface { name: name.to_owned(), addr, index: None, oper_status, is_p2p: false }
    }

    fn check(bound: &str, facing: &str, expected: &[&str]) {
        let mut down = interface("eth9", "10.9.0.1", 24);
        down.oper_status = IfOperStatus::Down;
        let interfaces = [
            interface("lo", "127.0.0.1", 8),
            interface("lo", "::1", 128),
            interface("eth0", "10.0.0.5", 24),
            interface("eth0", "fe80::5", 64),
            interface("eth1", "192.168.7.5", 16),
            interface("eth1", "2001:db8::5", 64),
            interface("eth2", "169.254.1.1", 16),
            down,
        ];
        let found = usable(&interfaces, bound.parse().unwrap(), facing.parse().ok());
        let words: Vec<_> =
            found.iter().map(|f| format!("{} {}/{}", f.interface, f.address, f.prefix_bits)).collect();
        assert_eq!(words, expected, "{bound}, facing {facing}");
    }

    #[test]
    fn all_usable_addresses_are_offered_the_one_that_faces_the_coordinator_first() {
        check(
            "0.0.0.0:7",
            "192.168.7.5",
            &["eth1 192.168.7.5:7/16", "eth0 10.0.0.5:7/24", "lo 127.0.0.1:7/8"],
        );
        check("0.0.0.0:7", "127.0.0.1", &["lo 127.0.0.1:7/8", "eth0 10.0.0.5:7/24", "eth1 192.168.7.5:7/16"]);
        let six = [
            "eth0 10.0.0.5:7/24",
            "eth1 192.168.7.5:7/16",
            "eth1 [2001:db8::5]:7/64",
            "lo 127.0.0.1:7/8",
            "lo [::1]:7/128",
        ];
        check("[::]:7", "10.0.0.5", &six);
    }

    #[test]
    fn an_endpoint_on_one_address_offers_that_one() {
        check("10.0.0.5:7", "192.168.7.5", &["eth0 10.0.0.5:7/24"]);
        check("127.0.0.1:7", "127.0.0.1", &["lo 127.0.0.1:7/8"]);
        check("172.16.0.1:7", "10.0.0.5", &[" 172.16.0.1:7/32"]);
    }

    #[test]
    fn processes_of_one_host_have_one_key() {
        let key = host_key().unwrap();
        assert_eq!(Some(&key), host_key().as_ref());
        assert!(key.0.split(':').count() == 4 && key.0.chars().all(|c| c.is_ascii_graphic()), "{key:?}");
    }
}
