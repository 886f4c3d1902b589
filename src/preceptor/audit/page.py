"""The page of an audit: one HTML file that needs nothing but itself."""

from __future__ import annotations

from collections import defaultdict
from importlib import resources
from pathlib import Path

from PIL import Image

from preceptor.audit.duplicates import COPY_CORRELATION, Pair
from preceptor.audit.findings import SPLITS, Audit, Finding
from preceptor.audit.overlap import KINDS
from preceptor.data.images import ImageError, load_image
from preceptor.data.phash import ALIKE_BITS, BITS
from preceptor.report.markup import chip, document, escape, row, table
from preceptor.report.words import NONE, percent
from preceptor.vqa.report_samples import data_uri
from preceptor.vqa.report_scores import bar

MOST_SHOWN = 12  # pairs of a kind, rows of a check
LONGEST_SIDE = 200  # pixels of a picture
VERDICTS = {"leak": "Leak", "broken": "Broken", "suspicion": "Suspicion", "note": "Note"}
TITLES = {
    "bytes": "Equal files",
    "pixels": "Equal pixels",
    "copy": "Copies: resized or encoded again",
    "alike": "Alike: probably the same scan",
}


def render(found: Audit) -> str:
    """Return the page. It holds thumbnails of some of the images, and of the rows their ids, questions and answers."""
    sections = [
        ("findings", "Findings", _findings(found)),
        ("images", "Shared images", _overlaps(found)),
        ("pairs", "Pairs of images", _pairs(found)),
        ("rows", "Rows that give test rows away", _rows(found)),
        ("shortcuts", "Answers without the image", _shortcuts(found)),
        ("reading", "How to read this", _reading()),
    ]
    style = (resources.files("preceptor.audit") / "audit.css").read_text("utf-8")
    return document(f"Audit of {found.names[0]} · Preceptor", _header(found), _notes(found), sections, style=style)


def _header(found: Audit) -> str:
    described = " against ".join(f"<code>{escape(name)}</code>" for name in found.names)
    facts = []
    for name, data in zip(found.names, found.data, strict=True):
        counts = ", ".join(f"{len(data.split(split))} {split}" for split in SPLITS if data.split(split))
        images = len({sample.image for sample in data.samples})
        facts.append(f"<b>{escape(name)}</b>: {counts} questions, {images} images")
    lines = "".join(f'<p class="facts">{fact}</p>' for fact in facts)
    return f'<h1>Audit</h1><p class="described">{described}</p>{lines}'


def _notes(found: Audit) -> str:
    notes = [*found.notes, *(note for data in found.data for note in data.notes)]
    items = "".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(notes))
    listed = f"<ul>{items}</ul>" if items else ""
    if found.leaks:
        banner = "<p><strong>Leakage: what is tested here is partly known from training.</strong></p>"
        return f'<aside class="banner leak" aria-label="Warning">{banner}{listed}</aside>'
    return f'<aside class="banner" aria-label="Notes">{listed}</aside>' if listed else ""


def _findings(found: Audit) -> str:
    if not found.findings:
        return "<p>Nothing was found. That is no proof: see below what these checks cannot see.</p>"
    order = list(VERDICTS)
    rows = []
    for finding in sorted(found.findings, key=lambda f: order.index(f.severity)):
        share = f"{finding.count} of {finding.of}"
        cells = [share, percent(finding.count / finding.of if finding.of else None), finding.says]
        title = f"{VERDICTS[finding.severity]}: {finding.title}"
        rows.append(row(chip(finding.severity, title), cells, wide=True))
    return table("Rows or images concerned", ["what", "found", "share", "meaning"], rows)


def _overlaps(found: Audit) -> str:
    shown = [overlap for overlap in found.overlaps if overlap.images]
    heads = [
        "images of",
        "images",
        "among",
        "in both",
        "same file",
        "equal bytes",
        "equal pixels",
        "copy",
        "only alike",
    ]
    rows = [
        row(escape(o.of), [str(o.images), o.among, str(o.same), *(str(o.counts[kind]) for kind in KINDS)])
        for o in shown
    ]
    return table("Each image counts once, by its surest kind", heads, rows) if rows else ""


def _pairs(found: Audit) -> str:
    kinds: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in found.crossing():
        kinds[pair.kind].append(pair)
    paths = list(found.atlas.numbers)
    content = ""
    for kind, title in TITLES.items():
        if kinds[kind]:
            chosen = _spread(kinds[kind])
            shown = f"{len(chosen)} of {len(kinds[kind])} shown" if len(chosen) < len(kinds[kind]) else str(len(chosen))
            figures = "".join(_pair(found, pair, paths) for pair in chosen)
            content += f'<h3>{title} ({shown})</h3><div class="pairs">{figures}</div>'
    return content


def _spread(pairs: list[Pair]) -> list[Pair]:
    """Return some pairs from the surest to the least sure."""
    if len(pairs) <= MOST_SHOWN:
        return pairs
    return [pairs[round(n * (len(pairs) - 1) / (MOST_SHOWN - 1))] for n in range(MOST_SHOWN)]


def _pair(found: Audit, pair: Pair, paths: list[Path]) -> str:
    pictures, captions = "", []
    for number in (pair.left, pair.right):
        (side, split), sample = found.atlas.row(number)
        name = f"{found.names[side]} {split}" if len(found.data) > 1 else split
        captions.append(f"<b>{escape(name)}</b> {escape(sample.id)}")
        picture = _picture(paths[number])
        pictures += f'<img src="{picture}" alt="Image of row {escape(sample.id)}">' if picture else "<span></span>"
    about = f"{pair.bits} of {BITS} bits differ, correlation {pair.correlation:.3f}"
    caption = f"{' · '.join(captions)}<br>{about}"
    return f"<figure><div>{pictures}</div><figcaption>{caption}</figcaption></figure>"


def _picture(path: Path) -> str:
    try:
        image = load_image(path).convert("L")
    except ImageError:
        return ""
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return data_uri(image)


def _rows(found: Audit) -> str:
    content = ""
    for finding in found.findings:
        if finding.matches and finding.check != "groups":
            content += _matches(finding)
    return content


def _matches(finding: Finding) -> str:
    rows = []
    for held_out, learnt in finding.matches[:MOST_SHOWN]:
        asked = f"{held_out.question}  \u2192  {held_out.answer}"
        known = f"{learnt.question}  \u2192  {learnt.answer}"
        cells = f'<td class="ids">{escape(asked)}</td><td class="ids">{escape(learnt.id)}: {escape(known)}</td>'
        rows.append(f'<tr><th scope="row">{escape(held_out.id)}</th>{cells}</tr>')
    caption = f"{escape(finding.title)}: {min(len(finding.matches), MOST_SHOWN)} of {len(finding.matches)}"
    return table(caption, ["test row", "test question and answer", "training row"], rows)


def _shortcuts(found: Audit) -> str:
    if not found.shortcuts:
        return ""
    bars = "".join(bar(s.title, "reference", s.accuracy, None, found.ceiling) for s in found.shortcuts)
    legend = "Share of test questions answered correctly without seeing an image; learnt from the training split alone."
    if found.ceiling is not None:
        legend += f" The dashed line is the answer ceiling, {percent(found.ceiling)}."
    rows = []
    for s in found.shortcuts:
        cells = [percent(value, unit=False) for value in (s.accuracy, s.open, s.closed)]
        rows.append(row(escape(s.title), [*cells, s.reads or NONE]))
    drawn = table("Accuracy in\u00a0%", ["shortcut", "all", "open", "closed", "is also told"], rows)
    about = (
        "A model that sees the image must beat these. Where the look-up on the same image file is far above that on "
        "all files, the split hands answers over through its images."
    )
    figure = f'<figure class="bars"><dl>{bars}</dl><figcaption>{legend}</figcaption></figure>'
    return f'{figure}<div class="after">{drawn}</div><p class="small">{about}</p>'


def _reading() -> str:
    sentences = (
        f"Candidates are images whose {BITS}-bit perceptual hashes differ in at most {ALIKE_BITS} bits. They count as "
        f"copies where the fine detail correlates to {COPY_CORRELATION} or more, else as alike. Resizing down to 128 "
        "pixels, JPEG, brightness and contrast are seen through; cropping, borders, rotation and mirroring are not.",
        "A leak is certain where files, pixels or rows are equal; what counts as a copy is now and then the next slice "
        "of the same scan. A suspicion wants a look: alike images are mostly adjacent slices; burned-in text is "
        "guessed from small strokes near the border.",
        "Nothing found is no proof: patients are only known as far as the data set names groups, and text may hide in "
        "the middle of an image.",
    )
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
