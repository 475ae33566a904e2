"""PyTorch's side of the parity tests: writes tests/fixtures/pytorch.safetensors.

    make parity-fixtures

Everything is f64 on one thread and seeded. The file holds

    images [steps, batch, 1, 8, 8], labels [steps, batch]   the batches of both runs
    plain.*, norm.*     `small-cnn` without and with batch norm over the whole batch:
                        init.NAME, losses [steps], final.NAME (running statistics included)
    optim.CASE.*        an optimizer's weights after ten given gradients
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

STEPS, BATCH, WIDTH, CLASSES = 20, 32, 4, 10


class SmallCnn(nn.Module):
    """`small-cnn` of worker/nn/src/models/small_cnn.rs."""

    def __init__(self, norm):
        super().__init__()
        inputs = 1
        for i, (outputs, stride) in enumerate([(WIDTH, 1), (2 * WIDTH, 2), (4 * WIDTH, 2)], 1):
            setattr(self, f"conv{i}", nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not norm))
            setattr(self, f"bn{i}", nn.BatchNorm2d(outputs) if norm else nn.Identity())
            inputs = outputs
        self.fc = nn.Linear(inputs, CLASSES)

    def forward(self, x):
        for i in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        return self.fc(x.mean(dim=(2, 3)))


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


def train(norm, label_smoothing, images, labels):
    torch.manual_seed(20 + norm)
    model = SmallCnn(norm)
    out = {f"init.{k}": v for k, v in weights(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    losses = []
    for x, y in zip(images, labels):
        loss = F.cross_entropy(model(x.double()), y, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return out | {"losses": torch.stack(losses)} | {f"final.{k}": v for k, v in weights(model).items()}


class TensorFlowRmsprop(torch.optim.Optimizer):
    """The update of TensorFlow's `ApplyRMSProp`, which `torch.optim` does not have."""

    def __init__(self, parameters, lr, rho, epsilon, momentum):
        super().__init__(parameters, {"lr": lr, "rho": rho, "epsilon": epsilon, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                ms = state.setdefault("ms", torch.ones_like(p))
                mom = state.setdefault("mom", torch.zeros_like(p))
                ms += (p.grad * p.grad - ms) * (1 - group["rho"])
                mom *= group["momentum"]
                mom += group["lr"] * p.grad / (ms + group["epsilon"]).sqrt()
                p -= mom


def groups(parameters):
    weight, bias = parameters
    spared = {"params": [bias], "lr": 0.1, "weight_decay": 0}
    return torch.optim.SGD([{"params": [weight]}, spared], lr=0.05, momentum=0.9, weight_decay=0.1)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99), weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.1),
    "rmsprop-momentum": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9, momentum=0.9),
    "rmsprop-tensorflow": lambda p: TensorFlowRmsprop(p, lr=0.045, rho=0.9, epsilon=1.0, momentum=0.9),
    "groups": groups,
}


def optimize(make):
    torch.manual_seed(7)
    parameters = {"weight": nn.Parameter(torch.randn(3, 4)), "bias": nn.Parameter(torch.randn(3))}
    out = {f"init.{k}": v.detach().clone() for k, v in parameters.items()}
    optimizer = make(parameters.values())
    for name, parameter in parameters.items():
        out[f"gradients.{name}"] = torch.randn(10, *parameter.shape)
    for step in range(10):
        for name, parameter in parameters.items():
            parameter.grad = out[f"gradients.{name}"][step]
        optimizer.step()
    return out | {f"final.{k}": v.detach() for k, v in parameters.items()}


def main():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    labels = torch.randint(CLASSES, (STEPS, BATCH))
    # A pattern for each class under noise, so that there is something to learn.
    patterns = torch.randn(CLASSES, 1, 8, 8)
    images = (patterns[labels] + torch.randn(STEPS, BATCH, 1, 8, 8)).float()
    tensors = {"images": images, "labels": labels}
    for name, norm, smoothing in [("plain", False, 0.0), ("norm", True, 0.1)]:
        tensors |= {f"{name}.{k}": v for k, v in train(norm, smoothing, images, labels).items()}
    for name, make in OPTIMIZERS.items():
        tensors |= {f"optim.{name}.{k}": v for k, v in optimize(make).items()}
    path = Path(__file__).resolve().parent.parent / "tests/fixtures/pytorch.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"torch": torch.__version__})
    print(f"{path}: {path.stat().st_size} bytes; losses {tensors['plain.losses'][[0, -1]].tolist()}"
          f" and {tensors['norm.losses'][[0, -1]].tolist()}")


if __name__ == "__main__":
    main()
