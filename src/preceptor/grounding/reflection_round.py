"""One round of reflection: the student answers, and the corrections of wrong answers are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from preceptor.data.grounding.box_formats import find_boxes
from preceptor.data.splits import ordered
from preceptor.data.types import Dialogue
from preceptor.grounding.answer_checks import asks_for_box, unusable
from preceptor.grounding.reflection import Alike, Correction, CorrectionBuffer, Reason, best_correction, judge
from preceptor.grounding.selection import Similarity
from preceptor.grounding.settings import ReflectionConfig

Ask = Callable[[Sequence[Dialogue], int, float, int], list[list[str]]]
"""(dialogues, candidates, temperature, seed) -> candidates for the last answer of each dialogue, which is not read."""

AGAIN = "That is not right. Look at the image again and correct your answer."
EXPLAIN = (
    "{question}\nA student answered: {wrong}\nThe right answer is: {truth}\n"
    "Write the answer that the student should have given."
)


@dataclass
class Reflector:
    """Collects corrections of the student in a `CorrectionBuffer`.

    `student` and `corrector` answer dialogues; the corrector is needed for samples only. `rows` are training dialogues
    with their answers, one per question (`evaluate.scored_turns`).
    """

    student: Ask
    corrector: Ask | None
    rows: Sequence[Dialogue]
    config: ReflectionConfig
    similarity: Similarity
    seed: int

    def round(self, number: int, buffer: CorrectionBuffer) -> None:
        """Run round `number`. The same number always uses the same questions and seeds.

        A question that is answered correctly leaves the buffer. A correction is the true answer, or, with
        `config.samples`, a sample for a free text that contains it (`best_correction`). The entry of the round counts
        how often a sample was used, and the samples that are no answers (`answer_checks`), such as a refusal.
        """
        text_similarity = pairwise(self.similarity)
        by_name = {name_of_question(row): row for row in self.rows}
        chosen = [by_name[name] for name in ordered(by_name, f"reflection:{self.seed}:{number}")[: self.config.rows]]
        answers = [candidates[0] for candidates in self.student(chosen, 1, 0.0, 0)]
        failures: Counter[Reason] = Counter()
        wrong: list[tuple[Dialogue, str, Reason]] = []
        for row, answer in zip(chosen, answers, strict=True):
            question, truth = row.turns[-1]
            judgement = judge(answer, truth, text_similarity, tau=self.config.tau, overlap=self.config.overlap)
            if judgement.reason is None:
                buffer.forget(row.id, question)
            else:
                failures[judgement.reason] += 1
                wrong.append((row, answer, judgement.reason))
        samples, unusable_samples = self._sample([(row, answer) for row, answer, _ in wrong], number)
        by_sample = 0
        for row, answer, reason in wrong:
            question, truth = row.turns[-1]
            best = best_correction(
                samples.get(name_of_question(row), []),
                truth,
                text_similarity,
                tau=self.config.tau,
                overlap=self.config.overlap,
            )
            by_sample += best is not None
            buffer.add(Correction(row.id, question, answer, best[0] if best else truth, reason, number))
        entry = buffer.close_round(len(chosen), dict(failures), len(wrong))
        entry["by_sample"] = by_sample
        entry["unusable_samples"] = unusable_samples

    def _sample(self, wrong: Sequence[tuple[Dialogue, str]], number: int) -> tuple[dict[str, list[str]], int]:
        """Return the sampled answers to the questions with a free text, by name, and the number of unusable ones."""
        if self.config.samples == "none":
            return {}, 0
        free = [(row, answer) for row, answer in wrong if row.task != "roc" and not find_boxes(row.turns[-1][1])]
        if not free:
            return {}, 0
        assert self.corrector is not None
        explained = [replace(row, turns=(*row.turns[:-1], (explain(row, answer), ""))) for row, answer in free]
        seed = self.seed * 1000 + number + 1
        sampled = self.corrector(explained, self.config.candidates, self.config.temperature, seed)
        usable: dict[str, list[str]] = {}
        for (row, _), candidates in zip(free, sampled, strict=True):
            question, truth = row.turns[-1]
            wants_box = asks_for_box(question, truth)
            usable[name_of_question(row)] = [
                text for text in candidates if not unusable(question, text, wants_box=wants_box)
            ]
        return usable, sum(map(len, sampled)) - sum(map(len, usable.values()))


def name_of_question(row: Dialogue) -> str:
    """Return a name for the last question of a dialogue that no other question of the data set has."""
    return row.id if len(row.turns) == 1 else f"{row.id}:{len(row.turns)}"


def explain(row: Dialogue, wrong: str) -> str:
    """Return the prompt for the corrector about a wrong answer."""
    question, truth = row.turns[-1]
    return EXPLAIN.format(question=question, wrong=wrong, truth=truth)


def correction_dialogue(row: Dialogue, correction: Correction, form: str) -> Dialogue:
    """Return the training dialogue of a correction, in which only the last answer is a target.

    If the wrong answer is empty, the correction is the answer to the original question.
    """
    question = row.turns[-1][0]
    two_turns = (question, correction.wrong), (AGAIN, correction.corrected)
    has_answer = form == "two_turns" and correction.wrong.strip()
    turns = two_turns if has_answer else ((question, correction.corrected),)
    return replace(row, turns=(*row.turns[:-1], *turns))


def pairwise(similarity: Similarity) -> Alike:
    """Return the similarity of two texts."""
    return lambda a, b: float(similarity([a, b])[0, 1])
