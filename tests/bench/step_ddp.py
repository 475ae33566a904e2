"""The peer: PyTorch on Fashion-MNIST, on CPU; on several workers with DistributedDataParallel over Gloo.

Prints one JSON object: images_per_second, final_loss, warmup_steps, steps.

The same network, global batch, optimizer and augmentations as tests/bench/step.toml or those that train.py writes. Three
differences, all in PyTorch's favour: its batch norm is local (nn.SyncBatchNorm has no CPU implementation, so PyTorch pays
for no synchronization), its images are enlarged before its clock starts, and that starts after the warm-up steps.
"""

import argparse
import gzip
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


def read_idx(folder, name):
    """The array in an IDX file of bytes, gzipped or not."""
    packed = folder / f"{name}.gz"
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", dimensions, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def nin(classes=10):
    """As worker/nn/src/models/nin.rs with MNIST widths, batch norm and no final ReLU."""

    def convolution(inputs, outputs, size):
        return [nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)]

    def block(inputs, widths, size):
        first, second, third = widths
        return [
            *convolution(inputs, first, size), nn.ReLU(), *convolution(first, second, 1), nn.ReLU(),
            *convolution(second, third, 1),
        ]  # fmt: skip

    def shrink():
        return [nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(0.2)]

    network = nn.Sequential(
        *block(1, (96, 64, 48), 5), *shrink(),
        *block(48, (128, 96, 48), 5), *shrink(),
        *block(48, (128, 96, classes), 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.05)
    return network


def googlenet(classes=10):
    import torchvision

    return torchvision.models.GoogLeNet(classes, aux_logits=True, init_weights=False, dropout=0.2)


def inception_v3(classes=10):
    import torchvision

    return torchvision.models.Inception3(classes, aux_logits=False, init_weights=False, dropout=0.2)


NETWORKS = {"nin": nin, "googlenet": googlenet, "inception-v3": inception_v3}


def loss_of(outputs, labels):
    """With the auxiliary losses of GoogLeNet."""
    if isinstance(outputs, torch.Tensor):
        return F.cross_entropy(outputs, labels)
    heads = F.cross_entropy(outputs.aux_logits1, labels) + F.cross_entropy(outputs.aux_logits2, labels)
    return F.cross_entropy(outputs.logits, labels) + 0.3 * heads


def enlarge(images, side):
    """[N, 1, 28, 28] bytes to [N, 1, side, side]."""
    if side == images.shape[-1]:
        return images
    larger = [F.interpolate(part.float(), size=side, mode="bilinear").round().byte() for part in images.split(1000)]
    return torch.cat(larger)


def augment(images, generator):
    """Mirrors half of the images. [N, 1, H, W] in and out."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def train(rank, arguments, rendezvous):
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=arguments.workers)

    images = torch.from_numpy(read_idx(arguments.data, "train-images-idx3-ubyte").copy()).unsqueeze(1)
    labels = torch.from_numpy(read_idx(arguments.data, "train-labels-idx1-ubyte").astype(np.int64))
    needed = (arguments.warmup + arguments.steps) * arguments.global_batch
    images, labels = enlarge(images[:needed], arguments.side), labels[:needed]
    mean, deviation = 0.2860, 0.3530  # of Fashion-MNIST's training pixels, scaled to [0, 1]

    model = NETWORKS[arguments.network]()
    if arguments.workers > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    local_batch = arguments.global_batch // arguments.workers
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(images), generator=generator)
    flip_generator = torch.Generator().manual_seed(100 + rank)

    started = 0.0
    for step in range(arguments.warmup + arguments.steps):
        if step == arguments.warmup:
            dist.barrier()
            started = time.perf_counter()
        begin = (step * arguments.global_batch + rank * local_batch) % (len(order) - local_batch)
        batch = order[begin : begin + local_batch]
        inputs = augment((images[batch].float() / 255 - mean) / deviation, flip_generator)
        if arguments.network != "nin":
            inputs = inputs.expand(-1, 3, -1, -1)
        loss = loss_of(model(inputs), labels[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    dist.barrier()
    seconds = time.perf_counter() - started

    if rank == 0:
        rate = arguments.steps * arguments.global_batch / seconds
        print(json.dumps({
            "images_per_second": rate, "final_loss": loss.item(),
            "warmup_steps": arguments.warmup, "steps": arguments.steps,
        }))  # fmt: skip
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--network", choices=NETWORKS, default="nin")
    parser.add_argument("--side", type=int, default=28, help="height and width of the images")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--global-batch", type=int, default=128)
    parser.add_argument("--warmup", type=int, required=True, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=280, help="steps timed")
    arguments = parser.parse_args()

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (arguments, f"{folder}/rendezvous"), nprocs=arguments.workers)


if __name__ == "__main__":
    main()
