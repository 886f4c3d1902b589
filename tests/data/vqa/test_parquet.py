from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from preceptor.data.types import Dataset, Sample
from preceptor.data.vqa import parquet_images as reader
from preceptor.data.vqa.vqa_rad import TABLE, note_hub, read_vqa_rad
from preceptor.errors import UserError
from preceptor.vqa.config import DataConfig
from preceptor.vqa.data import read_data


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), shade).save(file, "PNG")
    return file.getvalue()


def write_table(path: Path, rows: Sequence[tuple[bytes, str | bytes, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": image, "path": None} for image, _, _ in rows])
    # A cast that does not check lets bytes through that are no text.
    questions, answers = (
        pa.array([text if isinstance(text, bytes) else text.encode() for text in texts]).view(pa.string())
        for texts in ([q for _, q, _ in rows], [a for _, _, a in rows])
    )
    parquet.write_table(pa.table({"image": images, "question": questions, "answer": answers}), path)


def hub(root: Path) -> Path:
    write_table(root / "data" / "train-00000-of-00002-ab.parquet", [(png(n), f"what {n}?", "liver") for n in range(6)])
    write_table(
        root / "data" / "train-00001-of-00002-cd.parquet", [(png(0), "is it?", "Yes "), (png(9), "is it?", "no")]
    )
    write_table(
        root / "data" / "test-00000-of-00001-ef.parquet", [(png(20), "where?", "left"), (png(1), "is it?", "no")]
    )
    return root


def test_images_are_written_once_and_the_same_image_is_one_group(tmp_path):
    root = hub(tmp_path / "hub")
    data = read_data(DataConfig(name="path-vqa", root=str(root)), tmp_path / "scratch")
    assert (data.name, data.variant, len(data.samples)) == ("path-vqa", "official", 10)
    by_id = {sample.id: sample for sample in data.samples}
    assert by_id["train-6"].image == by_id["train-0"].image
    assert by_id["train-6"].answers == ("Yes",)
    assert by_id["train-6"].answer_type == "closed"
    assert by_id["test-0"].answer_type == "open"
    assert len(list((root / "extracted-images").glob("*.png"))) == 8
    assert all(sample.image.read_bytes().startswith(b"\x89PNG") for sample in data.samples)
    # The test part's second image is a training image: the reader finds it and says so.
    assert data.leaking
    assert any("1 of 8 images" in note for note in data.notes)
    assert data.split("validation")
    before = {path: path.stat().st_mtime_ns for path in (root / "extracted-images").iterdir()}
    assert data.fingerprint() == read_data(DataConfig(name="path-vqa", root=str(root)), tmp_path).fingerprint()
    assert before == {path: path.stat().st_mtime_ns for path in (root / "extracted-images").iterdir()}


def test_a_later_read_takes_the_images_from_the_index(tmp_path, monkeypatch):
    root = hub(tmp_path / "hub")
    config = DataConfig(name="path-vqa", root=str(root))
    first = read_data(config, tmp_path)
    written: list[str] = []
    write = reader._write
    monkeypatch.setattr(reader, "_write", lambda content, folder: written.append("") or write(content, folder))
    assert read_data(config, tmp_path).fingerprint() == first.fingerprint()
    assert not written
    # An image that was cut short is written again, and so are those of a table that has changed since.
    image = next(s.image for s in first.samples if s.id == "train-0")
    whole = image.read_bytes()
    image.write_bytes(whole[:20])
    read_data(config, tmp_path)
    assert image.read_bytes() == whole
    assert written
    written.clear()
    table = root / "data" / "test-00000-of-00001-ef.parquet"
    write_table(table, [(png(20), "where?", "left"), (png(99), "is it?", "no")])
    assert not read_data(config, tmp_path).leaking
    assert len(written) == 2


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"table": 0, "images": 3}', "name", "size"])
def test_a_broken_or_foreign_index_is_not_followed(tmp_path, index):
    root = hub(tmp_path / "hub")
    config = DataConfig(name="path-vqa", root=str(root))
    first = read_data(config, tmp_path)
    (path,) = (root / "extracted-images").glob("test-*.json")
    whole = json.loads(path.read_text())
    if index == "name":  # a file elsewhere
        (tmp_path / "secret").write_bytes(b"x")
        whole["images"][0] = ["../../secret", 1]
        index = json.dumps(whole)
    elif index == "size":
        whole["images"][0][1] += 1
        index = json.dumps(whole)
    path.write_text(index)
    assert [s.image for s in read_data(config, tmp_path).samples] == [s.image for s in first.samples]


def test_a_smaller_ceiling_holds_for_indexed_images_too(tmp_path):
    root = hub(tmp_path)
    read_data(DataConfig(name="path-vqa", root=str(root)), tmp_path)
    with pytest.raises(UserError, match=r"row 0: the image has .* more than the limit of 10"):
        read_data(DataConfig(name="path-vqa", root=str(root), max_image_bytes=10), tmp_path)


def test_images_go_to_scratch_where_the_data_set_cannot_be_written(tmp_path):
    root = hub(tmp_path / "hub")
    (root / "extracted-images").write_text("a file is in the way")
    config = DataConfig(name="path-vqa", root=str(root))
    data = read_data(config, tmp_path / "scratch")
    assert {s.image.parent for s in data.samples} == {tmp_path / "scratch" / "extracted-images"}
    (tmp_path / "no").write_text("nor here")
    with pytest.raises(UserError, match="is writable; set output=FOLDER"):
        read_data(config, tmp_path / "no")


def test_a_full_disk_is_said_and_leaves_no_half_image(tmp_path, monkeypatch):
    root = hub(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(reader.os, "replace", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free some disk space"):
        read_data(DataConfig(name="path-vqa", root=str(root)), tmp_path)
    assert not list((root / "extracted-images").iterdir())


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    root = hub(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow; install it with pip install 'preceptor\[parquet\]'"):
        read_data(DataConfig(name="path-vqa", root=str(root)), tmp_path)


def test_rows_are_counted_within_their_file(tmp_path):
    root = hub(tmp_path)
    second = root / "data" / "train-00001-of-00002-cd.parquet"
    write_table(second, [(png(0), "is it?", "Yes "), (png(9), "is it?", "")])
    with pytest.raises(
        UserError, match=r"train-00001-of-00002-cd\.parquet: row 1: the question or the answer is empty"
    ):
        read_data(DataConfig(name="path-vqa", root=str(root)), tmp_path)
    write_table(second, [(png(0), "is it?", "Yes "), (png(9), "caf\xe9?".encode("latin-1"), "no")])
    with pytest.raises(UserError, match=r"train-00001-of-00002-cd\.parquet: row 1: a text is not UTF-8"):
        read_data(DataConfig(name="path-vqa", root=str(root)), tmp_path)


def test_answers_that_are_numbers_stay(tmp_path):
    root = hub(tmp_path)
    table = [{"image": {"bytes": png(5), "path": None}, "question": "how many?", "answer": 0}]
    parquet.write_table(pa.Table.from_pylist(table), root / "data" / "test-00000-of-00001-ef.parquet")
    assert read_data(DataConfig(name="path-vqa", root=str(root)), tmp_path).split("test")[0].answers == ("0",)


def test_vqa_rad_from_the_hub(tmp_path):
    root = hub(tmp_path)
    data = read_data(DataConfig(name="vqa-rad", variant="hub", root=str(root)), tmp_path)
    assert (data.name, data.variant, data.leaking) == ("vqa-rad", "hub", False)
    notes = " ".join(data.notes)
    assert "no question frames" in notes
    assert "1 of the 2 test images are also training images" in notes
    (other,) = [finding for finding in data.findings if finding.file == root]
    assert other.severity == "warning"
    assert other.reason == (
        "the parquet files have 8 training and 2 test rows, but the copy of VQA-RAD on the hub has 1,793 training and "
        "451 test rows, and the release without question frames 1,797 training and 451 test rows; copy the files again "
        "from flaviagiammarino/vqa-rad, or do not compare the scores with those of VQA-RAD"
    )
    assert "compare with" not in notes
    assert "repeat" not in notes
    # The layout speaks for itself where no split is given; another split is not there.
    assert read_data(DataConfig(name="vqa-rad", root=str(root)), tmp_path).fingerprint() == data.fingerprint()
    with pytest.raises(
        UserError, match=r"data\.variant=clean does not apply to the parquet files in .*; set data\.variant=hub"
    ):
        read_data(DataConfig(name="vqa-rad", variant="clean", root=str(root)), tmp_path)


def test_repeated_and_shared_rows_of_a_copy_of_vqa_rad_are_counted(tmp_path):
    root = hub(tmp_path)
    repeated = [(png(0), "What 0", "LIVER"), (png(1), "Is it?", "yes")]
    write_table(root / "data" / "train-00001-of-00002-cd.parquet", repeated)
    notes = " ".join(read_data(DataConfig(name="vqa-rad", root=str(root)), tmp_path).notes)
    assert "1 training row(s) repeat the image, question and answer of another row." in notes
    assert "1 training question(s) equal a test question about the same image." in notes


@pytest.mark.parametrize(
    ("training", "what"), [(1793, "the copy on the hub: the rows"), (1797, "the release without question frames, with")]
)
def test_the_numbers_of_rows_tell_what_a_copy_of_vqa_rad_is(tmp_path, training, what):
    """The numbers of the hub's card, and of the release."""
    splits = {"train": training, "test": 451}
    samples = [
        Sample(f"{split}-{n}", tmp_path / f"{split}-{n}.png", f"Q {n}?", ("yes",), "closed", f"{split}-{n}", split)
        for split, rows in splits.items()
        for n in range(rows)
    ]
    for number, sample in enumerate(samples[training + 272 :]):  # as many closed ones as in the release
        samples[training + 272 + number] = replace(sample, answer_type="open")
    data = Dataset("vqa-rad", "hub", tmp_path, samples)
    note_hub(data)
    (note,) = [note for note in data.notes if note.startswith(f"VQA-RAD with {training:,} training and 451 test rows")]
    assert what in note
    assert note.endswith("papers that do not train on question frames."), "the files have answer types"
    assert not [finding for finding in data.findings if finding.file]


@pytest.mark.real_data
def test_the_release_written_as_the_hub_has_it(tmp_path):
    """The hub's card: the release less three training rows that repeat others and one that is a test row too."""
    release = Path(os.environ["PRECEPTOR_DATA"]) / "vqa_rad"
    texts = {str(row["qid"]): row for row in json.loads((release / TABLE).read_text("utf-8-sig"))}
    rows: dict[str, list[tuple[bytes, str, str]]] = {"train": [], "test": []}
    for sample in sorted(read_vqa_rad(release, variant="no_frames").samples, key=lambda s: s.split != "test"):
        row = (sample.image.read_bytes(), str(texts[sample.id]["question"]), str(texts[sample.id]["answer"]))
        if sample.split == "test" or row not in rows["train"] + rows["test"]:
            rows["test" if sample.split == "test" else "train"].append(row)
    for key, table in rows.items():
        write_table(tmp_path / "data" / f"{key}-00000-of-00001.parquet", table)
    data = read_data(DataConfig(name="vqa-rad", root=str(tmp_path)), tmp_path)
    assert len(data.split("train")) + len(data.split("validation")) == 1_793
    assert len(data.split("test")) == 451
    assert len(list((tmp_path / "extracted-images").glob("*.jpg"))) == 314
    notes = " ".join(data.notes)
    assert "202 of the 203 test images are also training images" in notes
    assert (
        "VQA-RAD with 1,793 training and 451 test rows is the copy on the hub: the rows of the release without" in notes
    )
    assert "compare with those of data.variant=no_frames" in notes
    assert "21 of the 272 closed test questions of the release count as open" in notes
    assert not [finding for finding in data.findings if "parquet files have" in finding.reason]
    assert "repeat image" not in notes
    assert not {s.group for s in data.split("train")} & {s.group for s in data.split("validation")}
    assert all("\t" not in s.question for s in data.samples)


def test_an_official_validation_part_is_kept(tmp_path):
    root = hub(tmp_path)
    write_table(root / "data" / "validation-00000-of-00001.parquet", [(png(77), "how?", "well")])
    data = read_data(DataConfig(name="path-vqa", root=str(root)), tmp_path)
    assert [sample.id for sample in data.split("validation")] == ["validation-0"]
    assert len(data.split("train")) == 8


def test_faults_are_named(tmp_path):
    config = DataConfig(name="path-vqa", root=str(hub(tmp_path)))
    test_file = tmp_path / "data" / "test-00000-of-00001-ef.parquet"
    whole = test_file.read_bytes()
    test_file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"test-00000-of-00001-ef\.parquet cannot be read as parquet"):
        read_data(config, tmp_path)
    parquet.write_table(pa.Table.from_pylist([{"image": {"bytes": b"x"}, "query": "a", "answer": "b"}]), test_file)
    with pytest.raises(UserError, match="has no column 'question'"):
        read_data(config, tmp_path)
    write_table(test_file, [(b"", "a", "b")])
    with pytest.raises(UserError, match=r"row 0: the image column contains no bytes"):
        read_data(config, tmp_path)
    write_table(test_file, [(png(1), "a", " ")])
    with pytest.raises(UserError, match="row 0: the question or the answer is empty"):
        read_data(config, tmp_path)
    write_table(test_file, [(png(1), "a", "b")])
    with pytest.raises(UserError, match=r"more than the limit of 10; raise data\.max_image_bytes"):
        read_data(DataConfig(name="path-vqa", root=str(tmp_path), max_image_bytes=10), tmp_path)
    test_file.unlink()
    with pytest.raises(UserError, match=r"contains test-\*\.parquet"):
        read_data(config, tmp_path)


def test_settings_of_other_data_sets_are_refused(tmp_path):
    for setting in ({"variant": "clean"}, {"language": "en"}, {"validation_by": "question"}):
        with pytest.raises(UserError, match=rf"data\.{next(iter(setting))}="):
            read_data(DataConfig(name="path-vqa", root=str(tmp_path), **setting), tmp_path)
    with pytest.raises(UserError, match=r"SLAKE variant 'cleen' is not known; did you mean 'clean'"):
        read_data(DataConfig(name="slake", variant="cleen", root=str(tmp_path)), tmp_path)


# --- shards and types ---


def read(root: Path, scratch: Path):
    return read_data(DataConfig(name="path-vqa", root=str(root)), scratch)


def test_tables_are_complete_by_their_own_numbering(tmp_path):
    root = hub(tmp_path)
    data, second = root / "data", root / "data" / "train-00001-of-00002-cd.parquet"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 2 train tables, the first is train-00001-of-00002.parquet"):
        read(root, tmp_path)
    second.write_bytes(content)
    for name, reason in {
        "train-00001-of-00002-ee.parquet": "are both number 00001",
        "train-00001-of-00003.parquet": "mixes train tables of several numberings",
        "train-extra.parquet": "is not numbered like the other train tables",
        "train-00002-of-00002.parquet": "is numbered above its own total",
        "validation-00000-of-00001.parquet": "are the same table",
    }.items():
        (data / name).write_bytes(content)
        with pytest.raises(UserError, match=reason):
            read(root, tmp_path)
        (data / name).unlink()
    (root / "train-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(UserError, match="both contain train-"):
        read(root, tmp_path)


def test_tables_of_an_unknown_split_are_a_finding(tmp_path):
    root = hub(tmp_path)
    write_table(root / "data" / "dev-00000-of-00001.parquet", [(png(40), "how?", "well")])
    assert any(
        "1 parquet files are not read" in f.reason and "dev-0" in f.reason for f in read(root, tmp_path).findings
    )


def with_rows(root: Path, rows: list[dict], **types) -> Path:
    table = pa.Table.from_pylist([{"image": {"bytes": png(5), "path": None}, "question": "Q?"} | row for row in rows])
    for name, kind in types.items():
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    parquet.write_table(table, root / "data" / "test-00000-of-00001-ef.parquet")
    return root


@pytest.mark.parametrize(
    ("answer", "texts"),
    [(["yes", "Yes."], ("yes", "Yes.")), (1.0, ("1",)), (3, ("3",))],
)
def test_lists_are_accepted_answers_and_equal_numbers_are_one_answer(tmp_path, answer, texts):
    root = with_rows(hub(tmp_path), [{"answer": answer}])
    assert read(root, tmp_path).split("test")[0].answers == texts


@pytest.mark.parametrize("answer", [{"text": "yes"}, True, b"yes", float("inf"), [["yes"]]])
def test_answers_of_other_types_are_refused(tmp_path, answer):
    root = with_rows(hub(tmp_path), [{"answer": answer}])
    with pytest.raises(UserError, match=r"ef\.parquet: row 0: answer is "):
        read(root, tmp_path)


def test_dates_are_refused_and_dictionaries_are_read(tmp_path):
    root = with_rows(hub(tmp_path), [{"answer": 7}], answer=pa.timestamp("ns"))
    with pytest.raises(UserError, match=r"column answer has the type timestamp\[ns\]"):
        read(root, tmp_path)
    with_rows(root, [{"answer": "left"}], answer=pa.dictionary(pa.int32(), pa.string()))
    assert read(root, tmp_path).split("test")[0].answers == ("left",)


def test_patients_decide_the_groups_of_parquet_tables(tmp_path):
    root = hub(tmp_path)
    with_rows(root, [{"answer": "yes", "patient_id": 0, "image": {"bytes": png(n), "path": None}} for n in (50, 51)])
    data = read(root, tmp_path)
    assert len({sample.group for sample in data.split("test")}) == 1
    assert any("follow the column patient_id" in note for note in data.notes)


def described(root: Path, **columns: Any) -> list[dict]:
    """Return two rows per split of a copy whose images have the names `paths`, by default none."""
    paths = columns.pop("paths", [None] * 6)
    for file in (root / "data").glob("*.parquet"):
        file.unlink()
    (root / "data").mkdir(parents=True, exist_ok=True)
    rows = [
        {"image": {"bytes": png(n), "path": path}, "question": "Which?", "answer": "no" if n % 2 else "lung"}
        | {name: values[n] for name, values in columns.items()}
        for n, path in enumerate(paths)
    ]
    for n, split in enumerate(("train", "validation", "test")):
        table = pa.Table.from_pylist(rows[2 * n : 2 * n + 2])
        parquet.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")
    return rows


def reasons(root: Path, scratch: Path) -> list[tuple[str, str]]:
    """Return severity and reason of the findings, except the numbers of rows of the release."""
    found = read(root, scratch).findings
    return [(f.severity, f.reason) for f in found if "but the release has" not in f.reason]


def test_types_of_questions_and_answers_are_read(tmp_path):
    described(tmp_path, answer_type=["OPEN", "open"] * 2 + ["closed", None], question_type=["organ"] * 5 + [None])
    data = read(tmp_path, tmp_path)
    assert [s.answer_type for s in data.samples] == ["open", "open", "open", "open", "closed", "closed"]
    assert [s.question_type for s in data.samples] == ["organ"] * 5 + [""]
    assert any("Answer types are inferred" in note for note in data.notes)  # of one row
    described(tmp_path, answer_type=["OPEN"] * 6)
    assert not any("Answer types are inferred" in note for note in read(tmp_path, tmp_path).notes)


def test_other_types_of_answers_are_a_warning_and_are_inferred(tmp_path):
    described(tmp_path, answer_type=["other", "yes/no"] * 3)
    data = read(tmp_path, tmp_path)
    assert [s.answer_type for s in data.samples] == ["open", "closed"] * 3
    ((severity, reason),) = reasons(tmp_path, tmp_path)
    assert severity == "warning"
    assert reason.startswith("column 'answer_type' contains 'other', which is not open or closed, and is not used")


def test_columns_that_are_not_read_are_findings(tmp_path):
    described(tmp_path, id=list("abcdef"))
    assert reasons(tmp_path, tmp_path) == [
        ("warning", "column 'id' is not read: rows are named by their split and number, such as test-0")
    ]
    described(tmp_path, label=["liver"] * 6)
    ((severity, reason),) = reasons(tmp_path, tmp_path)
    assert (severity, "column 'label' may contain answers and is not read" in reason) == ("warning", True)


@pytest.mark.parametrize("column", ["split", "set"])
def test_a_column_of_splits_must_agree_with_the_files(tmp_path, column):
    agreeing = ["train", "training", "val", "validation", "test", "Test"]
    described(tmp_path, **{column: agreeing})
    assert reasons(tmp_path, tmp_path) == []
    described(tmp_path, **{column: ["train", "test", *agreeing[2:]]})
    ((severity, reason),) = reasons(tmp_path, tmp_path)
    assert severity == "error"
    assert reason.startswith(f"column {column!r} of 1 rows names another split than their file, which decides")


@pytest.mark.parametrize(
    "column",
    [
        {"image_name": [f"{n}.png" for n in range(6)]},
        {"question_id": list(range(6))},
        {"embedding": [[0.5, 0.25]] * 6},
        {"mask": [b"x"] * 6},
        {"taken": [datetime(2020, 1, 1)] * 6},
        {"reviewed": [True] * 6},
        {"gt_answer": ["lung", "no"] * 3},
        {"options": [["lung", "liver", "no"]] * 6},
    ],
)
def test_harmless_columns_are_no_findings(tmp_path, column):
    described(tmp_path, **column)
    assert reasons(tmp_path, tmp_path) == []


@pytest.mark.parametrize("answer", [["A", "B", "C"] * 2, [0, 1, 2] * 2])
@pytest.mark.parametrize("name", ["options", "choices"])
def test_multiple_choice_in_parquet_tables_is_an_error(tmp_path, answer, name):
    described(tmp_path, answer=answer, **{name: [["kidney", "lung", "liver"]] * 6})
    (reason,) = (reason for severity, reason in reasons(tmp_path, tmp_path) if severity == "error")
    assert f"are letters or numbers of the options in {name!r}" in reason


@pytest.mark.parametrize(
    "column",
    [
        {"question": ["Which? A) lung B) liver"] * 6},
        {"choice_list": [["lung", "liver"]] * 6},
        {"candidates": [{"A": "lung", "B": "liver"}] * 6},
    ],
)
def test_options_in_questions_and_lists_of_parquet_tables_are_an_error(tmp_path, column):
    described(tmp_path, answer=["A", "B"] * 3, **column)
    (reason,) = (reason for severity, reason in reasons(tmp_path, tmp_path) if severity == "error")
    assert reason.startswith("6 of 6 answers, such as 'A', are letters or numbers of the options in ")


@pytest.mark.parametrize(
    "cell",
    [
        {"bytes": png(90), "path": None},
        {"bytes": None, "path": "a.PNG"},
        [{"bytes": png(90), "path": None}],
        png(90),
        [png(90)],
    ],
)
@pytest.mark.parametrize("name", ["image_2", "mask"])
def test_other_columns_of_images_are_a_warning(tmp_path, name, cell):
    described(tmp_path, **{name: [None, cell] * 3})
    assert reasons(tmp_path, tmp_path) == [
        (
            "warning",
            f"column {name!r} contains images and is not read: a question has one image, that of 'image'",
        )
    ]


def test_lists_of_structures_are_compared_with_the_columns_that_are_read(tmp_path):
    described(tmp_path, answers=[[{"answer": "lung", "confidence": "yes"}]] * 6)
    ((severity, reason),) = reasons(tmp_path, tmp_path)
    assert (severity, "column 'answers' is not read, only 'answer' is" in reason) == ("warning", True)
    described(tmp_path, turns=[[{"role": "user", "content": "Which?"}]] * 6)
    assert reasons(tmp_path, tmp_path) == []


def test_images_of_one_folder_in_several_splits_are_a_warning(tmp_path):
    described(tmp_path, paths=[f"p{n % 2}/{n}.png" for n in range(6)])
    ((severity, reason),) = reasons(tmp_path, tmp_path)
    assert (severity, reason[:35]) == ("warning", "no group and no patient is given fo")
    described(tmp_path, paths=[f"p{n % 2}/{n}.png" for n in range(6)], patient_id=[0, 0, 1, 1, 2, 2])
    assert reasons(tmp_path, tmp_path) == []
    for paths in ([f"{n}.png" for n in range(6)], [f"f{n // 2}/{n % 2}.png" for n in range(6)], ["0.png"] * 6):
        described(tmp_path, paths=paths)
        assert reasons(tmp_path, tmp_path) == []


def test_the_number_of_rows_of_path_vqa_is_compared_with_the_release(tmp_path):
    described(tmp_path)
    assert [f.reason for f in read(tmp_path, tmp_path).findings] == [
        "train-*.parquet has 2 rows, but the release has 19,654",
        "validation-*.parquet has 2 rows, but the release has 6,259",
        "test-*.parquet has 2 rows, but the release has 6,719",
    ]
    (tmp_path / "data" / "validation-00000-of-00001.parquet").unlink()
    found = [f.reason for f in read(tmp_path, tmp_path).findings]
    assert found[:2] == [
        "train-*.parquet has 2 rows, but the release has 19,654",
        "validation-*.parquet has 0 rows, but the release has 6,259",
    ]


@pytest.mark.parametrize("name", ["Group", "GROUP", "groups"])
def test_a_column_that_is_nearly_named_group_is_refused(tmp_path, name):
    root = with_rows(hub(tmp_path), [{"answer": "yes", name: "p0"}])
    with pytest.raises(UserError, match=rf"ef\.parquet: unknown column '{name}'; did you mean 'group'"):
        read(root, tmp_path)
    with_rows(root, [{"answer": "yes", "group": "p0", "answers": "no", "age_group": "60-70", "image_id": 4}])
    assert read(root, tmp_path).split("test")[0].group == "p0"


def test_patients_in_other_words_are_a_warning_of_parquet_tables(tmp_path):
    root = hub(tmp_path)
    for split, shades in (("train", (70, 71)), ("test", (80, 81))):
        rows = [
            {
                "image": {"bytes": png(shade)},
                "question": "Q?",
                "answer": "x",
                "patient_label": "P1",
                "patient_image": b"x",
            }
            for shade in shades
        ]
        for path in (root / "data").glob(f"{split}-*"):
            path.unlink()
        parquet.write_table(pa.Table.from_pylist(rows), root / "data" / f"{split}-00000-of-00001.parquet")
    reasons = [finding.reason for finding in read(root, tmp_path).findings]
    assert sum("column 'patient_label' may name examinations or patients" in reason for reason in reasons) == 1
    assert not any("patient_image" in reason for reason in reasons)


NO_YES = {"names": ["no", "yes"], "_type": "ClassLabel"}


def with_features(root: Path, rows: list[dict], features: object) -> Path:
    """Write the test table with the metadata of the library `datasets`."""
    table = pa.Table.from_pylist([{"image": {"bytes": png(5), "path": None}, "question": "Q?"} | row for row in rows])
    info = features if isinstance(features, str) else json.dumps({"info": {"features": features}})
    path = root / "data" / "test-00000-of-00001-ef.parquet"
    parquet.write_table(table.replace_schema_metadata({"huggingface": info}), path)
    return root


@pytest.mark.parametrize(
    ("feature", "answers", "texts"),
    [
        (NO_YES, [1, 0], [("yes",), ("no",)]),
        ({"num_classes": 2, "id": None, **NO_YES}, [0], [("no",)]),
        ({"feature": NO_YES, "length": -1, "_type": "Sequence"}, [[1, 0]], [("yes", "no")]),
        ([NO_YES], [[0]], [("no",)]),
        ({"dtype": "int64", "_type": "Value"}, [1], [("1",)]),
        (NO_YES, ["yes"], [("yes",)]),  # stored as texts
    ],
)
def test_numbers_of_classes_are_read_as_their_names(tmp_path, feature, answers, texts):
    root = with_features(hub(tmp_path), [{"answer": answer} for answer in answers], {"answer": feature})
    samples = read(root, tmp_path).split("test")
    assert [sample.answers for sample in samples] == texts
    assert {sample.answer_type for sample in samples} == {"open" if texts == [("1",)] else "closed"}


def test_numbers_without_a_class_are_refused(tmp_path):
    root = with_features(hub(tmp_path), [{"answer": 1}, {"answer": 2}], {"answer": NO_YES})
    with pytest.raises(
        UserError, match=r"ef\.parquet: row 1: answer is class 2, but the table has names for 2 classes"
    ):
        read(root, tmp_path)
    with_features(root, [{"answer": -1}], {"answer": NO_YES})
    with pytest.raises(UserError, match=r"row 0: the question or the answer is empty"):
        read(root, tmp_path)


@pytest.mark.parametrize(
    "info", ["{", "[]", '{"info": 3}', '{"info": {"features": [1]}}', '{"info": {"features": null}}']
)
def test_other_metadata_are_ignored(tmp_path, info):
    root = with_features(hub(tmp_path), [{"answer": 1}], info)
    assert read(root, tmp_path).split("test")[0].answers == ("1",)


def test_an_image_that_is_only_a_name_is_refused(tmp_path):
    root = with_rows(hub(tmp_path), [{"answer": "yes", "image": {"bytes": None, "path": "a.png"}}])
    with pytest.raises(UserError, match="row 0: the image is only the name of a file"):
        read(root, tmp_path)


def test_the_content_of_an_image_decides_its_suffix(tmp_path):
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "WEBP")
    dicom = bytes(128) + b"DICM"
    rows = [{"answer": "yes", "image": {"bytes": content, "path": "x.png"}} for content in (file.getvalue(), dicom)]
    data = read(with_rows(hub(tmp_path), rows), tmp_path)
    assert [sample.image.suffix for sample in data.split("test")] == [".webp", ".dcm"]


def test_a_corrupt_table_is_one_sentence(tmp_path):
    root = hub(tmp_path)
    path = root / "data" / "test-00000-of-00001-ef.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot be read as parquet \(.*\); copy it again"):
        read(root, tmp_path)
