"""Score the masks of any segmentation system against the reference label maps of a data set."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from preceptor.data.limits import MAX_VOXELS
from preceptor.data.segmentation.folders import list_volumes
from preceptor.data.segmentation.modalities import spelled_as, stem
from preceptor.data.types import Case, SegmentationDataset, VolumeFile
from preceptor.errors import UserError, nearest
from preceptor.recipe import read_recipe, validate
from preceptor.scores import Scored, number_groups, percent
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.segmentation.metrics import DESCRIBES, score_masks, table
from preceptor.segmentation.subsets import subset_name

MOST_LISTED = 5
ALL = "all"
"""Variant in a protocol's id that scores every labelled case of the data, not the test split alone."""


def knows(protocol: str) -> bool:
    """Return whether a protocol's id is one of label maps: ``DATA/VARIANT/A`` or ``DATA/VARIANT/A-post``."""
    return protocol.rpartition("/")[2] in DESCRIBES and protocol.count("/") == 2


def score_file(predictions: Path, protocol: str, *, root: Path | None = None) -> Scored:
    """Score a folder of label maps by Dice and HD95 per case, region and combination of modalities.

    Masks are scored as they are. Under ``A-post`` they are expected to be post-processed already.

    Args:
        predictions: folder of ``CASE.nii.gz``, ``CASE_seg.nii.gz`` or ``CASE-seg.nii.gz`` from all modalities that a
            case has. Masks from a combination of modalities are in a subfolder (``flair+t1/CASE.nii.gz``) or named
            ``CASE__flair+t1.nii.gz``. Links are followed as in a folder of cases. Label values are those of the
            references; they are on the grid of the case.
        protocol: ``NAME/VARIANT/A``. `VARIANT` is that of the data set, whose test split is scored, or ``all``.
        root: the data set: a folder of cases, a table of files, or a recipe or run folder with its data settings.

    Raises:
        UserError: names the file and the fix. A mask is missing, occurs twice, has another grid or unknown labels, or
            its combination contains a modality that the case does not have.
    """
    from preceptor.data.volumes import load_label, require_same_grid, to_regions

    if root is None:
        raise UserError("give --root DATA: a folder of cases with reference label maps, or a recipe or run folder")
    name, variant, kind = protocol.split("/")
    data, max_voxels = _references(root, name)
    if variant not in (ALL, data.variant) or name != data.name:
        raise UserError(
            f"protocol {protocol!r} does not fit {root}; its protocols are {data.name}/{data.variant}/{kind} (the test "
            f"split) and {data.name}/{ALL}/{kind} (every labelled case)"
        )
    cases = [case for case in (data.samples if variant == ALL else data.split("test")) if case.mask is not None]
    masks, notes = _match(predictions, cases, data)
    rows: list[dict[str, Any]] = []
    groups, names = number_groups(cases), list(data.regions)
    for case in cases:
        assert case.mask is not None
        reference, grid = load_label(case.mask, data.regions, max_voxels=max_voxels)
        targets = to_regions(reference, data.regions)
        for subset in sorted((s for i, s in masks if i == case.id), key=lambda s: (sum(s), [not m for m in s])):
            file = VolumeFile(masks[case.id, subset])
            label, own_grid = load_label(file, data.regions, max_voxels=max_voxels)
            require_same_grid(case.mask, grid, file, own_grid)
            combination = subset_name(subset, data.modalities)
            regions = to_regions(label, data.regions)
            rows += score_masks(case.id, combination, regions, targets, names, grid.spacing, group=groups[case.id])
    scores = table(rows)
    results = {
        "stage": predictions.name,
        "protocols": {protocol: scores},
        "describes": {protocol: DESCRIBES[kind]},
        "notes": [*data.notes, *notes],
        "modalities": list(data.modalities),
        "regions": list(data.regions),
    }
    return Scored(results, rows, *_table(scores))


def _references(root: Path, name: str) -> tuple[SegmentationDataset, int]:
    """Return the data of a recipe, a run folder, a folder of cases or a table, and its limit of voxels per volume."""
    from preceptor.data.segmentation.cases import read_volumes

    if root.suffix not in (".yaml", ".yml") and not (root / "recipe.yaml").is_file():
        return read_volumes(root, name=name), MAX_VOXELS
    from preceptor.segmentation.data import read_cases

    recipe = validate(*read_recipe(str(root)), SegmentationRecipe)
    scratch = root / "data" if (root / "data").is_dir() else recipe.output_folder / "data"
    return read_cases(recipe.data, scratch, needed=("test",)), recipe.data.max_voxels


def _match(
    folder: Path, cases: Sequence[Case], data: SegmentationDataset
) -> tuple[dict[tuple[str, tuple[bool, ...]], Path], list[str]]:
    """Return the file of each case and combination of modalities, and notes on files that are ignored.

    Raises UserError if a case has no mask for a combination that others have, or two.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a folder of CASE.nii.gz masks")
    by_id = {case.id: case for case in cases}
    masks: dict[tuple[str, tuple[bool, ...]], Path] = {}
    ignored: list[str] = []
    combinations: set[tuple[bool, ...] | None] = set()
    listing = list_volumes(folder)
    for path in listing.volumes:
        base = stem(path.name) or ""
        if base.endswith("_prob"):
            continue
        # The id of a case may contain "__" itself.
        whole = "__" not in base or base in by_id or _without_seg(base) in by_id
        id, given = (base, "") if whole else base.rpartition("__")[::2]
        given = given or "+".join(path.parent.relative_to(folder).parts)
        case = by_id.get(id) or by_id.get(_without_seg(id))
        if case is None:
            ignored.append(path.name)
            continue
        subset = _subset(_without_seg(given), case, data.modalities, path)
        combinations.add(subset if given else None)
        before = masks.setdefault((case.id, subset), path)
        if before != path:
            raise UserError(f"{path} and {before} are both masks of {case.id} from the same modalities; keep one")
    if not masks:
        example = f", such as {min(by_id)}.nii.gz" if by_id else ""
        raise UserError(f"{folder} contains no mask of the {len(cases)} cases of the protocol{example}")
    missing = []
    for combination in combinations:
        for case in cases:
            available = tuple(m in case.images for m in data.modalities)
            wanted = available if combination is None else combination
            if all(a for a, w in zip(available, wanted, strict=True) if w) and (case.id, wanted) not in masks:
                missing.append(f"{case.id} ({subset_name(wanted, data.modalities)})")
    if missing:
        raise UserError(f"{folder}: {len(missing)} masks are missing: {_first(missing)}; add them, empty if need be")
    notes = [f"{len(ignored)} files for cases outside the protocol are ignored: {_first(ignored)}."] if ignored else []
    return masks, notes + [f"In {folder}: {finding.reason}." for finding in listing.findings]


def _without_seg(name: str) -> str:
    """Return the case in the name of a label map, such as ``CASE_seg``, ``CASE-seg`` and ``CASE_dseg`` of BIDS.

    Other names are returned as they are.
    """
    return re.sub(r"[_\-.\s]d?seg$", "", name, flags=re.IGNORECASE)


def _subset(given: str, case: Case, modalities: Sequence[str], path: Path) -> tuple[bool, ...]:
    """Return the modalities that a mask was made from, by default all that the case has."""
    if not given:
        return tuple(m in case.images for m in modalities)
    names = spelled_as(modalities, given.split("+"))
    for modality in names:
        if modality not in modalities:
            raise UserError(f"{path}: {modality!r} is not a modality{nearest(modality, modalities)}")
        if modality not in case.images:
            raise UserError(f"{path}: case {case.id} does not have the modality {modality}; remove the file")
    return tuple(m in names for m in modalities)


def _first(items: Iterable[str]) -> str:
    listed = list(items)
    return ", ".join(listed[:MOST_LISTED]) + (", ..." if len(listed) > MOST_LISTED else "")


def _table(scores: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return heads and lines of the table of the command line."""
    regions = list(scores["regions"])
    lines = [
        [subset, *(percent(of["dice"][r]) for r in regions), *(f"{of['hd95'][r]:.1f}" for r in regions)]
        for subset, of in scores["subsets"].items()
    ]
    if len(lines) > 1:
        means = [*(percent(scores["regions"][r]) for r in regions), *(f"{scores['hd95'][r]:.1f}" for r in regions)]
        lines.append([f"mean of {len(lines)}", *means])
    return ["modalities", *regions, *(f"{region} HD95, mm" for region in regions)], lines
