//! `parity/formula.py` in Rust: numbers that both sides of the parity tests compute by themselves.

use tch::Tensor;

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3))
}

/// Numbers in [-1, 1).
pub fn numbers(name: &str, count: usize) -> Vec<f64> {
    let seed = fnv1a(name);
    let number = |i: u64| {
        let mut z = seed.wrapping_add(i.wrapping_mul(GOLDEN));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 11) as f64 * 2f64.powi(-52) - 1.0
    };
    (1..=count as u64).map(number).collect()
}

/// A weight, a normalization's constant or statistic, or a bias, by its name and shape.
pub fn tensor(name: &str, shape: &[i64]) -> Tensor {
    let count: i64 = shape.iter().product();
    let u = Tensor::from_slice(&numbers(name, count as usize)).reshape(shape);
    if shape.len() > 1 {
        let fan_in: i64 = shape[1..].iter().product();
        u * (6.0 / fan_in as f64).sqrt()
    } else if name.ends_with("running_var") {
        u * 0.5 + 1.0
    } else if name.ends_with("weight") {
        u * 0.2 + 1.0
    } else if name.ends_with("bias") {
        u * 0.1 + 1.0
    } else {
        u * 0.1
    }
}

/// The norm of `values`, and their product with the numbers of their name.
pub fn fingerprint(name: &str, values: &Tensor) -> [f64; 2] {
    let flat = values.detach().to_kind(tch::Kind::Double).flatten(0, -1);
    let weights = Tensor::from_slice(&numbers(&format!("fingerprint {name}"), flat.numel()));
    [flat.norm().double_value(&[]), flat.dot(&weights).double_value(&[])]
}

/// One number for a name and a shape.
pub fn key(name: &str, shape: &[i64]) -> i64 {
    fnv1a(&format!("{name} {shape:?}")) as i64
}
