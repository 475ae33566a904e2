//! What networks say of one image: the logits of every view of it.

/// The logits of some views of one image: of its crops, by one network or by several.
///
/// The answer is the average of the views' softmax (Krizhevsky et al. 2012, section 4.1; Szegedy et al., "Going deeper with
/// convolutions", 2015, section 7, for ensembles too).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Views {
    classes: usize,
    /// View by view.
    logits: Vec<f64>,
    /// For each view its greatest logit, and the sum of the exponentials of all relative to that.
    norms: Vec<Norm>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Norm {
    greatest: f64,
    sum: f64,
}

impl Views {
    /// Of `logits`, view by view, with `classes` each, at least one.
    pub(crate) fn new(classes: usize, logits: Vec<f64>) -> Self {
        let norm = |row: &[f64]| {
            let greatest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            Norm { greatest, sum: row.iter().map(|x| libm::exp(x - greatest)).sum() }
        };
        let norms = logits.chunks_exact(classes).map(norm).collect();
        Self { classes, logits, norms }
    }

    /// Those of several networks together, which have the same classes.
    pub(crate) fn together<'a>(members: impl Iterator<Item = &'a Self>) -> Self {
        let mut all = Self { classes: 0, logits: Vec::new(), norms: Vec::new() };
        for member in members {
            all.classes = member.classes;
            all.logits.extend_from_slice(&member.logits);
            all.norms.extend_from_slice(&member.norms);
        }
        all
    }

    /// How many classes there are.
    pub(crate) fn classes(&self) -> usize {
        self.classes
    }

    /// The first logit that is no finite number, and its class.
    pub(crate) fn not_finite(&self) -> Option<(usize, f64)> {
        let at = self.logits.iter().position(|x| !x.is_finite())?;
        Some((at % self.classes, self.logits[at]))
    }

    fn rows(&self) -> impl Iterator<Item = (&[f64], Norm)> {
        self.logits.chunks_exact(self.classes).zip(self.norms.iter().copied())
    }

    /// The probability of each class: the views' softmax, averaged.
    pub(crate) fn probabilities(&self) -> Vec<f64> {
        let mut sums = vec![0.0; self.classes];
        for (row, norm) in self.rows() {
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += libm::exp(x - norm.greatest) / norm.sum;
            }
        }
        let views = self.norms.len() as f64;
        sums.iter_mut().for_each(|sum| *sum /= views);
        sums
    }

    /// The logarithm of the probability of `class`, also where that is too small for a number.
    pub(crate) fn log_probability(&self, class: usize) -> f64 {
        let logs: Vec<f64> = self.rows().map(|(row, n)| row[class] - n.greatest - libm::log(n.sum)).collect();
        let greatest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mean = logs.iter().map(|log| libm::exp(log - greatest)).sum::<f64>() / logs.len() as f64;
        greatest + libm::log(mean)
    }
}

/// The `count` most probable classes, the most probable first, of equal ones the first.
pub(crate) fn top(probabilities: &[f64], count: usize) -> Vec<usize> {
    let mut classes: Vec<usize> = (0..probabilities.len()).collect();
    classes.sort_by(|a, b| probabilities[*b].total_cmp(&probabilities[*a]));
    classes.truncate(count);
    classes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-15
    }

    #[test]
    fn the_softmax_of_views_is_averaged_and_not_their_logits() {
        // By hand: e^ln2 : e^0 : e^0 = 2 : 1 : 1, and 1 : 1 : 8.
        let views = Views::new(3, vec![2f64.ln(), 0.0, 0.0, 5.0, 5.0, 5.0 + 8f64.ln()]);
        let expected = [(0.5 + 0.1) / 2.0, (0.25 + 0.1) / 2.0, (0.25 + 0.8) / 2.0];
        for (class, (found, expected)) in views.probabilities().into_iter().zip(expected).enumerate() {
            assert!(close(found, expected), "{class}: {found}");
            assert!(close(views.log_probability(class), expected.ln()));
        }
        assert_eq!(top(&views.probabilities(), 5), [2, 0, 1]);
        assert_eq!(top(&[0.25, 0.5, 0.25], 2), [1, 0]);
    }

    #[test]
    fn an_ensemble_averages_over_its_members_and_one_member_is_itself() {
        let [a, b] =
            [vec![0.3, -1.0, 2.0, 0.0], vec![4.0, 1.0, -2.0, 0.5]].map(|logits| Views::new(2, logits));
        let both = Views::together([&a, &b].into_iter());
        for class in 0..2 {
            let mean = (a.probabilities()[class] + b.probabilities()[class]) / 2.0;
            assert!(close(both.probabilities()[class], mean));
        }
        assert_eq!(Views::together([&a].into_iter()), a);
    }

    #[test]
    fn a_probability_too_small_for_a_number_has_a_logarithm() {
        let views = Views::new(2, vec![0.0, 2000.0]);
        assert_eq!(views.probabilities(), [0.0, 1.0]);
        assert_eq!(views.log_probability(0), -2000.0);
    }
}
