"""The verb teach: a teacher's answers as pseudo-labels for a student."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from preceptor import api
from preceptor.cli import options
from preceptor.cli.errors import CHECK_FAILED, INTERRUPTED
from preceptor.cli.terminal import log_to_stderr, notes, say, sentence, show_progress, table
from preceptor.errors import UserError
from preceptor.report.format import NONE

if TYPE_CHECKING:
    from preceptor.grounding.endpoint import TokenEstimate
    from preceptor.grounding.pseudo_labels import Labeler

KEY_VARIABLE = "PRECEPTOR_API_KEY"

EXAMPLES = """\
preceptor teach slake-grounding --root SLAKE --output labels --teacher QWEN
preceptor teach IMAGES --question "Describe the image." --output labels \\
  --endpoint http://127.0.0.1:8000/v1 --model qwen"""


def teach(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA",
            help="slake-grounding, med-grit, a .json or .jsonl file of dialogues, or a folder of images.",
        ),
    ],
    output: Annotated[Path, options.output_folder("Output folder for pseudo-labels. An existing one is resumed.")],
    teacher: Annotated[
        Path | None, options.existing("DIR", "Folder of a Qwen-VL model to run on this machine.", file=False)
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="OpenAI-compatible server to ask, such as http://127.0.0.1:8000/v1."),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Endpoint: name of the model.")] = None,
    root: Annotated[
        Path | None,
        options.existing(
            "DIR", "Folder of the data set or of the images. Default: under PRECEPTOR_DATA, or the folder of the file."
        ),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Question about each image of a folder. Repeat it for several questions."),
    ] = None,
    split: Annotated[
        Literal["train", "unlabelled"] | None,
        typer.Option(help="Split to label. Default: train, or unlabelled if there is no train."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Label only the first N dialogues.")] = None,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="T", help="Sampling temperature; 0 is greedy decoding.")
    ] = 0.0,
    candidates: Annotated[
        int, typer.Option(min=1, metavar="N", help="Answers per question; the one that agrees best is kept.")
    ] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Largest number of tokens of an answer.")] = 256,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the sampling.")] = 0,
    system_prompt: Annotated[str, typer.Option(metavar="TEXT", help="System prompt of each dialogue.")] = "",
    data_box_format: Annotated[
        str,
        typer.Option(metavar="NAME", help="Format of the boxes in your own file (data.box_format). Default: detected."),
    ] = "auto",
    box_format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Format of the teacher's boxes, such as qwen2.5-vl or gemma. Default: measured on known boxes.",
        ),
    ] = None,
    measure: Annotated[
        int, typer.Option(min=4, metavar="N", help="Number of known boxes that --box-format is measured on.")
    ] = 16,
    min_iou: Annotated[
        float, typer.Option(min=0, max=1, metavar="IOU", help="Refuse a teacher with a smaller mean IoU on them.")
    ] = 0.2,
    min_usable: Annotated[
        float, typer.Option(min=0, max=1, metavar="SHARE", help="Stop if a smaller share of the answers is usable.")
    ] = 0.5,
    agreement: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Ask this share of the questions twice, and discard answers that differ.",
        ),
    ] = 0.0,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Shrink larger images to this number of pixels.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Local teacher: questions per batch.")] = 8,
    concurrent: Annotated[int, typer.Option(min=1, metavar="N", help="Endpoint: requests at the same time.")] = 8,
    requests_per_minute: Annotated[
        float | None, typer.Option(metavar="N", help="Endpoint: largest number of requests per minute.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Endpoint: give up a request after this time without data.")
    ] = 300.0,
    retries: Annotated[int, typer.Option(min=0, metavar="N", help="Endpoint: retries of a failed request.")] = 6,
    logprobs: Annotated[bool, typer.Option(help="Endpoint: request log-probabilities.")] = True,
    max_tokens_total: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Endpoint: refuse a larger estimate, and stop after N tokens."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Endpoint: start without confirmation of the estimate.")] = False,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Endpoint: allow a server on another machine to receive the images.")
    ] = False,
    api_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="Endpoint: environment variable that contains the API key.")
    ] = KEY_VARIABLE,
    as_json: options.Json = False,
) -> None:
    """Label images with a local teacher or with a server.

    The answers are pseudo-labels for a student. Every answer is checked, and labels.html in the output folder shows
    ten of them. The exit code is 1 if some questions were not answered. The same command then asks them again.
    """
    if (teacher is None) == (endpoint is None):
        raise UserError("teach needs either --teacher DIR or --endpoint URL")
    if (endpoint is None) != (model is None):
        raise UserError("--endpoint URL and --model NAME belong together; give both")
    if api_key_env != KEY_VARIABLE and not os.environ.get(api_key_env):
        raise UserError(f"--api-key-env {api_key_env}: the environment variable does not exist or is empty")
    if root is not None and len(data) > 1:
        raise UserError("--root applies to one data set; set PRECEPTOR_DATA or label one data set at a time")
    check_data(data)
    api.keep_offline()
    from preceptor.grounding import teach as teaching
    from preceptor.grounding.endpoint import AskSettings, EndpointTeacher
    from preceptor.grounding.labeling import CheckSettings

    log_to_stderr()
    labeler: Labeler
    if endpoint is not None and model is not None:
        from preceptor.teachers.chat_client import ClientSettings

        client = ClientSettings(
            endpoint,
            allow_remote=allow_remote,
            key_variable=api_key_env,
            timeout=timeout,
            retries=retries,
            requests_per_minute=requests_per_minute,
        )
        ask = AskSettings(temperature, candidates, max_tokens, seed, system_prompt, max_pixels, logprobs)
        labeler = EndpointTeacher(model, client, ask, concurrent=concurrent, max_tokens_total=max_tokens_total)
        request = teaching.gather(data, root, split, limit, question or (), data_box_format)
        boxes = teaching.box_settings(request, output, box_format, measure, min_iou, labeler.size_sent)
        confirm(teaching.estimate(request, output, labeler, boxes, agreement), yes, max_tokens_total)
    else:
        request = teaching.gather(data, root, split, limit, question or (), data_box_format)
        from preceptor.data.grounding.box_formats import CANONICAL
        from preceptor.grounding.local_teacher import LocalTeacher
        from preceptor.grounding.model import GroundedVlm

        if box_format is not None:
            raise UserError("--box-format is for --endpoint: that of a local teacher is known from its checkpoint")
        # The model translates boxes itself (`dialogue_encoder`); what is measured is whether they are right.
        boxes = teaching.box_settings(request, output, None, measure, min_iou, candidates=[CANONICAL])

        vlm = GroundedVlm.load(str(teacher), max_pixels=max_pixels)
        labeler = LocalTeacher(
            vlm.to(_device()),
            temperature=temperature,
            candidates=candidates,
            max_tokens=max_tokens,
            seed=seed,
            system_prompt=system_prompt,
            batch_size=batch_size,
        )
    checks = CheckSettings(min_usable, agreement, system_prompt, page=True)
    try:
        with show_progress("questions") as progress:
            document = teaching.run(request, output, labeler, progress, boxes=boxes, checks=checks)
    except KeyboardInterrupt:
        print("interrupted; the answers are saved, and the same command resumes", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if isinstance(labeler, EndpointTeacher):
        document["tokens"] = labeler.used
    say(document, as_json, show_labels)
    if document["unanswered"]:
        raise typer.Exit(CHECK_FAILED)


def check_data(names: list[str]) -> None:
    """Raise UserError if a data set is neither known by name nor an existing path."""
    from preceptor.data.locations import FOLDERS

    for name in names:
        if name not in FOLDERS and not Path(name).exists():
            raise UserError(f"{name} does not exist; give slake-grounding, med-grit, a file of dialogues or a folder")


def confirm(cost: TokenEstimate, yes: bool, max_tokens_total: int | None) -> None:
    """Print the estimated number of tokens and ask whether to start.

    Raises:
        UserError: the estimate is above `max_tokens_total`, or it is not confirmed.
    """
    print(
        f"{cost.requests:,} questions: about {cost.images:,} tokens of images, {cost.texts:,} tokens of text, and "
        f"answers of at most {cost.answers:,} tokens",
        file=sys.stderr,
    )
    if max_tokens_total is not None and cost.total > max_tokens_total:
        raise UserError(
            f"the estimate of {cost.total:,} tokens is above --max-tokens-total {max_tokens_total:,}; allow more, or "
            "reduce it with --limit, --max-pixels or --max-tokens"
        )
    if yes or max_tokens_total is not None or not cost.requests:
        return
    if not sys.stdin.isatty():
        raise UserError(
            "stdin is not a terminal, so the estimate cannot be confirmed. Pass --yes or --max-tokens-total"
        )
    if not typer.confirm("Start?", err=True):
        raise UserError("nothing was labeled; reduce the estimate with --limit, --max-pixels or --max-tokens")


def show_labels(document: dict[str, Any]) -> None:
    """Print how many questions were answered and how many answers are usable, and why others are not."""
    mean = document["mean_confidence"]
    counts = [document[key] for key in ("questions", "before", "answered")]
    counts += [sum(document["unanswered"].values()), document["usable"]]
    columns = ["questions", "answered before", "answered", "not answered", "usable", "mean confidence"]
    table(document["folder"], columns, [[*map(str, counts), NONE if mean is None else f"{mean:.3f}"]])
    for reason, number in document["unanswered"].items():
        sentence(f"not answered: {number}: {reason}")
    for reason, number in document["unusable"].items():
        sentence(f"not usable: {number}: {reason}")
    if document["boxes"]["answers"]:
        boxes = document["boxes"]
        iou = boxes["mean_iou"][boxes["format"]]
        sentence(f"boxes: format {boxes['format']}, mean IoU {iou:.2f} on {boxes['answers']} known answers")
    sentence(f"ten answers with their images: {document['page']}")
    notes(document["notes"])


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
