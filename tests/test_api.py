"""The Python API: offline and online, devices, and arguments that it does not know."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

import preceptor
from preceptor import api, hub
from preceptor.errors import UserError
from preceptor.prediction_inputs import NO_INPUTS
from tests.command_line import call
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


QUESTION: dict[str, Any] = {"image": templates() / "image.png", "question": "Where is the disc?"}


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
    rows = preceptor.predict(templates() / "vqa", **(NO_INPUTS | QUESTION))
    assert rows == preceptor.predict(templates() / "vqa", **QUESTION)


def test_an_unknown_option_of_audit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"audit has no option 'outptu'; did you mean 'output'\?"):
        preceptor.audit(tmp_path / "table.csv", outptu=tmp_path)


# Wrong arguments

IMAGE = QUESTION["image"]
ARRAY = np.zeros((8, 8), np.uint8)
PAIRS = "questions must be a list of pairs (image, question), but one of its elements is "


def vqa() -> Any:
    return preceptor.load(templates() / "vqa")


def grounding() -> Any:
    return preceptor.load(templates() / "grounding")


def segmentation() -> Any:
    return preceptor.load(templates() / "segmentation")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: vqa().answer(IMAGE, "Where?", top=0), "top must be a whole number of 1 or more, not 0"),
        (lambda: vqa().answer(IMAGE, "Where?", top=-1), "top must be a whole number of 1 or more, not -1"),
        (lambda: vqa().answer(IMAGE, "Where?", top="3"), "top must be a whole number of 1 or more, not '3'"),
        (lambda: vqa().answer(ARRAY, "Where?"), "the image must be the path of a file or folder, not ndarray"),
        (lambda: vqa().answer(IMAGE, None), "the question must be a text, not None"),
        (lambda: vqa().answer(IMAGE, " "), "the question is empty"),
        (lambda: vqa().answer("a\0b.png", "Where?"), r"the image 'a\x00b.png' contains a NUL character"),
        (lambda: vqa().answer_many([(IMAGE, "?")], batch_size=0), "batch_size must be a whole number of 1 or more"),
        (lambda: vqa().answer_many([(IMAGE, "?")], batch_size=-1), "batch_size must be a whole number of 1 or more"),
        (lambda: grounding().ask_many([(IMAGE, "?")], batch_size=0), "batch_size must be a whole number of 1 or more"),
        (lambda: grounding().ask_many([(IMAGE, "?")], batch_size=1.5), "batch_size must be a whole number of 1 or"),
        (lambda: grounding().ask([], "Where?"), "no image was given; give at least one"),
        (lambda: grounding().ask(IMAGE, "Where?", max_new_tokens=0), "max_new_tokens must be a whole number of 1 or"),
        (lambda: grounding().ask(IMAGE, None), "the question must be a text, not None"),
        (lambda: grounding().ask(IMAGE, "?", history=[("\ud800", "a")]), r"history contains '\ud800', which is not"),
        (lambda: vqa().answer_many((IMAGE, "?")).__next__(), PAIRS),
        (lambda: vqa().answer_many([IMAGE]).__next__(), PAIRS),
        (lambda: vqa().answer_many(["ab"]).__next__(), "questions must be a list of pairs (image, question), but one "),
        (lambda: vqa().answer_many([(IMAGE, "?", "!")]).__next__(), PAIRS),
        (lambda: vqa().answer_many([QUESTION]).__next__(), PAIRS),
        (lambda: vqa().answer_many([{IMAGE, "?"}]).__next__(), PAIRS),
        (lambda: vqa().answer_many({IMAGE: "?"}), "questions must be a list of pairs (image, question), not dict"),
        (lambda: vqa().answer_many(None), "questions must be a list of pairs (image, question), not None"),
        (lambda: grounding().ask_many([QUESTION]).__next__(), PAIRS),
        (lambda: grounding().ask_many(3), "questions must be a list of pairs (image, question), not 3"),
        (lambda: grounding().ask(IMAGE, "?", history=["x"]), "history must be a list of pairs (question, answer), but"),
        (lambda: grounding().ask(IMAGE, "?", history="xy"), "history must be a list of pairs (question, answer), not"),
        (lambda: list(segmentation().segment_many(3)), "case must be a list, not 3"),
        (lambda: preceptor.serve(templates() / "vqa", port="80"), "port must be a whole number, not '80'"),
        (lambda: preceptor.serve(templates() / "vqa", token=5), "token must be a text, not 5"),
        (lambda: preceptor.serve(templates() / "vqa", host=None), "host must be a text, not None"),
        (lambda: preceptor.check("mhkd-demo", budget="x"), "budget must be above 0 and at most 1, not 'x'"),
        (lambda: preceptor.check("mhkd-demo", budget=float("nan")), "budget must be above 0 and at most 1, not nan"),
        (lambda: preceptor.cache("mhkd-demo", verify="0.1"), "verify must be from 0 to 1, not '0.1'"),
        (lambda: preceptor.cache("mhkd-demo", verify=-1), "verify must be from 0 to 1, not -1"),
        (lambda: preceptor.evaluate(templates() / "vqa", protocol=3), "protocol must be a text, not 3"),
        (lambda: preceptor.compare("runs/a", protocol=3), "protocol must be a text, not 3"),
        (lambda: preceptor.compare("runs/a", baseline=3), "baseline must be a text, not 3"),
        (lambda: preceptor.push_to_hub(templates() / "vqa", "a/b", token=3), "token must be a text, not 3"),
        (lambda: segmentation().segment([]), "no file was given; give the files of a case, or its folder"),
        (lambda: segmentation().segment({}), "no file was given; give at least one of flair, t1"),
        (lambda: segmentation().segment({"flair": None}), "flair must be the path of a file or folder, not None"),
        (lambda: segmentation().segment(ARRAY), "a file of the case must be the path of a file or folder, not ndarray"),
        (lambda: preceptor.load(None), "run must be the path of a file or folder, not None"),
        (lambda: preceptor.load("a\0b"), r"run 'a\x00b' contains a NUL character"),
        (lambda: preceptor.predict("x", image=[IMAGE, IMAGE], question="?"), "image must be the path of a file or"),
        (lambda: preceptor.predict("x", image=IMAGE, question=5), "question must be a text, not 5"),
        (lambda: preceptor.predict("x", **QUESTION, top=0), "top must be a whole number of 1 or more, not 0"),
        (lambda: preceptor.predict("x", files={"flair": None}), "files['flair'] must be the path of a file or folder"),
        (lambda: preceptor.predict("x", files=["a.nii"]), "files must be a mapping of modalities to paths, not list"),
        (lambda: preceptor.predict("x", case=[None]), "case must be the path of a file or folder, not None"),
        (lambda: preceptor.predict(templates() / "vqa", image=IMAGE), "a VQA model needs --image FILE_OR_FOLDER with"),
        (lambda: preceptor.compare([]), "no run was given; give the output folder of at least one training"),
        (lambda: preceptor.compare(5), "runs must be a list, not 5"),
        (lambda: preceptor.compare("runs/vqa"), "there is no run folder runs/vqa; give the output folder of a train"),
        (lambda: preceptor.compare(Path("runs/a")), "there is no run folder runs/a; give the output folder of a train"),
        (lambda: preceptor.export(templates() / "vqa", None), "output must be the path of a file or folder, not None"),
        (lambda: preceptor.score(None, "a/b/c"), "predictions must be the path of a file or folder, not None"),
        (lambda: preceptor.score(IMAGE, None), "protocol must be a text, not None"),
        (
            lambda: preceptor.train("mhkd-demo", "seed=3"),
            "overrides must be a list or a mapping, not the text 'seed=3'",
        ),
        (lambda: preceptor.train("mhkd-demo", [3]), "an override must be a text, not 3"),
        (lambda: preceptor.audit("vqa-rad", "data.variant=x"), "overrides must be a list or a mapping, not the text"),
        (lambda: preceptor.check("mhkd-demo", seeds="2"), "seeds must be a whole number of 1 or more, not '2'"),
    ],
)
def test_a_wrong_argument_is_named_in_one_sentence(wrong: Callable[[], Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        wrong()
    assert str(error.value).startswith(says)


def test_pairs_may_be_lists_rows_of_arrays_or_generated() -> None:
    expected = vqa().answer(IMAGE, "Where?").alternatives
    pairs: tuple[Any, ...] = (
        [[str(IMAGE), "Where?"]],
        np.array([[IMAGE, "Where?"]], object),
        iter([(IMAGE, "Where?")]),
    )
    for questions in pairs:
        assert [answer.alternatives for answer in vqa().answer_many(questions)] == [expected]


def test_one_case_may_be_given_without_a_list() -> None:
    file = templates() / "p0_flair.nii"
    for cases in ({"flair": file}, [{"flair": file}], file, [file]):
        (found,) = segmentation().segment_many(cases)
        assert found.modalities == "flair"


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "a.png").write_bytes(IMAGE.read_bytes())
    (tmp_path / "home" / "flair.nii").write_bytes((templates() / "p0_flair.nii").read_bytes())
    preceptor.predict(templates() / "vqa", image="~/a.png", question="Where?", output="~/answers.jsonl")
    segmentation().segment({"flair": "~/flair.nii"}).save("~/mask.nii.gz")
    assert {"answers.jsonl", "mask.nii.gz"} <= {path.name for path in (tmp_path / "home").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    with pytest.raises(UserError, match=f"{tmp_path}/home/none.yaml"):
        preceptor.train("~/none.yaml")
    (tmp_path / "~no-such-user").mkdir()
    (tmp_path / "~no-such-user" / "a.png").write_bytes(IMAGE.read_bytes())
    assert vqa().answer("~no-such-user/a.png", "Where?").id == "a.png"


@pytest.mark.parametrize(
    ("seeds", "says"),
    [
        ([-1], "seeds contains -1; a seed is a whole number from 0 to 4294967295"),
        ([0, 1.5], "seeds contains 1.5; a seed is a whole number from 0 to 4294967295"),
        ([2**32], "seeds contains 4294967296; a seed is a whole number from 0 to 4294967295"),
        ([True], "seeds contains True; a seed is a whole number from 0 to 4294967295"),
        ("12", "seeds contains '12'; a seed is a whole number from 0 to 4294967295"),
        (1.5, "seeds must be a list, not 1.5"),
        ([], "seeds must be at least one number, each once, not []"),
        ([1, 1], "seeds must be at least one number, each once, not [1, 1]"),
        (0, "seeds must be at least one number, each once, not 0"),
    ],
)
def test_seeds_are_checked_before_a_folder_is_made(tmp_path: Path, seeds: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        preceptor.train("mhkd-demo", {"output": tmp_path / "run"}, seeds=seeds)
    assert str(error.value) == says
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_and_names_of_files_in_any_bytes_are_accepted(tmp_path: Path) -> None:
    image = tmp_path / os.fsdecode(b"\xff.png")
    image.write_bytes(IMAGE.read_bytes())
    expected = vqa().answer(IMAGE, "Wo ist die Lésion? 病变")
    found = vqa().answer(str(image), "Wo ist die Lésion? 病变", top=np.int64(3))
    assert found.alternatives == expected.alternatives
    assert len(vqa().answer(IMAGE, "Where?", top=10**6).alternatives) == len(vqa().bundle.vocabulary.answers)


@pytest.mark.parametrize("task", ["vqa", "grounding"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_question_that_is_not_utf8_is_a_mistake_of_the_user(task: str, folder: bool, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(IMAGE.read_bytes())
    place = tmp_path if folder else image
    says = r"contains '\udcff', which is not a character but a byte that is not UTF-8, or half of a surrogate pair"
    code, _, err = call("predict", templates() / task, "--image", place, "--question", "\udcff lesion")
    assert code == 2
    assert f"error: question {says}" in err
    model = preceptor.load(templates() / task)
    ask = model.answer if task == "vqa" else model.ask
    with pytest.raises(UserError, match="the question contains"):
        ask(image, "\ud800")
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "question": "\\ud800 lesion"}\n')
    with pytest.raises(UserError, match="contains half of a surrogate pair"):
        preceptor.predict(templates() / task, table=tmp_path / "t.jsonl")


@pytest.mark.parametrize("modality", ["nonsense", "CT"])
def test_an_unknown_modality_is_refused_as_by_the_server(modality: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE.read_bytes())
    says = f"modality '{modality}' is not known"
    for place in (tmp_path, tmp_path / "a.png"):
        code, _, err = call(
            "predict", templates() / "grounding", "--image", place, "--question", "?", "--modality", modality
        )
        assert code == 2
        assert f"error: {says}" in err
    for wrong in (
        lambda: grounding().ask(IMAGE, "?", modality=modality),
        lambda: grounding().ask_many([(IMAGE, "?")], modality=modality),
    ):
        with pytest.raises(UserError, match=says):
            wrong()


def table(folder: Path) -> Path:
    folder.mkdir()
    rows = ["image,question,answer,split"]
    for number, split in enumerate(["train"] * 4 + ["validation"] * 2 + ["test"] * 2):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,is it bright?,{'yes' if number % 2 else 'no'},{split}")
    (folder / "questions.csv").write_text("\n".join(rows))
    return folder / "questions.csv"


def test_settings_of_a_table_may_be_a_mapping(tmp_path: Path) -> None:
    questions = table(tmp_path / "data")
    found = [
        preceptor.check(questions, settings)
        for settings in ({"data.max_image_pixels": 10}, ["data.max_image_pixels=10"])
    ]
    assert found[0] == found[1] != preceptor.check(questions)
    documents = [
        preceptor.audit(questions, settings, output=tmp_path / "audit")
        for settings in ({"data.max_image_pixels": 10}, ["data.max_image_pixels=10"])
    ]
    assert documents[0] == documents[1]
    assert [finding["check"] for finding in documents[0]["findings"] if finding["severity"] == "broken"] == ["broken"]
    with pytest.raises(
        UserError, match=r"override 'data=\{\}' would overwrite the earlier override of data\.image_size"
    ):
        preceptor.check(questions, ["data.image_size=32", "data={}"])
