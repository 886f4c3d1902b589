"""Names of modalities and of label maps, as they end file names; the label values of the usual regions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from preceptor.errors import UserError, nearest

ORDER = ("flair", "t1", "t1ce", "t2")
"""The order of a network's inputs where none is given: that of the published code."""

KNOWN = (*ORDER, "adc", "ct", "dwi", "pd", "pet", "swi")
"""The names that are recognised where none are given."""

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
"""Other names: those of BraTS 2023, of the Medical Segmentation Decathlon and a few more."""

# `segm` is the one misnamed file of BraTS 2020 (case 355).
MASK_WORDS = ("seg", "segm", "mask", "label", "labels")
MASK = "mask"

NIFTI = (".nii.gz", ".nii")


def plain(name: str) -> str:
    """Return the usual name of a modality: lower case, aliases resolved."""
    lower = name.strip().lower()
    return ALIASES.get(lower, lower)


def stem(file_name: str) -> str | None:
    """Return a file's name without .nii or .nii.gz, None for another ending."""
    for ending in NIFTI:
        if file_name.lower().endswith(ending):
            return file_name[: -len(ending)]
    return None


def checked(modalities: Sequence[str]) -> tuple[str, ...]:
    """Return the modalities; raises UserError where there are none or two mean the same."""
    if not modalities:
        raise UserError("modalities is empty; name at least one, such as flair,t1,t1ce,t2")
    seen: dict[str, str] = {}
    for name in modalities:
        if not name.strip() or "/" in name or plain(name) in ("case", "group", "split", *MASK_WORDS):
            raise UserError(f"{name!r} cannot be a modality's name; give names such as {', '.join(ORDER)}")
        if plain(name) in seen:
            raise UserError(f"modalities {seen[plain(name)]!r} and {name!r} are the same; keep one")
        seen[plain(name)] = name
    return tuple(modalities)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return names with flair, t1, t1ce, t2 first and the others in alphabetical order."""
    names = set(names)
    return (*(name for name in ORDER if name in names), *sorted(names - set(ORDER)))


class Endings:
    """Finds what a file holds from the end of its name: ``case_t1ce`` or ``case-t1c`` or just ``t1ce``."""

    def __init__(self, modalities: Sequence[str] | None) -> None:
        names = KNOWN if modalities is None else modalities
        own = {plain(name): name for name in names}
        tokens = {alias: own[name] for alias, name in ALIASES.items() if name in own}
        tokens |= {name.lower(): name for name in own.values()} | own
        tokens |= {word: MASK for word in MASK_WORDS if word not in tokens}
        # The longest first: `t2_flair` ends in `flair` too.
        self.tokens = sorted(tokens.items(), key=lambda item: (-len(item[0]), item[0]))

    def split(self, name: str) -> tuple[str, str] | None:
        """Return (case, modality or `MASK`) of a file's stem, case "" where the stem is just that; None if unknown."""
        lower = name.lower()
        for token, kind in self.tokens:
            if lower == token:
                return "", kind
            if lower.endswith(token) and lower[-len(token) - 1] in "_-." and len(lower) > len(token) + 1:
                return name[: -len(token) - 1], kind
        return None


def checked_regions(regions: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return the regions; raises UserError for an empty one, or values that are no labels from 1 to 255."""
    if not regions:
        raise UserError("regions is empty; give label values by name, such as {lesion: [1]}")
    for name, values in regions.items():
        wrong = [value for value in values if isinstance(value, bool) or not 0 < value < 256]
        if not values or wrong or len(set(values)) < len(values):
            raise UserError(
                f"region {name!r} has the labels {list(values)}; give distinct label values from 1 to 255 (0 is "
                "background)"
            )
    return {name: tuple(int(value) for value in values) for name, values in regions.items()}


def brats_regions(enhancing: int) -> dict[str, tuple[int, ...]]:
    """Return et, tc, wt of BraTS: 1 necrotic and non-enhancing core, 2 oedema, `enhancing` 4 (to 2021) or 3."""
    return {"et": (enhancing,), "tc": (1, enhancing), "wt": (1, 2, enhancing)}


DECATHLON_BRAIN = {"et": (3,), "tc": (2, 3), "wt": (1, 2, 3)}
"""The Medical Segmentation Decathlon's brain task: 1 oedema, 2 non-enhancing, 3 enhancing."""


def regions_of(seen: Iterable[int], looked_at: str) -> tuple[dict[str, tuple[int, ...]], str]:
    """Return the regions that label values speak for, and the sentence that says so.

    Values 1, 2 and 4 (or 3) are BraTS's, a single 1 is a lesion. Raises UserError for anything else.
    """
    values = sorted(set(seen) - {0})
    if values == [1]:
        return {"lesion": (1,)}, f"Regions from the labels ({looked_at} hold label 1 alone): lesion is label 1."
    if set(values) <= {1, 2, 4} or set(values) <= {1, 2, 3}:
        enhancing = 3 if 3 in values else 4
        found = "" if enhancing in values else f", though none of them holds label {enhancing}"
        return brats_regions(enhancing), (
            f"Regions from the labels ({looked_at} hold {', '.join(map(str, values)) or 'none'}): enhancing tumour is "
            f"label {enhancing}{found}; et = {enhancing}, tc = 1 and {enhancing}, wt = 1, 2 and {enhancing}."
        )
    raise UserError(
        f"{looked_at} hold the labels {', '.join(map(str, values))}, which are not those of BraTS; say which labels "
        "make up each region with data.regions, such as {et: [3], tc: [1, 3], wt: [1, 2, 3]}"
    )


def require_known(name: str, modalities: Sequence[str], place: str) -> str:
    """Return the one of `modalities` that `name` means; raises UserError where there is none."""
    for own in modalities:
        if plain(own) == plain(name):
            return own
    raise UserError(f"{place}: modality {name!r} is not known{nearest(name, modalities)}")
