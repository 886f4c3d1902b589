"""The Python API: offline and online, devices, and arguments that it does not know."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import preceptor
from preceptor import api, hub
from preceptor.errors import UserError
from tests.fuzz.model_folders import templates


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process in which nothing was set yet, and huggingface_hub is imported."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_replaced", [])
    return monkeypatch


def state() -> tuple[str | None, bool]:
    return os.environ.get("HF_HUB_OFFLINE"), constants.HF_HUB_OFFLINE


def test_downloads_can_be_allowed_after_a_call_that_refuses_them_and_refused_again(
    environment: pytest.MonkeyPatch,
) -> None:
    for _ in range(2):
        api.keep_offline()
        api.keep_offline()
        assert state() == ("1", True)
        api.keep_offline(True)
        api.keep_offline(True)
        assert state() == (None, False)


@pytest.mark.parametrize(("name", "value"), [("HF_HUB_OFFLINE", "1"), ("TRANSFORMERS_OFFLINE", "yes")])
def test_the_environment_of_the_user_wins(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv(name, value)
    api.keep_offline()
    api.keep_offline(True)
    assert constants.HF_HUB_OFFLINE
    assert os.environ[name] == value


def test_a_value_of_the_user_is_restored(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HF_HUB_OFFLINE", "0")
    api.keep_offline()
    assert state() == ("1", True)
    api.keep_offline(True)
    assert state() == ("0", False)


@pytest.mark.parametrize("task", ["vqa", "segmentation", "grounding"])
@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_a_device_that_cannot_be_used_is_named_with_those_that_can(task: str, device: str) -> None:
    with pytest.raises(UserError, match=rf"the device '{device}' cannot be used here \(.+\); available: cpu"):
        preceptor.load(templates() / task, device)


def test_a_device_that_can_be_used() -> None:
    assert preceptor.load(templates() / "vqa", "cpu").device.type == "cpu"


QUESTION = {"image": templates() / "image.png", "question": "Where is the disc?"}


@pytest.mark.parametrize(
    ("task", "inputs", "says"),
    [
        ("segmentation", {"probabilty": True}, "predict has no input 'probabilty'; did you mean 'probabilities'?"),
        ("vqa", {**QUESTION, "tpo": 5}, "predict has no input 'tpo'; did you mean 'top'?"),
        ("vqa", {**QUESTION, "probabilities": True}, "probabilities does not apply to VqaModel; omit it"),
        ("vqa", {**QUESTION, "files": {"t1": "t1.nii.gz"}}, "files does not apply to VqaModel; omit it"),
        ("grounding", {**QUESTION, "top": 5}, "top does not apply to GroundingModel; omit it"),
    ],
)
def test_an_input_of_predict_that_would_be_ignored_is_refused(task: str, inputs: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        preceptor.predict(templates() / task, **inputs)
    assert str(error.value) == says


def test_a_question_with_a_modality_can_be_put_to_models_of_both_tasks() -> None:
    rows = preceptor.predict(templates() / "vqa", **QUESTION, modality="ct")
    assert rows == preceptor.predict(templates() / "vqa", **QUESTION)


def test_the_inputs_that_the_command_line_gives_for_all_tasks_are_accepted() -> None:
    rows = preceptor.predict(templates() / "vqa", **(api._NO_INPUTS | QUESTION))
    assert rows == preceptor.predict(templates() / "vqa", **QUESTION)


def test_an_unknown_option_of_audit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"audit has no option 'outptu'; did you mean 'output'\?"):
        preceptor.audit(tmp_path / "table.csv", outptu=tmp_path)
