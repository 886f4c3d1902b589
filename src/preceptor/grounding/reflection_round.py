"""A round of reflection: the student is asked, its wrong answers are corrected, the best corrections are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from preceptor.data.splits import ordered
from preceptor.data.types import Dialogue
from preceptor.grounding.reflection import Alike, Correction, CorrectionBuffer, Reason, best_correction, judge
from preceptor.grounding.selection import Similarity
from preceptor.grounding.settings import ReflectionConfig

Ask = Callable[[Sequence[Dialogue], int, float, int], list[list[str]]]
"""(dialogues, candidates, temperature, seed) -> the candidates of each last answer; what they say last is not read."""

AGAIN = "That is not right. Look at the image again and correct your answer."
EXPLAIN = (
    "{question}\nA student answered: {wrong}\nThe right answer is: {truth}\n"
    "Write the answer that the student should have given."
)


@dataclass
class Reflector:
    """Asks, judges and corrects; what it finds goes into a `CorrectionBuffer`.

    `student` and `corrector` answer dialogues. `rows` are training dialogues with their answers.
    """

    student: Ask
    corrector: Ask
    rows: Sequence[Dialogue]
    config: ReflectionConfig
    similarity: Similarity
    seed: int

    def round(self, number: int, buffer: CorrectionBuffer) -> None:
        """Carry out round `number`; the same number asks the same dialogues with the same seeds.

        A question that is answered rightly leaves the buffer. Where none of the samples is a correction, the true
        answer is one; how often that was is in the round's entry.
        """
        alike = pairwise(self.similarity)
        by_id = {row.id: row for row in self.rows}
        asked = [by_id[id] for id in ordered(by_id, f"reflection:{self.seed}:{number}")[: self.config.rows]]
        answers = [found[0] for found in self.student(asked, 1, 0.0, 0)]
        failures: Counter[Reason] = Counter()
        wrong: list[tuple[Dialogue, str, Reason]] = []
        for row, answer in zip(asked, answers, strict=True):
            question, truth = row.turns[-1]
            found = judge(answer, truth, alike, tau=self.config.tau, overlap=self.config.overlap)
            if found.reason is None:
                buffer.forget(row.id, question)
            else:
                failures[found.reason] += 1
                wrong.append((row, answer, found.reason))
        explained = [replace(row, turns=(*row.turns[:-1], (explain(row, answer), ""))) for row, answer, _ in wrong]
        seed = self.seed * 1000 + number + 1
        sampled = self.corrector(explained, self.config.candidates, self.config.temperature, seed) if explained else []
        by_sample = 0
        for (row, answer, reason), candidates in zip(wrong, sampled, strict=True):
            question, truth = row.turns[-1]
            best = best_correction(candidates, truth, alike, tau=self.config.tau, overlap=self.config.overlap)
            by_sample += best is not None
            corrected = best[0] if best is not None else truth
            buffer.add(Correction(row.id, question, answer, corrected, reason, number))
        entry = buffer.close_round(len(asked), dict(failures), len(wrong))
        entry["by_sample"] = by_sample


def explain(row: Dialogue, wrong: str) -> str:
    """Return what the corrector is asked about a wrong answer."""
    question, truth = row.turns[-1]
    return EXPLAIN.format(question=question, wrong=wrong, truth=truth)


def correction_dialogue(row: Dialogue, correction: Correction, form: str) -> Dialogue:
    """Return the dialogue that teaches a correction; its last answer alone is learnt.

    Where nothing was answered there is nothing to look at again, and the correction is learnt as the answer.
    """
    question = row.turns[-1][0]
    taught = (question, correction.wrong), (AGAIN, correction.corrected)
    said = form == "two_turns" and correction.wrong.strip()
    turns = taught if said else ((question, correction.corrected),)
    return replace(row, turns=(*row.turns[:-1], *turns))


def pairwise(similarity: Similarity) -> Alike:
    """Return the similarity of two texts."""
    return lambda a, b: float(similarity([a, b])[0, 1])
