"""A model in one file gives the same answers as its folder; a damaged or foreign file is refused in one sentence."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

import preceptor
from preceptor.errors import UserError
from preceptor.files import sha256
from preceptor.pipeline.packed_model import CHECKSUMS, pack, unpack
from tests.fuzz.model_folders import templates


def packed(folder: Path, **further: bytes) -> Path:
    pack(templates() / "vqa", folder / "model.zip", {f"{name}.json": text for name, text in further.items()})
    return folder / "model.zip"


def written(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as made:
        for name, content in entries.items():
            made.writestr(name, content)
    return path


def sums(**entries: bytes) -> bytes:
    return "".join(f"{hashlib.sha256(text).hexdigest()}  {name}\n" for name, text in entries.items()).encode()


def test_a_packed_model_answers_as_its_folder(tmp_path: Path) -> None:
    image, question = templates() / "image.png", "Where is the disc?"
    expected = preceptor.predict(templates() / "vqa", image=image, question=question, top=3)
    assert preceptor.predict(packed(tmp_path), image=image, question=question, top=3) == expected


@pytest.mark.parametrize("task", ["vqa", "segmentation", "grounding"])
def test_all_files_of_a_model_folder_come_back(task: str, tmp_path: Path) -> None:
    model = templates() / task
    pack(model, tmp_path / "model.zip", {"audit.json": b"{}"})
    found = {path.name: path.read_bytes() for path in unpack(tmp_path / "model.zip").iterdir()}
    expected = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    assert found == expected | {"audit.json": b"{}"}


def test_export_writes_the_model_with_its_scores(tmp_path: Path) -> None:
    stage = tmp_path / "runs" / "baseline"
    shutil.copytree(templates() / "vqa", stage / "model")
    (stage / "results.json").write_text('{"accuracy": 0.5}')
    file = tmp_path / "models" / "eye.zip"
    found = preceptor.export(stage, file, to="zip")
    expected = {path.name: path.read_bytes() for path in (stage / "model").iterdir()}
    expected["results.json"] = b'{"accuracy": 0.5}'
    assert {path.name: path.read_bytes() for path in unpack(file).iterdir()} == expected
    assert found == {
        "format": "zip",
        "task": "vqa",
        "files": len(expected) + 1,
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
    }
    again = preceptor.export(file, tmp_path / "again.zip", to="zip")
    assert again["sha256"] == found["sha256"], "a packed model is packed to the same bytes"


def test_mistakes_of_an_export_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "there.zip").touch()
    for name, sentence in (("model", "must end in .zip: a packed model is one file"), ("there.zip", "already exists")):
        with pytest.raises(UserError, match=sentence):
            preceptor.export(templates() / "vqa", tmp_path / name, to="zip")
    with pytest.raises(UserError, match="--int8 belongs to the format onnx; leave it out for zip"):
        preceptor.export(templates() / "vqa", tmp_path / "a.zip", to="zip", int8=True)


def test_other_tools_read_a_packed_model(tmp_path: Path) -> None:
    with zipfile.ZipFile(packed(tmp_path, audit=b"{}")) as opened:
        opened.extractall(tmp_path / "out")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", CHECKSUMS], cwd=tmp_path / "out", check=True)


def test_the_bytes_do_not_depend_on_time_or_place(tmp_path: Path) -> None:
    first = sha256(packed(tmp_path))
    (tmp_path / "b").mkdir()
    assert sha256(packed(tmp_path / "b")) == first


def test_every_flipped_byte_is_refused_or_without_effect(tmp_path: Path) -> None:
    whole = packed(tmp_path).read_bytes()
    expected = {path.name: path.read_bytes() for path in unpack(tmp_path / "model.zip").iterdir()}
    step = len(whole) // 300
    # Every 300th part of the file, and its directory at the end in full.
    for at in [*range(0, len(whole), step), *range(len(whole) - 1500, len(whole), 7)]:
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        (tmp_path / "damaged.zip").write_bytes(damaged)
        try:
            found = unpack(tmp_path / "damaged.zip")
        except UserError:
            continue
        # Times, attributes and the like of the directory.
        assert {path.name: path.read_bytes() for path in found.iterdir()} == expected


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_was_cut_is_refused(share: float, tmp_path: Path) -> None:
    whole = packed(tmp_path).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"cut\.zip is not a packed model, or is damaged; copy it again"):
        preceptor.load(tmp_path / "cut.zip")


@pytest.mark.parametrize("name", ["../config.json", "/etc/x", "a/b", "a\\b", ".hidden", "..", "x\n", "C:x"])
def test_names_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "m.zip", {name: b"x", CHECKSUMS: sums(**{name: b"x"})})
    with pytest.raises(UserError, match="not a packed model"):
        unpack(path)


def test_compressed_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "m.zip", {"a": b"0" * 10**7, CHECKSUMS: b""}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is compressed or in a folder; unzip the file"):
        unpack(path)


def test_overlapping_files_are_refused(tmp_path: Path) -> None:
    """Entries that share their bytes are how a small zip becomes a large one without compression."""
    text = io.BytesIO()
    with zipfile.ZipFile(text, "w") as made:
        made.writestr("a", b"0" * 10_000)
        for i in range(99):
            entry = zipfile.ZipInfo(f"a{i}")
            entry.header_offset, entry.file_size, entry.compress_size = 0, 10_000, 10_000
            entry.CRC = made.getinfo("a").CRC
            made.filelist.append(entry)
            made.NameToInfo[entry.filename] = entry
        made.writestr(CHECKSUMS, b"")
    (tmp_path / "m.zip").write_bytes(text.getvalue())
    with pytest.raises(UserError, match="its files are larger than itself"):
        unpack(tmp_path / "m.zip")


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"a": b"x"}, f"it must have up to 1000 files, {CHECKSUMS} among them"),
        ({"a": b"x", CHECKSUMS: b""}, "has no line for a"),
        ({CHECKSUMS: sums(a=b"x")}, "a is missing"),
        ({"a": b"y", CHECKSUMS: sums(a=b"x")}, "a has another checksum"),
        ({"a": b"x", CHECKSUMS: b"\xff\xfe"}, "or is damaged"),
    ],
)
def test_checksums_and_files_must_agree(entries: dict[str, bytes], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        unpack(written(tmp_path / "m.zip", entries))


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "m.zip", {"a": b"x", CHECKSUMS: sums(a=b"x")})
    with zipfile.ZipFile(path, "a") as made, pytest.warns(UserWarning, match="Duplicate"):
        made.writestr("a", b"y")
    with pytest.raises(UserError, match="not a packed model"):
        unpack(tmp_path / "m.zip")


@pytest.mark.parametrize("name", ["config.json", CHECKSUMS, "a b", "../x"])
def test_further_files_with_a_name_that_cannot_be_packed_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be packed"):
        pack(templates() / "vqa", tmp_path / "m.zip", {name: b""})
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_needs_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(templates() / "vqa", tmp_path / "exported")
    # Of another training, as in the folder of a run that a model is exported into.
    (tmp_path / "recipe.yaml").write_text("task: vqa\nname: other\n")
    monkeypatch.chdir(tmp_path)
    for given in (packed(tmp_path), Path("exported")):
        with pytest.raises(UserError) as error:
            preceptor.evaluate(given)
        assert str(error.value) == (
            f"{given} has no recipe.yaml of its training, so the data to evaluate it on are unknown; give the run or "
            "stage folder that it comes from, or the data with --recipe RECIPE"
        )
