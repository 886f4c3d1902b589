from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preceptor.data.grounding.box_formats import write_box
from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.curriculum import Curriculum
from preceptor.grounding.labeling import teach
from preceptor.grounding.pseudo_labels import (
    ContentHashes,
    Prompt,
    PseudoLabels,
    Save,
    best_of,
    prompts_of_turn,
    question_key,
)
from preceptor.teachers.label_store import Label, LabelStore, LabelStoreKey, read_labels
from tests.grounding.asked_data import data, image

KEY = LabelStoreKey("a-model", {"kind": "endpoint", "temperature": 0.0})


class Parrot:
    """Answer with the question in capitals and a known confidence; fail for keys in `mute`."""

    def __init__(self, mute: Collection[str] = (), cache_key: LabelStoreKey = KEY, stop_after: int = 10**9) -> None:
        self.cache_key, self.mute, self.stop_after = cache_key, mute, stop_after
        self.asked: list[Prompt] = []

    def answer(self, prompts: Sequence[Prompt], known: Collection[str], save: Save) -> Mapping[str, str]:
        for prompt in prompts:
            if prompt.key in known or prompt.key in self.mute:
                continue
            if len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(prompt)
            answer = prompt.dialogue.turns[-1][0].upper()
            save([Label(prompt.key, prompt.turn, answer, True, 4, 0.9, 0.8, "top_logprobs", (-0.1,) * 4)])
        return {prompt.key: "mute" for prompt in prompts if prompt.key in self.mute}


def content(folder: Path) -> list[Label]:
    return sorted(read_labels(folder), key=lambda label: label.key)


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
    assert taught.unanswered == {"mute": 1, "an earlier question of the dialogue has no usable answer": 1}
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
    everything = b" ".join(file.name.encode() + file.read_bytes() for file in (tmp_path / "store").iterdir())
    for name in ("smith", "jones", "miller", str(tmp_path)):
        assert name.encode() not in everything


@pytest.mark.parametrize(
    ("cache_key", "message"),
    [
        (LabelStoreKey("b-model", KEY.settings), "teacher: cached a-model, wanted b-model"),
        (LabelStoreKey("a-model", {**KEY.settings, "temperature": 0.7}), "temperature: cached 0.0, wanted 0.7"),
        (LabelStoreKey("a-model", {"temperature": 0.0}), "kind: cached endpoint, wanted nothing"),
    ],
)
def test_another_teacher_or_setting_is_refused_by_name(tmp_path, cache_key, message):
    whole = data(tmp_path / "images", 1)
    teach(tmp_path / "store", whole, whole.samples, Parrot())
    before = content(tmp_path / "store")
    with pytest.raises(UserError, match=message):
        teach(tmp_path / "store", whole, whole.samples, Parrot(cache_key=cache_key))
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
    with LabelStore.open(tmp_path / "store", KEY, {}) as store:
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
    with_cut = PseudoLabels.open(tmp_path / "store", whole, allow_truncated=True)
    assert [row.confidence for row in with_cut.labelled] == [0.5, 0.7]


def test_confidence_of_a_dialogue_is_the_mean_over_its_tokens(tmp_path):
    whole = data(tmp_path / "images", 1, 1)
    dialogue = replace(whole.samples[0], turns=(("a?", "x"), ("b?", "y")))
    whole.samples = [dialogue]
    one, two = ContentHashes().keys(dialogue)
    with LabelStore.open(tmp_path / "store", KEY, {}) as store:
        store.append(
            [
                Label(one, 0, "p", True, 1, 1.0, 0.6, "top_logprobs"),
                Label(two, 1, "q", True, 3, 0.2, 0.2, "top_logprobs"),
            ]
        )
    confidence, margin = PseudoLabels.open(tmp_path / "store", whole).confidence_and_margin()
    assert confidence.tolist() == pytest.approx([0.4])  # (1.0 + 3 * 0.2) / 4
    assert margin.tolist() == pytest.approx([0.3])


def test_unknown_confidence_is_refused_or_replaced(tmp_path):
    whole = data(tmp_path / "images", 1, 2)
    keys = [ContentHashes().keys(dialogue)[0] for dialogue in whole.samples]
    with LabelStore.open(tmp_path / "store", KEY, {}) as store:
        store.append([Label(keys[0], 0, "yes", True), Label(keys[1], 0, "no", True, 2, 0.75, 0.5, "logprobs")])
    labels = PseudoLabels.open(tmp_path / "store", whole)
    with pytest.raises(UserError, match="1 of 2 pseudo-labels have no confidence"):
        labels.confidence_and_margin()
    confidence, margin = labels.confidence_and_margin(unknown=0.125)
    assert confidence.tolist() == [0.125, 0.75]
    assert margin.tolist() == [0.125, 0.5]


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
