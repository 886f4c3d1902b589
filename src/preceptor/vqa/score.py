"""Score a file of answers of any system."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from preceptor.data.texts import RecordPlace, as_choice, as_identifier, as_text, is_given, json_records, read_text
from preceptor.data.types import Dataset, Prediction, Sample
from preceptor.data.vqa.answers import ANSWER_TYPES, as_answers, inferred_type
from preceptor.errors import UserError, nearest
from preceptor.files import scratch_folder
from preceptor.normalizers import NORMALISERS
from preceptor.scores import Scored, percent
from preceptor.vqa.metrics import Row, score
from preceptor.vqa.protocols import Metric, Protocol, protocol_named, protocols_for, settings_for

References = Literal["data", "file"]
_Placed = tuple[RecordPlace, dict[str, Any]]
_NO_IMAGE = Path()
_FORM = '{"id": ..., "answer": ...}'
# A line with these keys was written by an evaluation of Preceptor, and its `answer` is the prediction.
_OURS = {"answers", "target", "correct", "score"}
# Keys whose values are not a system's answer, besides other ids and types. Next to `answer`, any other text may be it.
_KNOWN = {"image", "question", "split", "qid", *Row.__annotations__}
# Words of keys that name a system's answer, whatever its value, unless the last word makes a number a measure of it.
_PREDICTED = re.compile(
    r"(pred|prediction|predicted|output|response|reply|generated|generation|completion|hypothesis|hyp|result)s?"
)
_MEASURES = {"time", "seconds", "latency", "cost", "tokens", "length", "count", "confidence", "probability", "logprob"}
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
    """Score a file of predictions under a protocol.

    Args:
        predictions: JSONL, or a JSON list of objects. An object has `id` (that of the data set, see `Sample.id`) and
            `answer` (the predicted text verbatim), `prediction`, or the `answers` with their probabilities that
            `preceptor predict` writes. In many files, `answer` is the reference, and the system's answer has another
            name, such as `output`. Next to `answer`, there must therefore be no `prediction`, no key such as `pred` or
            `model_answer`, and no text or truth value with an unknown name, unless an evaluation of Preceptor wrote it.
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
    answers = [Prediction(row["id"], _answer(row, place), _probability(row)) for place, row in rows]
    if references == "file":
        chosen, notes = protocol_alone(protocol, normaliser), ["The references are those of the file itself."]
        samples = [_reference(row, str(place)) for place, row in rows]
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
    notes += _other_numbers(scores.scored, NORMALISERS[other.normaliser])
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


def _other_numbers(rows: Sequence[Row], normalise: Callable[[str], str]) -> list[str]:
    """Return a note on answers that count as right although their numbers are others, such as 15 cm for 1,5 cm."""
    numbers = [row for row in rows if row["correct"] and any(sign.isnumeric() for sign in row["answer"])]
    if not numbers:
        return []
    from preceptor.data.vqa.check import changes_number, numbers_in  # takes time, and is seldom needed

    def differ(answer: str, other: str) -> bool:
        changed = any(changes_number(text, normalise(text)) for text in (answer, other))
        return changed and numbers_in(answer) != numbers_in(other)

    pairs = []
    for row in numbers:
        equal = [answer for answer in row["answers"] if normalise(answer) == row["prediction"]]
        if equal and all(differ(row["answer"], answer) for answer in equal):
            pairs.append((row["answer"], equal[0]))
    if not pairs:
        return []
    return [
        f"{len(pairs)} answers, such as {pairs[0][0]!r:.60} for {pairs[0][1]!r:.60}, count as right although their "
        "numbers differ, because the normaliser drops signs and commas."
    ]


def _read(path: Path) -> list[_Placed]:
    rows: list[_Placed] = []
    places: dict[str, RecordPlace] = {}
    text = read_text(path, "save the file with the encoding UTF-8")
    for place, row in json_records(text, str(path), f"every line is {_FORM}"):
        if not isinstance(row, dict) or not is_given(row.get("id")):
            raise UserError(f"{place}: no id; every line is {_FORM}")
        row["id"] = as_identifier(row["id"], f"{place}: id")
        if row["id"] in places:
            raise UserError(
                f"{place}: id {row['id']!r} is also in {places[row['id']].name}; keep one prediction for it"
            )
        places[row["id"]] = place
        rows.append((place, _with_prediction(row)))
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


def _check_ids(path: Path, rows: list[_Placed], wanted: list[str], protocol: str) -> list[str]:
    """Refuse a file without some of the protocol's questions; return a note on predictions for other questions."""
    known, given = set(wanted), {row["id"] for _, row in rows}
    outside = [f"{row['id']!r} ({place.name})" for place, row in rows if row["id"] not in known]
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


def _answer(row: dict[str, Any], place: RecordPlace) -> str:
    if "answer" in row and not row.keys() >= _OURS and (others := [key for key in row if _may_be_answer(row, key)]):
        raise UserError(
            f"{place}: id {row['id']!r} has both answer and {others[0]}, and one of them may be the reference; "
            "name the system's answer prediction and the reference answers"
        )
    answer = row.get("answer", row.get("prediction"))
    if not isinstance(answer, str):
        raise UserError(f"{place}: answer is {answer!r}; write the answer as a text, empty if there is none")
    return answer


def _may_be_answer(row: dict[str, Any], key: str) -> bool:
    if key in _KNOWN and key != "prediction":
        return False
    value = row[key]
    *first, last = re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", key).lower()) or [""]
    if any(map(_PREDICTED.fullmatch, (*first, last))) or (first and last == "answer"):
        return last not in _MEASURES or _has_text(value)
    return not key.endswith(("_id", "_type")) and _has_text(value)


def _has_text(value: Any) -> bool:
    """Return whether a JSON value is a text or a truth value, or a list or an object that contains one."""
    parts = [value]
    for part in parts:  # grows; recursion would fail on deep brackets
        if isinstance(part, str | bool):
            return True
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return False


def _probability(row: dict[str, Any]) -> float:
    value = row.get("probability")
    return float(value) if isinstance(value, int | float) else 0.0


def _reference(row: dict[str, Any], place: str) -> Sample:
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
