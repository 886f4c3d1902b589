"""A trained student as a model for lmms-eval: ``--model preceptor --model_args run=runs/mhkd-vqa-rad``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms

from preceptor.errors import UserError
from preceptor.integrations.lmms_eval.answering import answer_images
from preceptor.vqa.bundle import VqaBundle


class PreceptorStudent(lmms):
    """Predicts the most probable answer class. `run` is the folder of a run, a stage or a model."""

    is_simple = True

    def __init__(self, run: str, batch_size: int | str = 32, device: str = "cpu", **_: Any) -> None:
        super().__init__()
        self.bundle = VqaBundle.load(Path(run))
        self.bundle.model.to(device)  # type: ignore[arg-type]
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return one answer per request, to the `question` of its document or else to its context."""
        answers: list[str] = []
        for start in range(0, len(requests), self.batch_size):
            images, questions = [], []
            for request in requests[start : start + self.batch_size]:
                context, _, to_visual, number, task, split = request.args
                document = self.task_dict[task][split][number]
                visuals = to_visual(document)
                if len(visuals) != 1:
                    raise UserError(f"document {number} of {task} has {len(visuals)} images; a student sees one")
                images.append(visuals[0])
                questions.append(document.get("question", context))
            answers += answer_images(self.bundle, images, questions)
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "a Preceptor student selects an answer class and cannot compute the likelihood of other texts"
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("a Preceptor student answers one question at a time")
