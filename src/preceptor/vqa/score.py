"""Score a file of answers of any system."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from preceptor.data.texts import as_choice, as_identifier, as_text, is_given, json_lines, read_text
from preceptor.data.types import Dataset, Prediction, Sample
from preceptor.data.vqa.answers import ANSWER_TYPES, as_answers, inferred_type
from preceptor.errors import UserError, nearest
from preceptor.files import scratch_folder
from preceptor.normalizers import NORMALISERS
from preceptor.scores import Scored, percent
from preceptor.vqa.metrics import Row, score
from preceptor.vqa.protocols import Metric, Protocol, protocol_named, protocols_for, settings_for

References = Literal["data", "file"]
_NO_IMAGE = Path()
_FORM = '{"id": ..., "answer": ...}'
# A line with these keys was written by an evaluation of Preceptor, and its `answer` is the prediction.
_OURS = {"answers", "target", "correct", "score"}
# Keys whose texts are not a system's answer, besides other ids and types. Next to `answer`, any other text may be it.
_KNOWN = {"image", "question", "split", "qid", *Row.__annotations__}
_MOST_LISTED = 5


def knows(protocol: str) -> bool:
    """Return whether a protocol's id is one of questions: that of a public data set, or ``TABLE/VARIANT``."""
    return settings_for(protocol) is not None or protocol.count("/") == 1


def score_file(
    predictions: Path,
    protocol: str,
    *,
    root: Path | None = None,
    references: References = "data",
    normaliser: str | None = None,
    metric: Metric | None = None,
) -> Scored:
    """Score a JSONL file of predictions under a protocol.

    Args:
        predictions: a line has `id` (that of the data set, see `Sample.id`) and `answer` (the predicted text verbatim),
            `prediction`, or the `answers` with their probabilities that `preceptor predict` writes. In many files,
            `answer` is the reference, and the system's answer has another name, such as `output`. Next to `answer`, a
            line must therefore not have `prediction` or a text with an unknown name, unless an evaluation of Preceptor
            wrote it.
        protocol: id; one of no public data set means the table at `root`.
        root: data set that contains the references; default: its folder under PRECEPTOR_DATA.
        references: ``file`` if the lines contain the references: `answers` (a list) or `target`, optionally
            `answer_type` and `question_type`. The files that evaluation writes do.
        normaliser: replaces the protocol's. A note says so, because the score is not comparable with others.
        metric: replaces the protocol's, likewise.

    Raises:
        UserError: names file, line and fix; also if predictions are missing or repeated.
    """
    rows = _read(predictions)
    answers = [Prediction(row["id"], _answer(row, predictions, n), _probability(row)) for n, row in rows]
    if references == "file":
        chosen, notes = protocol_alone(protocol, normaliser), ["The references are those of the file itself."]
        samples = [_reference(row, predictions, number) for number, row in rows]
    else:
        with scratch_folder() as scratch:
            data = read_for(protocol, root, scratch)
        samples, chosen, notes = data.split("test"), protocol_named(data, protocol), list(data.notes)
        notes += _check_ids(predictions, rows, [sample.id for sample in samples if chosen.select(sample)], protocol)
    other = replace(chosen, normaliser=normaliser or chosen.normaliser, metric=metric or chosen.metric)
    for name in ("normaliser", "metric"):
        if getattr(other, name) != getattr(chosen, name):
            notes.append(f"The {name} is {getattr(other, name)}, not the protocol's {getattr(chosen, name)}.")
    if other.normaliser not in NORMALISERS:
        raise UserError(f"unknown answer normaliser {other.normaliser!r}{nearest(other.normaliser, NORMALISERS)}")
    scores = score(samples, answers, other)
    results: dict[str, Any] = {
        "stage": predictions.stem,
        "protocols": {protocol: scores.as_dict()},
        "describes": {protocol: other.describes},
        "notes": notes,
    }
    rows_out: list[dict[str, Any]] = [dict(row) for row in scores.scored]
    return Scored(results, rows_out, ["questions", other.metric, "n"], _lines(results["protocols"][protocol]))


def _lines(scores: dict[str, Any]) -> list[list[str]]:
    """Return the table of the command line."""
    lines = [["all", percent(scores["accuracy"]), str(scores["n"])]]
    lines += [[kind, percent(scores[kind]), str(scores[f"n_{kind}"])] for kind in ("open", "closed")]
    for name, of_type in scores["question_types"].items():
        lines.append([f"  {name}", percent(of_type["accuracy"]), str(of_type["n"])])
    lines.append(["mean over question types", percent(scores["macro"]), ""])
    lines += [[f"BLEU-{n}, pooled", percent(scores[f"bleu_{n}"]), ""] for n in range(1, 5)]
    return [*lines, ["token F1", percent(scores["f1"]), ""], ["BLEU (ImageCLEF)", percent(scores["bleu"]), ""]]


def read_for(protocol: str, root: Path | None, scratch: Path) -> Dataset[Sample]:
    """Return the data set of a protocol: the public one that its id names, or the table at `root`.

    Raises UserError if the id is not that of a public data set and there is no table, or if the data cannot be read.
    """
    # Not needed for a file with its own references, which saves half a second.
    from preceptor.vqa.config import DataConfig
    from preceptor.vqa.data import read_data

    settings: dict[str, Any] | None = settings_for(protocol)
    if settings is None:
        if root is None:
            raise UserError(
                f"protocol {protocol!r} is not that of a public data set; give --root TABLE (a CSV or JSONL file with "
                "the answers), or --references file"
            )
        settings = {"name": "table"}
    return read_data(DataConfig(**settings, root=str(root) if root else None), scratch, needed=("test",))


def protocol_alone(id: str, normaliser: str | None = None) -> Protocol:
    """Return a protocol that selects all questions of a file with its own references."""
    settings = settings_for(id)
    if settings is None:
        return Protocol(id, normaliser or "mevf", lambda sample: True, "all questions of the file")
    data: Dataset[Sample] = Dataset(
        settings["name"], settings.get("language", "") or settings.get("variant", ""), Path("."), []
    )
    known = {protocol.id.removesuffix("/published"): protocol for protocol in protocols_for(data)}
    if id.removesuffix("/published") not in known:
        raise UserError(f"there is no protocol {id!r}{nearest(id, known)}")
    return replace(known[id.removesuffix("/published")], id=id, select=lambda sample: True)


def _read(path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows: list[tuple[int, dict[str, Any]]] = []
    lines: dict[str, int] = {}
    for number, row in json_lines(read_text(path, "save the file with the encoding UTF-8"), str(path)):
        if not isinstance(row, dict) or not is_given(row.get("id")):
            raise UserError(f"{path}:{number}: no id; every line is {_FORM}")
        row["id"] = as_identifier(row["id"], f"{path}:{number}: id")
        if row["id"] in lines:
            raise UserError(
                f"{path}:{number}: id {row['id']!r} is also in line {lines[row['id']]}; keep one prediction for it"
            )
        lines[row["id"]] = number
        rows.append((number, _with_prediction(row)))
    if not rows:
        raise UserError(f"{path} contains no predictions; every line is {_FORM}")
    return rows


def _with_prediction(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of `preceptor predict` with its most probable answer as `prediction`, and any other row as it is."""
    ranked = row.get("answers")
    if "answer" in row or "prediction" in row or not isinstance(ranked, list) or not ranked:
        return row
    if not all(isinstance(one, dict) and one.keys() == {"answer", "probability"} for one in ranked):
        return row
    others = {key: value for key, value in row.items() if key != "answers"}
    return others | {"prediction": ranked[0]["answer"], "probability": ranked[0]["probability"]}


def _check_ids(path: Path, rows: list[tuple[int, dict[str, Any]]], wanted: list[str], protocol: str) -> list[str]:
    """Refuse a file without some of the protocol's questions; return a note on predictions for other questions."""
    known, given = set(wanted), {row["id"] for _, row in rows}
    outside = [f"{row['id']!r} (line {number})" for number, row in rows if row["id"] not in known]
    missing = [repr(id) for id in wanted if id not in given]
    if outside and len(outside) == len(rows):
        raise UserError(
            f"{path}: none of its {len(outside)} ids is one of {protocol}, such as {min(known)!r}; use the ids of the "
            "data set"
        )
    if missing:
        others = f"; {len(outside)} ids are not in the protocol: {_first(outside)}" if outside else ""
        raise UserError(
            f"{path}: {len(missing)} of {len(wanted)} questions of {protocol} have no prediction: {_first(missing)}"
            f'{others}; add a line for each, with the answer "" if the system has none'
        )
    return (
        [f"{len(outside)} predictions for questions outside the protocol are ignored: {_first(outside)}."]
        if outside
        else []
    )


def _first(items: list[str]) -> str:
    return ", ".join(items[:_MOST_LISTED]) + (", ..." if len(items) > _MOST_LISTED else "")


def _answer(row: dict[str, Any], path: Path, number: int) -> str:
    if "answer" in row and not row.keys() >= _OURS and (others := [key for key in row if _may_be_answer(row, key)]):
        raise UserError(
            f"{path}:{number}: id {row['id']!r} has both answer and {others[0]}, and one of them may be the reference; "
            "name the system's answer prediction and the reference answers"
        )
    answer = row.get("answer", row.get("prediction"))
    if not isinstance(answer, str):
        raise UserError(f"{path}:{number}: answer is {answer!r}; write the answer as a text, empty if there is none")
    return answer


def _may_be_answer(row: dict[str, Any], key: str) -> bool:
    described = key in _KNOWN or key.endswith(("_id", "_type"))
    return key == "prediction" or (not described and _has_text(row[key]))


def _has_text(value: Any) -> bool:
    """Return whether a JSON value is a text, or a list or an object that contains one."""
    parts = [value]
    for part in parts:  # grows; recursion would fail on deep brackets
        if isinstance(part, str):
            return True
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return False


def _probability(row: dict[str, Any]) -> float:
    value = row.get("probability")
    return float(value) if isinstance(value, int | float) else 0.0


def _reference(row: dict[str, Any], path: Path, number: int) -> Sample:
    place = f"{path}:{number}"
    given = row.get("answers", row.get("target"))
    answers = as_answers(given, f"{place}: answers")
    if not answers or given is None:
        raise UserError(f"{place}: no answers to score against; add answers or target, or --references data")
    if isinstance(given, list) and not all(answers):
        raise UserError(f"{place}: answers contains an empty one; fill it in or remove it from the list")
    kind = as_choice(row.get("answer_type"), ANSWER_TYPES, f"{place}: answer_type") or inferred_type(answers[0])
    question_type = as_text(row.get("question_type"), f"{place}: question_type")
    group = as_identifier(row.get("group"), f"{place}: group")
    return Sample(row["id"], _NO_IMAGE, "", answers, kind, group, "test", question_type)
