//! The table and its JSON.

use super::args::{Plan, Size, name_of};
use anyhow::{Result, ensure};
use lockstep_common::output::output;
use serde::Serialize;
use std::io::Write;

/// Seconds per all-reduce of one size and column, of the slowest rank each.
#[derive(Serialize)]
struct Row {
    backend: String,
    reduction: String,
    wire: String,
    bytes: u64,
    iterations: usize,
    median_seconds: f64,
    min_seconds: f64,
    max_seconds: f64,
    /// `bytes / median_seconds`, in 1e9 bytes per second.
    gb_per_second: f64,
}

#[derive(Serialize)]
struct Report {
    ranks: u32,
    hosts: u32,
    shards: u32,
    dtype: &'static str,
    results: Vec<Row>,
}

/// What the ranks have measured: nanoseconds by size, column and rank.
pub(super) struct Times {
    plan: Plan,
    ranks: usize,
    cells: Vec<Vec<Option<Vec<u64>>>>,
}

impl Times {
    pub(super) fn new(plan: Plan, ranks: usize) -> Self {
        let cells = vec![vec![None; ranks]; plan.sizes.len() * plan.columns.len()];
        Self { plan, ranks, cells }
    }

    /// Takes in what `rank` has measured; `None` if that was not asked for.
    pub(super) fn take(&mut self, rank: usize, size: u32, column: u32, times: Vec<u64>) -> Option<()> {
        if column as usize >= self.plan.columns.len() {
            return None;
        }
        let cell = self.cells.get_mut(size as usize * self.plan.columns.len() + column as usize)?;
        *cell.get_mut(rank)? = Some(times);
        Some(())
    }

    fn row(&self, size: usize, column: usize) -> Result<Row> {
        let ranks: Vec<&Vec<u64>> =
            self.cells[size * self.plan.columns.len() + column].iter().flatten().collect();
        let iterations = ranks.first().map_or(0, |times| times.len());
        ensure!(
            ranks.len() == self.ranks && iterations > 0 && ranks.iter().all(|t| t.len() == iterations),
            "the ranks have not measured the same all-reduces"
        );
        let slowest = |i: usize| ranks.iter().map(|times| times[i]).max().unwrap_or_default();
        let mut seconds: Vec<f64> = (0..iterations).map(|i| slowest(i) as f64 / 1e9).collect();
        seconds.sort_by(f64::total_cmp);
        let (lower, upper) = (seconds[(iterations - 1) / 2], seconds[iterations / 2]);
        let median = (lower + upper) / 2.0;
        let (Size(bytes), way) = (self.plan.sizes[size], self.plan.columns[column]);
        Ok(Row {
            backend: name_of(way.backend),
            reduction: name_of(way.reduction),
            wire: name_of(way.wire),
            bytes,
            iterations,
            median_seconds: median,
            min_seconds: seconds[0],
            max_seconds: seconds[iterations - 1],
            gb_per_second: bytes as f64 / median * 1e-9,
        })
    }

    /// Prints everything that was measured on `hosts` hosts.
    pub(super) fn print(&self, hosts: u32, json: bool) -> Result<()> {
        let mut out = output();
        let (sizes, columns) = (self.plan.sizes.len(), self.plan.columns.len());
        if json {
            let cells = (0..sizes).flat_map(|size| (0..columns).map(move |column| (size, column)));
            let results = cells.map(|(size, column)| self.row(size, column)).collect::<Result<_>>()?;
            let (ranks, shards) = (self.ranks as u32, self.plan.shards);
            let report = Report { ranks, hosts, shards, dtype: "f32", results };
            writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
            return Ok(());
        }
        writeln!(
            out,
            "All-reduce of f32: {} ranks on {hosts} host{}, {} logical shards. Median (shortest to longest) of the \
             slowest rank's time; bytes / median.",
            self.ranks,
            if hosts == 1 { "" } else { "s" },
            self.plan.shards
        )?;
        write!(out, "{:>8}", "SIZE")?;
        for column in &self.plan.columns {
            write!(out, "  {:<40}", column.name())?;
        }
        writeln!(out)?;
        for size in 0..sizes {
            write!(out, "{:>8}", self.plan.sizes[size].to_string())?;
            for column in 0..columns {
                let row = self.row(size, column)?;
                let spread = format!("({} to {})", time(row.min_seconds), time(row.max_seconds));
                write!(
                    out,
                    "  {:>9} {:<19} {:>5.2} GB/s",
                    time(row.median_seconds),
                    spread,
                    row.gb_per_second
                )?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

/// A time with three digits.
fn time(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s < 1e-3 => (s * 1e6, "us"),
        s if s < 1.0 => (s * 1e3, "ms"),
        s => (s, "s"),
    };
    match value {
        v if v < 10.0 => format!("{v:.2} {unit}"),
        v if v < 100.0 => format!("{v:.1} {unit}"),
        v => format!("{v:.0} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::args::{Column, Effort};
    use super::*;
    use lockstep_common::job::{Backend, Reduction, WireFormat};

    fn times() -> Times {
        let column = Column { backend: Backend::Quic, reduction: Reduction::Exact, wire: WireFormat::F32 };
        let columns = vec![column];
        let plan = Plan { shards: 2, columns, sizes: vec![Size(4096)], effort: Effort::Iterations(4) };
        Times::new(plan, 2)
    }

    #[test]
    fn the_slowest_rank_counts_and_the_median_of_an_even_number_lies_between() {
        let mut times = times();
        times.take(0, 0, 0, vec![1_000, 9_000, 2_000, 4_000]).unwrap();
        times.take(1, 0, 0, vec![3_000, 1_000, 2_000, 5_000]).unwrap();
        let row = times.row(0, 0).unwrap();
        let nanoseconds =
            [row.min_seconds, row.median_seconds, row.max_seconds].map(|s| (s * 1e9).round() as u64);
        assert_eq!(nanoseconds, [2_000, 4_000, 9_000]);
        assert!((row.gb_per_second - 1.024).abs() < 1e-9);
    }

    #[test]
    fn what_was_not_asked_for_or_is_missing_is_refused() {
        let mut times = times();
        assert!(times.take(0, 1, 0, vec![1]).is_none());
        assert!(times.take(0, 0, 1, vec![1]).is_none());
        times.take(0, 0, 0, vec![1, 2]).unwrap();
        assert!(times.row(0, 0).is_err());
        times.take(1, 0, 0, vec![1]).unwrap();
        assert!(times.row(0, 0).is_err());
    }

    #[test]
    fn times_have_three_digits() {
        assert_eq!([8.54e-5, 0.0194, 1.1234, 0.128].map(time), ["85.4 us", "19.4 ms", "1.12 s", "128 ms"]);
    }
}
