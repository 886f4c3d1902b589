"""The verb `teach` of the command line: a teacher's answers, written for a student."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preceptor.cli.terminal import say, table
from preceptor.errors import UserError

if TYPE_CHECKING:
    from preceptor.grounding.endpoint import EndpointTeacher
    from preceptor.grounding.pseudo_labels import Labeler
    from preceptor.grounding.teach import LabelingRequest


def teach(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="slake-grounding, med-grit, a .json or .jsonl "
            "file of dialogues, or a folder of images with --question.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the pseudo-labels; one that is there is gone on with.")],
    teacher: Annotated[Path | None, typer.Option(help="Folder of a Qwen-VL checkpoint, to run here.")] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1, instead of --teacher."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --endpoint: the model's name there.")] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the data set, or of a file's images; default: in PRECEPTOR_DATA, or beside the file."
        ),
    ] = None,
    question: Annotated[list[str] | None, typer.Option(help="Asked about each image of a folder; repeatable.")] = None,
    split: Annotated[str | None, typer.Option(help="train or unlabelled; default: train, where there is any.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many dialogues.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 for the most likely answer.")] = 0.0,
    candidates: Annotated[int, typer.Option(min=1, help="Answers to each question, the best agreed one is kept.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of sampled answers.")] = 0,
    system_prompt: Annotated[str, typer.Option(help="Said before every dialogue.")] = "",
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Larger images are shrunk to as many.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --teacher: questions at a time.")] = 8,
    concurrent: Annotated[int, typer.Option(min=1, help="With --endpoint: requests at a time.")] = 8,
    requests_per_minute: Annotated[float | None, typer.Option(help="With --endpoint: no more than that.")] = None,
    timeout: Annotated[float, typer.Option(help="With --endpoint: longest silence in seconds.")] = 300.0,
    retries: Annotated[int, typer.Option(min=0, help="With --endpoint: tries after the first.")] = 6,
    logprobs: Annotated[bool, typer.Option(help="With --endpoint: ask for log-probabilities.")] = True,
    max_tokens_total: Annotated[
        int | None,
        typer.Option(min=1, help="With --endpoint: do not begin above this estimate, and stop when so many are used."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --endpoint: begin without asking.")] = False,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="Images may leave this machine.")] = False,
    api_key_env: Annotated[str, typer.Option(help="Environment variable with the API key.")] = "PRECEPTOR_API_KEY",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")
    ] = False,
) -> None:
    """Have a strong model answer questions about images, for a student to learn from; exit 1 where some are not."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from preceptor.cli.app import _log_to_stderr
    from preceptor.grounding import teach as teaching
    from preceptor.grounding.endpoint import AskSettings, EndpointTeacher

    if (teacher is None) == (endpoint is None):
        raise UserError("teach needs --teacher FOLDER or --endpoint URL, one of the two")
    if (endpoint is None) != (model is None):
        raise UserError("--endpoint URL and --model NAME belong together: give both or none")
    _log_to_stderr()
    who: Labeler
    if endpoint is not None and model is not None:
        from preceptor.teachers.chat_client import ClientSettings

        if api_key_env != "PRECEPTOR_API_KEY" and not os.environ.get(api_key_env):
            raise UserError(f"--api-key-env {api_key_env}: there is no such environment variable, or it is empty")
        client = ClientSettings(
            endpoint,
            allow_remote=allow_remote,
            key_variable=api_key_env,
            timeout=timeout,
            retries=retries,
            requests_per_minute=requests_per_minute,
        )
        ask = AskSettings(temperature, candidates, max_tokens, seed, system_prompt, max_pixels, logprobs)
        who = EndpointTeacher(model, client, ask, concurrent=concurrent, max_tokens_total=max_tokens_total)
        lesson = teaching.gather(data, root, split, limit, question or ())  # type: ignore[arg-type]
        _agree(lesson, output, who, yes, max_tokens_total)
    else:
        lesson = teaching.gather(data, root, split, limit, question or ())  # type: ignore[arg-type]
        from preceptor.grounding.local_teacher import LocalTeacher
        from preceptor.grounding.model import GroundedVlm

        vlm = GroundedVlm.load(str(teacher), max_pixels=max_pixels)
        who = LocalTeacher(
            vlm.to(_device()),
            temperature=temperature,
            candidates=candidates,
            max_tokens=max_tokens,
            seed=seed,
            system_prompt=system_prompt,
            batch_size=batch_size,
        )
    try:
        found = teaching.run(lesson, output, who, _progress)
    except KeyboardInterrupt:
        print("interrupted; what is answered is kept, and the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    if isinstance(who, EndpointTeacher):
        found["tokens"] = who.used

    def show(document: dict[str, Any]) -> None:
        sure = document["mean_confidence"]
        table(
            document["folder"],
            ["questions", "held", "answered", "not answered", "cut off", "mean confidence"],
            [
                [
                    str(document["questions"]),
                    str(document["before"]),
                    str(document["answered"]),
                    str(sum(document["unanswered"].values())),
                    str(document["cut_off"]),
                    "-" if sure is None else f"{sure:.3f}",
                ]
            ],
        )
        for reason, count in document["unanswered"].items():
            print(f"not answered: {count}: {reason}")
        for note in document["notes"]:
            print(f"note: {note}")

    say(found, as_json, show)
    if found["unanswered"]:
        raise typer.Exit(1)


def _agree(lesson: LabelingRequest, output: Path, who: EndpointTeacher, yes: bool, ceiling: int | None) -> None:
    """Print what is to come, and go on only where that is wanted."""
    from preceptor.grounding.teach import estimate

    cost = estimate(lesson, output, who)
    print(
        f"{cost.requests:,} questions: about {cost.images:,} tokens of images and {cost.texts:,} of text, answers of "
        f"at most {cost.answers:,} tokens",
        file=sys.stderr,
    )
    if ceiling is not None and cost.total > ceiling:
        raise UserError(
            f"the estimate of {cost.total:,} tokens is above --max-tokens-total {ceiling:,}: give more, ask fewer "
            "(--limit), shrink images (--max-pixels) or shorten answers (--max-tokens)"
        )
    if yes or ceiling is not None or not cost.requests:
        return
    if not sys.stdin.isatty():
        raise UserError("nobody is there to agree to the estimate: give --yes, or a ceiling with --max-tokens-total")
    if not typer.confirm("begin?", err=True):
        raise UserError("nothing was asked; shrink the task with --limit, --max-pixels or --max-tokens")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _progress(done: int, whole: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:,} of {whole:,} answered", end="\n" if done == whole else "", file=sys.stderr, flush=True)
    elif done == whole or done % 100 == 0:
        print(f"{done:,} of {whole:,} answered", file=sys.stderr, flush=True)
