"""The other libraries' side of tests/architectures.rs: writes tests/fixtures/architectures.safetensors.

    make parity-fixtures

Weights and images are those of formula.py, in f64 on one thread. For each case of networks.py the file holds

    keys [tensors]              formula.key of every name and shape with 1000 classes, in name order
    parameters [1]              how many numbers learn then
    MODE.logits, MODE.loss      and train.aux.NAME, with 10 classes; MODE is train or eval
    MODE.gradients [n, 2]       formula.fingerprint of every parameter's gradient, in name order
    statistics [n, 2]           the same of every running statistic after one training pass
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from formula import fingerprint, key, numbers, tensor
from networks import CASES

CLASSES = 10


def named(state):
    """What Lockstep stores as well, in name order."""
    return sorted((k, v) for k, v in state.items() if not k.endswith("num_batches_tracked"))


def reference(case):
    whole = case.make(1000)
    out = {
        "keys": torch.tensor([key(k, v.shape) for k, v in named(whole.state_dict())]),
        "parameters": torch.tensor([sum(p.numel() for p in whole.parameters())]),
    }
    network = case.make(CLASSES).double()
    state = {k: tensor(k, v.shape) for k, v in named(network.state_dict())}
    network.load_state_dict(state, strict=False)
    shape = (case.batch, 3, case.side, case.side)
    count = case.batch * 3 * case.side**2
    images = torch.from_numpy(numbers("images", count)).reshape(shape)
    labels = torch.arange(case.batch) * 7 % CLASSES
    # Evaluation first: a training pass moves the running statistics.
    for mode in "eval", "train":
        network.train(mode == "train")
        network.zero_grad()
        logits, heads = case.outputs(network, images)
        loss = case.loss(logits, heads, labels)
        loss.backward()
        out |= {f"{mode}.logits": logits.detach(), f"{mode}.loss": loss.detach().reshape(1)}
        out |= {f"{mode}.aux.{name}": head.detach() for name, head in heads.items()}
        gradients = sorted((k, torch.zeros_like(p) if p.grad is None else p.grad)
                           for k, p in network.named_parameters())
        out[f"{mode}.gradients"] = torch.stack([fingerprint(k, g) for k, g in gradients])
    statistics = [(k, v) for k, v in named(network.state_dict()) if "running_" in k]
    if statistics:
        out["statistics"] = torch.stack([fingerprint(k, v) for k, v in statistics])
    return out


def main():
    torch.set_num_threads(1)
    tensors = {}
    for name, case in CASES.items():
        values = reference(case)
        print(f"{name}: {values['parameters'].item()} parameters, loss {values['train.loss'].item():.6f} in training"
              f" and {values['eval.loss'].item():.6f} in evaluation")
        tensors |= {f"{name}/{k}": v.contiguous() for k, v in values.items()}
    path = Path(__file__).resolve().parent.parent / "tests/fixtures/architectures.safetensors"
    save_file(tensors, path, metadata={"torch": torch.__version__})
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
