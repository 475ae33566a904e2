//! Evaluation is distributed, and its figures do not depend on how.

use super::{classifier, job, train};
use crate::evaluation::report::Report;

fn report(crops: u32, ranks: u32, threads: usize) -> Report {
    let mut job = job(&classifier("sync"), "");
    (job.epochs, job.steps) = (None, Some(3));
    job.evaluation.crops = crops.try_into().unwrap();
    train::<f32>(&job, ranks, threads).evaluation.unwrap()
}

#[test]
fn every_figure_has_the_same_bits_on_every_number_of_workers_whatever_the_crops() {
    for crops in [1, 10, 12, 144] {
        let alone = report(crops, 1, 1);
        assert_eq!((alone.samples, u32::from(alone.crops)), (70, crops));
        assert_eq!(alone.per_class.iter().map(|row| row.samples).sum::<u64>(), 70);
        assert_eq!(
            alone.per_class.iter().map(|row| row.correct).sum::<u64>(),
            (alone.top1 * 70.0).round() as u64
        );
        assert_eq!(alone.confusion.iter().map(|[_, _, n]| n).sum::<u64>(), 70);
        assert_eq!(alone.calibration.iter().map(|bin| bin.samples).sum::<u64>(), 70);
        assert!(alone.negative_log_likelihood > 0.0 && alone.top5.is_none());
        for (ranks, threads) in [(1, 3), (2, 1), (3, 2), (4, 1)] {
            assert_eq!(report(crops, ranks, threads), alone, "{crops} crops, {ranks} ranks");
        }
    }
}

#[test]
fn more_crops_give_other_figures() {
    let [one, ten, twelve] = [1, 10, 12].map(|crops| report(crops, 2, 1).negative_log_likelihood);
    assert!(one != ten && ten != twelve);
}
