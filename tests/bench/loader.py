"""JPEG decoding and random resized crop to 224 x 224, one thread, side by side with torchvision.

Rounds of both sides alternate within one run. In each round every way prepares all images twice, and the second time counts:
the first fills its caches. torchvision is taken at its fastest: each of its ways is measured, and the best one's median round
counts.
"""

import io
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import PIL
import torch
import torchvision
from PIL import Image, features
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

ROUNDS = 7
SIDE = 224


def median(values):
    return statistics.median(values)


def our_decoder(built):
    """Version and SIMD of the libjpeg-turbo that cargo, by its messages in the file `built`, linked into our side."""
    messages = map(json.loads, built.read_text().splitlines())
    folders = [m["out_dir"] for m in messages if m["reason"] == "build-script-executed" and "turbojpeg-sys" in m["package_id"]]
    for header in (Path(folder) / "build" / "jconfig.h" for folder in folders):
        if header.exists():
            config = header.read_text()
            version = re.search(r"^#define LIBJPEG_TURBO_VERSION +([\d.]+)", config, re.MULTILINE)
            with_simd = re.search(r"^#define WITH_SIMD +1", config, re.MULTILINE)
            return f"libjpeg-turbo {version[1] if version else '?'}, {simd() if with_simd else 'no SIMD'}"
    return "libjpeg-turbo of the system"


def simd():
    """What libjpeg-turbo takes of this processor when it has been built with SIMD code."""
    if platform.machine() != "x86_64":
        return "NEON"
    return "AVX2" if re.search(r"^flags.*\bavx2\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE) else "SSE2"


def draft_crop(crop, encoded):
    """With PIL, decoding at 1/2, 1/4 or 1/8 where the crop is large enough for it."""
    image = Image.open(io.BytesIO(encoded))
    width, height = image.size
    box = crop.make_params([torch.empty(3, height, width, dtype=torch.uint8)])
    smaller = max(1, min(box["height"], box["width"]) // SIDE)
    image.draft("RGB", (width // smaller, height // smaller))
    scale = image.size[0] / width
    corners = (box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"])
    return image.resize((SIDE, SIDE), Image.BILINEAR, box=tuple(c * scale for c in corners))


def main():
    throughput, folder, built = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    encoded = [path.read_bytes() for path in sorted(folder.iterdir())]
    tensors = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in encoded]
    crop = v2.RandomResizedCrop(SIDE, antialias=True)
    ways = {
        "torchvision.io + v2 on uint8": (tensors, lambda image: crop(decode_jpeg(image, mode=ImageReadMode.RGB))),
        "PIL + v2": (encoded, lambda image: crop(Image.open(io.BytesIO(image)).convert("RGB"))),
        "PIL with draft": (encoded, lambda image: draft_crop(crop, image)),
    }
    rates = {name: [] for name in ways} | {"lockstep": []}
    for round_ in range(ROUNDS):
        for name, (images, prepare) in ways.items():
            for _ in range(2):
                started = time.perf_counter()
                for image in images:
                    prepare(image)
            rates[name].append(len(images) / (time.perf_counter() - started))
        command = [throughput, str(folder), "2"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        rates["lockstep"].append(float(lines[1]))
        print(f"round {round_ + 1} of {ROUNDS}", file=sys.stderr)

    size = sum(map(len, encoded)) / len(encoded) / 1000
    turbo = features.version_feature("libjpeg_turbo")
    print(f"{len(encoded)} JPEGs of {size:.0f} kB; random resized crop to {SIDE}; one thread; images/s")
    print(f"torchvision {torchvision.__version__} (its own libjpeg-turbo), PIL {PIL.__version__} (libjpeg-turbo {turbo})")
    print(f"lockstep ({our_decoder(built)})")
    for name, values in rates.items():
        print(f"  {name:30} median {median(values):7.0f}   {min(values):7.0f} to {max(values):.0f}")
    best = max(ways, key=lambda name: median(rates[name]))
    ratio = median(rates["lockstep"]) / median(rates[best])
    print(f"lockstep / {best}: {ratio:.2f}")
    print(json.dumps({"images_per_s": {name: median(values) for name, values in rates.items()}, "ratio": ratio}))


if __name__ == "__main__":
    main()
