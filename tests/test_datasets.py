"""Train a recipe on each public data set as released, then score its predictions as those of another system."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import call
from tests.data.vqa.test_vqa_med_2019 import with_test_file
from tests.vqa.test_data import MADE

TINY = [
    "data.image_size=16",
    "data.augment.views=1",
    "method.teaching.kind=online",
    "report.questions=2",
    "report.latency_questions=1",
    *(
        f"{model}.model.{key}"
        for model in ("teacher", "student")
        for key in (
            "vision.pretrained=[]",
            "vision.conv.channels=[8]",
            "vision.conv.blocks=[1]",
            "vision.conv.token_stages=[0]",
            "text.pretrained=[]",
            "text.scratch.embedding=8",
            "text.scratch.width=8",
            "text.scratch.layers=1",
            "text.scratch.heads=1",
            "width=8",
            "layers=1",
            "heads=1",
        )
    ),
    *(f"{model}.train.{key}" for model in ("teacher", "student") for key in ("epochs=1", "batch_size=4")),
]


def vqa_med_with_test(root: Path) -> Path:
    lines = [
        "synpict|modality|is this a ct scan?|no",
        "synpict|plane|which plane is it?|axial#transverse",
        "synpict|organ|what organ is this?|lung",
        "synpict|abnormality|what is abnormal?|mass",
    ]
    return with_test_file(MADE["mhkd-vqa-med-2019"](root), lines)


def check(recipe: str, protocol: str, root: Path | None, run: Path, *settings: str) -> None:
    """Train a recipe and score the written predictions: the scores under the protocol are the same."""
    given = [f"data.root={root}"] if root else []
    code, _, messages = call("train", recipe, f"output={run}", *given, *TINY, *settings)
    assert code == 0, messages
    results = json.loads((run / "results.json").read_text())
    scores = results["protocols"][protocol]
    assert scores["n"]
    assert protocol in (run / "report.html").read_text()
    assert protocol in (run / "distilled" / "model" / "README.md").read_text()
    assert {"majority", "question_only", "look_up"} <= results["stages"]["baseline"]["baselines"][protocol].keys()
    file = run / "distilled" / "predictions" / f"{protocol.replace('/', '-')}.jsonl"
    arguments = ["score", str(file), "--protocol", protocol, "--json", *(["--root", str(root)] if root else [])]
    code, out, messages = call(*arguments)
    assert code == 0, messages
    again = json.loads(out)["protocols"][protocol]
    for key in ("accuracy", "open", "closed", "macro", "bleu", "f1", "n", "question_types"):
        assert again[key] == scores[key], key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "protocol", "settings"),
    [
        ("mhkd-vqa-rad", "vqa-rad/clean/451", ["data.validation_fraction=0.4"]),
        ("mhkd-vqa-rad", "vqa-rad/published/freeform308", ["data.validation_fraction=0.4", "data.variant=published"]),
        ("mhkd-vqa-med-2019", "vqa-med-2019/val/strict", ["data.validation_fraction=0.2"]),
        ("mhkd-vqa-med-2019", "vqa-med-2019/bleu", ["data.variant=test"]),
        ("mhkd-slake-en", "slake-en", []),
        ("mhkd-slake-en", "slake-zh", ["data.language=both"]),
        ("mhkd-path-vqa", "path-vqa", []),
    ],
)
def test_a_released_folder_becomes_a_scored_report(tmp_path, recipe, protocol, settings):
    make = vqa_med_with_test if "data.variant=test" in settings else MADE[recipe]
    check(recipe, protocol, make(tmp_path / "made"), tmp_path / "run", *settings)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(
    ("recipe", "protocol"),
    [
        ("mhkd-vqa-rad", "vqa-rad/clean/freeform308"),
        ("mhkd-vqa-med-2019", "vqa-med-2019/val/strict"),
        ("mhkd-slake-en", "slake-en"),
    ],
)
def test_a_real_released_folder_becomes_a_scored_report(tmp_path, recipe, protocol):
    check(recipe, protocol, None, tmp_path / "run", "data.train_share=0.03")
