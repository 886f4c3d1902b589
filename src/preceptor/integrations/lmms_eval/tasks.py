"""Write protocols of Preceptor as tasks of lmms-eval, for a local data set.

    python -m preceptor.integrations.lmms_eval.tasks vqa-rad/clean/451 --root VQA_RAD --output lmms-tasks
    lmms-eval --include_path lmms-tasks --tasks preceptor_vqa-rad_clean_451 --model preceptor --model_args run=RUN

For every protocol the folder contains a YAML file and the questions as JSONL, and `utils.py`, through which lmms-eval
finds the functions below. The answers are scored by the same functions as those of Preceptor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from preceptor.arguments import as_output_folder, as_path
from preceptor.data.images import load_image
from preceptor.data.types import AnswerType, Prediction, Sample
from preceptor.errors import UserError
from preceptor.files import json_lines, write_text
from preceptor.os_errors import describe_os_error
from preceptor.vqa.metrics import score
from preceptor.vqa.protocols import protocol_named
from preceptor.vqa.score import protocol_alone, read_for

PROMPT = "\nAnswer the question using a single word or phrase."
SCORES = ("score", "open", "closed", "bleu", "f1")
UTILS = (
    "from preceptor.integrations.lmms_eval.tasks import "
    "doc_to_target, doc_to_text, doc_to_visual, mean, process_results\n\n"
    '__all__ = ["doc_to_target", "doc_to_text", "doc_to_visual", "mean", "process_results"]\n'
)
_HEAD = "# Written by Preceptor; scores: "


def write_task(protocol: str, root: Path | None, folder: Path) -> str:
    """Write the task of a protocol to `folder`, and return its name.

    Raises:
        UserError: the protocol is unknown, or the data set cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = read_for(protocol, root, folder / "data")
    chosen = protocol_named(data, protocol)
    name = f"preceptor_{protocol.replace('/', '_')}"
    rows = [
        {
            "id": s.id,
            "image": str(s.image.resolve()),
            "question": s.question,
            "answers": list(s.answers),
            "answer_type": s.answer_type,
            "question_type": s.question_type,
            "protocol": protocol,
        }
        for s in data.split("test")
        if chosen.select(s)
    ]
    questions = folder / f"{name}.jsonl"
    write_text(questions, json_lines(rows))
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions.resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "generation_kwargs": {"max_new_tokens": 32, "temperature": 0, "do_sample": False},
        "lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": PROMPT}},
        "metadata": {"version": 1.0, "protocol": protocol, "describes": chosen.describes},
    }
    text = f"{_HEAD}{chosen.describes}\n" + yaml.safe_dump(task, sort_keys=False, allow_unicode=True)
    functions = ("doc_to_visual", "doc_to_text", "doc_to_target", "process_results")
    text += "".join(f"{function}: !function utils.{function}\n" for function in functions)
    metrics = "".join(
        f"  - metric: {metric}\n    aggregation: !function utils.mean\n    higher_is_better: true\n"
        for metric in SCORES
    )
    write_text(folder / f"{name}.yaml", f"{text}metric_list:\n{metrics}")
    write_text(folder / "utils.py", UTILS)
    return name


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """Return the image of a question in mode RGB."""
    return [load_image(Path(doc["image"])).convert("RGB")]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """Return the question with the prompts of the task or the model."""
    prompts = lmms_eval_specific_kwargs or {}
    return f"{prompts.get('pre_prompt', '')}{doc['question']}{prompts.get('post_prompt', '')}"


def doc_to_target(doc: Mapping[str, Any]) -> str:
    """Return the first accepted answer."""
    return doc["answers"][0]


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, float | None]:
    """Return the scores of an answer. `open` or `closed` is None for a question of the other type."""
    sample = Sample(
        str(doc["id"]),
        Path(doc["image"]),
        doc["question"],
        tuple(doc["answers"]),
        cast(AnswerType, doc["answer_type"]),
        "",
        "test",
        doc["question_type"],
    )
    (row,) = score([sample], [Prediction(sample.id, results[0].strip(), 0.0)], protocol_alone(doc["protocol"])).rows()
    kinds = {kind: row["score"] if row["answer_type"] == kind else None for kind in ("open", "closed")}
    return {"score": row["score"], **kinds, "bleu": row["bleu"], "f1": row["f1"]}


def mean(values: Iterable[float | None]) -> float:
    """Return the mean of the values that are not None, or 0 if there are none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocols", nargs="+", metavar="PROTOCOL")
    parser.add_argument("--root", type=Path, help="Folder of the data set. Default: its folder under PRECEPTOR_DATA.")
    parser.add_argument("--output", type=Path, default=Path("lmms-tasks"))
    args = parser.parse_args()
    try:
        output = as_output_folder(args.output, "--output")
        root = None if args.root is None else as_path(args.root, "--root")
        for protocol in args.protocols:
            print(write_task(protocol, root, output))
    except Exception as error:
        sentence = str(error) if isinstance(error, UserError) else describe_os_error(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
