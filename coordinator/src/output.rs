//! Standard output and the errors of the command line. Of what others have written nothing reaches a terminal that it would obey.

use lockstep_common::output::output;
use lockstep_common::shown::{shown_json, shown_lines};
use std::io::Write;
use std::sync::OnceLock;

/// Why something that was to be said was not: the first reason.
static UNSAID: OnceLock<String> = OnceLock::new();

/// Writes a line to standard output. What goes wrong is kept for [`unsaid`].
pub(crate) fn say(line: impl std::fmt::Display) {
    write(&shown_lines(&line.to_string()));
}

fn write(line: &str) {
    if let Err(error) = writeln!(output(), "{line}") {
        UNSAID.get_or_init(|| error.to_string());
    }
}

/// Why not all of what was said has been written; `None` if it has.
pub(crate) fn unsaid() -> Option<&'static str> {
    UNSAID.get().map(String::as_str)
}

/// Writes a value as one line of JSON to standard output.
pub(crate) fn say_json(value: &impl serde::Serialize) {
    match serde_json::to_string(value) {
        Ok(json) => write(&shown_json(&json)),
        Err(e) => note(format_args!("error: cannot be written as JSON: {e}")),
    }
}

/// Writes a line to standard error.
pub(crate) fn note(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr().lock(), "{}", shown_lines(&line.to_string()));
}

/// Tells what can be done next.
pub(crate) fn hint(line: impl std::fmt::Display) {
    note(format_args!("hint: {line}"));
}

/// A table with aligned columns, the first row being its head.
pub(crate) fn table(rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns)
        .map(|c| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0))
        .collect();
    for row in rows {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        say(cells.join("  ").trim_end());
    }
}

/// Seconds as `1h 02m`, `3m 04s` or `5s`.
pub(crate) fn duration(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m {s:02}s"),
        (h, m, _) => format!("{h}h {m:02}m"),
    }
}
