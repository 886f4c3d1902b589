"""Names of modalities and label maps in file names, and the label values of common regions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from preceptor.errors import UserError, nearest

ORDER = ("flair", "t1", "t1ce", "t2")
"""Default order of the network inputs, as in the published code of LCKD."""

KNOWN = (*ORDER, "adc", "ct", "dwi", "pd", "pet", "swi")
"""Modalities that are recognised in file names by default."""

ALIASES = {
    "t1c": "t1ce",
    "t1gd": "t1ce",
    "t1cd": "t1ce",
    "t1_ce": "t1ce",
    "t1_gd": "t1ce",
    "t1post": "t1ce",
    "t1n": "t1",
    "t1w": "t1",
    "t1pre": "t1",
    "t2w": "t2",
    "t2f": "flair",
    "t2flair": "flair",
    "t2_flair": "flair",
}
"""Alternative names, from BraTS 2023, the Medical Segmentation Decathlon and others."""

# `segm` is the name of one file of BraTS 2020 (case 355).
MASK_WORDS = ("seg", "segm", "mask", "label", "labels")
MASK = "mask"

NIFTI = (".nii.gz", ".nii")


def canonical_name(name: str) -> str:
    """Return the canonical name of a modality: lower case, aliases resolved."""
    lower = name.strip().lower()
    return ALIASES.get(lower, lower)


def stem(file_name: str) -> str | None:
    """Return the name of a file without .nii or .nii.gz, or None if it has another suffix."""
    for ending in NIFTI:
        if file_name.lower().endswith(ending):
            return file_name[: -len(ending)]
    return None


def check_modalities(modalities: Sequence[str]) -> tuple[str, ...]:
    """Return the modalities. Raises UserError if there are none, or if two are aliases of each other."""
    if not modalities:
        raise UserError("modalities is empty; name at least one, such as flair,t1,t1ce,t2")
    original: dict[str, str] = {}
    for name in modalities:
        if not name.strip() or "/" in name or canonical_name(name) in ("case", "group", "split", *MASK_WORDS):
            raise UserError(f"{name!r} is not a valid modality; examples are {', '.join(ORDER)}")
        if canonical_name(name) in original:
            raise UserError(f"modalities {original[canonical_name(name)]!r} and {name!r} are the same; keep one")
        original[canonical_name(name)] = name
    return tuple(modalities)


def sort_modalities(names: Iterable[str]) -> tuple[str, ...]:
    """Sort modalities: flair, t1, t1ce, t2 first, then the others alphabetically."""
    names = set(names)
    return (*(name for name in ORDER if name in names), *sorted(names - set(ORDER)))


class Endings:
    """Parses the modality at the end of file names such as ``case_t1ce``, ``case-t1c`` or ``t1ce``."""

    def __init__(self, modalities: Sequence[str] | None) -> None:
        names = KNOWN if modalities is None else modalities
        by_canonical = {canonical_name(name): name for name in names}
        tokens = {alias: by_canonical[name] for alias, name in ALIASES.items() if name in by_canonical}
        tokens |= {name.lower(): name for name in by_canonical.values()} | by_canonical
        tokens |= {word: MASK for word in MASK_WORDS if word not in tokens}
        # Match the longest first, because `t2_flair` also ends in `flair`.
        self.tokens = sorted(tokens.items(), key=lambda item: (-len(item[0]), item[0]))

    def split(self, name: str) -> tuple[str, str] | None:
        """Return (case, modality or `MASK`) of a file stem, or None. The case is "" if the stem is the modality."""
        lower = name.lower()
        for token, kind in self.tokens:
            if lower == token:
                return "", kind
            if lower.endswith(token) and lower[-len(token) - 1] in "_-." and len(lower) > len(token) + 1:
                return name[: -len(token) - 1], kind
        return None


def check_regions(regions: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return the regions. Raises UserError unless each has distinct labels from 1 to 255."""
    if not regions:
        raise UserError("regions is empty; give label values by name, such as {lesion: [1]}")
    for name, values in regions.items():
        wrong = [value for value in values if isinstance(value, bool) or not 0 < value < 256]
        if not values or wrong or len(set(values)) < len(values):
            raise UserError(
                f"region {name!r} has the labels {list(values)}; give distinct label values from 1 to 255 (0 is the "
                "background)"
            )
    return {name: tuple(int(value) for value in values) for name, values in regions.items()}


def brats_regions(enhancing: int) -> dict[str, tuple[int, ...]]:
    """Return et, tc, wt of BraTS. Labels: 1 necrotic core, 2 oedema, `enhancing` is 4 (until 2021) or 3."""
    return {"et": (enhancing,), "tc": (1, enhancing), "wt": (1, 2, enhancing)}


DECATHLON_BRAIN = {"et": (3,), "tc": (2, 3), "wt": (1, 2, 3)}
"""Regions of the brain task of the Medical Segmentation Decathlon: 1 oedema, 2 non-enhancing, 3 enhancing."""


def infer_regions(labels: Iterable[int], source: str) -> tuple[dict[str, tuple[int, ...]], str]:
    """Infer the regions from label values, and return them with a note.

    Labels 1, 2 and 4 (or 3) are those of BraTS, a single label 1 is a lesion. `source` describes the label maps.

    Raises:
        UserError: the labels are neither.
    """
    values = sorted(set(labels) - {0})
    if values == [1]:
        return {"lesion": (1,)}, f"Regions inferred from {source}, which contain only label 1: lesion is label 1."
    if set(values) <= {1, 2, 4} or set(values) <= {1, 2, 3}:
        enhancing = 3 if 3 in values else 4
        absent = "" if enhancing in values else " (not in these label maps)"
        return brats_regions(enhancing), (
            f"Regions inferred from {source}, which contain the labels {', '.join(map(str, values)) or 'none'}: "
            f"enhancing tumour is label {enhancing}{absent}; et = {enhancing}, tc = 1 and {enhancing}, wt = 1, 2 and "
            f"{enhancing}."
        )
    raise UserError(
        f"{source} contain the labels {', '.join(map(str, values))}, which are not those of BraTS; set data.regions to "
        "the labels of each region, such as {et: [3], tc: [1, 3], wt: [1, 2, 3]}"
    )


def require_known(name: str, modalities: Sequence[str], place: str) -> str:
    """Return the element of `modalities` that is an alias of `name`. Raises UserError if there is none."""
    for modality in modalities:
        if canonical_name(modality) == canonical_name(name):
            return modality
    raise UserError(f"{place}: modality {name!r} is not known{nearest(name, modalities)}")
