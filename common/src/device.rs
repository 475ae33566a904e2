//! The names of devices: `cpu`, `cuda:0`, `cuda:1`, ...

/// What is wrong with a name that is none.
pub const EXPECTED: &str = "a device is `cpu` or `cuda:0`, `cuda:1`, ...";

/// The GPU that `name` names; `Some(None)` for the CPU, `None` if it names no device.
pub fn gpu(name: &str) -> Option<Option<usize>> {
    if name == "cpu" {
        return Some(None);
    }
    let index = name.strip_prefix("cuda:").filter(|index| index.bytes().all(|b| b.is_ascii_digit()))?;
    Some(Some(index.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_and_numbered_gpus_are_devices_and_nothing_else() {
        let named = ["cpu", "cuda:0", "cuda:12"].map(gpu);
        assert_eq!(named, [Some(None), Some(Some(0)), Some(Some(12))]);
        for name in
            ["", "cuda", "cuda:", "cuda:+1", "cuda:-1", "cuda:x", "gpu", "CPU", "cuda:99999999999999999999"]
        {
            assert_eq!(gpu(name), None, "{name}");
        }
    }
}
