from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from preceptor.data.vqa.table import read_table
from preceptor.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the images a.png, b.png, sub/c.png; their content is not looked at by the reader."""
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder: Path, text: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_rows(folder: Path, rows: list[dict], name: str) -> Path:
    if name.endswith(".jsonl"):
        return write(folder, "".join(json.dumps(row) + "\n" for row in rows), name)
    path = folder / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


FULL = [
    {
        "id": f"q{i}",
        "image": image,
        "question": f"Is it, or is it not?\nNumber {i}",
        "answer": "Yes" if i % 2 else "left lung",
        "answer_type": "closed" if i % 2 else "OPEN",
        "group": f"patient {i}",
        "split": split,
        "question_type": "presence",
        "comment": "ignored",
    }
    for i, (image, split) in enumerate([("a.png", "train"), ("b.png", "Dev"), ("sub/c.png", "test")])
]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_full_table(folder, name):
    data = read_table(write_rows(folder, FULL, name))
    assert (data.name, data.variant, data.root, data.leaking, data.notes) == ("t", "given", folder, False, [])
    assert [s.id for s in data.samples] == ["q0", "q1", "q2"]
    assert [s.split for s in data.samples] == ["train", "validation", "test"]
    assert [s.answer_type for s in data.samples] == ["open", "closed", "open"]
    last = data.samples[2]
    assert last.image == folder / "sub" / "c.png"
    assert last.question == "Is it, or is it not?\nNumber 2"
    assert (last.answers, last.group, last.question_type) == (("left lung",), "patient 2", "presence")


def test_csv_and_jsonl_read_the_same(folder):
    one, other = (read_table(write_rows(folder, FULL, name), name="x") for name in ("t.csv", "t.jsonl"))
    assert one.fingerprint() == other.fingerprint()
    assert one.name == "x"


def test_defaults(folder):
    data = read_table(
        write(folder, 'image,question,answer\na.png,Q?, YES \n\nsub/c.png,"two\nlines?",no one\nb.png,Q?,no\n')
    )
    assert [s.id for s in data.samples] == ["row-2", "row-4", "row-6"]
    assert [s.answer_type for s in data.samples] == ["closed", "open", "closed"]
    assert [s.group for s in data.samples] == ["a.png", "sub/c.png", "b.png"]
    assert data.samples[0].answer == "YES"


def test_one_image_written_in_two_ways_is_one_group(folder):
    data = read_table(write(folder, "image,question,answer\nsub/c.png,Q?,yes\n./sub//c.png,R?,no\n"))
    assert len({s.group for s in data.samples}) == len({s.image for s in data.samples}) == 1


def test_alternatives_only_in_jsonl(folder):
    row = {"image": "a.png", "question": "Q?", "answer": ["ct", "computed tomography", 4]}
    assert read_table(write_rows(folder, [row], "t.jsonl")).samples[0].answers == ("ct", "computed tomography", "4")
    text = "image,question,answer\na.png,Q?,ct#computed tomography\n"
    assert read_table(write(folder, text)).samples[0].answers == ("ct#computed tomography",)


def test_jsonl_line_separators_inside_a_text(folder):
    row = {
        "image": "a.png",
        "question": "one\u2028two\x85three",
        "answer": 3.0,
        "group": 7,
        "question_type": float("nan"),
    }
    path = write(folder, json.dumps(row, ensure_ascii=False) + "\n\n", "t.jsonl")
    sample = read_table(path).samples[0]
    assert sample.question == "one\u2028two\x85three"
    assert (sample.answers, sample.group, sample.question_type) == (("3",), "7", "")


def test_a_blank_before_quotes_is_not_part_of_the_text(folder):
    data = read_table(write(folder, 'image, question, answer, group\na.png, "Is it, or not?", "yes", p0\n'))
    (sample,) = data.samples
    assert (sample.question, sample.answer, sample.answer_type, sample.group) == (
        "Is it, or not?",
        "yes",
        "closed",
        "p0",
    )


def test_byte_order_mark_and_windows_line_ends(folder):
    data = read_table(write(folder, b"\xef\xbb\xbfimage,question,answer\r\na.png,Q?,\xc3\xa4hnlich\r\n"))
    assert data.samples[0].answer == "ähnlich"


def test_folder(folder):
    text = "image,question,answer\na.png,Q?,yes\n"
    with pytest.raises(UserError, match=r"contains neither of questions.jsonl and questions.csv"):
        read_table(folder)
    write(folder, text, "questions.csv")
    assert read_table(folder).name == folder.name
    write(folder, "", "questions.jsonl")
    with pytest.raises(UserError, match="contains both"):
        read_table(folder)


# --- parts ---


def many(folder: Path, groups: int, **cells) -> Path:
    rows = [
        {"image": "a.png", "question": f"Q{i}?", "answer": "yes", "group": f"g{i % groups}", **cells}
        for i in range(groups * 2)
    ]
    return write_rows(folder, rows, "t.jsonl")


def test_parts_by_hash(folder):
    data = read_table(many(folder, 2000))
    part_of = {s.group: s.split for s in data.samples}
    assert all(s.split == part_of[s.group] for s in data.samples)
    counts = Counter(part_of.values())
    # Five standard deviations of a binomial of 2,000.
    assert abs(counts["train"] - 1400) < 5 * (2000 * 0.7 * 0.3) ** 0.5
    assert abs(counts["test"] - 300) < 5 * (2000 * 0.15 * 0.85) ** 0.5
    fewer = read_table(many(folder, 1000))
    assert {s.group: s.split for s in fewer.samples}.items() <= part_of.items()
    assert data.variant == "by-group-hash"


def test_too_few_groups_for_a_test_part_is_said(folder):
    # `printf g1 | sha256sum` begins with 7114, a share of 0.44: training. g0's with f21b, a share of 0.95: test.
    assert {s.group: s.split for s in read_table(many(folder, 2)).samples} == {"g0": "test", "g1": "train"}
    row = {"image": "a.png", "question": "Q?", "answer": "yes", "group": "g1"}
    data = read_table(write_rows(folder, [row], "t.jsonl"))
    assert not data.split("test")
    assert any("too few groups" in note for note in data.notes)


def test_validation_is_cut_by_group_where_the_table_has_none(folder):
    path = many(folder, 50, split="train")
    data = read_table(path)
    validation = data.split("validation")
    assert len(validation) == 10
    assert not {s.group for s in validation} & {s.group for s in data.split("train")}
    assert len(read_table(path, validation_fraction=0.3).split("validation")) == 30
    assert {s.id for s in read_table(path, seed=1).split("validation")} != {s.id for s in validation}


def test_leaks_are_counted_without_names(folder):
    rows = [
        {"image": "a.png", "question": "Q?", "answer": "yes", "group": "Jane Doe", "split": "train"},
        {"image": "b.png", "question": "Q?", "answer": "yes", "group": "Jane Doe", "split": "test"},
        {"image": "sub/c.png", "question": "Q?", "answer": "yes", "group": "x", "split": "val"},
    ]
    data = read_table(write_rows(folder, rows, "t.jsonl"))
    assert data.leaking
    assert len(data.notes) == 1
    assert "1 of 2 groups" in data.notes[0]
    assert "Doe" not in data.notes[0]

    for row in rows:
        row["group"] = row["split"]
    rows[1]["image"] = "a.png"
    data = read_table(write_rows(folder, rows, "t.jsonl"))
    assert data.leaking
    assert "1 of 2 images" in data.notes[0]


# --- mistakes ---

CSV_MISTAKES = {
    "image,question,Answer\n": r":1: unknown column 'Answer'; did you mean 'answer'",
    "image,quesiton,answer\n": r":1: unknown column 'quesiton'; did you mean 'question'",
    "image,question,answer,answer type\n": "did you mean 'answer_type'",
    "image,question,answer,ID\n": "did you mean 'id'",
    "image,question,answer,splits\n": "did you mean 'split'",
    "image,question\n": r":1: no column 'answer'",
    "image,question,answer,answer\n": r":1: column 'answer' occurs twice",
    "image;question;answer\na.png;Q?;yes\n": r":1: the header .* has no comma",
    "image,question,answer\n": "has no rows",
    "": "has no rows",
    "image,question,answer\na.png,Q?,yes\na.png,,yes\n": r":3: the question is empty",
    "image,question,answer\na.png,Q?,yes\na.png,Q?,  \n": r":3: the answer is empty",
    "image,question,answer\n,Q?,yes\n": r":2: the image is empty",
    "image,question,answer\na.png,Is it big, or not?,yes\n": r":2: 4 fields, but the header has 3",
    "image,question,answer\na.png,Q?\n": r":2: 2 fields, but the header has 3",
    'image,question,answer\na.png,"Q?,yes\n': r":2: invalid CSV",
    "image,question,answer,id\na.png,Q?,yes,7\nb.png,Q?,yes,7\n": r":3: id '7' is also used in line 2",
    "image,question,answer,split\na.png,Q?,yes,trian\n": r":2: split 'trian' is not known; did you mean 'train'",
    "image,question,answer,split\na.png,Q?,yes,train\nb.png,Q?,yes,\n": r":3: the split is missing",
    "image,question,answer,answer_type\na.png,Q?,yes,cloze\n": r":2: answer_type 'cloze' is not .* mean 'closed'",
    "image,question,answer\n../a.png,Q?,yes\n": r":2: image '../a.png' leaves the folder",
    "image,question,answer\n/a.png,Q?,yes\n": r":2: image '/a.png' leaves the folder",
    'image,question,answer\na.png,"one\ntwo",yes\nb.png,,yes\n': r":4: the question is empty",
}


@pytest.mark.parametrize("text", CSV_MISTAKES)
def test_csv_mistakes(folder, text):
    path = write(folder, text)
    with pytest.raises(UserError, match=rf"t\.csv.*{CSV_MISTAKES[text]}"):
        read_table(path)


JSONL_MISTAKES = {
    '{"image": "a.png", "question": "Q?", "answer": "yes"}\n{"image": ': r":2: invalid JSON",
    '["a.png", "Q?", "yes"]': r":1: list instead of a JSON object",
    '\n{"image": "a.png", "question": "Q?"}': r":2: no column 'answer'",
    '{"image": "a.png", "question": "Q?", "answers": ["yes"]}': "did you mean 'answer'",
    '{"image": "a.png", "question": "Q?", "answer": []}': r":1: the answer is empty",
    '{"image": "a.png", "question": "Q?", "answer": ["ct", ""]}': r":1: the answer is empty",
    '{"image": "a.png", "question": "Q?", "answer": null}': r":1: the answer is empty",
    '{"image": "a.png", "question": "Q?", "answer": true}': r":1: answer is true; write a text in quotes",
    '{"image": {"x": 1}, "question": "Q?", "answer": "yes"}': r":1: image is {\"x\": 1}; write a text",
    '{"image": "a.png", "question": "\\ud800", "answer": "yes"}': r":1: question contains half of a surrogate",
    "[" * 100_000: r":1: invalid JSON",
}


@pytest.mark.parametrize("text", JSONL_MISTAKES, ids=range(len(JSONL_MISTAKES)))
def test_jsonl_mistakes(folder, text):
    path = write(folder, text, "t.jsonl")
    with pytest.raises(UserError, match=rf"t\.jsonl.*{JSONL_MISTAKES[text]}"):
        read_table(path)


def test_columns_that_only_begin_alike_are_ignored(folder):
    text = "image,question,answer,question_id,image_id,answer_count,answers,age\na.png,Q?,yes,1,2,3,4,5\n"
    assert len(read_table(write(folder, text)).samples) == 1


def test_not_utf8(folder):
    path = write(folder, "image,question,answer\na.png,Q?,yes\nb.png,Q?,ähnlich\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"t\.csv:3: byte 0xe4 is not UTF-8"):
        read_table(path)


def test_missing_images_are_reported_together(folder):
    rows = "".join(f"gone{i}.png,Q?,yes\n" for i in range(12))
    path = write(folder, f"image,question,answer\na.png,Q?,yes\n{rows}gone0.png,R?,no\n")
    with pytest.raises(UserError) as caught:
        read_table(path)
    message = str(caught.value)
    assert "12 of 13 image files are missing" in message
    assert "gone0.png (t.csv:3)" in message
    assert message.count("gone") == 10
    assert "and 2 more" in message


def test_wrong_paths(folder):
    with pytest.raises(UserError, match="does not exist"):
        read_table(folder / "none.csv")
    with pytest.raises(UserError, match=r"must end in \.csv or \.jsonl"):
        read_table(write(folder, "[]", "t.json"))


@pytest.mark.parametrize("values", [("train", "test"), ("Train", "Development"), ("tr", "te")])
@pytest.mark.parametrize("column", ["set", "subset", "partition", "dataset_split", "phase"])
def test_a_column_of_split_names_that_is_not_read_is_an_error(folder, column, values):
    rows = [
        {"image": name, "question": "Q?", "answer": "x", column: split}
        for name, split in zip(("a.png", "b.png"), values, strict=True)
    ]
    (finding,) = read_table(write_rows(folder, rows, "t.jsonl")).findings
    assert (finding.severity, f"column {column!r} contains names of splits" in finding.reason) == ("error", True)


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("image_path", ["b.png", "sub/c.png"], "contains names of image files and is not read"),
        ("prior", ["b.png", "a.JPG"], "contains names of image files and is not read"),
        ("label", ["no", "left"], "may contain answers and is not read"),
        ("ground_truth", ["yes", "no"], "may contain answers and is not read"),
        ("label", ["yes", "yes"], None),  # nothing is lost
        ("image_path", ["a.png", "a.png"], None),
        ("image_organ", ["lung", "brain"], None),
    ],
)
def test_a_column_that_competes_with_one_that_is_read_is_a_finding(folder, column, values, reason):
    lines = [f"a.png,what {number}?,yes,{value}\n" for number, value in enumerate(values)]
    found = [
        one.reason for one in read_table(write(folder, f"image,question,answer,{column}\n{''.join(lines)}")).findings
    ]
    assert len(found) == (reason is not None)
    assert all(f"column {column!r} {reason}" in one for one in found)


@pytest.mark.parametrize("sign", ["\u200b", "\ufeff", "\u200e \u2060"])
@pytest.mark.parametrize("column", ["question", "answer"])
def test_a_text_of_invisible_signs_is_empty(folder, column, sign):
    with pytest.raises(UserError, match=f"the {column} is empty"):
        read_table(write_rows(folder, [{"image": "a.png", "question": "Q?", "answer": "x", column: sign}], "t.jsonl"))


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("training", "validation", "testing"), ("train", "validation", "test")),
        (("TRAINING", "development", "Test"), ("train", "validation", "test")),
    ],
)
def test_other_names_of_splits(folder, names, splits):
    rows = [
        {"image": image, "question": "Q?", "answer": "yes", "split": name}
        for image, name in zip(("a.png", "b.png", "sub/c.png"), names, strict=True)
    ]
    assert tuple(sample.split for sample in read_table(write_rows(folder, rows, "t.csv")).samples) == splits


def test_only_the_columns_of_questions_are_read_if_there_are_no_answers(folder):
    row = {"image": "a.png", "question": "Q?", "answer_type": "other", "split": "fold 1", "Answer": "x"}
    (sample,) = read_table(write_rows(folder, [row], "t.jsonl"), answered=False).samples
    assert (sample.question, sample.answers, sample.split) == ("Q?", ("",), "test")
    with pytest.raises(UserError, match="answer_type 'other' is not known"):
        read_table(write_rows(folder, [{**FULL[0], "answer_type": "other"}], "u.jsonl"))


def test_multiple_choice_is_an_error(folder):
    rows = "".join(f"{name},Which organ?,C,kidney,lung,liver,heart\n" for name in ("a.png", "b.png", "sub/c.png"))
    path = write(folder, f"image,question,answer,option_A,option_B,option_C,option_D\n{rows}")
    (finding,) = (f for f in read_table(path).findings if f.severity == "error")
    assert finding.sample_ids == ("row-2", "row-3", "row-4")
    assert "3 of 3 answers, such as 'C', are letters or numbers of the options in 'option_A'" in finding.reason
