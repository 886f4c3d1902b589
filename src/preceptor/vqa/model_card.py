"""The model card: README.md of a student folder, in the form of the Hugging Face hub.

It holds nothing that changes when the same recipe is run again: no time, no speed, no path, no name of a machine.
"""

from __future__ import annotations

from typing import Any

import yaml

from preceptor.report.contents import get_nested
from preceptor.report.words import BASELINES, count, percent
from preceptor.vqa.config import VqaRecipe

ROLES = {
    "teacher": "It was trained on labels alone, as the teacher of a smaller student.",
    "baseline": "It was trained on labels alone, as the student that a distilled one is compared with.",
    "distilled": "It is a student: it learnt from labels and from a teacher.",
}
USE = """\
For research on medical visual question answering and on knowledge distillation. The model chooses among the answers
that occur in its training questions; it cannot say anything else, cannot decline, and its probabilities are not
calibrated.

**Not a medical device.** Not for diagnosis, treatment or any decision about a patient. It has not been validated on
data from other hospitals, scanners or populations than those below, and its errors may differ between groups of
patients."""
LICENCE = """\
The code that made this model is Apache-2.0. What the weights may be used for follows from the licences of the training
data and of any pretrained splits; whoever publishes the folder names the licence here and in the front matter."""


def model_card(results: dict[str, Any], recipe: VqaRecipe) -> str:
    """Return the card as Markdown with YAML front matter. `results` are those of one stage; any may be missing."""
    stage = str(results.get("stage", "student"))
    title = f"{recipe.name}: {stage}"
    sections = [
        ("", f"# {_text(title)}\n\n{_about(stage, results)}"),
        ("Use and limits", USE),
        ("How to load", _loading()),
        ("Data", _data(results)),
        ("Accuracy", _accuracy(results)),
        ("Training", _training(stage, results, recipe)),
        ("Licence", LICENCE),
    ]
    body = "\n\n".join(f"## {heading}\n\n{text}" if heading else text for heading, text in sections if text)
    front = yaml.safe_dump(_front(title, stage, results), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{body}\n"


def _front(title: str, stage: str, results: dict[str, Any]) -> dict[str, Any]:
    tags = ["preceptor", "medical", "visual-question-answering"]
    if stage == "distilled":
        tags += ["knowledge-distillation", "mhkd"]
    task = "visual-question-answering"
    front: dict[str, Any] = {"license": "other", "library_name": "preceptor", "pipeline_tag": task, "tags": tags}
    name, split = get_nested(results, "data", "name"), get_nested(results, "data", "variant")
    metrics = [
        {
            "type": get_nested(scores, "metric") or "accuracy",
            "name": f"{get_nested(scores, 'metric') or 'accuracy'}, {protocol}",
            "value": round(scores["accuracy"], 4),
        }
        for protocol, scores in (results.get("protocols") or {}).items()
        if get_nested(scores, "accuracy") is not None
    ]
    if name and metrics:
        dataset = {"type": name, "name": name, "split": "test", **({"config": split} if split else {})}
        result = {"task": {"type": task}, "dataset": dataset, "metrics": metrics}
        front["model-index"] = [{"name": title, "results": [result]}]
    return front


def _about(stage: str, results: dict[str, Any]) -> str:
    size = f", {count(results['parameters'])} parameters" if results.get("parameters") else ""
    begun = "; ".join(f"{split} {source}" for split, source in (results.get("provenance") or {}).items())
    role = ROLES.get("teacher" if stage.startswith("teacher") else stage, "")
    origin = f" Weights began: {_text(begun)}." if begun else ""
    return f"Answers questions about medical images: a one-stream image-text transformer{size}. {role}{origin}".rstrip()


def _loading() -> str:
    return (
        '```sh\npreceptor predict FOLDER --image IMAGE.png --question "Is there a fracture?"\n```\n\n'
        "```python\nfrom pathlib import Path\n\nfrom preceptor.vqa.bundle import VqaBundle\n\n"
        'bundle = VqaBundle.load(Path("FOLDER"))\n```\n\n'
        "FOLDER is the folder of this file. `preprocessor_config.json` and the tokenizer files say how images and "
        "questions are prepared; `config.json` lists the answers."
    )


def _data(results: dict[str, Any]) -> str:
    data = results.get("data") or {}
    if not data:
        return ""
    sizes = ", ".join(f"{data[split]} {split}" for split in ("train", "validation", "test") if split in data)
    split = f", variant `{data['variant']}`" if data.get("variant") else ""
    about = f"`{data.get('name', 'unknown')}`{split}: {sizes} questions."
    about += f" SHA-256 of the rows: `{data.get('sha256', 'unknown')}`."
    notes = "\n".join(f"- {_text(note)}" for note in results.get("notes") or [])
    return f"{about}\n\n{notes}" if notes else about


def _accuracy(results: dict[str, Any]) -> str:
    rows = []
    for protocol, scores in (results.get("protocols") or {}).items():
        numbers = [percent(get_nested(scores, key)) for key in ("accuracy", "open", "closed")]
        rows.append([f"**this model**, `{protocol}`", *numbers, str(get_nested(scores, "n") or "")])
        for name, blind in (get_nested(results, "baselines", protocol) or {}).items():
            numbers = [percent(get_nested(blind, key)) for key in ("accuracy", "open", "closed")]
            rows.append([BASELINES.get(name, name), *numbers, ""])
        if get_nested(scores, "ceiling") is not None:
            rows.append(["Answer ceiling: answers among the classes", percent(scores["ceiling"]), "", "", ""])
    if not rows:
        return ""
    table = "\n".join("| " + " | ".join(_text(cell) for cell in row) + " |" for row in rows)
    described = [f"- `{name}`: {_text(text)}" for name, text in (results.get("describes") or {}).items()]
    after = "\n\n" + "\n".join(described) if described else ""
    about = "Share of test questions answered correctly. The model was chosen on validation questions, never on these."
    return f"{about}\n\n| | overall | open | closed | questions |\n|---|---:|---:|---:|---:|\n{table}{after}"


def _training(stage: str, results: dict[str, Any], recipe: VqaRecipe) -> str:
    config = recipe.teacher if stage.startswith("teacher") else recipe.student
    train = config.train
    facts = [
        f"- {train.epochs:g} epochs at most of batches of {train.batch_size}, {train.optimizer}, learning rate "
        f"{train.learning_rate:g} ({train.schedule}), weight decay {train.weight_decay:g}"
    ]
    training = results.get("training") or {}
    if "steps" in training:
        facts.append(f"- {training['steps']} steps; the weights are those of step {training.get('kept_step')}")
    if results.get("seed") is not None:
        facts.append(f"- seed {results['seed']}")
    if stage == "distilled":
        method = recipe.method
        terms = ", ".join(f"{name} {weight:g}" for name, weight in method.term_weights().items())
        facts.append(f"- {method.name}, teacher {method.teaching.kind}; weights of the loss terms: {terms}")
    if skipped := training.get("skipped"):
        facts.append(f"- {len(skipped)} training rows left out because their images are broken")
    if versions := results.get("versions"):
        facts.append("- " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return "\n".join(facts)


def _text(value: Any) -> str:
    """Return text that is neither HTML nor the end of a table cell."""
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
