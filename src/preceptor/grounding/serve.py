"""What the verbs beside `train` do with a grounded vision-language model: evaluate, answer, check, report."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preceptor.data.grounding.boxes import find_boxes
from preceptor.data.images import ImageError, load_image
from preceptor.data.types import Dialogue, GroundingDataset
from preceptor.errors import UserError, nearest
from preceptor.files import json_lines, write_text
from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.data import MOST_LISTED, describe_dialogues, read_recipe_dialogues
from preceptor.grounding.evaluate import answer_greedily
from preceptor.grounding.guided_rope import MODALITIES
from preceptor.grounding.memory import available, estimate_memory, load_model_config, sentence, warning
from preceptor.grounding.metrics import DESCRIBES, score_rows
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.stage import PROTOCOLS, Seminar
from preceptor.pipeline.run_dir import model_folder


def evaluate_vlm(
    folder: Path, recipe: GroundingRecipe, protocol: str | None, target: Path, *, whole: bool
) -> dict[str, Any]:
    """Score a model on the test split of its own or other data; with `whole`, write results.json to `target` too.

    Raises UserError for an unknown protocol.
    """
    data = read_recipe_dialogues(recipe.data, recipe.output_folder / "data")
    ids = {f"{data.name}/{data.variant}/{name}": name for name in PROTOCOLS}
    if protocol is not None:
        if protocol not in ids:
            raise UserError(f"protocol {protocol!r} is not known{nearest(protocol, ids)}")
        ids = {protocol: ids[protocol]}
    config = recipe.student.model
    vlm = GroundedVlm.load(folder, max_pixels=config.max_pixels, cut_off=config.cut_off).eval()
    rows, seconds = answer_greedily(vlm, data.split("test"), recipe.answers)
    results = {
        "stage": folder.parent.name,
        "protocols": {id: score_rows(rows, name) for id, name in ids.items()},
        "describes": {id: DESCRIBES[name] for id, name in ids.items()},
        "data": describe_dialogues(data),
        "notes": list(data.notes),
        "latency_ms": round(1000 * seconds, 1),
        "parameters": sum(parameter.numel() for parameter in vlm.base.parameters()),
    }
    for id in ids:
        write_text(target / "predictions" / f"{id.replace('/', '-')}.jsonl", json_lines(rows))
    if whole:
        write_text(target / "results.json", json.dumps(results, indent=1))
    return results


def answer_with_boxes(folder: Path, asked: Sequence[Dialogue], modality: str = "") -> list[dict[str, Any]]:
    """Return a model's answer to the last question of each dialogue, with the boxes in it in thousandths.

    A `probability` is the mean one of an answer's tokens. `modality` is Med-GRIT's word for the images, which a model
    needs whose positions it guides; by default each dialogue's own. Raises UserError where that is not known.
    """
    vlm = GroundedVlm.load(folder).eval()
    rows = [replace(row, modality=modality or row.modality) for row in asked]
    unknown = {row.modality: row.id for row in rows if row.modality not in MODALITIES}
    if vlm.guidance.kind == "clip" and unknown:
        word, id = next(iter(unknown.items()))
        raise UserError(
            f"this model counts positions by an image's modality, and that of {id} is {word!r}; give --modality, "
            f"one of {', '.join(MODALITIES)}"
        )
    found = vlm.generate(rows, max_new_tokens=128, with_confidence=True, batch_size=8)
    return [
        {
            "id": row.id,
            "answers": [{"answer": answers[0].text, "probability": answers[0].confidence}],
            "boxes": [found.box for found in find_boxes(answers[0].text) if found.box is not None],
        }
        for row, answers in zip(rows, found, strict=True)
    ]


def check_dialogues(recipe: GroundingRecipe) -> dict[str, Any]:
    """Return what `doctor` finds in the dialogues of a recipe: broken images, and all faulty boxes."""
    refused = recipe.data.boxes == "refuse"
    config = recipe.data.model_copy(update={"boxes": "repair"}) if refused else recipe.data
    data = read_recipe_dialogues(config, recipe.output_folder / "data", needed=())
    users: dict[Path, list[str]] = {}
    for row in data.samples:
        for image in row.images:
            users.setdefault(image, []).append(row.id)
    limits = {"max_bytes": recipe.data.max_image_bytes, "max_pixels": recipe.data.max_image_pixels}
    severity = "error" if refused else "warning"
    findings = [
        {"severity": severity, "ids": [], "file": place, "reason": f"box: {what}"}
        for place, _, what in (line.rpartition(": ") for line in data.faulty[:MOST_LISTED])
    ]
    for image, ids in users.items():
        try:
            load_image(image, **limits)
        except ImageError as error:
            findings.append({"severity": "error", "ids": ids, "file": image.name, "reason": str(error)})
    for fault, count in data.faults.items():
        reason = f"{count} boxes are {fault}; data.boxes={recipe.data.boxes} says what is done about them"
        findings.append({"severity": "warning", "ids": [], "file": "", "reason": reason})
    memory: list[str] = []
    if data.split("train") and not any(finding["severity"] == "error" for finding in findings):
        memory, doubts = check_memory(recipe, data)
        findings += [{"severity": "warning", "ids": [], "file": "", "reason": reason} for reason in doubts]
    return {
        "name": data.name,
        "variant": data.variant,
        "notes": [*data.notes, *memory],
        "rows": {split: len(data.split(split)) for split in ("train", "validation", "test")},
        "images": len(users),
        "findings": findings,
    }


def check_memory(recipe: GroundingRecipe, data: GroundingDataset) -> tuple[list[str], list[str]]:
    """Return how much memory each model's training takes of a device, and what is wrong with that."""
    teacher: Any = None
    said: list[str] = []
    doubts: list[str] = []
    taught = {"distilled", "clinkd"} & set(recipe.stages)
    stays = recipe.method.teacher_offload == "none" or recipe.method.pseudo_labels.logits == "online"
    with tempfile.TemporaryDirectory() as scratch:
        room = Seminar(recipe.model_copy(update={"output": scratch}), data)
        for role, config in (("teacher", recipe.teacher), ("student", recipe.student)):
            run = recipe.method.teaching_run if role == "teacher" else None
            if role == "teacher" and "teacher" not in recipe.stages and not (run and taught):
                continue
            try:
                source = str(model_folder(Path(run))) if run and Path(run).is_dir() else run
                source = source or room.source(config.model, role)
                model, encoder = load_model_config(config.model, source, recipe.allow_downloads)
                if role == "student" or "teacher" in recipe.stages:
                    beside = teacher if taught and stays else None
                    rows = data.split("train")
                    splits, there = estimate_memory(recipe, config, model, encoder, rows, beside), available()
                    said.append(sentence(f"memory to train the {role}", splits, there))
                    doubt = warning(f"training the {role}", splits, there, config, recipe)
                    doubts += [doubt] if doubt else []
            except UserError as error:
                doubts.append(f"the memory that the {role} takes is not estimated: {error}")
                continue
            teacher = model if role == "teacher" else teacher
    return said, doubts


def report_dialogues(run: Path, recipe: GroundingRecipe) -> Path:
    """Write a run's report page from what lies in its folder."""
    from preceptor.grounding.report import write_grounding_report

    try:
        data = read_recipe_dialogues(recipe.data, recipe.output_folder / "data", needed=())
    except UserError:
        data = None  # the page is then written without pictures
    return write_grounding_report(run, data=data, recipe=recipe)
