//! Which address of one worker another one is to use.

use crate::words;
use lockstep_common::wire::{InterfaceAddress, Register};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// How an address was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Its user said so (`--advertise`).
    Advertised,
    /// Both workers are on one host.
    SameHost,
    /// Both hosts have an interface in its subnet.
    SharedSubnet,
    /// They have no such subnet: it is up to the routers between them.
    Routed,
}

/// An address to try.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// The address.
    pub address: SocketAddr,
    /// The interface that has it; empty for an advertised one.
    pub interface: String,
    /// How it was chosen.
    pub way: Way,
}

/// The addresses at which `from` is to try to reach `to`, best first.
///
/// What `to` advertises is taken as it is. Otherwise those in a subnet that both have come first, and among equals
/// `to`'s own order decides. Left out are addresses that cannot lead to `to`: loopback of another host, one that
/// `from` has itself (such as that of a bridge for containers), and one of a family that `from` has no address of. If
/// all are left out, all are tried: the attempt names them.
pub fn routes(from: &Register, to: &Register) -> Vec<Route> {
    if !to.advertised.is_empty() {
        let advertised = |&address| Route { address, interface: String::new(), way: Way::Advertised };
        return to.advertised.iter().map(advertised).collect();
    }
    let same_host = from.host_key.is_some() && from.host_key == to.host_key;
    let route = |to: &InterfaceAddress| {
        let way = match (same_host, from.addresses.iter().any(|own| share_subnet(own, to))) {
            (true, _) => Way::SameHost,
            (false, true) => Way::SharedSubnet,
            (false, false) => Way::Routed,
        };
        Route { address: to.address, interface: to.interface.clone(), way }
    };
    let leads_there = |to: &&InterfaceAddress| {
        let ip = to.address.ip();
        from.addresses.is_empty()
            || from.addresses.iter().any(|own| own.address.ip().is_ipv4() == ip.is_ipv4())
                && (same_host || !ip.is_loopback() && from.addresses.iter().all(|own| own.address.ip() != ip))
    };
    let mut found: Vec<_> = to.addresses.iter().filter(leads_there).map(route).collect();
    if found.is_empty() {
        found = to.addresses.iter().map(route).collect();
    }
    found.sort_by_key(|route| route.way);
    found
}

fn share_subnet(own: &InterfaceAddress, other: &InterfaceAddress) -> bool {
    let ip = |a: &InterfaceAddress| -> IpAddr { a.address.ip() };
    own.subnet_has(ip(other)) && other.subnet_has(ip(own))
}

/// For the log: at which address each of `ranks`, given by name and introduction, is reached by the others first.
pub(crate) fn pairing(ranks: &[(String, Option<&Register>)]) -> Vec<String> {
    let line = |(to, (name, register)): (usize, &(String, Option<&Register>))| {
        let mut chosen: BTreeMap<(SocketAddr, String), BTreeMap<Way, Vec<u32>>> = BTreeMap::new();
        for (from, (_, other)) in ranks.iter().enumerate().filter(|(from, _)| *from != to) {
            if let Some(first) = other.zip(*register).and_then(|(f, t)| routes(f, t).into_iter().next()) {
                let ways = chosen.entry((first.address, first.interface)).or_default();
                ways.entry(first.way).or_default().push(from as u32);
            }
        }
        let places: Vec<_> = chosen.iter().map(|(place, ways)| describe(place, ways)).collect();
        match places.is_empty() {
            true => format!("rank {to} ({name}) has told no address"),
            false => format!("rank {to} ({name}) at {}", places.join(" and at ")),
        }
    };
    let apart = ranks.iter().enumerate().filter_map(|(to, (name, register))| {
        let twin = |(_, other): &(usize, &(String, Option<&Register>))| is_apart(other.1, *register);
        let (from, _) = ranks.iter().enumerate().take(to).find(twin)?;
        Some(format!(
            "rank {to} ({name}) is on the machine of rank {from}, and in another network namespace or of another user: they \
             share no memory"
        ))
    });
    ranks.iter().enumerate().map(line).chain(apart).collect()
}

/// Whether two workers are on one running machine and cannot share memory all the same.
fn is_apart(one: Option<&Register>, other: Option<&Register>) -> bool {
    let keys = one.and_then(|r| r.host_key.as_ref()).zip(other.and_then(|r| r.host_key.as_ref()));
    keys.is_some_and(|(one, other)| one != other && one.machine() == other.machine())
}

fn describe((address, interface): &(SocketAddr, String), ways: &BTreeMap<Way, Vec<u32>>) -> String {
    let why = ways.iter().map(|(way, users)| match way {
        Way::Advertised => "advertised".to_owned(),
        Way::SameHost => format!("host shared with {}", words::ranks(users)),
        Way::SharedSubnet => format!("subnet shared with {}", words::ranks(users)),
        Way::Routed => format!("no subnet shared with {}", words::ranks(users)),
    });
    let interface = (!interface.is_empty()).then(|| interface.clone());
    let parts: Vec<_> = interface.into_iter().chain(why).collect();
    format!("{address} ({})", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::ids::HostKey;

    /// A worker on `host` with addresses such as `eth0 10.0.0.5/24`, all at port 7.
    fn worker(host: &str, addresses: &[&str]) -> Register {
        let address = |text: &&str| {
            let (interface, network) = text.split_once(' ').unwrap();
            let (ip, prefix) = network.split_once('/').unwrap();
            InterfaceAddress {
                address: SocketAddr::new(ip.parse().unwrap(), 7),
                interface: interface.to_owned(),
                prefix_bits: prefix.parse().unwrap(),
            }
        };
        Register {
            host: host.to_owned(),
            device: "cpu".to_owned(),
            threads: 1,
            host_key: (!host.is_empty()).then(|| HostKey(host.to_owned())),
            addresses: addresses.iter().map(address).collect(),
            advertised: Vec::new(),
            metrics: None,
            running: None,
            held: None,
        }
    }

    fn check(from: &Register, to: &Register, expected: &[&str]) {
        let words: Vec<_> =
            routes(from, to).iter().map(|r| format!("{} {:?}", r.address.ip(), r.way)).collect();
        assert_eq!(words, expected, "{:?} to {:?}", from.addresses, to.addresses);
    }

    #[test]
    fn shared_subnets_come_first_and_the_workers_own_order_decides_between_equals() {
        let to =
            worker("b", &["eth0 10.0.0.2/24", "eth1 192.168.1.2/24", "ib0 10.8.0.2/16", "lo 127.0.0.1/8"]);
        check(
            &worker("a", &["eth5 192.168.1.9/24", "lo 127.0.0.1/8"]),
            &to,
            &["192.168.1.2 SharedSubnet", "10.0.0.2 Routed", "10.8.0.2 Routed"],
        );
        check(
            &worker("a", &["ib0 10.8.3.4/16", "eth0 10.0.0.1/24"]),
            &to,
            &["10.0.0.2 SharedSubnet", "10.8.0.2 SharedSubnet", "192.168.1.2 Routed"],
        );
        check(
            &worker("a", &["eth0 172.16.0.1/24"]),
            &to,
            &["10.0.0.2 Routed", "192.168.1.2 Routed", "10.8.0.2 Routed"],
        );
    }

    #[test]
    fn a_subnet_is_shared_only_if_both_sides_see_it() {
        let to = worker("b", &["eth0 10.1.0.2/24", "eth1 10.2.0.2/8"]);
        check(&worker("a", &["eth0 10.2.9.9/8"]), &to, &["10.2.0.2 SharedSubnet", "10.1.0.2 Routed"]);
    }

    #[test]
    fn loopback_is_for_the_same_host_only() {
        let addresses = ["eth0 10.0.0.2/24", "lo 127.0.0.1/8"];
        let to = worker("b", &addresses);
        check(&worker("b", &addresses), &to, &["10.0.0.2 SameHost", "127.0.0.1 SameHost"]);
        check(&worker("a", &["eth0 10.0.0.1/24", "lo 127.0.0.1/8"]), &to, &["10.0.0.2 SharedSubnet"]);
        // Whoever cannot tell its host shares it with nobody.
        check(&worker("", &["eth0 10.0.0.1/24"]), &worker("", &addresses), &["10.0.0.2 SharedSubnet"]);
    }

    #[test]
    fn addresses_that_cannot_lead_there_are_left_out_unless_there_is_no_other() {
        let bridge = "docker0 172.17.0.1/16";
        let to = worker("b", &[bridge, "eth0 10.0.0.2/24", "eth0 2001:db8::2/64"]);
        check(&worker("a", &["eth0 10.5.0.1/24", bridge]), &to, &["10.0.0.2 Routed"]);
        check(&worker("a", &["eth0 2001:db8::1/64"]), &to, &["2001:db8::2 SharedSubnet"]);
        check(
            &worker("a", &["eth0 10.5.0.1/24"]),
            &worker("b", &["eth0 2001:db8::2/64"]),
            &["2001:db8::2 Routed"],
        );
    }

    #[test]
    fn what_is_advertised_is_taken_as_it_is() {
        let mut to = worker("b", &["eth0 10.0.0.2/24"]);
        to.advertised = vec!["198.51.100.7:9".parse().unwrap(), "10.0.0.2:9".parse().unwrap()];
        check(&worker("a", &["eth0 10.0.0.1/24"]), &to, &["198.51.100.7 Advertised", "10.0.0.2 Advertised"]);
    }

    #[test]
    fn the_log_says_who_meets_where() {
        let mut d = worker("d", &["eth0 10.0.0.4/24"]);
        d.advertised = vec!["198.51.100.7:9".parse().unwrap()];
        let a = worker("a", &["eth0 10.0.0.1/24", "lo 127.0.0.1/8"]);
        let b = worker("b", &["eth0 10.0.0.2/24", "eth1 192.168.1.2/24"]);
        let c = worker("c", &["eth1 192.168.1.3/24"]);
        let ranks =
            [("w1 on a", Some(&a)), ("w2 on a", Some(&a)), ("w3 on b", Some(&b)), ("w4 on c", Some(&c))];
        let rest = [("w5 on d", Some(&d)), ("w6 on ?", None)];
        let ranks: Vec<_> = ranks.iter().chain(&rest).map(|(name, r)| ((*name).to_owned(), *r)).collect();
        assert_eq!(
            pairing(&ranks),
            [
                "rank 0 (w1 on a) at 10.0.0.1:7 (eth0, host shared with rank 1, subnet shared with ranks 2, 4, no subnet \
             shared with rank 3)",
                "rank 1 (w2 on a) at 10.0.0.1:7 (eth0, host shared with rank 0, subnet shared with ranks 2, 4, no subnet \
             shared with rank 3)",
                "rank 2 (w3 on b) at 10.0.0.2:7 (eth0, subnet shared with ranks 0, 1, 4) and at 192.168.1.2:7 (eth1, \
             subnet shared with rank 3)",
                "rank 3 (w4 on c) at 192.168.1.3:7 (eth1, subnet shared with rank 2, no subnet shared with ranks 0, 1, 4)",
                "rank 4 (w5 on d) at 198.51.100.7:9 (advertised)",
                "rank 5 (w6 on ?) has told no address",
            ]
        );
    }

    #[test]
    fn one_machine_that_shares_no_memory_is_told_of() {
        let on = |key: &str| Register {
            host_key: Some(HostKey(key.to_owned())),
            ..worker("a", &["eth0 10.0.0.5/24"])
        };
        let (root, nobody, other) = (on("boot:1:1:0"), on("boot:1:1:65534"), on("root:1:1:0"));
        let lines = |one: &Register, two: &Register| {
            pairing(&[("w1".to_owned(), Some(one)), ("w2".to_owned(), Some(two))])
        };
        let apart = "rank 1 (w2) is on the machine of rank 0, and in another network namespace or of another user: they share \
                     no memory";
        assert_eq!(lines(&root, &nobody)[2..], [apart]);
        assert_eq!(lines(&root, &root).len(), 2);
        assert_eq!(lines(&root, &other).len(), 2);
    }
}
