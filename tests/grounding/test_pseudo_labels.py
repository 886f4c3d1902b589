from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preceptor.data.grounding.boxes import write_box
from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.curriculum import Curriculum
from preceptor.grounding.pseudo_labels import (
    ContentHashes,
    Keep,
    Prompt,
    PseudoLabels,
    best_of,
    prompts_of_turn,
    question_key,
    teach,
)
from preceptor.teachers import label_store
from preceptor.teachers.label_store import Label, LabelIdentity, LabelStore, read_labels
from tests.grounding.asked_data import data, image

IDENTITY = LabelIdentity("a-model", {"kind": "endpoint", "temperature": 0.0})


class Parrot:
    """Says the question in capitals, with a confidence that is known; fails for keys in `mute`."""

    def __init__(self, mute: Collection[str] = (), identity: LabelIdentity = IDENTITY, stop_after: int = 10**9) -> None:
        self.identity, self.mute, self.stop_after = identity, mute, stop_after
        self.asked: list[Prompt] = []

    def answer(self, prompts: Sequence[Prompt], known: Collection[str], keep: Keep) -> Mapping[str, str]:
        for prompt in prompts:
            if prompt.key in known or prompt.key in self.mute:
                continue
            if len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(prompt)
            said = prompt.dialogue.turns[-1][0].upper()
            keep([Label(prompt.key, prompt.turn, said, True, 4, 0.9, 0.8, "top_logprobs", (-0.1,) * 4)])
        return {prompt.key: "mute" for prompt in prompts if prompt.key in self.mute}


def content(folder: Path) -> list[str]:
    return sorted(line for file in folder.glob("labels-*.jsonl") for line in file.read_text("utf-8").splitlines())


def test_answers_come_back_for_the_data(tmp_path):
    whole = data(tmp_path / "images")
    teacher = Parrot()
    taught = teach(tmp_path / "store", whole, whole.samples, teacher)
    assert (taught.questions, taught.before, taught.answered, taught.unanswered) == (12, 0, 12, {})
    labels = PseudoLabels.open(tmp_path / "store", whole)
    assert [d.turns[0][1] for d in labels.dialogues] == [d.turns[0][0].upper() for d in whole.samples]
    assert [d.id for d in labels.dialogues] == [d.id for d in whole.samples]
    assert labels.coverage == 1
    assert labels.teacher == "a-model"
    confidence, margin = labels.confidence_and_margin()
    weights = Curriculum(begin=0.86).weights(torch.from_numpy(confidence), torch.from_numpy(margin), 0.0)
    assert weights.tolist() == [0.0] * 12  # (0.9 + 0.8) / 2 = 0.85
    weights = Curriculum(begin=0.84).weights(torch.from_numpy(confidence), torch.from_numpy(margin), 0.0)
    assert weights.tolist() == pytest.approx([0.85] * 12)


def test_a_key_is_the_content_and_nothing_else(tmp_path):
    """Renamed, copied, in another order or with another id a question stays the same; any other content is another."""
    whole = data(tmp_path / "images", images=2, questions=1)
    first = whole.samples[0]
    hashes = ContentHashes()
    shutil.copy(first.images[0], tmp_path / "other.png")
    moved = replace(first, id="x", group="y", images=(tmp_path / "other.png",), modality="mr")
    assert hashes.keys(moved) == hashes.keys(first)
    others = [
        replace(first, images=whole.samples[1].images),
        replace(first, images=(*first.images, *first.images)),
        replace(first, images=()),
        replace(first, turns=(("Another?", "truth 0"),)),
        replace(first, turns=(("Before?", "yes"), first.turns[0])),
        replace(first, turns=(("Before?", "no"), first.turns[0])),
    ]
    keys = [hashes.keys(dialogue)[-1] for dialogue in [first, *others]]
    assert len(set(keys)) == len(keys)
    # The answer that the data set has is not asked about.
    assert hashes.keys(replace(first, turns=((first.turns[0][0], "else"),))) == hashes.keys(first)
    assert question_key(["a", "b"], [], "q") != question_key(["ab"], [], "q")


def test_only_what_is_missing_is_asked(tmp_path):
    whole = data(tmp_path / "images")
    store = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        teach(store, whole, whole.samples, Parrot(stop_after=5))
    assert len(content(store)) == 5
    again = Parrot()
    taught = teach(store, whole, whole.samples, again)
    assert (taught.before, taught.answered, len(again.asked)) == (5, 7, 7)
    teach(tmp_path / "whole", whole, whole.samples, Parrot())
    assert content(store) == content(tmp_path / "whole")
    third = Parrot()
    assert teach(store, whole, whole.samples, third).answered == 0
    assert third.asked == []


def test_a_question_that_is_there_twice_is_asked_once(tmp_path):
    whole = data(tmp_path / "images", images=1, questions=1)
    whole.samples.append(replace(whole.samples[0], id="again"))
    teacher = Parrot()
    assert teach(tmp_path / "store", whole, whole.samples, teacher).questions == 1
    assert len(teacher.asked) == 1
    assert len(PseudoLabels.open(tmp_path / "store", whole).dialogues) == 2


def test_unlabelled_turns_see_the_teachers_own_earlier_answers(tmp_path):
    file = image(tmp_path, 0)
    turns = (("what?", ""), ("where?", ""), ("why?", ""))
    dialogue = Dialogue("u", (file,), turns, "mia", "ct", "g", "unlabelled")
    given = replace(
        dialogue, id="l", turns=(("what?", "gold"), ("where?", "gold 2"), ("why?", "gold 3")), split="train"
    )
    whole = replace(data(tmp_path / "images", 0), samples=[dialogue, given])
    teacher = Parrot()
    taught = teach(tmp_path / "store", whole, whole.samples, teacher)
    assert taught.questions == taught.answered == 5  # the first question is the same for both
    histories = {prompt.dialogue.turns for prompt in teacher.asked}
    assert (("what?", "WHAT?"), ("where?", "WHERE?"), ("why?", "")) in histories
    assert (("what?", "gold"), ("where?", "gold 2"), ("why?", "")) in histories
    labels = PseudoLabels.open(tmp_path / "store", whole)
    assert labels.dialogues[0].turns == (("what?", "WHAT?"), ("where?", "WHERE?"), ("why?", "WHY?"))


def test_what_waits_for_a_missing_answer_is_counted(tmp_path):
    file = image(tmp_path, 0)
    dialogue = Dialogue("u", (file,), (("what?", ""), ("where?", ""), ("why?", "")), "mia", "ct", "g", "unlabelled")
    whole = replace(data(tmp_path / "images", 1, 1), samples=[dialogue, *data(tmp_path / "images", 1, 1).samples])
    first, second, _ = ContentHashes().keys(dialogue)
    taught = teach(tmp_path / "store", whole, whole.samples, Parrot(mute={second}))
    assert taught.unanswered == {"mute": 1, "an earlier question of the dialogue has no answer": 1}
    assert taught.answered == 2
    assert first in {label.key for label in read_labels(tmp_path / "store")}
    labels = PseudoLabels.open(tmp_path / "store", whole)
    assert labels.left_out == {"not asked": 1}
    assert labels.coverage == 0.5
    assert labels.note() == "1 of 2 dialogues have answers of the teacher a-model (left out: 1 not asked)."


def test_nothing_in_a_store_names_a_file_or_an_id(tmp_path):
    whole = data(tmp_path / "smith")
    whole.samples = [replace(d, id=f"jones-{d.id}", group="miller") for d in whole.samples]
    teach(tmp_path / "store", whole, whole.samples, Parrot())
    everything = " ".join(file.name + file.read_text("utf-8") for file in (tmp_path / "store").iterdir())
    for name in ("smith", "jones", "miller", str(tmp_path)):
        assert name not in everything


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        (LabelIdentity("b-model", IDENTITY.settings), "teacher: cached a-model, wanted b-model"),
        (LabelIdentity("a-model", {**IDENTITY.settings, "temperature": 0.7}), "temperature: cached 0.0, wanted 0.7"),
        (LabelIdentity("a-model", {"temperature": 0.0}), "kind: cached endpoint, wanted nothing"),
    ],
)
def test_another_teacher_or_setting_is_refused_by_name(tmp_path, identity, said):
    whole = data(tmp_path / "images", 1)
    teach(tmp_path / "store", whole, whole.samples, Parrot())
    before = content(tmp_path / "store")
    with pytest.raises(UserError, match=said):
        teach(tmp_path / "store", whole, whole.samples, Parrot(identity=identity))
    assert content(tmp_path / "store") == before


def test_other_data_are_refused(tmp_path):
    whole = data(tmp_path / "images", 1)
    teach(tmp_path / "store", whole, whole.samples, Parrot())
    for dialogue in whole.samples:
        shutil.copy(image(tmp_path, 99), dialogue.images[0])
    with pytest.raises(UserError, match=r"are of other data \(made\): none of their 3 questions is among the 3"):
        PseudoLabels.open(tmp_path / "store", whole)
    with pytest.raises(UserError, match=r"no pseudo-labels in .*: write them first with `preceptor teach`"):
        PseudoLabels.open(tmp_path / "none", whole)


def test_unusable_answers_are_left_out_and_counted(tmp_path):
    whole = data(tmp_path / "images", 1, 4)
    keys = [ContentHashes().keys(dialogue)[0] for dialogue in whole.samples]
    with LabelStore.open(tmp_path / "store", IDENTITY, {}) as store:
        store.append(
            [
                Label(keys[0], 0, "yes", True, 1, 0.5, 0.25, "top_logprobs"),
                Label(keys[1], 0, " ", True),
                Label(keys[2], 0, "and so on and", False, 9, 0.7, 0.5, "top_logprobs"),
            ]
        )
    labels = PseudoLabels.open(tmp_path / "store", whole)
    assert [row.dialogue.id for row in labels.labelled] == ["0-0"]
    assert labels.left_out == {"empty": 1, "cut off": 1, "not asked": 1}
    with_cut = PseudoLabels.open(tmp_path / "store", whole, cut_off=True)
    assert [row.confidence for row in with_cut.labelled] == [0.5, 0.7]


def test_sureness_of_a_dialogue_is_the_mean_over_its_tokens(tmp_path):
    whole = data(tmp_path / "images", 1, 1)
    dialogue = replace(whole.samples[0], turns=(("a?", "x"), ("b?", "y")))
    whole.samples = [dialogue]
    one, two = ContentHashes().keys(dialogue)
    with LabelStore.open(tmp_path / "store", IDENTITY, {}) as store:
        store.append(
            [
                Label(one, 0, "p", True, 1, 1.0, 0.6, "top_logprobs"),
                Label(two, 1, "q", True, 3, 0.2, 0.2, "top_logprobs"),
            ]
        )
    confidence, margin = PseudoLabels.open(tmp_path / "store", whole).confidence_and_margin()
    assert confidence.tolist() == pytest.approx([0.4])  # (1.0 + 3 * 0.2) / 4
    assert margin.tolist() == pytest.approx([0.3])


def test_unknown_sureness_is_said_or_replaced(tmp_path):
    whole = data(tmp_path / "images", 1, 2)
    keys = [ContentHashes().keys(dialogue)[0] for dialogue in whole.samples]
    with LabelStore.open(tmp_path / "store", IDENTITY, {}) as store:
        store.append([Label(keys[0], 0, "yes", True), Label(keys[1], 0, "no", True, 2, 0.75, 0.5, "logprobs")])
    labels = PseudoLabels.open(tmp_path / "store", whole)
    with pytest.raises(UserError, match="1 of 2 pseudo-labels have no confidence"):
        labels.confidence_and_margin()
    confidence, margin = labels.confidence_and_margin(unknown=0.125)
    assert confidence.tolist() == [0.125, 0.75]
    assert margin.tolist() == [0.125, 0.5]


@pytest.mark.parametrize("keep", range(1, 40, 3))
def test_a_line_that_a_kill_cut_is_dropped(tmp_path, keep):
    """At any byte of the last line, also in the midst of a letter of several bytes."""
    labels = [Label(f"{i:064x}", 0, f"Antwort ü 肝 {i}", True, 2, 0.5, 0.25, "top_logprobs") for i in range(3)]
    with LabelStore.open(tmp_path / "store", IDENTITY, {}) as store:
        store.append(labels[:2])
        file = tmp_path / "store" / "labels-00000.jsonl"
        whole = file.read_bytes()
        store.append(labels[2:])
    last = file.read_bytes()[len(whole) :]
    file.write_bytes(whole + last[: len(last) * keep // 40])
    assert list(read_labels(tmp_path / "store")) == labels[:2]
    with LabelStore.open(tmp_path / "store", IDENTITY, {}) as store:
        assert store.keys == {label.key for label in labels[:2]}
        assert file.read_bytes() == whole
        store.append(labels)
    assert list(read_labels(tmp_path / "store")) == labels


def test_zeros_that_a_power_cut_left_are_dropped(tmp_path):
    label = Label("0" * 64, 0, "yes", True)
    with LabelStore.open(tmp_path / "store", IDENTITY, {}) as store:
        store.append([label])
    file = tmp_path / "store" / "labels-00000.jsonl"
    file.write_bytes(file.read_bytes() + b"\0" * 100)
    assert list(read_labels(tmp_path / "store")) == [label]


def test_a_damaged_line_is_named(tmp_path):
    labels = [Label(f"{i:064x}", 0, f"answer {i}", True) for i in range(3)]
    with LabelStore.open(tmp_path / "store", IDENTITY, {}) as store:
        store.append(labels)
    file = tmp_path / "store" / "labels-00000.jsonl"
    file.write_bytes(file.read_bytes().replace(b"answer 1", b"answer 9"))
    with pytest.raises(UserError, match=r"labels-00000.jsonl:2 is damaged"):
        list(read_labels(tmp_path / "store"))
    with pytest.raises(UserError, match=r"labels-00000.jsonl:2 is damaged"):
        LabelStore.open(tmp_path / "store", IDENTITY, {})


def test_files_are_divided_and_a_missing_one_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(label_store, "SHARD", 3)
    labels = [Label(f"{i:064x}", 0, f"answer {i}", True) for i in range(8)]
    with LabelStore.open(tmp_path / "store", IDENTITY, {}) as store:
        store.append(labels[:5])
    with LabelStore.open(tmp_path / "store", IDENTITY, {}) as store:
        store.append(labels)
    files = sorted((tmp_path / "store").glob("labels-*.jsonl"))
    assert [len(file.read_text().splitlines()) for file in files] == [3, 3, 2]
    assert list(read_labels(tmp_path / "store")) == labels
    # Of a file that is not the last one, no line may be unfinished.
    text = files[0].read_bytes()
    files[0].write_bytes(text[:-5])
    with pytest.raises(UserError, match=r"labels-00000.jsonl:3 is damaged"):
        list(read_labels(tmp_path / "store"))
    files[0].unlink()
    with pytest.raises(UserError, match="a file of pseudo-labels is missing"):
        list(read_labels(tmp_path / "store"))


def test_a_store_has_one_writer_and_no_strange_folder(tmp_path):
    with (
        LabelStore.open(tmp_path / "store", IDENTITY, {}),
        pytest.raises(UserError, match="another process writes pseudo-labels"),
    ):
        LabelStore.open(tmp_path / "store", IDENTITY, {})
    with LabelStore.open(tmp_path / "store", IDENTITY, {}):
        pass
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.docx").touch()
    with pytest.raises(UserError, match="holds no pseudo-labels; name another folder"):
        LabelStore.open(tmp_path / "strange", IDENTITY, {})
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    (tmp_path / "store" / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="has format 99"):
        LabelStore.open(tmp_path / "store", IDENTITY, {})


@given(st.text(), st.text(), st.floats(0, 1), st.lists(st.floats(-100, 0), max_size=4), st.booleans())
def test_any_label_comes_back_equal(tmp_path_factory, answer, other, confidence, logprobs, ended):
    label = Label(
        "f" * 64,
        2,
        answer,
        ended,
        len(logprobs) or None,
        confidence,
        0.0,
        "agreement",
        tuple(logprobs),
        (answer, other),
    )
    folder = tmp_path_factory.mktemp("store")
    with LabelStore.open(folder, IDENTITY, {}) as store:
        store.append([label])
    assert list(read_labels(folder)) == [label]


def test_agreement_of_candidates():
    assert best_of(["yes"]) == (0, 1.0, 1.0)
    assert best_of(["no", "yes", "Yes.", "yes", "no"]) == (1, pytest.approx(0.6), pytest.approx(0.2))
    near = [write_box((100, 100, 300, 300)), write_box((110, 100, 310, 300)), write_box((700, 700, 900, 900))]
    index, confidence, margin = best_of([f"it is {box}" for box in near])
    assert index in (0, 1)
    assert (confidence, margin) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


@given(st.lists(st.sampled_from(["yes", "no", "a mass", "mass a", write_box((1, 2, 3, 4))]), min_size=1, max_size=7))
def test_agreement_is_that_of_counts(candidates):
    """Where answers are the same or wholly different, shares are counts."""
    index, confidence, margin = best_of(candidates)
    names = ["a mass" if text == "mass a" else text for text in candidates]
    counts = {name: names.count(name) for name in names}
    chosen = counts.pop(names[index])
    assert confidence == pytest.approx(chosen / len(names))
    assert margin == pytest.approx(max(0, chosen - max(counts.values(), default=0)) / len(names))


def test_prompts_end_in_the_question(tmp_path):
    whole = data(tmp_path / "images", 2, 2)
    prompts = list(prompts_of_turn(whole.samples, 0, ContentHashes(), {}))
    assert [prompt.dialogue.turns for prompt in prompts] == [((d.turns[0][0], ""),) for d in whole.samples]
    assert list(prompts_of_turn(whole.samples, 1, ContentHashes(), {})) == []
    assert np.unique([prompt.key for prompt in prompts]).size == 4
