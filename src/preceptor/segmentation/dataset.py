"""From cases to batches: normalised volumes, random patches and their views, content keys."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from preceptor.data.nifti import MAX_VOXELS, VolumeError
from preceptor.data.types import Case, SegmentationDataset
from preceptor.data.volumes import LoadedVolume, load_case, resampled, resize, to_regions
from preceptor.errors import UserError
from preceptor.files import sha256
from preceptor.segmentation.augment import Augment, augment_patch, draw_patch, draw_size
from preceptor.segmentation.intensity import Intensity, bounding_box, normalise
from preceptor.task import Batch

CACHE_BYTES = 2 * 2**30  # normalised volumes kept in memory per process


@dataclass(frozen=True)
class VolumeSettings:
    """How cases become what a network sees; sizes are (D, H, W), `spacing` in mm, None for each case's own."""

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
    """A case as a network sees it. `images` (N, d, h, w) float32 hold the box alone, which all the foreground is in.

    `box` lies in the volume of `shape` (D, H, W); `label` (D, H, W) is all of it. `loaded` keeps no voxel, only what
    `save_mask` needs.
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
        """Return the images (N, D, H, W), 0 outside the box."""
        out = np.zeros((len(self.images), *self.shape), np.float32)
        out[(slice(None), *self.box)] = self.images
        return out


@dataclass
class WholeCase:
    """A whole case: `images` (N, D, H, W) float, `available` (N,) bool, `masks` (R, D, H, W) bool or None.

    Outside `box` all images are 0. `loaded` is for `save_mask`; it holds no voxels.
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
    """Return a case resampled, normalised, and cut to its foreground.

    Raises:
        VolumeError: as `load_case`, and for an intensity that does not fit the images.
    """
    loaded = load_case(case, data, max_voxels=settings.max_voxels)
    if settings.spacing is not None:
        loaded = resampled(loaded, settings.spacing)
    volumes: dict[str, np.ndarray] = {}
    for name in modalities:
        if name in loaded.images:
            try:
                volumes[name] = normalise(loaded.images[name], settings.intensity)
            except UserError as error:
                raise VolumeError(f"{case.images[name].path}: {error}") from error
    if not volumes:
        raise VolumeError(f"case {case.id} has {', '.join(case.images)}, and none of {', '.join(modalities)}")
    # Each modality has its own foreground: the box is around all of them.
    box = bounding_box(np.logical_or.reduce([volume != 0 for volume in volumes.values()]))
    sides = [side.stop - side.start for side in box]
    images = np.zeros((len(modalities), *sides), np.float32)
    for row, name in enumerate(modalities):
        if name in volumes:
            images[row] = volumes[name][box]
    available = np.array([name in volumes for name in modalities])
    return Prepared(images, available, loaded.label, box, loaded.shape, replace(loaded, images={}, label=None))


class VolumeExamples(Dataset):
    """Patches of cases; indexed by ``(index, epoch)``, where the epoch says which patch and view are drawn.

    An item depends on seed, the files' bytes and the epoch, and on nothing else: not on the worker, the order of
    items or the names of files. It is a dict of arrays, or the id of a case that is broken where the policy is `skip`.
    Modalities are never dropped here: `available` says what the case has.
    """

    def __init__(
        self, cases: Sequence[Case], data: SegmentationDataset, settings: VolumeSettings, *, seed: int = 0
    ) -> None:
        self.cases, self.data, self.settings, self.seed = list(cases), data, settings, seed
        self.modalities, self.regions = tuple(data.modalities), dict(data.regions)
        self._prepared: dict[int, Prepared] = {}
        self._hashes: dict[int, str] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.cases)

    def prepared(self, index: int) -> Prepared:
        """Return the normalised case; kept in memory as long as all that is kept is under `cache_bytes`."""
        if index in self._prepared:
            return self._prepared[index]
        found = prepare(self.cases[index], self.data, self.modalities, self.settings)
        if self._bytes + found.nbytes <= self.settings.cache_bytes:
            self._prepared[index] = found
            self._bytes += found.nbytes
        return found

    def key(self, index: int, view: int) -> str:
        """Return the content key of a case: the bytes of its files with their roles, and the view (-1: the whole)."""
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
            own = self.cases[index]
            if own.split != "unlabelled":
                raise VolumeError(f"case {own.id} has no label map; only cases with one can be trained on")
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
        """Return the whole case, not augmented, for evaluation. Raises VolumeError whatever the policy."""
        case = self.prepared(index)
        masks = None if case.label is None else torch.from_numpy(to_regions(case.label, self.regions))
        images, available = torch.from_numpy(case.full()), torch.from_numpy(case.available)
        key = self.key(index, -1)
        return WholeCase(self.cases[index].id, key, images, available, masks, case.box, case.loaded)

    def collate(self, items: list[dict[str, Any] | str]) -> Batch:
        """Return the batch of the cases that could be read."""
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

    def loader(self, batches, workers: int = 0) -> DataLoader:
        """Return a loader over the lists of items that `batches` yields."""
        return DataLoader(
            self,
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
        )


def content_of(case: Case, modalities: Sequence[str]) -> str:
    """Return the SHA-256 of a case's content: for each modality and the mask the file's bytes and the channel.

    Raises VolumeError where a file cannot be read.
    """
    digest = hashlib.sha256()
    known: dict[Any, str] = {}
    files: Mapping[str, Any] = {name: case.images.get(name) for name in modalities} | {"": case.mask}
    for name, file in files.items():
        if file is not None:
            try:
                if file.path not in known:  # of a 4-D file every channel is asked for
                    known[file.path] = sha256(file.path)
            except OSError as error:
                raise VolumeError(f"{file.path} cannot be read ({error.strerror}); check the path") from error
            digest.update(f"{name}|{known[file.path]}|{file.channel}\n".encode())
    return digest.hexdigest()
