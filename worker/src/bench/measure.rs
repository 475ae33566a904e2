//! The loop that is timed.

use super::args::{Column, Effort, Size};
use super::wire::Wire;
use anyhow::{Result, bail};
use lockstep_collectives::{Group, Numbers, Tag, TagKind};
use std::time::{Duration, Instant};

/// All-reduces before the first that counts: pages are touched, windows have opened, both algorithms' paths are warm.
const WARM_UP: u32 = 3;

/// The columns take turns so many times per size, because a machine's speed drifts.
pub(super) const ROUNDS: u32 = 5;

/// Bounds of what `Effort::Seconds` comes to.
const ITERATIONS: std::ops::RangeInclusive<u32> = 5..=20_000;

/// Up to so many bytes, all-reduces are timed in chains of [`CHAIN`], each begun when the one before is done. A barrier
/// leaves ranks up to a link's delay apart, which is as long as a small all-reduce itself takes; a chain shares that out.
const SMALL_BYTES: u64 = 64 << 10;

/// All-reduces in such a chain.
const CHAIN: u32 = 10;

/// After so many elements the leaves repeat themselves: a prime, so that no piece of a power of two elements looks
/// like its neighbour.
const PERIOD: usize = 1021;

/// One column's group and how far it is.
pub(super) struct Way {
    group: Group,
    column: Column,
    wire: Wire,
    /// Names the collectives.
    counter: u64,
}

/// What the leaves of one size hold, and what their sum must be.
pub(super) struct Payload {
    elements: usize,
    /// All-reduces per measurement.
    chain: u32,
    /// By own shard, one period.
    leaves: Vec<Vec<f32>>,
    sum: Vec<f32>,
}

/// The largest magnitude in a leaf.
const LARGEST: usize = PERIOD / 2;

/// Element `i` of the leaf of `shard`. Small whole numbers, whose sums over 1024 shards f32 holds exactly in any order.
fn value(shard: u32, i: usize) -> f32 {
    ((i + 31 * shard as usize) % PERIOD) as f32 - LARGEST as f32
}

impl Payload {
    pub(super) fn new(group: &Group, size: Size) -> Self {
        let placement = group.placement();
        let leaf = |shard| (0..PERIOD).map(|i| value(shard, i)).collect();
        let sum = |i| (0..placement.shards()).map(|shard| value(shard, i)).sum();
        Self {
            elements: size.elements(),
            chain: if size.0 <= SMALL_BYTES { CHAIN } else { 1 },
            leaves: placement.range(group.rank()).map(leaf).collect(),
            sum: (0..PERIOD).map(sum).collect(),
        }
    }

    fn fill(&self, group: &Group) -> Vec<Numbers<f32>> {
        let fill = |leaf: &Vec<f32>| {
            let mut numbers = group.numbers(self.elements);
            for part in numbers.chunks_mut(PERIOD) {
                part.copy_from_slice(&leaf[..part.len()]);
            }
            numbers
        };
        self.leaves.iter().map(fill).collect()
    }

    /// Where `result` is further than `tolerance` from the sum, what it holds and what it should.
    fn wrong(&self, result: &[f32], tolerance: f32) -> Option<(usize, f32, f32)> {
        // A NaN is not near anything.
        let near = |(found, wanted): (&f32, &f32)| (found - wanted).abs() <= tolerance;
        let right = |part: &[f32]| part.iter().zip(&self.sum).all(near);
        let (period, part) = result.chunks(PERIOD).enumerate().find(|(_, part)| !right(part))?;
        let (i, found) = part.iter().enumerate().find(|(i, found)| !near((found, &self.sum[*i])))?;
        Some((period * PERIOD + i, *found, self.sum[i]))
    }
}

impl Way {
    pub(super) fn new(group: Group, column: Column) -> Self {
        Self { group, column, wire: Wire::new(column.wire), counter: 0 }
    }

    pub(super) fn group(&self) -> &Group {
        &self.group
    }

    /// Warms up, and agrees with the other ranks on how often to measure.
    pub(super) fn prepare(&mut self, payload: &Payload, effort: Effort) -> Result<u32> {
        let mut shortest = Duration::MAX;
        for _ in 0..WARM_UP {
            shortest = shortest.min(self.once(payload)?);
        }
        let seconds = match effort {
            Effort::Iterations(iterations) => return Ok(iterations),
            Effort::Seconds(seconds) => seconds,
        };
        let mine = shortest.as_nanos() as u64;
        let tag = Tag::new(self.counter, 0, TagKind::Statistics);
        let all = self.group.all_gather(tag, mine.to_le_bytes().to_vec())?.wait()?;
        let nanoseconds = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes);
        let all: Result<Vec<u64>, _> = all.iter().map(|bytes| nanoseconds(bytes)).collect();
        let slowest = all?.into_iter().max().unwrap_or_default().max(1);
        let wanted = (seconds * 1e9 / (slowest * u64::from(payload.chain)) as f64).ceil() as u32;
        Ok(wanted.clamp(*ITERATIONS.start(), *ITERATIONS.end()))
    }

    /// The time of one all-reduce: filled, entered by all ranks together, timed, checked.
    pub(super) fn once(&mut self, payload: &Payload) -> Result<Duration> {
        self.counter += 1;
        let leaves: Vec<_> = (0..payload.chain).map(|_| payload.fill(&self.group)).collect();
        let mut sums = Vec::with_capacity(leaves.len());
        self.group.barrier(Tag::new(self.counter, 0, TagKind::Barrier))?.wait()?;
        let start = Instant::now();
        for (link, leaves) in (0..).zip(leaves) {
            let tag = Tag::new(self.counter, 0, TagKind::Gradient).index(link);
            sums.push(self.wire.all_reduce(&self.group, tag, leaves)?);
        }
        let elapsed = start.elapsed() / payload.chain;
        sums.iter().try_for_each(|sum| self.check(payload, sum))?;
        Ok(elapsed)
    }

    fn check(&self, payload: &Payload, sum: &[f32]) -> Result<()> {
        let name = self.column.name();
        if sum.len() != payload.elements {
            bail!("{name}: the sum has {} elements instead of {}", sum.len(), payload.elements);
        }
        let tolerance = self.wire.tolerance(self.group.placement().shards(), LARGEST as f32);
        match payload.wrong(sum, tolerance) {
            None => Ok(()),
            Some((element, found, expected)) => bail!(
                "{name}: the sum of {} elements is wrong at element {element}: {found} instead of {expected}",
                payload.elements
            ),
        }
    }

    /// Leaves the group once the other ranks have what this one sent.
    pub(super) fn close(self, limit: Duration) {
        self.group.close(limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::job::{Backend, Reduction, WireFormat};
    use lockstep_common::placement::Placement;

    #[test]
    fn ranks_agree_on_the_iterations_and_a_wrong_element_is_found() {
        let patience = Duration::from_secs(30);
        let groups = Group::in_process(&Placement::even(5, 2), Reduction::Exact, patience).unwrap();
        let size = Size(4 * 5000);
        let measured = |group: &Group| {
            let payload = Payload::new(group, size);
            let count = |wire| {
                let column = Column { backend: Backend::Auto, reduction: Reduction::Exact, wire };
                let mut way = Way::new(group.clone(), column);
                // The forms share a group here.
                way.counter = wire as u64 * 1_000_000;
                let count = way.prepare(&payload, Effort::Seconds(0.01)).unwrap();
                way.once(&payload).unwrap();
                count
            };
            [WireFormat::F32, WireFormat::Bf16, WireFormat::Int8].map(count)
        };
        let counts: Vec<_> = std::thread::scope(|scope| {
            let ranks: Vec<_> = groups.iter().map(|group| scope.spawn(|| measured(group))).collect();
            ranks.into_iter().map(|r| r.join().unwrap()).collect()
        });
        assert_eq!(counts[0], counts[1]);

        let payload = Payload::new(&groups[0], size);
        let mut sum: Vec<f32> = (0..5000).map(|i| payload.sum[i % PERIOD]).collect();
        assert_eq!(payload.wrong(&sum, 0.5), None);
        sum[4999] += 1.0;
        assert_eq!(payload.wrong(&sum, 0.5), Some((4999, sum[4999], sum[4999] - 1.0)));
        assert_eq!(payload.wrong(&sum, 1.0), None);
        sum[17] = f32::NAN;
        assert!(payload.wrong(&sum, 1.0).is_some_and(|(element, _, _)| element == 17));
    }
}
