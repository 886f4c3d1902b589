"""What the thresholds of `preceptor audit` find and what they let through, on real radiographs.

    python bench/audit_thresholds.py [--images 400]

Copies are made here of images of VQA-RAD, VQA-Med 2019 and SLAKE. Images of SLAKE and of the other two come from
different archives, so that all their pairs are of different patients. Pairs with close hashes inside SLAKE, which has
no copies, are neighbouring slices. SLAKE's CT and MR images hold no text; all of VQA-RAD carry the archive's caption.
Prints the tables of docs/explanation/leakage.md. Needs PRECEPTOR_DATA.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageOps

from preceptor.auditing.burned_in import has_text
from preceptor.auditing.duplicates import COPY_CORRELATION, correlations
from preceptor.data.images import load_image
from preceptor.data.phash import ALIKE_BITS, COPY_BITS, cosine_transform, hashes, near, thumbnail
from preceptor.vqa.config import DataConfig
from preceptor.vqa.data import read_data

BITS = (8, 12, 16, 20, 24, 32, 40, 48, 56, 64)
CORRELATIONS = (0.95, 0.96, 0.97, 0.975, 0.98, 0.985)


def again(side: int, quality: int, resample: Image.Resampling = Image.Resampling.BICUBIC):
    """Return the making of a JPEG with the given short side in pixels."""

    def make(image: Image.Image) -> Image.Image:
        scale = side / min(image.size)
        small = image.convert("RGB").resize(tuple(max(1, round(s * scale)) for s in image.size), resample)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return make


def cropped(share: float) -> Callable[[Image.Image], Image.Image]:
    return lambda i: i.crop(
        tuple(int(s * f) for s, f in zip(i.size * 2, (share, share, 1 - share, 1 - share), strict=True))
    )


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "short side 512, JPEG 90": again(512, 90),
    "short side 224, JPEG 75": again(224, 75),
    "short side 224, JPEG 30": again(224, 30),
    "short side 128, JPEG 50": again(128, 50, Image.Resampling.BILINEAR),
    "short side 64, JPEG 75": again(64, 75, Image.Resampling.LANCZOS),
    "square 224": lambda i: i.resize((224, 224), Image.Resampling.BILINEAR),
    "brighter, more contrast": lambda i: i.convert("L").point(lambda x: min(255, int(x * 1.2 + 15))),
    "gamma 0.7": lambda i: i.convert("L").point([int(255 * (x / 255) ** 0.7) for x in range(256)]),
    "turned by 1 degree": lambda i: i.convert("L").rotate(1),
    "cropped by 2 %": cropped(0.02),
    "cropped by 5 %": cropped(0.05),
    "border of 4 %": lambda i: ImageOps.expand(i.convert("L"), border=int(0.04 * i.width), fill=0),
    "mirrored": lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def short_hashes(thumbnails_N: np.ndarray) -> np.ndarray:
    """Return the customary hash of 8 x 8 frequencies, (N, 4) uint64 of which the last three are zero."""
    low = cosine_transform(thumbnails_N)[:, :8, :8].reshape(len(thumbnails_N), 64)
    bits = np.packbits(low > np.median(low[:, 1:], axis=1, keepdims=True), axis=1)
    return np.pad(bits.view(np.uint64), ((0, 0), (0, 3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400, help="of how many images copies are made")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        data = {
            name: read_data(DataConfig.model_validate({"name": name}), Path(folder), needed=())
            for name in ("vqa-rad", "vqa-med-2019", "slake")
        }
    paths = {name: list(dict.fromkeys(sample.image for sample in one.samples)) for name, one in data.items()}
    thumbs = {name: np.stack([thumbnail(load_image(p)) for p in found]) for name, found in paths.items()}

    every = [path for found in paths.values() for path in found]
    chosen = [every[n] for n in np.random.default_rng(0).choice(len(every), args.images, replace=False)]
    originals = np.stack([thumbnail(load_image(path)) for path in chosen])
    own = hashes(originals)
    print("| copy | " + " | ".join(f"<= {b} bits" for b in BITS) + f" | copy at {COPY_CORRELATION} |")
    for name, make in COPIES.items():
        copies = np.stack([thumbnail(make(load_image(path))) for path in chosen])
        distance = np.bitwise_count(own ^ hashes(copies)).sum(axis=1)
        rows = np.arange(len(chosen))
        alike = correlations(np.concatenate([originals, copies]), rows, rows + len(chosen))
        shares = [f"{100 * (distance <= b).mean():.1f}" for b in BITS]
        both = (alike >= COPY_CORRELATION) & (distance <= ALIKE_BITS)
        print(f"| {name} | " + " | ".join(shares) + f" | {100 * both.mean():.1f} |")

    medpix = np.concatenate([thumbs["vqa-rad"], thumbs["vqa-med-2019"]])
    _, _, strange = near(hashes(thumbs["slake"]), hashes(medpix), BITS[-1])
    print(
        f"different patients, {len(medpix) * len(thumbs['slake'])} pairs: ",
        ", ".join(f"{(strange <= b).sum()} within {b} bits" for b in BITS),
    )
    short = [short_hashes(found) for found in (thumbs["slake"], medpix)]
    _, _, strange = near(*short, 12)
    print("the same with 64 bits: ", ", ".join(f"{(strange <= b).sum()} within {b} bits" for b in range(0, 13, 2)))
    left, right, bits = near(hashes(thumbs["slake"]), hashes(thumbs["slake"]), BITS[-1], upper=True)
    print("neighbouring slices of SLAKE: ", ", ".join(f"{(bits <= b).sum()} within {b} bits" for b in BITS))
    close = bits <= ALIKE_BITS
    alike = correlations(thumbs["slake"], left[close], right[close])
    print(
        f"of the {close.sum()} within {ALIKE_BITS} bits: ",
        ", ".join(f"{(alike >= c).sum()} correlate to {c}" for c in CORRELATIONS),
    )
    print(f"threshold where there are only hashes: {COPY_BITS} bits")

    text = {name: [has_text(load_image(path)) for path in found] for name, found in paths.items()}
    modality = {sample.image: sample.tags["modality"] for sample in data["slake"].samples}
    for kind in ("CT", "MRI", "X-Ray"):
        flags = [flag for flag, path in zip(text["slake"], paths["slake"], strict=True) if modality[path] == kind]
        print(f"burned-in text suspected: {sum(flags)} of {len(flags)} of SLAKE, {kind}")
    for name in ("vqa-rad", "vqa-med-2019"):
        print(f"burned-in text suspected: {sum(text[name])} of {len(text[name])} of {name}")


if __name__ == "__main__":
    main()
