//! What can be measured, as it is typed.

use super::wire::Wire;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory};
use lockstep_common::job::{Backend, Reduction, WireFormat};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::str::FromStr;

/// The most ranks of a run.
pub(super) const MAX_RANKS: u32 = 64;

#[derive(Args)]
pub(crate) struct AllreduceArgs {
    /// Ranks on this host [default: 2; 1 with --listen or --peer].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_RANKS)))]
    ranks: Option<u32>,
    /// Backends to compare, as in a job's `[collective]`.
    #[arg(long, value_delimiter = ',', default_value = "auto", value_parser = backend)]
    backend: Vec<Backend>,
    /// Orders of addition to compare: `exact`, `fast`.
    #[arg(long, value_delimiter = ',', default_value = "exact", value_parser = named::<Reduction>)]
    reduction: Vec<Reduction>,
    /// Forms on the wire to compare: `f32`, `bf16`, `int8`.
    #[arg(long, value_delimiter = ',', default_value = "f32", value_parser = wire)]
    wire: Vec<WireFormat>,
    /// Bytes of f32 per rank: a number, or one with K, M or G (1024, 1024², 1024³).
    #[arg(long, value_delimiter = ',', default_value = "4K,64K,1M,25M,100M")]
    sizes: Vec<Size>,
    /// Logical shards, spread over the ranks [default: one per rank].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    shards: Option<u32>,
    /// How long each size and backend is measured.
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    seconds: f64,
    /// Measure so many all-reduces instead.
    #[arg(long, conflicts_with = "seconds", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    iterations: Option<u32>,
    /// Wait on this UDP address for a second host's ranks, and print what to type there.
    #[arg(long)]
    pub(super) listen: Option<SocketAddr>,
    /// Add this host's ranks to the benchmark that listens at `host:port`.
    #[arg(long, requires = "secret",
          conflicts_with_all = ["listen", "backend", "reduction", "wire", "sizes", "shards", "seconds", "iterations", "json"])]
    pub(super) peer: Option<String>,
    /// The one-time secret that the listening side printed.
    #[arg(long, env = "LOCKSTEP_BENCH_SECRET", hide_env_values = true)]
    pub(super) secret: Option<String>,
    /// Print JSON for scripts.
    #[arg(long)]
    pub(super) json: bool,
}

impl AllreduceArgs {
    /// The ranks that this host runs.
    pub(super) fn ranks_here(&self) -> u32 {
        let two_hosts = self.listen.is_some() || self.peer.is_some();
        self.ranks.unwrap_or(if two_hosts { 1 } else { 2 })
    }

    /// Ends the process with a usage error where arguments do not fit together.
    pub(super) fn check(&self) {
        if let Some(shards) = self.shards
            && shards < self.ranks_here()
        {
            let message = format!(
                "{shards} logical shards for {} ranks: use at least one logical shard per rank",
                self.ranks_here()
            );
            crate::cli::Cli::command().error(ErrorKind::ValueValidation, message).exit();
        }
    }

    /// What `ranks` ranks in all are to measure.
    pub(super) fn plan(&self, ranks: u32) -> Plan {
        let mut columns = Vec::new();
        for &backend in &self.backend {
            for &reduction in &self.reduction {
                columns.extend(self.wire.iter().map(|&wire| Column { backend, reduction, wire }));
            }
        }
        Plan {
            shards: self.shards.unwrap_or(ranks),
            columns,
            sizes: self.sizes.clone(),
            effort: self.iterations.map_or(Effort::Seconds(self.seconds), Effort::Iterations),
        }
    }
}

/// What all ranks measure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) shards: u32,
    pub(super) columns: Vec<Column>,
    pub(super) sizes: Vec<Size>,
    pub(super) effort: Effort,
}

/// One way to all-reduce.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Column {
    pub(super) backend: Backend,
    pub(super) reduction: Reduction,
    pub(super) wire: WireFormat,
}

/// How much is measured of each size and column.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Effort {
    Seconds(f64),
    Iterations(u32),
}

/// A payload in bytes: whole f32, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Size(pub(super) u64);

const UNITS: [(char, u64); 3] = [('G', 1 << 30), ('M', 1 << 20), ('K', 1 << 10)];

impl Size {
    /// How many f32 it holds.
    pub(super) fn elements(self) -> usize {
        self.0 as usize / size_of::<f32>()
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let unit = UNITS.iter().find(|(letter, _)| s.ends_with(*letter));
        let (digits, unit) = unit.map_or((s, 1), |(_, unit)| (&s[..s.len() - 1], *unit));
        let bytes = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
        match bytes {
            // A larger one would not fit a worker's memory several times over.
            Some(n) if n > 0 && n <= 4 << 30 && n.is_multiple_of(size_of::<f32>() as u64) => Ok(Self(n)),
            Some(_) => Err("a size is a multiple of 4 bytes, from 4 to 4G".to_owned()),
            None => Err("a size is a number of bytes, such as `4096`, `64K` or `25M`".to_owned()),
        }
    }
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match UNITS.iter().find(|(_, unit)| self.0.is_multiple_of(*unit)) {
            Some((letter, unit)) => write!(f, "{} {letter}iB", self.0 / unit),
            None => write!(f, "{} B", self.0),
        }
    }
}

impl Column {
    /// Its name: what it has besides the defaults of a job.
    pub(super) fn name(self) -> String {
        let mut name = name_of(self.backend);
        if self.reduction != Reduction::default() {
            name += &format!(" {}", name_of(self.reduction));
        }
        if self.wire != WireFormat::default() {
            name += &format!(" {}", name_of(self.wire));
        }
        name
    }
}

/// The word that a job file has for `value`.
pub(super) fn name_of(value: impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// The value that a job file's word stands for.
fn named<T: DeserializeOwned>(word: &str) -> Result<T, String> {
    serde_json::from_value(serde_json::Value::String(word.to_owned())).map_err(|error| error.to_string())
}

fn backend(word: &str) -> Result<Backend, String> {
    match named(word)? {
        Backend::Nccl => Err("`nccl` reduces on GPUs: measure a job with it".to_owned()),
        other => Ok(other),
    }
}

fn wire(word: &str) -> Result<WireFormat, String> {
    Wire::check(named(word)?)
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a time is a number of seconds, from 0 to 3600".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_printed_in_binary_units() {
        for (text, bytes, printed) in
            [("4K", 4096, "4 KiB"), ("25M", 25 << 20, "25 MiB"), ("12", 12, "12 B"), ("2G", 2 << 30, "2 GiB")]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)));
            assert_eq!(Size(bytes).to_string(), printed);
        }
        for text in ["", "K", "4k", "-4", "0", "6", "1.5M", "5G", "99999999999999999999G"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
