"""The verbs that use a trained model: evaluate and predict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from preceptor import api
from preceptor.arguments import as_path
from preceptor.cli import options
from preceptor.cli.results import show_results
from preceptor.cli.terminal import log_to_stderr, notes, say, sentence, show_progress
from preceptor.errors import UserError

EVALUATE_EXAMPLES = """\
preceptor evaluate runs/mhkd-demo
preceptor evaluate runs/mhkd-vqa-rad data.root=OTHER_RAD --output runs/other
preceptor evaluate runs/mhkd-vqa-rad --images real,blank,shuffled,mirrored
preceptor evaluate runs/lckd-brats/baseline --json
preceptor evaluate slake.zip --recipe mhkd-slake-en --output runs/given"""

PREDICT_EXAMPLES = """\
preceptor predict runs/rad --image a.png --question "Is there a lesion?"
preceptor predict runs/rad --table questions.csv --output answers.jsonl
preceptor predict runs/lckd-demo flair=a.nii.gz t1=b.nii.gz --output out
preceptor predict runs/lckd-demo --case CASES --output out
preceptor predict runs/lckd-brats flair=SERIES --output out --dicom-seg
preceptor predict runs/clinkd-demo --image SLICES --question "Where is it?"
"""


def evaluate(
    run: options.Model,
    overrides: options.Overrides = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Evaluate on the data of this recipe, for a model without one. Default: that of its training.",
        ),
    ] = None,
    protocol: options.Protocol = None,
    output: Annotated[
        Path | None,
        options.output_folder("Write predictions and results here instead of into the folder of the stage."),
    ] = None,
    images: Annotated[
        str,
        typer.Option(
            metavar="KINDS",
            help="Ask again about other images to see whether the model uses them: a comma-separated list of "
            "blank, shuffled and mirrored.",
        ),
    ] = "",
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Score a trained model on the test split of its data.

    Settings such as data.root=DIR choose other data.
    """
    log_to_stderr()
    kinds = [kind.strip() for kind in images.split(",") if kind.strip()]
    results = api.evaluate(
        run,
        overrides or [],
        recipe=recipe,
        protocol=protocol,
        output=output,
        images=kinds,
        trust_remote_code=trust_remote_code,
    )
    say(results, as_json, show_results)


def predict(
    run: options.Model,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODALITY=PATH", help="Segmentation: the file, or folder of a DICOM series, of each modality."
        ),
    ] = None,
    image: Annotated[
        Path | None, options.existing("PATH", "Image file (PNG, JPEG, TIFF, DICOM) or folder of images.")
    ] = None,
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="Question about the image.")] = None,
    table: Annotated[
        Path | None,
        options.existing("FILE", "CSV or JSONL table: of questions with their images, or of cases with their files."),
    ] = None,
    case: Annotated[
        list[Path] | None,
        options.existing(
            "PATH", "Segmentation: folder of a case, folder of cases, or a file. Repeat it for several images."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="JSONL file for answers; folder for segmentations, default: the current one. If it exists, prediction "
            "resumes.",
            callback=options.expand_home,
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Number of answers per question.")] = 3,
    modality: Annotated[
        str, typer.Option(metavar="NAME", help="Modality of the images (ct, mr, x, ...), if the model needs it.")
    ] = "",
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Segmentation: write the probabilities, too.")
    ] = False,
    post: Annotated[
        bool, typer.Option("--post", help="Segmentation: apply the post-processing of the recipe.")
    ] = False,
    dicom_seg: Annotated[
        bool, typer.Option("--dicom-seg", help="Segmentation of DICOM series: write a DICOM SEG object, too.")
    ] = False,
    copy_patient: Annotated[
        bool, typer.Option("--copy-patient", help="With --dicom-seg: copy the patient's name, id and so on into it.")
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Answer questions about images, or segment cases."""
    if copy_patient and not dicom_seg:
        raise UserError("--copy-patient needs --dicom-seg; NIfTI files have no fields of the patient")
    inputs: dict[str, Any] = {
        "image": image,
        "question": question,
        "table": table,
        "case": case or None,
        "files": files_by_modality(files or []),
        "top": top,
        "modality": modality,
        "probabilities": probabilities,
        "dicom_seg": dicom_seg,
        "copy_patient": copy_patient,
        "post": post,
    }
    require_one_input(inputs)
    log_to_stderr()
    with show_progress("predictions") as progress:
        rows = api.predict(run, output=output, trust_remote_code=trust_remote_code, progress=progress, **inputs)

    def show(rows: list[dict[str, Any]]) -> None:
        if len(rows) == 1 and "mask" in rows[0]:
            show_case(rows[0])
        elif output is not None:
            sentence(f"{len(rows)} prediction{'s' if len(rows) != 1 else ''}: {output}")
        elif rows and "answers" in rows[0]:
            for row in rows:
                answers = ", ".join(f"{a['answer']} ({a['probability']:.2f})" for a in row["answers"])
                sentence(answers if len(rows) == 1 else f"{row['id']}: {answers}")
        else:
            for row in rows:
                sentence(", ".join(f"{key} {value}" for key, value in row.items() if value != "" and key != "warnings"))
        # The log shows those of answers, so that standard output has nothing but the answers.
        notes(row["warnings"] for row in rows if "mask" in row and row.get("warnings"))

    say(rows, as_json, show)


def show_case(row: dict[str, Any]) -> None:
    """Print what was segmented from which modalities, with what to expect of it."""
    missing = f"; missing: {row['missing']}" if row["missing"] else ""
    sentence(f"{row['id']}: segmented from {row['modalities']}{missing}")

    def by_region(ending: str, form: Callable[[float], str]) -> str:
        found = {key.removesuffix(ending): value for key, value in row.items() if key.endswith(ending) and value != ""}
        return ", ".join(f"{region} {form(value)}" for region, value in found.items())

    sentence(f"volumes in ml: {by_region('_ml', format_ml)}")
    if expected := by_region("_expected_dice", "{:.3f}".format):
        sentence(f"expected Dice of these modalities, from the validation cases: {expected}")
    for key in ("mask", "dicom_seg", "probabilities"):
        if row.get(key):
            sentence(f"{key}: {row[key]}")


def format_ml(volume: float) -> str:
    """Return a volume with two decimals, or with two significant digits if it is below 0.1 ml. 0 means no voxel."""
    return f"{volume:.2f}" if volume == 0 or volume >= 0.1 else f"{volume:.2g}"


def files_by_modality(texts: list[str]) -> dict[str, Path]:
    """Return the paths of arguments such as ``flair=a.nii.gz``. Raises UserError if one does not exist."""
    files = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UserError(f"{text!r} must look like MODALITY=PATH")
        file = as_path(path, name)
        if not file.exists():
            raise UserError(f"{text}: there is no such file or folder")
        if name in files:
            raise UserError(f"the modality {name} is given twice")
        files[name] = file
    return files


def require_one_input(inputs: dict[str, Any]) -> None:
    """Raise UserError unless exactly one kind of input is given."""
    if (inputs["image"] is None) != (inputs["question"] is None):
        raise UserError("--image PATH and --question TEXT belong together; give both")
    kinds = [key for key in ("image", "table", "case", "files") if inputs[key]]
    if len(kinds) != 1:
        raise UserError(
            "predict needs one of: --image PATH with --question TEXT, --table FILE, --case PATH, or MODALITY=PATH"
        )
