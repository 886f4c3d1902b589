"""Turn cases into batches: normalised volumes, random patches, augmentation and content keys."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from preceptor.data.limits import MAX_VOXELS
from preceptor.data.nifti import VolumeError
from preceptor.data.types import Case, SegmentationDataset
from preceptor.data.volumes import LoadedVolume, content_hash, load_case, load_label, resampled, resize, to_regions
from preceptor.errors import UserError
from preceptor.segmentation.augment import Augment, augment_patch, draw_patch, draw_size
from preceptor.segmentation.intensity import Intensity, bounding_box, normalise
from preceptor.segmentation.subsets import SubsetFlags, all_subsets, within
from preceptor.task import Batch
from preceptor.training.batch_loader import Examples

CACHE_BYTES = 2 * 2**30  # limit for normalised volumes in memory, per process


@dataclass(frozen=True)
class VolumeSettings:
    """Preprocessing of cases. Sizes are (D, H, W), `spacing` is in mm; None keeps the spacing of each case."""

    patch_size: tuple[int, int, int] = (80, 160, 160)
    spacing: tuple[float, float, float] | None = None
    intensity: Intensity = "percentile"
    augment: Augment = "light"
    foreground_probability: float = 0.5
    max_voxels: int = MAX_VOXELS
    broken: Literal["raise", "skip"] = "raise"
    cache_bytes: int = CACHE_BYTES

    def __post_init__(self) -> None:
        if len(self.patch_size) != 3 or min(self.patch_size) < 2:
            raise UserError(f"patch_size {list(self.patch_size)} is not three sides of at least 2 voxels")
        if not 0 <= self.foreground_probability <= 1:
            raise UserError(f"foreground_probability {self.foreground_probability} is not between 0 and 1")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Prepared:
    """A preprocessed case.

    Attributes:
        images: Normalised images (N, d, h, w) float32 inside the bounding box of the foreground.
        available: Whether the case has each modality (N,).
        label: Label map (D, H, W) of the whole volume, or None.
        box: Bounding box of the foreground in the volume.
        shape: Shape (D, H, W) of the volume.
        loaded: Geometry for `save_mask`, without voxels.
    """

    images: np.ndarray
    available: np.ndarray
    label: np.ndarray | None
    box: tuple[slice, slice, slice]
    shape: tuple[int, int, int]
    loaded: LoadedVolume

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + (self.label.nbytes if self.label is not None else 0)

    def full(self) -> np.ndarray:
        """Return the images (N, D, H, W), which are 0 outside the box."""
        out = np.zeros((len(self.images), *self.shape), np.float32)
        out[(slice(None), *self.box)] = self.images
        return out


@dataclass
class WholeCase:
    """A whole case.

    Attributes:
        id: Identifier.
        key: Content key.
        images: Images (N, D, H, W) float, 0 outside `box`.
        available: Whether the case has each modality (N,).
        masks: Masks (R, D, H, W) bool of the regions, or None.
        box: Bounding box of the foreground.
        loaded: Geometry for `save_mask`, without voxels.
    """

    id: str
    key: str
    images: torch.Tensor
    available: torch.Tensor
    masks: torch.Tensor | None
    box: tuple[slice, slice, slice]
    loaded: LoadedVolume


def prepare(
    case: Case, data: SegmentationDataset | None, modalities: Sequence[str], settings: VolumeSettings
) -> Prepared:
    """Resample and normalise a case, and crop it to its foreground.

    Raises:
        VolumeError: `load_case` refuses the case, or the normalisation does not apply to an image.
    """
    loaded = load_case(case, data, max_voxels=settings.max_voxels)
    if settings.spacing is not None:
        loaded = resampled(loaded, settings.spacing, max_voxels=settings.max_voxels)
    volumes: dict[str, np.ndarray] = {}
    for name in modalities:
        if name in loaded.images:
            try:
                volumes[name] = normalise(loaded.images[name], settings.intensity)
            except UserError as error:
                raise VolumeError(f"{case.images[name].path}: {error}") from error
    if not volumes:
        raise VolumeError(f"case {case.id} has {', '.join(case.images)}, but none of {', '.join(modalities)}")
    # The box contains the foreground of every modality.
    box = bounding_box(np.logical_or.reduce([volume != 0 for volume in volumes.values()]))
    sides = [side.stop - side.start for side in box]
    images = np.zeros((len(modalities), *sides), np.float32)
    for row, name in enumerate(modalities):
        if name in volumes:
            images[row] = volumes[name][box]
    available = np.array([name in volumes for name in modalities])
    return Prepared(images, available, loaded.label, box, loaded.shape, replace(loaded, images={}, label=None))


class VolumeExamples(Examples):
    """Random patches of cases as a torch data set, indexed by ``(index, epoch)``. The epoch selects patch and view.

    An item depends only on the seed, the bytes of the files and the epoch, but not on the worker, the order of items or
    the names of files. It is a dict of arrays, or the id of a broken case if the policy is `skip`. Modalities are not
    dropped here: `available` are those of the case.
    """

    def __init__(
        self, cases: Sequence[Case], data: SegmentationDataset, settings: VolumeSettings, *, seed: int = 0
    ) -> None:
        self.cases, self.data, self.settings, self.seed = list(cases), data, settings, seed
        self.modalities, self.regions = tuple(data.modalities), dict(data.regions)
        self.unreadable: dict[str, None] = {}
        """Ids of the cases that `readable` has left out, in the order in which it found them."""
        self._prepared: dict[int, Prepared] = {}
        self._hashes: dict[int, str] = {}
        self._regions_of: dict[int, frozenset[str]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.cases)

    def prepared(self, index: int) -> Prepared:
        """Return the preprocessed case. It is cached while the cache is smaller than `cache_bytes`."""
        if index in self._prepared:
            return self._prepared[index]
        case = prepare(self.cases[index], self.data, self.modalities, self.settings)
        if self._bytes + case.nbytes <= self.settings.cache_bytes:
            self._prepared[index] = case
            self._bytes += case.nbytes
        return case

    def key(self, index: int, view: int) -> str:
        """Return the content key of a case: a hash of its files, their roles and the view (-1 for the whole case)."""
        if index not in self._hashes:
            self._hashes[index] = content_of(self.cases[index], self.modalities)
        return hashlib.sha256(f"{self._hashes[index]}|{view}".encode()).hexdigest()

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any] | str:
        index, epoch = item if isinstance(item, tuple) else (item, 0)
        settings = self.settings
        try:
            case = self.prepared(index)
            key = self.key(index, epoch)
        except VolumeError:
            if settings.broken == "raise":
                raise
            return self.cases[index].id
        label = case.label
        if label is None:
            source = self.cases[index]
            if source.split != "unlabelled":
                raise VolumeError(f"case {source.id} has no label map; training needs one")
            label = np.zeros(case.shape, np.uint8)
        rng = np.random.default_rng([self.seed, int(key[:15], 16), epoch])
        size = draw_size(settings.patch_size, settings.augment, rng)
        probability = settings.foreground_probability
        images, patch = draw_patch(case.images, label[case.box], size, rng, foreground_probability=probability)
        images, patch = resize(images, settings.patch_size), resize(patch, settings.patch_size)
        images, patch = augment_patch(images, patch, case.available, settings.augment, rng)
        return {
            "id": self.cases[index].id,
            "key": key,
            "images": images,
            "available": case.available,
            "masks": to_regions(patch, self.regions),
            "labelled": np.array(case.label is not None),
        }

    def whole(self, index: int) -> WholeCase:
        """Return the whole case without augmentation. Raises VolumeError for a broken case with either policy."""
        case = self.prepared(index)
        masks = None if case.label is None else torch.from_numpy(to_regions(case.label, self.regions))
        images, available = torch.from_numpy(case.full()), torch.from_numpy(case.available)
        key = self.key(index, -1)
        return WholeCase(self.cases[index].id, key, images, available, masks, case.box, case.loaded)

    def readable(self, index: int) -> WholeCase | None:
        """Return the whole case as `whole` does; None for a broken one if the policy is `skip`."""
        try:
            return self.whole(index)
        except VolumeError:
            if self.settings.broken == "raise":
                raise
            self.unreadable[self.cases[index].id] = None
            return None

    def regions_of(self, index: int) -> frozenset[str]:
        """Return the regions that the label map of a case contains; none if it has no label map or cannot be read."""
        if index not in self._regions_of:
            mask, found = self.cases[index].mask, frozenset[str]()
            if mask is not None:
                with suppress(VolumeError):
                    label, _ = load_label(mask, self.regions, max_voxels=self.settings.max_voxels)
                    masks = to_regions(label, self.regions)
                    found = frozenset(name for name, mask in zip(self.regions, masks, strict=True) if mask.any())
            self._regions_of[index] = found
        return self._regions_of[index]

    def subsets_of(self, index: int) -> list[SubsetFlags]:
        """Return the subsets of the modalities of which a case names files, whether or not they can be read."""
        available = [name in self.cases[index].images for name in self.modalities]
        return within(all_subsets(len(self.modalities)), available)

    def collate(self, items: Sequence[dict[str, Any] | str]) -> Batch:
        """Return the batch of the readable cases."""
        rows = [item for item in items if isinstance(item, dict)]
        skipped = [item for item in items if isinstance(item, str)]
        size = self.settings.patch_size
        shapes = {
            "images": ((len(self.modalities), *size), torch.float32),
            "available": ((len(self.modalities),), torch.bool),
            "masks": ((len(self.regions), *size), torch.float32),
            "labelled": ((), torch.bool),
        }
        tensors = {
            name: torch.from_numpy(np.stack([row[name] for row in rows])).to(kind)
            if rows
            else torch.zeros((0, *shape), dtype=kind)
            for name, (shape, kind) in shapes.items()
        }
        return Batch(tensors, [row["id"] for row in rows], [row["key"] for row in rows], skipped)


def content_of(case: Case, modalities: Sequence[str]) -> str:
    """Return a SHA-256 over the content of a case: the bytes of the file and the channel of each modality and the mask.

    Raises:
        VolumeError: a file cannot be read.
    """
    digest = hashlib.sha256()
    hashes: dict[Any, str] = {}
    files: Mapping[str, Any] = {name: case.images.get(name) for name in modalities} | {"": case.mask}
    for name, file in files.items():
        if file is not None:
            try:
                if file.path not in hashes:  # a 4-D file occurs once per channel
                    hashes[file.path] = content_hash(file.path)
            except OSError as error:
                raise VolumeError(f"{file.path} cannot be read ({error.strerror}); check the path") from error
            digest.update(f"{name}|{hashes[file.path]}|{file.channel}\n".encode())
    return digest.hexdigest()
