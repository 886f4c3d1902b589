"""Model folders of the three tasks with damaged files, against the answers of the undamaged folder."""

from __future__ import annotations

import atexit
import functools
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from preceptor import api
from tests.fuzz.case_tables import nifti
from tests.fuzz.dialogues import replace_nested
from tests.fuzz.mutate import MUTATIONS, Mutation, json_values, mutate, rarely
from tests.fuzz.outcome import attempt, command, require
from tests.fuzz.target import Target

WEIGHTS = "model.safetensors"
WITHOUT_EFFECT = {"transformers_version", "provenance", "vocabulary", "architectures", "dropout"}
"""Keys of config.json that no answer depends on."""
MUST_EXIST = {"config.json", WEIGHTS, "preprocessor_config.json", "segmentation.json", "tokenizer.json"}
TENSOR_DAMAGE = ("missing", "extra", "renamed", "shape", "nan", "infinite", "integers")

Answers = Callable[[Path], list[dict[str, Any]]]


@dataclass(frozen=True)
class ModelInput:
    """Damage to one file of a model folder (a number).

    `replaced` is an odd value in a JSON file. `tensor` is a damage to the tensor of a number, in weights that are
    written again as a sound file.
    """

    file: int
    replaced: tuple[int, Any] | None
    mutations: tuple[Mutation, ...]
    tensor: tuple[str, int] | None
    deleted: bool
    by_command: bool


SOUND: dict[str, Any] = {"replaced": None, "mutations": (), "tensor": None, "deleted": False, "by_command": False}


def inputs(count: int) -> st.SearchStrategy[ModelInput]:
    """Return damages to one of `count` files; JSON files and weights are damaged most often."""

    def damage(**given: st.SearchStrategy[Any]) -> st.SearchStrategy[ModelInput]:
        parts = {name: st.just(value) for name, value in SOUND.items()} | given
        return st.builds(ModelInput, file=st.integers(0, count - 1), **{**parts, "by_command": rarely(30)})

    replaced = damage(replaced=st.tuples(st.integers(1, 60), json_values()))
    return st.one_of(
        replaced,
        replaced,
        damage(mutations=MUTATIONS.map(tuple)),
        damage(tensor=st.tuples(st.sampled_from(TENSOR_DAMAGE), st.integers(0, 999))),
        damage(deleted=st.just(True)),
        damage(),
    )


@functools.cache
def templates() -> Path:
    """Return a folder with a model folder of each task, an image and a volume."""
    from preceptor.grounding.new_vlm import new_vlm
    from preceptor.segmentation.config import EvaluationConfig
    from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
    from preceptor.segmentation.predict import SegmentationModel
    from tests.grounding.conftest import CORPUS
    from tests.vqa.conftest import make_bundle, make_data

    folder = Path(tempfile.mkdtemp(prefix="preceptor-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_bundle(make_data(folder / "images"), 16, 0).save(folder / "vqa")
    network = MultimodalUNet(MultimodalUNetConfig(("flair", "t1"), ("whole",), channels=(2, 2, 4)))
    SegmentationModel(
        network,
        {
            "regions": {"whole": [1]},
            "preparation": {"patch_size": [16, 16, 16], "intensity": "zscore", "spacing": None},
            "inference": EvaluationConfig().model_dump(mode="json"),
            "validation": {"flair": {"whole": 0.5}, "flair+t1": {"whole": 0.75}},
            "data": {"validation": 4},
        },
    ).save_pretrained(folder / "segmentation")
    new_vlm(folder / "grounding", CORPUS, "qwen2_vl", max_pixels=56 * 56)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 60)).astype(np.uint8)).save(folder / "image.png")
    (folder / "p0_flair.nii").write_bytes(nifti(rng.integers(1, 99, (16, 16, 16)).astype(np.int16)))
    return folder


def vqa_answers(model: Path) -> list[dict[str, Any]]:
    return api.predict(model, image=templates() / "image.png", question="Where is the disc?")


def segmentation_answers(model: Path) -> list[dict[str, Any]]:
    network = api.load(model)
    found = network.segment({"flair": templates() / "p0_flair.nii"})
    return [found.to_dict() | {"probabilities": found.probabilities.tolist(), "mask": found.mask.tolist()}]


def grounding_answers(model: Path) -> list[dict[str, Any]]:
    answer = api.load(model).ask(templates() / "image.png", "Where is the liver?", max_new_tokens=3)
    return [answer.to_dict()]


ANSWERS: dict[str, Answers] = {
    "vqa": vqa_answers,
    "segmentation": segmentation_answers,
    "grounding": grounding_answers,
}


@functools.cache
def right_answers(task: str) -> list[dict[str, Any]]:
    return ANSWERS[task](templates() / task)


def check(task: str, case: ModelInput, folder: Path) -> bool:
    """Load a damaged model folder and predict with it.

    Accepted weights are finite and have the names and shapes of the undamaged ones. Answers are those of the undamaged
    folder if nothing was changed that they depend on, and always texts with finite probabilities.
    """
    model = folder / "model"
    shutil.copytree(templates() / task, model)
    files = sorted(path for path in model.iterdir() if path.suffix in (".json", ".safetensors"))
    path = files[case.file % len(files)]
    same = damage_file(case, model, path)
    if case.by_command and task == "vqa":
        image = templates() / "image.png"
        return command("predict", model, "--image", image, "--question", "Where?", place=model).accepted
    right = right_answers(task)
    # A network of other modalities is a sound one; the message is then about those of the case.
    renamed = task == "segmentation" and not same and other_modalities(model / "config.json")
    outcome = attempt(lambda: ANSWERS[task](model), place="" if renamed else folder.name)
    if same:
        require(outcome.accepted, "a sound folder is refused", outcome.sentence)
    if not outcome.accepted:
        return False
    require(not case.tensor, "damaged weights were used", case.tensor)
    require(not case.deleted or path.name not in MUST_EXIST, "a file is missing", path.name)
    weights, sound = load_file(model / WEIGHTS), load_file(templates() / task / WEIGHTS)
    shapes = {name: array.shape for name, array in weights.items()}
    require(shapes == {name: array.shape for name, array in sound.items()}, "other tensors were used")
    require(all(np.isfinite(array).all() for array in weights.values()), "weights that are not finite were used")
    if same:
        require(outcome.value == right, "other answers", (outcome.value, right))
    for row in outcome.value:
        check_row(task, row)
    return True


def other_modalities(path: Path) -> bool:
    """Return whether config.json can be read and names other modalities than the undamaged one."""
    try:
        names = json.loads(path.read_bytes())["modalities"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return names != ["flair", "t1"]


def damage_file(case: ModelInput, model: Path, path: Path) -> bool:
    """Damage a folder; return whether the answers must stay the same."""
    if case.tensor is not None:
        damage_tensor(model / WEIGHTS, *case.tensor)
        return False
    data = path.read_bytes()
    if case.deleted:
        path.unlink()
        return False
    if case.replaced is not None and path.suffix == ".json":
        content = json.loads(data)
        changed = replace_nested(content, *case.replaced)
        path.write_text(json.dumps(changed), errors="surrogatepass")
        keys = {key for key in content if repr(changed.get(key)) != repr(content[key])}
        return path.name == "config.json" and keys <= {"transformers_version", "architectures"} and not keys
    if case.mutations:
        path.write_bytes(mutate(data, case.mutations))
    return path.read_bytes() == data


def damage_tensor(file: Path, kind: str, number: int) -> None:
    """Write weights again with one damaged tensor."""
    weights = load_file(file)
    name = sorted(weights)[number % len(weights)]
    array = weights[name]
    if kind in ("missing", "renamed"):
        del weights[name]
    if kind in ("renamed", "extra"):
        weights[f"{name}.other"] = array
    elif kind == "shape":
        weights[name] = np.concatenate([array, array]) if array.ndim else np.stack([array, array])
    elif kind in ("nan", "infinite") and array.size and array.dtype.kind == "f":
        array = array.copy()
        array.reshape(-1)[number % array.size] = np.nan if kind == "nan" else -np.inf
        weights[name] = array
    elif kind in ("integers", "nan", "infinite"):
        weights[name] = array.astype(np.int32) if array.dtype.kind == "f" else array.astype(np.float32)
    save_file(weights, file, {"format": "pt"})


def check_row(task: str, row: dict[str, Any]) -> None:
    """Raise Wrong unless a prediction is well formed."""
    if task == "segmentation":
        probabilities, mask = np.array(row["probabilities"]), np.array(row["mask"])
        # The probabilities are on the grid of the network, which the settings may change.
        require(mask.shape == (16, 16, 16) and probabilities.ndim == 4, "another shape", mask.shape)
        require(np.isfinite(probabilities).all() and np.isin(mask, range(256)).all(), "a mask that is no mask")
        for scores in (row["expected_dice"], row["expected_dice_of_all"]):
            right = scores is None or all(isinstance(v, float | int) and 0 <= v <= 1 for v in scores.values())
            require(right, "a Dice that is no number from 0 to 1 was shown", scores)
        require(type(row["validation_cases"]) is int, "a number of cases that is no number", row["validation_cases"])
        return
    for answer in row["answers"]:
        require(isinstance(answer["answer"], str), "an answer that is no text", answer)
        require(
            math.isfinite(answer["probability"]) and 0 <= answer["probability"] <= 1 + 1e-6, "a probability", answer
        )


def target(task: str, files: int, examples: int) -> Target:
    return Target(inputs(files), functools.partial(check, task), examples)


VQA = target("vqa", 5, 50)
SEGMENTATION = target("segmentation", 3, 40)
GROUNDING = target("grounding", 6, 25)
