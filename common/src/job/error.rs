//! Errors of a job file: one line with the file, the line, what is wrong and what was probably meant.

use super::Augment;
use super::validate::Fault;
use crate::suggest::did_you_mean;
use thiserror::Error;
use toml::de::{DeTable, DeValue};

/// Why a job file was refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{file}{}: {what}", line.map(|l| format!(":{l}")).unwrap_or_default())]
pub struct JobError {
    /// The job file's name.
    pub file: String,
    /// The line, from 1, where it can be told.
    pub line: Option<usize>,
    /// What is wrong and what to do.
    pub what: String,
}

fn line_at(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|b| *b == b'\n').count() + 1
}

/// The names in backticks of a serde message, in order.
fn quoted(message: &str) -> Vec<&str> {
    message.split('`').skip(1).step_by(2).collect()
}

pub(super) fn from_toml(file: &str, text: &str, e: &toml::de::Error) -> JobError {
    let message = e.message().to_owned();
    let names = quoted(&message);
    let unknown_field = message.starts_with("unknown field");
    let is_unknown = unknown_field || message.starts_with("unknown variant");
    let hint = match names.split_first() {
        Some((name, known)) if is_unknown => did_you_mean(name, known.iter().copied()),
        _ => String::new(),
    };
    // Tagged tables lose the position of their keys on the way through serde, so look the key up again.
    let key_offset = names.first().filter(|_| unknown_field).and_then(|name| find_key(text, name));
    let offset = key_offset.or_else(|| e.span().map(|s| s.start));
    let what = message.lines().next().unwrap_or_default().to_owned() + &hint;
    let (offset, what) = match faulty_step(text, &message) {
        Some(Step { offset, named }) => (Some(offset), format!("{named}: {what}")),
        None => (offset, what),
    };
    JobError { file: file.to_owned(), line: offset.map(|o| line_at(text, o)), what }
}

/// A step of preparing samples.
struct Step {
    offset: usize,
    /// As errors call it.
    named: String,
}

/// The first step that is refused with `message`. serde knows neither its number nor, in a list of several lines, its line.
fn faulty_step(text: &str, message: &str) -> Option<Step> {
    let root = DeTable::parse(text).ok()?;
    let data = root.get_ref().get("data")?.get_ref().as_table()?;
    let values: toml::Table = toml::from_str(text).ok()?;
    for key in ["augment", "evaluate"] {
        let Some(steps) = values.get("data").and_then(|data| data.get(key)?.as_array()) else { continue };
        let refused = |step: &toml::Value| {
            let refusal = step.clone().try_into::<Augment>().err();
            refusal.is_some_and(|e| e.message().lines().next() == message.lines().next())
        };
        let Some(index) = steps.iter().position(refused) else { continue };
        let offset = data.get(key)?.get_ref().as_array()?.get(index)?.span().start;
        let name = steps[index].get("name").and_then(toml::Value::as_str);
        let name = name.map(|name| format!(", `{name}`")).unwrap_or_default();
        return Some(Step { offset, named: format!("step {} of `{key}`{name}", index + 1) });
    }
    None
}

pub(super) fn from_fault(file: &str, text: &str, fault: Fault) -> JobError {
    let line = find_path(text, &fault.path).map(|o| line_at(text, o));
    JobError { file: file.to_owned(), line, what: fault.what }
}

/// Where the value at `path` stands, or else its nearest enclosing table.
fn find_path(text: &str, path: &[String]) -> Option<usize> {
    let root = DeTable::parse(text).ok()?;
    let mut table = root.get_ref();
    let mut found = None;
    for key in path {
        let Some((name, value)) = table.iter().find(|(name, _)| name.get_ref() == key.as_str()) else {
            break;
        };
        found = Some(name.span().start);
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    found
}

/// Where a key called `name` stands, in whatever table.
fn find_key(text: &str, name: &str) -> Option<usize> {
    fn search(table: &DeTable<'_>, name: &str) -> Option<usize> {
        table.iter().find_map(|(key, value)| {
            if key.get_ref() == name {
                return Some(key.span().start);
            }
            search_value(value.get_ref(), name)
        })
    }
    fn search_value(value: &DeValue<'_>, name: &str) -> Option<usize> {
        match value {
            DeValue::Table(t) => search(t, name),
            DeValue::Array(items) => items.iter().find_map(|v| search_value(v.get_ref(), name)),
            _ => None,
        }
    }
    search(DeTable::parse(text).ok()?.get_ref(), name)
}
