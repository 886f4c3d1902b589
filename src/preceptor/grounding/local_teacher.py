"""A labeler that runs in this process: a Qwen-VL checkpoint from a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from preceptor.data.grounding.box_formats import CANONICAL
from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.pseudo_labels import AGAIN_TEMPERATURE, PROMPT_VERSION, Prompt, Save, best_of
from preceptor.teachers.label_store import Label, LabelStoreKey

if TYPE_CHECKING:
    from preceptor.grounding.model import Answer, GroundedVlm


def vlm_fingerprint(vlm: GroundedVlm) -> str:
    """Return the SHA-256 of a model's weights, guided RoPE settings, tokenizer and preprocessing."""
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
    """Return the settings of the image processor, as JSON values, the maximum length of dialogues in tokens, and the
    model's format of boxes if it is not the canonical one."""
    settings = json.loads(vlm.encoder.image_processor.to_json_string())
    settings.pop("processor_class", None)
    format = vlm.encoder.box_format
    return {"images": settings, "max_length": vlm.encoder.max_length} | (
        {} if format == CANONICAL else {"boxes": format}
    )


def with_system_prompt(dialogue: Dialogue, system_prompt: str) -> Dialogue:
    """Return the dialogue with the system prompt as the first line of its first question."""
    if not system_prompt or not dialogue.turns:
        return dialogue
    (question, answer), *rest = dialogue.turns
    return replace(dialogue, turns=((f"{system_prompt}\n{question}", answer), *rest))


class LocalTeacher:
    """Answers questions in batches.

    The batches do not depend on which answers are known already: a batch that lacks an answer is generated completely,
    so that an interrupted run ends with the answers of an undisturbed one.

    Args:
        vlm: the model, on the device to compute on.
        temperature, candidates, max_tokens, seed, system_prompt: as in `endpoint.AskSettings`.
        batch_size: number of questions in a batch.
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
        identical = candidates > 1 and temperature == 0
        if identical or temperature < 0 or min(candidates, max_tokens, batch_size) < 1:
            raise UserError(
                f"{candidates} candidates at temperature {temperature:g}, max_tokens {max_tokens}, batch_size "
                f"{batch_size}: each number must be at least 1, and several candidates need a temperature above 0"
            )
        self.vlm, self.temperature, self.candidates, self.max_tokens = vlm, temperature, candidates, max_tokens
        self.seed, self.system_prompt, self.batch_size = seed, system_prompt, batch_size
        self._fingerprint = vlm_fingerprint(vlm)

    @property
    def cache_key(self) -> LabelStoreKey:
        return LabelStoreKey(
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

    def answer(self, prompts: Sequence[Prompt], known: Collection[str], save: Save) -> Mapping[str, str]:
        """Answer the prompts that are not in `known`, as in `pseudo_labels.Labeler`.

        A dialogue that is longer than the model's maximum is not answered. Raises UserError if a dialogue cannot be
        encoded for another reason.
        """
        return self._answer(prompts, known, save, self.candidates, self.temperature, self.seed)

    def answer_again(self, prompts: Sequence[Prompt], save: Save) -> Mapping[str, str]:
        """Sample another answer to every prompt, as `answer`."""
        return self._answer(prompts, (), save, 1, self.temperature or AGAIN_TEMPERATURE, self.seed + 1)

    def _answer(
        self,
        prompts: Sequence[Prompt],
        known: Collection[str],
        save: Save,
        candidates: int,
        temperature: float,
        seed: int,
    ) -> Mapping[str, str]:
        reasons: dict[str, str] = {}
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            missing = {prompt.key for prompt in batch if prompt.key not in known}
            if not missing:
                continue
            dialogues = {prompt.key: with_system_prompt(prompt.dialogue, self.system_prompt) for prompt in batch}
            reasons |= {key: reason for key, dialogue in dialogues.items() if (reason := self._too_long(dialogue))}
            fitting = [prompt for prompt in batch if prompt.key not in reasons]
            if fitting:
                generated = self.vlm.generate(
                    [dialogues[prompt.key] for prompt in fitting],
                    candidates=candidates,
                    temperature=temperature,
                    max_new_tokens=self.max_tokens,
                    with_confidence=True,
                    batch_size=len(fitting),
                    seed=_seed(seed, fitting),
                )
                labels = [self._label(prompt, answers) for prompt, answers in zip(fitting, generated, strict=True)]
                save([label for label in labels if label.key in missing])
        return reasons

    def _too_long(self, dialogue: Dialogue) -> str | None:
        from preceptor.grounding.dialogue_encoder import LongDialogue

        try:
            self.vlm.encoder.encode(dialogue, prompt=True)
        except LongDialogue:
            return f"longer than {self.vlm.encoder.max_length} tokens"
        return None

    def _label(self, prompt: Prompt, answers: Sequence[Answer]) -> Label:
        texts = [answer.text for answer in answers]
        best = best_of([prompt.read(text) for text in texts])[0]
        answer = answers[best]
        assert answer.confidence is not None, "generated with confidence"
        assert answer.margin is not None, "generated with confidence"
        return Label(
            prompt.key,
            prompt.turn,
            answer.text,
            answer.ended,
            tokens=len(answer.tokens),
            confidence=round(answer.confidence, 6),
            margin=round(answer.margin, 6),
            source="top_logprobs",
            candidates=tuple(texts) if len(texts) > 1 else (),
        )


def _seed(seed: int, prompts: Sequence[Prompt]) -> int:
    digest = hashlib.sha256(json.dumps([seed, *(prompt.key for prompt in prompts)]).encode())
    return int(digest.hexdigest()[:12], 16)
