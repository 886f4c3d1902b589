from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from preceptor.data.types import Dataset, Sample
from preceptor.data.vqa.check import check_data, check_images
from preceptor.data.vqa.vqa_rad import IMAGES, TABLE, read_vqa_rad
from preceptor.errors import UserError
from preceptor.vqa.config import DataConfig
from preceptor.vqa.data import read_data

SPLITS = ("clean", "published", "no_frames")


def row(qid: Any, image: str, question: str, answer: Any, **fields: Any) -> dict[str, Any]:
    return {
        "qid": qid,
        "phrase_type": "freeform",
        "qid_linked_id": f"link-{qid}",
        "image_name": image,
        "image_organ": "CHEST",
        "question": question,
        "question_frame": "NULL",
        "question_rephrase": None,
        "question_type": "PRES",
        "answer": answer,
        "answer_type": "CLOSED",
        **fields,
    }


TEST = {"phrase_type": "test_freeform"}
# One row for each quirk of the release, and ten images so that a validation part can be cut.
ROWS = [
    row("0", "a.jpg", "Are regions \tinfarcted?", "Yes", question_type="PRSE", question_frame="Is/Are  it infarcted? "),
    row(1, "a.jpg", "How many?", 4, answer_type="OPEN", question_type="Other", phrase_type="para"),
    row(
        2,
        "b.jpg",
        "Is it big?",
        "No",
        answer_type="CLOSED ",
        question_type="PRES, ATRIB",
        question_frame="Is it large?",
    ),
    row(3, "b.jpg", "What form?", "no", question_frame="is it ROUND"),
    row(4, "b.jpg", "Is it sharp?", "no", question_frame="Is it  deep"),
    row(10, "a.jpg", "Is it here?", "yes", question_frame="Is/Are it here?", qid_linked_id="pair", **TEST),
    row(11, "a.jpg", "Is this here?", "yes", qid_linked_id="pair", **{**TEST, "phrase_type": "test_para"}),
    row(12, "b.jpg", "Is it 'round'?", "yes", **TEST),
    row(13, "b.jpg", "How far in?", "deep", answer_type="OPEN", question_frame="Is it deep?", **TEST),
    row(14, "only-test.jpg", "Is it cut?", "Axial", **TEST),
    *(row(100 + i, f"more{i}.jpg", "Is it?", "yes", question_frame="It is?") for i in range(8)),
]


def release(folder: Path, rows: Any = None, images: set[str] | None = None) -> Path:
    rows = ROWS if rows is None else rows
    (folder / IMAGES).mkdir(parents=True)
    for name in {r["image_name"] for r in rows} if images is None else images:
        (folder / IMAGES / name).touch()
    (folder / TABLE).write_text(json.dumps(rows))
    return folder


def by_id(data: Dataset[Sample]) -> dict[str, Sample]:
    return {s.id: s for s in data.samples}


def test_quirks(tmp_path):
    rows = by_id(read_vqa_rad(release(tmp_path / "rad"), variant="no_frames"))
    assert rows["0"].question == "Are regions infarcted?"
    assert rows["0"].question_type == "PRES"
    assert rows["0"].tags == {"phrase_type": "freeform", "image_organ": "CHEST"}
    assert rows["0"].image == tmp_path / "rad" / IMAGES / "a.jpg"
    assert rows["0"].group == "a.jpg"
    assert (rows["1"].answers, rows["1"].answer_type, rows["1"].question_type) == (("4",), "open", "OTHER")
    assert (rows["2"].answer_type, rows["2"].question_type) == ("closed", "ATTRIB, PRES")
    assert (rows["14"].answer, rows["14"].answer_type) == ("Axial", "closed")
    assert rows["11"].tags["phrase_type"] == "test_para"


def test_frames_of_each_split(tmp_path):
    root = release(tmp_path / "rad")
    frames = {
        split: {id for id in by_id(read_vqa_rad(root, variant=split)) if id.endswith("-frame")}  # type: ignore[arg-type]
        for split in SPLITS
    }
    more = {f"{100 + i}-frame" for i in range(8)}
    assert frames["published"] == {"0-frame", "2-frame", "3-frame", "4-frame", "10-frame", "13-frame"} | more
    assert frames["no_frames"] == set()
    # 3's frame is the test question 12, 4's the frame of the test question 13.
    assert frames["clean"] == {"0-frame", "2-frame"} | more
    frame = by_id(read_vqa_rad(root, variant="published"))["10-frame"]
    assert (frame.question, frame.answers, frame.group) == ("Is/Are it here?", ("yes",), "a.jpg")
    assert frame.split in ("train", "validation")
    assert frame.tags["phrase_type"] == "frame"


@pytest.mark.parametrize("missing", ["None", "nan", "NaN", "n/a", "<NA>", "", " ", None, float("nan")])
def test_missing_values_as_another_program_writes_them(tmp_path, missing):
    expected = read_vqa_rad(release(tmp_path / "a"), variant="published")
    rows = [r | {"question_frame": missing} if r["question_frame"] == "NULL" else r for r in ROWS]
    # Unlinked rows, of training and of test, are not paraphrases of each other.
    rows = [r | {"qid_linked_id": missing} for r in rows]
    # "None" may be an answer.
    rows[1] = rows[1] | {"answer": "None"}
    data = read_vqa_rad(release(tmp_path / "b", rows), variant="published")
    assert {s.id: s.question for s in data.samples} == {s.id: s.question for s in expected.samples}
    assert by_id(data)["1"].answer == "None"
    assert not any("qid_linked_id" in note for note in data.notes)


def test_default_is_clean_and_notes_count(tmp_path):
    root = release(tmp_path / "rad")
    data = read_vqa_rad(root)
    assert (data.name, data.variant, data.root, data.leaking) == ("vqa-rad", "clean", root, False)
    assert any("frames of 2 test questions, and 2 frames of training" in note for note in data.notes)
    published = read_vqa_rad(root, variant="published")
    assert published.leaking
    assert any("question frames of 2 of the 5 test questions" in note for note in published.notes)
    assert not read_vqa_rad(root, variant="no_frames").leaking
    for split in SPLITS:
        note = read_vqa_rad(root, variant=split).notes[0]  # type: ignore[arg-type]
        assert note.startswith("2 of the 3 test images are also training images")


def test_training_rows_linked_to_test_are_said(tmp_path):
    assert not any("qid_linked_id" in note for note in read_vqa_rad(release(tmp_path / "a")).notes)
    rows = [{**r, "qid_linked_id": "pair"} if r["qid"] == 1 else r for r in ROWS]
    data = read_vqa_rad(release(tmp_path / "b", rows))
    assert data.leaking
    assert any(note.startswith("1 question(s) have paraphrases both in training and in test") for note in data.notes)


def test_training_row_that_asks_a_test_question_is_said(tmp_path):
    rows = [*ROWS, row(50, "b.jpg", "is it round", "yes")]
    notes = read_vqa_rad(release(tmp_path / "b", rows)).notes
    assert any("1 training question(s) equal a test question" in note for note in notes)


@pytest.mark.parametrize("split", SPLITS)
def test_validation_is_cut_by_image(tmp_path, split):
    root = release(tmp_path / "rad")
    data = read_vqa_rad(root, variant=split, validation_fraction=0.3, seed=3)
    train, validation = ({s.group for s in data.split(part)} for part in ("train", "validation"))
    assert train
    assert validation
    assert not train & validation
    again = read_vqa_rad(root, variant=split, validation_fraction=0.3, seed=3)
    assert again.fingerprint() == data.fingerprint()


@pytest.mark.parametrize("split", SPLITS)
def test_validation_by_question_is_cut_as_the_test_is(tmp_path, split):
    rows = [*ROWS, *(row(200 + i, "a.jpg", f"is there a lesion number {i}", "yes") for i in range(20))]
    for i in range(20):
        rows[-20 + i]["question_frame"] = f"lesion number {i} is there"
    root = release(tmp_path / "rad", rows)
    data = read_vqa_rad(root, variant=split, validation_fraction=0.3, validation_by="question", seed=1)
    held = {s.id for s in data.split("validation")}
    assert held
    assert not any(name.endswith("-frame") for name in held)
    assert "a.jpg" in {s.group for s in data.split("validation")} & {s.group for s in data.split("train")}
    train = {s.id for s in data.split("train")}
    framed = {f"{name}-frame" for name in held if int(name) >= 200}
    assert framed
    assert framed & train == (framed if split == "published" else set())
    assert {s.id for s in data.split("test")} == {s.id for s in read_vqa_rad(root, variant=split).split("test")}
    with pytest.raises(UserError, match=r"not to data\.name=phantom; remove it"):
        read_data(DataConfig(validation_by="question"), tmp_path)


def test_the_folder_above_will_do(tmp_path):
    release(tmp_path / "data" / "rad")
    assert read_vqa_rad(tmp_path / "data").root == tmp_path / "data" / "rad"
    release(tmp_path / "data" / "copy")
    with pytest.raises(UserError, match="contains 2 VQA-RAD releases"):
        read_vqa_rad(tmp_path / "data")


def test_wrong_folders(tmp_path):
    with pytest.raises(UserError, match=rf"contains no VQA-RAD release; give the folder that contains '{TABLE}'"):
        read_vqa_rad(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        read_vqa_rad(tmp_path / "none")
    (tmp_path / TABLE).write_text("[]")
    with pytest.raises(UserError, match=f"lacks the folder '{IMAGES}'"):
        read_vqa_rad(tmp_path)


def test_unknown_split(tmp_path):
    with pytest.raises(UserError, match="'publshed' is not known; did you mean 'published'"):
        read_vqa_rad(tmp_path, variant="publshed")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phrase_type": "test_freefrom"}, r"qid 7: phrase_type 'test_freefrom' is not known; did you mean 'test_free"),
        ({"answer_type": "NULL"}, "qid 7: answer_type '' is not known"),
        ({"answer": "NULL"}, "qid 7: the id, the question or the answer is missing"),
        ({"question": None}, "qid 7: the id, the question or the answer is missing"),
        ({"qid": 0}, "qid '0' occurs twice"),
        ({"image_name": "../../x.jpg"}, r"image '../../x.jpg' leaves the folder"),
        ({"image_name": "gone.jpg"}, r"1 of 12 image files are missing(.|\n)*gone.jpg \(qid 7\)"),
    ],
)
def test_broken_rows(tmp_path, change, message):
    rows = [*ROWS, row(7, "a.jpg", "Q?", "yes") | change]
    root = release(tmp_path / "rad", rows, {r["image_name"] for r in ROWS})
    with pytest.raises(UserError, match=message):
        read_vqa_rad(root)


def test_broken_table(tmp_path):
    root = release(tmp_path / "rad")
    table = root / TABLE
    whole = table.read_text()
    table.write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{TABLE} cannot be read as JSON"):
        read_vqa_rad(root)
    for text in ("[]", "{}"):
        table.write_text(text)
        with pytest.raises(UserError, match="is not a list of questions"):
            read_vqa_rad(root)
    table.write_text('[{"image": "a", "question": "b", "answer": "c"}]')  # the columns of the Hugging Face version
    with pytest.raises(UserError, match="entry 1 lacks qid, phrase_type"):
        read_vqa_rad(root)


# --- the release itself ---


@pytest.fixture
def real() -> Path:
    root = os.environ.get("PRECEPTOR_DATA")
    if not root:
        pytest.skip("PRECEPTOR_DATA is not set")
    return Path(root) / "vqa_rad"


@pytest.mark.real_data
@pytest.mark.parametrize(("split", "training"), [("clean", 1797 + 983 - 7), ("published", 3064), ("no_frames", 1797)])
def test_real_counts(real, split, training):
    data = read_vqa_rad(real, variant=split)
    test = data.split("test")
    assert len(data.split("train")) + len(data.split("validation")) == training
    assert Counter(s.answer_type for s in test) == {"open": 179, "closed": 272}
    free = [s for s in test if s.tags["phrase_type"] == "test_freeform"]
    assert Counter(s.answer_type for s in free) == {"open": 123, "closed": 185}
    assert sum(s.answer_type == "closed" and s.answer.lower() not in ("yes", "no") for s in test) == 21
    assert len({s.id for s in data.samples}) == training + 451
    assert data.leaking == (split == "published")

    trained = {s.group for s in data.samples if s.split != "test"}
    images = {s.group for s in test}
    # The one image that the release keeps for the test enters training with the frames of its test questions.
    shared = 203 if split == "published" else 202
    assert (len(images), len(images & trained)) == (203, shared)
    assert data.notes[0].startswith(f"{shared} of the 203 test images")
    assert any("284" in note for note in data.notes) == (split != "no_frames")
    assert not any("qid_linked_id" in note for note in data.notes)
    assert not {s.group for s in data.split("train")} & {s.group for s in data.split("validation")}
    assert len(data.split("validation")) == pytest.approx(0.1 * training, rel=0.05)


@pytest.mark.real_data
def test_real_clean_split_holds_no_frame_of_a_test_row(real):
    test_ids = {s.id for s in read_vqa_rad(real, variant="no_frames").split("test")}
    leaked = {s.id for s in read_vqa_rad(real, variant="published").samples if s.tags["phrase_type"] == "frame"}
    assert sum(id.removesuffix("-frame") in test_ids for id in leaked) == 284
    clean = read_vqa_rad(real, variant="clean")
    frames = [s for s in clean.samples if s.tags["phrase_type"] == "frame"]
    assert all(s.id.removesuffix("-frame") not in test_ids for s in frames)
    published = by_id(read_vqa_rad(real, variant="published"))
    of_test = {
        (published[f"{id}-frame"].group, published[f"{id}-frame"].question)
        for id in test_ids
        if f"{id}-frame" in published
    }
    assert len(of_test) == 200
    assert not of_test & {(s.group, s.question) for s in frames}


@pytest.mark.real_data
def test_real_release_saved_by_pandas(real, tmp_path):
    rows = json.loads((real / TABLE).read_text("utf-8-sig"))
    rows = [{key: "None" if value == "NULL" else value for key, value in row.items()} for row in rows]
    (tmp_path / TABLE).write_text(json.dumps(rows), "utf-8")
    (tmp_path / IMAGES).symlink_to(real / IMAGES)
    for split in SPLITS:
        one, other = (read_vqa_rad(root, variant=split) for root in (real, tmp_path))  # type: ignore[arg-type]
        assert [(s.id, s.question, s.answers) for s in one.samples] == [
            (s.id, s.question, s.answers) for s in other.samples
        ]


@pytest.mark.real_data
def test_real_validation_by_question(real):
    for split, training in (("clean", 1797 + 983 - 7), ("published", 3064), ("no_frames", 1797)):
        data = read_vqa_rad(real, variant=split, validation_by="question")
        held = {s.id for s in data.split("validation")}
        assert len(held) == pytest.approx(180, abs=1)
        lost = training - len(held) - len(data.split("train"))
        frames = {f"{name}-frame" for name in held} & {s.id for s in data.split("train")}
        if split == "clean":
            assert lost > 50
            assert not frames
        else:
            assert lost == 0
            assert bool(frames) == (split == "published")


@pytest.mark.real_data
def test_real_texts_are_clean(real):
    data = read_vqa_rad(real.parent, variant="published")
    assert all("\t" not in s.question + s.answer and "NULL" not in (s.question, s.answer) for s in data.samples)
    types = {kind for s in data.samples for kind in s.question_type.split(", ")}
    assert types == {"ABN", "ATTRIB", "COLOR", "COUNT", "MODALITY", "ORGAN", "OTHER", "PLANE", "POS", "PRES", "SIZE"}
    assert {s.tags["image_organ"] for s in data.samples} == {"ABD", "CHEST", "HEAD"}
    assert len({s.image for s in data.samples}) == 314
    assert not any(f.severity == "error" for f in check_data(data))


@pytest.mark.real_data
def test_real_images_all_decode(real):
    assert check_images(read_vqa_rad(real, variant="no_frames").samples) == []
