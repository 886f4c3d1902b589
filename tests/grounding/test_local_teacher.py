from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from preceptor.cli.app import app
from preceptor.errors import UserError
from preceptor.grounding.curriculum import confidence_and_margin
from preceptor.grounding.labeling import teach
from preceptor.grounding.local_teacher import LocalTeacher, vlm_fingerprint
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.pseudo_labels import ContentHashes, PseudoLabels, prompts_of_turn
from preceptor.grounding.sources import read_dialogues
from preceptor.teachers.label_store import Label, read_labels
from tests.grounding.asked_data import data
from tests.grounding.speaking_vlm import speaking_vlm
from tests.grounding.test_teach_command import file_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return speaking_vlm(tmp_path_factory.mktemp("vlm") / "m")


@pytest.fixture(scope="module")
def vlm(folder) -> GroundedVlm:
    return GroundedVlm.load(folder)


def test_answers_are_the_models_with_their_confidence(vlm, tmp_path):
    """Confidence and margin against a forward pass over the answer, without a cache and without a batch."""
    whole = data(tmp_path / "images", 2, 2)
    teach(tmp_path / "store", whole, whole.samples, LocalTeacher(vlm, max_tokens=6, batch_size=3))
    labels = PseudoLabels.open(tmp_path / "store", whole, allow_truncated=True)
    assert len(labels.labelled) == 4
    assert len({d.turns[0][1] for d in labels.dialogues}) > 1
    assert labels.teacher == vlm_fingerprint(vlm)
    records = {label.key: label for label in read_labels(tmp_path / "store")}
    for prompt in prompts_of_turn(whole.samples, 0, ContentHashes(), {}):
        ((said,),) = vlm.generate([prompt.dialogue], max_new_tokens=6)
        label = records[prompt.key]
        assert (label.answer, label.tokens, label.ended) == (said.text, len(said.tokens), said.ended)
        row = vlm.encoder.collate([vlm.encoder.encode(prompt.dialogue, prompt=True)])
        start = row["input_ids"].shape[1]
        new = torch.tensor([said.tokens])
        row["input_ids"] = torch.cat([row["input_ids"], new], dim=1)
        for name in ("attention_mask", "mm_token_type_ids"):
            fill = torch.ones_like(new) if name == "attention_mask" else torch.zeros_like(new)
            row[name] = torch.cat([row[name], fill], dim=1)
        row.pop("labels")
        with torch.no_grad():
            logits = vlm.base(**row).logits
        confidence, margin = confidence_and_margin(logits[:, start - 1 : -1], torch.ones_like(new, dtype=torch.bool))
        assert label.confidence == pytest.approx(confidence.item(), abs=1e-5)
        assert label.margin == pytest.approx(margin.item(), abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "candidates": 3, "seed": 5}], ids=["greedy", "sampled"])
def test_an_interrupted_run_ends_with_the_answers_of_an_undisturbed_one(vlm, tmp_path, settings):
    whole = data(tmp_path / "images", 3, 3)

    class Cut(LocalTeacher):
        """Is interrupted after the first label of its second batch has been written."""

        def answer(self, prompts, known, keep):
            calls = 0

            def cut(labels: list[Label]) -> None:
                nonlocal calls
                calls += 1
                if calls == 2:
                    keep(labels[:1])
                    raise KeyboardInterrupt
                keep(labels)

            return super().answer(prompts, known, cut)

    many = {"max_tokens": 4, "batch_size": 4, **settings}
    with pytest.raises(KeyboardInterrupt):
        teach(tmp_path / "cut", whole, whole.samples, Cut(vlm, **many))
    assert len(list(read_labels(tmp_path / "cut"))) == 5
    assert teach(tmp_path / "cut", whole, whole.samples, LocalTeacher(vlm, **many)).answered == 4
    teach(tmp_path / "whole", whole, whole.samples, LocalTeacher(vlm, **many))
    cut, undisturbed = ({label.key: label for label in read_labels(tmp_path / name)} for name in ("cut", "whole"))
    assert cut == undisturbed
    if settings:
        assert any(len(set(label.candidates)) > 1 for label in read_labels(tmp_path / "whole"))


def test_long_dialogues_are_counted_and_do_not_stop_others(folder, tmp_path):
    vlm = GroundedVlm.load(folder, max_length=40)
    whole = data(tmp_path / "images", 1, 3)
    long = ("word " * 200, "truth")
    whole.samples[1] = type(whole.samples[1])(**{**vars(whole.samples[1]), "turns": (long,)})
    taught = teach(tmp_path / "store", whole, whole.samples, LocalTeacher(vlm, max_tokens=2))
    assert (taught.answered, taught.unanswered) == (2, {"longer than 40 tokens": 1})


def test_the_fingerprint_is_of_all_that_answers(folder, vlm):
    assert vlm_fingerprint(GroundedVlm.load(folder)) == vlm_fingerprint(vlm)
    other = GroundedVlm.load(folder)
    with torch.no_grad():
        other.lm_head_weight[0, 0] += 1
    pixels = GroundedVlm.load(folder, max_pixels=28 * 28)
    assert len({vlm_fingerprint(model) for model in (vlm, other, pixels)}) == 3


def test_a_system_prompt_is_said_first(vlm, tmp_path):
    whole = data(tmp_path / "images", 1, 1)
    for name, prompt in (("without", ""), ("with", "The liver is at the left of the image.")):
        teach(tmp_path / name, whole, whole.samples, LocalTeacher(vlm, max_tokens=4, system_prompt=prompt))
    without, told = (next(iter(read_labels(tmp_path / name))) for name in ("without", "with"))
    assert without.key == told.key
    assert without.confidence != told.confidence
    with pytest.raises(UserError, match="system_prompt: cached , wanted Look"):
        teach(tmp_path / "without", whole, whole.samples, LocalTeacher(vlm, max_tokens=4, system_prompt="Look"))


def test_wrong_settings_are_said(vlm):
    for settings in ({"candidates": 2}, {"max_tokens": 0}, {"batch_size": 0}, {"temperature": -1.0}):
        with pytest.raises(UserError, match="each number must be at least 1"):
            LocalTeacher(vlm, **settings)


def test_the_command(folder, tmp_path):
    file = file_of(tmp_path, 4)
    done = CliRunner().invoke(
        app,
        [
            "teach",
            str(file),
            "--teacher",
            str(folder),
            "--output",
            str(tmp_path / "store"),
            "--max-tokens",
            "3",
            "--min-usable",
            "0",
            "--limit",
            "3",
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["answered"], document["with_confidence"]) == (3, 3)
    labels = PseudoLabels.open(tmp_path / "store", read_dialogues(str(file)), allow_truncated=True)
    assert labels.left_out == {"not asked": 1}
