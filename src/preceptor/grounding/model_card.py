"""The model card of a grounded vision-language model: README.md of its folder.

It holds nothing that changes when the same recipe is run again: no time, no speed, no path, no name of a machine.
"""

from __future__ import annotations

from typing import Any

import yaml

from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.metrics import MAIN
from preceptor.report.words import percent
from preceptor.vqa.model_card import LICENCE, _text

USE = """\
For research on questions about medical images whose answers are words and boxes. How sure the model is of an answer is
not calibrated, and its boxes are not measurements.

**Not a medical device.** Not for diagnosis, treatment planning or any decision about a patient. It has not been
validated on data from other hospitals, scanners or populations than those below."""
LOADING = """\
```sh
preceptor predict FOLDER --image IMAGE --question QUESTION
```

FOLDER is the folder of this file, an ordinary Hugging Face folder. `guidance.json` says how its rotary positions are
counted; plain transformers, which does not read it, counts them as upstream."""


def grounding_card(results: dict[str, Any], recipe: GroundingRecipe) -> str:
    """Return the card as Markdown with YAML front matter. `results` are those of one stage."""
    stage = str(results["stage"])
    title = f"{recipe.name}: {stage}"
    tags = ["preceptor", "medical", "visual-grounding", "visual-question-answering"]
    front: dict[str, Any] = {
        "license": "other",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": [*tags, "knowledge-distillation", "clinkd"] if stage in ("distilled", "clinkd") else tags,
    }
    about = (
        f"Answers questions about medical images in words and boxes: {results['parameters'] / 1e6:.2f} M parameters. "
        f"Learnt from: {results['adds']}."
    )
    sections = [
        ("", f"# {_text(title)}\n\n{_text(about)}"),
        ("Use and limits", USE),
        ("How to load", LOADING),
        ("Data", _data(results)),
        ("Scores", _scores(results)),
        ("Licence", LICENCE),
    ]
    body = "\n\n".join(f"## {heading}\n\n{text}" if heading else text for heading, text in sections if text)
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}\n"


def _data(results: dict[str, Any]) -> str:
    data = results["data"]
    sizes = ", ".join(f"{data[split]} {split}" for split in ("train", "validation", "test") if split in data)
    notes = "\n".join(f"- {_text(note)}" for note in results["notes"])
    about = (
        f"`{_text(data['name'])}`, variant `{_text(data['variant'])}`: {sizes} dialogues. SHA-256: `{data['sha256']}`."
    )
    return f"{about}\n\n{notes}" if notes else about


def _scores(results: dict[str, Any]) -> str:
    heads = "| protocol | recall@0.5 | naming accuracy | describing, ROUGE-L | mBMR |"
    about = "In percent, the mean over modalities. Test dialogues chose nothing."
    lines = [about, "", heads, "|---|---:|---:|---:|---:|"]
    for protocol, scores in results["protocols"].items():
        cells = [percent(scores["mean"].get(task, {}).get(metric), unit=False) for task, metric in MAIN.items()]
        lines.append(f"| `{_text(protocol)}` | {' | '.join(cells)} |")
    return "\n".join(lines)
