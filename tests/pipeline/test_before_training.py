"""Mistakes that would stop a later stage are found before the first one is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

import preceptor
from preceptor.errors import UserError
from preceptor.pipeline import run as pipeline_run
from tests.fault.tiny import CLINKD, LCKD, RECIPE, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*_: object) -> None:
        raise AssertionError("a stage was trained")

    monkeypatch.setattr(pipeline_run, "run_stage", trained)


def train(folder: Path, text: str, *overrides: str) -> None:
    preceptor.train(write_recipe(folder, text), [f"output={folder / 'run'}", *overrides])


EVERY = "stages=[teacher, baseline, distilled]"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (RECIPE, ["student.train.trackers=[wandb]"], r"student\.train\.trackers names wandb, which is not installed"),
        (RECIPE, ["student.model.vision={pretrained: /nosuch}"], r"vision model '/nosuch' is neither a folder"),
        (
            RECIPE,
            ["method.hidden={weight: 0.5, layers: [[0, 5]]}"],
            r"layer pair \[0, 5\] is outside the networks: .* teacher 0 to 1",
        ),
        (RECIPE, ["method.losses=[{loss: 'json:loads'}]"], r"method\.losses\[0\]\.loss: json:loads is not a subclass"),
        (
            RECIPE,
            ["method.losses=[{loss: 'preceptor.distill:LossTerm', arguments: {a: 1}}]"],
            r"method\.losses\[0\]\.arguments: LossTerm does not accept \{'a': 1\}",
        ),
        (
            RECIPE,
            ["method.teaching={kind: cached, cache: /dev/null}", "data.augment.views=1"],
            r"/dev/null exists and is not a teacher cache",
        ),
        (
            RECIPE,
            ["method.teaching={kind: cached, cache: /proc/foo/cache}", "data.augment.views=1"],
            r"the folder /proc/foo/cache cannot be created \(No such file or directory\); choose another path",
        ),
        (
            RECIPE,
            ["method.teaching.kind=ema", "method.inherit_token_embeddings=true"],
            r"inherit_token_embeddings=true needs a trained teacher.*set method\.inherit_token_embeddings=false",
        ),
        (
            RECIPE,
            ["method.inherit_token_embeddings=true", "student.model.text.scratch.embedding=12"],
            r"method\.inherit_token_embeddings: the student embeds \d+ tokens in 12 dimensions",
        ),
        (LCKD, ["train.trackers=[wandb]"], r"train\.trackers names wandb"),
        (LCKD, ["method.losses=[{loss: 'json:loads'}]"], r"method\.losses\[0\]\.loss: json:loads is not a subclass"),
        (LCKD, ["model={net: early, channels: [4, 4, 8]}"], r"method\.cross_modal compares features"),
        (CLINKD, ["teacher.train.trackers=[wandb]"], r"teacher\.train\.trackers names wandb"),
        (
            CLINKD,
            ["method.similarity=/nosuch", "method.selection.candidates=3"],
            r"method\.similarity=/nosuch is not a folder",
        ),
        (CLINKD, ["method.guidance={kind: clip, scorer: /nosuch}"], r"/nosuch"),
    ],
)
def test_a_mistake_of_a_later_stage_is_found_first(tmp_path: Path, text: str, overrides, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(tmp_path, text, *([EVERY] if text is RECIPE else []), *overrides)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (RECIPE, [EVERY]),
        (
            RECIPE,
            [
                EVERY,
                "method.hidden={weight: 0.5, layers: [[0, 1]]}",
                "student.train.trackers=[]",
                "method.teaching.kind=ema",
            ],
        ),
        (RECIPE, [EVERY, "method.name=kd", "method.inherit_token_embeddings=true"]),
        # A section that no stage uses.
        (RECIPE, ["stages=[teacher]", "student.train.trackers=[wandb]", "method.losses=[{loss: 'json:loads'}]"]),
        # A batch may hold several epochs of few samples, if the epochs are as many as were asked for.
        (RECIPE, [EVERY, "student.train.batch_size=100", "student.train.epochs=20"]),
        (LCKD, []),
        (LCKD, ["stages=[teacher, baseline, distilled]", "method.full.weight=1"]),
        (CLINKD, []),
    ],
)
def test_a_recipe_without_mistakes_is_trained(tmp_path: Path, text: str, overrides) -> None:
    with pytest.raises(AssertionError, match="a stage was trained"):
        train(tmp_path, text, *overrides)


@pytest.mark.parametrize(("batch", "warned"), [(2000, True), (32, False)])
def test_a_batch_that_is_larger_than_all_epochs_is_a_warning(tmp_path: Path, caplog, batch: int, warned: bool) -> None:
    with pytest.raises(AssertionError, match="a stage was trained"):
        train(tmp_path, RECIPE, EVERY, f"student.train.batch_size={batch}", "student.train.epochs=20")
    assert ("student.train.batch_size=2000 is larger than the" in caplog.text) == warned


def test_an_output_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE)
    with pytest.raises(UserError, match=r"the folder /proc/x/run cannot be created \(No such file or directory\)"):
        preceptor.train(recipe, ["output=/proc/x/run"])
