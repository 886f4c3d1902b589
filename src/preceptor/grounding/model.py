"""A Qwen-VL model that answers questions about images in words and boxes, with guided rotary positions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from preceptor.data.types import Dialogue
from preceptor.errors import UserError, nearest
from preceptor.grounding.checkpoint_files import (
    checkpoint_file,
    load_image_processor,
    load_tokenizer,
    read_part,
    shrink_images,
)
from preceptor.grounding.dialogue_encoder import IGNORED, DialogueEncoder, ModalityRows
from preceptor.grounding.guided_rope import FAMILIES, Guidance, attach, positions
from preceptor.hub import find_pretrained, hide_progress_bars

Training = Literal["full", "lora", "frozen_vision"]
GUIDANCE_FILE = "guidance.json"
# The linear layers of the language model: the vision tower of Qwen2.5-VL has layers of the same names.
ADAPTED = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
# What a Qwen-VL checkpoint has beside what is written anew; a real Qwen processor looks for it.
_KEPT_FILES = ("video_preprocessor_config.json",)


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2022) on all linear layers of the language model: W + (alpha / rank) B A."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05


class AnswerStates(NamedTuple):
    """The T tokens of a batch's answers: `hidden` (T, D) predict `targets` (T,); `rows` (T,) are their dialogues."""

    hidden: Tensor
    targets: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Answer:
    """A generated answer. `confidence` and `margin` are those of `distill.curriculum.sureness` over its `tokens`, the
    end mark included, at temperature 1; None where they were not asked for. `ended` is false where it was cut off."""

    text: str
    tokens: tuple[int, ...]
    ended: bool
    confidence: float | None = None
    margin: float | None = None


class GroundedVlm(nn.Module):
    """A model of one of `FAMILIES`, its encoder of dialogues, and its guidance; `load` one.

    `model` is the transformers model, or peft's around it. The guidance's table is a parameter where it is learnable.
    Calling it is `hidden`: the parallel wrappers of training see one forward pass.
    """

    def __init__(self, model: Any, encoder: DialogueEncoder, guidance: Guidance, kept: Sequence[Path] = ()) -> None:
        super().__init__()
        self.model, self.encoder, self.guidance, self._kept = model, encoder, guidance, tuple(kept)

    @classmethod
    @hide_progress_bars()
    def load(
        cls,
        source: str | Path,
        *,
        training: Training = "full",
        lora: LoraSettings = LoraSettings(),
        guidance: Guidance | None = None,
        modality_rows: ModalityRows | None = None,
        max_pixels: int | None = None,
        cut_off: int = 2048,
        dtype: torch.dtype | None = None,
        attention: str | None = None,
        allow_downloads: bool = False,
    ) -> GroundedVlm:
        """Return the model of a Hugging Face folder or hub name.

        Args:
            source: folder or hub name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint.
            training: `full`: all weights learn. `frozen_vision`: all but the vision tower with its merger. `lora`:
                adapters on the language model alone.
            guidance: of the rotary positions; by default what `save` wrote beside the weights, else `none`.
            modality_rows: modality probabilities of a dialogue's images, for guidance `clip`; by default from the
                dialogue's own word (`modality_clip.by_name`).
            max_pixels: images are shrunk to at most as many; by default the checkpoint's own ceiling.
            cut_off: the most tokens of a dialogue.
            dtype: of the weights; by default the checkpoint's own.
            attention: transformers' `attn_implementation`, such as sdpa or flash_attention_2; by default its choice.
            allow_downloads: ask the hub for what is not in its local cache.

        Raises:
            UserError: there is no such checkpoint, it is of another family, or a part of it is missing or does not fit
                the others.
        """
        if training not in ("full", "lora", "frozen_vision"):
            raise UserError(f"training {training!r} is not known{nearest(training, ['full', 'lora', 'frozen_vision'])}")
        from transformers import AutoConfig, AutoModelForImageTextToText

        place = find_pretrained(str(source), allow_downloads=allow_downloads)
        if place is None:
            raise UserError(
                f"{source} is neither a folder with a config.json nor in the local hub cache; give the folder of a "
                "Qwen-VL checkpoint, or set allow_downloads=true to fetch it from the hub"
            )
        options = {"local_files_only": not allow_downloads, "trust_remote_code": False}
        config = read_part(source, "config.json", lambda: AutoConfig.from_pretrained(place, **options))
        if config.model_type not in FAMILIES:
            raise UserError(f"{source} is a model of type {config.model_type!r}; give one of {', '.join(FAMILIES)}")
        parts = (source, place, config, options)
        tokenizer, processor = load_tokenizer(*parts), load_image_processor(*parts)
        if max_pixels is not None:
            shrink_images(processor, max_pixels)
        more = {} if attention is None else {"attn_implementation": attention}
        model, loaded = read_part(
            source,
            "the weights",
            lambda: AutoModelForImageTextToText.from_pretrained(
                place, dtype=dtype or "auto", output_loading_info=True, use_safetensors=True, **more, **options
            ),
        )
        wrong = sorted([*loaded["missing_keys"], *loaded["unexpected_keys"], *map(str, loaded["mismatched_keys"])])
        if wrong:
            raise UserError(
                f"the weights of {source} do not fit its config.json: {', '.join(wrong[:5])}"
                f"{', ...' if len(wrong) > 5 else ''}; copy the checkpoint again"
            )
        if guidance is None:
            file = checkpoint_file(place, GUIDANCE_FILE, options)
            guidance = Guidance(**json.loads(file.read_text("utf-8"))) if file else Guidance("none")
        if guidance.kind == "clip" and modality_rows is None:
            from preceptor.grounding.modality_clip import of_dialogue

            modality_rows = of_dialogue
        rows = modality_rows if guidance.kind == "clip" else None
        encoder = DialogueEncoder(tokenizer, processor, config.image_token_id, cut_off=cut_off, modality_rows=rows)
        kept = [file for name in _KEPT_FILES if (file := checkpoint_file(place, name, options))]
        return cls(_trained(model, training, lora), encoder, guidance, kept)

    @property
    def base(self) -> Any:
        """The transformers model, also where adapters are in it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def lm_head_weight(self) -> Tensor:
        """The output weights (vocabulary, D); tied to the word embeddings where the checkpoint ties them."""
        return self.base.get_output_embeddings().weight

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them (Chen et al. 2016), non-reentrant."""
        base = self.base
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def forward(self, batch: Mapping[str, Tensor]) -> AnswerStates:
        return self.hidden(batch)

    def hidden(self, batch: Mapping[str, Tensor]) -> AnswerStates:
        """Return the last hidden states that predict the answers' tokens of a batch of `DialogueEncoder.collate`.

        Logits would be ``hidden @ lm_head_weight.T``; `distill.chunked_kl` never holds them whole.
        """
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        images = {name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch}
        places, _ = positions(
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
            blank = self._blank_image(places.device)  # where an image would come: the order is the processes' too
        call = {**inputs, **images, "position_ids": places, "use_cache": False}
        if self.guidance.learnable:  # whose gradient passes through the rotation only while attached
            with attach(self.base, self.guidance):
                states = self.base.model(**call).last_hidden_state
        else:
            states = self.base.model(**call).last_hidden_state
        if blank is not None:
            states = states + 0 * blank.to(states.dtype)
        answers = batch["labels"][:, 1:] != IGNORED
        return AnswerStates(states[:, :-1][answers], batch["labels"][:, 1:][answers], answers.nonzero()[:, 0])

    def _blank_image(self, device: torch.device) -> Tensor:
        """Return a number out of the vision tower. Where it is sharded, every process must run it in every batch: one
        that has no image would leave the others waiting for its part of the weights."""
        vision = self.config.vision_config
        patches = vision.spatial_merge_size**2
        numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(patches, numbers, device=device)
        grid = torch.tensor([[1, vision.spatial_merge_size, vision.spatial_merge_size]], device=device)
        seen = self.base.model.visual(pixels, grid_thw=grid)
        # All of its parameters, or processes would sum the gradients of different ones.
        parts = [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or [])]
        return torch.stack([part.float().sum() for part in parts]).sum()

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
        """Return `candidates` answers to the last question of each dialogue; its earlier turns are the history.

        Args:
            temperature: 0 decodes greedily, one answer; above 0 samples from all words.
            with_confidence: give each answer's confidence and margin.
            batch_size: dialogues at a time.
            seed: of the sampled answers; without it torch's own state is used and moves on.

        Raises:
            UserError: as `DialogueEncoder.encode`, or several candidates at temperature 0.
        """
        if candidates < 1 or temperature < 0 or (candidates > 1 and temperature == 0):
            raise UserError(
                f"{candidates} candidates at temperature {temperature}: give at least 1, and for several a temperature "
                "above 0, as greedy ones would all be the same"
            )
        from transformers import GenerationConfig

        end = self._end_ids()
        # What is not said here comes from the checkpoint, and Qwen's penalise repetition and cut to the likeliest word.
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
        found: list[list[Answer]] = []
        self.eval()
        devices = [] if device.type == "cpu" else [device]
        try:
            with torch.random.fork_rng(devices=devices, enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                for start in range(0, len(dialogues), batch_size):
                    rows = [self.encoder.encode(d, prompt=True) for d in dialogues[start : start + batch_size]]
                    batch = {name: value.to(device) for name, value in self.encoder.collate(rows, "left").items()}
                    answers = self._answer(batch, config, end, with_confidence)
                    found += [answers[i : i + candidates] for i in range(0, len(answers), candidates)]
        finally:
            self.train(was_training)
        return found

    def _answer(self, batch: dict[str, Tensor], config: Any, end: set[int], with_confidence: bool) -> list[Answer]:
        """Return the answers of a left-padded batch, the candidates of each row side by side."""
        from transformers import LogitsProcessorList

        watch = _TopTwo()
        batch.pop("labels")
        with attach(self.base, self.guidance, batch.pop("modalities", None)):
            out = self.base.generate(
                **batch,
                generation_config=config,
                logits_processor=LogitsProcessorList([watch] if with_confidence else []),
            )
        new_NS = out[:, batch["input_ids"].shape[1] :].tolist()
        if with_confidence:
            top_NS2 = torch.stack(watch.steps, dim=1).cpu()
        answers = []
        for row, ids in enumerate(new_NS):
            length = next((i + 1 for i, token in enumerate(ids) if token in end), len(ids))
            said, confidence, margin = ids[:length], None, None
            if with_confidence:
                first, second = top_NS2[row, :length].unbind(-1)
                confidence, margin = first.mean().item(), (first - second).mean().item()
            answers.append(Answer(self.encoder.decode(said), tuple(said), said[-1] in end, confidence, margin))
        return answers

    def _end_ids(self) -> set[int]:
        """Return the tokens that end an answer: the tokenizer's own, and those that the checkpoint names."""
        named = getattr(self.base.generation_config, "eos_token_id", None)
        ends = {self.encoder.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
        return {end for end in ends if end is not None}

    def _pad_id(self) -> int:
        pad = self.encoder.tokenizer.pad_token_id
        return self.encoder.tokenizer.eos_token_id if pad is None else pad

    @hide_progress_bars()
    def save(self, folder: Path, *, adapter: bool = False) -> None:
        """Write an ordinary Hugging Face folder, which `from_pretrained` loads anywhere, and the guidance beside it.

        Adapters are merged into the weights that are written, not into the model. With `adapter` they alone are
        written, in peft's format. Raises UserError where there are none.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        adapted = hasattr(self.model, "get_base_model")
        if adapter and not adapted:
            raise UserError("the model has no adapters to save; leave adapter out, or train with training=lora")
        if adapter:
            self.model.save_pretrained(folder)
        else:
            self.base.save_pretrained(folder, state_dict=_merged(self.base) if adapted else _weights(self.base))
        self.encoder.tokenizer.save_pretrained(folder)
        self.encoder.image_processor.save_pretrained(folder)
        for file in self._kept:
            if file.is_file() and file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)
        (folder / GUIDANCE_FILE).write_text(json.dumps(self.guidance.settings(), indent=1) + "\n", "utf-8")


class _TopTwo:
    """A logits processor that changes nothing and keeps the two highest probabilities of every step.

    generate runs it before temperature is applied.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.float().softmax(-1).topk(2, dim=-1).values)
        return scores


def _trained(model: Any, training: Training, lora: LoraSettings) -> Any:
    if training == "frozen_vision":
        model.model.visual.requires_grad_(False)
    if training != "lora":
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("training=lora needs peft: pip install 'preceptor[lora]'; or take frozen_vision") from None

    return get_peft_model(
        model,
        LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=ADAPTED),  # type: ignore[arg-type]
    )


def _weights(base: Any) -> dict[str, Tensor]:
    """Return the weights by name, tied ones under each: `state_dict`, which would share gathered ones out again."""
    return {name: value.detach() for name, value in base.named_parameters(remove_duplicate=False)}


def _merged(base: Any) -> dict[str, Tensor]:
    """Return the weights of a model with adapters as those of one without: base weights plus the adapters' product."""
    from peft.tuners.lora import LoraLayer

    state = {name: value for name, value in _weights(base).items() if "lora_" not in name}
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            weight = f"{name}.base_layer.weight"
            for adapter in layer.active_adapters:
                delta: Tensor = layer.get_delta_weight(adapter)  # type: ignore[operator,attr-defined]
                state[weight] = (state[weight].float() + delta.float()).to(state[weight].dtype)
    return {name.replace(".base_layer.", "."): value for name, value in state.items()}
