//! Gradient descent on a least-squares problem, over every form in which gradients travel.

use super::{Arriving, Shapes, Span, Wire, wire};
use lockstep_collectives::{Group, Numbers, Tag, TagKind};
use lockstep_common::job::{CollectiveSpec, Reduction, WireFormat};
use lockstep_common::placement::Placement;
use lockstep_common::rng::Stream;
use std::sync::Arc;
use std::time::Duration;

const SHARDS: u32 = 4;
const ROWS: usize = 24;
const COLS: usize = 16;
/// A matrix and a bias.
const LEN: usize = ROWS * COLS + ROWS;
/// Of the descent.
const RATE: f32 = 0.01;

fn shapes() -> Shapes {
    let parameters = vec![
        ("fc.bias".to_owned(), vec![ROWS as i64]),
        ("fc.weight".to_owned(), vec![ROWS as i64, COLS as i64]),
    ];
    Shapes { network: "model", parameters }
}

/// Another order in the bucket than that of the names.
fn spans() -> Vec<Span> {
    let matrix = ROWS * COLS;
    vec![Span { parameter: 1, range: 0..matrix }, Span { parameter: 0, range: matrix..LEN }]
}

fn spec(wire: WireFormat) -> CollectiveSpec {
    let wire_rank = (wire == WireFormat::PowerSgd).then_some(1);
    CollectiveSpec { wire, wire_rank, ..CollectiveSpec::default() }
}

/// The weights at which the losses ½ |w − t|² of all shards together are least.
fn target() -> Vec<f32> {
    let mut stream = Stream::new(4, "target", &[]);
    (0..LEN).map(|_| stream.normal() as f32).collect()
}

/// Adds to the gradient of `shard` at `step` what makes compressing it hard.
type Disturb = fn(u64, u32, &mut [f32]);

/// In every block of 64 one number is large, and cancels between the shards.
fn large_and_opposite(_step: u64, shard: u32, gradient: &mut [f32]) {
    let large = if shard < SHARDS / 2 { LARGE } else { -LARGE };
    gradient.iter_mut().step_by(64).for_each(|g| *g += large);
}

/// See [`large_and_opposite`].
const LARGE: f32 = 100.0;

/// One direction is larger than all others together, and changes its sign with every step.
fn large_and_alternating(step: u64, _shard: u32, gradient: &mut [f32]) {
    let mut stream = Stream::new(5, "direction", &[]);
    let (u, v): (Vec<_>, Vec<_>) =
        ((0..ROWS).map(|_| stream.normal()).collect(), (0..COLS).map(|_| stream.normal()).collect());
    let sign = if step.is_multiple_of(2) { 1.0 } else { -1.0 };
    for (i, g) in gradient[..ROWS * COLS].iter_mut().enumerate() {
        *g += (sign * u[i / COLS] * v[i % COLS]) as f32;
    }
}

fn undisturbed(_step: u64, _shard: u32, _gradient: &mut [f32]) {}

/// The weights after `steps` on `ranks` ranks, which all must agree. Without `feedback` what is lost is lost.
fn descend(spec: &CollectiveSpec, ranks: u32, steps: u64, disturb: Disturb, feedback: bool) -> Vec<f32> {
    let placement = Placement::even(SHARDS, ranks);
    let groups = Group::in_process(&placement, Reduction::Exact, Duration::from_secs(30)).unwrap();
    let run = |group: Group| {
        let owned = group.placement().range(group.rank());
        let (wire, target) = (wire(spec, &shapes(), 1, owned.len(), SHARDS), target());
        let mut weights = vec![0f32; LEN];
        for step in 0..steps {
            let gradient = |shard| {
                let own = weights.iter().zip(&target).map(|(w, t)| (w - t) / SHARDS as f32);
                let mut own: Vec<f32> = own.collect();
                disturb(step, shard, &mut own);
                Numbers::from(own)
            };
            let sum = exchange(&wire, &group, step, owned.clone().map(gradient).collect());
            weights.iter_mut().zip(sum).for_each(|(w, g)| *w -= RATE * g);
            if !feedback {
                forget(wire.as_ref());
            }
        }
        weights
    };
    let mut all: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let threads: Vec<_> = groups.into_iter().map(|group| scope.spawn(|| run(group))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let first = all.swap_remove(0);
    all.iter().for_each(|other| assert_eq!(bits(other), bits(&first)));
    first
}

fn exchange(wire: &Arc<dyn Wire<f32>>, group: &Group, step: u64, leaves: Vec<Numbers<f32>>) -> Vec<f32> {
    let tag = Tag::new(step, 0, TagKind::Gradient);
    let mut bucket: Box<dyn Arriving<f32>> = wire.clone().send(group, tag, spans(), leaves).unwrap();
    bucket.advance().unwrap();
    let mut sum = vec![f32::NAN; spans().iter().map(|span| span.range.len()).sum()];
    bucket.wait(&mut sum).unwrap();
    sum
}

fn forget(wire: &dyn Wire<f32>) {
    let feedback = wire.feedback().unwrap();
    for slot in 0..feedback.owned() {
        for parameter in 0..feedback.lengths().len() {
            feedback.of(slot, parameter).lock().fill(0.0);
        }
    }
}

fn bits(weights: &[f32]) -> Vec<u32> {
    weights.iter().map(|w| w.to_bits()).collect()
}

/// The root of the mean square distance from the target, of the numbers that are not themselves disturbed.
fn distance(weights: &[f32]) -> f32 {
    let target = target();
    let far: Vec<f32> =
        (0..LEN).filter(|i| !i.is_multiple_of(64)).map(|i| (weights[i] - target[i]).powi(2)).collect();
    (far.iter().sum::<f32>() / far.len() as f32).sqrt()
}

#[test]
fn every_form_gives_the_same_bits_on_every_number_of_ranks() {
    for format in [WireFormat::F32, WireFormat::Bf16, WireFormat::Int8, WireFormat::PowerSgd] {
        let spec = spec(format);
        let alone = descend(&spec, 1, 60, large_and_alternating, true);
        assert!(alone.iter().all(|w| w.is_finite()));
        for ranks in 2..=SHARDS {
            let other = descend(&spec, ranks, 60, large_and_alternating, true);
            assert_eq!(bits(&other), bits(&alone), "{format:?} on {ranks} ranks");
        }
    }
}

/// With η for the rate and q for what 8 bits resolve beside the large number: what the shards keep is at most V q/2, so
/// the weights are at most η V q/2 from where they would be without rounding leaves. The two nodes above the leaves
/// have a sum of twice the size, and round by chance with a variance of at most (2 q)²/4 each, of which the descent
/// leaves η/2.
#[test]
fn int8_with_feedback_arrives_where_f32_does_and_without_it_does_not() {
    let q = LARGE / 127.0;
    let bound = RATE * SHARDS as f32 * q / 2.0 + (RATE / 2.0 * 2.0 * q * q).sqrt();
    let exact = distance(&descend(&spec(WireFormat::F32), 2, 1500, large_and_opposite, true));
    let with = distance(&descend(&spec(WireFormat::Int8), 2, 1500, large_and_opposite, true));
    let without = distance(&descend(&spec(WireFormat::Int8), 2, 1500, large_and_opposite, false));
    assert!(exact < 1e-3, "{exact}");
    assert!(with <= bound, "{with}, bound {bound}");
    assert!(without > 5.0 * bound, "{without}, bound {bound}");
}

/// The alternating direction keeps even the exact descent swinging; approximating its gradient makes it swing at most
/// twice as far.
#[test]
fn powersgd_with_feedback_arrives_where_f32_does_and_without_it_does_not() {
    let exact = distance(&descend(&spec(WireFormat::F32), 2, 3000, large_and_alternating, true));
    let with = distance(&descend(&spec(WireFormat::PowerSgd), 2, 3000, large_and_alternating, true));
    let without = distance(&descend(&spec(WireFormat::PowerSgd), 2, 3000, large_and_alternating, false));
    assert!(exact < 0.05, "{exact}");
    assert!(with < 2.0 * exact, "{with}, {exact} with f32");
    assert!(without > 10.0 * exact, "{without}, {exact} with f32");
}

/// Each exchange sends the best approximation of its rank there is, once the basis has warmed up, and the bias whole.
#[test]
fn powersgd_sends_a_matrix_of_its_rank_whole() {
    let group = Group::solo(Placement::even(SHARDS, 1), Reduction::Exact).unwrap();
    let wire = wire(&spec(WireFormat::PowerSgd), &shapes(), 1, SHARDS as usize, SHARDS);
    let leaf = |shard| {
        let mut gradient = vec![0f32; LEN];
        large_and_alternating(0, shard, &mut gradient);
        gradient[ROWS * COLS..].fill(shard as f32);
        gradient
    };
    let sum = exchange(&wire, &group, 0, (0..SHARDS).map(|s| leaf(s).into()).collect());
    for (i, sum) in sum.iter().enumerate() {
        let exact: f32 = (0..SHARDS).map(|s| leaf(s)[i]).sum();
        assert!((sum - exact).abs() <= 1e-5 * exact.abs().max(1.0), "{sum} instead of {exact} at {i}");
    }
}

#[test]
fn what_is_not_finite_reaches_every_rank() {
    for format in [WireFormat::F32, WireFormat::Bf16, WireFormat::Int8, WireFormat::PowerSgd] {
        for bad in [f32::NAN, f32::INFINITY] {
            let groups =
                Group::in_process(&Placement::even(SHARDS, 2), Reduction::Exact, Duration::from_secs(30))
                    .unwrap();
            std::thread::scope(|scope| {
                for group in groups {
                    scope.spawn(move || {
                        let owned = group.placement().range(group.rank());
                        let wire = wire(&spec(format), &shapes(), 1, owned.len(), SHARDS);
                        let leaf = |shard| {
                            let mut gradient = vec![1f32; LEN];
                            gradient[70] = if shard == 3 { bad } else { 1.0 };
                            gradient.into()
                        };
                        let sum = exchange(&wire, &group, 0, owned.map(leaf).collect());
                        assert!(!sum[70].is_finite(), "{format:?}: {bad} became {}", sum[70]);
                    });
                }
            });
        }
    }
}

/// Gradients of zeros, such as of a network whose last layer starts at zero, do not end the search for directions.
#[test]
fn powersgd_goes_on_after_a_gradient_of_zeros() {
    fn late(step: u64, _shard: u32, gradient: &mut [f32]) {
        if step < 3 {
            gradient.fill(0.0);
        }
    }
    let early = distance(&descend(&spec(WireFormat::PowerSgd), 1, 3, late, true));
    let later = distance(&descend(&spec(WireFormat::PowerSgd), 1, 1500, late, true));
    assert!(later < 0.2 * early, "{later} after {early}");
    let never = distance(&descend(&spec(WireFormat::PowerSgd), 1, 1500, undisturbed, true));
    assert!(never < 0.2 * early, "{never} after {early}");
}
