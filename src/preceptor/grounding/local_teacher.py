"""A teacher that runs here: a Qwen-VL checkpoint out of a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.pseudo_labels import PROMPT_VERSION, Keep, Prompt, best_of
from preceptor.teachers.label_store import Label, LabelIdentity

if TYPE_CHECKING:
    from preceptor.grounding.model import Answer, GroundedVlm


def vlm_fingerprint(vlm: GroundedVlm) -> str:
    """Return the SHA-256 of what a model answers by: weights, positions' guidance, tokenizer, image processor."""
    from preceptor.grounding.vocabulary import tokenizer_fingerprint
    from preceptor.teachers.online import weights_fingerprint

    parts = [
        weights_fingerprint(vlm),
        vlm.guidance.settings(),
        tokenizer_fingerprint(vlm.encoder.tokenizer),
        preprocessing(vlm),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def preprocessing(vlm: GroundedVlm) -> dict[str, Any]:
    """Return what the image processor does, as JSON values, and the cut-off of dialogues."""
    settings = json.loads(vlm.encoder.image_processor.to_json_string())
    settings.pop("processor_class", None)
    return {"images": settings, "cut_off": vlm.encoder.cut_off}


def with_system_prompt(dialogue: Dialogue, system_prompt: str) -> Dialogue:
    """Return the dialogue with the system prompt as the first line of its first question, as `read_sharegpt` has it."""
    if not system_prompt or not dialogue.turns:
        return dialogue
    (question, answer), *rest = dialogue.turns
    return replace(dialogue, turns=((f"{system_prompt}\n{question}", answer), *rest))


class LocalTeacher:
    """Has a model answer in batches.

    The batches are the same whatever is known already: one that lacks an answer is generated as a whole, so that an
    interrupted run ends with the answers of an undisturbed one.

    Args:
        vlm: on the device to compute on, with the weights' own numbers.
        temperature, candidates, max_tokens, seed, system_prompt: as `endpoint.AskSettings`.
        batch_size: questions at a time.
    """

    def __init__(
        self,
        vlm: GroundedVlm,
        *,
        temperature: float = 0.0,
        candidates: int = 1,
        max_tokens: int = 256,
        seed: int = 0,
        system_prompt: str = "",
        batch_size: int = 8,
    ) -> None:
        same = candidates > 1 and temperature == 0
        if same or temperature < 0 or min(candidates, max_tokens, batch_size) < 1:
            raise UserError(
                f"{candidates} candidates at temperature {temperature:g}, of at most {max_tokens} tokens, {batch_size} "
                "questions at a time: each number must be at least 1, and for several candidates a temperature above 0"
            )
        self.vlm, self.temperature, self.candidates, self.max_tokens = vlm, temperature, candidates, max_tokens
        self.seed, self.system_prompt, self.batch_size = seed, system_prompt, batch_size
        self._fingerprint = vlm_fingerprint(vlm)

    @property
    def identity(self) -> LabelIdentity:
        return LabelIdentity(
            self._fingerprint,
            {
                "kind": "local",
                "prompt_version": PROMPT_VERSION,
                "temperature": self.temperature,
                "candidates": self.candidates,
                "max_tokens": self.max_tokens,
                "seed": self.seed,
                "system_prompt": self.system_prompt,
                "batch_size": self.batch_size,
            },
        )

    def answer(self, prompts: Sequence[Prompt], known: Collection[str], keep: Keep) -> Mapping[str, str]:
        """Answer those that are not `known`, as `pseudo_labels.Teacher` says.

        A dialogue that is longer than the model's cut-off is not answered. Raises UserError for other faults of data.
        """
        reasons: dict[str, str] = {}
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            missing = {prompt.key for prompt in batch if prompt.key not in known}
            if not missing:
                continue
            asked = {prompt.key: with_system_prompt(prompt.dialogue, self.system_prompt) for prompt in batch}
            reasons |= {key: reason for key, dialogue in asked.items() if (reason := self._too_long(dialogue))}
            fitting = [prompt for prompt in batch if prompt.key not in reasons]
            if fitting:
                found = self.vlm.generate(
                    [asked[prompt.key] for prompt in fitting],
                    candidates=self.candidates,
                    temperature=self.temperature,
                    max_new_tokens=self.max_tokens,
                    with_confidence=True,
                    batch_size=len(fitting),
                    seed=self._seed(fitting),
                )
                labels = [self._label(prompt, answers) for prompt, answers in zip(fitting, found, strict=True)]
                keep([label for label in labels if label.key in missing])
        return reasons

    def _too_long(self, dialogue: Dialogue) -> str | None:
        from preceptor.grounding.dialogue_encoder import LongDialogue

        try:
            self.vlm.encoder.encode(dialogue, prompt=True)
        except LongDialogue:
            return f"longer than {self.vlm.encoder.cut_off} tokens"
        return None

    def _seed(self, prompts: Sequence[Prompt]) -> int:
        digest = hashlib.sha256(json.dumps([self.seed, *(prompt.key for prompt in prompts)]).encode())
        return int(digest.hexdigest()[:12], 16)

    def _label(self, prompt: Prompt, answers: Sequence[Answer]) -> Label:
        texts = [answer.text for answer in answers]
        best = best_of(texts)[0]
        said = answers[best]
        assert said.confidence is not None, "asked for with sureness"
        assert said.margin is not None, "asked for with sureness"
        return Label(
            prompt.key,
            prompt.turn,
            said.text,
            said.ended,
            tokens=len(said.tokens),
            confidence=round(said.confidence, 6),
            margin=round(said.margin, 6),
            source="top_logprobs",
            candidates=tuple(texts) if len(texts) > 1 else (),
        )
