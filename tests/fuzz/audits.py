"""Audits of tables with copies and shared patients, against the pairs that were written."""

from __future__ import annotations

import csv
import functools
import io
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from preceptor import api
from tests.auditing.made import picture
from tests.fuzz.mutate import DAMAGE, Mutation, mostly, mutate, rarely, texts
from tests.fuzz.outcome import PATIENT, attempt, command, require
from tests.fuzz.target import Target

SPLITS = ("train", "validation", "test")
COLUMNS = ("id", "image", "question", "answer", "group", "split")


@dataclass(frozen=True)
class AuditInput:
    """Rows of (picture, split, group, answer), odd texts in one column, and damage to the table or to an image."""

    rows: tuple[tuple[int, str, int, str], ...]
    odd: tuple[int, str] | None
    mutations: tuple[Mutation, ...]
    image: bool
    exif: bool
    by_command: bool


ROW = st.tuples(
    mostly(st.integers(0, 5), st.sampled_from([10, 11]), 8),  # 10 and 11 are copies of 0 and 1 in another format
    st.sampled_from(SPLITS),
    st.integers(0, 9),
    st.sampled_from(["yes", "no", "left lung", "肺"]),
)
INPUTS = st.builds(
    AuditInput,
    rows=st.lists(ROW, min_size=1, max_size=8).map(tuple),
    odd=mostly(st.none(), st.tuples(st.integers(0, 5), texts()), 4),
    mutations=DAMAGE,
    image=st.booleans(),
    exif=rarely(3),
    by_command=rarely(10),
)


@functools.cache
def image(number: int, exif: bool) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    shown = picture(number % 10, 64)
    header = Image.Exif()
    if exif:
        header[0x010E] = PATIENT
    shown.save(file, "PNG" if number < 10 else "BMP", **({"exif": header} if number < 10 else {}))
    return file.getvalue()


def name(number: int) -> str:
    return f"{number}.png" if number < 10 else f"{number}.bmp"


def check(case: AuditInput, folder: Path) -> bool:
    """Audit a table; the pixels that training shares with test or validation are counted as a leak."""
    cells = [
        [f"q{n}", name(number), f"What is shown in {n}?", answer, f"g{group}", split]
        for n, (number, split, group, answer) in enumerate(case.rows)
    ]
    if case.odd is not None:
        cells[case.odd[0] % len(cells)][case.odd[0]] = case.odd[1]
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([COLUMNS, *cells])
    data = buffer.getvalue().encode(errors="replace")
    path = folder / "t.csv"
    path.write_bytes(data if case.image else mutate(data, case.mutations))
    for number in {row[0] for row in case.rows}:
        shown = image(number, case.exif)
        damaged = case.image and number == case.rows[0][0]
        (folder / name(number)).write_bytes(mutate(shown, case.mutations) if damaged else shown)
    output = folder / "audit"
    if case.by_command:
        return command("audit", path, "--output", output).accepted
    outcome = attempt(lambda: api.audit(path, output=output), place=folder.name)
    if not outcome.accepted:
        return False
    document = outcome.value
    require((output / "audit.json").is_file() and (output / "audit.html").is_file(), "no page was written")
    for page in output.glob("audit.*"):
        require(PATIENT not in page.read_text(), "the patient's name is in the audit", page.name)
    if case.odd is not None or case.mutations:
        return True
    parts = {split: {number % 10 for number, where, *_ in case.rows if where == split} for split in SPLITS}
    held_out = {number for number, where, *_ in case.rows if where == "test"}
    shared = {number for number in held_out if number % 10 in parts["train"] | parts["validation"]}
    counts = {entry["check"]: entry["count"] for entry in document["findings"]}
    found = counts.get("test_images", 0) + counts.get("alike_images", 0)
    require(found == len(shared), "shared test images", (counts, parts))
    validated = bool(parts["validation"] & parts["train"])
    # Without validation rows, validation is cut from training, by the groups of the table.
    cut = not parts["validation"]
    require(cut or ("validation_images" in counts) == validated, "shared validation images", (counts, parts))
    return True


TARGET = Target(INPUTS, check, 25)
