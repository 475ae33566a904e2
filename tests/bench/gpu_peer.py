"""The peer of gpu.py: PyTorch on one GPU, eager or compiled, in bfloat16 autocast with channels-last memory.

Prints one JSON object: images_per_second, final_loss, warmup_steps, steps.

As a PyTorch user would have it fast: cuDNN may choose among its algorithms by timing them, TF32 is allowed, and the images are
in the GPU's memory before the clock starts, so nothing is loaded, decoded or moved meanwhile.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from step_ddp import enlarge, read_idx
from torch.nn import functional as F

LOADED = 1024


def network(name):
    if name in ("googlenet", "inception-v3"):
        import torchvision

        build = {"googlenet": torchvision.models.GoogLeNet, "inception-v3": torchvision.models.Inception3}[name]
        return build(10, aux_logits=True, init_weights=False)
    import timm

    return timm.create_model(name.replace("-", "_"), num_classes=10)


def loss_of(outputs, labels):
    """With auxiliary losses, of the weights that the papers give them."""
    if isinstance(outputs, torch.Tensor):
        return F.cross_entropy(outputs, labels)
    heads = [output for output in outputs[1:] if output is not None]
    weight = 0.3 if len(heads) == 2 else 0.4
    return F.cross_entropy(outputs[0], labels) + weight * sum(F.cross_entropy(head, labels) for head in heads)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--network", required=True)
    parser.add_argument("--side", type=int, required=True, help="height and width of the images")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, required=True, help="steps timed")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()

    torch.manual_seed(1)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda:0")
    images = torch.from_numpy(read_idx(arguments.data, "train-images-idx3-ubyte")[:LOADED].copy()).unsqueeze(1)
    labels = torch.from_numpy(read_idx(arguments.data, "train-labels-idx1-ubyte")[:LOADED].astype(np.int64)).to(device)
    images = (enlarge(images, arguments.side).to(device).float() / 255 - 0.2860) / 0.3530
    images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)

    model = network(arguments.network).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    forward = torch.compile(model) if arguments.compile else model
    generator = torch.Generator(device).manual_seed(1)
    started = 0.0
    for step in range(arguments.warmup + arguments.steps):
        if step == arguments.warmup:
            torch.cuda.synchronize()
            started = time.perf_counter()
        batch = torch.randint(LOADED, (arguments.batch,), device=device, generator=generator)
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(forward(images[batch].contiguous(memory_format=torch.channels_last)), labels[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    print(json.dumps({
        "images_per_second": arguments.steps * arguments.batch / seconds, "final_loss": loss.item(),
        "warmup_steps": arguments.warmup, "steps": arguments.steps,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
