"""Files of predictions for `preceptor score` of the three tasks and predictions.csv, against scores by formula."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from preceptor import api
from preceptor.pipeline.predictions import read_rows
from tests.fuzz.case_tables import nifti
from tests.fuzz.mutate import DAMAGE, Mutation, json_values, mostly, mutate, rarely, texts
from tests.fuzz.outcome import Outcome, attempt, command, require
from tests.fuzz.question_tables import json_rows
from tests.fuzz.target import Target

COMMAND = rarely(30)


@dataclass(frozen=True)
class RowsInput:
    """Rows of JSON Lines, and damage to the bytes."""

    rows: tuple[dict[str, Any], ...]
    bom: bool
    mutations: tuple[Mutation, ...]
    by_command: bool


def rows_of(keys: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[RowsInput]:
    """Return rows with the given keys. Some rows lack a key, have an odd value, or have a key of their own."""

    @st.composite
    def build(draw: st.DrawFn) -> RowsInput:
        rows = []
        for number in range(draw(st.integers(1, 6))):
            row = {
                "id": draw(st.sampled_from([number, str(number), f"q{number}"])),
                **{k: draw(v) for k, v in keys.items()},
            }
            rows.append(row)
        if draw(st.integers(0, 2)) == 0:
            row = rows[draw(st.integers(0, len(rows) - 1))]
            key = draw(st.sampled_from([*row, "question_type", "probability", "score", "answer", "prediction", "turn"]))
            if draw(st.booleans()):
                row[key] = draw(json_values())
            else:
                row.pop(key, None)
        return RowsInput(tuple(rows), draw(st.booleans()), draw(DAMAGE), draw(COMMAND))

    return build()


def write_rows(case: RowsInput, path: Path) -> bytes:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in case.rows)
    data = mutate((b"\xef\xbb\xbf" if case.bom else b"") + text.encode(errors="surrogatepass"), case.mutations)
    path.write_bytes(data)
    return data


def scored(path: Path, protocol: str, by_command: bool, **options: Any) -> Outcome:
    """Return the scores of the API, or of the command line, which must be the same."""
    if by_command:
        flags = [f"--{key}={value}" for key, value in options.items()]
        outcome = command("score", path, "--protocol", protocol, *flags, "--json", place=path.name)
        if not outcome.accepted:
            return outcome
        return Outcome(next(iter(json.loads(outcome.value[1])["protocols"].values())), None)
    outcome = attempt(lambda: api.score(path, protocol, **options), place=path.name)
    return Outcome(outcome.value.scores if outcome.accepted else None, outcome.sentence)


# --- questions --------------------------------------------------------------------------------------------------------

ANSWERS = {
    "yes": "yes",
    "Yes": "yes",
    "no": "no",
    "left lung": "left lung",
    "Left Lung": "left lung",
    "2": "2",
    "肺": "肺",
}
ANSWER = st.sampled_from(sorted(ANSWERS))
QUESTIONS = rows_of(
    {
        "answer": ANSWER,
        "answers": st.one_of(st.lists(ANSWER, min_size=1, max_size=2), st.lists(ANSWER, min_size=1, max_size=1)),
        "answer_type": st.sampled_from(["open", "closed"]),
    }
)


def check_questions(case: RowsInput, folder: Path) -> bool:
    """Score answers, and compare the accuracy with the share of rows whose answer is an accepted one."""
    path = folder / "answers.jsonl"
    data = write_rows(case, path)
    outcome = scored(path, "mine/test", case.by_command, references="file", normaliser="lower")
    if not outcome.accepted:
        return False
    rows = json_rows(data)
    require(not any(isinstance(row["id"], bool) for row in rows), "a bool became an id", rows)
    require(outcome.value["n"] == len(rows), "another number of questions", outcome.value["n"])
    pairs = [(row.get("answer", row.get("prediction")), row.get("answers", row.get("target"))) for row in rows]
    if all(
        a in ANSWERS and isinstance(b, list) and all(x in ANSWERS for x in b if isinstance(x, str))
        for a, b in pairs
        if isinstance(a, str)
    ):
        require(all(isinstance(a, str) for a, _ in pairs), "an answer that is no text was scored", pairs)
        require(
            all(isinstance(x, str | int | float) for _, b in pairs for x in b), "a missing answer was scored", pairs
        )
        if any(not isinstance(x, str) for _, b in pairs for x in b):
            return True
        hits = [ANSWERS[a] in [ANSWERS[x] for x in b] for a, b in pairs]
        close(outcome.value["accuracy"], sum(hits) / len(hits), "accuracy")
        for kind in ("open", "closed"):
            chosen = [hit for hit, row in zip(hits, rows, strict=True) if row.get("answer_type") == kind]
            if all(row.get("answer_type") in ("open", "closed") for row in rows):
                close(outcome.value[kind], sum(chosen) / len(chosen) if chosen else None, kind)
    return True


def close(found: float | None, expected: float | None, name: str) -> None:
    same = found == expected or (
        found is not None and expected is not None and math.isclose(found, expected, abs_tol=1e-9)
    )
    require(same, f"another {name}", (found, expected))


QUESTIONS_TARGET = Target(QUESTIONS, check_questions, 200)

# --- boxes ------------------------------------------------------------------------------------------------------------

CORNER = st.sampled_from([0, 100, 150, 200, 333, 500, 501, 900, 1000])
BOX = st.tuples(CORNER, CORNER, CORNER, CORNER)
MARKED = st.one_of(
    st.tuples(st.just("<box>({0},{1}),({2},{3})</box>"), BOX),
    st.tuples(st.just("<|box_start|>({0},{1}),({2},{3})<|box_end|>"), BOX),
    st.tuples(st.just("no box"), BOX),
)
BOXES = rows_of(
    {
        "task": st.sampled_from(["vg", "vg", "vg", "roc"]),
        "modality": st.sampled_from(["ct", "mr"]),
        "target": MARKED.map(lambda pair: pair[0].format(*pair[1])),
        "prediction": MARKED.map(lambda pair: pair[0].format(*pair[1])),
    }
)


def box_in(text: str) -> tuple[float, ...] | None:
    """Return the box of a text, sorted; None without one or if it is empty."""
    digits = (
        [
            int(number)
            for number in text.replace("(", " ").replace(")", " ").replace(",", " ").split("<")[1].split(">")[1].split()
        ]
        if "<" in text
        else []
    )
    if len(digits) != 4:
        return None
    x0, x1 = sorted(digits[::2])
    y0, y1 = sorted(digits[1::2])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Return the intersection over union of two boxes that are not empty, by counting unit squares."""
    grids = [np.zeros((1000, 1000), bool) for _ in range(2)]
    for grid, (x0, y0, x1, y1) in zip(grids, (a, b), strict=True):
        grid[int(y0) : int(y1), int(x0) : int(x1)] = True
    return float((grids[0] & grids[1]).sum() / (grids[0] | grids[1]).sum())


def check_boxes(case: RowsInput, folder: Path) -> bool:
    """Score boxes, and compare the recall with the share of reference boxes that are found at an IoU of 0.5."""
    path = folder / "boxes.jsonl"
    data = write_rows(case, path)
    outcome = scored(path, "mine/given/strict", case.by_command)
    if not outcome.accepted:
        return False
    rows = json_rows(data)
    require(not any(isinstance(row["id"], bool) for row in rows), "a bool became an id", rows)
    require(outcome.value["n"] == len(rows), "another number of answers", outcome.value["n"])
    if case.mutations or any(set(row) - {"id", "task", "modality", "target", "prediction", "turn"} for row in rows):
        return True
    known = [row for row in rows if row["task"] == "vg"]
    if not known or any(
        "(" not in row[key] and row[key] != "no box" for row in known for key in ("target", "prediction")
    ):
        return True
    pairs = [(box_in(row["target"]), box_in(row["prediction"])) for row in known]
    found = [b is not None and overlap(a, b) >= 0.5 for a, b in pairs if a is not None]
    close(outcome.value["tasks"]["vg"]["recall"], sum(found) / len(found) if found else None, "recall")
    return True


BOXES_TARGET = Target(BOXES, check_boxes, 150)

# --- label maps -------------------------------------------------------------------------------------------------------

REGIONS = {"core": (1,), "whole": (1, 2)}


@dataclass(frozen=True)
class MasksInput:
    """Predicted label maps: values, type, shape and name of each, and damage to the bytes of the first."""

    values: tuple[int, ...]
    kind: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    mutations: tuple[Mutation, ...]
    seed: int
    by_command: bool


MASKS = st.builds(
    MasksInput,
    values=mostly(st.sampled_from([(0, 1, 2), (0,), (0, 1), (2,)]), st.sampled_from([(0, 3), (0, 255), (0, -1)])),
    kind=st.sampled_from(["uint8", "int16", "float32"]),
    shape=mostly(st.just((4, 4, 4)), st.sampled_from([(4, 4, 5), (4, 4), (4, 4, 4, 1), (4, 4, 4, 2)])),
    names=mostly(
        st.just(("p0.nii", "p1.nii")),
        st.sampled_from(
            [
                ("p0_seg.nii", "p1_seg.nii"),
                ("p0__t1.nii", "p1__t1.nii"),
                ("p0.nii",),
                ("p0.nii", "p0_seg.nii"),
                ("p0.nii", "p9.nii"),
            ]
        ),
        3,
    ),
    mutations=DAMAGE,
    seed=st.integers(0, 99),
    by_command=COMMAND,
)


def check_masks(case: MasksInput, folder: Path) -> bool:
    """Score label maps, and compare Dice with the formula on the voxels."""
    references = folder / "data"
    masks = folder / "masks"
    for path in (references, masks):
        path.mkdir()
    rng = np.random.default_rng(case.seed)
    truth, found = {}, {}
    for name in ("p0", "p1"):
        truth[name] = rng.integers(0, 3, (4, 4, 4)).astype(np.uint8)
        (references / f"{name}_t1.nii").write_bytes(nifti(rng.integers(0, 99, (4, 4, 4)).astype(np.int16)))
        (references / f"{name}_seg.nii").write_bytes(nifti(truth[name]))
    for number, name in enumerate(case.names):
        voxels = rng.choice(case.values, case.shape).astype(case.kind if -1 not in case.values else "int16")
        found[name[:2]] = voxels
        (masks / name).write_bytes(mutate(nifti(voxels), case.mutations if number == 0 else ()))
    recipe = folder / "r.yaml"
    recipe.write_text(
        "task: segmentation\nname: x\ndata: {name: volumes, root: "
        + json.dumps(str(references))
        + ", modalities: [t1], "
        "regions: {core: [1], whole: [1, 2]}}\n"
    )
    if case.by_command:
        outcome = command("score", masks, "--protocol", "volumes/all/A", "--root", recipe, "--json")
        scores = next(iter(json.loads(outcome.value[1])["protocols"].values())) if outcome.accepted else None
    else:
        outcome = attempt(lambda: api.score(masks, "volumes/all/A", root=recipe))
        scores = outcome.value.scores if outcome.accepted else None
    if scores is None:
        return False
    require(set(found) >= set(truth), "a missing mask was scored", case.names)
    if case.mutations:
        return True
    for region, labels in REGIONS.items():
        dice = []
        for name, reference in truth.items():
            a, b = np.isin(found[name].reshape(reference.shape), labels), np.isin(reference, labels)
            dice.append(2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else 1.0)
        close(scores["regions"][region], float(np.mean(dice)), "Dice")
    return True


MASKS_TARGET = Target(MASKS, check_masks, 60)

# --- predictions.csv --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamInput:
    """The rows of a file that `predict` continues, and damage to its bytes."""

    kind: str
    rows: tuple[tuple[str, str, float], ...]
    mutations: tuple[Mutation, ...]


STREAMS = st.builds(
    StreamInput,
    st.sampled_from(["csv", "jsonl"]),
    st.lists(st.tuples(texts(), texts(), st.floats(allow_nan=False, allow_infinity=False)), max_size=4).map(tuple),
    DAMAGE,
)


def check_stream(case: StreamInput, folder: Path) -> bool:
    """Read the rows that an interrupted `predict` wrote; undamaged rows come back as they were."""
    rows = [{"id": a, "answer": b, "probability": c} for a, b, c in case.rows]
    if case.kind == "csv":
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(
            buffer, ["id", "answer", "probability"], lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC
        )
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / f"predictions.{case.kind}"
    path.write_bytes(mutate(text.encode(errors="surrogatepass"), case.mutations))
    outcome = attempt(lambda: read_rows(path), place=path.name)
    if outcome.accepted and not case.mutations:
        require(outcome.value == (rows, path.stat().st_size), "other rows", outcome.value)
    return outcome.accepted


STREAM_TARGET = Target(STREAMS, check_stream, 200)
