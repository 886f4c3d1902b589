"""A labeler behind an OpenAI-compatible chat-completions server, such as vLLM or `transformers serve`.

Images are sent as PNG files of their pixels, without the headers of a DICOM file, EXIF data or file names.
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
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from preceptor.data.grounding.box_formats import mark_boxes
from preceptor.data.grounding.image_marks import split_at_images
from preceptor.data.images import image_size, load_image
from preceptor.errors import UserError
from preceptor.grounding.pseudo_labels import AGAIN_TEMPERATURE, PROMPT_VERSION, Prompt, Save, best_of
from preceptor.teachers.chat_client import ChatClient, ClientSettings, RequestRejected, check_address
from preceptor.teachers.label_store import Label, LabelStoreKey, Source

log = logging.getLogger(__name__)

# End marks, which a server that keeps special tokens leaves in an answer.
_END_MARKS = re.compile(r"(?:\s*(?:<\|(?:im_end|endoftext|eot_id|end|end_of_text)\|>|</s>|<end_of_turn>|<eos>))+\s*$")
_CELL = 28  # Qwen2-VL makes one token of 28 x 28 pixels


@dataclass(frozen=True)
class AskSettings:
    """Settings of the answers.

    Args:
        temperature: sampling temperature, 0 for the most likely answer.
        candidates: number of answers to each question; the one most like the others is kept (`best_of`).
        max_tokens: maximum number of tokens of an answer.
        seed: seed of sampled answers, together with the question's key.
        system_prompt: first message of every dialogue, in the role `system`; empty for none.
        max_pixels: shrink larger images to this number of pixels before they are sent; None to keep their size.
        logprobs: request the log-probabilities of the answers' tokens.
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
                f"{self.candidates} candidates at temperature {self.temperature:g}: there must be at least 1, and "
                "several need a temperature above 0, such as 0.7"
            )
        if self.max_tokens < 1 or (self.max_pixels is not None and self.max_pixels < _CELL**2):
            raise UserError(
                f"max_tokens {self.max_tokens} must be at least 1, max_pixels {self.max_pixels} at least {_CELL**2}"
            )


class EndpointTeacher:
    """Asks a model on a server.

    `used` is the number of tokens that the server has counted so far. No request begins once it has reached
    `max_tokens_total`.
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
            raise UserError(f"the number of concurrent requests must be at least 1, not {concurrent}")
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
        """Answer the prompts that are not in `known`, as in `pseudo_labels.Labeler`.

        Raises UserError if the server will answer no request, too many consecutive requests have failed, or the tokens
        are used up; the answers so far are saved.
        """
        return asyncio.run(self._answer([prompt for prompt in prompts if prompt.key not in known], self.ask, save))

    def answer_again(self, prompts: Sequence[Prompt], save: Save) -> Mapping[str, str]:
        """Sample another answer to every prompt, as `answer`."""
        ask = replace(
            self.ask, candidates=1, seed=self.ask.seed + 1, temperature=self.ask.temperature or AGAIN_TEMPERATURE
        )
        return asyncio.run(self._answer(prompts, ask, save))

    def size_sent(self, path: Path) -> tuple[int, int]:
        """Return the size of an image as it is sent."""
        return _shrunk(image_size(path), self.ask.max_pixels)

    async def _answer(self, prompts: Sequence[Prompt], ask: AskSettings, save: Save) -> dict[str, str]:
        waiting = iter(prompts)
        reasons: dict[str, str] = {}
        key = os.environ.get(self.client.key_variable)
        async with ChatClient(self.client, self.model, key, self._unknown) as client:

            async def work() -> None:
                for prompt in waiting:
                    if self.max_tokens_total is not None and self.used >= self.max_tokens_total:
                        raise UserError(
                            f"{self.used:,} tokens are used of --max-tokens-total {self.max_tokens_total:,}; the "
                            "answers so far are stored: raise it and run the same command again"
                        )
                    try:
                        save([await self._ask(client, prompt, ask)])
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

    async def _ask(self, client: ChatClient, prompt: Prompt, ask: AskSettings) -> Label:
        # In a thread, because decoding a large image would block the other requests.
        messages = await asyncio.to_thread(self._messages, prompt)
        body = {"messages": messages, "temperature": ask.temperature, "max_tokens": ask.max_tokens}
        choices: list[dict[str, Any]] = []
        while len(choices) < ask.candidates:
            # A server that does not know `n` gives one answer per request.
            done = len(choices)
            optional = {
                # Box marks are special tokens of the Qwen-VL family; without them an answer has bare numbers.
                "skip_special_tokens": False,
                "logprobs": True,
                "top_logprobs": 2,
                "seed": (ask.seed + int(prompt.key[:12], 16) + done) % 2**31,
                "n": ask.candidates - done,
            }
            answer = await client.complete(body, optional)
            choices += [choice for choice in answer["choices"] if isinstance(choice.get("message"), dict)]
            usage = answer.get("usage") or {}
            self.used += sum(int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        return self._label(prompt, choices[: ask.candidates])

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        dialogue = prompt.dialogue
        system = "\n".join(text for text in (self.ask.system_prompt, dialogue.system) if text)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        contents = split_at_images([question for question, _ in dialogue.turns], dialogue.images)
        for number, (content, (question, answer)) in enumerate(zip(contents, dialogue.turns, strict=True)):
            plain = number > 0 and not any(isinstance(part, Path) for part in content)
            messages.append({"role": "user", "content": question if plain else [self._part(part) for part in content]})
            if number < len(dialogue.turns) - 1:
                messages.append({"role": "assistant", "content": answer})
        return messages

    def _part(self, part: str | Path) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "image_url", "image_url": {"url": _data_url(_load(part, self.ask.max_pixels))}}

    def _label(self, prompt: Prompt, choices: Sequence[Mapping[str, Any]]) -> Label:
        texts = [_END_MARKS.sub("", str(choice["message"].get("content") or "")).strip() for choice in choices]
        if "skip_special_tokens" in self._unknown:
            texts = [mark_boxes(text) for text in texts]
        best, confidence, margin = best_of([prompt.read(text) for text in texts])
        source: Source | None = "agreement" if len(texts) > 1 else None
        message = choices[best]["message"]
        # The tokens of a reasoning that the server has cut out are not those of the answer.
        reasoned = message.get("reasoning_content") or message.get("reasoning")
        logprobs = None if reasoned else choices[best].get("logprobs")
        probabilities = token_probabilities(logprobs, greedy=self.ask.temperature == 0)
        if probabilities.confidence is not None:
            confidence, margin = probabilities.confidence, probabilities.margin or 0.0
            source = probabilities.source
        return Label(
            prompt.key,
            prompt.turn,
            texts[best],
            choices[best].get("finish_reason") != "length",
            tokens=len(probabilities.logprobs) or None,
            confidence=round(confidence, 6) if source else None,
            margin=round(margin, 6) if source else None,
            source=source,
            logprobs=probabilities.logprobs,
            candidates=tuple(texts) if len(texts) > 1 else (),
        )


@dataclass(frozen=True)
class TokenProbabilities:
    """The log-probabilities of an answer's tokens, and the means as in `Label`; None if unknown."""

    logprobs: tuple[float, ...] = ()
    confidence: float | None = None
    margin: float | None = None
    source: Source | None = None


def token_probabilities(logprobs: Any, *, greedy: bool) -> TokenProbabilities:
    """Return the probabilities in the field `logprobs` of a choice; empty if it is missing or malformed.

    With two alternatives at each token, the confidence is the mean of p1 and the margin the mean of p1 - p2. With the
    probability of the token alone, that is p1 only if decoding was `greedy`. As p2 <= 1 - p1, the margin is then at
    least the mean of max(0, 2 p1 - 1), which is returned.
    """
    try:
        tokens = list(logprobs["content"])
        exact = [float(token["logprob"]) for token in tokens]
        tops = [
            sorted((float(top["logprob"]) for top in token.get("top_logprobs") or ()), reverse=True) for token in tokens
        ]
    except (TypeError, KeyError, ValueError):
        return TokenProbabilities()
    # Some servers write minus infinity as a very small number; NaN and infinity are not log-probabilities.
    if not tokens or any(math.isnan(value) or value == math.inf for value in [*exact, *itertools.chain(*tops)]):
        return TokenProbabilities()
    rounded = tuple(round(max(-100.0, value), 6) for value in exact)
    if all(len(top) >= 2 for top in tops):
        pairs = [(math.exp(min(0.0, top[0])), math.exp(min(0.0, top[1]))) for top in tops]
        confidence = sum(first for first, _ in pairs) / len(pairs)
        margin = sum(first - second for first, second in pairs) / len(pairs)
        return TokenProbabilities(rounded, confidence, margin, "top_logprobs")
    if not greedy:
        return TokenProbabilities(rounded)
    firsts = [math.exp(min(0.0, value)) for value in exact]
    margin = sum(max(0.0, 2 * first - 1) for first in firsts) / len(firsts)
    return TokenProbabilities(rounded, sum(firsts) / len(firsts), margin, "logprobs")


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


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True)
class TokenEstimate:
    """Number of requests, and the tokens of their images and texts and, at most, of their answers."""

    requests: int
    images: int
    texts: int
    answers: int

    @property
    def total(self) -> int:
        return self.images + self.texts + self.answers

    def times(self, factor: float) -> TokenEstimate:
        """Return the estimate for `factor` times as many requests."""
        return TokenEstimate(*(round(factor * value) for value in astuple(self)))

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def estimate_tokens(prompts: Sequence[Prompt], ask: AskSettings) -> TokenEstimate:
    """Estimate the tokens that a server will count.

    An image has one token per 28 x 28 pixels, as for Qwen2-VL (other models: half to four times as many). A text has
    one token per three bytes of UTF-8, which is cautious: English has about four bytes. Every answer, including an
    earlier one that is not known yet, counts as `max_tokens`.
    """
    sizes: dict[Path, int] = {}
    images = texts = 0
    for prompt in prompts:
        dialogue = prompt.dialogue
        for path in dialogue.images:
            if path not in sizes:
                width, height = _shrunk(image_size(path), ask.max_pixels)
                sizes[path] = max(1, round(width / _CELL)) * max(1, round(height / _CELL))
            images += sizes[path]
        sent = [*(text for turn in dialogue.turns[:-1] for text in turn), dialogue.turns[-1][0]]
        texts += sum(math.ceil(len(text.encode()) / 3) if text else ask.max_tokens for text in sent)
        texts += math.ceil(len(ask.system_prompt.encode()) / 3)
    return TokenEstimate(len(prompts), images, texts, len(prompts) * ask.candidates * ask.max_tokens)
