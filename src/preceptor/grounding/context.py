"""What the stages of a grounding run share: data, text similarity, and the checkpoints that models start from."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from preceptor.data import provenance
from preceptor.data.grounding.box_formats import FAMILY_FORMATS
from preceptor.data.types import Dialogue, GroundingDataset, Split
from preceptor.distributed import processes
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.grounding.clinkd import ClinkdConfig
from preceptor.grounding.config import GroundingRecipe, VlmConfig
from preceptor.grounding.dialogue_encoder import ModalityRows
from preceptor.grounding.guided_rope import Guidance
from preceptor.grounding.modality_clip import ModalityClip, modality_probabilities
from preceptor.grounding.model import GroundedVlm, checkpoint_box_format
from preceptor.grounding.new_vlm import new_vlm
from preceptor.grounding.selection import Similarity
from preceptor.grounding.sentence_similarity import choose_similarity
from preceptor.grounding.trained_weights import LoraSettings
from preceptor.pipeline.run_dir import read_object
from preceptor.recipe import differences

MADE_FROM = "made_from.json"
"""File in the folder of a new model: the settings and the texts that it was made from."""


@dataclass
class RunContext:
    """The recipe and the data of a run, and what is derived from them once for all stages."""

    recipe: GroundingRecipe
    data: GroundingDataset

    @cached_property
    def similarity(self) -> Similarity:
        return choose_similarity(self.recipe.method.similarity, allow_downloads=self.recipe.allow_downloads)

    def readable(self, split: Split) -> list[Dialogue]:
        """Return the dialogues of a split, with `data.broken=skip` without those that have a broken image."""
        return [row for row in self.data.split(split) if row.id not in self.broken_ids]

    @cached_property
    def broken_ids(self) -> frozenset[str]:
        """Ids of the dialogues with an image that cannot be read; empty if the recipe stops at such an image.

        All processes must ask for it first at the same point of the run.
        """
        config = self.recipe.data
        if config.broken != "skip":
            return frozenset()
        with processes().main_process_first():
            readable = provenance.hash_images(
                [path for row in self.data.samples for path in row.images],
                self.recipe.output_folder / provenance.CACHE,
                max_bytes=config.max_image_bytes,
                max_pixels=config.max_image_pixels,
            )
        return frozenset(row.id for row in self.data.samples if not readable.keys() >= set(row.images))

    @cached_property
    def modality_rows(self) -> ModalityRows | None:
        """The modality probabilities of images by a CLIP-like model; None to use the modality that the data name."""
        scorer = self.recipe.method.guidance.scorer
        if self.recipe.method.guidance.kind != "clip" or scorer is None:
            return None
        clip = ModalityClip.load(scorer, allow_downloads=self.recipe.allow_downloads)
        rows = [row for row in self.data.samples if row.id not in self.broken_ids]
        paths = list(dict.fromkeys(image for row in rows for image in row.images))
        with processes().main_process_first():
            found = modality_probabilities(
                paths,
                clip,
                file=self.recipe.output_folder / "modalities.json",
                max_bytes=self.recipe.data.max_image_bytes,
                max_pixels=self.recipe.data.max_image_pixels,
            )
        known = dict(zip(paths, found, strict=True))
        return lambda dialogue: torch.stack([known[image] for image in dialogue.images])

    def source(self, config: VlmConfig, name: str) -> str:
        """Return the checkpoint that a model starts from.

        If the recipe names none, a new one is made in the output folder. Its vocabulary is learned from the training
        texts, so it is the same for teacher and students. A model of other settings or texts is replaced.

        Raises:
            UserError: a training of this run has started from a model of other settings or texts.
        """
        if config.source is not None:
            return config.source
        folder, new, texts = self.recipe.output_folder / f"new-{name}", config.new, corpus(self.data)
        made_from = {
            name: {"model": {"new": new.model_dump(mode="json"), "max_pixels": config.max_pixels}},
            "seed": self.recipe.seed,
            # A language model has its own vocabulary.
            "texts": None if new.language_model else hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        }
        data = self.recipe.data.resume_settings()
        if (folder / "preprocessor_config.json").is_file():
            stored = _read_made_from(folder)
            if stored is not None and all(stored.get(key) == value for key, value in made_from.items()):
                return str(folder)
            if self._has_checkpoints(name):
                if stored is None:  # by an earlier version; a training compares its own settings when it is resumed
                    return str(folder)
                changed = differences(stored, made_from | {"data": data})
                raise UserError(
                    f"{self.recipe.output_folder} contains a run of another recipe ({'; '.join(changed[:12])}), which "
                    f"started from {folder.name}; restore these values, set output=FOLDER to another folder, or start "
                    "again with resume=never"
                )
        shutil.rmtree(folder, ignore_errors=True)
        new_vlm(
            folder,
            texts,
            family=new.family,
            size=new.size,
            seed=self.recipe.seed,
            vocabulary_size=new.vocabulary_size,
            max_pixels=config.max_pixels,
            language_model=new.language_model,
            vision=new.vision,
        )
        # The settings of the data only help to name the cause of other texts.
        write_text(folder / MADE_FROM, json.dumps(made_from | {"data": data}, indent=1))
        return str(folder)

    def _has_checkpoints(self, name: str) -> bool:
        """Return whether a training of the teacher or of a student has a checkpoint in the output folder."""
        root = self.recipe.output_folder
        of_stages = root.glob("*/checkpoints/step-*")
        return any(root.glob("checkpoints/step-*")) or any(
            (path.parent.parent.name == "teacher") == (name == "teacher") for path in of_stages
        )

    def box_format(self, config: VlmConfig, run: str | None = None) -> str:
        """Return the format of the boxes of a model of the recipe, or of the model of another run.

        The setting decides before what the checkpoint says.
        """
        if config.box_format != "auto":
            return config.box_format
        source = run or config.source
        if source is None:
            return FAMILY_FORMATS[config.new.family]
        return checkpoint_box_format(source, allow_downloads=self.recipe.allow_downloads)

    def load(self, source: str, config: VlmConfig, guidance: Guidance | None, seed: int) -> GroundedVlm:
        """Return a model to train. New adapters are drawn from `seed`."""
        half = config.training == "lora" and config.lora.base == "bfloat16"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vlm = GroundedVlm.load(
                source,
                training=config.training,
                guidance=guidance,
                max_pixels=config.max_pixels,
                lora=LoraSettings(config.lora.rank, config.lora.alpha, config.lora.dropout),
                max_length=config.max_length,
                dtype=torch.bfloat16 if half else torch.float32,
                box_format=None if config.box_format == "auto" else config.box_format,
                allow_downloads=self.recipe.allow_downloads,
                modality_rows=self.modality_rows,
                **self.recipe.data.image_limits,
            )
        if config.gradient_checkpointing:
            vlm.checkpoint_activations()
        return vlm


def _read_made_from(folder: Path) -> dict[str, Any] | None:
    path = folder / MADE_FROM
    return read_object(path, path.read_bytes(), f"delete {folder}") if path.is_file() else None


def corpus(data: GroundingDataset) -> list[str]:
    """Return the texts of the splits `train` and `teacher`, on which the tokenizer of a new model is trained."""
    return [text for row in data.samples if row.split in ("train", "teacher") for turn in row.turns for text in turn]


def guidance_of(config: ClinkdConfig) -> Guidance:
    """Return the rotary guidance of a recipe."""
    g = config.guidance
    if g.kind == "none":
        return Guidance("none")
    if g.kind == "fixed":
        return Guidance("fixed", gap=g.gap, row_step=g.row_step, column_step=g.column_step)
    return Guidance("clip", table=g.rows, learnable=g.learnable)
