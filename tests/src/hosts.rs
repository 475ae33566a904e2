//! Several hosts on one machine: network namespaces joined by bridges, each with addresses of its own.
//!
//! That needs root and iproute2; where they are missing the constructors return `None`.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// The first host's address, where it carries the bridge.
pub const FIRST: &str = "10.99.0.1";

/// The bridge that joins all hosts.
const BRIDGE: &str = "br0";

/// The hosts' namespaces; dropping them takes them down.
pub struct Hosts {
    names: Vec<String>,
}

/// How a host is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Nothing comes through, in either direction, and nobody is told.
    Silent,
    /// What it sends arrives, but it hears nothing.
    Deaf,
    /// It hears all, but nothing that it sends arrives.
    Mute,
    /// It and the first host do not hear each other.
    FromFirst,
    /// It and the others but the first host do not hear each other.
    FromOthers,
    /// Its cable is pulled.
    Unplugged,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Silent, Self::Deaf, Self::Mute, Self::FromFirst, Self::FromOthers, Self::Unplugged];

    /// Rules of the bridge that drop what comes from `port` and what goes to it.
    fn rules(self, port: &str) -> Vec<String> {
        let (from, to) = (format!("pre iifname {port}"), format!("post oifname {port}"));
        match self {
            Self::Silent => vec![from, to],
            Self::Deaf => vec![to],
            Self::Mute => vec![from],
            Self::FromFirst => vec![format!("{from} ip daddr {FIRST}"), format!("{to} ip saddr {FIRST}")],
            Self::FromOthers => vec![
                format!("{from} ip daddr 10.99.0.0/24 ip daddr != {FIRST}"),
                format!("{to} ip saddr 10.99.0.0/24 ip saddr != {FIRST}"),
            ],
            Self::Unplugged => Vec::new(),
        }
    }
}

impl Hosts {
    /// Hosts without a network.
    pub fn apart(count: usize) -> Option<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("lks{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let hosts = Self { names: (1..=count).map(|n| format!("{prefix}h{n}")).collect() };
        for name in &hosts.names {
            ip(&["netns", "add", name]).then_some(())?;
            hosts.inside(name, &["link", "set", "lo", "up"]).then_some(())?;
        }
        Some(hosts)
    }

    /// Hosts 10.99.0.1, 10.99.0.2, ...; the first one also carries the bridge.
    pub fn new(count: usize) -> Option<Self> {
        let hosts = Self::apart(count)?;
        hosts.bridge(BRIDGE, &format!("{FIRST}/24"))?;
        for n in 2..=count {
            hosts.link(n, BRIDGE, "eth0", &format!("10.99.0.{n}/24"))?;
        }
        Some(hosts)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.names.len()
    }

    /// A bridge on the first host, with an address there.
    pub fn bridge(&self, name: &str, address: &str) -> Option<()> {
        let first = &self.names[0];
        self.inside(first, &["link", "add", name, "type", "bridge"]).then_some(())?;
        self.inside(first, &["addr", "add", address, "dev", name]).then_some(())?;
        self.inside(first, &["link", "set", name, "up"]).then_some(())
    }

    /// Plugs host `n` into a bridge.
    pub fn link(&self, n: usize, bridge: &str, interface: &str, address: &str) -> Option<()> {
        let (first, name) = (&self.names[0], &self.names[n - 1]);
        let port = port(n, bridge);
        let pair = ["link", "add", &port, "type", "veth", "peer", "name", interface, "netns", name];
        self.inside(first, &pair).then_some(())?;
        self.inside(first, &["link", "set", &port, "master", bridge, "up"]).then_some(())?;
        self.inside(name, &["addr", "add", address, "dev", interface]).then_some(())?;
        self.inside(name, &["link", "set", interface, "up"]).then_some(())
    }

    /// Runs `ip ARGS` on host `n`, counted from 1; whether it succeeded.
    pub fn ip_on(&self, n: usize, args: &[&str]) -> bool {
        self.inside(&self.names[n - 1], args)
    }

    fn inside(&self, name: &str, args: &[&str]) -> bool {
        ip(&[&["-n", name], args].concat())
    }

    /// The same command on host `n`, counted from 1.
    pub fn on(&self, n: usize, command: &Command) -> Command {
        let mut wrapped = Command::new("ip");
        wrapped
            .args(["netns", "exec", &self.names[n - 1]])
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        wrapped
    }

    /// Cuts host `n` of [`Self::new`] off; whether that could be done.
    pub fn cut(&self, n: usize, way: Way) -> bool {
        let port = port(n, BRIDGE);
        if way == Way::Unplugged {
            return self.inside(&self.names[0], &["link", "set", &port, "down"]);
        }
        let table = table(n);
        let mut script = format!("add table bridge {table}");
        for (chain, hook) in [("pre", "prerouting"), ("post", "postrouting")] {
            let definition = format!("{{ type filter hook {hook} priority 0; }}");
            script += &format!("; add chain bridge {table} {chain} {definition}");
        }
        for rule in way.rules(&port) {
            script += &format!("; add rule bridge {table} {rule} drop");
        }
        self.nft(&script)
    }

    /// Undoes [`Self::cut`]; whether that could be done.
    pub fn heal(&self, n: usize, way: Way) -> bool {
        match way {
            Way::Unplugged => self.inside(&self.names[0], &["link", "set", &port(n, BRIDGE), "up"]),
            _ => self.nft(&format!("delete table bridge {}", table(n))),
        }
    }

    fn nft(&self, script: &str) -> bool {
        let mut nft = Command::new("nft");
        nft.arg(script);
        succeeds(&mut self.on(1, &nft))
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            ip(&["netns", "del", name]);
        }
    }
}

/// The end of host `n`'s cable at the bridge.
fn port(n: usize, bridge: &str) -> String {
    format!("p{n}{bridge}")
}

/// The table of rules that cut host `n` off.
fn table(n: usize) -> String {
    format!("cut{n}")
}

fn ip(args: &[&str]) -> bool {
    succeeds(Command::new("ip").args(args))
}

fn succeeds(command: &mut Command) -> bool {
    command.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}
