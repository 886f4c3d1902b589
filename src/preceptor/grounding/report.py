"""The report of a grounding run: one HTML page, and the tables that the terminal shows too.

It reads only the run folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.data.grounding.box_formats import find_boxes
from preceptor.data.grounding.boxes import SIDE
from preceptor.files import write_text
from preceptor.grounding import metrics
from preceptor.grounding.config import STAGE_ADDS
from preceptor.grounding.metrics import MAIN, UNIT_METRICS
from preceptor.report.contents import (
    RunRecord,
    StageRecord,
    first_value,
    get_nested,
    protocols_of,
    read_run,
    stage_kind,
    stage_title,
    stages_of,
)
from preceptor.report.format import NONE, SPACE, bounds, enumerate_words, interval, milliseconds, percent, points
from preceptor.report.image_reliance import image_reliance_table
from preceptor.report.page import Charts, Fragment, Page, Section, Text
from preceptor.report.pictures import data_uri, read_figures
from preceptor.report.plots import Dot, Line, interval_plot, line_chart
from preceptor.report.sections import cost_table, heading, record_section, skipped_note, training_section
from preceptor.report.tables import Table

TITLES = {
    "teacher": "Teacher",
    "baseline": "Baseline",
    "guided": "+ guided positions",
    "distilled": "+ pseudo-labels",
    "clinkd": "+ reflection",
}
TASKS = {"vg": "Grounding", "roc": "Classification", "rc": "Captioning", "mia": "Image questions"}
"""Med-GRIT's tasks: visual grounding, referring object classification, referring captioning, image analysis."""
ABBREVIATIONS = {"vg": "VG", "roc": "ROC", "rc": "RC", "mia": "MIA"}
METRICS = {"vg": "Recall@0.5", "roc": "Accuracy", "rc": "ROUGE-L", "mia": "mBMR"}
COLUMNS = [f"{ABBREVIATIONS[task]} {metric}" for task, metric in METRICS.items()]
ABOUT_TASKS = (
    "VG: visual grounding, ROC: referring object classification, RC: referring captioning, MIA: medical image analysis."
)
LEAK = "Leaking split: these scores are too high. Images or patients of test dialogues occur in training."


def write_report(run: Path) -> Path:
    """Write RUN/report.html from the files of the run folder and return its path.

    Raises UserError if `run` is not a run folder.
    """
    path = run / "report.html"
    write_text(path, render(read_run(run, TITLES, metrics.ROW_FIELDS)))
    return path


def render(run: RunRecord) -> str:
    """Return the HTML page."""
    title, facts = heading(run, "Grounded dialogue", "dialogues")
    main = run.protocol or ""
    sections = [
        Section("finding", "Result", _finding(run)),
        Section("modalities", "By modality", _modalities(run)),
        Section("boxes", "Boxes", _boxes(run)),
        Section("pseudo", "Pseudo-labels", _pseudo_labels(run)),
        Section("reflection", "Reflection", _reflection(run)),
        Section("selection", "Selective generation", _selection(run)),
        Section("data", "Data", _data(run)),
        training_section(run, score="likelihood per answer token", unit="Dialogues"),
        record_section(run, "dialogues"),
    ]
    notes = [*run.notes, *(run.first("protocols", main, "notes") or []), *skipped_note(run, "dialogues")]
    style = "grounding/templates/report.css"
    return Page(title, facts, sections, notes, LEAK if run.leaking else "", style).render()


# --- tables -----------------------------------------------------------------------------------------------------------


def summary(results: Mapping[str, Any]) -> list[Table]:
    """Return the scores under each protocol, and the size and speed of the models."""
    return [*score_tables(results), cost_table(results, metrics.UNIT, TITLES)]


def score_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return a table for each protocol: the main metric of each task for every stage, and the paired differences.

    Further tables have the scores of each task with other images, if these were measured.
    """
    tables = [[_scores(results, one), *_other_images(results, one)] for one in protocols_of(results)]
    return [table for group in tables for table in group if table]


def _other_images(results: Mapping[str, Any], protocol: str) -> list[Table]:
    tables = []
    for task, title in TASKS.items():
        found = {
            name: (stage_title(name, TITLES), get_nested(stage, "image_reliance", protocol, task) or {})
            for name, stage in stages_of(results).items()
        }
        metric = UNIT_METRICS[task].capitalize()
        tables.append(image_reliance_table(f"{protocol}, {title.lower()}", metric, found))
    return tables


def _scores(results: Mapping[str, Any], protocol: str) -> Table:
    rows, keys = [], []
    for name, stage in stages_of(results).items():
        for title, scores in (
            (stage_title(name, TITLES), get_nested(stage, "protocols", protocol)),
            (f"{stage_title(name, TITLES)}, selected", get_nested(stage, "selection", "protocols", protocol)),
        ):
            if scores:
                rows.append([title, *_main_metrics(scores)])
                keys.append(stage_kind(name))
    n, described = first_value(results, "protocols", protocol, "n"), first_value(results, "describes", protocol)
    title = (
        f"{protocol} (n{SPACE}={SPACE}{n}){f': {described}' if described else ''}. Mean over modalities, in{SPACE}%."
    )
    notes = []
    for pair, tasks in (get_nested(results, "comparison", protocol) or {}).items():
        listed = ", ".join(
            f"{ABBREVIATIONS[task]} {_difference(entry)}" for task, entry in tasks.items() if task in TASKS
        )
        notes.append(f"{_pair_title(pair)}, in points: {listed}.")
    return Table(title, ["Model", *COLUMNS], rows, [*notes, ABOUT_TASKS], keys)


def _difference(entry: Mapping[str, Any]) -> str:
    low, high = bounds(entry)
    return points(entry["difference"]) + (f" ({interval(low, high, points)})" if low is not None else "")


def _main_metrics(scores: Mapping[str, Any]) -> list[str]:
    return [percent(get_nested(scores, "mean", task, MAIN[task])) for task in TASKS]


def _pair_title(pair: str) -> str:
    later, _, earlier = pair.partition(" - ")
    selected = " (selected)" if later.endswith(" selected") else ""
    later = later.removesuffix(" selected")
    return f"{TITLES.get(later, later)}{selected} minus {TITLES.get(earlier, earlier)}"


# --- result -----------------------------------------------------------------------------------------------------------


def _finding(run: RunRecord) -> list[Any]:
    if run.protocol is None:
        return [Text("This run has no scores yet.", "headline")]
    return [
        Text(_headline(run), "headline"),
        *summary(run.document),
        *_differences(run),
    ]


def _headline(run: RunRecord) -> str:
    found = []
    for task, text in (
        ("vg", "finds {} of the boxes"),
        ("roc", "classifies {} of the regions correctly"),
        ("mia", "reaches an mBMR of {} on image questions"),
    ):
        value = get_nested(run.focus.score(run.protocol, "mean"), task, MAIN[task])
        if value is not None:
            found.append(text.format(percent(value, unit=True)))
    what = STAGE_ADDS.get(run.focus.kind, run.focus.title)
    return f"The model ({what}) {enumerate_words(found)}." if found else "This run has no scores yet."


def _differences(run: RunRecord) -> list[Any]:
    """Draw the paired differences that have an interval: to the baseline, and to the previous stage."""
    compared = get_nested(run.results, "comparison", run.protocol or "") or {}
    by_task = [entry for tasks in compared.values() if isinstance(tasks, dict) for entry in tasks.values()]
    how = next((text for entry in by_task if (text := get_nested(entry, "interval"))), "")
    charts = []
    for title, to_baseline in (("Minus the baseline", True), ("Minus the previous stage", False)):
        rows = []
        for task, name in TASKS.items():
            dots = []
            for pair, entry in compared.items():
                later, _, earlier = pair.partition(" - ")
                found = get_nested(entry, task)
                if bounds(found)[0] is not None and (earlier == "baseline") == to_baseline:
                    key = later.partition(" ")[0]
                    selected = later.endswith(" selected")
                    dots.append(Dot(_pair_title(pair), key, found["difference"], *bounds(found), not selected))
            rows.append((name, dots))
        charts.append((f"{title} ({how})", interval_plot(f"{title} ({how})", rows, x_title="points")))
    legend = [(stage.kind, stage.title) for stage in run.stages if stage.kind != "teacher"]
    about = (
        "Per answer: the share of its boxes that are found, whether the class is right, F1 of the words. An empty ring "
        "is the selected answer minus the greedy one."
    )
    return [Charts(charts, legend), Text(about, "small")] if any(svg for _, svg in charts) else []


def _modalities(run: RunRecord) -> list[Any]:
    """Return the scores of every stage by modality, a table for each task."""
    protocol = run.protocol or ""
    of_focus = get_nested(run.focus.results, "protocols", protocol, "modalities") or {}
    tables = []
    for task, name in TASKS.items():
        sizes = {modality: get_nested(scores, task, "n") or 0 for modality, scores in sorted(of_focus.items())}
        rows = []
        for stage in run.stages:
            scores = get_nested(stage.results, "protocols", protocol, "modalities") or {}
            rows.append([stage.title, *(percent(get_nested(scores, m, task, MAIN[task])) for m in sizes)])
        columns = ["Model", *(f"{modality} (n{SPACE}={SPACE}{n})" for modality, n in sizes.items())]
        if any(sizes.values()):
            keys = [stage.kind for stage in run.stages]
            tables.append(Table(f"{name}: {METRICS[task]}, in{SPACE}%", columns, rows, keys=keys))
    return tables


# --- parts of the method ----------------------------------------------------------------------------------------------


def _last_with(run: RunRecord, key: str) -> tuple[StageRecord, Mapping[str, Any]] | None:
    found = [(stage, entry) for stage in run.stages if (entry := get_nested(stage.results, key))]
    return found[-1] if found else None


def _pseudo_labels(run: RunRecord) -> list[Any]:
    """Return the teacher's confidence in its answers, and when the curriculum added them."""
    found = _last_with(run, "pseudo_labels")
    if found is None:
        return []
    entry = found[1]
    bins = len(entry["confidence"])
    kinds = {"distilled": "confidence", "teacher": "margin"}
    lines = [
        Line(name, key, [((i + 0.5) / bins, float(n)) for i, n in enumerate(entry[name])])
        for key, name in kinds.items()
    ]
    confidence = line_chart("Pseudo-labels by the teacher's confidence", lines, x_title="mean over an answer's tokens")
    curve = [Line("added", "distilled", [(x, y) for x, y in entry["entered"]])]
    added = line_chart("Share of the pseudo-labels in use", curve, x_title="share of the phase", as_percent=True)
    about = (
        f"The student was trained on {entry['rows']:,} answers of the teacher before the answers of the data. "
        "Confidence is the mean probability of the most probable token, margin its distance to the second."
    )
    charts = [("Confidence of the teacher", confidence), ("Added by the curriculum", added)]
    left_out = entry.get("left_out") or {}
    rows = [[reason, f"{n:,}"] for reason, n in sorted(left_out.items(), key=lambda pair: -pair[1])]
    table = Table("Dialogues without a usable answer of the teacher", ["Reason", "Dialogues"], rows)
    return [Text(about), Charts(charts, list(kinds.items())), *([table] if rows else [])]


def _reflection(run: RunRecord) -> list[Any]:
    """Return the rounds of reflection: failure rate, size of the buffer, and examples of corrections."""
    found = _last_with(run, "reflection")
    if found is None:
        return []
    stage, entry = found
    rounds = entry["rounds"]
    rates = Line("failed", stage.kind, [(r["round"] + 1, r["failure_rate"]) for r in rounds], [*range(1, 99)])
    sizes = Line("kept", stage.kind, [(r["round"] + 1, float(r["size"])) for r in rounds], [*range(1, 99)])
    failed = line_chart("Failure rate by round", [rates], x_title="round", as_percent=True, integers=True)
    kept = line_chart("Corrections in the buffer", [sizes], x_title="round", integers=True)
    charts = [("Answers that failed", failed), ("Corrections in the buffer", kept)]
    rows = [
        [
            str(r["round"] + 1),
            str(r["asked"]),
            f"{r['failed']} ({percent(r['failure_rate'], unit=True)})",
            ", ".join(f"{reason}: {n}" for reason, n in r["reasons"].items()) or NONE,
            f"{r['corrected']} ({r.get('by_sample', 0)} by a sample, the others by the true answer; "
            f"{r.get('unusable_samples', 0)} samples were no answers)",
            str(r["size"]),
        ]
        for r in rounds
    ]
    keys = ("reason", "question", "wrong", "truth", "corrected")
    examples = [[str(example["id"]), *(plain(example[key]) for key in keys)] for example in entry["examples"][-8:]]
    columns = ["Dialogue", "Reason", "Question", "Prediction", "True answer", "Correction"]
    heads = ["Round", "Questions", "Failed", "Reasons", "Corrected", "Buffer"]
    return [
        Charts(charts),
        Table("Rounds of reflection", heads, rows),
        Table("Corrections, the newest last", columns, examples),
    ]


def _selection(run: RunRecord) -> list[Any]:
    """Return what choosing among sampled answers gains, and its cost."""
    found = _last_with(run, "selection")
    if found is None:
        return []
    stage, entry = found
    rows = []
    for protocol, selected in entry["protocols"].items():
        for name, scores, seconds in (
            ("greedy", get_nested(stage.results, "protocols", protocol) or {}, entry["greedy_seconds_per_answer"]),
            ("selected", selected, entry["seconds_per_answer"]),
        ):
            title = f"{protocol.rpartition('/')[2]}: {name}"
            rows.append([title, *_main_metrics(scores), milliseconds(1000 * seconds)])
    ratio = entry["seconds_per_answer"] / max(1e-9, entry["greedy_seconds_per_answer"])
    about = (
        f"{entry['candidates']} answers are sampled at temperature {entry['temperature']:g}, and the one most similar "
        f"to the others is selected (minimum Bayes risk, without the true answer). It takes {ratio:.1f} times as long."
    )
    columns = ["Answers", *COLUMNS, "ms per answer"]
    return [Text(about), Table(f"Mean over modalities, in{SPACE}%", columns, rows)]


def _data(run: RunRecord) -> list[Any]:
    """Return the numbers of dialogues by task and modality, and the boxes with errors."""
    blocks: list[Any] = []
    for key, name in (("tasks", "Task"), ("modalities", "Modality")):
        counts: Mapping[str, Mapping[str, int]] = run.first("data", key) or {}
        splits = list(dict.fromkeys(split for by in counts.values() for split in by))
        rows = [[kind, *(f"{by.get(split, 0):,}" for split in splits)] for kind, by in counts.items()]
        blocks.append(Table(f"Dialogues by {name.lower()}", [name, *splits], rows))
    if faults := run.first("data", "faults"):
        listed = ", ".join(f"{fault}: {n}" for fault, n in faults.items())
        first = "; ".join(map(str, run.first("data", "faulty") or []))
        blocks.append(Text(f"Boxes with errors: {listed}.{f' The first of them: {first}.' if first else ''}", "small"))
    return blocks


# --- boxes ------------------------------------------------------------------------------------------------------------


def _boxes(run: RunRecord) -> list[Any]:
    """Return the stored images with the true boxes and those that every stage predicted."""
    protocol = run.protocol or ""
    rows = {stage.kind: stage.rows.get(protocol, []) for stage in run.stages}
    titles = {stage.kind: stage.title for stage in run.stages}
    pictures = []
    for entry in read_figures(run.focus.folder).get("images", []):
        found = {kind: row for kind, answers in rows.items() if (row := _row_of(entry, answers)) is not None}
        image, row = data_uri(run.focus.folder, entry["image"]), found.get(run.focus.kind)
        if not image or row is None:
            continue
        height = round(1000 * _aspect(run.focus.folder, entry["image"]), 1)
        texts = {"true": row["target"]} | {kind: one["prediction"] for kind, one in found.items()}
        pictures.append(
            {
                "image": image,
                "height": height,
                "question": plain(row["question"]),
                "boxes": [box for kind, text in texts.items() for box in rectangles(text, kind, height)],
                "answers": [{"title": titles.get(k, "True"), "text": plain(text)} for k, text in texts.items()],
            }
        )
    about = (
        "Of the test questions that ask for boxes, sorted by the last model's score and then by their ids: the worst, "
        "the best and some in between, evenly apart."
    )
    data = {"legend": [("true", "true box"), *titles.items()], "pictures": pictures}
    return [Text(about, "small"), Fragment("grounding/templates/boxes.html.j2", data)] if pictures else []


def _row_of(entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the row of a stored image. Entries of earlier versions have no turn: a dialogue then had one row."""
    for row in rows:
        if str(row["id"]) == entry["id"] and entry.get("turn") in (None, row.get("turn", 1)):
            return row
    return None


def _aspect(stage: Path, name: str) -> float:
    from PIL import Image

    with Image.open(stage / "figures" / name) as image:
        return image.height / image.width


def rectangles(text: str, key: str, height: float) -> list[dict[str, Any]]:
    """Return the boxes of a text in an image that is 1000 wide and `height` high."""
    found = []
    for match in find_boxes(text):
        if match.box is None:
            continue
        x0, x1 = sorted(min(SIDE, max(0, x)) * 1000 / SIDE for x in (match.box[0], match.box[2]))
        y0, y1 = sorted(min(SIDE, max(0, y)) * height / SIDE for y in (match.box[1], match.box[3]))
        corners = {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0}
        found.append({"key": key, **{name: f"{value:.1f}" for name, value in corners.items()}})
    return found


def plain(text: str) -> str:
    """Return a text with boxes in brackets instead of special tokens."""
    for mark in ("<|object_ref_start|>", "<|object_ref_end|>", "<ref>", "</ref>"):
        text = text.replace(mark, "")
    for mark in ("<|box_start|>", "<box>"):
        text = text.replace(mark, " [")
    for mark in ("<|box_end|>", "</box>"):
        text = text.replace(mark, "]")
    return " ".join(text.split()) or "(nothing)"
