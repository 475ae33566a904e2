"""Numbers that both sides of the parity tests compute by themselves, so that no weights need be stored.

`numbers(name, n)[i]` is a number in [-1, 1): splitmix64 of the name's FNV-1a hash and i.
`worker/nn/tests/common/formula.rs` is the same in Rust.
"""

import numpy as np
import torch

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def fnv1a(text):
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = (h ^ byte) * 0x100000001B3 % 2**64
    return h


def numbers(name, count):
    with np.errstate(over="ignore"):
        z = np.uint64(fnv1a(name)) + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0


def tensor(name, shape):
    """A weight, a normalization's constant or statistic, or a bias, by its name and shape."""
    u = torch.from_numpy(numbers(name, int(np.prod(shape)))).reshape(shape)
    if len(shape) > 1:
        # He et al. 2015: the variance 2 / fan-in keeps the size of activations.
        return u * (6.0 / np.prod(shape[1:])) ** 0.5
    if name.endswith("running_var"):
        return 1.0 + 0.5 * u
    if name.endswith("weight"):
        return 1.0 + 0.2 * u
    # Most values pass the ReLUs, so that a deep network does not amplify rounding until digits are no longer comparable.
    return 1.0 + 0.1 * u if name.endswith("bias") else 0.1 * u


def fingerprint(name, values):
    """Two numbers that tell a large tensor apart: its norm, and its product with the numbers of its name."""
    flat = values.detach().double().flatten()
    weights = torch.from_numpy(numbers("fingerprint " + name, flat.numel()))
    return torch.stack([flat.norm(), flat @ weights])


def key(name, shape):
    """One number for a name and a shape, as a signed integer of 64 bits."""
    h = fnv1a(f"{name} {list(shape)}")
    return h - 2**64 if h >= 2**63 else h
