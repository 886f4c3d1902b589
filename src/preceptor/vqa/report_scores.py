"""The sections of a report that hold scores: what was found, tables of accuracy, question types, confusion."""

from __future__ import annotations

from preceptor.report import words
from preceptor.report.contents import RunRecord, get_nested
from preceptor.report.markup import chip, escape, row, scrolling, table
from preceptor.report.words import NONE, percent
from preceptor.statistics import Interval
from preceptor.vqa.metrics import OTHER, confusion

FREQUENT_ANSWERS = 10
MOST_QUESTION_TYPES = 12


def finding(run: RunRecord) -> str:
    first, *others = words.headline(run)
    rest = f"<p>{escape(' '.join(others))}</p>" if others else ""
    protocol = next(iter(run.protocols), None)
    return f'<p class="headline">{escape(first)}</p>{rest}{_bars(run, protocol) if protocol else ""}'


def _bars(run: RunRecord, protocol: str) -> str:
    """Return the accuracies as bars with their intervals, the answer ceiling as a line across."""
    ceiling = run.first("protocols", protocol, "ceiling")
    bars = []
    for name, scores in (run.first("baselines", protocol) or {}).items():
        bars.append(bar(words.BASELINES.get(name, name), "reference", get_nested(scores, "accuracy"), None, ceiling))
    for stage in sorted(run.stages, key=lambda stage: stage.kind == "teacher"):
        spread = words.interval(stage, protocol)
        bars.append(bar(stage.title, stage.kind, stage.score(protocol), spread, ceiling))
    legend = "Share of test questions answered correctly; whiskers are 95\u00a0% intervals over questions"
    if ceiling is not None:
        legend += f"; the dashed line is the answer ceiling: {percent(ceiling)} have an answer that the models know"
    legend += f". Protocol <code>{escape(protocol)}</code>."
    return f'<figure class="bars"><dl>{"".join(bars)}</dl><figcaption>{legend}</figcaption></figure>'


def bar(title: str, kind: str, accuracy: float | None, spread: Interval | None, ceiling: float | None) -> str:
    """Return an accuracy as a bar, with its interval and the answer ceiling; "" where there is no accuracy."""
    if accuracy is None:
        return ""
    marks = f'<i class="fill {escape(kind)}" style="width:{100 * accuracy:.2f}%"></i>'
    if spread:
        width = 100 * (spread.high - spread.low)
        marks += f'<i class="whisker" style="left:{100 * spread.low:.2f}%;width:{width:.2f}%"></i>'
    if ceiling is not None:
        marks += f'<i class="ceiling" style="left:{100 * ceiling:.2f}%"></i>'
    track = f'<span class="track" aria-hidden="true">{marks}</span>'
    return f"<div><dt>{escape(title)}</dt><dd>{track}<b>{percent(accuracy)}</b></dd></div>"


def accuracy(run: RunRecord) -> str:
    found = "".join(_protocol(run, protocol) for protocol in run.protocols)
    timing = run.first("latency")
    processor = run.first("machine", "gpu") or run.first("machine", "processor")
    where = f", on {escape(processor)}" if processor else ""
    about = f'<p class="small">Milliseconds per question: {escape(timing)}{where}.</p>' if timing else ""
    return found + about if found else ""


def _protocol(run: RunRecord, protocol: str) -> str:
    n = run.first("protocols", protocol, "n")
    numbers = {kind: run.first("protocols", protocol, f"n_{kind}") for kind in ("open", "closed")}
    kinds = [f"{kind.title()}{_of(number)}" for kind, number in numbers.items()]
    more = {"macro": "Mean over types", "f1": "Token F1"}
    heads = ["Model", "Overall", "95\u00a0% interval", *kinds, *more.values(), "Parameters", "ms/question"]
    rows = []
    for stage in run.stages:
        spread = words.interval(stage, protocol)
        within = f"{percent(spread.low, unit=False)} to {percent(spread.high, unit=False)}" if spread else NONE
        latency = get_nested(stage.results, "latency_ms")
        cells = [percent(stage.score(protocol)), within]
        cells += [percent(stage.score(protocol, key)) for key in (*numbers, *more)]
        cells += [words.count(stage.parameters), NONE if latency is None else f"{latency:.1f}"]
        rows.append(row(chip(stage.kind, stage.title), cells))
    for name, scores in (run.first("baselines", protocol) or {}).items():
        cells = [
            percent(get_nested(scores, "accuracy")),
            "",
            *(percent(get_nested(scores, kind)) for kind in numbers),
            *[""] * 4,
        ]
        rows.append(row(chip("reference", words.BASELINES.get(name, name)), cells, "reference"))
    ceiling = run.first("protocols", protocol, "ceiling")
    if ceiling is not None:
        rows.append(row(chip("ceiling-mark", "Answer ceiling"), [percent(ceiling), *[""] * 7], "reference"))
    described = run.first("describes", protocol)
    caption = f"<code>{escape(protocol)}</code>{_of(n)}{': ' + escape(described) if described else ''}"
    compared = _compared(run, protocol)
    return table(caption, heads, rows) + (f'<p class="small">{compared}</p>' if compared else "")


def _compared(run: RunRecord, protocol: str) -> str:
    entry = get_nested(run.results, "comparison", protocol, "distilled - baseline")
    sentence = words.difference(entry)
    if not sentence:
        return ""
    p = get_nested(entry, "p")
    test = f" McNemar's exact test: p = {p:.3g}." if p is not None else ""
    return f"Distilled less undistilled student, on the same questions. {escape(sentence)}{test}"


def _of(n: int | None) -> str:
    return f" (n\u00a0=\u00a0{n})" if n is not None else ""


def question_types(run: RunRecord) -> str:
    protocol = next(iter(run.protocols), "")
    by_stage = []
    for stage in run.stages:
        types = get_nested(stage.results, "protocols", protocol, "question_types") or {}
        by_stage.append(
            {name: s for name, s in types.items() if get_nested(s, "n") and get_nested(s, "accuracy") is not None}
        )
    counts = {name: scores["n"] for types in by_stage for name, scores in types.items()}
    if not counts:
        return ""
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    groups = [(name, [name]) for name in ordered[:MOST_QUESTION_TYPES]]
    if rare := ordered[MOST_QUESTION_TYPES:]:
        groups.append((f"{len(rare)} rarer types", rare))
    rows = []
    for title, names in groups:
        n = sum(counts[name] for name in names)
        cells = []
        for types in by_stage:
            known = [types[name] for name in names if name in types]
            total = sum(scores["n"] for scores in known)
            cells.append(percent(sum(scores["accuracy"] * scores["n"] for scores in known) / total if total else None))
        rows.append(row(escape(title), [str(n), *cells]))
    heads = ["Question type", "Questions", *(stage.title for stage in run.stages)]
    return table(f"Accuracy, <code>{escape(protocol)}</code>", heads, rows)


def confused_answers(run: RunRecord) -> str:
    protocol = next((name for name in run.protocols if run.focus.rows.get(name)), None)
    if protocol is None:
        return ""
    labels, matrix = confusion(run.focus.rows[protocol], FREQUENT_ANSWERS)  # type: ignore[arg-type]
    heads, rows = "", []
    for index, label in enumerate(labels):
        title, short = escape(label), escape(_short(label))
        heads += f'<th scope="col" title="{title}"><span>{short}</span></th>'
        total = max(1, int(matrix[index].sum()))
        cells = []
        for column, number in enumerate(matrix[index].tolist()):
            correct = " correct" if column == index and label != OTHER else ""
            shade = f' style="--share:{number / total:.2f}"' if number else ""
            cells.append(f'<td class="cell{correct}"{shade}>{number or ""}</td>')
        rows.append(f'<tr><th scope="row" title="{title}">{short}</th>{"".join(cells)}</tr>')
    about = (
        f"{escape(run.focus.title)}, <code>{escape(protocol)}</code>: rows are the correct answers, columns the given "
        "ones, numbers are questions, shade is the share of the row; outlined cells are correct."
    )
    head = f"<thead><tr><td>Correct answer</td>{heads}</tr></thead>"
    matrix_table = f'<table class="confusion">{head}<tbody>{"".join(rows)}</tbody></table>'
    return f'<p class="small">{about}</p>{scrolling(matrix_table, "Confusion of the frequent answers")}'


def _short(text: str, most: int = 22) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
