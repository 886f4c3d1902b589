"""A setting that is given but cannot have an effect is refused, with the fix. With an effect, it is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from preceptor.config import require_used_settings
from preceptor.errors import UserError
from preceptor.grounding.config import DialogueDataConfig
from preceptor.grounding.data import read_recipe_dialogues
from preceptor.grounding.settings import GuidanceConfig
from preceptor.pipeline.paths import check_paths
from preceptor.recipe import recipe_names
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.tasks import load_recipe
from preceptor.vqa.config import DataConfig
from preceptor.vqa.data import read_data

TABLE = "method.guidance.table={ct: [3, 1, 1]}"
VISION = "student.model.vision."


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("mhkd-vqa-rad", ["method.label.kind=bce"], r"label_smoothing=0\.1 is not used with kind=bce; set it to 0"),
        ("mhkd-demo", [VISION + "arguments={width: 8}"], r"arguments=\{'width': 8\} is not used without module"),
        ("mhkd-demo", [VISION + "freeze=['*']"], r"freeze=\['\*'\] is not used without pretrained; remove it"),
        ("mhkd-demo", [VISION + "grid=4"], r"grid=4 is not used without pretrained"),
        ("mhkd-demo", [VISION + "depths=[2, -1]"], r"depths=\[2, -1\] is not used without pretrained"),
        (
            "clinkd-demo",
            ["student.train.pretrained_lr_scale=0.1"],
            r"student\.train: .* no effect in grounding",
        ),
        ("mhkd-demo", ["student.model.text.layers=1"], r"layers=1 is not used without pretrained; set scratch\.layers"),
    ],
)
def test_a_setting_without_an_effect_is_refused(recipe, overrides, message):
    loaded = load_recipe(recipe, overrides)  # as a stored recipe of an earlier version is
    with pytest.raises(UserError, match=message):
        require_used_settings(loaded)


def test_a_run_of_an_earlier_version_is_repeated_with_its_settings(tmp_path: Path):
    recipe = load_recipe("mhkd-demo", [f"output={tmp_path / 'run'}", "method.label={kind: bce, label_smoothing: 0.1}"])
    with pytest.raises(UserError, match=r"method\.label: label_smoothing=0\.1 is not used"):
        check_paths(recipe)
    (tmp_path / "run" / "teacher").mkdir(parents=True)
    (tmp_path / "run" / "teacher" / "recipe.yaml").touch()
    check_paths(recipe)


@pytest.mark.parametrize("setting", [{"table": {"ct": (3, 1, 1)}}, {"learnable": True}, {"scorer": "clip"}])
def test_intervals_by_modality_need_a_kind(setting):
    with pytest.raises(ValidationError, match=rf"{next(iter(setting))}=.* is not used with kind=fixed; set kind=clip"):
        GuidanceConfig.model_validate(setting)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("clinkd-demo", ["method.guidance.kind=clip", TABLE, "method.guidance.scorer=clip"]),
        ("clinkd-demo", ["method.guidance.kind=clip", "method.guidance.learnable=true"]),
        # A part of a recipe that is switched off keeps its settings, as in an ablation.
        ("clinkd-demo", ["method.guidance.kind=fixed", TABLE]),
        ("clinkd-demo", ["method.pseudo_labels.share=0", "method.teaching_run=run", "method.pseudo_labels.store=x"]),
        ("mhkd-demo", ["method.teaching.kind=ema", "method.teaching.runs=[run]", "method.teaching.cache=x"]),
        ("mhkd-vqa-rad", ["method.label.kind=bce", "method.label.label_smoothing=0"]),
        ("mhkd-demo", ["method.teaching.kind=online", "method.teaching.cache=x"]),  # for `preceptor cache`
        ("mhkd-demo", [VISION + "module=torch.nn:Identity", VISION + "arguments={a: 1}", VISION + "freeze=['*']"]),
        # From scratch in a recipe with candidates, as if none of them were installed.
        ("mhkd-vqa-rad", ["teacher.model.vision.pretrained=[]", "teacher.model.text.pretrained=[]"]),
        ("mhkd-demo", [VISION + "pretrained=[some/model]", VISION + "freeze=['*']", VISION + "grid=4"]),
        ("mhkd-demo", ["student.model.text.pretrained=[some/model]", "student.model.text.layers=1"]),
    ],
)
def test_a_setting_with_an_effect_is_accepted(recipe, overrides):
    require_used_settings(load_recipe(recipe, overrides))


@pytest.mark.parametrize(
    ("read", "settings", "message"),
    [
        (read_data, DataConfig(arguments={"a": 1}), r"data\.arguments=\{'a': 1\} applies to module:function, not to "),
        (read_data, DataConfig(language="en"), r"data\.language=en applies to slake, not to data\.name=phantom"),
        (
            read_recipe_dialogues,
            DialogueDataConfig(name="sharegpt", language="zh"),
            r"data\.language=zh applies to slake-grounding, not to data\.name=sharegpt; remove it",
        ),
        (
            read_recipe_dialogues,
            DialogueDataConfig(name="med-grit", box_format="gemma"),
            r"data\.box_format=gemma applies to sharegpt, not to data\.name=med-grit",
        ),
        (
            read_recipe_dialogues,
            DialogueDataConfig(images="folder"),
            r"data\.images=folder applies to med-grit and sharegpt, not to data\.name=phantom-grounding",
        ),
    ],
)
def test_a_setting_of_another_data_set_is_refused(tmp_path: Path, read, settings, message):
    with pytest.raises(UserError, match=message):
        read(settings, tmp_path)


SPECIALISTS = "method={name: specialists, runs: {full: run}, output: {weight: 0}}"


def segmentation(*overrides: str) -> SegmentationRecipe:
    recipe = load_recipe("lckd-demo", ["data.unlabelled=none", "data.train_share=1", *overrides])
    assert isinstance(recipe, SegmentationRecipe)
    return recipe


@pytest.mark.parametrize(
    ("overrides", "modalities", "message"),
    [
        (["method.full.weight=0"], 1, r"data\.modalities=\['flair'\] has no modality that teaches another one"),
        (
            ["method.full.weight=0", "method.cross_modal.weight=0"],
            4,
            r"method\.cross_modal\.weight and method\.full\.weight are 0, so the stage distilled would be trained as",
        ),
        (
            ["method={name: kd, teacher: self, output: {weight: 0}}"],
            4,
            r"method\.output\.weight and method\.prototypes",
        ),
        (["method={name: kd, teacher: baseline, output: {weight: 0}}"], 4, r"correct it, or set stages=\[baseline\]"),
        (["method={name: metakd, pairs: {weight: 0}}"], 4, r"method\.pairs\.weight is 0"),
        (["method={name: metakd}"], 1, r"has no modality that teaches"),
        ([SPECIALISTS], 4, r"method\.output\.weight is 0"),
    ],
)
def test_a_distillation_without_an_effect_is_refused(overrides, modalities, message):
    names = ("flair", "t1", "t1ce", "t2")[:modalities]
    with pytest.raises(UserError, match=message):
        segmentation("stages=[baseline, distilled]", *overrides).require_distillation(names)
    segmentation("stages=[baseline]", *overrides).require_distillation(names)


@pytest.mark.parametrize(
    ("overrides", "modalities"),
    [
        (["method.full.weight=0"], 2),
        (["method.full.weight=1", "method.cross_modal.weight=0", "method.teaching_run=run"], 1),
        (
            [
                "method.full.weight=0",
                "method.cross_modal.weight=0",
                "method.losses=[{loss: 'preceptor.distill:LossTerm'}]",
            ],
            4,
        ),
        (["method={name: kd, teacher: self, output: {weight: 0}, prototypes: {weight: 0.1}}"], 4),
        (["method={name: kd, teacher: baseline, initialise_from_teacher: true, output: {weight: 0}}"], 4),
        (
            [
                "method={name: kd, teaching_run: run, output: {weight: 0}}",
                "data.unlabelled=rest",
                "data.train_share=0.5",
            ],
            4,
        ),
        (["method={name: metakd}"], 2),
    ],
)
def test_a_distillation_with_an_effect_is_accepted(overrides, modalities):
    segmentation("stages=[baseline, distilled]", *overrides).require_distillation(
        ("flair", "t1", "t1ce", "t2")[:modalities]
    )


def test_shipped_recipes_distil():
    recipes = [recipe for recipe in (load_recipe(name, []) for name in recipe_names()) if recipe.task == "segmentation"]
    assert len(recipes) > 3
    for recipe in recipes:
        assert isinstance(recipe, SegmentationRecipe)
        recipe.require_distillation(recipe.data.modalities)
