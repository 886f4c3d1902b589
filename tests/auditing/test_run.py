"""Audits of made tables, of the real sets, and the command."""

from __future__ import annotations

import builtins
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from preceptor.auditing.run import Audit, as_document, audit, audit_data
from preceptor.cli.app import app
from preceptor.data.types import Dataset, Sample
from preceptor.data.vqa.table import read_table
from preceptor.errors import UserError
from preceptor.vqa.config import DataConfig
from preceptor.vqa.data import read_data
from tests.auditing.made import picture, row, write_table


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    folder = tmp_path / "clean"
    folder.mkdir()
    for n in range(6):
        picture(n, 256).resize((180, 180)).save(folder / f"{n}.png")
    parts = ("train", "train", "validation", "validation", "test", "test")
    return write_table(folder, [row(f"r{n}", f"{n}.png", part) for n, part in enumerate(parts)])


@pytest.fixture
def leaking(tmp_path: Path) -> Path:
    """A table with one of each: a copy of a test image, a broken file, text, headers, an unseen answer, a group."""
    from PIL import Image, ImageDraw

    folder = tmp_path / "leaking"
    folder.mkdir()
    for n in range(5):
        picture(n, 256).save(folder / f"{n}.png")
    picture(0, 256).resize((200, 200)).save(folder / "copy.jpg")
    marked = Image.new("L", (400, 400))
    ImageDraw.Draw(marked).text((12, 10), "DOE^JANE 1957-03-01", fill=255)
    exif = Image.Exif()
    exif[0x010E] = "DOE^JANE"
    marked.save(folder / "marked.jpg", exif=exif, quality=95)
    (folder / "broken.png").write_bytes((folder / "4.png").read_bytes()[:300])
    rows = [
        row("t0", "0.png", "test"),
        row("t1", "1.png", "test", answer="spleen"),
        row("r0", "copy.jpg", "train"),
        row("r1", "2.png", "train", "Which side?", "left"),
        row("r2", "3.png", "train"),
        row("r3", "marked.jpg", "train"),
        row("r4", "broken.png", "train"),
        {**row("v", "4.png", "validation"), "group": "t1"},
    ]
    return write_table(folder, rows)


def counts(found: Audit) -> dict[str, tuple[int, int]]:
    return {finding.check: (finding.count, finding.of) for finding in found.findings}


def test_a_clean_table_is_clean(clean: Path) -> None:
    found = audit(read_table(clean))
    assert not found.leaks
    assert found.findings == []
    assert found.ceiling == 1.0


def test_everything_planted_is_found(leaking: Path) -> None:
    found = audit(read_table(leaking))
    assert found.leaks
    assert counts(found) == {
        "test_images": (1, 2),
        "groups": (1, 2),
        "questions": (1, 2),
        "unseen_answers": (1, 2),
        "broken": (1, 8),
        "burned_in_text": (1, 8),
        "identifying_tags": (1, 8),
    }
    ids = {finding.check: finding.ids for finding in found.findings}
    assert ids["test_images"] == ids["questions"] == ("t0",)
    assert ids["groups"] == ids["unseen_answers"] == ("t1",)
    assert ids["broken"] == ("r4",)
    assert ids["burned_in_text"] == ids["identifying_tags"] == ("r3",)
    (pair,) = found.crossing()
    assert pair.kind == "copy"


def test_no_file_name_group_or_header_value_is_written(leaking: Path) -> None:
    document = json.dumps(as_document(audit(read_table(leaking))))
    assert "EXIF ImageDescription" in document
    for secret in ("DOE", "copy.jpg", "marked", "broken.png", str(leaking.parent)):
        assert secret not in document


def test_two_tables(clean: Path, leaking: Path) -> None:
    """Images 0 to 4 are in both, in two sizes."""
    found = audit(read_table(clean), read_table(leaking))
    overlaps = {(overlap.of, overlap.other): overlap.same for overlap in found.overlaps}
    one, two = found.names
    assert one != two
    assert overlaps[one, two] == 5
    assert overlaps[f"{one} test", f"{two} train or validation"] == 1  # image 4
    assert overlaps[f"{two} test", f"{one} train or validation"] == 2
    assert overlaps[f"{two} test", f"{one} validation"] == 0
    assert found.shortcuts == []


def test_without_a_test_split_that_is_said(clean: Path) -> None:
    data = read_table(clean)
    data.samples = data.split("train")
    found = audit(data)
    assert not found.leaks
    assert any("no test split" in note for note in found.notes)


def test_without_scikit_learn_that_is_said(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real_import(name, *rest, **more)

    rows = clean.read_text().splitlines()
    clean.write_text("\n".join(line.replace("lung", "heart") if line.startswith("r1,") else line for line in rows))
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", refuse)
        found = audit(read_table(clean))
    assert any("scikit-learn" in note for note in found.notes)
    assert "text_model" not in {shortcut.name for shortcut in found.shortcuts}
    assert "text_model" in {shortcut.name for shortcut in audit(read_table(clean)).shortcuts}


# --- the command ------------------------------------------------------------------------------------------------------


def test_exit_codes(clean: Path, leaking: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    run = CliRunner().invoke
    assert run(app, ["audit", str(clean), "--output", output]).exit_code == 0
    said = run(app, ["audit", str(leaking), "--output", output])
    assert said.exit_code == 1
    assert "1 of 2" in said.stdout
    assert run(app, ["audit", str(leaking), "--output", output, "--allow"]).exit_code == 0
    assert run(app, ["audit", str(clean), "--against", str(leaking), "--output", output]).exit_code == 1
    printed = run(app, ["audit", str(clean.parent), "--output", output, "--json"])
    assert json.loads(printed.stdout) == json.loads((tmp_path / "out" / "audit.json").read_text("utf-8"))


def test_the_page_needs_nothing_but_itself(leaking: Path, tmp_path: Path) -> None:
    audit_data(str(leaking), [], None, None, None, tmp_path)
    page = (tmp_path / "audit.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 2  # the pair
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "http" not in page.replace("http-equiv", "")
    assert "Leakage" in page
    for secret in ("DOE", "copy.jpg", "broken.png", str(leaking.parent)):
        assert secret not in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["vqa-rat"], "vqa-rat"),
        (["phantom", "data.imagesize=3"], "image_size"),
        (["phantom", "train.epochs=3"], "data.key=value"),
        (["phantom", "against.language=zh"], "--against"),
        (["questions.csv"], "questions.csv"),
    ],
)
def test_mistakes(arguments: list[str], says: str, tmp_path: Path) -> None:
    error = CliRunner().invoke(app, ["audit", *arguments, "--output", str(tmp_path)]).exception
    assert isinstance(error, UserError)
    assert says in str(error)


# --- the real sets ----------------------------------------------------------------------------------------------------


def real(name: str, **settings: str) -> Dataset[Sample]:
    if not os.environ.get("PRECEPTOR_DATA"):
        pytest.skip("PRECEPTOR_DATA is not set")
    return read_data(DataConfig.model_validate({"name": name, **settings}), Path("unused"), needed=())


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(("variant", "images", "frames"), [("published", 203, 284), ("clean", 202, 0)])
def test_vqa_rad_leaks_as_published(variant: str, images: int, frames: int) -> None:
    found = audit(real("vqa-rad", variant=variant))
    assert counts(found)["test_images"] == (images, 203)
    assert counts(found).get("frames", (0, 451)) == (frames, 451)
    assert counts(found)["burned_in_text"] == (314, 314)  # the archive writes its name and the author's on every image
    accuracy = {shortcut.name: shortcut.accuracy for shortcut in found.shortcuts}
    if variant == "published":
        # The release's own training rows restate test questions too; the frames give them away.
        assert accuracy["look_up_same_image"] > accuracy["majority"] + 0.25
        assert found.ceiling is not None
        assert found.ceiling > 0.87
    else:
        assert accuracy["look_up_same_image"] < accuracy["majority"]


@pytest.mark.slow
@pytest.mark.real_data
def test_slake_shares_images_across_its_languages() -> None:
    found = audit(real("slake", language="en"), real("slake", language="zh"))
    overlaps = {(overlap.of, overlap.other): (overlap.same, overlap.images) for overlap in found.overlaps}
    assert overlaps["slake en test", "slake zh train"] == (72, 96)
    assert found.leaks


@pytest.mark.slow
@pytest.mark.real_data
def test_vqa_rad_images_are_found_in_vqa_med_2019_after_resizing() -> None:
    """38 of the 42 equal files; the other 4 are in the test part, which is not in the folder. File names tell."""
    rad, med = real("vqa-rad"), real("vqa-med-2019")
    found = audit(rad, med)
    names = {sample.image.name for sample in rad.samples} & {sample.image.name for sample in med.samples}
    assert len(names) == 38
    files = list(found.index.numbers)
    copies = [pair for pair in found.crossing() if pair.kind != "alike"]
    assert {pair.kind for pair in copies} == {"copy"}  # sizes and bytes differ
    assert {files[pair.left].name for pair in copies} == names
    assert all(files[pair.left].name == files[pair.right].name for pair in copies)
    assert counts(found)["images"] == (38, 314)


@pytest.mark.slow
@pytest.mark.real_data
def test_slices_without_text_are_rarely_suspected_of_it() -> None:
    from preceptor.auditing.images import summarize_files

    slices = {s.image for s in real("slake").samples if s.tags["modality"] in ("CT", "MRI")}
    assert len(slices) == 463
    assert sum(found.text for found in summarize_files(sorted(slices))) <= 5


def test_what_reading_has_found_is_in_the_audit(tmp_path: Path) -> None:
    """Every patient is in two splits, because a column `group` that divides the patients decides."""
    for n in range(4):
        picture(n, 256).save(tmp_path / f"{n}.png")
    rows = [f"{n}.png,What is shown?,lung,g{n},p{n % 2},{'train' if n < 2 else 'test'}" for n in range(4)]
    table = tmp_path / "questions.csv"
    table.write_text("\n".join(["image,question,answer,group,patient_id,split", *rows, ""]))
    data = read_table(table)
    found = [f for f in as_document(audit(data))["findings"] if f["check"] == "rows"]
    assert [(f["severity"], f["title"], f["count"]) for f in found] == [("leak", "patients in several splits", 4)]
    assert audit(data).leaks
    result = CliRunner().invoke(app, ["audit", str(table), "--output", str(tmp_path / "audit")])
    assert result.exit_code == 1
