"""What the stages of a grounding run share: data, text similarity, and the checkpoints that models start from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property

import torch

from preceptor.data import provenance
from preceptor.data.grounding.box_formats import FAMILY_FORMATS
from preceptor.data.types import Dialogue, GroundingDataset, Split
from preceptor.distributed import processes
from preceptor.grounding.clinkd import ClinkdConfig
from preceptor.grounding.config import GroundingRecipe, VlmConfig
from preceptor.grounding.dialogue_encoder import ModalityRows
from preceptor.grounding.guided_rope import Guidance
from preceptor.grounding.modality_clip import ModalityClip, modality_probabilities
from preceptor.grounding.model import GroundedVlm, LoraSettings, checkpoint_box_format
from preceptor.grounding.new_vlm import new_vlm
from preceptor.grounding.selection import Similarity
from preceptor.grounding.sentence_similarity import choose_similarity


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
        texts, so it is the same for teacher and students.
        """
        if config.source is not None:
            return config.source
        folder = self.recipe.output_folder / f"new-{name}"
        if not (folder / "preprocessor_config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            new = config.new
            new_vlm(
                folder,
                corpus(self.data),
                family=new.family,
                size=new.size,
                seed=self.recipe.seed,
                vocabulary_size=new.vocabulary_size,
                max_pixels=config.max_pixels,
                language_model=new.language_model,
                vision=new.vision,
            )
        return str(folder)

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


def corpus(data: GroundingDataset) -> list[str]:
    """Return the texts of the training parts, in their order: what new words are learnt from."""
    return [text for row in data.samples if row.split in ("train", "teacher") for turn in row.turns for text in turn]


def guidance_of(config: ClinkdConfig) -> Guidance:
    """Return the rotary guidance of a recipe."""
    g = config.guidance
    if g.kind == "none":
        return Guidance("none")
    if g.kind == "fixed":
        return Guidance("fixed", gap=g.gap, row_step=g.row_step, column_step=g.column_step)
    return Guidance("clip", table=g.rows, learnable=g.learnable)
