"""Every model of a run gets its own tokens and pixels, and teachers that do not fit are refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertModel, ViTConfig, ViTImageProcessor, ViTModel

from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.errors import UserError
from preceptor.teachers.online import weights_fingerprint
from preceptor.vqa.bundle import VqaBundle, build_bundle, image_processor, make_tokenizer
from preceptor.vqa.config import VqaRecipe
from preceptor.vqa.dataset import Preprocessing
from preceptor.vqa.experiment import VqaExperiment
from preceptor.vqa.teachers import online_teacher

QUESTIONS = ["is it bright on the left side?", "which plane is it?"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODEL = {
    "vision": {"conv": {"channels": [4, 8], "blocks": [1, 1], "token_stages": [1]}},
    "text": {"scratch": {"embedding": 8, "width": 8, "layers": 1, "heads": 1}},
    "width": 8,
    "layers": 1,
    "heads": 1,
    "dropout": 0.0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table of questions, two text encoders with different tokens, and a vision backbone with ImageNet statistics."""
    (tmp_path / "data").mkdir()
    rng, rows = np.random.default_rng(0), []
    for number, split in enumerate(["train"] * 6 + ["validation"] * 2 + ["test"] * 2):
        image = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
        image.save(tmp_path / "data" / f"{number}.png")
        question, answer = QUESTIONS[number % 2], ("yes", "axial", "no")[number % 3]
        rows.append([f"{number}.png", question, answer, split, str(number)])
    with (tmp_path / "data" / "questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "question", "answer", "split", "group"], *rows])
    torch.manual_seed(0)
    for name, questions in (("bert", ["which side is it on?"] * 2), ("bert2", ["a b c which is on side it left?"] * 2)):
        tokenizer = make_tokenizer(questions)
        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        BertModel(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    ViTModel(ViTConfig(image_size=32, patch_size=16, **size)).save_pretrained(tmp_path / "vit")
    settings = image_processor(Preprocessing(32, MEAN, STD))
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    return tmp_path


def recipe(folder: Path, *stages: str, runs: tuple[str, ...] = (), student=None, teacher=None, **data) -> VqaRecipe:
    """Return a recipe. `student` and `teacher` are the names of the pretrained text and vision encoder, or None."""

    def model(names: tuple[str | None, str | None] | None) -> dict:
        text, vision = names or (None, None)
        parts = {
            "text": MODEL["text"] | ({"pretrained": [str(folder / text)]} if text else {}),
            "vision": {"pretrained": str(folder / vision)} if vision else MODEL["vision"],
        }
        return {"model": MODEL | parts}

    return VqaRecipe.model_validate(
        {
            "name": "context",
            "output": str(folder / "run"),
            "stages": list(stages),
            "data": {"name": "table", "root": str(folder / "data"), "image_size": 32, "augment": {"enabled": False}}
            | data,
            "teacher": model(teacher),
            "student": model(student),
            "method": {"name": "kd", "teaching": {"runs": [str(folder / run) for run in runs]}},
        }
    )


def save_teacher(folder: Path, name: str, *, answers=None, questions=None, **kwargs) -> VqaBundle:
    """Save an untrained teacher of the data, or of data with other answers or questions."""
    made = recipe(folder, "teacher", **kwargs)
    context = VqaExperiment.read(made).context
    vocabulary = AnswerVocabulary(answers) if answers else context.vocabulary
    tokenizer = make_tokenizer(questions) if questions else context.tokenizer
    config = made.teacher.model
    bundle = build_bundle(config, tokenizer, context.preprocessing(config), vocabulary, seed=1)
    bundle.save(folder / name / "model")
    return bundle


# The encoders of a student


def check_own_encoders(folder: Path, made: VqaRecipe) -> None:
    context = VqaExperiment.read(made).context
    bundle = context.new_bundle(made.student, 0)
    examples = context.training_examples(0)
    batch = examples.collate([examples[0]])
    own = AutoTokenizer.from_pretrained(folder / "bert")
    assert batch["input_ids"].tolist() == own([examples.samples[0].question])["input_ids"]
    with Image.open(examples.samples[0].image) as image:
        want = ViTImageProcessor.from_pretrained(folder / "vit")(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixels"], want, atol=1e-5, rtol=0)
    assert (bundle.preprocessing.mean, bundle.preprocessing.std) == (MEAN, STD)
    assert bundle.tokenizer.get_vocab() == own.get_vocab()


def test_a_backbone_may_read_pixels_that_are_not_normalized(folder):
    settings = folder / "vit" / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_normalize": False}))
    made = recipe(folder, "baseline", student=(None, "vit"))
    examples = VqaExperiment.read(made).context.training_examples(0)
    with Image.open(examples.samples[0].image) as image:
        want = ViTImageProcessor.from_pretrained(folder / "vit")(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(examples.collate([examples[0]])["pixels"], want, atol=1e-5, rtol=0)


def test_a_student_without_a_teacher_gets_the_tokens_and_pixels_of_its_encoders(folder):
    check_own_encoders(folder, recipe(folder, "baseline", student=("bert", "vit")))
    moving = recipe(folder, "baseline", student=("bert", "vit"))
    moving.stages, moving.method.teaching.kind = ("baseline", "distilled"), "ema"
    check_own_encoders(folder, moving)


@pytest.mark.parametrize("stages", [("baseline",), ("teacher", "baseline", "distilled")])
def test_a_student_from_scratch_gets_those_of_the_teacher(folder, stages):
    """A baseline that is trained alone reads what the distilled student reads."""
    check_own_encoders(folder, recipe(folder, *stages, teacher=("bert", "vit")))


def test_the_encoders_of_a_student_may_have_the_tokens_of_the_teacher(folder):
    check_own_encoders(folder, recipe(folder, "teacher", "distilled", teacher=("bert", "vit"), student=("bert", None)))


def test_a_student_with_other_tokens_than_its_teacher_is_refused(folder):
    made = recipe(folder, "teacher", "distilled", teacher=("bert", None), student=("bert2", None))
    with pytest.raises(UserError, match=r"bert2' of student\.model was pretrained with other tokens .*teacher\.model"):
        _ = VqaExperiment.read(made).context.tokenizer
    # The tokenizer of a teacher from scratch is built from the questions.
    made = recipe(folder, "teacher", "baseline", student=("bert", None))
    with pytest.raises(UserError, match=r"student\.model\.text\.pretrained=\[\]"):
        next(VqaExperiment.read(made).trainings(VqaExperiment(made, None).stages()[0], folder / "run"))
    save_teacher(folder, "a", teacher=("bert", None))
    made = recipe(folder, "distilled", runs=("a",), student=("bert2", None))
    with pytest.raises(UserError, match=r"other tokens than those of method\.teaching\.runs\[0\]"):
        VqaExperiment.read(made).require_checkpoints()


def test_the_model_of_another_stage_is_not_compared(folder):
    made = recipe(folder, "teacher", teacher=("bert", None), student=("bert2", None))
    own = AutoTokenizer.from_pretrained(folder / "bert")
    assert VqaExperiment.read(made).context.tokenizer.get_vocab() == own.get_vocab()


@pytest.mark.parametrize("stage", ["teacher", "baseline"])
def test_encoders_without_a_tokenizer_or_normalization_are_refused(folder, stage):
    side = "teacher" if stage == "teacher" else "student"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "bert" / file).unlink()
    made = recipe(folder, stage, **{side: ("bert", None)})
    with pytest.raises(UserError, match=r"bert' has no tokenizer"):
        _ = VqaExperiment.read(made).context.tokenizer
    made = recipe(folder, stage, **{side: (None, "vit")})
    context = VqaExperiment.read(made).context
    settings = folder / "vit" / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"image_mean": None}))
    with pytest.raises(UserError, match=r"vit' is unknown: its preprocessor_config\.json"):
        context.preprocessing(getattr(made, side).model)
    settings.unlink()
    with pytest.raises(UserError, match=r"vit' is unknown: its preprocessor_config\.json"):
        context.preprocessing(getattr(made, side).model)


# Teachers that are trained already


@pytest.mark.parametrize("student", [None, (None, "vit")])
def test_a_teacher_sees_the_pixels_that_it_was_trained_with(folder, student):
    """The student and the teacher have different statistics; the oracle is the teacher on inputs of its own."""
    own = save_teacher(folder, "a", teacher=None if student else (None, "vit"))
    made = recipe(folder, "distilled", runs=("a",), student=student)
    experiment = VqaExperiment.read(made)
    source, _ = online_teacher(experiment.teacher_folders(), experiment.context)
    examples = experiment.context.training_examples(0)
    batch = examples.collate([examples[n] for n in range(6)])
    direct = own.examples(examples.samples, made.data)
    pixels = direct.collate([direct[n] for n in range(6)])["pixels"]
    assert (pixels - batch["pixels"]).abs().max() > 0.1
    with torch.no_grad():
        want = own.model.eval()(pixels, batch["input_ids"], batch["attention_mask"]).logits
        wrong = own.model(batch["pixels"], batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(source.signal(batch).logits, want, atol=1e-5, rtol=1e-5)
    assert (wrong - want).abs().max() > 1e-3
    assert source.fingerprint != weights_fingerprint(own.model), "a cache without the conversion is another one"


def test_a_teacher_with_the_same_pixels_is_used_as_it_is(folder):
    own = save_teacher(folder, "a", teacher=("bert", "vit"))
    made = recipe(folder, "distilled", runs=("a", "a"), teacher=("bert", "vit"))
    experiment = VqaExperiment.read(made)
    experiment.require_checkpoints()
    source, _ = online_teacher(experiment.teacher_folders(), experiment.context)
    assert [one.fingerprint for one in source.sources] == [weights_fingerprint(own.model)] * 2


@pytest.mark.parametrize(("key", "value"), [("max_question_tokens", 30), ("image_size", 48)])
def test_a_teacher_with_inputs_of_another_size_is_refused(folder, key, value):
    save_teacher(folder, "a", **{key: value})
    save_teacher(folder, "b")
    made = recipe(folder, "baseline", "distilled", runs=("b", "a"))
    with pytest.raises(UserError, match=rf"teacher .*/a was trained with data\.{key}={value}, .*set data\.{key}="):
        VqaExperiment.read(made).require_checkpoints()  # before the baseline is trained
    VqaExperiment.read(recipe(folder, "baseline", "distilled", runs=("a",), **{key: value})).require_checkpoints()


def test_teachers_with_other_answers_or_tokens_are_refused(folder):
    answers = list(save_teacher(folder, "a").vocabulary.answers)
    save_teacher(folder, "reversed", answers=answers[::-1])
    save_teacher(folder, "more", answers=[*answers, "coronal"])
    # As many tokens, of which one is another.
    save_teacher(folder, "asked", questions=[question.replace("plane", "organ") for question in QUESTIONS] * 3)
    for other, reason in (
        ("reversed", "/reversed has 3 answers and the training data 3, or they differ in order"),
        ("more", "/more has 4 answers and the training data 3"),
        ("asked", "/asked was trained with other tokens than .*/a,"),
    ):
        experiment = VqaExperiment.read(recipe(folder, "distilled", runs=("a", other)))
        with pytest.raises(UserError, match=reason):
            experiment.require_checkpoints()
        with pytest.raises(UserError, match=reason):
            online_teacher(experiment.teacher_folders(), experiment.context)
