//! The nearest known name, for messages about a name that is not known.

/// The entry of `known` closest to `name`, if it is close enough to be what was meant.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let name = name.to_lowercase();
    known
        .into_iter()
        .filter_map(|candidate| Some((likeness(&name, &candidate.to_lowercase())?, candidate)))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// From 0 to 1; `None` if the two are hardly the same word. Jaro–Winkler favours a common beginning, and
/// Damerau–Levenshtein forgives one slip, swapped letters too, in a short word.
fn likeness(a: &str, b: &str) -> Option<f64> {
    let winkler = strsim::jaro_winkler(a, b);
    let one_slip = strsim::damerau_levenshtein(a, b) <= 1;
    (winkler >= 0.75 || one_slip).then(|| winkler.max(strsim::normalized_damerau_levenshtein(a, b)))
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
        assert_eq!(nearest("sdg", ["adam", "sgd"]), Some("sgd"));
    }
}
