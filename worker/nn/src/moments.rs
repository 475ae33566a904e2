//! Batch statistics as flat vectors: merging shards, and what a committed step leaves in the running statistics.

use crate::error::NnError;
use crate::forward::BnRecord;
use crate::shim::copy_all;
use crate::vars::Vars;
pub use lockstep_common::moments::merge as merge_moments;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// The records of one shard as one vector whose sum over all shards [`average_records`] turns into their
/// average, weighted by the samples: for batch norm over each shard by itself.
pub fn weighted_records(records: &[BnRecord]) -> Vec<f64> {
    let mut flat = Vec::new();
    for record in records {
        flat.push(record.count);
        flat.extend(record.mean.iter().chain(&record.var_unbiased).map(|v| v * record.count));
    }
    flat
}

/// Replaces the statistics in `records` by the average in `summed`, the sum over all shards of
/// [`weighted_records`].
pub fn average_records(records: &mut [BnRecord], summed: &[f64]) -> Result<(), NnError> {
    let expected: usize = records.iter().map(|r| 1 + 2 * r.mean.len()).sum();
    if summed.len() != expected {
        return Err(NnError::Shape {
            what: "averaging batch statistics".to_owned(),
            expected: format!("{expected} values"),
            got: format!("{}", summed.len()),
        });
    }
    let mut values = summed.iter().copied();
    for record in records {
        record.count = values.next().unwrap_or(0.0);
        let share = if record.count > 0.0 { 1.0 / record.count } else { 0.0 };
        for (slot, value) in record.mean.iter_mut().chain(&mut record.var_unbiased).zip(values.by_ref()) {
            *slot = value * share;
        }
    }
    Ok(())
}

/// Moves the running statistics of `vars` towards the batches in `records`, in their order.
///
/// A record of fewer than two values has no unbiased variance and changes nothing.
pub fn apply_running_stats<'a>(
    vars: &Vars,
    records: impl IntoIterator<Item = &'a BnRecord>,
) -> Result<(), NnError> {
    let records: Vec<_> = records.into_iter().filter(|r| r.count > 1.0).collect();
    let name = |record: &BnRecord, buffer| format!("{}.{buffer}", record.layer);
    let mut running = BTreeMap::new();
    for name in records.iter().flat_map(|record| ["running_mean", "running_var"].map(|b| name(record, b))) {
        let tensor = vars.var(&name)?.tensor.f_detach()?;
        running.insert(name, (tensor, Vec::new()));
    }
    if running.is_empty() {
        return Ok(());
    }
    // On a GPU each copy costs a wait: one for all there, and one back.
    let all: Vec<_> = running.values().map(|(tensor, _)| tensor).collect();
    let (kind, device) = (all[0].f_kind()?, all[0].device());
    let all =
        Vec::<f64>::try_from(Tensor::f_cat(&all, 0)?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?)?;
    let mut rest = all.as_slice();
    for (tensor, values) in running.values_mut() {
        let (own, others) = rest.split_at(tensor.numel());
        *values = own.to_vec();
        rest = others;
    }
    for record in records {
        for (buffer, batch) in [("running_mean", &record.mean), ("running_var", &record.var_unbiased)] {
            let values = running.get_mut(&name(record, buffer)).map(|(_, values)| values);
            for (r, b) in values.into_iter().flatten().zip(batch) {
                let moved = (1.0 - record.momentum) * *r + record.momentum * b;
                *r = if kind == Kind::Double { moved } else { f64::from(moved as f32) };
            }
        }
    }
    let values: Vec<f64> = running.values().flat_map(|(_, values)| values).copied().collect();
    let values = Tensor::f_from_slice(&values)?.f_to_kind(kind)?.f_to_device(device)?;
    let (mut to, mut from, mut start) = (Vec::new(), Vec::new(), 0);
    for (tensor, _) in running.into_values() {
        let length = tensor.numel() as i64;
        from.push(values.f_narrow(0, start, length)?);
        start += length;
        to.push(tensor);
    }
    copy_all(&to, &from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(values: &[f64]) -> Vec<f64> {
        let n = values.len() as f64;
        let mean = if n > 0.0 { values.iter().sum::<f64>() / n } else { 0.0 };
        vec![n, mean, values.iter().map(|v| (v - mean).powi(2)).sum()]
    }

    #[test]
    fn merged_moments_equal_those_of_all_values_even_far_from_zero() {
        // With E[x²] − E[x]² the variance of these values would come out as 0 or worse.
        let values: Vec<f64> = (0..100).map(|i| 1e9 + f64::from(i % 7)).collect();
        let mut merged = moments(&[]);
        for part in [&values[..1], &values[1..40], &[], &values[40..]] {
            merge_moments(&mut merged, &moments(part));
        }
        let whole = moments(&values);
        assert_eq!(merged[0], whole[0]);
        assert!((merged[1] - whole[1]).abs() < 1e-6);
        assert!((merged[2] / whole[2] - 1.0).abs() < 1e-6, "{} {}", merged[2], whole[2]);
    }

    #[test]
    fn records_average_by_their_sample_counts() {
        let record = |count, mean, var| BnRecord {
            network: 0,
            layer: "bn".into(),
            momentum: 0.1,
            count,
            mean: vec![mean],
            var_unbiased: vec![var],
        };
        let mut mine = vec![record(1.0, 4.0, 0.0)];
        let summed: Vec<f64> = weighted_records(&mine)
            .iter()
            .zip(weighted_records(&[record(3.0, 8.0, 4.0)]))
            .map(|(a, b)| a + b)
            .collect();
        average_records(&mut mine, &summed).unwrap();
        assert_eq!((mine[0].count, mine[0].mean[0], mine[0].var_unbiased[0]), (4.0, 7.0, 3.0));
        assert!(average_records(&mut mine, &summed[1..]).is_err());
    }

    #[test]
    fn running_statistics_move_by_each_record_in_turn_and_are_rounded_as_they_are_kept() {
        let mut vars = Vars::new("model", 1, Kind::Float, Device::Cpu);
        for name in ["a", "b"] {
            let mut scope = vars.root();
            let mut scope = scope.sub(name);
            let _ = (
                scope.buffer("running_mean", &[1], 0.1).unwrap(),
                scope.buffer("running_var", &[1], 1.0).unwrap(),
            );
        }
        let record = |layer: &str, count, mean| BnRecord {
            network: 0,
            layer: layer.to_owned(),
            momentum: 0.1,
            count,
            mean: vec![mean],
            var_unbiased: vec![mean],
        };
        let records =
            [record("b", 4.0, 0.7), record("a", 4.0, 3.0), record("a", 1.0, 9.0), record("b", 4.0, 0.3)];
        apply_running_stats(&vars, &records).unwrap();
        let move_to = |running: f32, mean: f64| (0.9 * f64::from(running) + 0.1 * mean) as f32;
        let found = |name: &str| Vec::<f32>::try_from(&vars.var(name).unwrap().tensor).unwrap()[0];
        assert_eq!(found("a.running_mean"), move_to(0.1, 3.0));
        assert_eq!(found("b.running_mean"), move_to(move_to(0.1, 0.7), 0.3));
        assert_eq!(found("b.running_var"), move_to(move_to(1.0, 0.7), 0.3));
    }
}
