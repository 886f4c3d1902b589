"""What the verbs beside `train` do with a run: evaluate, answer, cache, check, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from preceptor.data.images import load_image
from preceptor.data.provenance import contaminated_test_ids, read_provenance
from preceptor.data.types import Dialogue, Sample
from preceptor.data.vqa.check import check_data, check_images
from preceptor.data.vqa.table import read_table
from preceptor.errors import UserError
from preceptor.files import json_lines, write_text
from preceptor.grounding.config import GroundingRecipe
from preceptor.pipeline.run_dir import holds_vlm, model_folder
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.task import Batch
from preceptor.tasks import load_recipe
from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.config import DataConfig, VqaRecipe
from preceptor.vqa.data import read_data
from preceptor.vqa.dataset import VqaExamples
from preceptor.vqa.evaluate import evaluate_bundle, write_predictions
from preceptor.vqa.protocols import protocol_named


def evaluate_run(run: Path, overrides: list[str], protocol: str | None, output: Path | None) -> dict[str, Any]:
    """Score a run's model on its own or other data; the predictions go to `output` or beside the model's stage."""
    folder = model_folder(run)
    recipe = load_recipe(str(_stage(folder)), overrides)
    if isinstance(recipe, SegmentationRecipe):
        from preceptor.segmentation.serve import evaluate_network

        return evaluate_network(folder, recipe, protocol, output or _stage(folder), whole=output is not None)
    if isinstance(recipe, GroundingRecipe):
        from preceptor.grounding.serve import evaluate_vlm

        return evaluate_vlm(folder, recipe, protocol, output or _stage(folder), whole=output is not None)
    data = read_data(recipe.data, recipe.output_folder / "data", needed=("test",))
    if ids := contaminated_test_ids(data, read_provenance(folder) or [], None):
        data.notes.append(f"{len(ids)} of the test images were trained on, in another data set: these scores flatter.")
    bundle = VqaBundle.load(folder)
    only = [protocol_named(data, protocol)] if protocol else None
    results, rows = evaluate_bundle(bundle, data, recipe.data, only=only)
    target = output or _stage(folder)
    write_predictions(target, rows)
    if output:
        write_text(output / "results.json", json.dumps(results, indent=1))
    return {"stage": _stage(folder).name, **results, "parameters": bundle.model.parameter_count()}


def _stage(student: Path) -> Path:
    stage = student.parent
    if not (stage / "recipe.yaml").is_file():
        raise UserError(f"{stage} has no recipe.yaml, so the data that {student} was made for are not known")
    return stage


def _answers(bundle: VqaBundle, batch: Batch, top: int) -> list[dict[str, Any]]:
    with torch.inference_mode():
        logits = bundle.model(batch["pixels"], batch["input_ids"], batch["attention_mask"]).logits
    probabilities, classes = logits.softmax(-1).topk(min(top, len(bundle.vocabulary)))
    answers = bundle.vocabulary.answers
    rows = []
    for name, cs, ps in zip(batch.ids, classes.tolist(), probabilities.tolist(), strict=True):
        ranked = [{"answer": answers[c], "probability": p} for c, p in zip(cs, ps, strict=True)]
        rows.append({"id": name, "answers": ranked})
    return rows


def answer_image(run: Path, image: Path, question: str, top: int, modality: str = "") -> list[dict[str, Any]]:
    """Return the `top` answers to a question about an image file; of a vision-language model its one answer, for which
    some need to know the image's `modality`, and about each image where `image` is a folder."""
    if not question.strip():
        raise UserError("--question is empty")
    folder = model_folder(run)
    if holds_vlm(folder):
        from preceptor.grounding.serve import answer_with_boxes
        from preceptor.grounding.sources import read_images

        if image.is_dir():
            return answer_with_boxes(folder, read_images(image, [question]).dialogues, modality)
        load_image(image)  # a broken file is named before the model is loaded
        asked = Dialogue("question", (image,), ((question, ""),), "mia", modality, "", "test")
        return answer_with_boxes(folder, [asked], modality)
    load_image(image)
    bundle = VqaBundle.load(run)
    sample = Sample("question", image, question, ("",), "open", "", "test")
    examples = VqaExamples([sample], bundle.tokenizer, bundle.vocabulary, bundle.preprocessing, DataConfig())
    return _answers(bundle, next(iter(examples.loader([[0]]))), top)


def answer_table(run: Path, table: Path, output: Path | None, top: int, modality: str = "") -> list[dict[str, Any]]:
    """Answer every question of a table, whatever its split; written as JSON lines to `output` if given."""
    folder = model_folder(run)
    if holds_vlm(folder):
        from preceptor.grounding.serve import answer_with_boxes

        samples = read_table(table, answered=False).samples
        asked = [Dialogue(s.id, (s.image,), ((s.question, ""),), "mia", modality, s.group, "test") for s in samples]
        rows = answer_with_boxes(folder, asked, modality)
    else:
        bundle = VqaBundle.load(run)
        samples = read_table(table, answered=False).samples
        examples = VqaExamples(samples, bundle.tokenizer, bundle.vocabulary, bundle.preprocessing, DataConfig())
        lists = [list(range(i, min(i + 64, len(samples)))) for i in range(0, len(samples), 64)]
        rows = [row for batch in examples.loader(lists) for row in _answers(bundle, batch, top)]
    if output is not None:
        write_text(output, json_lines(rows))
    return rows


def cache_run(recipe: VqaRecipe, share: float) -> dict[str, Any]:
    """Write the teacher's cache of a recipe if it is not there, or not as it must be; or recompute a share of it.

    A cache that is verified is never written again first: `mismatches` and `damage` say what is wrong with it.
    """
    from preceptor.teachers.cache import verify
    from preceptor.vqa.run import open_classroom
    from preceptor.vqa.stage import cache_folder, teacher_folders
    from preceptor.vqa.teachers import cached_teacher, every_view, online_teacher

    if recipe.method.teaching.kind == "ema":
        raise UserError("method.teaching.kind=ema has no teacher to cache; use cached or online")
    if recipe.data.augment.enabled and recipe.data.augment.views < 1:
        raise UserError(
            "a cache cannot hold endless augmentation views: set data.augment.views=N, or data.augment.enabled=false"
        )
    room = open_classroom(recipe)
    layers = recipe.student.model.layers
    source, config = online_teacher(teacher_folders(recipe), recipe.method, layers, repeats=recipe.data.augment.repeats)
    folder = cache_folder(recipe)
    paths = recipe.method.teacher_features(layers, config.layers)
    cached = cached_teacher(folder, room, source, paths, renew=share == 0)
    rows, batches = every_view(room)
    report = {"folder": str(folder), "rows": rows, "checked": 0, "worst": 0.0, "mismatches": [], "damage": ""}
    if share > 0:
        try:
            cached.verify_files()
        except UserError as error:
            report["damage"] = str(error)
        checked = verify(cached, source, batches, fraction=share, seed=recipe.seed)
        report |= {"checked": checked.checked, "worst": checked.worst, "mismatches": checked.mismatched}
    return report


def check_run(name: str, overrides: list[str]) -> dict[str, Any]:
    """Return what `doctor` finds in the data of a recipe, a run or a table."""
    path = Path(name)
    if path.suffix in (".csv", ".jsonl"):
        data, limits = read_table(path), {}
    else:
        recipe = load_recipe(name, overrides)
        if isinstance(recipe, SegmentationRecipe):
            from preceptor.segmentation.serve import check_recipe

            return check_recipe(recipe)
        if isinstance(recipe, GroundingRecipe):
            from preceptor.grounding.serve import check_dialogues

            return check_dialogues(recipe)
        data = read_data(recipe.data, recipe.output_folder / "data", needed=())
        limits = {"max_bytes": recipe.data.max_image_bytes, "max_pixels": recipe.data.max_image_pixels}
    findings = [
        {"severity": f.severity, "ids": list(f.sample_ids), "file": f.file.name if f.file else "", "reason": f.reason}
        for f in [*check_images(data.samples, **limits), *check_data(data)]
    ]
    return {
        "name": data.name,
        "variant": data.variant,
        "notes": data.notes,
        "rows": {split: len(data.split(split)) for split in ("train", "validation", "test")},
        "images": len({sample.image for sample in data.samples}),
        "findings": findings,
    }


def report_run(run: Path) -> Path:
    """Write a run's report page from what lies in its folder."""
    from preceptor.vqa.report import write_report

    if not (run / "results.json").is_file():
        raise UserError(f"{run} has no results.json; `preceptor train` writes it when a run is finished")
    recipe = load_recipe(str(run))
    if isinstance(recipe, SegmentationRecipe):
        from preceptor.segmentation.serve import report_segmentation

        return report_segmentation(run, recipe)
    if isinstance(recipe, GroundingRecipe):
        from preceptor.grounding.serve import report_dialogues

        return report_dialogues(run, recipe)
    try:
        data = read_data(recipe.data, recipe.output_folder / "data")
    except UserError:
        data = None  # the page is then written without the questions' images
    return write_report(run, data=data, recipe=recipe)
