"""Run the how-to pages on own classes: write the files and recipes that they show, and train tiny recipes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import preceptor
from preceptor import extension
from tests.fault.tiny import LCKD, RECIPE, write_recipe

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
BLOCK = re.compile(r'^```python title="(\w+)\.py"\n(.*?)^```', re.MULTILINE | re.DOTALL)


@pytest.fixture
def files(request, tmp_path: Path, monkeypatch) -> Path:
    """A folder with the Python files of a page. Blocks with one title are parts of one file."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(extension, "_trusted", set())
    names = []
    for name, text in BLOCK.findall((HOW_TO / request.param).read_text("utf-8")):
        names.append(name)
        with (tmp_path / f"{name}.py").open("a", encoding="utf-8") as file:
            file.write(text)
    assert names, f"{request.param} shows no Python file"
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


def train(folder: Path, text: str, method: str) -> set[str]:
    """Train the distilled stage of a tiny recipe; return the logged terms."""
    text = text.replace("stages: [teacher]", "stages: [teacher, distilled]")
    text = re.sub(r"^method:.*\n", "", text, flags=re.MULTILINE).replace(
        "[baseline, distilled]", "[teacher, distilled]"
    )
    run = preceptor.train(str(write_recipe(folder, f"{text}\n{method}\n")), {"output": str(folder / "run")})
    return set(json.loads((run.folder / "distilled" / "metrics.jsonl").read_text().splitlines()[0]))


@pytest.mark.slow
@pytest.mark.parametrize("files", ["own-loss.md"], indirect=True)
def test_own_loss(files):
    losses = '[{loss: "my_losses:LogitDistance", weight: 0.1, start: 0.2, ramp: 0.1}, {loss: "my_losses:ImageTokens"}]'
    assert {"LogitDistance", "ImageTokens"} <= train(files, RECIPE, f"method: {{name: mhkd, losses: {losses}}}")


@pytest.mark.slow
@pytest.mark.parametrize("files", ["own-method.md"], indirect=True)
def test_own_method(files):
    assert "reverse_kl" in train(files, RECIPE, "method: {name: my_method:ReverseDistillation, weight: 0.5}")


@pytest.mark.slow
@pytest.mark.parametrize("files", ["own-backbone.md"], indirect=True)
def test_own_backbone(files):
    vision = "{module: my_vision:PatchTokens, arguments: {patch: 16}}"
    student = f"student: {{<<: *model, model: {{vision: {vision}, width: 16, heads: 2}}}}"
    assert "output" in train(files, RECIPE.replace("student: *model", student), "method: {name: kd}")


@pytest.mark.slow
@pytest.mark.parametrize("files", ["own-backbone.md"], indirect=True)
def test_own_network(files):
    net = "model: {net: my_network:TinyNetwork, arguments: {channels: 4}}"
    assert "output" in train(files, LCKD.replace("model: {channels: [4, 4, 8]}", net), "method: {name: kd}")
