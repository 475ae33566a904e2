"""`make parity`: every network beside the library that it comes from, from the same random weights.

For each case of networks.py:
- the library's weights, seeded, are written as it stores them, and loaded by Lockstep;
- logits, auxiliary logits and loss agree in f64 to 1e-12 and in f32 to 1e-5, gradients of the loss in f64 to 1e-10,
  in training and in evaluation; errors are relative to the tensor's largest magnitude;
- what Lockstep exports loads strictly, and is bit for bit what was written.

Then a real job begins with torchvision's weights, and its checkpoint's export is loaded by torchvision again.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from networks import CASES

CLASSES = 10
# A batch norm takes out what a bias or constant before it adds: its gradient is 0, computed as a sum of some 10,000 terms
# whose rounding, 1e4 * 2^-53 of the largest gradient, is all that is left.
CANCELLED = 1e-12
LIMITS = {"f64": 1e-12, "f32": 1e-5, "gradient": 1e-10, "cancelled": CANCELLED}


def randomize(network, seed):
    """Constants and statistics of batch norms that are not 0 and 1, and biases by which most values pass the ReLUs:
    a deep network amplifies rounding else until digits are no longer comparable."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, 0.9, 1.1)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def run(case, network, batch, kind, gradients):
    """The library's outputs, in evaluation and training, by the names of examples/parity.rs."""
    network, out = copy.deepcopy(network).to(kind), {}
    name = {torch.float64: "f64", torch.float32: "f32"}[kind]
    for mode in "eval", "train":
        network.train(mode == "train")
        network.zero_grad()
        logits, heads = case.outputs(network, batch["images"].to(kind))
        loss = case.loss(logits, heads, batch["labels"])
        out |= {f"{name}.{mode}.logits": logits, f"{name}.{mode}.loss": loss.reshape(1)}
        out |= {f"{name}.{mode}.aux.{head}": value for head, value in heads.items()}
        if gradients:
            loss.backward()
            out |= {f"{name}.{mode}.gradient.{k}": p.grad.clone()
                    for k, p in network.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in out.items()}


def errors(got, expected):
    """The largest error of outputs and gradients, relative to the tensor's largest magnitude; of a gradient that is 0 but for
    rounding, relative to the network's largest."""
    if got.keys() != expected.keys():
        sys.exit(f"error: other tensors than expected: {sorted(got.keys() ^ expected.keys())[:5]}")
    worst = {}
    largest = max((v.abs().max().item() for k, v in expected.items() if ".gradient." in k), default=0.0)
    for name, value in expected.items():
        part, scale = name.split(".")[0], value.abs().max().item()
        if ".gradient." in name:
            part = "gradient" if scale > CANCELLED * largest else "cancelled"
            scale = scale if part == "gradient" else largest
        error = (got[name].double() - value.double()).abs().max().item() / scale
        worst[part] = max(worst.get(part, 0.0), error)
    return worst


def compare(name, case, example, folder):
    torch.manual_seed(1)
    network = case.make(CLASSES)
    randomize(network, 2)
    torch.manual_seed(3)
    batch = {"images": torch.randn(case.batch, 3, case.side, case.side).double(),
             "labels": torch.randint(CLASSES, (case.batch,))}
    save_file(network.state_dict(), folder / "weights.safetensors")
    save_file(batch, folder / "batch.safetensors")
    model = {"name": case.model, "batch_norm": case.batch_norm, "classes": CLASSES} | case.options
    (folder / "model.json").write_text(json.dumps(model))
    subprocess.run([example, folder], check=True)
    got = load_file(folder / "lockstep.safetensors")
    exact = run(case, network, batch, torch.float64, True)
    theirs = run(case, network, batch, torch.float32, False)
    # In f32 neither side is right: both are held against f64, and the library's own error is shown beside.
    single = {k: v for k, v in got.items() if k.startswith("f32")}
    wanted = {k.replace("f64", "f32"): v for k, v in exact.items() if ".gradient." not in k}
    worst = errors({k: v for k, v in got.items() if k.startswith("f64")}, exact) | errors(single, wanted)
    own = errors(theirs, wanted)["f32"]

    again = case.make(CLASSES)
    export = load_file(folder / "export.safetensors")
    again.load_state_dict(export, strict=True)
    before = network.state_dict()
    same = all(torch.equal(v, before[k]) for k, v in again.state_dict().items() if not k.endswith("_tracked"))

    ok = same and all(worst.get(part, 0.0) <= limit for part, limit in LIMITS.items())
    print(f"{name:26} f64 {worst['f64']:.1e}  gradients {worst['gradient']:.1e}  f32 {worst['f32']:.1e} "
          f"(library {own:.1e})  export {'loads strictly' if same else 'DIFFERS'}  {'ok' if ok else 'FAILED'}", flush=True)
    return ok


JOB = """name = "parity"
task = "classify"
seed = 1
steps = 1
global_batch = 8
logical_shards = 2
{model}
dropout = 0.0
aux_dropout = 0.0
[data]
train = "parity/train"
[optimizer]
name = "sgd"
lr = 1e-45
"""


def begin_a_job(programs, data, folder):
    """A step of a learning rate that changes nothing, from torchvision's weights: they come back as they were, and the
    running statistics have moved."""
    network = CASES["googlenet"].make(CLASSES)
    network.conv1.conv = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    randomize(network, 1)  # beside numbers that are not 0 an update of 1e-45 is nothing
    weights = folder / "torchvision.safetensors"
    save_file(network.state_dict(), weights)

    def call(program, *arguments):
        command = [programs / program, *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    model = call("worker", "weights", weights)
    (folder / "job.toml").write_text(JOB.format(model=model))
    store = ["--data-dir", folder / "coordinator"]
    call("coordinator", *store, "dataset", "add", "parity", "--format", "idx", data)
    done = json.loads(call("coordinator", *store, "run", folder / "job.toml", "--workers", "2").splitlines()[-1])
    export = folder / "lockstep.safetensors"
    call("coordinator", *store, "checkpoint", "export", done["job"], export)
    again = copy.deepcopy(network)
    again.load_state_dict(load_file(export), strict=True)
    ours, theirs = again.state_dict(), network.state_dict()
    moved = [k for k in theirs if not torch.equal(ours[k], theirs[k])]
    ok = bool(moved) and all("running_" in k or k.endswith("_tracked") for k in moved)
    print(f"a job from torchvision's googlenet, exported to it again: {'ok' if ok else 'FAILED: ' + str(moved[:3])}")
    return ok


def command_line():
    """The arguments of both scripts of `make parity`, and the cases that they name: all without a name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--programs", type=Path, required=True, help="the folder of coordinator and worker")
    parser.add_argument("--data", type=Path, required=True, help="the folder of Fashion-MNIST")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)}")
    arguments = parser.parse_args()
    cases = {name: case for name, case in CASES.items() if not arguments.cases or name in arguments.cases}
    return arguments, cases


def main():
    arguments, cases = command_line()
    results = []
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            results.append(compare(name, case, arguments.programs / "examples/parity", Path(folder)))
    if not arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            results.append(begin_a_job(arguments.programs, arguments.data, Path(folder)))
    sys.exit(0 if all(results) else "error: some networks are not those of the libraries; see FAILED above")


if __name__ == "__main__":
    main()
