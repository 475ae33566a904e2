//! Text that somebody else wrote, for people to see: names of files, of classes, of tensors.
//!
//! A terminal obeys control characters, so none of another's reaches one: a name is shown with them escaped.

use std::borrow::Cow;

/// `text` in one line: control characters, line breaks among them, and marks that turn the direction of writing are escaped
/// as in Rust (`\n`, `\u{1b}`).
pub fn shown(text: &str) -> Cow<'_, str> {
    escaped(text, is_hidden)
}

/// `text` in as many lines as it has: as [`shown`], but for its line breaks.
pub fn shown_lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c != '\n' && is_hidden(c))
}

/// JSON `text` with such characters escaped as JSON has it: they stand in strings only.
pub fn shown_json(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_hidden(c) { out.push_str(&format!("\\u{:04x}", u32::from(c))) } else { out.push(c) }
    }
    Cow::Owned(out)
}

/// `count` things, such as `1 shard` or `2 shards`.
pub fn counted(count: u64, thing: &str) -> String {
    format!("{count} {thing}{}", if count == 1 { "" } else { "s" })
}

fn escaped(text: &str, hidden: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&hidden) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if hidden(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    Cow::Owned(out)
}

/// Whether `c` does something to a terminal other than to stand there: Unicode's controls (Cc), line and paragraph separators,
/// and the marks, embeddings, overrides and isolates of its bidirectional algorithm (UAX #9, table 1).
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_told_apart_from_many() {
        assert_eq!([0, 1, 2].map(|n| counted(n, "shard")), ["0 shards", "1 shard", "2 shards"]);
    }

    #[test]
    fn what_a_terminal_would_obey_is_escaped_and_nothing_else() {
        assert_eq!(shown("\u{1b}[31mred\r\n\u{7}\u{9b}x"), r"\u{1b}[31mred\r\n\u{7}\u{9b}x");
        assert_eq!(shown("a\u{202e}gpj.exe"), r"a\u{202e}gpj.exe");
        assert_eq!(shown_json("[\"a\u{9b}\u{202e}\"]"), r#"["a\u009b\u202e"]"#);
        assert_eq!(shown_lines("one\n\ttwo"), "one\n\\ttwo");
        for plain in ["", "Schäferhund 犬 🐕 \\ `x`", "\u{fffd}"] {
            assert!(matches!(shown(plain), Cow::Borrowed(_)), "{plain}");
        }
    }
}
