"""The verbs that check data: doctor and audit."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Annotated, Any

import typer

from preceptor import api
from preceptor.arguments import expand_home
from preceptor.cli import options
from preceptor.cli.errors import CHECK_FAILED
from preceptor.cli.terminal import log_to_stderr, notes, say, sentence, table
from preceptor.errors import UserError, nearest
from preceptor.report.format import interval, percent, points

DOCTOR_EXAMPLES = """\
preceptor doctor questions.csv
preceptor doctor mhkd-vqa-rad data.root=VQA_RAD
preceptor doctor lckd-brats data.root=BRATS --json
preceptor doctor mhkd-vqa-rad --teacher runs/teacher --seeds 5"""

AUDIT_EXAMPLES = """\
preceptor audit questions.csv
preceptor audit vqa-rad --root VQA_RAD data.variant=published
preceptor audit slake --against vqa-rad"""


def doctor(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Recipe, run folder, or a CSV or JSONL table of questions.")
    ],
    overrides: options.Overrides = None,
    teacher: Annotated[
        Path | None,
        options.existing(
            "RUN", "VQA: estimate on validation data how much a student can gain from this teacher.", file=False
        ),
    ] = None,
    student: Annotated[
        list[Path] | None,
        options.existing(
            "RUN",
            "Finished baseline. Repeat it for several seeds. Default: two are trained for a fraction of the epochs.",
            file=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="With --teacher: number of seeds planned.")] = 1,
    budget: Annotated[
        float, typer.Option(metavar="SHARE", help="With --teacher: fraction of the epochs for these baselines.")
    ] = 0.1,
    as_json: options.Json = False,
) -> None:
    """Check data before training.

    It looks for unreadable files, empty texts, repeated ids and leaks between splits. The exit code is 1 if a finding
    is an error. With --teacher, it also estimates whether distillation is likely to help.
    """
    log_to_stderr()
    refuse_data_as_recipe(data)
    document = api.check(data, overrides or [], teacher=teacher, students=student or [], seeds=seeds, budget=budget)
    say(document, as_json, show_findings)
    if any(finding["severity"] == "error" for finding in document["findings"]):
        raise typer.Exit(CHECK_FAILED)


def refuse_data_as_recipe(data: str) -> None:
    """Raise UserError for a file that is neither a table nor a recipe: a JSON list, an archive, another binary file."""
    path = expand_home(Path(data))
    if not path.is_file() or path.suffix in (".csv", ".jsonl"):
        return
    with path.open("rb") as file:
        head = file.read(4096)
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        raise UserError(
            f"{data} is a JSON list, and doctor reads a recipe or a table of questions (.csv or .jsonl); write one "
            "object per line into a .jsonl file, or, for dialogues, give clinkd-demo data.name=sharegpt "
            f"data.root={data}"
        )
    if b"\0" in head:
        raise UserError(
            f"{data} is an archive or another binary file, and doctor reads a recipe or a table of questions (.csv or "
            ".jsonl); unpack it, or export it as such a table"
        )


def show_findings(document: dict[str, Any]) -> None:
    """Print the size of the splits, the notes and the findings of a data set."""
    counts = ", ".join(f"{n} {split}" for split, n in document["rows"].items())
    images = f"; {document['images']} images" if "images" in document else ""
    sentence(f"{document['name']} {document['variant']}: {counts}{images}")
    notes(document["notes"])
    if not document["findings"]:
        sentence("no findings")
    else:
        show_table_of_findings(document["findings"])
    if "headroom" in document:
        show_headroom(document["headroom"])


def show_table_of_findings(findings: list[dict[str, Any]]) -> None:
    """Print one row for each finding."""
    rows = [[f["severity"], f["file"] or ", ".join(f["ids"][:5]), f["reason"], str(len(f["ids"]))] for f in findings]
    table("findings", ["severity", "place", "finding", "rows"], rows)


def show_headroom(found: dict[str, Any]) -> None:
    """Print what a teacher can give to a student, with the verdict as the last sentence."""
    scores, lead, validation = found["scores"], found["lead"], found["validation"]
    sentence(
        f"validation: teacher {percent(scores['teacher'])} %, student {percent(scores['student'])} % of "
        f"{validation['n']:,} questions; lead {points(lead['difference'])} points "
        f"({interval(lead['low'], lead['high'], points)})"
    )
    sentence(
        f"only the teacher is right: {percent(found['teacher_alone_right'])} %, only the student: "
        f"{percent(found['student_alone_right'])} %; a student that learned the former and lost none of the latter "
        f"would gain {percent(found['teacher_alone_right'])} points"
    )
    if (short := found["short"]) is not None:
        sentence(
            f"the {short['students']} students were trained for {short['epochs']:g} of {short['of']:g} epochs, "
            f"{short['seconds']:.0f} s in all; fully trained, they are closer to the teacher and to each other"
        )
    notes(found["notes"])
    sentence(found["verdict"])


def audit(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Name of a data set, or a CSV or JSONL table.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="data.KEY=VALUE|against.KEY=VALUE", help="Settings of the data to change."),
    ] = None,
    root: Annotated[
        Path | None, options.existing("DIR", "Folder of the data set. Default: its folder under PRECEPTOR_DATA.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="DATA", help="Second data set: report what both have in common.")
    ] = None,
    against_root: Annotated[Path | None, options.existing("DIR", "Folder of the second data set.")] = None,
    output: Annotated[Path, options.output_folder("Output folder for audit.json and audit.html.")] = Path("runs/audit"),
    allow: Annotated[bool, typer.Option("--allow", help="Exit with 0 even if the splits leak.")] = False,
    as_json: options.Json = False,
) -> None:
    """Look for leakage, duplicates and shortcuts in a data set.

    It also looks for unreadable files and patient data in images. The exit code is 1 if the splits leak.
    """
    for name in (data, against):
        if name is not None:
            check_name(name)
    log_to_stderr()
    document = api.audit(data, overrides or [], root=root, against=against, against_root=against_root, output=output)

    def show(document: dict[str, Any]) -> None:
        show_audit(document)
        sentence(f"report: {output / 'audit.html'}")

    say(document, as_json, show)
    if document["leaks"] and not allow:
        raise typer.Exit(CHECK_FAILED)


def check_name(name: str) -> None:
    """Raise UserError if a data set is neither known by name nor an existing path."""
    from preceptor.data.locations import FOLDERS

    if name.replace("_", "-") not in (*FOLDERS, "phantom", "table") and not Path(name).exists():
        raise UserError(f"{name!r} is neither the name of a data set nor an existing path{nearest(name, FOLDERS)}")


def show_audit(document: dict[str, Any]) -> None:
    """Print the findings of an audit."""
    for one in document["data"]:
        counts = ", ".join(f"{n} {split}" for split, n in one["rows"].items() if n)
        sentence(f"{one['name']} {one['variant']}: {counts}; {one['images']} images")
        notes(one["notes"])
    rows = [[f["severity"], f["title"], f"{f['count']} of {f['of']}"] for f in document["findings"]]
    if rows:
        table("findings", ["severity", "finding", "count"], rows)
    else:
        sentence("no findings")
    if document["shortcuts"]:
        rows = [
            [s["title"], *(percent(s[key]) for key in ("accuracy", "open", "closed"))] for s in document["shortcuts"]
        ]
        table("accuracy without the image, in %", ["shortcut", "all", "open", "closed"], rows)
    notes(document["notes"])
