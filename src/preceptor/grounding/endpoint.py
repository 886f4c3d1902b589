"""A teacher behind an OpenAI-compatible chat-completions server, such as vLLM's or `transformers serve`.

Images are sent as PNG made of their pixels alone: no header of a DICOM file, EXIF or file name goes along.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import logging
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from preceptor.data.grounding.boxes import mark_boxes
from preceptor.data.images import load_image
from preceptor.errors import UserError
from preceptor.grounding.pseudo_labels import PROMPT_VERSION, Prompt, Save, best_of
from preceptor.teachers.chat_client import ChatClient, ClientSettings, RequestRejected, check_address
from preceptor.teachers.label_store import Label, LabelStoreKey, Source

log = logging.getLogger(__name__)

# Servers that leave special tokens in an answer leave these, too.
_END_MARKS = re.compile(r"(?:\s*(?:<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>|</s>))+\s*$")
_CELL = 28  # pixels of a side that Qwen2-VL makes one token of


@dataclass(frozen=True)
class AskSettings:
    """What is asked of the model.

    Args:
        temperature: 0 for the most likely answer.
        candidates: answers to each question, of which the one most like the others is kept (`best_of`).
        max_tokens: the most tokens of an answer.
        seed: of sampled answers, together with the question's key.
        system_prompt: what stands before every dialogue, in the role `system`; empty for nothing.
        max_pixels: larger images are shrunk to as many before they are sent; None to send them as they are.
        logprobs: ask for the log-probabilities of the answers' tokens.
    """

    temperature: float = 0.0
    candidates: int = 1
    max_tokens: int = 256
    seed: int = 0
    system_prompt: str = ""
    max_pixels: int | None = None
    logprobs: bool = True

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.temperature < 0 or (self.candidates > 1 and self.temperature == 0):
            raise UserError(
                f"{self.candidates} candidates at temperature {self.temperature:g}: give at least 1, and for several a "
                "temperature above 0, such as 0.7"
            )
        if self.max_tokens < 1 or (self.max_pixels is not None and self.max_pixels < _CELL**2):
            raise UserError(
                f"max_tokens {self.max_tokens} must be at least 1, max_pixels {self.max_pixels} at least {_CELL**2}"
            )


class EndpointTeacher:
    """Asks a model on a server.

    `used` counts the tokens that the server says it has read and written. No more requests begin once they are
    `max_tokens_total` or more.
    """

    def __init__(
        self,
        model: str,
        client: ClientSettings,
        ask: AskSettings = AskSettings(),
        *,
        concurrent: int = 8,
        max_tokens_total: int | None = None,
    ) -> None:
        if concurrent < 1:
            raise UserError(f"{concurrent} requests at a time ask nothing; give at least 1")
        check_address(client.url, client.allow_remote)
        self.model, self.client, self.ask, self.concurrent = model, client, ask, concurrent
        self.max_tokens_total = max_tokens_total
        self.used = 0
        self._unknown: set[str] = set() if ask.logprobs else {"logprobs", "top_logprobs"}

    @property
    def cache_key(self) -> LabelStoreKey:
        ask = self.ask
        return LabelStoreKey(
            self.model,
            {
                "kind": "endpoint",
                "prompt_version": PROMPT_VERSION,
                "temperature": ask.temperature,
                "candidates": ask.candidates,
                "max_tokens": ask.max_tokens,
                "seed": ask.seed,
                "system_prompt": ask.system_prompt,
                "max_pixels": ask.max_pixels,
                "logprobs": ask.logprobs,
            },
        )

    def answer(self, prompts: Sequence[Prompt], known: Collection[str], save: Save) -> Mapping[str, str]:
        """Ask for the answers that are not `known`, as `pseudo_labels.Teacher` says.

        Raises UserError where the server will answer none, too many requests in a row have failed, or the tokens have
        run out; what has come is kept.
        """
        return asyncio.run(self._answer([prompt for prompt in prompts if prompt.key not in known], save))

    async def _answer(self, prompts: Sequence[Prompt], save: Save) -> dict[str, str]:
        waiting = iter(prompts)
        reasons: dict[str, str] = {}
        key = os.environ.get(self.client.key_variable)
        async with ChatClient(self.client, self.model, key, self._unknown) as client:

            async def work() -> None:
                for prompt in waiting:
                    if self.max_tokens_total is not None and self.used >= self.max_tokens_total:
                        raise UserError(
                            f"{self.used:,} tokens are used of --max-tokens-total {self.max_tokens_total:,}; what is "
                            "answered is kept: give more, and run the same command again"
                        )
                    try:
                        save([await self._ask(client, prompt)])
                    except RequestRejected as error:
                        log.warning("question %s is not answered: %s", prompt.key[:12], error)
                        reasons[prompt.key] = str(error)

            workers = [asyncio.create_task(work()) for _ in range(min(self.concurrent, len(prompts)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return reasons

    async def _ask(self, client: ChatClient, prompt: Prompt) -> Label:
        # In a thread: decoding a large image would hold up the answers to the others.
        messages = await asyncio.to_thread(self._messages, prompt)
        body = {"messages": messages, "temperature": self.ask.temperature, "max_tokens": self.ask.max_tokens}
        choices: list[dict[str, Any]] = []
        while len(choices) < self.ask.candidates:
            # A server that does not know `n` gives one at a time.
            done = len(choices)
            optional = {
                # Box marks are special tokens of the Qwen-VL family: left out, an answer has bare numbers.
                "skip_special_tokens": False,
                "logprobs": True,
                "top_logprobs": 2,
                "seed": (self.ask.seed + int(prompt.key[:12], 16) + done) % 2**31,
                "n": self.ask.candidates - done,
            }
            found = await client.complete(body, optional)
            choices += [choice for choice in found["choices"] if isinstance(choice.get("message"), dict)]
            usage = found.get("usage") or {}
            self.used += sum(int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        return self._label(prompt, choices[: self.ask.candidates])

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        dialogue = prompt.dialogue
        images = [
            {"type": "image_url", "image_url": {"url": _data_url(_load(path, self.ask.max_pixels))}}
            for path in dialogue.images
        ]
        system = self.ask.system_prompt
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        for number, (question, answer) in enumerate(dialogue.turns):
            text = {"type": "text", "text": question}
            messages.append({"role": "user", "content": [*images, text] if number == 0 else question})
            if number < len(dialogue.turns) - 1:
                messages.append({"role": "assistant", "content": answer})
        return messages

    def _label(self, prompt: Prompt, choices: Sequence[Mapping[str, Any]]) -> Label:
        texts = [_END_MARKS.sub("", str(choice["message"].get("content") or "")).strip() for choice in choices]
        if "skip_special_tokens" in self._unknown:
            texts = [mark_boxes(text) for text in texts]
        best, confidence, margin = best_of(texts)
        source: Source | None = "agreement" if len(texts) > 1 else None
        said = token_probabilities(choices[best].get("logprobs"), greedy=self.ask.temperature == 0)
        if said.confidence is not None:
            confidence, margin, source = said.confidence, said.margin or 0.0, said.source
        return Label(
            prompt.key,
            prompt.turn,
            texts[best],
            choices[best].get("finish_reason") != "length",
            tokens=len(said.logprobs) or None,
            confidence=round(confidence, 6) if source else None,
            margin=round(margin, 6) if source else None,
            source=source,
            logprobs=said.logprobs,
            candidates=tuple(texts) if len(texts) > 1 else (),
        )


@dataclass(frozen=True)
class TokenProbabilities:
    """Of an answer's tokens: their log-probabilities, and the means that `Label` has, None where not known."""

    logprobs: tuple[float, ...] = ()
    confidence: float | None = None
    margin: float | None = None
    source: Source | None = None


def token_probabilities(found: Any, *, greedy: bool) -> TokenProbabilities:
    """Return what a choice's `logprobs` say, nothing where it has none or they cannot be read.

    With two alternatives at each token, confidence is the mean of p1 and margin that of p1 - p2. With the token's own
    probability alone, that is p1 only where decoding was `greedy`; as p2 <= 1 - p1, the margin is then at least the
    mean of max(0, 2 p1 - 1), which is taken.
    """
    try:
        tokens = list(found["content"])
        exact = [float(token["logprob"]) for token in tokens]
        tops = [
            sorted((float(top["logprob"]) for top in token.get("top_logprobs") or ()), reverse=True) for token in tokens
        ]
    except (TypeError, KeyError, ValueError):
        return TokenProbabilities()
    # Some servers write minus infinity as a very small number; anything else that is not finite is no probability.
    if not tokens or any(math.isnan(value) or value == math.inf for value in [*exact, *itertools.chain(*tops)]):
        return TokenProbabilities()
    logprobs = tuple(round(max(-100.0, value), 6) for value in exact)
    if all(len(top) >= 2 for top in tops):
        pairs = [(math.exp(min(0.0, top[0])), math.exp(min(0.0, top[1]))) for top in tops]
        confidence = sum(first for first, _ in pairs) / len(pairs)
        margin = sum(first - second for first, second in pairs) / len(pairs)
        return TokenProbabilities(logprobs, confidence, margin, "top_logprobs")
    if not greedy:
        return TokenProbabilities(logprobs)
    firsts = [math.exp(min(0.0, value)) for value in exact]
    margin = sum(max(0.0, 2 * first - 1) for first in firsts) / len(firsts)
    return TokenProbabilities(logprobs, sum(firsts) / len(firsts), margin, "logprobs")


def _load(path: Path, max_pixels: int | None) -> Image.Image:
    image = load_image(path)
    size = _shrunk(image.size, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _shrunk(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    width, height = size
    if max_pixels is None or width * height <= max_pixels:
        return size
    scale = math.sqrt(max_pixels / (width * height))
    return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:  # the header alone
            return image.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return load_image(path).size


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True)
class TokenEstimate:
    """Tokens to come: of images, of texts, and at most of answers."""

    requests: int
    images: int
    texts: int
    answers: int

    @property
    def total(self) -> int:
        return self.images + self.texts + self.answers

    def as_dict(self) -> dict[str, int]:
        return {
            "requests": self.requests,
            "images": self.images,
            "texts": self.texts,
            "answers": self.answers,
            "total": self.total,
        }


def estimate_tokens(prompts: Sequence[Prompt], ask: AskSettings) -> TokenEstimate:
    """Estimate what a server will count.

    An image is a token for every 28 x 28 pixels, as Qwen2-VL has it (other models: half to four times as many).
    A text is one for every three bytes of UTF-8, a cautious rule: English has about four. An answer, also an earlier
    one that is not known yet, is taken for `max_tokens` long, most are shorter.
    """
    sizes: dict[Path, int] = {}
    images = texts = 0
    for prompt in prompts:
        dialogue = prompt.dialogue
        for path in dialogue.images:
            if path not in sizes:
                width, height = _shrunk(_size(path), ask.max_pixels)
                sizes[path] = max(1, round(width / _CELL)) * max(1, round(height / _CELL))
            images += sizes[path]
        said = [*(text for turn in dialogue.turns[:-1] for text in turn), dialogue.turns[-1][0]]
        texts += sum(math.ceil(len(text.encode()) / 3) if text else ask.max_tokens for text in said)
        texts += math.ceil(len(ask.system_prompt.encode()) / 3)
    return TokenEstimate(len(prompts), images, texts, len(prompts) * ask.candidates * ask.max_tokens)
