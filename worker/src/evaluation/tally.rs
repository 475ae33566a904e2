//! What an evaluation counts and adds up.
//!
//! Counts are whole numbers. Sums of fractions are kept for each logical shard and added shard by shard, from the first to the
//! last, whoever evaluated them: the total's bits depend on the test set and the number of shards alone.

use super::views::{Views, top};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Bins of equal width over the confidences from 0 to 1: M of Guo et al., section 4.
pub(crate) const BINS: usize = 15;

/// What the evaluation of some samples comes to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Tally {
    /// Samples.
    pub(crate) samples: u64,
    /// Those whose label has the greatest probability.
    pub(crate) top1: u64,
    /// Those whose label is among the five greatest.
    pub(crate) top5: u64,
    /// Samples by label and by the class of the greatest probability, where there are any.
    pub(crate) confusion: BTreeMap<(u32, u32), u64>,
    /// Sum of −log p(label).
    pub(crate) negative_log_likelihood: f64,
    /// By confidence.
    pub(crate) bins: [Bin; BINS],
}

/// The samples whose greatest probability, their confidence, lies in one interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Bin {
    /// Samples.
    pub(crate) samples: u64,
    /// Those of them whose label has that probability.
    pub(crate) correct: u64,
    /// Sum of the confidences.
    pub(crate) confidence: f64,
}

impl Tally {
    /// Takes in a sample of class `label`.
    pub(crate) fn add(&mut self, label: usize, views: &Views) {
        let probabilities = views.probabilities();
        let first = top(&probabilities, 5);
        let predicted = first[0];
        let correct = u64::from(predicted == label);
        self.samples += 1;
        self.top1 += correct;
        self.top5 += u64::from(first.contains(&label));
        *self.confusion.entry((label as u32, predicted as u32)).or_default() += 1;
        self.negative_log_likelihood -= views.log_probability(label);
        let confidence = probabilities[predicted];
        let bin = &mut self.bins[bin_of(confidence)];
        bin.samples += 1;
        bin.correct += correct;
        bin.confidence += confidence;
    }

    /// Adds those of the next logical shard.
    pub(crate) fn append(&mut self, next: &Self) {
        self.samples += next.samples;
        self.top1 += next.top1;
        self.top5 += next.top5;
        for (cell, count) in &next.confusion {
            *self.confusion.entry(*cell).or_default() += count;
        }
        self.negative_log_likelihood += next.negative_log_likelihood;
        for (bin, next) in self.bins.iter_mut().zip(&next.bins) {
            bin.samples += next.samples;
            bin.correct += next.correct;
            bin.confidence += next.confidence;
        }
    }

    /// The mean of −log p(label).
    pub(crate) fn mean_negative_log_likelihood(&self) -> f64 {
        self.negative_log_likelihood / self.samples as f64
    }

    /// ECE = Σ |B| / n · |acc(B) − conf(B)| over the bins B, with acc and conf the means within a bin.
    ///
    /// Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", 2017, equation 3.
    pub(crate) fn expected_calibration_error(&self) -> f64 {
        // |B| / n · |correct / |B| − confidence / |B|| = |correct − confidence| / n
        let gaps = self.bins.iter().map(|bin| (bin.correct as f64 - bin.confidence).abs());
        gaps.sum::<f64>() / self.samples as f64
    }
}

/// The bin of a confidence: bin m, from 0, is the interval (m / M, (m + 1) / M], as in Guo et al.
fn bin_of(confidence: f64) -> usize {
    let upper = libm::ceil(confidence * BINS as f64) as usize;
    upper.clamp(1, BINS) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Views with these probabilities.
    fn views(probabilities: &[f64]) -> Views {
        Views::new(probabilities.len(), probabilities.iter().map(|p| p.ln()).collect())
    }

    fn tally(samples: &[(usize, &[f64])]) -> Tally {
        let mut tally = Tally::default();
        samples.iter().for_each(|(label, p)| tally.add(*label, &views(p)));
        tally
    }

    #[test]
    fn figures_are_those_worked_out_by_hand() {
        let tally = tally(&[
            (0, &[0.7, 0.1, 0.1, 0.05, 0.03, 0.02]),
            (1, &[0.5, 0.3, 0.1, 0.05, 0.03, 0.02]),
            (5, &[0.62, 0.2, 0.1, 0.04, 0.03, 0.01]),
            (2, &[0.01, 0.01, 0.95, 0.01, 0.01, 0.01]),
        ]);
        assert_eq!((tally.samples, tally.top1, tally.top5), (4, 2, 3));
        let expected = [((0, 0), 1), ((1, 0), 1), ((2, 2), 1), ((5, 0), 1)];
        assert_eq!(tally.confusion, expected.into());
        let nll = -(0.7f64.ln() + 0.3f64.ln() + 0.01f64.ln() + 0.95f64.ln()) / 4.0;
        assert!((tally.mean_negative_log_likelihood() - nll).abs() < 1e-14);
        // Each in a bin of its own: 0.5 in (7/15, 8/15], 0.62 in (9/15, 10/15], 0.7 and 0.95.
        let filled: Vec<_> = (0..BINS).filter(|m| tally.bins[*m].samples > 0).collect();
        assert_eq!(filled, [7, 9, 10, 14]);
        let gaps = 0.5 + 0.62 + 0.3 + 0.05;
        assert!((tally.expected_calibration_error() - gaps / 4.0).abs() < 1e-14);
    }

    #[test]
    fn confidences_fall_into_bins_that_are_closed_above() {
        let bins = [0.0, 1e-9, 1.0 / 15.0, 0.0667, 0.5, 14.0 / 15.0 + 1e-9, 1.0].map(bin_of);
        assert_eq!(bins, [0, 0, 0, 1, 7, 14, 14]);
    }

    #[test]
    fn a_network_that_is_as_often_right_as_it_is_sure_is_calibrated() {
        let mut sure = Tally::default();
        for right in [true, true, true, false] {
            sure.add(usize::from(!right), &views(&[0.75, 0.25]));
        }
        assert!(sure.expected_calibration_error() < 1e-15, "{}", sure.expected_calibration_error());
    }

    #[test]
    fn samples_that_share_a_bin_are_compared_by_their_means() {
        // Confidences 0.64 and 0.62, one of them right: |1/2 - 0.63|.
        let tally = tally(&[(0, &[0.64, 0.36]), (1, &[0.62, 0.38])]);
        assert!((tally.expected_calibration_error() - 0.13).abs() < 1e-14);
    }

    #[test]
    fn tallies_of_shards_add_up() {
        let samples: [(usize, &[f64]); 3] = [(0, &[0.7, 0.3]), (1, &[0.9, 0.1]), (1, &[0.2, 0.8])];
        let mut sum = Tally::default();
        samples.iter().for_each(|sample| sum.append(&tally(&[*sample])));
        let whole = tally(&samples);
        assert_eq!((sum.samples, sum.top1, sum.top5, &sum.confusion), (3, 2, 3, &whole.confusion));
        let difference = sum.expected_calibration_error() - whole.expected_calibration_error();
        assert!(difference.abs() < 1e-15 && sum.bins.map(|b| b.samples) == whole.bins.map(|b| b.samples));
    }
}
