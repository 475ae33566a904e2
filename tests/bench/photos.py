"""Writes JPEGs like photographs into a folder: noise with a natural image's spectrum, coloured smoothly, with edges.

They have 500 x 375 pixels or the reverse and quality 90, and take about 90 kB each, as ImageNet's do.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def spectral_noise(rng, height, width, slope):
    """Noise whose amplitude falls with the frequency to the power of `slope`; unit variance."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
    spectrum /= frequency**slope
    spectrum[0, 0] = 0.0
    noise = np.fft.irfft2(spectrum, (height, width))
    return noise / noise.std()


def photo(rng):
    width, height = (500, 375) if rng.random() < 0.7 else (375, 500)
    shapes = Image.new("L", (width, height))
    draw = ImageDraw.Draw(shapes)
    for _ in range(12):
        x, y, side = int(rng.integers(width)), int(rng.integers(height)), int(rng.integers(10, 120))
        outline = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        outline([x, y, x + side, y + side], fill=int(rng.integers(255)))
    light = 120 + 45 * spectral_noise(rng, height, width, rng.uniform(1.0, 1.4))
    light += 0.35 * (np.asarray(shapes, float) - 90)
    red, blue = (25 * spectral_noise(rng, height, width, 1.5) for _ in range(2))
    rgb = np.stack([light + red, light - 0.5 * red - 0.4 * blue, light + blue], axis=-1)
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))


def main():
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for i in range(count):
        photo(rng).save(folder / f"{i:04}.jpg", quality=90)


if __name__ == "__main__":
    main()
