//! What is told of an evaluation: `evaluation.json`, and tables for people.

use super::tally::{BINS, Tally};
use lockstep_common::job::Crops;
use lockstep_common::shown::shown;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::{self, Display};

/// What was evaluated on what.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    /// The test set.
    pub(crate) dataset: String,
    /// The network's classes.
    pub(crate) classes: usize,
    /// Classes that the test set knows.
    pub(crate) labels: usize,
    /// Their names, if the dataset has them.
    pub(crate) names: Option<Vec<String>>,
    pub(crate) crops: Crops,
}

/// A whole evaluation. Shares are from 0 to 1.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Report {
    pub(crate) dataset: String,
    pub(crate) samples: u64,
    pub(crate) classes: usize,
    pub(crate) crops: Crops,
    /// Share of samples whose label has the greatest probability.
    pub(crate) top1: f64,
    /// Share of samples whose label is among the five greatest, of networks with at least five classes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) top5: Option<f64>,
    /// The mean of −log p(label).
    pub(crate) negative_log_likelihood: f64,
    /// See [`Tally::expected_calibration_error`].
    pub(crate) expected_calibration_error: f64,
    pub(crate) per_class: Vec<ClassRow>,
    /// [label, predicted class, samples], where there are any.
    pub(crate) confusion: Vec<[u64; 3]>,
    pub(crate) calibration: Vec<BinRow>,
}

/// How the samples of one class did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct ClassRow {
    pub(crate) class: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    pub(crate) samples: u64,
    pub(crate) correct: u64,
    /// None without a sample.
    pub(crate) accuracy: Option<f64>,
}

/// One bin of the calibration: (above, to].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct BinRow {
    pub(crate) above: f64,
    pub(crate) to: f64,
    pub(crate) samples: u64,
    /// Means; none without a sample.
    pub(crate) confidence: Option<f64>,
    pub(crate) accuracy: Option<f64>,
}

impl Report {
    /// Of `tally`, which has at least one sample.
    pub(crate) fn new(subject: &Subject, tally: &Tally) -> Self {
        let share = |part: f64, samples: u64| (samples > 0).then(|| part / samples as f64);
        let of_all = |count: u64| count as f64 / tally.samples as f64;
        let per_class = (0..subject.labels as u32).map(|class| {
            let row = tally.confusion.range((class, 0)..=(class, u32::MAX));
            let samples = row.map(|(_, count)| count).sum();
            let correct = tally.confusion.get(&(class, class)).copied().unwrap_or(0);
            let name = subject.names.as_ref().and_then(|names| names.get(class as usize)).cloned();
            ClassRow { class, name, samples, correct, accuracy: share(correct as f64, samples) }
        });
        let bins = tally.bins.iter().enumerate().map(|(m, bin)| BinRow {
            above: m as f64 / BINS as f64,
            to: (m + 1) as f64 / BINS as f64,
            samples: bin.samples,
            confidence: share(bin.confidence, bin.samples),
            accuracy: share(bin.correct as f64, bin.samples),
        });
        let cells = tally.confusion.iter().map(|((l, p), n)| [u64::from(*l), u64::from(*p), *n]);
        Self {
            dataset: subject.dataset.clone(),
            samples: tally.samples,
            classes: subject.classes,
            crops: subject.crops,
            top1: of_all(tally.top1),
            top5: (subject.classes >= 5).then(|| of_all(tally.top5)),
            negative_log_likelihood: tally.mean_negative_log_likelihood(),
            expected_calibration_error: tally.expected_calibration_error(),
            per_class: per_class.collect(),
            confusion: cells.collect(),
            calibration: bins.collect(),
        }
    }

    /// The figures of a job's metrics.
    pub(crate) fn figures(&self) -> BTreeMap<String, f64> {
        let figures = [
            ("test_loss", Some(self.negative_log_likelihood)),
            ("test_top1", Some(self.top1)),
            ("test_top5", self.top5),
            ("test_ece", Some(self.expected_calibration_error)),
        ];
        figures.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }

    /// Tables of classes, confusions and calibration.
    pub(crate) fn details(&self) -> impl Display {
        Details(self)
    }
}

/// One line for each of some evaluations of the same samples, side by side.
pub(crate) fn side_by_side(rows: &[(&str, &Report)]) -> String {
    let longest = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(10);
    let mut out =
        format!("{:<longest$}  {:>7}  {:>7}  {:>8}  {:>7}\n", "CHECKPOINT", "TOP-1", "TOP-5", "NLL", "ECE");
    for (name, report) in rows {
        let percent = |share: f64| format!("{:.2}%", share * 100.0);
        let top5 = report.top5.map_or_else(|| "-".to_owned(), percent);
        let nll = format!("{:.4}", report.negative_log_likelihood);
        let ece = percent(report.expected_calibration_error);
        out += &format!("{name:<longest$}  {:>7}  {top5:>7}  {nll:>8}  {ece:>7}\n", percent(report.top1));
    }
    out
}

struct Details<'a>(&'a Report);

/// The most classes whose confusions fit a screen.
const MAX_SHOWN: usize = 20;

impl Display for Details<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(report) = self;
        writeln!(f, "{:>5}  {:>7}  {:>8}  NAME", "CLASS", "SAMPLES", "CORRECT")?;
        for row in &report.per_class {
            let correct =
                row.accuracy.map_or_else(|| "-".to_owned(), |share| format!("{:.2}%", share * 100.0));
            let name = shown(row.name.as_deref().unwrap_or_default());
            writeln!(
                f,
                "{}",
                format!("{:>5}  {:>7}  {correct:>8}  {name}", row.class, row.samples).trim_end()
            )?;
        }
        if report.classes <= MAX_SHOWN {
            write!(f, "\nlabel \\ predicted")?;
            (0..report.classes).try_for_each(|class| write!(f, " {class:>5}"))?;
            let cells: BTreeMap<_, _> = report.confusion.iter().map(|[l, p, n]| ((*l, *p), *n)).collect();
            for row in &report.per_class {
                write!(f, "\n{:>17}", row.class)?;
                let label = u64::from(row.class);
                (0..report.classes as u64)
                    .try_for_each(|p| write!(f, " {:>5}", cells.get(&(label, p)).copied().unwrap_or(0)))?;
            }
            writeln!(f)?;
        }
        writeln!(f, "\n{:>15}  {:>7}  {:>9}  {:>8}", "CONFIDENCE", "SAMPLES", "MEAN", "CORRECT")?;
        for bin in report.calibration.iter().filter(|bin| bin.samples > 0) {
            let percent = |share: Option<f64>| format!("{:.2}%", share.unwrap_or(0.0) * 100.0);
            let (mean, correct) = (percent(bin.confidence), percent(bin.accuracy));
            writeln!(f, "  {:.4}-{:.4}  {:>7}  {mean:>9}  {correct:>8}", bin.above, bin.to, bin.samples)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::views::Views;
    use super::*;

    fn report(classes: usize) -> Report {
        let mut tally = Tally::default();
        for (label, predicted) in [(0, 0), (0, 1), (1, 1), (1, 1)] {
            let logits = (0..classes).map(|c| if c == predicted { 3.0 } else { 0.0 }).collect();
            tally.add(label, &Views::new(classes, logits));
        }
        let names = Some(vec!["ant".to_owned(), "bee".to_owned(), "\u{1b}[2Jcat".to_owned()]);
        let dataset = "pets/test".to_owned();
        Report::new(&Subject { dataset, classes, labels: 3, names, crops: Crops::Ten }, &tally)
    }

    #[test]
    fn shares_are_of_the_samples_that_they_are_about() {
        let report = report(6);
        assert_eq!((report.samples, report.top1, report.top5), (4, 0.75, Some(1.0)));
        let rows: Vec<_> =
            report.per_class.iter().map(|row| (row.samples, row.correct, row.accuracy)).collect();
        assert_eq!(rows, [(2, 1, Some(0.5)), (2, 2, Some(1.0)), (0, 0, None)]);
        assert_eq!(report.confusion, [[0, 0, 1], [0, 1, 1], [1, 1, 2]]);
        assert_eq!(report.calibration.len(), 15);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!((&json["crops"], &json["per_class"][1]["name"]), (&10.into(), &"bee".into()));
    }

    #[test]
    fn the_top_5_of_four_classes_are_not_reported() {
        let report = report(4);
        assert_eq!(report.top5, None);
        assert_eq!(report.figures().keys().collect::<Vec<_>>(), ["test_ece", "test_loss", "test_top1"]);
        assert!(serde_json::to_value(&report).unwrap().get("top5").is_none());
    }

    #[test]
    fn tables_have_a_line_for_each() {
        let report = report(6);
        let table = side_by_side(&[("a", &report), ("a longer name", &report)]);
        assert_eq!(table.lines().count(), 3);
        assert!(table.lines().nth(1).unwrap().starts_with("a               75.00%  100.00%"), "{table}");
        let details = report.details().to_string();
        assert!(details.contains("\n    1        2   100.00%  bee\n"), "{details}");
        assert!(details.contains("  \\u{1b}[2Jcat\n") && !details.contains('\u{1b}'), "{details}");
        assert!(details.contains("\n                0     1     1     0"), "{details}");
    }
}
