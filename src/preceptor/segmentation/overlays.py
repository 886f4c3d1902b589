"""The worst cases of a segmentation, drawn: what the network saw, the reference and what it said."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from preceptor.data.types import Case, SegmentationDataset
from preceptor.errors import UserError
from preceptor.report.contents import RunRecord, StageRecord
from preceptor.report.markup import escape
from preceptor.report.words import percent
from preceptor.segmentation import planes
from preceptor.segmentation.combinations import Subject, Subset, mean, name_of, named, number, parse

log = logging.getLogger("preceptor")

MOST_SUBSETS = 4
SHOWN_FIRST = ("flair", "t1ce", "t2")
"""Images on which a brain tumour is seen best, of those that a network was given."""


@dataclass
class DrawnSubset:
    """A combination: `dice` by region, `image` the modality shown, `pictures` the planes as (name, SVG, aspect)."""

    subset: Subset
    dice: dict[str, float]
    image: str
    pictures: list[tuple[str, str, float]] = field(default_factory=list)


@dataclass
class DrawnCase:
    """A case: its mean `dice` over all combinations and regions, and the combinations drawn."""

    id: str
    dice: float | None
    subsets: list[DrawnSubset]


def choose_subsets(dice: Mapping[Subset, float | None], most: int = MOST_SUBSETS) -> list[Subset]:
    """Return up to `most` combinations of decreasing size: the largest, the worst, and the worst of sizes between."""
    worth = {subset: 1.0 if value is None else value for subset, value in dice.items()}
    ranked = sorted(worth, key=lambda subset: (-len(subset), worth[subset], subset))
    if len(ranked) <= most:
        return ranked
    chosen = [ranked[0]]
    worst = min(ranked, key=lambda subset: worth[subset])
    if worst not in chosen:
        chosen.append(worst)
    while len(chosen) < most:
        taken = {len(subset) for subset in chosen}
        rest = [subset for subset in ranked if subset not in chosen]
        chosen.append(next((subset for subset in rest if len(subset) not in taken), rest[0]))
    return sorted(chosen, key=lambda subset: (-len(subset), worth[subset], subset))


def draw_cases(
    run: RunRecord, subject: Subject, data: SegmentationDataset, number: int, max_voxels: int
) -> list[DrawnCase]:
    """Return the worst cases whose predicted masks lie in the run folder, the worst first, at most `number`.

    A case whose files cannot be read, or do not fit each other, is left out.
    """
    masks = _masks(run.focus, subject)
    scores = _scores(run.focus, subject)
    cases = {case.id: case for case in data.samples if case.mask is not None}
    overall = {id: mean(v for rows in scores.get(id, {}).values() for v in rows.values()) for id in masks}
    order = sorted(masks, key=lambda id: (2.0 if overall[id] is None else overall[id], id))
    found: list[DrawnCase] = []
    for id in [id for id in order if id in cases]:
        if len(found) == number:
            break
        try:
            subsets = _draw(cases[id], masks[id], scores.get(id, {}), subject, data, max_voxels)
        except UserError:
            log.warning("the report goes without the pictures of a case whose files cannot be read")
            continue
        if subsets:
            found.append(DrawnCase(id, overall[id], subsets))
    return found


def _masks(stage: StageRecord, subject: Subject) -> dict[str, dict[Subset, Path]]:
    """Return the predicted label maps in a stage's folder, by case and combination."""
    found: dict[str, dict[Subset, Path]] = {}
    for path in sorted((stage.folder / "predictions" / "masks").glob("*__*.nii.gz")):
        id, _, name = path.name.removesuffix(".nii.gz").rpartition("__")
        if subset := parse(name, subject.modalities):
            found.setdefault(id, {})[subset] = path
    return found


def _scores(stage: StageRecord, subject: Subject) -> dict[str, dict[Subset, dict[str, float]]]:
    """Return the Dice of every case by combination and region."""
    found: dict[str, dict[Subset, dict[str, float]]] = {}
    for row in stage.rows.get(subject.protocol or "", []):
        subset, value = parse(str(row.get("subset")), subject.modalities), number(row.get("dice"))
        if subset and value is not None:
            found.setdefault(str(row.get("id")), {}).setdefault(subset, {})[str(row.get("region"))] = value
    return found


def _draw(
    case: Case,
    masks: Mapping[Subset, Path],
    scores: Mapping[Subset, dict[str, float]],
    subject: Subject,
    data: SegmentationDataset,
    max_voxels: int,
) -> list[DrawnSubset]:
    assert case.mask is not None
    regions = {region: data.regions[region] for region in subject.regions if region in data.regions}
    label = planes.read_volume(case.mask.path, case.mask.channel, max_voxels=max_voxels)
    reference = planes.region_masks(label.voxels, regions)
    whole = np.any(list(reference.values()), axis=0) if reference else np.zeros(label.voxels.shape, bool)
    chosen = choose_subsets({subset: mean(scores.get(subset, {}).values()) for subset in masks})
    said: dict[Subset, dict[str, np.ndarray]] = {}
    for subset in chosen:
        volume = planes.read_volume(masks[subset], max_voxels=max_voxels)
        if volume.fits(label):
            said[subset] = planes.region_masks(volume.voxels, regions)
    images: dict[str, np.ndarray] = {}
    for image in {_image(case, subset, subject) for subset in said}:
        file = case.images[image]
        volume = planes.read_volume(file.path, file.channel, max_voxels=max_voxels)
        if not volume.fits(label):
            raise UserError(f"{file.path} and {case.mask.path} do not lie on one grid")
        images[image] = planes.windowed(volume.voxels)
    if not images:
        return []
    predicted = np.any([mask for by_region in said.values() for mask in by_region.values()], axis=0)
    box = planes.content_box(np.max(list(images.values()), axis=0), whole | predicted)
    at = planes.centre(whole if whole.any() else predicted)
    found = []
    for subset, by_region in said.items():
        image = _image(case, subset, subject)
        shown = DrawnSubset(subset, scores.get(subset, {}), image)
        shapes = _shapes("reference", _apart(reference), subject) + _shapes("predicted", by_region, subject)
        for plane in planes.PLANES:
            spoken = f"{plane} plane of case {case.id}, segmented from {named(subset)}: Dice {_numbers(shown, subject)}"
            svg, aspect = planes.drawn(images[image], shapes, plane, at, box, label.spacing, spoken)
            shown.pictures.append((plane, svg, aspect))
        found.append(shown)
    return found


def _apart(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every region without the smaller ones, so that tints do not mix."""
    found: dict[str, np.ndarray] = {}
    for region in sorted(masks, key=lambda region: int(masks[region].sum())):
        taken = np.any(list(found.values()), axis=0) if found else False
        found[region] = masks[region] & ~np.asarray(taken)
    return found


def _shapes(kind: str, masks: Mapping[str, np.ndarray], subject: Subject) -> list[tuple[str, np.ndarray]]:
    """Return (class, mask) per region, the largest first, so that the smaller lie over it."""
    classes = {region: f"{kind} r{place % 6}" for place, region in enumerate(subject.regions)}
    ordered = sorted(masks, key=lambda region: -int(masks[region].sum()))
    return [(classes[region], masks[region]) for region in ordered]


def _image(case: Case, subset: Subset, subject: Subject) -> str:
    """Return which of the images that the network was given is shown."""
    given = [m for m in subject.modalities if m in subset and m in case.images] or list(case.images)
    return next((m for m in SHOWN_FIRST if m in given), given[0])


def cases_section(run: RunRecord, subject: Subject, drawn: Sequence[DrawnCase]) -> str:
    """Return the drawn cases with a legend; "" without any."""
    if not drawn:
        return ""
    keys = "".join(
        f'<li><i class="patch r{place % 6}"></i>{escape(name_of(region))}</li>'
        for place, region in enumerate(subject.regions)
    )
    about = (
        f"The worst cases of \u201c{escape(run.focus.title)}\u201d by mean Dice over all combinations, from all "
        "modalities down to fewer. Tinted areas are the reference, each voxel in the colour of its smallest region; "
        "solid lines are what the network said. Planes go through the centre of the reference. Radiological "
        "convention: the patient\u2019s right (R) is on the left of axial and coronal planes; sagittal planes have the "
        "face on the left (A). The image is one that the network was given, black and white at its 1st and 99.5th "
        "percentile."
    )
    return f'<p class="small">{about}</p><ul class="legend">{keys}</ul>' + "".join(
        _case(case, subject) for case in drawn
    )


def _case(case: DrawnCase, subject: Subject) -> str:
    facts = f'<p class="facts">Mean Dice over all combinations: <b>{percent(case.dice)}</b></p>'
    figures = "".join(_subset(shown, subject) for shown in case.subsets)
    head = f"<h3>{escape(case.id)}</h3>{facts if case.dice is not None else ''}"
    return f'<article class="question">{head}<div class="views">{figures}</div></article>'


def _subset(shown: DrawnSubset, subject: Subject) -> str:
    title = "All modalities" if len(shown.subset) == len(subject.modalities) else named(shown.subset)
    pictures = ""
    for plane, svg, aspect in shown.pictures:
        side = "A" if plane == "sagittal" else "R"
        mark = f'<span aria-hidden="true">{side}</span>'
        pictures += f'<div class="plane {plane}" style="flex-grow:{aspect:.3f}">{svg}{mark}</div>'
    caption = f"<b>{escape(title)}</b><br>{escape(_numbers(shown, subject))}"
    seen = f'<p class="seen">on {escape(name_of(shown.image))}</p>'
    return f'<figure><figcaption>{caption}</figcaption><div class="planes">{pictures}</div>{seen}</figure>'


def _numbers(shown: DrawnSubset, subject: Subject) -> str:
    scored = [(name_of(region), shown.dice.get(region)) for region in subject.regions]
    return " \u00b7 ".join(f"{name}\u00a0{percent(value, unit=False)}" for name, value in scored if value is not None)
