//! Weights of no network: which one they are nearest to, and what keeps them from being its.

use super::{Shapes, forms, identify_shapes, is_of_weights, size};
use crate::models::{self, registry};
use crate::vars::Vars;
use lockstep_common::digest::TensorBytes;
use lockstep_common::job::{BatchNorm, ModelSpec};
use lockstep_common::shown::{counted, shown};
use std::collections::BTreeMap;

/// How many tensors of a kind are named.
const NAMED: usize = 3;

/// What keeps `tensors`, whose shapes are `shapes`, from being the weights of the network that has most of their names. Some
/// lines, of which the first says whose they nearly are.
pub(super) fn differences(tensors: &[TensorBytes<'_>], shapes: &Shapes<'_>) -> String {
    let count = counted(shapes.len() as u64, "tensor");
    let Some((spec, common)) = nearest(shapes) else {
        return match prefixed(shapes) {
            Some((prefix, spec)) => format!(
                "the names of its {count} begin with `{}`, and without that they are those of {}; save them without it",
                shown(prefix),
                named(&spec)
            ),
            None => format!("of its {count} none has a name of a network of `worker models`"),
        };
    };
    let found = sized(spec, shapes).and_then(|spec| Some((models::outline(&spec).ok()?, spec)));
    let Some((outline, spec)) = found else {
        return format!("its {count} are those of no network of `worker models`");
    };
    let mistyped = tensors.iter().filter(|t| shapes.contains_key(&*t.name) && !is_of_weights(&t.dtype));
    let mistyped: Vec<_> = mistyped.map(|t| format!("`{}` is {}", shown(&t.name), shown(&t.dtype))).collect();
    let lines = [
        ("missing", missing(&outline, shapes)),
        ("too much", unknown(&outline, shapes)),
        ("other shape", misshaped(&outline, shapes)),
        ("not of type F64, F32, F16 or BF16", mistyped),
    ];
    let mut told = format!(
        "its {count} are those of no network of `worker models`; nearest is {}, which has {common} of their names",
        named(&spec)
    );
    for (what, tensors) in lines.into_iter().filter(|(_, tensors)| !tensors.is_empty()) {
        told += &format!("\n  {what}: {}", list(&tensors));
    }
    told
}

/// The form of a network that has most of the names, and how many of them; of several the one that lacks least.
fn nearest(shapes: &Shapes<'_>) -> Option<(ModelSpec, usize)> {
    let candidates = registry().iter().flat_map(forms).filter_map(|spec| {
        let outline = models::outline(&spec).ok()?;
        let common = outline.iter().filter(|(name, _)| shapes.contains_key(name)).count();
        let fit = outline.iter().filter(|(name, var)| shapes.get(name) == Some(&&*size(&var.tensor))).count();
        let missing = outline.iter().count() - common;
        (common > 0).then_some((common, std::cmp::Reverse(missing), fit, spec))
    });
    // The first of equals, as the registry has the networks of the papers first.
    let best = candidates.reduce(|best, next| match (next.0, next.1, next.2) > (best.0, best.1, best.2) {
        true => next,
        false => best,
    });
    best.map(|(common, _, _, spec)| (spec, common))
}

/// What all names begin with, up to a dot, and the network whose they are without it: `module.` of PyTorch's DataParallel, say.
fn prefixed<'a>(shapes: &Shapes<'a>) -> Option<(&'a str, ModelSpec)> {
    let first: &'a str = shapes.keys().next()?;
    let prefix = &first[..=first.find('.')?];
    let without: Option<Shapes<'a>> =
        shapes.iter().map(|(name, shape)| Some((name.strip_prefix(prefix)?, *shape))).collect();
    Some((prefix, identify_shapes(&without?)?))
}

/// `spec` with the number of classes and of channels that leaves the fewest shapes different.
fn sized(spec: ModelSpec, shapes: &Shapes<'_>) -> Option<ModelSpec> {
    let outline = models::outline(&spec).ok()?;
    let mut told: [BTreeMap<usize, usize>; 2] = Default::default();
    for (name, var) in outline.iter() {
        let (mine, Some(theirs)) = (size(&var.tensor), shapes.get(name)) else { continue };
        let differ: Vec<_> = (0..mine.len()).filter(|&i| theirs.get(i) != Some(&mine[i])).collect();
        if let [side @ (0 | 1)] = differ[..]
            && theirs.len() == mine.len()
        {
            *told[side].entry(theirs[side]).or_default() += 1;
        }
    }
    let [classes, channels] = told.map(|counts| {
        let most = counts.into_iter().max_by_key(|(_, count)| *count).map(|(value, _)| Some(value));
        [None].into_iter().chain(most).collect::<Vec<_>>()
    });
    let with = |classes: Option<usize>, channels: Option<usize>| {
        let mut spec = spec.clone();
        for (option, value) in [("classes", classes), ("in_channels", channels)] {
            spec.options.extend(value.map(|value| (option.to_owned(), value.into())));
        }
        let different = misshaped(&models::outline(&spec).ok()?, shapes).len();
        Some((different, spec))
    };
    let all = classes.iter().flat_map(|classes| channels.iter().map(|channels| with(*classes, *channels)));
    all.flatten().min_by_key(|(different, _)| *different).map(|(_, spec)| spec)
}

fn missing(outline: &Vars, shapes: &Shapes<'_>) -> Vec<String> {
    let names = outline.iter().map(|(name, _)| name).filter(|name| !shapes.contains_key(name));
    names.map(|name| format!("`{name}`")).collect()
}

fn unknown(outline: &Vars, shapes: &Shapes<'_>) -> Vec<String> {
    let names = shapes.keys().filter(|name| outline.var(name).is_err());
    names.map(|name| format!("`{}`", shown(name))).collect()
}

fn misshaped(outline: &Vars, shapes: &Shapes<'_>) -> Vec<String> {
    let differ = outline.iter().filter_map(|(name, var)| {
        let (expected, found) = (size(&var.tensor), *shapes.get(name)?);
        (expected != found).then(|| format!("`{name}` is {found:?} instead of {expected:?}"))
    });
    differ.collect()
}

/// The first of them and how many more there are.
fn list(tensors: &[String]) -> String {
    let first = tensors[..tensors.len().min(NAMED)].join(", ");
    match tensors.len().saturating_sub(NAMED) {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}

/// A network and its options, as a reader calls it.
fn named(spec: &ModelSpec) -> String {
    let mut options: Vec<_> = spec.options.iter().map(|(key, value)| format!("`{key} = {value}`")).collect();
    if spec.batch_norm == BatchNorm::None {
        options.push("`batch_norm = \"none\"`".to_owned());
    }
    match options.is_empty() {
        true => format!("`{}`", spec.name),
        false => format!("`{}` with {}", spec.name, options.join(", ")),
    }
}
