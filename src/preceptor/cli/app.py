"""The command line. Exit codes: 0 done, 1 a check failed, 2 the user's mistake, 130 interrupted."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from preceptor.cli.teach import teach
from preceptor.cli.terminal import main_process, percent, say, show_cached_words, show_results, table
from preceptor.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Preceptor teaches small medical multimodal models from strong ones.",
)
recipes_app = typer.Typer(help="List the shipped recipes, or show one.", rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings of the recipe to change.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
Output = Annotated[Path | None, typer.Option(help="Where to write.")]


def _recipe(name: str, overrides: list[str] | None):
    """Load a recipe, and keep the process off the network unless the recipe asks for it."""
    from preceptor.tasks import load_recipe

    recipe = load_recipe(name, overrides or [])
    _offline(recipe.allow_downloads)
    return recipe


def _offline(allow_downloads: bool = False) -> None:
    """Refuse the hub at once instead of after many retries. Must run before transformers is imported."""
    if not allow_downloads:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _run(recipe, as_json: bool) -> None:
    _log_to_stderr()
    if recipe.task == "vqa":
        from preceptor.vqa.run import run_recipe

        results = run_recipe(recipe)
    elif recipe.task == "segmentation":
        from preceptor.segmentation.run import run_segmentation

        results = run_segmentation(recipe)
    else:
        from preceptor.grounding.run import run_vlm

        results = run_vlm(recipe)

    def show(document: dict[str, Any]) -> None:
        show_results(document)
        print(f"report: {recipe.output_folder / 'report.html'}")

    say(results, as_json, show)


def _log_to_stderr() -> None:
    log = logging.getLogger("preceptor")
    log.setLevel(logging.INFO)
    for before in [handler for handler in log.handlers if type(handler) is logging.StreamHandler]:
        log.removeHandler(before)  # stderr may be another one where a process calls main again
    if main_process():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)


@app.command()
def demo(
    method: Annotated[str, typer.Argument(help="mhkd, lckd or clinkd")] = "mhkd",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Train with and without distillation on generated data, in a few minutes, and compare."""
    from preceptor.errors import nearest

    if method not in ("mhkd", "lckd", "clinkd"):
        raise UserError(f"there is no demo {method!r}{nearest(method, ('mhkd', 'lckd', 'clinkd'))}")
    _run(_recipe(f"{method}-demo", [f"output={output}"] if output else []), as_json)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or the path of a YAML file.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train by a recipe; started again on the same output, go on where it stopped."""
    _run(_recipe(recipe, overrides), as_json)


@app.command()
def evaluate(
    run: RunFolder,
    overrides: Overrides = None,
    protocol: Annotated[str | None, typer.Option(help="Only this protocol.")] = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Score the trained model of a run; data.root=... and data.variant=... choose other data."""
    _offline()
    from preceptor.vqa.serve import evaluate_run

    say(evaluate_run(run, overrides or [], protocol, output), as_json, show_results)


@app.command()
def predict(
    run: RunFolder,
    image: Annotated[Path | None, typer.Option(help="Image file: PNG, JPEG or DICOM; or a folder of them.")] = None,
    question: Annotated[str | None, typer.Option(help="Question about the image.")] = None,
    table: Annotated[Path | None, typer.Option(help="CSV or JSONL with image and question.")] = None,
    output: Output = None,
    top: Annotated[int, typer.Option(min=1, help="How many answers to show.")] = 3,
    modality: Annotated[str, typer.Option(help="Of the images: ct, mr, x, ..., where a model needs it.")] = "",
    case: Annotated[
        list[Path] | None, typer.Option(help="Case to segment: its folder, a 4-D file, or one --case per file.")
    ] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="With --case: write them too.")] = False,
    post: Annotated[bool, typer.Option("--post", help="With --case: apply the recipe's post-processing.")] = False,
    as_json: Json = False,
) -> None:
    """Answer a question about an image, or every question of a table; or segment a case."""
    _offline()
    if case:
        if image is not None or question is not None or table is not None:
            raise UserError("predict takes --case, or --image with --question, or --table; not several of them")
        _segment(run, case, output or Path(), probabilities, post, as_json)
        return
    from preceptor.files import json_lines, write_text
    from preceptor.vqa.serve import answer_image, answer_table

    if table is not None and image is None and question is None:
        answers = answer_table(run, table, output, top, modality)
    elif image is not None and question is not None and table is None:
        answers = answer_image(run, image, question, top, modality)
        if output is not None:
            write_text(output, json_lines(answers))
    else:
        raise UserError("predict needs --image FILE with --question TEXT, --table FILE, or --case FOLDER")

    def show(rows: list[dict[str, Any]]) -> None:
        if output is not None:
            print(f"{len(rows)} answers: {output}")
            return
        for row in rows:
            said = ", ".join(f"{a['answer']} ({a['probability']:.2f})" for a in row["answers"])
            print(said if image is not None and image.is_file() else f"{row['id']}: {said}")

    say(answers, as_json, show)


def _segment(run: Path, case: list[Path], output: Path, probabilities: bool, post: bool, as_json: bool) -> None:
    from preceptor.segmentation.predict import segment_case, sentences

    where = case[0] if len(case) == 1 else case
    found = segment_case(run, where, output, probabilities=probabilities, post=post)
    say(found, as_json, lambda document: print("\n".join(sentences(document))))


@app.command()
def cache(
    recipe: Annotated[str, typer.Argument(help="Recipe or run folder.")],
    overrides: Overrides = None,
    verify: Annotated[float, typer.Option(min=0, max=1, help="Recompute this share of the rows and compare.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Write the teacher's signals of a recipe to its cache, or verify them; exit 1 where they do not agree."""
    loaded = _recipe(recipe, overrides)
    _log_to_stderr()
    if loaded.method.name == "clinkd":
        from preceptor.grounding.teacher_cache import cache_words

        report = cache_words(loaded, verify)
    elif loaded.method.name == "lckd":
        raise UserError("an lckd recipe has no teacher to cache: its teachers are modalities of the network it trains")
    else:
        from preceptor.vqa.serve import cache_run

        report = cache_run(loaded, verify)

    def show(document: dict[str, Any]) -> None:
        if "labels" in document:
            show_cached_words(document)
        else:
            table(
                document["folder"],
                ["rows", "checked", "largest difference", "mismatches"],
                [[str(document[key]) for key in ("rows", "checked", "worst", "mismatches")]],
            )
        if document["damage"]:
            print(document["damage"])

    say(report, as_json, show)
    if report["mismatches"] or report["damage"]:
        raise typer.Exit(1)


app.command()(teach)


@app.command()
def doctor(
    recipe: Annotated[str, typer.Argument(help="VqaRecipe, run folder, or a table of your own (CSV or JSONL).")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Look at data before training: broken images, empty texts, double ids; exit 1 where something is found."""
    _offline()
    from preceptor.vqa.serve import check_run

    report = check_run(recipe, overrides or [])

    def show(document: dict[str, Any]) -> None:
        counts = ", ".join(f"{n} {split}" for split, n in document["rows"].items())
        kind = f"; {document['images']} images" if "images" in document else " cases"
        print(f"{document['name']} {document['variant']}: {counts}{kind}")
        for note in document["notes"]:
            print(f"note: {note}")
        if document["findings"]:
            rows = [
                [f["file"] or ", ".join(f["ids"][:5]), f["reason"], str(len(f["ids"])), f["severity"]]
                for f in document["findings"]
            ]
            table("findings", ["where", "what", "rows", "severity"], rows)
        else:
            print("nothing found")

    say(report, as_json, show)
    if any(finding["severity"] == "error" for finding in report["findings"]):
        raise typer.Exit(1)


@app.command()
def report(run: RunFolder, as_json: Json = False) -> None:
    """Write the report page of a run again."""
    _offline()
    from preceptor.vqa.serve import report_run

    path = report_run(run)
    say({"report": str(path)}, as_json, lambda document: print(document["report"]))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of their stages.")],
    baseline: Annotated[str | None, typer.Option(help="Group or run to compare with; default: stage baseline.")] = None,
    protocol: Annotated[str | None, typer.Option(help="Protocol; default: the main one of the first run.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for page, JSON, CSV, LaTeX and figures.")] = Path("runs/compare"),
    as_json: Json = False,
) -> None:
    """Compare runs of one task on the same test set: intervals, tests, learning curves."""
    from preceptor.compare.run import compare_runs, write_comparison
    from preceptor.compare.words import HOW_MARKED, rows_of_deltas, rows_of_groups

    found = compare_runs(runs, baseline=baseline, protocol=protocol)
    document = write_comparison(found, output)

    def show(_: dict[str, Any]) -> None:
        for metric in found.metrics:
            title = f"{found.protocol} (n = {found.score(found.groups[0], metric).n})"
            table(title, *rows_of_groups(found, metric))
        for c in found.contrasts:
            deltas = [(d.category.name, d) for d in (c.overall, *c.parts)]
            table(f"{c.title}, over {c.covers}", *rows_of_deltas(deltas))
        if found.contrasts:
            print(HOW_MARKED)
        for note in found.notes:
            print(f"note: {note}")
        print(f"page: {output / 'compare.html'}")

    say(document, as_json, show)


@app.command()
def audit(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Name of a data set, or a table (CSV or JSONL).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[data.KEY=VALUE|against.KEY=VALUE]...", help="Settings of the data.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Second data set: find what both share.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the data set; default: in PRECEPTOR_DATA.")] = None,
    against_root: Annotated[Path | None, typer.Option(help="Folder of the second data set.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for audit.json and audit.html.")] = Path("runs/audit"),
    allow: Annotated[bool, typer.Option("--allow", help="Exit with 0 even where leakage is found.")] = False,
    as_json: Json = False,
) -> None:
    """Look for leakage, duplicates, shortcuts and traces of patients; exit 1 where something leaks."""
    from preceptor.audit.run import audit_data

    found = audit_data(data, overrides or [], against, root, against_root, output)

    def show(document: dict[str, Any]) -> None:
        for one in document["data"]:
            counts = ", ".join(f"{n} {split}" for split, n in one["rows"].items() if n)
            print(f"{one['name']} {one['variant']}: {counts}; {one['images']} images")
            for note in one["notes"]:
                print(f"note: {note}")
        rows = [[f["title"], f"{f['count']} of {f['of']}", f["severity"]] for f in document["findings"]]
        table("findings", ["what", "found", "verdict"], rows or [["nothing found", "", ""]])
        if document["shortcuts"]:
            rows = [
                [s["title"], *(percent(s[key]) for key in ("accuracy", "open", "closed"))]
                for s in document["shortcuts"]
            ]
            table("answers without the image", ["shortcut", "accuracy", "open", "closed"], rows)
        for note in document["notes"]:
            print(f"note: {note}")
        print(f"page: {output / 'audit.html'}")

    say(found, as_json, show)
    if found["leaks"] and not allow:
        raise typer.Exit(1)


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help="JSONL file: a line has id and answer; or a dialogue's row.")],
    protocol: Annotated[str, typer.Option(help="Protocol id, such as vqa-rad/clean/451, med-grit/given/birdeval.")],
    root: Annotated[Path | None, typer.Option(help="Data set; default: its folder under PRECEPTOR_DATA.")] = None,
    references: Annotated[str, typer.Option(help="What is right: data, or file (the lines hold answers).")] = "data",
    normaliser: Annotated[str | None, typer.Option(help="mevf, lower or vqa-v2 instead of the protocol's.")] = None,
    metric: Annotated[str | None, typer.Option(help="accuracy, bleu or soft instead of the protocol's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the scored questions here, as JSONL.")] = None,
    as_json: Json = False,
) -> None:
    """Score a file of predictions, of any system, under a protocol."""
    import gc

    from preceptor.errors import nearest
    from preceptor.files import json_lines, write_text
    from preceptor.grounding.score import score_dialogue_file, scores_dialogues
    from preceptor.vqa.score import score_file

    for name, value, known in (
        ("--references", references, ("data", "file")),
        ("--metric", metric, ("accuracy", "bleu", "soft")),
        ("--normaliser", normaliser, ("mevf", "lower", "vqa-v2")),
    ):
        if value is not None and value not in known:
            raise UserError(f"{name} {value} is not known{nearest(value, known)}")
    if scores_dialogues(protocol):
        for name, given in (("--root", root), ("--normaliser", normaliser), ("--metric", metric)):
            if given is not None:
                raise UserError(f"{name} says nothing of {protocol}: its answers are scored against the file's own")
        results, scored = score_dialogue_file(predictions, protocol)
        if output is not None:
            write_text(output, json_lines(scored))
        say(results, as_json, show_results)
        return
    gc.disable()  # all that is read stays until the end, and looking through it again and again is a third of the time
    try:
        scores, notes = score_file(
            predictions,
            protocol,
            root=root,
            references=references,  # type: ignore[arg-type]
            normaliser=normaliser,
            metric=metric,  # type: ignore[arg-type]
        )
        document = {"protocol": protocol, **scores.as_dict(), "notes": notes}
    finally:
        gc.enable()
    if output is not None:
        write_text(output, json_lines(scores.rows()))

    def show(found: dict[str, Any]) -> None:
        rows = [["all", percent(found["accuracy"]), str(found["n"])]]
        rows += [[kind, percent(found[kind]), str(found[f"n_{kind}"])] for kind in ("open", "closed")]
        rows += [
            [f"  {name}", percent(kind["accuracy"]), str(kind["n"])] for name, kind in found["question_types"].items()
        ]
        rows.append(["mean over question types", percent(found["macro"]), ""])
        rows += [[f"BLEU-{n}, pooled", percent(found[f"bleu_{n}"]), ""] for n in range(1, 5)]
        rows += [["token F1", percent(found["f1"]), ""], ["BLEU (ImageCLEF)", percent(found["bleu"]), ""]]
        table(protocol, ["questions", found["metric"], "n"], rows)
        for note in notes:
            print(f"note: {note}")

    say(document, as_json, show)


@app.command("new-vlm")
def new_vlm(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write the model.")],
    corpus: Annotated[
        list[Path] | None, typer.Option(help="Texts for the tokenizer: .txt, or .json or .jsonl dialogues; repeat it.")
    ] = None,
    family: Annotated[str, typer.Option(help="qwen2_vl, qwen2_5_vl or qwen3_vl.")] = "qwen2_vl",
    size: Annotated[str, typer.Option(help="tiny or small.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    vocabulary_size: Annotated[int, typer.Option(help="Most byte pairs of the tokenizer.")] = 2000,
    max_pixels: Annotated[int, typer.Option(min=28 * 28, help="Larger images are made smaller.")] = 224 * 224,
    language_model: Annotated[
        str | None, typer.Option(help="Language model to start from: a folder, a GGUF file, or package:NAME/PATH.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a small vision-language model of the Qwen-VL family to train: random, or on a small language model."""
    _offline()
    from preceptor.grounding.new_vlm import corpus_texts, count_parameters
    from preceptor.grounding.new_vlm import new_vlm as write_model

    if bool(corpus) == bool(language_model):
        raise UserError("new-vlm takes either --corpus FILE, to learn a tokenizer from, or --language-model DIR")
    write_model(
        folder,
        corpus_texts(corpus or []) if corpus else [],
        family,  # type: ignore[arg-type]
        size,  # type: ignore[arg-type]
        seed=seed,
        vocabulary_size=vocabulary_size,
        max_pixels=max_pixels,
        language_model=language_model,
    )
    document = {"folder": str(folder), "family": family, "parameters": count_parameters(folder), "seed": seed}
    say(document, as_json, lambda d: print(f"{d['family']} of {d['parameters']:,} parameters: {d['folder']}"))


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand:
        return
    from preceptor.recipe import recipe_names
    from preceptor.tasks import load_recipe

    found = {name: load_recipe(name).description for name in recipe_names()}
    say(found, as_json, lambda _: table("recipes", ["name", "what it does"], [[n, d] for n, d in found.items()]))


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")]) -> None:
    """Print a recipe with its comments."""
    from preceptor.recipe import recipe_text

    print(recipe_text(name)[0], end="")


@recipes_app.command("accelerate")
def accelerate_configuration(
    name: Annotated[str, typer.Argument(help="fsdp2, fsdp2-zero2 or deepspeed-zero2.")],
) -> None:
    """Print the place of a shipped configuration, for `accelerate launch --config_file`."""
    from preceptor.recipe import accelerate_file

    print(accelerate_file(name))


def main() -> None:
    """Run the command line and exit with its code."""
    # transformers imports DeepSpeed where it is installed, which would say on stdout that there is no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # Imported late: the loop's room is heavy, and only a training raises this.
        loop = sys.modules.get("preceptor.training.loop")
        if loop is not None and isinstance(error, loop.Interrupted):
            print(error, file=sys.stderr)
            sys.exit(130)
        raise


if __name__ == "__main__":
    main()
