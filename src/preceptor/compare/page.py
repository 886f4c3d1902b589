"""The page of a comparison: one HTML file that needs nothing but itself, in the manner of a run's report."""

from __future__ import annotations

from importlib import resources

from preceptor.compare import words
from preceptor.compare.deltas import MOST_NAMES, Delta
from preceptor.compare.forest import Mark, forest
from preceptor.compare.groups import Group, shown_value
from preceptor.compare.run import Comparison
from preceptor.report.contents import get_nested
from preceptor.report.figures import Line, line_chart
from preceptor.report.markup import chip, document, escape, row, table
from preceptor.report.words import NONE, count, percent, points
from preceptor.statistics import MINIMUM_UNITS, Interval
from preceptor.vqa.report_scores import bar

DOCUMENTED = "95\u00a0% intervals; filled: significant"


def render(comparison: Comparison) -> str:
    """Return the page."""
    sections = [
        ("finding", "What was found", _finding(comparison)),
        ("differences", "Differences", _differences(comparison)),
        ("categories", "By category", _categories(comparison)),
        ("curves", "Learning curves", _curves(comparison)),
        ("runs", "Runs", _runs(comparison)),
        ("reading", "How to read this", _reading()),
    ]
    style = (resources.files("preceptor.compare") / "compare.css").read_text("utf-8")
    return document("Comparison · Preceptor", _header(comparison), _notes(comparison), sections, style=style)


def _header(comparison: Comparison) -> str:
    data = comparison.data
    models = sum(len(group.models) for group in comparison.groups)
    facts = [
        " / ".join(escape(data[key]) for key in ("name", "variant") if data.get(key)),
        f"{comparison.categories[0].n} {comparison.unit}s",
        f"{models} models in {len(comparison.groups)} groups",
    ]
    described = f": {escape(comparison.describes)}" if comparison.describes else ""
    protocol = f'<p class="described"><code>{escape(comparison.protocol)}</code>{described}</p>'
    return f'<h1>Comparison of runs</h1>{protocol}<p class="facts">{" · ".join(fact for fact in facts if fact)}</p>'


def _notes(comparison: Comparison) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
    if comparison.leaks:
        banner = "<strong>Leaking split: these scores flatter.</strong> Answers of test questions occur in training."
        return f'<aside class="banner leak" aria-label="Warning"><p>{banner}</p><ul>{items}</ul></aside>'
    return f'<aside class="banner" aria-label="Notes"><ul>{items}</ul></aside>' if items else ""


# --- finding ----------------------------------------------------------------------------------------------------------


def _finding(comparison: Comparison) -> str:
    first, *others = words.headline(comparison)
    rest = f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in others)}</ul>" if others else ""
    bars = []
    for group in comparison.groups:
        score = comparison.score(group)
        bounded = score.low is not None and score.high is not None
        spread = Interval(score.mean, score.low, score.high) if bounded else None  # type: ignore[arg-type]
        bars.append(bar(group.name, words.kind(group), score.mean, spread, None))
    legend = (
        f"Mean {comparison.metrics[0]} over the test set and the seeds; whiskers are 95\u00a0% intervals over "
        f"{comparison.unit}s and, with several seeds, seeds. Overlapping whiskers do not mean that there is no "
        f"difference: the models are scored on the same {comparison.unit}s, so the differences below are more precise."
    )
    figure = f'<figure class="bars"><dl>{"".join(bars)}</dl><figcaption>{legend}</figcaption></figure>'
    return f'<p class="headline">{escape(first)}</p>{rest}{figure}{_accuracies(comparison)}'


def _accuracies(comparison: Comparison) -> str:
    heads, rows = words.rows_of_groups(comparison)
    kinds = {group.name: group for group in comparison.groups}
    lines = []
    for name, *cells in rows:
        parameters = count(get_nested(kinds[name].models[0].results, "parameters"))
        lines.append(row(chip(words.kind(kinds[name]), name), [*cells, parameters]))
    caption = f"{escape(comparison.metrics[0])} in\u00a0%, <code>{escape(comparison.protocol)}</code>"
    return f'<div class="after">{table(caption, [*heads, "parameters"], lines)}</div>'


# --- differences ------------------------------------------------------------------------------------------------------


def _differences(comparison: Comparison) -> str:
    if not comparison.contrasts:
        return ""
    deltas = [(c.title, c.overall, c.group) for c in comparison.contrasts]
    figure = _forest("Differences", deltas)
    heads, rows = words.rows_of_deltas([(c.title, c.overall) for c in comparison.contrasts])
    over = [c.covers for c in comparison.contrasts]
    caption = f"All {comparison.unit}s; in percentage points"
    if len(set(over)) == 1:
        caption += f"; intervals over {escape(over[0])}"
    else:
        heads, rows = [*heads, "interval over"], [[*cells, what] for cells, what in zip(rows, over, strict=True)]
    kinds = [words.kind(c.group) for c in comparison.contrasts]
    wide = len(set(over)) > 1
    lines = [row(chip(kind, title), cells, wide=wide) for kind, (title, *cells) in zip(kinds, rows, strict=True)]
    drawn = table(caption, heads, lines)
    return f'<div class="forest">{figure}</div>{drawn}<p class="small">{escape(words.HOW_MARKED)}.</p>'


def _categories(comparison: Comparison) -> str:
    found = []
    for c in comparison.contrasts:
        if not c.parts:
            continue
        figure = _forest(c.title, [(f"{d.category.name} (n = {d.n})", d, c.group) for d in c.parts])
        heads, rows = words.rows_of_deltas([(delta.category.name, delta) for delta in c.parts])
        lines = [row(escape(title), cells) for title, *cells in rows]
        drawn = table("In percentage points", heads, lines)
        parts = f'<div class="parts">{figure}<div>{drawn}</div></div>'
        found.append(f'<div class="contrast"><h3>{escape(c.title)}</h3>{parts}</div>')
    if not found:
        return ""
    about = (
        f"The same difference on parts of the {comparison.unit}s. The p-values are adjusted for all rows of this "
        f"section. Categories beyond the {MOST_NAMES} most frequent ones of a kind are merged."
    )
    return f'{"".join(found)}<p class="small">{about}</p>'


def _forest(title: str, rows: list[tuple[str, Delta, Group]]) -> str:
    marks = [
        Mark(name, words.kind(group), delta.difference, delta.low, delta.high, delta.significant)
        for name, delta, group in rows
        if delta.low is not None and delta.high is not None
    ]
    drawn = forest(title, marks, x_title="percentage points")
    return f"<figure><figcaption>{DOCUMENTED}</figcaption>{drawn}</figure>"


# --- learning curves --------------------------------------------------------------------------------------------------


def _curves(comparison: Comparison) -> str:
    if not comparison.curves:
        return ""
    lines, legend, rows = [], "", []
    for curve in comparison.curves:
        scores = [comparison.score(group) for group in curve.groups]
        kind = words.kind(curve.groups[0])
        dots = [(100 * group.share, score.mean) for group, score in zip(curve.groups, scores, strict=True)]
        spreads = [(s.mean if s.low is None else s.low, s.mean if s.high is None else s.high) for s in scores]
        lines.append(Line(curve.method, kind, dots, spreads=spreads))
        legend += f'<li><i class="stroke {escape(kind)}"></i>{escape(curve.method)}</li>'
        for group, score in zip(curve.groups, scores, strict=True):
            train = get_nested(group.models[0].results, "data", "train")
            cells = [f"{100 * group.share:g}\u00a0%", NONE if train is None else str(train), str(len(group.models))]
            cells += [percent(score.mean, unit=False), words.interval(score), str(score.n)]
            rows.append(row(chip(kind, curve.method), cells))
    chart = line_chart(
        f"{comparison.metrics[0]} by share of the training data",
        lines,
        x_title="share of training data, %",
        percent=True,
    )
    figure = (
        f'<ul class="legend">{legend}</ul><figure class="curves"><figcaption class="small">Mean with 95\u00a0% '
        f"intervals over {comparison.unit}s and seeds</figcaption>{chart}</figure>"
    )
    metric = comparison.metrics[0]
    heads = ["method", "share", "training rows", "seeds", metric, "95 % interval", "n"]
    return figure + table(f"{escape(metric)} in\u00a0%", heads, rows)


# --- record -----------------------------------------------------------------------------------------------------------


def _runs(comparison: Comparison) -> str:
    paired = {(c.group.name, pair.seed): (pair, c.baseline.name) for c in comparison.contrasts for pair in c.pairs}
    rows = []
    for group in comparison.groups:
        for model, scores in zip(group.models, comparison.categories[0].scores(group), strict=True):
            cells = [model.name, str(model.seed), percent(float(scores.mean()), unit=False)]
            pair, baseline = paired.get((group.name, model.seed), (None, ""))
            if pair:
                cells += [f"{points(pair.difference)} ({baseline})", words.p_value(pair.p_mcnemar)]
            else:
                cells += [NONE, NONE]
            rows.append(row(chip(words.kind(group), group.name), cells))
    heads = ["group", "run", "seed", comparison.metrics[0], "minus baseline, same seed", "McNemar's p"]
    drawn = table("Every model; p of single pairs is not adjusted and marks nothing", heads, rows)
    facts = {
        f"Settings of {group.name}": ", ".join(f"{key}={shown_value(value)}" for key, value in group.differs.items())
        for group in comparison.groups
        if group.differs
    }
    if fingerprint := comparison.data.get("test_sha256"):
        facts["Test rows (SHA-256)"] = fingerprint
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return drawn + (f'<dl class="facts-list">{listed}</dl>' if listed else "")


def _reading() -> str:
    sentences = (
        "Every difference is of scores on the same units, in percentage points, group minus baseline.",
        "The interval covers new units and, with several seeds, new seeds: it includes the interval of the paired "
        "bootstrap and that of the analysis of variance. \u201cOver seeds\u201d is Student's t interval of the seeds' "
        "differences. It takes the test units as given and does not enter the verdict.",
        "A difference is marked if both tests agree after Holm's correction; for two single models these are the "
        "bootstrap and McNemar's exact test. The overall differences are one family of tests, those by category "
        "another.",
        "\u201cUndecided\u201d does not mean equal: the interval shows how large a difference is still possible.",
        f"Below {MINIMUM_UNITS} units there is no interval, test or verdict. With one seed a verdict is about the two "
        "trained models, not about the method.",
    )
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
