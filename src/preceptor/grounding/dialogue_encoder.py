"""Dialogues about images as tensors of a Qwen-VL model: chat template, image placeholders, labels of the answers.

The library's own Qwen processors want torchvision, so that text and images are put together here: the checkpoint's
tokenizer and chat template, transformers' PIL image processor, and t * h * w / merge_size^2 placeholder tokens for each
image of t x h x w patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from preceptor.data.images import MAX_BYTES, MAX_PIXELS, load_image
from preceptor.data.types import Dialogue
from preceptor.errors import UserError

MARKS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
"""The special tokens that belong to a text: those of names and boxes."""

CACHE_BYTES = 2**30
"""Of the images that an encoder keeps as the model takes them, in each process."""

IGNORED = -100
"""The label of tokens that are not learnt, as everywhere in transformers."""

ModalityRows = Callable[[Dialogue], Tensor]
"""Gives (images, 8): the modality probabilities of a dialogue's images (`models.modality_clip`)."""


class LongDialogue(UserError):
    """A dialogue of more tokens than the cut-off, of which nothing is cut: catch it to leave the row out and count.

    `tokens` says how many; it is 0 where the error came out of a loader's process, which passes on the message alone.
    """

    def __init__(self, message: str, tokens: int = 0) -> None:
        super().__init__(message)
        self.tokens = tokens


@dataclass(frozen=True)
class EncodedDialogue:
    """One dialogue: `input_ids` and `labels` (L,), `pixel_values` (patches, numbers), `image_grid_thw` (N, 3).

    `labels` are the token of an answer, IGNORED elsewhere. `modalities` (N, 8) are there for guidance by `clip` alone.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    modalities: Tensor | None


class DialogueEncoder:
    """Encodes dialogues for one checkpoint; holds no weights, so that a loader's processes can have it.

    Args:
        tokenizer: with a chat template that places images.
        image_processor: transformers' Qwen2VLImageProcessor.
        image_token_id: of the placeholder, ``<|image_pad|>``.
        cut_off: the most tokens of a dialogue, those of its images with them.
        modality_rows: modality probabilities, where the model's guidance is `clip`.
        max_image_bytes, max_image_pixels: ceilings of image files; see `data.images.load_image`.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        image_token_id: int,
        *,
        cut_off: int = 2048,
        modality_rows: ModalityRows | None = None,
        max_image_bytes: int = MAX_BYTES,
        max_image_pixels: int = MAX_PIXELS,
    ) -> None:
        self.tokenizer, self.image_processor, self.image_token_id = tokenizer, image_processor, image_token_id
        self.cut_off, self.modality_rows = cut_off, modality_rows
        self.max_image_bytes, self.max_image_pixels = max_image_bytes, max_image_pixels
        self._read: dict[tuple[Path, ...], tuple[Tensor, Tensor]] = {}
        self._bytes = 0
        self._ends = tuple(token for token in tokenizer.all_special_tokens if token not in MARKS)
        self._end_ids = frozenset(tokenizer.convert_tokens_to_ids(list(self._ends)))

    def encode(self, dialogue: Dialogue, *, prompt: bool = False) -> EncodedDialogue:
        """Return a dialogue's tensors; with `prompt` up to where the last answer begins, whatever it is.

        Raises:
            LongDialogue: it is longer than the cut-off.
            UserError: an answer is empty, a text holds one of the tokenizer's special tokens other than `MARKS`, the
                chat template does not put every image or answer in its place, or an image cannot be read.
        """
        grids, pixels = self._images(dialogue)
        ids: list[int] = []
        labels: list[int] = []
        patches = [] if grids is None else grids.prod(dim=1).tolist()
        counts = iter([n // self.image_processor.merge_size**2 for n in patches])
        for text, answer in self.parts(dialogue, prompt=prompt):
            for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
                wanted = next(counts, 0) if token == self.image_token_id else 1
                if not wanted:
                    raise self._misplaced(dialogue)
                ids += [token] * wanted
                labels += [token if answer else IGNORED] * wanted
        if next(counts, 0):
            raise self._misplaced(dialogue)
        if len(ids) > self.cut_off:
            images = ids.count(self.image_token_id)
            raise LongDialogue(
                f"dialogue {dialogue.id!r} has {len(ids)} tokens, {images} of them of its images, more than the "
                f"cut-off of {self.cut_off}; raise cut_off, lower max_pixels, or leave the row out",
                len(ids),
            )
        rows = self.modality_rows(dialogue) if self.modality_rows and grids is not None else None
        return EncodedDialogue(dialogue.id, torch.tensor(ids), torch.tensor(labels), pixels, grids, rows)

    def parts(self, dialogue: Dialogue, *, prompt: bool = False) -> list[tuple[str, bool]]:
        """Return the dialogue in the chat template's words, divided into texts and whether the assistant says them.

        An answer's part begins where the template's generation prompt ends, and goes on to the first special token
        after the answer, that token included. Each part becomes tokens of its own, so that a prompt has the same tokens
        in training and in generation. Raises as `encode`.
        """
        turns = dialogue.turns
        self._check_texts(dialogue, turns[:-1] if prompt else turns)
        whole = self._render(dialogue, len(turns), prompt=prompt)
        found: list[tuple[str, bool]] = []
        done = 0
        for number in range(1, len(turns) + (not prompt)):
            begin = self._render(dialogue, number, prompt=True)
            said = self._render(dialogue, number)
            if not (said.startswith(begin) and whole.startswith(said) and len(begin) >= done):
                raise UserError(
                    "the checkpoint's chat template writes a turn differently when others follow, or begins an answer "
                    "differently than its generation prompt; set one that does not (chat_template.jinja in its folder)"
                )
            answer = turns[number - 1][1].strip()
            place = said.find(answer, len(begin))
            if place < 0:
                raise UserError(
                    f"the chat template changes the answer {answer[:60]!r} of dialogue {dialogue.id!r}; "
                    "set one that does not (chat_template.jinja in the checkpoint's folder)"
                )
            after = place + len(answer)
            ends = [where + len(mark) for mark in self._ends if (where := said.find(mark, after)) >= 0]
            end = min(ends, default=len(said))
            found += [(whole[done : len(begin)], False), (whole[len(begin) : end], True)]
            done = end
        return [(text, answer) for text, answer in [*found, (whole[done:], False)] if text]

    def collate(self, rows: Sequence[EncodedDialogue], side: Literal["left", "right"] = "right") -> dict[str, Tensor]:
        """Return a batch: `input_ids`, `attention_mask`, `labels`, `mm_token_type_ids` (B, L), and of the images
        `pixel_values`, `image_grid_thw` and `modalities` where there are any, in the order of the rows."""
        length = max(len(row.input_ids) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(rows), length), self.tokenizer.eos_token_id if pad is None else pad)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            size = len(row.input_ids)
            where = slice(length - size, length) if side == "left" else slice(0, size)
            ids[i, where], labels[i, where], mask[i, where] = row.input_ids, row.labels, 1
        types = ((ids == self.image_token_id) & mask.bool()).long()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "mm_token_type_ids": types}
        for name in ("pixel_values", "image_grid_thw", "modalities"):
            there = [value for row in rows if (value := getattr(row, name)) is not None]
            if there:
                batch[name] = torch.cat(there)
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        """Return a text without special tokens, but with those of names and boxes."""
        kept = [token for token in ids if token not in self._end_ids]
        return self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip()

    def _render(self, dialogue: Dialogue, turns: int, *, prompt: bool = False) -> str:
        """Return the first `turns` turns as a text, all images before the first question; with `prompt` the last
        answer left to say."""
        messages: list[dict[str, Any]] = []
        for number, (question, answer) in enumerate(dialogue.turns[:turns]):
            content: list[dict[str, str]] = [{"type": "text", "text": question}]
            if number == 0:
                content = [{"type": "image"} for _ in dialogue.images] + content
            messages.append({"role": "user", "content": content})
            if not (prompt and number == turns - 1):
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _check_texts(self, dialogue: Dialogue, answered: Sequence[tuple[str, str]]) -> None:
        for number, (question, answer) in enumerate(dialogue.turns, 1):
            for token in self._ends:
                if token in question or (number <= len(answered) and token in answer):
                    raise UserError(
                        f"turn {number} of dialogue {dialogue.id!r} holds the special token {token!r}, "
                        "which would be taken for structure; remove it from the text"
                    )
            if number <= len(answered) and not answer.strip():
                raise UserError(f"turn {number} of dialogue {dialogue.id!r} has no answer; give one, or leave it out")

    def _images(self, dialogue: Dialogue) -> tuple[Tensor | None, Tensor | None]:
        if not dialogue.images:
            return None, None
        if dialogue.images in self._read:
            return self._read[dialogue.images]
        limits = {"max_bytes": self.max_image_bytes, "max_pixels": self.max_image_pixels}
        images = [load_image(path, **limits).convert("RGB") for path in dialogue.images]
        for path, image in zip(dialogue.images, images, strict=True):
            if max(image.size) > 200 * min(image.size):
                raise UserError(
                    f"{path}: {image.width} x {image.height} pixels is too long and thin for the model's "
                    "image processor (at most 200 to 1); crop it"
                )
        found = self.image_processor(images=images, return_tensors="pt")
        grids, pixels = found["image_grid_thw"], found["pixel_values"]
        # Several dialogues are about one image, and come again every epoch.
        if self._bytes + pixels.nbytes <= CACHE_BYTES:
            self._read[dialogue.images] = (grids, pixels)
            self._bytes += pixels.nbytes
        return grids, pixels

    def _misplaced(self, dialogue: Dialogue) -> UserError:
        return UserError(
            f"the checkpoint's chat template does not write one image placeholder for each of the "
            f"{len(dialogue.images)} images of dialogue {dialogue.id!r}; set one that does (chat_template.jinja)"
        )
