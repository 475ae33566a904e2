//! An error and its causes in one line.

use crate::shown::shown_lines;

/// The messages of an error and of its causes, each once: many a message quotes its cause already. What a terminal would obey is
/// escaped, as messages name what others have named.
pub fn one_line(chain: impl IntoIterator<Item = impl ToString>) -> String {
    let mut line = String::new();
    for message in chain {
        let message = message.to_string();
        if line.is_empty() {
            line = message;
        } else if !line.contains(&message) {
            line = format!("{line}: {message}");
        }
    }
    shown_lines(&line).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_that_is_quoted_already_is_not_told_again() {
        let chain = ["cannot listen on 1.2.3.4:5: in use; choose another", "in use"];
        assert_eq!(one_line(chain), chain[0]);
        assert_eq!(one_line(["cannot read `x`", "no such file"]), "cannot read `x`: no such file");
        assert_eq!(one_line(["cannot read `\u{1b}c`"]), r"cannot read `\u{1b}c`");
    }
}
