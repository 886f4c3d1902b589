"""The dialogues of the test split about other images: blank, exchanged and mirrored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from preceptor.data.grounding.box_formats import edit_marked, mark_boxes
from preceptor.data.grounding.boxes import SIDE, Box
from preceptor.data.images import load_image
from preceptor.data.types import Dialogue
from preceptor.grounding.config import DialogueDataConfig
from preceptor.grounding.metrics import Row, row_score
from preceptor.pipeline.image_reliance import exchange_images, image_reliance


@dataclass
class OtherImages:
    """Writes other images into a folder, because a model reads its images from files.

    All have the size of the image whose place they take, so that boxes in pixels keep their meaning.

    Attributes:
        folder: where they are written.
        mean: the mean colour of the image processor, for blank images, each channel in [0, 1].
        config: limits of image files.
        sources: the image that each written file was made from.
    """

    folder: Path
    mean: Sequence[float]
    config: DialogueDataConfig
    sources: dict[Path, Path] = field(default_factory=dict)

    def dialogues(self, kind: str, dialogues: Sequence[Dialogue]) -> list[Dialogue]:
        """Return the dialogues about one kind of `pipeline.image_reliance.IMAGES`.

        In dialogues about mirrored images, all boxes of questions and answers are mirrored, too.

        Raises:
            UserError: the images cannot be exchanged between groups.
        """
        paths = list(dict.fromkeys(image for row in dialogues for image in row.images))
        sources = dict(zip(paths, paths, strict=True))
        if kind == "shuffled":
            sources = exchange_images([(row.group or str(image), image) for row in dialogues for image in row.images])
        files = {path: self._write(kind, path, sources[path]) for path in paths}
        found = [replace(row, images=tuple(files[image] for image in row.images)) for row in dialogues]
        if kind != "mirrored":
            return found
        return [
            replace(row, turns=tuple((mirror_boxes(question), mirror_boxes(answer)) for question, answer in row.turns))
            if row.images
            else row
            for row in found
        ]

    def _write(self, kind: str, path: Path, source: Path) -> Path:
        limits = {"max_bytes": self.config.max_image_bytes, "max_pixels": self.config.max_image_pixels}
        own = load_image(path, **limits).convert("RGB")
        if kind == "blank":
            red, green, blue = (round(255 * value) for value in self.mean)
            image = Image.new("RGB", own.size, (red, green, blue))
        elif kind == "mirrored":
            image = ImageOps.mirror(own)
        else:
            image = load_image(source, **limits).convert("RGB").resize(own.size, Image.Resampling.BILINEAR)
        file = self.folder / f"{len(self.sources)}.png"
        image.save(file)
        self.sources[file] = source
        return file


def mirror_boxes(text: str) -> str:
    """Return a text with its boxes as they are in the mirrored image. A box that cannot be read is kept."""

    def mirrored(_: str, box: Box | None) -> Box | None:
        return None if box is None else (SIDE - box[2], box[1], SIDE - box[0], box[3])

    return edit_marked(mark_boxes(text), mirrored)


def reliance_by_task(rows: Mapping[str, Sequence[Row]], protocol: str) -> dict[str, dict[str, Any]]:
    """Return what the other images change, by task and kind of image (`pipeline.image_reliance.image_reliance`).

    Args:
        rows: the rows of predictions by kind of image, with ``real`` first, all in the same order.
        protocol: `birdeval` or `strict`. Answers without a score are omitted.
    """
    found = {}
    for task in dict.fromkeys(row["task"] for row in rows["real"]):
        scored = {
            kind: [{**row, "score": row_score(row, protocol)} for row in one if row["task"] == task]
            for kind, one in rows.items()
        }
        known = {kind: [row for row in one if row["score"] is not None] for kind, one in scored.items()}
        if known["real"]:
            found[task] = image_reliance(known)
    return found
