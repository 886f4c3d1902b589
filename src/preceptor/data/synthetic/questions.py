"""Cut images from a phantom case and ask questions about them whose answers follow from its geometry.

In every split, each closed question is answered yes as often as no, so that its wording gives nothing away.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from preceptor.data.synthetic.anatomy import MR_CONTRASTS, Lesion, PhantomCase, bounding_box

PLANES = ("axial", "coronal", "sagittal")
MODALITIES = ("mri", "ct", "x-ray")
ASKED_ORGANS = {
    "head": ("brain", "ventricles", "cerebellum", "right eye", "left eye"),
    "torso": ("right lung", "left lung", "heart", "liver", "spleen", "stomach", "right kidney", "left kidney"),
}
IN_X_RAY = ("right lung", "left lung", "heart")
"""Organs that a projection shows. Questions about x-rays concern these organs and lesions in the lungs only."""
ABNORMALITIES = {"brain": "brain tumour", "lung": "lung nodule", "liver": "liver lesion", "kidney": "renal cyst"}
VISIBLE = 0.004
"""Fraction of the image that an organ or lesion must cover to count as visible.

Below half of this fraction it counts as absent. In between no question is asked.
"""


@dataclass
class View:
    """One image of a case.

    Attributes:
        case: The case.
        contrast: MR contrast, `ct` or `x-ray`.
        plane: axial, coronal, sagittal, or frontal for an x-ray.
        image: Grey values (side, side) uint8.
        masks: Masks (side, side) bool of the organs, in voxels, oriented like the image.
        lesions: Masks of the lesions in the image.
    """

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
        """Return ``{name: [x0, y0, x1, y1]}`` of visible organs and lesions, in voxels with exclusive ends."""
        visible = {name: mask for name, mask in self.masks.items() if self.share(mask) >= VISIBLE}
        visible |= {f"lesion {lesion.index}": self.lesions[lesion] for lesion in self.visible_lesions()}
        boxes = {}
        for name, mask in visible.items():
            y0, x0, y1, x1 = bounding_box(mask)
            boxes[name] = [x0, y0, x1, y1]
        return boxes


def _cut(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """Return a slice in radiological orientation: head or front up, the right of the patient on the left."""
    if plane == "axial":
        return volume[index]
    return volume[::-1, index] if plane == "coronal" else volume[::-1, :, index]


def _grey(image: np.ndarray, low: float, high: float) -> np.ndarray:
    return (np.clip((image - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)


def make_view(case: PhantomCase, rng: np.random.Generator) -> View:
    """Return a random image of a case. If the case has lesions, about half of the images show one."""
    kinds, weights = (*MR_CONTRASTS, "ct", "x-ray"), [0.15, 0.15, 0.15, 0.15, 0.25, 0.15]
    contrast = str(rng.choice(kinds, p=weights))
    organs = ASKED_ORGANS[case.region]
    if contrast == "x-ray":
        return _x_ray(case)
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


def _x_ray(case: PhantomCase) -> View:
    """Return the frontal projection of the attenuation. It shows only lungs, heart and lesions in the lungs."""
    attenuation = np.maximum(case.contrast("ct") + 1000, 0).mean(axis=1)[::-1]
    image = np.log1p(attenuation / 150)
    body = image[attenuation > 150]
    grey = _grey(image, float(np.quantile(body, 0.02)) - 0.3, float(np.quantile(body, 0.998)))
    shown = [organ for organ in IN_X_RAY if organ in ASKED_ORGANS[case.region]]
    masks = {organ: np.any(case.organ_mask(organ), axis=1)[::-1] for organ in shown}
    lesions = {
        lesion: (case.lesion_index == lesion.index).any(axis=1)[::-1]
        for lesion in case.lesions
        if lesion.organ == "lung"
    }
    return View(case, "x-ray", "frontal", grey, masks, lesions)


@dataclass(frozen=True)
class GeneratedQuestion:
    """A question with its answer. `kind` is the question type."""

    kind: str
    question: str
    answer: str

    @property
    def answer_type(self) -> str:
        return "closed" if self.answer in ("yes", "no") else "open"


@dataclass(frozen=True)
class _Candidate:
    """A question that may be asked.

    Attributes:
        kind: Question type.
        phrases: Equivalent wordings, chosen independently of the answer.
        answer: Answer for the image.
        choices: Answers that the question has over all images.
    """

    kind: str
    phrases: tuple[str, ...]
    answer: str
    choices: tuple[str, ...] = ("yes", "no")

    @property
    def key(self) -> str:
        return self.phrases[0]

    @property
    def closed(self) -> bool:
        return self.choices == ("yes", "no")


class AnswerBalance:
    """Counts the questions of one split to balance the answers, so that the wording of a question gives nothing away.

    For each closed question the numbers of yes and no differ by at most one. An open question is skipped while its
    answer is much more frequent than the other answers.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Counter[str]] = defaultdict(Counter)
        self.kinds: Counter[tuple[str, bool]] = Counter()

    def choose(self, candidates: list[_Candidate], rng: np.random.Generator, number: int) -> list[GeneratedQuestion]:
        """Choose up to `number` questions, starting with the least frequent kinds."""
        remaining = [candidates[place] for place in rng.permutation(len(candidates))]
        chosen: list[GeneratedQuestion] = []
        while remaining and len(chosen) < number:
            allowed = [c for c in remaining if self._ahead(c) <= self._slack(c)]
            allowed = allowed or [c for c in remaining if not c.closed]
            if not allowed:
                break
            best = min(allowed, key=lambda c: (self.kinds[c.kind, c.closed], self._ahead(c)))
            remaining.remove(best)
            self.answers[best.key][best.answer] += 1
            self.kinds[best.kind, best.closed] += 1
            chosen.append(GeneratedQuestion(best.kind, best.phrases[int(rng.integers(len(best.phrases)))], best.answer))
        return chosen

    def _ahead(self, candidate: _Candidate) -> float:
        """Return the count of the answer minus the mean count of the other answers."""
        counts = self.answers[candidate.key]
        others = [counts[answer] for answer in candidate.choices if answer != candidate.answer]
        return counts[candidate.answer] - sum(others) / len(others)

    def _slack(self, candidate: _Candidate) -> float:
        if candidate.closed:
            return 0
        return 2 + 0.25 * self.answers[candidate.key].total() / len(candidate.choices)


def _yes_no(kind: str, right: bool, *phrases: str) -> _Candidate:
    return _Candidate(kind, phrases, "yes" if right else "no")


def _modality(view: View) -> Iterator[_Candidate]:
    phrases: tuple[str, ...] = ("what imaging modality is this?", "how was this image taken?")
    yield _Candidate("modality", (*phrases, "which modality is shown?"), view.modality, MODALITIES)
    for name in MODALITIES:
        article = "a" if name == "ct" else "an"
        phrases = (f"is this {article} {name}?", f"was this image taken by {name}?")
        yield _yes_no("modality", name == view.modality, *phrases)
    if view.modality == "mri":
        phrases = ("which mr contrast is this?", "what is the weighting of this mri?", "which mri sequence is shown?")
        yield _Candidate("modality", phrases, view.contrast, MR_CONTRASTS)


def _plane(view: View) -> Iterator[_Candidate]:
    if view.plane == "frontal":
        return
    phrases = ("in which plane is this image?", "what plane is shown?", "what is the plane?")
    yield _Candidate("plane", phrases, view.plane, PLANES)
    for name in PLANES:
        yield _yes_no("plane", name == view.plane, f"is this an image in the {name} plane?", f"is the plane {name}?")


def _organ(view: View) -> Iterator[_Candidate]:
    phrases = ("which part of the body is shown?", "what body region is this?")
    yield _Candidate("organ", phrases, view.case.region, tuple(ASKED_ORGANS))
    for region, organs in ASKED_ORGANS.items():
        for organ in organs:
            if region == view.case.region and organ not in view.masks:
                continue
            share = view.share(view.masks[organ]) if region == view.case.region else 0.0
            if VISIBLE / 2 <= share < VISIBLE:
                continue
            verb = "are" if organ == "ventricles" else "is"
            phrases = (f"{verb} the {organ} visible?", f"{verb} the {organ} in this image?")
            yield _yes_no("organ", share >= VISIBLE, *phrases)


def _lesion_questions(view: View) -> Iterator[_Candidate]:
    """Yield questions about lesions, unless the image may contain a lesion that is barely visible."""
    hidden = view.plane == "frontal" and (view.case.region == "head" or len(view.lesions) < len(view.case.lesions))
    if hidden or view.has_doubtful_lesion():
        return
    seen = view.visible_lesions()
    phrases: tuple[str, ...] = ("is there a lesion?", "does this image show a lesion?", "do you see a lesion?")
    yield _yes_no("presence", bool(seen), *phrases)
    yield _yes_no("abnormality", not seen, "is this image normal?", "is everything normal here?")
    name = ABNORMALITIES[seen[0].organ] if seen else "no abnormality"
    phrases = ("what is abnormal in this image?", "which abnormality is shown?")
    yield _Candidate("abnormality", phrases, name, (*ABNORMALITIES.values(), "no abnormality"))
    if view.plane != "frontal":  # in a projection lesions may overlap
        phrases = ("how many lesions are visible?", "how many lesions are in this image?")
        yield _Candidate("count", phrases, str(len(seen)), ("0", "1", "2", "3"))
        yield _yes_no("count", len(seen) > 1, "is there more than one lesion?", "are there several lesions?")
    sides = {lesion.side for lesion in seen}
    if view.plane != "sagittal" and len(sides) == 1:
        side = sides.pop()
        phrases = ("on which side is the lesion?", "which side is affected?")
        yield _Candidate("side", phrases, side, ("left", "right"))
        for name in ("left", "right"):
            yield _yes_no("side", name == side, f"is the lesion on the {name}?", f"is the {name} side affected?")
    if len(seen) == 1 and view.plane != "frontal" and _near_largest_area(view, seen[0]):
        phrases = ("is the lesion small or large?", "how large is the lesion?")
        yield _Candidate("size", phrases, seen[0].size, ("small", "large"))
        for name in ("small", "large"):
            yield _yes_no("size", name == seen[0].size, f"is the lesion {name}?", f"is it a {name} lesion?")


def _near_largest_area(view: View, lesion: Lesion) -> bool:
    """Return whether the slice shows the size of the lesion, because its area is near the maximum of this plane."""
    axis = PLANES.index(view.plane)
    areas = (view.case.lesion_index == lesion.index).sum(axis=tuple(a for a in range(3) if a != axis))
    return bool(view.lesions[lesion].sum() >= 0.7 * areas.max())


def ask(
    view: View, rng: np.random.Generator, number: int, balance: AnswerBalance | None = None
) -> list[GeneratedQuestion]:
    """Return up to `number` questions about a view. A `balance` shared by many views balances their answers."""
    kinds = (_modality, _plane, _organ, _lesion_questions)
    candidates = [candidate for kind in kinds for candidate in kind(view)]
    return (balance or AnswerBalance()).choose(candidates, rng, number)
