"""`make parity`: every network trains for ten steps beside PyTorch, from the same weights, on the same samples.

For each case of networks.py:
- the library's network, seeded, is written as it stores it, in f64, and a real job begins with it: coordinator and worker
  processes, on one worker and on two, each with half of the logical shards;
- its images are Fashion-MNIST's, enlarged before they are imported;
- `coordinator audit --samples` says which samples each step has been given, after it has proven that from the hashes
  that the workers reported;
- PyTorch takes the same steps, on one batch, with the same optimizer: SGD with momentum, RMSProp in TensorFlow's form
  (timm's) or Adam;
- all ten losses, auxiliary ones included, agree to LIMIT, and both jobs end with the same digest.

Dropout and augmentation are off: their random numbers are Lockstep's own.
"""

import gzip
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm.optim
import torch
from safetensors.torch import save_file
from torch import optim
from torch.nn import functional as F

from compare import CLASSES, command_line, randomize

STEPS = 10
SHARDS = 2
# Both sides compute in f64, 2^-53 = 1.1e-16 an operation, and add in other orders: a loss of the first step differs by some
# 1e-15. A step amplifies what the one before left: a gradient differs by up to 1e-10 of itself (compare.py), and with
# updates of about a hundredth of the weights ten steps leave some 1e-12 to 1e-10. A value whose sign is decided by such a
# difference, at a ReLU or a max pooling, would switch at most a few of millions of terms. 1e-9 is above all that, and seven
# digits below the effect of one wrong coefficient.
LIMIT = 1e-9


@dataclass
class Optimizer:
    """A job file's section and its counterpart."""

    section: dict
    make: callable = field(repr=False)


# At these rates batches of four make losses grow fivefold at most.
SGD = Optimizer(
    {"name": "sgd", "lr": 0.001, "momentum": 0.9, "weight_decay": 5e-4},
    lambda p: optim.SGD(p, lr=0.001, momentum=0.9, weight_decay=5e-4))
ADAM = Optimizer(
    {"name": "adam", "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-3},
    lambda p: optim.Adam(p, lr=1e-3, betas=(0.9, 0.999), eps=1e-3))
RMSPROP = Optimizer(
    {"name": "rmsprop", "form": "tensorflow", "lr": 0.001, "alpha": 0.9, "eps": 1.0, "momentum": 0.9,
     "weight_decay": 4e-5},
    lambda p: timm.optim.RMSpropTF(p, lr=0.001, alpha=0.9, eps=1.0, momentum=0.9, weight_decay=4e-5))

# The paper's kind of optimizer; Adam, which no paper here has, where it makes one more of each.
OPTIMIZERS = {
    "nin": ADAM, "googlenet": SGD, "googlenet-paper": SGD, "bn-inception": ADAM, "inception-v3": RMSPROP,
    "inception-v4": RMSPROP, "inception-resnet-v1": RMSPROP, "inception-resnet-v2": RMSPROP,
    "inception-resnet-v2-paper": ADAM,
}


# Batch norm over few values makes much of a difference in one of them. With batches of four Inception v4, the deepest of them,
# parts fourfold further in each step, and PyTorch so from itself, to 1.7e-9, if it takes the samples of each batch in reverse.
BATCHES = {"inception-v4": 16}


def read_idx(folder, name):
    """The array in an IDX file of bytes, gzipped or not."""
    packed = folder / f"{name}.gz"
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    dimensions = raw[3]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(np.frombuffer(raw, ">u4", dimensions, 4))


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.tobytes())


def enlarged(data, side, count, folder):
    """The first `count` images of Fashion-MNIST at `side` x `side`, as an IDX dataset in `folder`."""
    images = torch.from_numpy(read_idx(data, "train-images-idx3-ubyte")[:count].copy())[:, None].double()
    images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    images = images.round().clamp(0, 255).byte()
    labels = read_idx(data, "train-labels-idx1-ubyte")[:count].copy()
    folder.mkdir()
    write_idx(folder / "train-images-idx3-ubyte", images[:, 0].numpy())
    write_idx(folder / "train-labels-idx1-ubyte", labels)
    return images, torch.from_numpy(labels.astype(np.int64))


def toml(section):
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in section.items())


class Programs:
    """Lockstep's, on a data directory of their own."""

    def __init__(self, folder, data_dir):
        self.coordinator, self.store = folder / "coordinator", ["--data-dir", data_dir]
        self.data_dir = data_dir

    def call(self, *arguments):
        done = subprocess.run([self.coordinator, *self.store, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            command = " ".join(map(str, arguments))
            sys.exit(f"{done.stderr}error: `coordinator {command}` ended with exit code {done.returncode}")
        return done.stdout

    def train(self, job, workers, threads):
        """The digest, the loss of every step and the samples of every step."""
        ended = self.call("run", job, "--fresh", "--workers", str(workers), "--threads", str(threads))
        done = json.loads(ended.splitlines()[-1])
        folder = self.data_dir / "jobs" / done["job"]
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["loss"] for line in metrics if "loss" in line}
        lines = [json.loads(line) for line in self.call("audit", done["job"], "--samples", "--json").splitlines()]
        if not (lines[-1]["ok"] and lines[-1]["complete"]):
            sys.exit(f"error: the audit does not prove the run: {lines[-1]}")
        samples = [[n for shard in step["samples"][0] for n in shard] for step in lines[:-1]]
        return done["weights_digest"], [losses[step] for step in sorted(losses)], samples


def expected(case, network, optimizer, images, labels, samples):
    """PyTorch's losses."""
    network.train()
    optimizer = optimizer.make(network.parameters())
    losses = []
    for batch in samples:
        optimizer.zero_grad()
        pixels = (images[batch].double() / 255).expand(-1, 3, -1, -1)
        logits, heads = case.outputs(network, pixels)
        loss = case.loss(logits, heads, labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(name, case, optimizer, arguments, folder):
    torch.manual_seed(1)
    network = case.make(CLASSES).double()
    randomize(network, 2)
    weights = folder / "weights.safetensors"
    save_file(network.state_dict(), weights)
    described = subprocess.run([arguments.programs / "worker", "weights", weights], check=True, stdout=subprocess.PIPE,
                               text=True).stdout
    hashed = next(line for line in described.splitlines() if line.startswith("weights_blake3"))
    model = {"name": case.model, "batch_norm": case.batch_norm, "classes": CLASSES} | case.options
    batch = BATCHES.get(name, 4)
    images, labels = enlarged(arguments.data, case.side, (STEPS + 1) * batch, folder / "images")
    programs = Programs(arguments.programs, folder / "coordinator")
    programs.call("dataset", "add", "enlarged", "--format", "idx", folder / "images")

    job = folder / "job.toml"
    job.write_text(f"""name = "{name}"
task = "classify"
seed = 1
steps = {STEPS}
global_batch = {batch}
logical_shards = {SHARDS}
precision = "f64"
[model]
{toml(model)}
weights = {json.dumps(str(weights))}
{hashed}
[data]
train = "enlarged/train"
channels = 3
scale = "unit"
[optimizer]
{toml(optimizer.section)}
""")
    digest, losses, samples = programs.train(job, 1, 2)
    digest_of_two, losses_of_two, _ = programs.train(job, 2, 1)
    theirs = expected(case, network, optimizer, images, labels, samples)

    if len(losses) != STEPS or len(samples) != STEPS or len({n for step in samples for n in step}) != batch * STEPS:
        sys.exit(f"error: {len(losses)} losses and {len(samples)} batches instead of {STEPS} of each")
    difference = max(abs(a - b) / abs(b) for a, b in zip(losses, theirs))
    equal = digest == digest_of_two and losses == losses_of_two
    ok = equal and difference <= LIMIT
    print(f"{name:26} {optimizer.section['name']:8} {theirs[0]:8.4f} -> {theirs[-1]:8.4f}  {difference:9.1e}  "
          f"{'equal' if equal else 'DIFFER':8} {'ok' if ok else 'FAILED'}", flush=True)
    return ok


def main():
    arguments, cases = command_line()
    print(f"{'ten steps beside PyTorch':26} {'by':8} {'loss':>8}    {'':8}  {'largest':>9}  digests of")
    print(f"{'':26} {'':8} {'':8}    {'':8}  {'relative':>9}  1 and 2 workers")
    results = []
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            results.append(compare(name, case, OPTIMIZERS[name], arguments, Path(folder)))
    sys.exit(0 if all(results) else "error: some networks do not train as PyTorch's do; see FAILED above")


if __name__ == "__main__":
    main()
