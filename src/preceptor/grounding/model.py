"""A Qwen-VL model that answers questions about images with texts and boxes, with guided rotary positions."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from preceptor.data.grounding.box_formats import CANONICAL, FAMILY_FORMATS, require_format
from preceptor.data.limits import MAX_BYTES, MAX_PIXELS
from preceptor.data.types import Dialogue
from preceptor.errors import UserError, nearest
from preceptor.files import apply_umask, write_text
from preceptor.grounding.checkpoint_files import (
    checkpoint_file,
    load_image_processor,
    load_tokenizer,
    shrink_images,
)
from preceptor.grounding.dialogue_encoder import IGNORED, DialogueEncoder, ModalityRows
from preceptor.grounding.guided_rope import FAMILIES, Guidance, attach, positions
from preceptor.grounding.trained_weights import (
    ADAPTERS,
    LoraSettings,
    Training,
    base_weights,
    merged_weights,
    new_merger,
    set_trainable,
)
from preceptor.hub import find_pretrained, hide_progress_bars
from preceptor.pipeline.model_files import (
    bounded_by_weights,
    check_loaded,
    check_weights,
    read_settings,
    reading,
    require_finite,
)

GUIDANCE_FILE = "guidance.json"
BOX_FORMAT_FILE = "box_format.json"
# Files that are copied from the checkpoint, because the Qwen processors of transformers need them.
_COPIED_FILES = ("video_preprocessor_config.json",)


class AnswerStates(NamedTuple):
    """The T answer tokens of a batch.

    `hidden` (T, D) are the states that predict `targets` (T,), and `rows` (T,) are the indices of the dialogues.
    """

    hidden: Tensor
    targets: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Boxes in `text` are in the canonical format, whatever the format of the model (see `data.grounding.box_formats`).
    `confidence` and `margin` (see `grounding.curriculum.confidence_and_margin`) are computed over its `tokens`,
    including the end token, at temperature 1, or None if they were not requested. `ended` is False if the answer was
    truncated.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool
    confidence: float | None = None
    margin: float | None = None


class GroundedVlm(nn.Module):
    """A Qwen-VL model of one of `FAMILIES` with its dialogue encoder and its guidance.

    Create it with `load`. `model` is the transformers model or the PEFT model around it. A learnable guidance table is
    a parameter. Calling the module calls `hidden`, so that parallel wrappers see one forward pass.
    """

    def __init__(self, model: Any, encoder: DialogueEncoder, guidance: Guidance, copied: Sequence[Path] = ()) -> None:
        super().__init__()
        self.model, self.encoder, self.guidance, self._copied = model, encoder, guidance, tuple(copied)

    @classmethod
    @hide_progress_bars()
    def load(
        cls,
        source: str | Path,
        *,
        training: Training = "full",
        lora: LoraSettings = ADAPTERS,
        guidance: Guidance | None = None,
        modality_rows: ModalityRows | None = None,
        max_pixels: int | None = None,
        max_length: int = 2048,
        dtype: torch.dtype | None = None,
        attention: str | None = None,
        box_format: str | None = None,
        max_image_bytes: int = MAX_BYTES,
        max_image_pixels: int = MAX_PIXELS,
        allow_downloads: bool = False,
    ) -> GroundedVlm:
        """Load the model of a Hugging Face folder or hub name.

        Args:
            source: Folder or hub name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint.
            training: `full`: train all weights. `frozen_vision`: train all weights except the vision tower with its
                merger. `lora`: train adapters of the language model only. The merger of a DINOv2 tower is new and
                always trained.
            lora: Settings of the adapters.
            guidance: Guidance of the rotary positions. Default: the one that `save` stored, else `none`.
            modality_rows: Modality probabilities of the images of a dialogue, for guidance `clip`. Default: the
                modality that the data set gives (`modality_clip.by_name`).
            max_pixels: Larger images are resized to this number of pixels. Default: the limit of the checkpoint.
            max_length: Largest number of tokens of a dialogue.
            dtype: Data type of the weights. Default: that of the checkpoint.
            attention: `attn_implementation` of transformers, such as sdpa or flash_attention_2.
            box_format: Format in which the model reads and writes boxes. Default: see `stored_box_format`.
            max_image_bytes: Largest accepted image file (see `data.images.load_image`).
            max_image_pixels: Largest accepted number of pixels, before an image is resized to `max_pixels`.
            allow_downloads: Whether to download files that are not in the local hub cache.

        Raises:
            UserError: the checkpoint does not exist, belongs to another family, or lacks a part.
        """
        if training not in ("full", "lora", "frozen_vision"):
            raise UserError(f"training {training!r} is not known{nearest(training, ['full', 'lora', 'frozen_vision'])}")
        from transformers import AutoConfig, AutoModelForImageTextToText

        location = find_pretrained(str(source), allow_downloads=allow_downloads)
        if location is None:
            raise UserError(
                f"{source} is neither a folder with a config.json nor in the local hub cache; give the folder of a "
                "Qwen-VL checkpoint, or set allow_downloads=true to fetch it from the hub"
            )
        options = {"local_files_only": not allow_downloads, "trust_remote_code": False}
        with reading(source, "config.json"):
            config = AutoConfig.from_pretrained(location, **options)
        if config.model_type not in FAMILIES:
            raise UserError(f"{source} is a model of type {config.model_type!r}; give one of {', '.join(FAMILIES)}")
        parts = (source, location, config, options)
        tokenizer, processor = load_tokenizer(*parts), load_image_processor(*parts)
        if max_pixels is not None:
            shrink_images(processor, max_pixels)
        attention_options = {} if attention is None else {"attn_implementation": attention}
        with reading(source, "the weights"):
            # The weights of a hub model lie beside its config.json.
            file = checkpoint_file(location, "config.json", options)
            with bounded_by_weights(file.parent) if file else contextlib.nullcontext():
                found: Any = AutoModelForImageTextToText.from_pretrained(
                    location,
                    dtype=dtype or "auto",
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    use_safetensors=True,
                    **attention_options,
                    **options,
                )
            model, loaded = found
            check_loaded(source, loaded)
            check_weights(location, model)
        if guidance is None:
            file = checkpoint_file(location, GUIDANCE_FILE, options)
            with reading(source, GUIDANCE_FILE):
                guidance = Guidance(**read_settings(file)) if file else Guidance("none")
        if guidance.kind == "clip" and modality_rows is None:
            from preceptor.grounding.modality_clip import of_dialogue

            modality_rows = of_dialogue
        rows = modality_rows if guidance.kind == "clip" else None
        box_format = box_format or stored_box_format(location, config, options)
        if not (attention or "").startswith("flash"):  # which computes on GPUs only
            trial = _GreyImage(tokenizer, processor, config.image_token_id, box_format=box_format)
            with reading(source):
                cls(model, trial, Guidance("none"))._try_out()
        encoder = DialogueEncoder(
            tokenizer,
            processor,
            config.image_token_id,
            max_length=max_length,
            modality_rows=rows,
            max_image_bytes=max_image_bytes,
            max_image_pixels=max_image_pixels,
            box_format=box_format,
        )
        copied = [file for name in _COPIED_FILES if (file := checkpoint_file(location, name, options))]
        return cls(set_trainable(model, training, lora), encoder, guidance, copied)

    def _try_out(self) -> None:
        """Answer a question about a grey image: an unusable setting is an error before training or the first question.

        Raises UserError if the answer has probabilities that are not finite, and errors of any kind from libraries.
        """
        dialogue = Dialogue("trial", (Path("grey"),), (("Where?", ""),), "vg", "", "", "test")
        answer = self.generate([dialogue], max_new_tokens=2, with_confidence=True)[0][0]
        require_finite(torch.tensor(answer.confidence), None)

    @property
    def base(self) -> Any:
        """The transformers model, without the PEFT wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def lm_head_weight(self) -> Tensor:
        """The output weights (vocabulary, D), which may be tied to the token embeddings."""
        return self.base.get_output_embeddings().weight

    def checkpoint_activations(self) -> None:
        """Enable non-reentrant activation checkpointing (Chen et al. 2016)."""
        base = self.base
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def forward(self, batch: Mapping[str, Tensor]) -> AnswerStates:
        return self.hidden(batch)

    def hidden(self, batch: Mapping[str, Tensor]) -> AnswerStates:
        """Return the hidden states that predict the answer tokens of a batch of `DialogueEncoder.collate`.

        The logits are ``hidden @ lm_head_weight.T``; `distill.chunked_kl` avoids storing all of them at once.
        """
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        images = {name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch}
        position_ids, _ = positions(
            self.config,
            self.guidance,
            batch["input_ids"],
            batch.get("image_grid_thw"),
            batch["attention_mask"],
            probabilities=batch.get("modalities"),
            mm_token_type_ids=batch["mm_token_type_ids"],
        )
        blank = None
        if not images and any(isinstance(module, FSDPModule) for module in self.base.model.visual.modules()):
            blank = self._blank_image(
                position_ids.device
            )  # at the position of an image, so that all processes gather weights in the same order
        call = {**inputs, **images, "position_ids": position_ids, "use_cache": False}
        if self.guidance.learnable:  # its gradient passes through the rotation only inside `attach`
            with attach(self.base, self.guidance):
                states = self.base.model(**call).last_hidden_state
        else:
            states = self.base.model(**call).last_hidden_state
        if blank is not None:
            states = states + 0 * blank.to(states.dtype)
        answers = batch["labels"][:, 1:] != IGNORED
        return AnswerStates(states[:, :-1][answers], batch["labels"][:, 1:][answers], answers.nonzero()[:, 0])

    def _blank_image(self, device: torch.device) -> Tensor:
        """Run the vision tower on a blank image and return a number that depends on it.

        If the tower is sharded, every process must run it for every batch. A process without images would leave the
        others waiting for its shard of the weights.
        """
        vision = self.config.vision_config
        patches = vision.spatial_merge_size**2
        numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(patches, numbers, device=device)
        grid = torch.tensor([[1, vision.spatial_merge_size, vision.spatial_merge_size]], device=device)
        output = self.base.model.visual(pixels, grid_thw=grid)
        # Use all parameters, so that all processes reduce the same gradients.
        parts = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
        return torch.stack([part.float().sum() for part in parts]).sum()

    def forget_images(self) -> None:
        """Let the vision tower compute all images anew that it remembers (see `dinov2_tower.Dinov2Tower`)."""
        if new_merger(self.base):
            self.base.model.visual.forget()

    @torch.inference_mode()
    def generate(
        self,
        dialogues: Sequence[Dialogue],
        *,
        candidates: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 64,
        with_confidence: bool = False,
        batch_size: int = 8,
        seed: int | None = None,
    ) -> list[list[Answer]]:
        """Generate answers to the last question of each dialogue. Earlier turns are the history.

        Args:
            dialogues: The dialogues.
            candidates: Number of answers per dialogue.
            temperature: 0 decodes greedily; above 0 samples from the full distribution.
            max_new_tokens: Largest number of tokens of an answer.
            with_confidence: Whether to compute confidence and margin.
            batch_size: Number of dialogues per batch.
            seed: Seed of the sampling. Default: the global state of torch.

        Returns:
            A list of `candidates` answers per dialogue.

        Raises:
            UserError: `DialogueEncoder.encode` refuses a dialogue, or several candidates have temperature 0.
        """
        if candidates < 1 or temperature < 0 or (candidates > 1 and temperature == 0):
            raise UserError(
                f"candidates={candidates} at temperature={temperature}: candidates must be at least 1, and several "
                "candidates need a temperature above 0, because greedy decoding makes them equal"
            )
        from transformers import GenerationConfig

        end = self._end_ids()
        # Set all options, because those of Qwen checkpoints penalise repetition and sample from few tokens.
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            num_return_sequences=candidates,
            eos_token_id=sorted(end),
            pad_token_id=self._pad_id(),
            repetition_penalty=1.0,
            **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        )
        device, was_training = self.lm_head_weight.device, self.training
        answers_of_dialogues: list[list[Answer]] = []
        self.eval()
        devices = [] if device.type == "cpu" else [device]
        try:
            with torch.random.fork_rng(devices=devices, enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                for start in range(0, len(dialogues), batch_size):
                    rows = [self.encoder.encode(d, prompt=True) for d in dialogues[start : start + batch_size]]
                    batch = {name: value.to(device) for name, value in self.encoder.collate(rows, "left").items()}
                    answers = [
                        replace(answer, text=self.encoder.read_answer(answer.text, rows[i // candidates]))
                        for i, answer in enumerate(self._answer(batch, config, end, with_confidence))
                    ]
                    answers_of_dialogues += [answers[i : i + candidates] for i in range(0, len(answers), candidates)]
        finally:
            self.train(was_training)
        return answers_of_dialogues

    def _answer(self, batch: dict[str, Tensor], config: Any, end: set[int], with_confidence: bool) -> list[Answer]:
        """Generate the answers of a left-padded batch; the candidates of each dialogue are adjacent."""
        from transformers import LogitsProcessorList

        recorder = _TopTwo()
        batch.pop("labels")
        with attach(self.base, self.guidance, batch.pop("modalities", None)):
            out = self.base.generate(
                **batch,
                generation_config=config,
                logits_processor=LogitsProcessorList([recorder] if with_confidence else []),
            )
        new_NS = out[:, batch["input_ids"].shape[1] :].tolist()
        if with_confidence:
            top_NS2 = torch.stack(recorder.steps, dim=1).cpu()
        answers = []
        for row, ids in enumerate(new_NS):
            length = next((i + 1 for i, token in enumerate(ids) if token in end), len(ids))
            answer_ids, confidence, margin = ids[:length], None, None
            if with_confidence:
                first, second = top_NS2[row, :length].unbind(-1)
                confidence, margin = first.mean().item(), (first - second).mean().item()
            answers.append(
                Answer(self.encoder.decode(answer_ids), tuple(answer_ids), answer_ids[-1] in end, confidence, margin)
            )
        return answers

    def _end_ids(self) -> set[int]:
        """Return the tokens that end an answer, according to the tokenizer and the checkpoint."""
        named = getattr(self.base.generation_config, "eos_token_id", None)
        ends = {self.encoder.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
        return {end for end in ends if end is not None}

    def _pad_id(self) -> int:
        pad = self.encoder.tokenizer.pad_token_id
        return self.encoder.tokenizer.eos_token_id if pad is None else pad

    @hide_progress_bars()
    def save(self, folder: Path, *, adapter: bool = False) -> None:
        """Write a Hugging Face folder that `from_pretrained` loads, the guidance, and the format of the boxes.

        Adapters are merged into the written weights, but not into the model. With `adapter`, only the adapters are
        written, in the format of PEFT.

        Raises:
            UserError: `adapter` is set, but the model has no adapters.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        adapted = hasattr(self.model, "get_base_model")
        if adapter and not adapted:
            raise UserError("the model has no adapters to save; remove adapter=True, or train with training=lora")
        if adapter:
            self.model.save_pretrained(folder)
        else:
            weights = merged_weights(self.base) if adapted else base_weights(self.base)
            self.base.save_pretrained(folder, state_dict=weights)
        self.encoder.tokenizer.save_pretrained(folder)
        self.encoder.image_processor.save_pretrained(folder)
        for file in self._copied:
            if file.is_file() and file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)
        write_text(folder / GUIDANCE_FILE, json.dumps(self.guidance.settings(), indent=1) + "\n")
        write_text(folder / BOX_FORMAT_FILE, json.dumps({"format": self.encoder.box_format}) + "\n")
        apply_umask(folder)


def stored_box_format(place: str, config: Any, options: dict[str, Any]) -> str:
    """Return the format in which a checkpoint reads and writes boxes.

    It is the one that `save` stored. Models that were saved with a guidance only were trained by an earlier version,
    in the canonical format. Other checkpoints write the format of their family.

    Raises:
        UserError: the stored format is not known.
    """
    if file := checkpoint_file(place, BOX_FORMAT_FILE, options):
        with reading(place, BOX_FORMAT_FILE):
            return require_format(read_settings(file)["format"]).name
    if checkpoint_file(place, GUIDANCE_FILE, options):
        return CANONICAL
    if config.model_type not in FAMILY_FORMATS:
        raise UserError(f"{place} is a model of type {config.model_type!r}; give one of {', '.join(FAMILY_FORMATS)}")
    return FAMILY_FORMATS[config.model_type]


def checkpoint_box_format(source: str, *, allow_downloads: bool = False) -> str:
    """Return `stored_box_format` of a folder or hub name, without its weights.

    Raises UserError as `GroundedVlm.load`.
    """
    from transformers import AutoConfig

    location = find_pretrained(source, allow_downloads=allow_downloads)
    if location is None:
        raise UserError(f"{source} is neither a folder with a config.json nor in the local hub cache")
    options = {"local_files_only": not allow_downloads, "trust_remote_code": False}
    with reading(source, "config.json"):
        config = AutoConfig.from_pretrained(location, **options)
    return stored_box_format(location, config, options)


class _GreyImage(DialogueEncoder):
    """An encoder that needs no file: each dialogue has one grey image."""

    def _images(self, dialogue: Dialogue) -> tuple[Tensor, Tensor]:
        processed = self.image_processor(images=[Image.new("RGB", (64, 64), (128, 128, 128))], return_tensors="pt")
        return processed["image_grid_thw"], processed["pixel_values"]

    def box_sizes(self, dialogue: Dialogue, grids: Tensor | None) -> list[tuple[int, int]]:
        return [(64, 64)]


class _TopTwo:
    """A logits processor that records the two highest probabilities of every step and changes nothing.

    `generate` calls it before the temperature is applied.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.float().softmax(-1).topk(2, dim=-1).values)
        return scores
