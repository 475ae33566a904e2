//! Ranks in sentences.

/// `rank 2`, `ranks 0, 2` or `ranks 0-3, 7`; the numbers ascend.
pub(crate) fn ranks(numbers: &[u32]) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &n in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == n => *last = n,
            _ => runs.push((n, n)),
        }
    }
    let parts: Vec<_> = runs
        .iter()
        .map(|&(first, last)| match last - first {
            0 => first.to_string(),
            1 => format!("{first}, {last}"),
            _ => format!("{first}-{last}"),
        })
        .collect();
    format!("{} {}", if numbers.len() == 1 { "rank" } else { "ranks" }, parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::ranks;

    #[test]
    fn runs_are_shortened() {
        let cases = [(&[2][..], "rank 2"), (&[0, 1, 3], "ranks 0, 1, 3"), (&[0, 1, 2, 3, 7], "ranks 0-3, 7")];
        cases.iter().for_each(|(numbers, words)| assert_eq!(ranks(numbers), *words));
    }
}
