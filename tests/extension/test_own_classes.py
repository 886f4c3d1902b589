"""Losses, backbones and methods from the user's own file: one file each, named in a recipe as module:Class."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import preceptor
from preceptor import extension
from preceptor.errors import UserError
from preceptor.recipe import dump_recipe
from preceptor.tasks import load_recipe
from tests.command_line import call
from tests.fault.tiny import LCKD, RECIPE, write_recipe

LOSSES = """
from preceptor.distill.loss_term import LossTerm


class LogitDistance(LossTerm):
    name = "logit_distance"

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, student, teacher, batch):
        return (student.logits - teacher.logits).abs().pow(self.power).mean(dim=1).sum()


class ImageDistance(LossTerm):
    student_features = teacher_features = ("embed_image",)

    def forward(self, student, teacher, batch):
        s, t = student.features["embed_image"], teacher.features["embed_image"]
        return (s - t).square().mean(dim=(1, 2)).sum()
"""

METHOD = """
from typing import Literal

from preceptor.vqa.method import VqaMethod


class LabelsAndHardAnswers(VqaMethod):
    strength: float = 0.5

    def loss_terms(self, student_layers, teacher_layers):
        from torch.nn.functional import cross_entropy

        from preceptor.distill.loss_term import LossTerm

        class HardAnswers(LossTerm):
            name = "hard"

            def forward(self, student, teacher, batch):
                return cross_entropy(student.logits, teacher.logits.argmax(-1), reduction="sum")

        term = HardAnswers()
        term.schedule = term.schedule.model_copy(update={"weight": self.strength})
        return [self.label_loss(), term]
"""

NETS = """
import torch
from torch import nn


class Patches(nn.Module):
    def __init__(self, width=12, side=8):
        super().__init__()
        self.width = width
        self.cut = nn.Conv2d(3, width, side, side)
        nn.init.constant_(self.cut.bias, 0.25)

    def forward(self, images):
        return self.cut(images).flatten(2).transpose(1, 2)


class WrongWidth(Patches):
    def forward(self, images):
        return super().forward(images)[..., 1:]


class Volumes(nn.Module):
    stride = (2, 2, 2)

    def __init__(self, modalities, regions, width=6):
        super().__init__()
        self.down = nn.Conv3d(2 * modalities, width, 2, 2)
        self.up = nn.ConvTranspose3d(width, regions, 2, 2)

    def forward(self, images, available):
        there = available[:, :, None, None, None].to(images.dtype).expand_as(images)
        return self.up(torch.relu(self.down(torch.cat([images, there], dim=1))))
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch) -> Path:
    """A folder with the user's files, which no other test can import."""
    for name, text in {"my_losses": LOSSES, "my_method": METHOD, "my_nets": NETS}.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(extension, "_trusted", set())
    yield tmp_path
    for name in ("my_losses", "my_method", "my_nets"):
        sys.modules.pop(name, None)


def tiny(folder: Path, *lines: str, text: str = RECIPE) -> str:
    text = text.replace("stages: [teacher]", "stages: [teacher, distilled]")
    return str(write_recipe(folder, "\n".join([text, *lines])))


def metrics(run: Path, stage: str) -> dict[str, float]:
    return json.loads((run / stage / "metrics.jsonl").read_text().splitlines()[0])


OWN_LOSSES = """
method:
  name: kd
  losses:
    - {loss: "my_losses:LogitDistance", weight: 0.5, arguments: {power: 1.0}, start: 0.5}
    - {loss: "my_losses:ImageDistance"}
"""


@pytest.mark.slow
def test_an_own_loss_is_one_file_and_one_entry_of_the_recipe(files):
    run = preceptor.train(tiny(files, OWN_LOSSES), {"output": str(files / "run")})
    line = metrics(run.folder, "distilled")
    assert {"label", "output", "logit_distance", "ImageDistance"} <= line.keys()
    # The first step: the scheduled term is logged and does not count yet.
    want = 0.5 * line["label"] + 0.5 * line["output"] + line["ImageDistance"]
    assert line["loss"] == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_an_own_method_is_one_file(files):
    lines = 'method: {name: "my_method:LabelsAndHardAnswers", strength: 0.25}'
    run = preceptor.train(tiny(files, lines), {"output": str(files / "run")})
    line = metrics(run.folder, "distilled")
    assert line["loss"] == pytest.approx(line["label"] + 0.25 * line["hard"], rel=1e-5)
    again = load_recipe(str(run.folder))
    assert (type(again.method).__name__, again.method.strength) == ("LabelsAndHardAnswers", 0.25)
    assert preceptor.train(again).results == run.results


@pytest.mark.slow
def test_an_own_backbone_is_one_file_and_its_model_loads_again_with_consent(files, monkeypatch):
    vision = '{module: "my_nets:Patches", arguments: {width: 20}}'
    text = RECIPE.replace(
        "student: *model", f"student: {{<<: *model, model: {{vision: {vision}, width: 16, heads: 2}}}}"
    )
    run = preceptor.train(tiny(files, "method: {name: kd}", text=text), {"output": str(files / "run")})
    image = next((run.folder / "data").rglob("*.png"))
    first = run.model("distilled").answer(image, "is it there?")
    assert json.loads((run.folder / "distilled/model/config.json").read_text())["vision"]["module"] == "my_nets:Patches"
    monkeypatch.setattr(extension, "_trusted", set())
    with pytest.raises(UserError, match="trust_remote_code"):
        preceptor.load(run.folder / "distilled")
    loaded = preceptor.load(run.folder / "distilled", trust_remote_code=True)
    assert loaded.answer(image, "is it there?").to_dict() == first.to_dict()

    monkeypatch.chdir(files)
    for verb in (["predict", "--image", str(image), "--question", "is it there?"], ["evaluate"]):
        arguments = [verb[0], str(run.folder / "distilled"), *verb[1:], "--json"]
        monkeypatch.setattr(extension, "_trusted", set())
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: the model needs the class my_nets:Patches")
        code, out, err = call(*arguments, "--trust-remote-code")
        assert code == 0, err
        if verb[0] == "predict":
            assert json.loads(out) == [first.to_dict()]
        else:
            assert json.loads(out)["protocols"] == run.results["stages"]["distilled"]["protocols"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "lckd"])
def test_an_own_segmentation_network(files, method):
    text = LCKD.replace("model: {channels: [4, 4, 8]}", 'model: {net: "my_nets:Volumes", arguments: {width: 4}}')
    text = text[: text.index("method:")] + f"method: {{name: {method}}}\n" + text[text.index("evaluation:") :]
    recipe = str(write_recipe(files, text.replace("[baseline, distilled]", "[teacher, distilled]")))
    if method == "lckd":
        with pytest.raises(UserError, match=r"method\.name=kd"):
            preceptor.train(recipe, {"output": str(files / "run"), "stages": ["distilled"]})
        return
    run = preceptor.train(recipe, {"output": str(files / "run")})
    assert {"dice", "bce", "output"} <= metrics(run.folder, "distilled").keys()
    loaded = preceptor.load(run.folder / "distilled")
    assert loaded.network.config.net == "my_nets:Volumes"


def test_the_initial_weights_of_an_own_backbone_are_its_own(files):
    from preceptor.vqa.vision import OwnVision

    sys.path.append(str(files))
    extension.trust("my_nets:Patches")
    vision = OwnVision({"module": "my_nets:Patches", "arguments": {}, "image_size": 32})
    assert (vision.width, vision.tokens(32)) == (12, 16)
    from preceptor.vqa.model import VqaTransformer, VqaTransformerConfig

    config = VqaTransformerConfig(
        vision={"kind": "module", "module": "my_nets:Patches", "arguments": {}, "image_size": 32},
        text={"model_type": "electra", "vocab_size": 10, "embedding_size": 4, "hidden_size": 8,
              "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
        width=16, heads=2, image_size=32, id2label={0: "yes", 1: "no"},
    )  # fmt: skip
    model = VqaTransformer(config)
    assert torch.equal(model.vision.model.cut.bias, torch.full((12,), 0.25))


def test_consent_is_needed_for_each_class_that_a_model_folder_names(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "_trusted", {"a:Known"})
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "preceptor-vqa", "vision": {"kind": "conv"}, "net": "compact"}')
    extension.require_trust(tmp_path, False)
    path.write_text('{"net": "a:Known", "vision": {"kind": "module", "module": "b:Other"}}')
    with pytest.raises(UserError, match=r"class b:Other .*--trust-remote-code, or trust_remote_code=True in Python"):
        extension.require_trust(tmp_path, False)
    extension.require_trust(tmp_path, True)
    extension.require_trust(tmp_path, False)
    assert extension._trusted == {"a:Known", "b:Other"}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nobody_has_this:Loss", "no module 'nobody_has_this'"),
        ("my_losses", "module:Name"),
        ("my_losses:", "module:Name"),
        ("my losses:Loss", "module:Name"),
    ],
)
def test_a_wrong_reference_is_refused_without_importing_anything(files, reference, message):
    before = set(sys.modules)
    with pytest.raises(UserError, match=message) as error:
        load_recipe(tiny(files, f'method: {{losses: [{{loss: "{reference}"}}]}}'))
    assert "method.losses" in str(error.value)
    assert "my_losses" not in set(sys.modules) - before


def test_the_users_file_is_found_beside_the_recipe_and_in_the_current_folder(files, monkeypatch, tmp_path_factory):
    lines = 'method: {losses: [{loss: "my_losses:LogitDistance"}]}'
    recipe = tiny(files, lines)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    assert load_recipe(recipe).method.losses[0].loss == "my_losses:LogitDistance"
    assert sys.path[-1] == str(files)
    monkeypatch.setattr(sys, "path", sys.path[:-1])
    with pytest.raises(UserError, match="no module"):
        load_recipe(tiny(elsewhere, lines))
    monkeypatch.chdir(files)
    load_recipe(str(elsewhere / "tiny.yaml"))


def test_a_run_folder_is_no_place_for_code(files, monkeypatch, tmp_path_factory):
    recipe = load_recipe(tiny(files, 'method: {losses: [{loss: "my_losses:LogitDistance"}]}'))
    monkeypatch.setattr(sys, "path", sys.path[:-1])
    run = tmp_path_factory.mktemp("run")
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    (run / "my_losses.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    with pytest.raises(UserError, match="no module"):
        load_recipe(str(run))


@pytest.mark.parametrize(
    ("reference", "arguments", "message"),
    [
        ("my_losses:LogitDistanc", {}, "did you mean 'LogitDistance'"),
        ("my_nets:Patches", {}, "not a subclass of preceptor.distill.loss_term.LossTerm"),
        ("my_losses:LogitDistance", {"exponent": 2}, "does not accept"),
    ],
)
def test_a_wrong_loss_is_refused_before_the_training(files, reference, arguments, message):
    from preceptor.config import OwnLossConfig
    from preceptor.distill.loss_term import own_losses

    sys.path.append(str(files))
    with pytest.raises(UserError, match=message):
        own_losses([OwnLossConfig(loss=reference, arguments=arguments)])


def test_a_file_that_fails_is_named(files):
    (files / "my_losses.py").write_text("import nothing_like_this")
    sys.path.append(str(files))
    with pytest.raises(UserError, match="importing my_losses failed: ModuleNotFoundError"):
        extension.load_object("my_losses:Loss", "method.losses[0].loss", object)


def test_a_backbone_with_another_width_is_refused(files):
    from preceptor.vqa.vision import OwnVision

    sys.path.append(str(files))
    extension.trust("my_nets:WrongWidth")
    with pytest.raises(UserError, match=r"returns \(1, 16, 11\) and has width 12"):
        OwnVision({"module": "my_nets:WrongWidth", "arguments": {}, "image_size": 32})


def test_classes_are_given_as_objects_in_python(files):
    sys.path.append(str(files))
    losses = __import__("my_losses")
    method = __import__("my_method")
    from preceptor.tasks import recipe_from

    raw = {"task": "vqa", "name": "x", "method": {"losses": [{"loss": losses.LogitDistance}]}}
    assert recipe_from(raw, "recipe").method.losses[0].loss == "my_losses:LogitDistance"
    raw["method"] = {"name": method.LabelsAndHardAnswers}
    assert recipe_from(raw, "recipe").method.name == "my_method:LabelsAndHardAnswers"
    with pytest.raises(UserError, match=r"method\.strenght"):
        recipe_from({**raw, "method": {**raw["method"], "strenght": 1}}, "recipe")


def test_an_unknown_method_names_the_nearest_one():
    with pytest.raises(UserError, match=r"key method\.name: 'mhdk' is not known; did you mean 'mhkd'"):
        load_recipe("mhkd-demo", ["method.name=mhdk"])
