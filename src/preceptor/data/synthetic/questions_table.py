"""Generate a VQA data set: synthetic cases, images cut from them, and questions with answers in a table.

It shows that a method works and is not evidence about medicine, as a file in the folder states.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preceptor.data.synthetic.anatomy import Region, make_case
from preceptor.data.synthetic.folder import write_once
from preceptor.data.synthetic.questions import ABNORMALITIES, AnswerBalance, ask, make_view
from preceptor.errors import UserError

FORMAT = 3
"""Increased whenever the same arguments give different files."""
VOXELS = 48
TABLE = "questions.jsonl"


def write_phantom(
    folder: Path, *, cases: int, questions_per_image: int, images_per_case: int, seed: int, image_size: int = 112
) -> Path:
    """Generate the data set in `folder` and return its table. An existing one of the same arguments is reused.

    About 70, 15 and 15 % of the cases form the training, validation and test splits; a case stays in one split. In
    addition to the columns of `data.vqa.table`, the table has `boxes` (``{name: [x0, y0, x1, y1]}`` in pixels, with
    exclusive ends), `findings` (the kind of each lesion by its name in `boxes`), `modality` and `region`.

    Raises:
        UserError: the folder contains something else or a changed phantom, or there are fewer than 3 cases.
    """
    if cases < 3:
        raise UserError(f"cases={cases} must be at least 3: one each for training, validation and test")
    arguments: dict[str, Any] = {
        "format": FORMAT,
        "cases": cases,
        "images_per_case": images_per_case,
        "questions_per_image": questions_per_image,
        "seed": seed,
        "image_size": image_size,
    }
    write_once(folder, arguments, lambda target: _write(target, arguments), _digest)
    return folder / TABLE


def _write(folder: Path, arguments: dict[str, Any]) -> None:
    (folder / "images").mkdir()
    splits = _splits(arguments["cases"], arguments["seed"])
    balances = {split: AnswerBalance() for split in ("train", "validation", "test")}
    rows = [row for i, split in enumerate(splits) for row in _case(folder, i, split, balances[split], arguments)]
    (folder / TABLE).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "README.txt").write_text(_readme(arguments), "utf-8")


def _digest(folder: Path) -> str:
    """Return a SHA-256 over the table and all images with their names."""
    digest = hashlib.sha256((folder / TABLE).read_bytes())
    for path in sorted((folder / "images").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _splits(cases: int, seed: int) -> list[str]:
    """Return the split of every case."""
    order = np.random.default_rng([seed, cases]).permutation(cases)
    held_out = max(1, round(0.15 * cases))
    splits = ["train"] * cases
    for place, number in enumerate(order[: 2 * held_out]):
        splits[number] = "validation" if place < held_out else "test"
    return splits


def _case(
    folder: Path, number: int, split: str, balance: AnswerBalance, arguments: dict[str, Any]
) -> list[dict[str, Any]]:
    """Write the images of a case and return its rows."""
    seed, size = arguments["seed"], arguments["image_size"]
    region: Region = "head" if np.random.default_rng([seed, number, 100]).random() < 0.5 else "torso"
    case = make_case(seed, number, region=region, size=VOXELS, contrasts=())
    rows = []
    for i in range(arguments["images_per_case"]):
        rng = np.random.default_rng([seed, number, 200 + i])
        view = make_view(case, rng)
        name = f"images/{case.id}-{i}.png"
        picture = Image.fromarray(view.image).resize((size, size), Image.Resampling.BICUBIC)
        picture.save(folder / name, optimize=False, compress_level=6)
        scale = size / VOXELS
        boxes = {
            key: [math.floor(x0 * scale), math.floor(y0 * scale), math.ceil(x1 * scale), math.ceil(y1 * scale)]
            for key, (x0, y0, x1, y1) in view.boxes().items()
        }
        findings = {f"lesion {lesion.index}": ABNORMALITIES[lesion.organ] for lesion in view.visible_lesions()}
        for k, question in enumerate(ask(view, rng, arguments["questions_per_image"], balance)):
            rows.append(
                {
                    "id": f"{case.id}-{i}-{k}",
                    "image": name,
                    "question": question.question,
                    "answer": question.answer,
                    "answer_type": question.answer_type,
                    "group": case.id,
                    "split": split,
                    "question_type": question.kind,
                    "boxes": boxes,
                    "findings": findings,
                    "modality": view.modality,
                    "region": region,
                }
            )
    return rows


def _readme(arguments: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in arguments.items())
    return (
        "SYNTHETIC IMAGES. No patient was imaged. The heads and torsos are computed from warped ellipsoids, "
        "the answers from their geometry.\nThey are for testing software and are not evidence about medicine.\n"
        f"Written by preceptor with: {settings}.\n"
    )
