"""Names of modalities and label maps in file names, and the label values of common regions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from preceptor.errors import UserError, nearest

ORDER = ("flair", "t1", "t1ce", "t2")
"""Default order of the network inputs, as in the published code of LCKD."""

KNOWN = (*ORDER, "adc", "ct", "dwi", "pd", "pet", "swi")
"""Modalities that are recognised in file names by default."""

ALIASES = {
    "t1c": "t1ce",
    "t1gd": "t1ce",
    "t1gad": "t1ce",
    "t1cd": "t1ce",
    "t1_ce": "t1ce",
    "t1_gd": "t1ce",
    "t1_gad": "t1ce",
    "t1w_ce": "t1ce",
    "t1w_gd": "t1ce",
    "t1w_gad": "t1ce",
    "t1post": "t1ce",
    "t1n": "t1",
    "t1w": "t1",
    "t1pre": "t1",
    "t2w": "t2",
    "t2f": "flair",
    "t2flair": "flair",
    "t2_flair": "flair",
    "t2w_flair": "flair",
    "pdw": "pd",
}
"""Alternative names, from BraTS 2023, the Medical Segmentation Decathlon, BIDS and others. Words are joined by `_`."""

AGENT = {"ce", "contrast", "enhanced", "gad", "gado", "gadolinium", "gd", "postcontrast", "precontrast"}
"""Words of a file name that tell of a contrast agent."""

_AGENT_IN_BIDS = re.compile(
    r"gad|contrast|enhanc|^(pre|post)(?!proc|op|surg)|^(ce|gd|km|sub)$|^gd|(ce|gd)$|diff|subtr|synth|fake|pred",
    re.IGNORECASE,
)
"""Parts of BIDS labels that tell of a contrast agent, of a difference of images or of a synthetic image."""

_NO_AGENT = re.compile(r"no|pre|without|minus|native|plain", re.IGNORECASE)
"""Start of labels of the BIDS entity ce that tell of an image without a contrast agent."""

QUALIFIERS = {
    *AGENT,
    *("bet", "brain", "c", "diff", "difference", "fat", "fatsat", "fs", "map", "mask", "post", "pre", "ref", "roi"),
    *("sat", "star", "stir", "sub", "subtraction", "synth", "synthetic", "tirm", "tse"),
}
"""Words directly before a contrast that may change what it means: `fs_t1` may be another image than `t1`."""

MASK = "mask"
SEG = "seg"
"""End of the file names of label maps, unless the user gives another one."""

NIFTI = (".nii.gz", ".nii")


def words_of(name: str) -> list[str]:
    """Return the words of a name in lower case. They are separated by `_`, `-`, dots and spaces."""
    return [word.lower() for word in re.split(r"[_\-.\s]+", name) if word]


def canonical_name(name: str) -> str:
    """Return the canonical name of a modality: words in lower case, joined by `_`, aliases resolved."""
    joined = "_".join(words_of(name))
    return ALIASES.get(joined, joined)


def stem(file_name: str) -> str | None:
    """Return the name of a file without .nii or .nii.gz, or None if it has another suffix."""
    for ending in NIFTI:
        if file_name.lower().endswith(ending):
            return file_name[: -len(ending)]
    return None


NOT_MODALITIES = ("", "case", "group", "split", "seg", "segm", "segmentation", "mask", "label", "labels")


def check_modalities(modalities: Sequence[str]) -> tuple[str, ...]:
    """Return the modalities. Raises UserError if there are none, or if two are aliases of each other."""
    if not modalities:
        raise UserError("modalities is empty; name at least one, such as flair,t1,t1ce,t2")
    original: dict[str, str] = {}
    for name in modalities:
        if "/" in name or not canonical_name(name).strip() or canonical_name(name) in NOT_MODALITIES:
            raise UserError(f"{name!r} is not a valid modality; examples are {', '.join(ORDER)}")
        if canonical_name(name) in original:
            raise UserError(f"modalities {original[canonical_name(name)]!r} and {name!r} are the same; keep one")
        original[canonical_name(name)] = name
    return tuple(modalities)


def sort_modalities(names: Iterable[str]) -> tuple[str, ...]:
    """Sort modalities: flair, t1, t1ce, t2 first, then the others alphabetically."""
    names = set(names)
    return (*(name for name in ORDER if name in names), *sorted(names - set(ORDER)))


_ENTITY = r"[A-Za-z]+-[A-Za-z0-9+]+"
_BIDS = re.compile(rf"(?P<entities>sub-[A-Za-z0-9+]+(?:_{_ENTITY})*)(?:_(?P<suffix>[A-Za-z0-9]+))?")


@dataclass(frozen=True)
class ParsedName:
    """What the name of a file says.

    Attributes:
        case: Name of the case, or "" if the name is the contrast alone.
        kind: Modality or `MASK`.
        unclear: Why the name does not decide the kind, or "".
        bids: Whether the name is one of BIDS (https://bids-specification.readthedocs.io), which names the case itself.
    """

    case: str
    kind: str
    unclear: str = ""
    bids: bool = False


class FileNames:
    """Parses names of files and folders such as ``case_t1ce``, ``case-t1c``, ``t1ce`` and those of BIDS.

    The last words of a name must be a known modality, one of `modalities`, or the name of label maps. Words that may
    change the contrast before it make a name unclear.

    Args:
        modalities: The modalities of the user. Known modalities are recognised in any case.
        mask: The words of label maps. Default: `seg`, and `dseg` of BIDS derivatives.
    """

    def __init__(self, modalities: Sequence[str] | None = None, mask: str | None = None) -> None:
        self.names = {canonical_name(name): name for name in modalities or ()}
        self.by_user = {tuple(words_of(n)): c for c, n in self.names.items() if c not in KNOWN}
        if mask is not None:
            self.by_user[tuple(words_of(mask))] = MASK
        self.known = {tuple(alias.split("_")): name for alias, name in ALIASES.items()} | {(k,): k for k in KNOWN}
        if mask is None:
            self.known[(SEG,)] = MASK
        self.dseg = mask is None

    def parse(self, name: str, folder: str = "") -> ParsedName | None:
        """Return the case and the kind of a file stem or of a folder, or None if it does not end in a known kind.

        `folder` is the name of the folder that contains it. A case with that name is never unclear.
        """
        words = list(re.finditer(r"[^_\-.\s]+", name))
        lower = [word[0].lower() for word in words]
        bids = _BIDS.fullmatch(name)
        for count in range(len(words), 0, -1):
            ending = tuple(lower[-count:])
            kind = self.by_user.get(ending) or (None if bids else self.known.get(ending))
            if kind is None:
                continue
            case = name[: words[-count].start()].rstrip("_-. ")
            if words[-count].start() and not case:
                return None
            before = _BIDS.fullmatch(case)
            if before is not None and (bids or "_" in case):
                return self._of_bids(before, kind)
            unclear = "" if case in ("", folder) else _unclear(lower[:-count], ending, self.known)
            return ParsedName(case, self.names.get(kind, kind), unclear)
        if bids is None:
            return None
        suffix = (bids["suffix"] or "").lower()
        kind = MASK if suffix == "dseg" and self.dseg else self.known.get((suffix,))
        return None if kind is None else self._of_bids(bids, kind)

    def _of_bids(self, name: re.Match[str], kind: str) -> ParsedName:
        """Return the kind of an image that BIDS describes by entities such as ``ce-gadolinium``."""
        entities = dict(entity.split("-", 1) for entity in name["entities"].split("_"))
        unclear = ""
        if kind == MASK:
            other = [f"{key}-{entities[key]}" for key in ("atlas", "desc", "label", "seg") if key in entities]
            if other:
                unclear = f"{other[0]} may be another structure; set data.mask to the end of the label maps' names"
        elif entities.get("part", "mag") != "mag" or entities.get("mt", "off") != "off":
            unclear = f"part and mt of BIDS tell that it is another image than {kind}"
        elif other := [f"{key}-{entities[key]}" for key in ("acq", "desc", "rec") if _changes_image(entities.get(key))]:
            unclear = f"{other[0]} may change the image"
        elif "ce" in entities:
            if _NO_AGENT.match(entities["ce"]):
                unclear = f"ce-{entities['ce']} may tell of an image without a contrast agent"
            elif kind == "t1":
                kind = "t1ce"
            else:
                unclear = f"{kind} with a contrast agent (ce of BIDS) has no known name"
        case = "_".join(f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities)
        return ParsedName(case, self.names.get(kind, kind), unclear, bids=True)


def _changes_image(label: str | None) -> bool:
    return bool(label and _AGENT_IN_BIDS.search(label))


def _unclear(before: Sequence[str], ending: tuple[str, ...], known: Mapping[tuple[str, ...], str]) -> str:
    """Return why words before a contrast may change its meaning, or ""."""
    for place, word in enumerate(before):
        last = place == len(before) - 1
        if (word,) in known or word in AGENT or (last and (word in QUALIFIERS or re.fullmatch(r"b\d+", word))):
            return f"{word} before {'_'.join(ending)} may be part of the case or change the image"
    return ""


def names_mask(word: str) -> bool:
    """Return whether a word of a file name, in lower case, may tell of a label map."""
    kinds = r"d?seg|mask|msk|label|lbl|roi|lesion|tumou?r|annot|gt$|truth|[gcpi]tv|oar|wmh|infarct|contour|manual"
    return re.match(kinds, word) is not None


def contradicting_word(name: str, modalities: Sequence[str]) -> str:
    """Return a word by which a file is not an image of `modalities`, although its name ends in no known kind, or "".

    It tells of a label map, a map of values, a contrast agent, or another contrast.
    """
    expected = {*map(canonical_name, modalities), *(word for name in modalities for word in words_of(name))}
    previous = ""
    for word in re.findall(r"[^\W_]+", name.lower()):
        kind = canonical_name(word)
        other = kind in KNOWN or word in AGENT or names_mask(word) or re.search(r"maps?$|^t[12][a-z]", word)
        changed = previous in expected and word in QUALIFIERS - {"bet", "brain"}
        if (other or changed) and not {word, kind} & expected:
            return word
        previous = kind
    return ""


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


def _contrast_of(modality: str) -> str:
    """Return the contrast that begins the name of a user's modality, such as t1ce for `T1c_bias`."""
    return canonical_name(words_of(modality)[0])


def infer_regions(
    labels: Iterable[int], source: str, modalities: Sequence[str], *, brats: bool, enhancing: int | None = None
) -> tuple[dict[str, tuple[int, ...]], str]:
    """Infer the regions from label values, and return them with a note.

    A single label 1 is a lesion. The regions of BraTS are inferred only for its contrasts (flair, t1, t1ce, t2), and
    only if the data set is BraTS or its labels are 1, 2 and 4.

    Args:
        labels: Values of the label maps.
        source: Description of the label maps.
        modalities: Modalities of the data set.
        brats: Whether the data set is BraTS.
        enhancing: Label of the enhancing tumour, if the names of the cases tell it.

    Raises:
        UserError: the labels have no defined meaning, or contradict `enhancing`.
    """
    values = sorted(set(labels) - {0})
    if values == [1]:
        return {"lesion": (1,)}, f"Regions inferred from {source}, which contain only label 1: lesion is label 1."
    its_contrasts = all(canonical_name(name) in ORDER or _contrast_of(name) in ORDER for name in modalities)
    its_labels = any(set(values) <= {1, 2, value} for value in ((enhancing,) if enhancing else (3, 4)))
    if its_contrasts and its_labels and (brats or values == [1, 2, 4]):
        enhancing = next((value for value in (3, 4) if value in values), enhancing or 4)
        absent = "" if enhancing in values else " (not in these label maps)"
        return brats_regions(enhancing), (
            f"Regions inferred from {source}, which contain the labels {', '.join(map(str, values)) or 'none'}: "
            f"enhancing tumour is label {enhancing}{absent}; et = {enhancing}, tc = 1 and {enhancing}, wt = 1, 2 and "
            f"{enhancing}."
        )
    by_names = f" (1, 2 and {enhancing}, by the names of the cases)" if enhancing else ""
    example = "{liver: [1, 2], tumour: [2]}"
    if enhancing == 3 and 4 in values:
        example = "{et: [3], tc: [1, 3], wt: [1, 2, 3], rc: [4]} if this is BraTS 2024, where 4 is the resection cavity"
    elif its_contrasts and not brats:
        example += ", or data.name=brats if this is BraTS"
    raise UserError(
        f"{source} contain the labels {', '.join(map(str, values)) or 'none'}, which are not those of BraTS{by_names} "
        "in its four contrasts, so their meaning is not known; set data.regions to the labels of each region, such as "
        f"{example}"
    )


def find_modality(name: str, modalities: Iterable[str]) -> str | None:
    """Return the element of `modalities` that is `name` or another name of the same modality, or None."""
    known = list(modalities)
    if name in known:
        return name
    return next((modality for modality in known if canonical_name(modality) == canonical_name(name)), None)


def require_known(name: str, modalities: Sequence[str], place: str) -> str:
    """Return the result of `find_modality`. Raises UserError if there is none."""
    if (found := find_modality(name, modalities)) is None:
        raise UserError(f"{place}: modality {name!r} is not known{nearest(name, modalities)}")
    return found


def spelled_as(modalities: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return `names` with the spelling of `modalities`; those that are not among them are unchanged.

    Raises:
        UserError: two of the names mean one modality.
    """
    given: dict[str, str] = {}
    for name in names:
        spelled = find_modality(str(name), modalities) or name
        if spelled in given:
            raise UserError(f"{given[spelled]!r} and {name!r} are the same modality; give one of them")
        given[spelled] = name
    return list(given)
