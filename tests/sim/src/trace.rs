//! What happened, as a hash for all runs and in words for those that are looked at.

/// The record of a run.
pub(crate) struct Trace {
    hasher: blake3::Hasher,
    lines: Option<Vec<String>>,
    events: u64,
}

impl Trace {
    pub(crate) fn new(in_words: bool) -> Self {
        Self { hasher: blake3::Hasher::new(), lines: in_words.then(Vec::new), events: 0 }
    }

    /// Something happened; `words` are only made where they are kept.
    pub(crate) fn note(&mut self, now_ms: u64, numbers: &[u64], words: impl FnOnce() -> String) {
        self.events += 1;
        self.hasher.update(&now_ms.to_le_bytes());
        for number in numbers {
            self.hasher.update(&number.to_le_bytes());
        }
        if let Some(lines) = &mut self.lines {
            lines.push(format!("{:>9.3} {}", now_ms as f64 / 1000.0, words()));
        }
    }

    pub(crate) fn hash(&self) -> String {
        self.hasher.finalize().to_hex().to_string()
    }

    pub(crate) fn events(&self) -> u64 {
        self.events
    }

    pub(crate) fn into_lines(self) -> Vec<String> {
        self.lines.unwrap_or_default()
    }
}
