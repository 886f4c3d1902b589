"""Images of a phantom case, and questions about them whose answers follow from its geometry.

Every closed question is answered yes about as often as no, so that its wording gives nothing away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from preceptor.data.phantom_volume import MR_CONTRASTS, Lesion, PhantomCase, bounding_box

PLANES = ("axial", "coronal", "sagittal")
MODALITIES = ("mri", "ct", "x-ray")
ASKED_ORGANS = {
    "head": ("brain", "ventricles", "cerebellum", "right eye", "left eye"),
    "torso": ("right lung", "left lung", "heart", "liver", "spleen", "stomach", "right kidney", "left kidney"),
}
ABNORMALITIES = {"brain": "brain tumour", "lung": "lung nodule", "liver": "liver lesion", "kidney": "renal cyst"}
VISIBLE = 0.004
"""Share of the image that an organ or lesion must cover to count as visible; below half of it, it counts as absent,
and between the two no question is asked."""


@dataclass
class View:
    """One image of a case: `image` (side, side) uint8; `masks` of organs and `lesions` of those cut, both (side, side)
    bool at the voxels' resolution, turned as the image is. `plane` is "frontal" for an x-ray."""

    case: PhantomCase
    contrast: str
    plane: str
    image: np.ndarray
    masks: dict[str, np.ndarray]
    lesions: dict[Lesion, np.ndarray] = field(default_factory=dict)

    @property
    def modality(self) -> str:
        return "mri" if self.contrast in MR_CONTRASTS else self.contrast

    def share(self, mask: np.ndarray) -> float:
        return float(mask.mean())

    def visible_lesions(self) -> list[Lesion]:
        return [lesion for lesion, mask in self.lesions.items() if self.share(mask) >= VISIBLE]

    def has_doubtful_lesion(self) -> bool:
        return any(0 < self.share(mask) < VISIBLE for mask in self.lesions.values())

    def boxes(self) -> dict[str, list[int]]:
        """Return ``{name: [x0, y0, x1, y1]}`` in voxels of the view, ends exclusive, of visible organs and lesions."""
        found = {name: mask for name, mask in self.masks.items() if self.share(mask) >= VISIBLE}
        found |= {f"lesion {lesion.index}": self.lesions[lesion] for lesion in self.visible_lesions()}
        boxes = {}
        for name, mask in found.items():
            y0, x0, y1, x1 = bounding_box(mask)
            boxes[name] = [x0, y0, x1, y1]
        return boxes


def _cut(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """Return a slice as it is hung: head up, front up in axial views, the patient's right on the left."""
    if plane == "axial":
        return volume[index]
    return volume[::-1, index] if plane == "coronal" else volume[::-1, :, index]


def _grey(image: np.ndarray, low: float, high: float) -> np.ndarray:
    return (np.clip((image - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)


def make_view(case: PhantomCase, rng: np.random.Generator) -> View:
    """Return a random image of a case; about every second one cuts a lesion where the case has any."""
    kinds, weights = (*MR_CONTRASTS, "ct", "x-ray"), [0.15, 0.15, 0.15, 0.15, 0.25, 0.15]
    contrast = str(rng.choice(kinds, p=weights))
    organs = ASKED_ORGANS[case.region]
    if contrast == "x-ray":
        return _x_ray(case, organs)
    plane = str(rng.choice(PLANES, p=[0.5, 0.3, 0.2]))
    axis = PLANES.index(plane)
    size = case.tissue.shape[0]
    if case.lesions and rng.random() < 0.7:
        lesion = case.lesions[int(rng.integers(len(case.lesions)))]
        index = lesion.centre[axis]
    else:
        index = int(rng.integers(round(0.32 * size), round(0.68 * size)))
    image = _cut(case.contrast(contrast), plane, index)
    if contrast == "ct":
        window = (-40, 120) if case.region == "head" else (-160, 240)
        grey = _grey(image, *window)
    else:
        grey = _grey(image, 0.0, float(np.quantile(image, 0.995)))
    masks = {organ: _cut(case.organ_mask(organ), plane, index) for organ in organs}
    lesions = {lesion: _cut(case.lesion_index == lesion.index, plane, index) for lesion in case.lesions}
    return View(case, contrast, plane, grey, masks, lesions)


def _x_ray(case: PhantomCase, organs: tuple[str, ...]) -> View:
    """Return the frontal projection of the attenuation; only lesions in the lung show in it."""
    attenuation = np.maximum(case.contrast("ct") + 1000, 0).mean(axis=1)[::-1]
    image = np.log1p(attenuation / 150)
    grey = _grey(image, float(image.min()), float(np.quantile(image, 0.998)))
    masks = {organ: np.any(case.organ_mask(organ), axis=1)[::-1] for organ in organs}
    lesions = {
        lesion: (case.lesion_index == lesion.index).any(axis=1)[::-1]
        for lesion in case.lesions
        if lesion.organ == "lung"
    }
    return View(case, "x-ray", "frontal", grey, masks, lesions)


@dataclass(frozen=True)
class Asked:
    """A question with its answer; `kind` is the question type, closed where the answer is yes or no."""

    kind: str
    question: str
    answer: str

    @property
    def answer_type(self) -> str:
        return "closed" if self.answer in ("yes", "no") else "open"


def _pick(rng: np.random.Generator, *phrases: str) -> str:
    return phrases[int(rng.integers(len(phrases)))]


def _balanced(rng: np.random.Generator, right: str, others: tuple[str, ...]) -> tuple[str, str]:
    """Return (name to ask about, yes or no), either equally often."""
    if rng.random() < 0.5:
        return right, "yes"
    return _pick(rng, *(name for name in others if name != right)), "no"


def _modality(view: View, rng: np.random.Generator) -> Asked:
    if view.modality == "mri" and rng.random() < 0.4:
        question = _pick(
            rng, "which mr contrast is this?", "what is the weighting of this mri?", "which mri sequence is shown?"
        )
        return Asked("modality", question, view.contrast)
    if rng.random() < 0.5:
        question = _pick(rng, "what imaging modality is this?", "how was this image taken?", "which modality is shown?")
        return Asked("modality", question, view.modality)
    name, answer = _balanced(rng, view.modality, MODALITIES)
    article = "a" if name == "ct" else "an"
    return Asked("modality", _pick(rng, f"is this {article} {name}?", f"was this image taken by {name}?"), answer)


def _plane(view: View, rng: np.random.Generator) -> Asked | None:
    if view.plane == "frontal":
        return None
    if rng.random() < 0.6:
        return Asked(
            "plane",
            _pick(rng, "in which plane is this image?", "what plane is shown?", "what is the plane?"),
            view.plane,
        )
    name, answer = _balanced(rng, view.plane, PLANES)
    return Asked("plane", _pick(rng, f"is this an image in the {name} plane?", f"is the plane {name}?"), answer)


def _organ(view: View, rng: np.random.Generator) -> Asked | None:
    if rng.random() < 0.3:
        question = _pick(rng, "which part of the body is shown?", "what body region is this?")
        return Asked("organ", question, view.case.region)
    seen = [organ for organ, mask in view.masks.items() if view.share(mask) >= VISIBLE]
    absent = [organ for organ, mask in view.masks.items() if view.share(mask) < VISIBLE / 2]
    absent += [organ for region, names in ASKED_ORGANS.items() if region != view.case.region for organ in names]
    chosen, answer = (seen, "yes") if rng.random() < 0.5 else (absent, "no")
    if not chosen:
        return None
    organ = _pick(rng, *chosen)
    verb = "are" if organ == "ventricles" else "is"
    return Asked("organ", _pick(rng, f"{verb} the {organ} visible?", f"{verb} the {organ} in this image?"), answer)


def _presence(view: View, rng: np.random.Generator) -> Asked | None:
    if view.has_doubtful_lesion() or (view.plane == "frontal" and not view.lesions and view.case.lesions):
        return None
    answer = "yes" if view.visible_lesions() else "no"
    return Asked(
        "presence", _pick(rng, "is there a lesion?", "does this image show a lesion?", "do you see a lesion?"), answer
    )


def _side(view: View, rng: np.random.Generator) -> Asked | None:
    sides = {lesion.side for lesion in view.visible_lesions()}
    if view.plane == "sagittal" or len(sides) != 1 or view.has_doubtful_lesion():
        return None
    side = sides.pop()
    if rng.random() < 0.6:
        return Asked("side", _pick(rng, "on which side is the lesion?", "which side is affected?"), side)
    name, answer = _balanced(rng, side, ("left", "right"))
    return Asked("side", _pick(rng, f"is the lesion on the {name}?", f"is the {name} side affected?"), answer)


def _count(view: View, rng: np.random.Generator) -> Asked | None:
    if view.plane == "frontal" or view.has_doubtful_lesion():
        return None
    question = _pick(rng, "how many lesions are visible?", "how many lesions are in this image?")
    return Asked("count", question, str(len(view.visible_lesions())))


def _size(view: View, rng: np.random.Generator) -> Asked | None:
    seen = view.visible_lesions()
    if len(seen) != 1 or view.plane == "frontal":
        return None
    # Only a slice near the middle of a lesion shows how large it is.
    lesion, axis = seen[0], PLANES.index(view.plane)
    largest = (view.case.lesion_index == lesion.index).sum(axis=tuple(a for a in range(3) if a != axis)).max()
    if view.lesions[lesion].sum() < 0.7 * largest:
        return None
    if rng.random() < 0.5:
        return Asked("size", _pick(rng, "is the lesion small or large?", "how large is the lesion?"), lesion.size)
    name, answer = _balanced(rng, lesion.size, ("small", "large"))
    return Asked("size", f"is the lesion {name}?", answer)


def _abnormality(view: View, rng: np.random.Generator) -> Asked | None:
    if view.has_doubtful_lesion() or view.plane == "frontal":
        return None
    seen = view.visible_lesions()
    answer = ABNORMALITIES[seen[0].organ] if seen else "no abnormality"
    if rng.random() < 0.6:
        return Asked(
            "abnormality", _pick(rng, "what is abnormal in this image?", "which abnormality is shown?"), answer
        )
    return Asked(
        "abnormality", _pick(rng, "is this image normal?", "is everything normal here?"), "no" if seen else "yes"
    )


KINDS: tuple[Callable[[View, np.random.Generator], Asked | None], ...] = (
    _modality, _plane, _organ, _presence, _side, _count, _size, _abnormality,
)  # fmt: skip


def ask(view: View, rng: np.random.Generator, number: int) -> list[Asked]:
    """Return up to `number` different questions about a view, of as many kinds as it allows."""
    found: list[Asked] = []
    while len(found) < number:
        before = len(found)
        for place in rng.permutation(len(KINDS)):
            asked = KINDS[place](view, rng)
            if asked and len(found) < number and asked.question not in {other.question for other in found}:
                found.append(asked)
        if len(found) == before:
            break
    return found
