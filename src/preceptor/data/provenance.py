"""Record the images that a model was trained on, so that it is not tested on images that it has seen.

The folder of a trained model contains `images.json`. For each data set used to train the model, its initial weights or
its teachers, the file lists the SHA-256 and the perceptual hash of every training and validation image. It contains no
file names and no pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data.findings import Finding
from preceptor.data.images import ImageError, content_hash, load_image
from preceptor.data.limits import MAX_BYTES, MAX_PIXELS
from preceptor.data.phash import COPY_BITS, as_text, from_text, hashes, near, thumbnail
from preceptor.data.types import Dataset, Sample
from preceptor.errors import UserError
from preceptor.files import write_text

PROVENANCE_FILE = "images.json"
CACHE = "image-hashes.json"
FORMAT = 1


@dataclass(frozen=True)
class Source:
    """The images of one data set that a model was trained on.

    Attributes:
        name: Name of the data set.
        variant: Variant of the data set.
        test_sha256: Fingerprint of the test split.
        images: Perceptual hash of each image by the SHA-256 of the file, both in hexadecimal digits.
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
    """Return the SHA-256 and the perceptual hash of every image that can be decoded. The other ones have no entry.

    The JSON file `cache` stores perceptual hashes by SHA-256, so that known images are not decoded again.
    """
    known = _read_cache(cache) if cache else {}
    before = len(known)
    hashes_by_path: dict[Path, tuple[str, str]] = {}
    for path in dict.fromkeys(paths):
        try:
            digest = content_hash(path)
            if digest not in known:
                image = load_image(path, max_bytes=max_bytes, max_pixels=max_pixels)
                known[digest] = as_text(hashes(thumbnail(image)[None])[0])
        except ImageError:
            continue
        hashes_by_path[path] = digest, known[digest]
    if cache and len(known) > before:
        write_text(cache, json.dumps(dict(sorted(known.items())), indent=0))
    return hashes_by_path


def _read_cache(path: Path) -> dict[str, str]:
    """Return the hashes in a cache file, or none if the file is missing or damaged."""
    try:
        known = json.loads(path.read_text("utf-8"))
        from_text(list(known.values()))
        return dict(known)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def merge(sources: Iterable[Source]) -> list[Source]:
    """Merge the sources that describe the same data set."""
    merged: dict[tuple[str, str, str], Source] = {}
    for source in sources:
        images = {**(merged[source.key].images if source.key in merged else {}), **source.images}
        merged[source.key] = Source(*source.key, dict(sorted(images.items())))
    return list(merged.values())


def write_provenance(folder: Path, sources: Sequence[Source]) -> None:
    """Write `images.json` into the folder of a model."""
    listed = [{"data": s.name, "variant": s.variant, "test_sha256": s.test_sha256, "images": s.images} for s in sources]
    write_text(folder / PROVENANCE_FILE, json.dumps({"format": FORMAT, "sources": listed}, indent=0))


def read_provenance(folder: Path) -> list[Source] | None:
    """Return the images that a model was trained on, or None if its folder has no `images.json`.

    Raises:
        UserError: `images.json` is damaged.
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
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}); copy the folder of the model again, or train the model again"
        ) from error


def match_images(files: dict[Path, tuple[str, str]], images: dict[str, str]) -> set[Path]:
    """Return the files whose SHA-256 or perceptual hash occurs in `images`.

    Args:
        files: (SHA-256, perceptual hash) of each file.
        images: Perceptual hashes by SHA-256.
    """
    if not files or not images:
        return set()
    identical = {path for path, (digest, _) in files.items() if digest in images}
    paths = [path for path, (_, phash) in files.items() if phash]
    phashes = [phash for phash in images.values() if phash]
    if not paths or not phashes:  # volumes have no perceptual hash
        return identical
    rows, _, _ = near(from_text([files[path][1] for path in paths]), from_text(phashes), COPY_BITS)
    return {paths[row] for row in np.unique(rows).tolist()} | identical


def leave_out(
    data: Dataset[Sample], images: Sequence[Path], source: str, cache: Path | None = None, **limits: int
) -> None:
    """Remove the training and validation samples of `data` whose image is among `images`, and add a note."""
    excluded = hash_images(images, cache, **limits)
    excluded_hashes = dict(excluded.values())
    training_images = {sample.image for sample in data.samples if sample.split != "test"}
    known_hashes = hash_images(sorted(training_images), cache, **limits)
    dropped = match_images(known_hashes, excluded_hashes)
    note_undecoded(data, source, {*training_images, *images}, {*known_hashes, *excluded})
    before = len(data.samples)
    data.samples = [sample for sample in data.samples if sample.split == "test" or sample.image not in dropped]
    data.notes.append(
        f"Left out of training and validation: {len(dropped)} images ({before - len(data.samples)} questions) that "
        f"also occur in {source} (data.exclude_images_of)."
    )


def note_undecoded(data: Dataset[Sample], source: str, images: Set[Path], decoded: Set[Path]) -> None:
    """Add a finding if images cannot be decoded and were therefore not compared with those of `source`."""
    broken = images - decoded
    if broken:
        ids = tuple(sample.id for sample in data.samples if sample.image in broken)
        reason = f"{len(broken)} images cannot be decoded and were not compared between this data set and {source}"
        data.findings.append(Finding(ids, None, reason, "warning"))
