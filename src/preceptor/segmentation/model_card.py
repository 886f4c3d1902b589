"""The model card of a segmentation network: README.md of its folder.

It holds nothing that changes when the same recipe is run again: no time, no speed, no path, no name of a machine.
"""

from __future__ import annotations

from typing import Any

import yaml

from preceptor.report.words import percent
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.vqa.model_card import LICENCE, _text

USE = """\
For research on segmentation with missing modalities. The network takes any subset of its modalities and says nothing
of how sure it is beyond its probabilities, which are not calibrated.

**Not a medical device.** Not for diagnosis, treatment planning or any decision about a patient. It has not been
validated on data from other hospitals, scanners or populations than those below."""
ROLES = {
    "teacher": "It was trained on all modalities together, as a teacher.",
    "baseline": "It was trained on random subsets of the modalities, without distillation, for comparison.",
    "distilled": "It was trained on random subsets of the modalities; elected modalities taught the others.",
}


def segmentation_card(results: dict[str, Any], recipe: SegmentationRecipe) -> str:
    """Return the card as Markdown with YAML front matter. `results` are those of one stage."""
    stage = str(results.get("stage", "network"))
    title = f"{recipe.name}: {stage}"
    tags = ["preceptor", "medical", "image-segmentation", "missing-modalities"]
    front: dict[str, Any] = {"license": "other", "library_name": "preceptor", "pipeline_tag": "image-segmentation"}
    front["tags"] = [*tags, "knowledge-distillation", "lckd"] if stage == "distilled" else tags
    modalities, regions = results["modalities"], results["regions"]
    about = (
        f"Segments {', '.join(regions)} from any subset of {', '.join(modalities)}: "
        f"{results['parameters'] / 1e6:.2f} M parameters. {ROLES.get(stage, '')}"
    )
    sections = [
        ("", f"# {_text(title)}\n\n{_text(about)}"),
        ("Use and limits", USE),
        (
            "How to load",
            "```sh\npreceptor predict FOLDER --case CASE --output OUT\n```\n\nFOLDER is the folder of this "
            "file. `segmentation.json` says how cases are prepared, which label each region has, and the Dice of every "
            "subset on validation cases.",
        ),
        ("Data", _data(results)),
        ("Dice", _dice(results)),
        ("Licence", LICENCE),
    ]
    body = "\n\n".join(f"## {heading}\n\n{text}" if heading else text for heading, text in sections if text)
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}\n"


def _data(results: dict[str, Any]) -> str:
    data = results["data"]
    sizes = ", ".join(f"{data[split]} {split}" for split in ("train", "validation", "test"))
    notes = "\n".join(f"- {_text(note)}" for note in results["notes"])
    about = f"`{_text(data['name'])}`, variant `{_text(data['variant'])}`: {sizes} cases. SHA-256: `{data['sha256']}`."
    return f"{about}\n\n{notes}" if notes else about


def _dice(results: dict[str, Any]) -> str:
    protocol, scores = next(iter(results["protocols"].items()))
    regions = results["regions"]
    lines = [
        f"Mean Dice in percent over {scores['n']} test cases, `{_text(protocol)}`. The network was chosen on "
        "validation cases, never on these.",
        "",
        f"| modalities | {' | '.join(map(_text, regions))} |",
        f"|---|{'---:|' * len(regions)}",
    ]
    rows = [(name, by["dice"]) for name, by in scores["subsets"].items()] + [("**mean**", scores["regions"])]
    lines += [f"| {_text(name)} | {' | '.join(percent(dice.get(r)) for r in regions)} |" for name, dice in rows]
    return "\n".join(lines)
