"""Encode dialogues about images as tensors of a Qwen-VL model: chat template, image placeholders, answer labels.

The Qwen processors of transformers need torchvision. Therefore text and images are combined here: the tokenizer and the
chat template of the checkpoint, the PIL image processor of transformers, and t * h * w / merge_size^2 placeholder
tokens for each image of t x h x w patches. Boxes are translated into the format of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from preceptor.data.grounding.box_formats import BOX_FORMATS, CANONICAL, Size, find_boxes, from_canonical, to_canonical
from preceptor.data.grounding.image_marks import MARK, split_at_images
from preceptor.data.images import image_size, load_image
from preceptor.data.limits import MAX_BYTES, MAX_PIXELS
from preceptor.data.types import Dialogue
from preceptor.errors import UserError

MARKS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
"""Special tokens that may occur in a text: the marks of references and boxes."""

CACHE_BYTES = 2**30
"""Limit for cached image tensors of an encoder, per process."""

IGNORED = -100
"""Label of tokens that are not targets, as in transformers."""

ModalityRows = Callable[[Dialogue], Tensor]
"""Function that returns the modality probabilities (images, 8) of a dialogue (see `grounding.modality_clip`)."""


class LongDialogue(UserError):
    """A dialogue with more than `max_length` tokens. Dialogues are not truncated; catch this error to skip the row.

    `tokens` is the number of tokens, or 0 if the error comes from a worker process, which passes on only the message.
    """

    def __init__(self, message: str, tokens: int = 0) -> None:
        super().__init__(message)
        self.tokens = tokens


@dataclass(frozen=True)
class EncodedDialogue:
    """The tensors of one dialogue.

    Attributes:
        id: Identifier.
        input_ids: Tokens (L,).
        labels: Tokens of the answers (L,), IGNORED elsewhere.
        pixel_values: Patches (patches, numbers), or None.
        image_grid_thw: Patches in time, rows and columns of each image (N, 3), or None.
        modalities: Modality probabilities (N, 8) for guidance `clip`, or None.
        box_size: Width and height of the first image as boxes in pixels count them, or None if the model's boxes are
            not in pixels.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    modalities: Tensor | None
    box_size: Size | None = None


class DialogueEncoder:
    """Encodes dialogues for one checkpoint. It has no weights, so that worker processes can use it.

    Args:
        tokenizer: Tokenizer with a chat template that places images.
        image_processor: Qwen2VLImageProcessor of transformers.
        image_token_id: Id of the placeholder ``<|image_pad|>``.
        max_length: Largest number of tokens of a dialogue, including its images.
        modality_rows: Modality probabilities for guidance `clip`.
        max_image_bytes: Largest accepted image file (see `data.images.load_image`).
        max_image_pixels: Largest accepted number of pixels.
        box_format: Format in which the model reads and writes boxes (see `data.grounding.box_formats`).
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        image_token_id: int,
        *,
        max_length: int = 2048,
        modality_rows: ModalityRows | None = None,
        max_image_bytes: int = MAX_BYTES,
        max_image_pixels: int = MAX_PIXELS,
        box_format: str = CANONICAL,
    ) -> None:
        self.tokenizer, self.image_processor, self.image_token_id = tokenizer, image_processor, image_token_id
        self.max_length, self.modality_rows, self.box_format = max_length, modality_rows, box_format
        self.max_image_bytes, self.max_image_pixels = max_image_bytes, max_image_pixels
        self._read: dict[tuple[Path, ...], tuple[Tensor, Tensor]] = {}
        self._bytes = 0
        self._ends = tuple(token for token in tokenizer.all_special_tokens if token not in MARKS)
        self._end_ids = frozenset(tokenizer.convert_tokens_to_ids(list(self._ends)))

    def encode(self, dialogue: Dialogue, *, prompt: bool = False) -> EncodedDialogue:
        """Encode a dialogue, or with `prompt` only the part before the last answer.

        Raises:
            LongDialogue: the dialogue has more than `max_length` tokens.
            UserError: an answer is empty, a text contains a special token other than `MARKS`, the chat template
                misplaces an image or an answer, or an image cannot be read.
        """
        grids, pixels = self._images(dialogue)
        box_size = next(iter(self.box_sizes(dialogue, grids)), None)
        dialogue = self._in_model_format(dialogue, box_size)
        ids: list[int] = []
        labels: list[int] = []
        patches = [] if grids is None else grids.prod(dim=1).tolist()
        counts = iter([n // self.image_processor.merge_size**2 for n in patches])
        for text, answer in self.parts(dialogue, prompt=prompt):
            for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
                repeats = next(counts, 0) if token == self.image_token_id else 1
                if not repeats:
                    raise self._misplaced(dialogue)
                ids += [token] * repeats
                labels += [token if answer else IGNORED] * repeats
        if next(counts, 0):
            raise self._misplaced(dialogue)
        if len(ids) > self.max_length:
            images = ids.count(self.image_token_id)
            raise LongDialogue(
                f"dialogue {dialogue.id!r} has {len(ids)} tokens ({images} of them for images), more than the "
                f"maximum of {self.max_length}; raise max_length, lower max_pixels, or remove the dialogue",
                len(ids),
            )
        rows = self.modality_rows(dialogue) if self.modality_rows and grids is not None else None
        return EncodedDialogue(dialogue.id, torch.tensor(ids), torch.tensor(labels), pixels, grids, rows, box_size)

    def read_answer(self, text: str, row: EncodedDialogue) -> str:
        """Return an answer of the model to an encoded prompt with its boxes in the canonical format.

        Without an image, boxes in pixels are left as they are.
        """
        if row.box_size is None and "pixels" in BOX_FORMATS[self.box_format].unit:
            return text
        return to_canonical(text, self.box_format, row.box_size)

    def _in_model_format(self, dialogue: Dialogue, box_size: Size | None) -> Dialogue:
        """Return the dialogue with its boxes in the format of the model."""
        question_answers = [
            (from_canonical(question, self.box_format, box_size), from_canonical(answer, self.box_format, box_size))
            for question, answer in dialogue.turns
        ]
        return replace(dialogue, turns=tuple(question_answers))

    def box_sizes(self, dialogue: Dialogue, grids: Tensor | None) -> list[Size]:
        """Return the size of each image that boxes in pixels refer to; no sizes if the model's are not in pixels."""
        unit = BOX_FORMATS[self.box_format].unit
        if "pixels" not in unit:
            return []
        if unit == "pixels" or grids is None:
            return [image_size(path, **self._limits) for path in dialogue.images]
        side = self.image_processor.patch_size
        return [(int(columns) * side, int(rows) * side) for _, rows, columns in grids.tolist()]

    def require_one_box_size(self, dialogue: Dialogue, row: EncodedDialogue) -> None:
        """Raise UserError if a dialogue has boxes in pixels and images of several sizes.

        A text does not say to which image a box belongs, so that its pixels would be a guess.
        """
        sizes = set(self.box_sizes(dialogue, row.image_grid_thw))
        if len(sizes) > 1 and any(find_boxes(text) for turn in dialogue.turns for text in turn):
            raise UserError(
                f"dialogue {dialogue.id!r} has boxes and images of {len(sizes)} sizes, and this model writes boxes in "
                f"pixels ({self.box_format}); set the model's box_format to qwen3-vl, or divide the dialogue"
            )

    def parts(self, dialogue: Dialogue, *, prompt: bool = False) -> list[tuple[str, bool]]:
        """Return the rendered dialogue as a list of (text, whether it is an answer).

        An answer part starts where the generation prompt of the template ends and includes the first special token
        after the answer. Each part is tokenised separately, so that a prompt has the same tokens in training and
        generation. For errors see `encode`.
        """
        turns = dialogue.turns
        self._check_texts(dialogue, turns[:-1] if prompt else turns)
        rendered = self._render(dialogue, len(turns), prompt=prompt)
        parts: list[tuple[str, bool]] = []
        done = 0
        for number in range(1, len(turns) + (not prompt)):
            begin = self._render(dialogue, number, prompt=True)
            up_to_answer = self._render(dialogue, number)
            if not (up_to_answer.startswith(begin) and rendered.startswith(up_to_answer) and len(begin) >= done):
                raise UserError(
                    "the chat template of the checkpoint renders a turn differently if others follow, or starts an "
                    "answer differently than its generation prompt; use another one (chat_template.jinja in its folder)"
                )
            answer = turns[number - 1][1].strip()
            place = up_to_answer.find(answer, len(begin))
            if place < 0:
                raise UserError(
                    f"the chat template changes the answer {answer[:60]!r} of dialogue {dialogue.id!r}; "
                    "use another one (chat_template.jinja in the folder of the checkpoint)"
                )
            after = place + len(answer)
            ends = [position + len(mark) for mark in self._ends if (position := up_to_answer.find(mark, after)) >= 0]
            end = min(ends, default=len(up_to_answer))
            parts += [(rendered[done : len(begin)], False), (rendered[len(begin) : end], True)]
            done = end
        return [(text, answer) for text, answer in [*parts, (rendered[done:], False)] if text]

    def collate(self, rows: Sequence[EncodedDialogue], side: Literal["left", "right"] = "right") -> dict[str, Tensor]:
        """Return a batch with `input_ids`, `attention_mask`, `labels`, `mm_token_type_ids` (B, L).

        If there are images, `pixel_values`, `image_grid_thw` and `modalities` are concatenated in the order of the
        rows.
        """
        length = max(len(row.input_ids) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(rows), length), self.tokenizer.eos_token_id if pad is None else pad)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            size = len(row.input_ids)
            span = slice(length - size, length) if side == "left" else slice(0, size)
            ids[i, span], labels[i, span], mask[i, span] = row.input_ids, row.labels, 1
        types = ((ids == self.image_token_id) & mask.bool()).long()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "mm_token_type_ids": types}
        for name in ("pixel_values", "image_grid_thw", "modalities"):
            values = [value for row in rows if (value := getattr(row, name)) is not None]
            if values:
                batch[name] = torch.cat(values)
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        """Decode tokens to a text without special tokens other than the marks of references and boxes."""
        text_ids = [token for token in ids if token not in self._end_ids]
        return self.tokenizer.decode(text_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip()

    def _render(self, dialogue: Dialogue, turns: int, *, prompt: bool = False) -> str:
        """Render the system message and the first `turns` turns, with the images where `split_at_images` has them.

        With `prompt` the last answer is left out.
        """
        messages: list[dict[str, Any]] = []
        if dialogue.system:
            messages.append({"role": "system", "content": [{"type": "text", "text": dialogue.system}]})
        contents = split_at_images([question for question, _ in dialogue.turns], dialogue.images)
        for number, (content, (_, answer)) in enumerate(zip(contents, dialogue.turns, strict=True)):
            if number == turns:
                break
            parts = [{"type": "image"} if isinstance(c, Path) else {"type": "text", "text": c} for c in content]
            messages.append({"role": "user", "content": parts})
            if not (prompt and number == turns - 1):
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        if dialogue.system and not self._knows_system:
            raise UserError(
                f"the chat template of the checkpoint has no system messages, and dialogue {dialogue.id!r} has one; "
                "use another template (chat_template.jinja in the folder of the checkpoint), or remove the message"
            )
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    @cached_property
    def _knows_system(self) -> bool:
        """Whether the chat template writes a system message, and not as one of the user or the assistant."""

        def render(role: str) -> str:
            messages = [(role, "Instructions"), ("user", "Question"), ("assistant", "Answer")]
            parts = [{"role": name, "content": [{"type": "text", "text": text}]} for name, text in messages]
            try:
                return self.tokenizer.apply_chat_template(parts, tokenize=False)
            except Exception:  # templates raise errors of their own for roles that they do not know
                return ""

        system = render("system")
        return "Instructions" in system and system not in (render("user"), render("assistant"))

    def _check_texts(self, dialogue: Dialogue, answered: Sequence[tuple[str, str]]) -> None:
        marks = sum(question.count(MARK) for question, _ in dialogue.turns)
        if marks not in (0, len(dialogue.images)):
            raise UserError(
                f"the questions of dialogue {dialogue.id!r} contain {marks} marks {MARK}, and there are "
                f"{len(dialogue.images)} images; write one mark for each image, or none"
            )
        for token in self._ends:
            if token in dialogue.system:
                raise UserError(
                    f"the system message of dialogue {dialogue.id!r} contains the special token {token!r}; remove it"
                )
        for number, (question, answer) in enumerate(dialogue.turns, 1):
            for token in self._ends:
                if token in question or (number <= len(answered) and token in answer):
                    raise UserError(
                        f"turn {number} of dialogue {dialogue.id!r} contains the special token {token!r}, "
                        "which the model would interpret as structure; remove it from the text"
                    )
            if number <= len(answered) and not answer.strip():
                raise UserError(f"turn {number} of dialogue {dialogue.id!r} has no answer; add one, or remove the turn")

    def forget_images(self) -> None:
        """Remove all images from the cache, so that their files are read again."""
        self._read.clear()
        self._bytes = 0

    def _images(self, dialogue: Dialogue) -> tuple[Tensor | None, Tensor | None]:
        if not dialogue.images:
            return None, None
        if dialogue.images in self._read:
            return self._read[dialogue.images]
        images = [load_image(path, **self._limits).convert("RGB") for path in dialogue.images]
        for path, image in zip(dialogue.images, images, strict=True):
            if max(image.size) > 200 * min(image.size):
                raise UserError(
                    f"{path}: {image.width} x {image.height} pixels exceed the largest aspect ratio of the "
                    "image processor (200 to 1); crop the image"
                )
        processed = self.image_processor(images=images, return_tensors="pt")
        grids, pixels = processed["image_grid_thw"], processed["pixel_values"]
        # Images occur in several dialogues and in every epoch.
        if self._bytes + pixels.nbytes <= CACHE_BYTES:
            self._read[dialogue.images] = (grids, pixels)
            self._bytes += pixels.nbytes
        return grids, pixels

    @property
    def _limits(self) -> dict[str, int]:
        return {"max_bytes": self.max_image_bytes, "max_pixels": self.max_image_pixels}

    def _misplaced(self, dialogue: Dialogue) -> UserError:
        return UserError(
            f"the chat template of the checkpoint does not write one image placeholder for each of the "
            f"{len(dialogue.images)} images of dialogue {dialogue.id!r}; use another one (chat_template.jinja)"
        )
