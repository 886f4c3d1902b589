from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from preceptor.data.images import ImageError
from preceptor.data.types import Sample
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.vqa import dataset
from preceptor.vqa.bundle import make_tokenizer
from preceptor.vqa.config import AugmentConfig, DataConfig
from preceptor.vqa.dataset import Preprocessing, VqaExamples, augment, check_questions, resize, tokenize


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    rng = np.random.default_rng(0)
    found = []
    for i in range(6):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (40, 30), dtype=np.uint8)).save(path)
        question = "what is it?" if i % 2 else "is there a lesion on the left side?"
        found.append(Sample(f"q{i}", path, question, ("yes" if i % 2 else "no",), "closed", str(i), "train"))
    return found


def examples(samples, *, seed=0, **data) -> VqaExamples:
    tokenizer = make_tokenizer([s.question for s in samples] * 3)
    return VqaExamples(
        samples,
        tokenizer,
        AnswerVocabulary(["yes", "no"]),
        Preprocessing(24),
        DataConfig(**data),
        augmented=True,
        seed=seed,
    )


def test_views_repeat_with_their_period_and_differ_within_it(samples):
    few = examples(samples, augment={"views": 3})
    pictures = [few[(0, epoch)]["image"] for epoch in range(6)]
    keys = [few[(0, epoch)]["key"] for epoch in range(6)]
    assert all(np.array_equal(pictures[i], pictures[i + 3]) and keys[i] == keys[i + 3] for i in range(3))
    assert len(set(keys)) == 3
    assert not np.array_equal(pictures[0], pictures[1])
    endless = examples(samples, augment={"views": 0})
    assert len({endless[(0, epoch)]["key"] for epoch in range(6)}) == 6


def test_batches_of_cached_views_are_those_of_views_computed_anew(samples, monkeypatch):
    """Byte for byte, over several epochs, whether all, some or none of the views fit into memory."""
    samples = [*samples, *(replace(sample, id=f"again-{sample.id}") for sample in samples)]
    order = [(index, epoch) for epoch in range(5) for index in range(len(samples))]
    lists = [order[start : start + 8] for start in range(0, len(order), 8)]
    found = {}
    one = 24 * 24 * 3
    for views, limit in itertools.product((3, 0), (0, 5 * one, 2**30)):
        monkeypatch.setattr(dataset, "VIEW_BYTES", limit)
        data = examples(samples, augment={"views": views})
        found[views, limit] = [data.collate([data[item] for item in items]) for items in lists]
        held = list(data._views.values())
        assert len(held) == (0 if views == 0 else min(3 * 6, limit // one)), "each view of an image is held once"
        assert all(view.dtype == np.uint8 for view in held)
    for views in (3, 0):
        want = found[views, 0]
        for limit in (5 * one, 2**30):
            for a, b in zip(want, found[views, limit], strict=True):
                assert (a.ids, a.keys) == (b.ids, b.keys)
                assert all(torch.equal(a[name], b[name]) for name in a.tensors)


def test_a_view_is_warped_once(samples, monkeypatch):
    calls = []
    monkeypatch.setattr(dataset, "augment", lambda image, *_: calls.append(1) or image)
    data = examples(samples, augment={"views": 2})
    for epoch in range(6):
        for index in range(len(samples)):
            data[(index, epoch)]
    assert len(calls) == 2 * len(samples)


def test_cached_views_are_the_same_for_every_seed_and_endless_ones_are_not(samples):
    def picture(seed, views):
        return examples(samples, seed=seed, augment={"views": views})[(0, 0)]["image"]

    assert np.array_equal(picture(0, 2), picture(1, 2))
    assert not np.array_equal(picture(0, 0), picture(1, 0))


def test_a_key_follows_content_and_not_position(samples, tmp_path):
    one = examples(samples)
    other = examples(samples[::-1])
    assert one[(0, 0)]["key"] == other[(5, 0)]["key"]
    keys = {one[(i, 0)]["key"] for i in range(6)}
    assert len(keys) == 6
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(samples[0].image)
    assert examples(samples)[(0, 0)]["key"] not in keys


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(samples, workers: int):
    lists = [[(0, 0), (1, 0), (2, 1)], [(3, 1), (4, 2), (5, 2)]]
    want = [examples(samples).collate([examples(samples)[item] for item in items]) for items in lists]
    got = list(examples(samples).loader(lists, workers))
    for a, b in zip(want, got, strict=True):
        assert a.ids == b.ids
        assert a.keys == b.keys
        assert all(torch.equal(a[name], b[name]) for name in a.tensors)


def test_padding_and_labels(samples):
    batch = examples(samples, augment={"enabled": False}).collate([examples(samples)[(i, 0)] for i in range(2)])
    assert batch["labels"].tolist() == [1, 0]
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths[0] > lengths[1]
    assert batch["input_ids"].shape[1] == lengths[0]
    assert batch["attention_mask"][1].tolist() == [1] * lengths[1] + [0] * (lengths[0] - lengths[1])
    assert batch["pixels"].shape == (2, 3, 24, 24)


def test_broken_raise_or_are_skipped(samples):
    samples[2].image.write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"2\.png"):
        examples(samples)[(2, 0)]
    lenient = examples(samples, broken="skip")
    batch = lenient.collate([lenient[(i, 0)] for i in range(4)])
    assert batch.skipped == ["q2"]
    assert batch.ids == ["q0", "q1", "q3"]


def test_no_augmentation_is_the_identity_and_left_stays_left():
    image = np.zeros((32, 32, 3), np.uint8)
    image[8:24, 4:12] = 200
    still = AugmentConfig(shift=0, scale=0, rotate=0, contrast=0, brightness=0)
    assert np.array_equal(augment(image, still, np.random.default_rng(0)), image)
    for seed in range(30):
        moved = augment(image, AugmentConfig(), np.random.default_rng(seed)).astype(float)
        moved -= moved.min()
        assert moved[:, :16].sum() > 5 * moved[:, 16:].sum()


def test_a_shift_moves_by_its_share():
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 20] = 255
    config = AugmentConfig(shift=0.2, scale=0, rotate=0, contrast=0, brightness=0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        y, x = np.argwhere(augment(image, config, rng)[..., 0] > 30).mean(0)
        assert abs(y - 20) <= 0.2 * 41 + 1
        assert abs(x - 20) <= 0.2 * 41 + 1


def test_resize_gives_rgb_of_the_side():
    assert resize(Image.new("L", (50, 20), 7), 16).tolist() == [[[7, 7, 7]] * 16] * 16


HISTORY = "The patient has a history of cough and fever. "


def ask(*questions: str) -> list[Sample]:
    return [Sample(f"q{i}", Path("a.png"), text, ("yes",), "closed", "", "train") for i, text in enumerate(questions)]


@pytest.fixture(params=["fast", "python"])
def any_tokenizer(request):
    if request.param == "fast":
        return make_tokenizer([HISTORY * 2 + "is there a lesion? where is it?"] * 2)
    from transformers import CanineTokenizer

    return CanineTokenizer()


def test_truncated_questions_are_counted_with_those_that_become_equal(any_tokenizer):
    left, right = HISTORY + "Is there a lesion on the left?", HISTORY + "Is there a lesion on the right?"
    samples = ask(left, right, left, "Where is it? " + HISTORY * 3, "Is it?", "")
    (finding,) = check_questions(samples, any_tokenizer, 10)
    assert (finding.severity, finding.file) == ("warning", None)
    assert finding.sample_ids == ("q0", "q1", "q2", "q3")
    assert finding.reason.startswith(
        "4 of 5 questions have more than 10 tokens and are truncated, 3 of them to the tokens of another question; "
    )
    assert check_questions(samples, any_tokenizer, 512) == []
    assert check_questions([], any_tokenizer, 10) == []


def test_a_question_of_exactly_the_limit_is_not_truncated():
    tokenizer = make_tokenizer(["is it a lesion on the left"] * 2)
    samples = ask("is it a lesion", "is it a lesion on the left")
    assert check_questions(samples[:1], tokenizer, 6) == []
    (finding,) = check_questions(samples, tokenizer, 6)
    assert finding.sample_ids == ("q1",)
    assert "1 of 2 questions have more than 6 tokens and are truncated, 1 of them to the tokens" in finding.reason
    assert "to the tokens of another" not in check_questions(samples, tokenizer, 7)[0].reason


def test_questions_that_are_equal_without_truncation_are_not_counted_as_made_equal():
    """The tokenizer ignores case, so these two are one question to the model with any limit."""
    tokenizer = make_tokenizer(["is it a lesion on the left"] * 2)
    (finding,) = check_questions(ask("is it a lesion on the left", "Is it a LESION on the left"), tokenizer, 6)
    assert "2 of 2" in finding.reason
    assert "another question" not in finding.reason


def test_tokens_are_those_of_one_truncated_call(samples):
    tokenizer = make_tokenizer([sample.question for sample in samples])
    questions = [sample.question for sample in samples]
    tokens, removed = tokenize(tokenizer, questions, 6)
    assert tokens == tokenizer(questions, truncation=True, max_length=6)["input_ids"]
    whole = tokenizer(questions)["input_ids"]
    assert [bool(ids) for ids in removed] == [len(ids) > 6 for ids in whole]
    data = VqaExamples(
        samples, tokenizer, AnswerVocabulary(["yes", "no"]), Preprocessing(24, max_question_tokens=6), DataConfig()
    )
    assert data.tokens == tokens
    assert data.truncated == [len(ids) > 6 for ids in whole]
