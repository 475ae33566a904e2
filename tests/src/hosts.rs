//! Several hosts: network namespaces joined by bridges, each with addresses of its own.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// The hosts' namespaces; dropping them takes them down.
pub struct Hosts {
    names: Vec<String>,
}

impl Hosts {
    /// Hosts without a network. `None` where that is not allowed.
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

    /// Hosts 10.99.0.1, 10.99.0.2, ...; the first one also carries the bridge. `None` where that is not allowed.
    pub fn new(count: usize) -> Option<Self> {
        let hosts = Self::apart(count)?;
        hosts.bridge("br0", "10.99.0.1/24")?;
        for n in 2..=count {
            hosts.link(n, "br0", "eth0", &format!("10.99.0.{n}/24"))?;
        }
        Some(hosts)
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
        let port = format!("p{n}{bridge}");
        let pair = ["link", "add", &port, "type", "veth", "peer", "name", interface, "netns", name];
        self.inside(first, &pair).then_some(())?;
        self.inside(first, &["link", "set", &port, "master", bridge, "up"]).then_some(())?;
        self.inside(name, &["addr", "add", address, "dev", interface]).then_some(())?;
        self.inside(name, &["link", "set", interface, "up"]).then_some(())
    }

    /// Whether `ip ARGS` succeeds on host `n`, counted from 1.
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
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            ip(&["netns", "del", name]);
        }
    }
}

fn ip(args: &[&str]) -> bool {
    Command::new("ip").args(args).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}
