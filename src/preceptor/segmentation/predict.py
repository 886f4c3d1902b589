"""A trained segmentation network on cases, whatever modalities they have."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from preceptor.arguments import as_path
from preceptor.data.limits import MAX_VOXELS
from preceptor.data.nifti import Geometry
from preceptor.data.segmentation.case_files import CaseSource, as_case, find_cases, holds_one_case
from preceptor.data.types import Case, SegmentationDataset
from preceptor.data.volumes import (
    LoadedVolume,
    content_hash,
    on_source_grid,
    save_mask,
    save_probabilities,
    to_regions,
)
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.pipeline.model_files import COPY_AGAIN, read_settings, reading, require_finite
from preceptor.pipeline.predictions import read_rows
from preceptor.pipeline.run_dir import model_folder
from preceptor.segmentation.config import EvaluationConfig, InferenceConfig
from preceptor.segmentation.dataset import VolumeExamples, VolumeSettings
from preceptor.segmentation.evaluate import label_map, predict_case
from preceptor.segmentation.model import MultimodalUNet
from preceptor.segmentation.prediction_files import STARTED, files_of, note_started, require_new_files
from preceptor.segmentation.subsets import subset_name

INFERENCE_CONFIG = "segmentation.json"
"""What prediction needs beside the weights: regions, preparation, inference settings, Dice on validation data."""


@dataclass(frozen=True)
class Segmentation:
    """The segmentation of one case.

    Attributes:
        case: id of the case.
        modalities: those that were used, joined by `+`.
        missing: modalities of the network that the case does not have.
        mask: label map (D, H, W) uint8: from feet to head, back to front, left to right of the patient.
        probabilities: (R, D, H, W) float32 by region on the grid of the network, before thresholding.
        volumes_ml: volume of each region in ml, counted in `mask`, to six significant digits.
        expected_dice: mean Dice of these modalities on the validation cases by region; None if no case had them.
        expected_dice_of_all: the same with all modalities.
        validation_cases: number of validation cases.
        post_processed: whether the mask was post-processed.
        warnings: sentences for the reader of the result.
        loaded: the volumes that were segmented, with the grid of their files.
        regions: the labels of `mask` that form each region.
        series: folder of the first DICOM series of the case, or None if it has none.
        series_grid: grid of that series.
        sources: files and folders of DICOM series that were segmented; no result is written over them.
    """

    case: str
    modalities: str
    missing: tuple[str, ...]
    mask: np.ndarray
    probabilities: np.ndarray
    volumes_ml: dict[str, float]
    expected_dice: dict[str, float] | None
    expected_dice_of_all: dict[str, float] | None
    validation_cases: int
    post_processed: bool
    warnings: tuple[str, ...] = ()
    loaded: LoadedVolume = field(repr=False, default=None)  # type: ignore[assignment]
    regions: Mapping[str, tuple[int, ...]] = field(repr=False, default_factory=dict)
    series: Path | None = field(repr=False, default=None)
    series_grid: Geometry | None = field(repr=False, default=None)
    sources: tuple[Path, ...] = field(repr=False, default=())

    def save(self, path: str | Path) -> Path:
        """Write the label map as NIfTI with the grid and the orientation of the source; return its path.

        Raises UserError if the path does not end in .nii or .nii.gz, or is a file that was segmented.
        """
        target = self._target(path)
        save_mask(target, self.mask, self.loaded)
        return target

    def save_probabilities(self, path: str | Path) -> Path:
        """Write the probabilities (X, Y, Z, regions) as NIfTI; return the path. Raises UserError as `save`."""
        target = self._target(path)
        save_probabilities(target, self.probabilities, self.loaded)
        return target

    def save_dicom_seg(self, path: str | Path, *, copy_patient: bool = False) -> Path:
        """Write the regions as the segments of a DICOM Segmentation object that refers to the series; return the path.

        With `copy_patient`, the fields of the patient and the study are copied from the series; else they are empty.

        Raises:
            UserError: the case is no DICOM series, the path is a file that was segmented, or as
                `data.dicom_seg.write_dicom_seg`.
        """
        from preceptor.data.dicom_seg import write_dicom_seg

        target = self._target(path)
        if self.series is None:
            raise _no_series(self.case)
        regions = to_regions(self.mask, self.regions)
        assert self.series_grid is not None  # not `loaded.geometry`, which may be that of a NIfTI file
        masks = np.stack([self.series_grid.source(region) for region in regions]).astype(bool)
        labels = {name: f"labels {', '.join(map(str, values))}" for name, values in self.regions.items()}
        write_dicom_seg(target, masks, labels, self.series, copy_patient=copy_patient)
        return target

    def _target(self, path: str | Path) -> Path:
        """Return the path of a new file. Raises UserError if it is one that was segmented, under whatever name."""
        target = as_path(path, "path")
        files = [file for source in self.sources for file in (source, *(source.iterdir() if source.is_dir() else ()))]
        if target.exists() and any(file.exists() and file.samefile(target) for file in files):
            raise UserError(f"{target} is an image of case {self.case}, which would be lost; give another path")
        return target

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the voxels, ready for JSON."""
        names = ("case", "modalities", "volumes_ml", "expected_dice", "expected_dice_of_all", "validation_cases")
        found = {name: getattr(self, name) for name in names}
        return found | {
            "missing": list(self.missing),
            "post_processed": self.post_processed,
            "warnings": list(self.warnings),
        }


class SegmentationModel:
    """A trained segmentation network with its preparation of cases. Load it with `preceptor.load`."""

    batch_size: ClassVar[int] = 1
    """Number of items that `predict_rows` computes together."""
    options: ClassVar[Mapping[str, Any]] = dict.fromkeys(("post", "probabilities", "dicom_seg", "copy_patient"), False)
    """Inputs of `preceptor predict` that change its rows, with their defaults."""
    default_output: ClassVar[Path | None] = Path()
    """Where `preceptor predict` writes without `output`."""

    def __init__(self, network: MultimodalUNet, config: dict[str, Any], folder: Path | None = None) -> None:
        self.network, self.config, self.folder = network.eval(), config, folder
        self.modalities: tuple[str, ...] = tuple(network.config.modalities)
        self.regions = {name: tuple(values) for name, values in config["regions"].items()}
        self.inference = EvaluationConfig.model_validate(config["inference"])

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device | None = None) -> Self:
        """Load a run, a stage or a model folder. Raises UserError if a file is missing or damaged."""
        place = model_folder(Path(folder))
        network, config = MultimodalUNet.load(place), read_inference_config(place)
        with reading(place / INFERENCE_CONFIG, "the settings"):
            network.check_size(config["preparation"]["patch_size"], "a window")
            if tuple(config["regions"]) != tuple(network.config.regions):
                raise UserError(
                    f"the regions are {', '.join(config['regions'])}, but those of the network "
                    f"{', '.join(network.config.regions)}; {COPY_AGAIN}"
                )
        return cls(network.to(device) if device is not None else network, config, place)

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return next(self.network.parameters()).device

    @property
    def max_voxels(self) -> int:
        """The largest number of voxels of a volume that the model reads."""
        return int(self.config["preparation"].get("max_voxels", MAX_VOXELS))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model folder, which `preceptor.load` and transformers read."""
        self.network.save(Path(folder))
        write_text(Path(folder) / INFERENCE_CONFIG, json.dumps(self.config, indent=1))

    def segment(self, case: CaseSource, *, post: bool = False) -> Segmentation:
        """Segment one case.

        Args:
            case: files by modality, such as ``{"flair": "a.nii.gz", "t1": "b.nii.gz"}``; a folder; a list of files; or
                one 4-D file. An image is a NIfTI file or the folder of a DICOM series. Label maps are ignored.
            post: post-process the mask by the settings `evaluation` of the recipe (`metrics.post_process`).

        Raises:
            UserError: the case has none of the modalities of the network, a file cannot be used, or two modalities have
                the same image.
        """
        source = replace(as_case(case, self.modalities), mask=None)
        preparation = self.config["preparation"]
        window = tuple(preparation["patch_size"])
        settings = VolumeSettings(
            patch_size=window,
            intensity=preparation["intensity"],
            augment="none",
            spacing=tuple(preparation["spacing"]) if preparation["spacing"] else None,
            max_voxels=self.max_voxels,
        )
        data = SegmentationDataset("case", "none", Path(), [source], modalities=self.modalities, regions=self.regions)
        whole = VolumeExamples([source], data, settings).whole(0)
        _require_distinct(source)
        subset = tuple(bool(there) for there in whole.available)
        inside = predict_case(self.network, whole, self.inference, window, only=[subset])[subset]
        require_finite(inside, self.folder)
        probabilities = np.zeros((len(self.regions), *whole.images.shape[1:]), np.float32)
        probabilities[(slice(None), *whole.box)] = inside.float().cpu().numpy()
        label = label_map(probabilities, self.regions, self.inference if post else None)
        label = on_source_grid(label, whole.loaded)
        masks = to_regions(label, self.regions)
        series = _series(source)
        millilitres = whole.loaded.geometry.voxel_volume / 1000
        name, validation = subset_name(subset, self.modalities), self.config["validation"]
        missing = tuple(m for m, there in zip(self.modalities, subset, strict=True) if not there)
        expected = validation.get(name)
        warnings = () if expected else ("No validation case had these modalities, so the quality is unknown.",)
        return Segmentation(
            case=source.id,
            modalities=name,
            missing=missing,
            mask=label,
            probabilities=probabilities,
            volumes_ml={r: float(f"{masks[i].sum() * millilitres:.6g}") for i, r in enumerate(self.regions)},
            expected_dice=expected,
            expected_dice_of_all=validation.get(subset_name((True,) * len(self.modalities), self.modalities)),
            validation_cases=self.config["data"]["validation"],
            post_processed=post,
            warnings=(*warnings, *source.remarks, *whole.loaded.remarks),
            loaded=whole.loaded,
            regions=self.regions,
            series=source.images[series].path if series else None,
            series_grid=whole.loaded.grids[series] if series else None,
            sources=tuple(file.path.absolute() for file in source.images.values()),
        )

    def segment_many(self, cases: Iterable[CaseSource], *, post: bool = False) -> Iterator[Segmentation]:
        """Yield the segmentation of each case in order; one case is in memory at a time.

        A path and a mapping of files by modality are one case. Raises UserError as `segment`.
        """
        single = isinstance(cases, str | os.PathLike | Mapping) or not isinstance(cases, Iterable)
        listed: Iterable[Any] = [cases] if single else cases
        for case in listed:
            yield self.segment(case, post=post)

    # What `preceptor predict` calls

    def prediction_file(self, output: Path) -> Path:
        """Return the table that a row is appended to for each case."""
        return output / "predictions.csv"

    def items(
        self,
        *,
        case: Sequence[Path] | None = None,
        files: Mapping[str, Path] | None = None,
        table: Path | None = None,
        dicom_seg: bool = False,
        **_: Any,
    ) -> Sequence[Case]:
        """Return the cases of files by modality, of a case's files or folder, of a folder of cases or of a table.

        Raises UserError if the inputs do not belong together, or if `dicom_seg` cannot be written for one of them.
        """
        if bool(case) + bool(files) + (table is not None) != 1:
            raise UserError(
                f"a segmentation model needs MODALITY=FILE ({', '.join(self.modalities)}), --case PATH or --table FILE"
            )
        if files:
            cases: Sequence[Case] = [as_case(files, self.modalities)]
        elif table is not None or (case and len(case) == 1 and not holds_one_case(case[0], self.modalities)):
            cases = find_cases(table or case[0], self.modalities)  # type: ignore[index]
        else:
            assert case
            cases = [as_case(case[0] if len(case) == 1 else list(case), self.modalities)]
        if dicom_seg:
            from preceptor.data.dicom_seg import import_highdicom

            import_highdicom()
            for one in cases:
                if _series(one) is None:
                    raise _no_series(one.id)
        return cases

    def predict_rows(
        self,
        items: Sequence[Case],
        *,
        output: Path,
        post: bool = False,
        probabilities: bool = False,
        dicom_seg: bool = False,
        copy_patient: bool = False,
        **_: Any,
    ) -> Iterator[dict[str, Any]]:
        """Segment cases, and return one flat row for each (id, files, volumes, expected Dice).

        A row follows after its label map is written to `output`. With `dicom_seg`, each case also gets a DICOM
        Segmentation object (see `Segmentation.save_dicom_seg`).

        Raises:
            UserError: at once, before a case is segmented, if `output` already contains a file of that name that no
                interrupted call wrote, or lacks one that `predictions.csv` names.
        """
        require_new_files(items, self.prediction_file(output))
        return self._write_rows(items, output, post, probabilities, dicom_seg, copy_patient)

    def _write_rows(
        self, items: Sequence[Case], output: Path, post: bool, probabilities: bool, dicom_seg: bool, copy_patient: bool
    ) -> Iterator[dict[str, Any]]:
        output.mkdir(parents=True, exist_ok=True)
        rows = self.prediction_file(output)
        resumable = rows.is_file()
        row: dict[str, Any] = {}
        try:
            for result in self.segment_many(items, post=post):
                if resumable:
                    note_started(output, result.case, None)
                row = {
                    "id": result.case,
                    "modalities": result.modalities,
                    "missing": "+".join(result.missing),
                    "mask": str(result.save(output / f"{result.case}_seg.nii.gz")),
                }
                if probabilities:
                    row["probabilities"] = str(result.save_probabilities(output / f"{result.case}_prob.nii.gz"))
                if dicom_seg:
                    path = output / f"{result.case}_seg.dcm"
                    row["dicom_seg"] = str(result.save_dicom_seg(path, copy_patient=copy_patient))
                if resumable:
                    note_started(output, result.case, files_of(row))
                expected = result.expected_dice or {}
                row |= {f"{region}_ml": volume for region, volume in result.volumes_ml.items()}
                row |= {f"{region}_expected_dice": expected.get(region, "") for region in self.regions}
                yield row | {"warnings": " ".join(result.warnings)}
                row = {}  # the next one is asked for once this one is written
        finally:
            if resumable:
                if row and all(written["id"] != row["id"] for written in read_rows(rows)[0]):
                    for file in files_of(row):  # a full disk or Ctrl-C came before its row
                        file.unlink(missing_ok=True)
                (output / STARTED).unlink(missing_ok=True)


def _require_distinct(case: Case) -> None:
    """Raise UserError if two modalities of a case have the same image, under one name or two."""
    names: dict[tuple[str, int | None], str] = {}
    for name, file in case.images.items():
        content = content_hash(file.path), file.channel
        if content in names:
            raise UserError(
                f"{file.path}: {name} of case {case.id} is the same image as {names[content]}; give each modality its "
                "own file, and leave out those that were not acquired"
            )
        names[content] = name


def _series(case: Case) -> str | None:
    """Return the modality of the first DICOM series of a case, or None."""
    return next((name for name, file in case.images.items() if file.path.is_dir()), None)


def _no_series(case: str) -> UserError:
    return UserError(
        f"{case} has no DICOM series that a DICOM segmentation could refer to; give the folder of a series, or write "
        "NIfTI"
    )


def read_inference_config(folder: Path) -> dict[str, Any]:
    """Return `segmentation.json` of a model folder. Raises UserError if it is missing or damaged."""
    path = folder / INFERENCE_CONFIG
    config = read_settings(path)
    with reading(path, "the settings"):
        InferenceConfig.model_validate(config)
    return config


MODEL = SegmentationModel
