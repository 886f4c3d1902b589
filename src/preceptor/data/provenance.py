"""Which images a model was trained on, as hashes, so that weights are not tested on images that they know.

A trained model's folder holds `images.json`: for each data set that its training used, or the training of the weights
it began from or was taught by, the SHA-256 and the perceptual hash of every training and validation image. There are
no file names in it and no pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data.images import MAX_BYTES, MAX_PIXELS, ImageError, content_hash, load_image
from preceptor.data.phash import COPY_BITS, as_text, from_text, hashes, near, thumbnail
from preceptor.data.types import Dataset, Sample
from preceptor.errors import UserError
from preceptor.files import write_text

PROVENANCE_FILE = "images.json"
CACHE = "image-hashes.json"
FORMAT = 1


@dataclass(frozen=True)
class Source:
    """The images that a training took from one data set.

    `images` maps the SHA-256 of a file to its perceptual hash, both in hexadecimal digits. `name`, `split` and
    `test_sha256` (of the test rows) tell the data set.
    """

    name: str
    variant: str
    test_sha256: str
    images: dict[str, str]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.name, self.variant, self.test_sha256


def hash_images(
    paths: Iterable[Path], cache: Path | None = None, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> dict[Path, tuple[str, str]]:
    """Return (SHA-256 of the file, perceptual hash) of every file that can be read; broken ones are left out.

    What the JSON file `cache` knows by its SHA-256 is not decoded again; new hashes are added to it.
    """
    known = _read_cache(cache) if cache else {}
    before = len(known)
    found: dict[Path, tuple[str, str]] = {}
    for path in dict.fromkeys(paths):
        try:
            digest = content_hash(path)
            if digest not in known:
                image = load_image(path, max_bytes=max_bytes, max_pixels=max_pixels)
                known[digest] = as_text(hashes(thumbnail(image)[None])[0])
        except ImageError:
            continue
        found[path] = digest, known[digest]
    if cache and len(known) > before:
        write_text(cache, json.dumps(dict(sorted(known.items())), indent=0))
    return found


def _read_cache(path: Path) -> dict[str, str]:
    """Return the hashes of a cache; none where there is no cache or it is damaged, since it can be made again."""
    try:
        known = json.loads(path.read_text("utf-8"))
        from_text(list(known.values()))
        return dict(known)
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def merge(sources: Iterable[Source]) -> list[Source]:
    """Return the sources with those of the same data set put together."""
    found: dict[tuple[str, str, str], Source] = {}
    for source in sources:
        images = {**(found[source.key].images if source.key in found else {}), **source.images}
        found[source.key] = Source(*source.key, dict(sorted(images.items())))
    return list(found.values())


def write_provenance(folder: Path, sources: Sequence[Source]) -> None:
    """Write `images.json` into a model's folder."""
    listed = [{"data": s.name, "variant": s.variant, "test_sha256": s.test_sha256, "images": s.images} for s in sources]
    write_text(folder / PROVENANCE_FILE, json.dumps({"format": FORMAT, "sources": listed}, indent=0))


def read_provenance(folder: Path) -> list[Source] | None:
    """Return what a model's folder says about the images of its training; None where it says nothing.

    Raises UserError where `images.json` is damaged.
    """
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return None
    try:
        document: dict[str, Any] = json.loads(path.read_text("utf-8"))
        sources = [Source(s["data"], s["variant"], s["test_sha256"], dict(s["images"])) for s in document["sources"]]
        for source in sources:
            from_text([phash for phash in source.images.values() if phash])
        return sources
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the model's folder again, or train it again") from error


def match_images(found: dict[Path, tuple[str, str]], images: dict[str, str]) -> set[Path]:
    """Return the files of `found` that are in `images` too, by SHA-256 or by perceptual hash."""
    if not found or not images:
        return set()
    same = {path for path, (digest, _) in found.items() if digest in images}
    paths = [path for path, (_, phash) in found.items() if phash]
    phashes = [phash for phash in images.values() if phash]
    if not paths or not phashes:  # volumes have no perceptual hash
        return same
    rows, _, _ = near(from_text([found[path][1] for path in paths]), from_text(phashes), COPY_BITS)
    return {paths[row] for row in np.unique(rows).tolist()} | same


def leave_out(
    data: Dataset[Sample], images: Sequence[Path], whose: str, cache: Path | None = None, **limits: int
) -> None:
    """Drop the training and validation rows of `data` whose image is among `images`, and note how many."""
    theirs = dict(hash_images(images, cache, **limits).values())
    learnt = [sample.image for sample in data.samples if sample.split != "test"]
    dropped = match_images(hash_images(learnt, cache, **limits), theirs)
    before = len(data.samples)
    data.samples = [sample for sample in data.samples if sample.split == "test" or sample.image not in dropped]
    data.notes.append(
        f"Left out of training and validation: {len(dropped)} images ({before - len(data.samples)} questions) that are "
        f"also images of {whose} (data.exclude_images_of)."
    )
