//! The nearest known name, for messages about a name that is not known.

/// The entry of `known` closest to `name`, if it is close enough to be what was meant.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|k| (strsim::jaro_winkler(&name.to_lowercase(), &k.to_lowercase()), k))
        .filter(|(score, _)| *score >= 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}

/// ", did you mean `x`?" or nothing.
pub fn did_you_mean<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    nearest(name, known).map(|k| format!("; did you mean `{k}`?")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_slip_of_the_finger_and_leaves_other_words_alone() {
        let known = ["momentum", "weight_decay", "lr"];
        assert_eq!(nearest("momentm", known), Some("momentum"));
        assert_eq!(nearest("Weight-Decay", known), Some("weight_decay"));
        assert_eq!(nearest("quux", known), None);
    }
}
