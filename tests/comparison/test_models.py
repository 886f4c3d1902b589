"""What may be compared, and what is refused: damage, other questions, other data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from preceptor.comparison.models import read_models
from preceptor.errors import UserError
from preceptor.recipe import dump_recipe
from preceptor.tasks import recipe_from
from tests.comparison.made import PROTOCOL, hits, write_run, write_stage


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_row(stage: Path, number: int, **values: Any) -> None:
    path = stage / "predictions" / "toy-test.jsonl"
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | values)
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two comparable one-stage runs of 20 questions."""
    return (
        write_stage(tmp_path / "a", hits(20, 0.5), stage="baseline"),
        write_stage(tmp_path / "b", hits(20, 0.6), stage="distilled"),
    )


def test_runs_of_one_stage_and_of_several(tmp_path: Path, pair):
    run = write_run(tmp_path / "run", {"teacher": hits(20, 0.9), "baseline": hits(20, 0.45)}, seed=1)
    models, notes = read_models([run, *pair])
    assert [model.name for model in models] == ["run/teacher", "run/baseline", "a", "b"]
    assert [model.values.mean() for model in models] == [0.9, 0.45, 0.5, 0.6]
    assert notes == []


def test_a_run_and_its_stage_are_one_model(tmp_path: Path):
    run = write_run(tmp_path / "run", {"baseline": hits(20, 0.5), "distilled": hits(20, 0.6)})
    models, _ = read_models([run, run / "distilled", run])
    assert len(models) == 2


def test_a_copy_is_no_second_seed(tmp_path: Path, pair):
    shutil.copytree(pair[0], tmp_path / "copy")
    models, notes = read_models([*pair, tmp_path / "copy"])
    assert len(models) == 2
    assert notes == ["copy has the weights of a and is omitted."]


def test_the_same_seed_with_other_weights_is_refused(tmp_path: Path, pair):
    again = write_stage(tmp_path / "again", hits(20, 0.5), stage="baseline")
    with pytest.raises(UserError, match=r"same seed 0, but not the same weights.*RUN/distilled"):
        read_models([*pair, again])


def truncate(run: Path) -> None:
    path = run / "results.json"
    path.write_text(path.read_text()[:-40])


def lose(name: str):
    return lambda run: (run / name).unlink()


def cut_line(run: Path) -> None:
    path = run / "predictions" / "toy-test.jsonl"
    path.write_text(path.read_text()[:-30])


def drop_line(run: Path) -> None:
    path = run / "predictions" / "toy-test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def nan_accuracy(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    results["protocols"][PROTOCOL]["accuracy"] = float("nan")
    (run / "results.json").write_text(json.dumps(results))


def empty_row(run: Path, row: str) -> None:
    path = run / "predictions" / "toy-test.jsonl"
    path.write_text("\n".join([row, *path.read_text().splitlines()[1:]]) + "\n")


def change_scores(run: Path, **values: Any) -> None:
    protocols = json.loads((run / "results.json").read_text())["protocols"]
    change(run / "results.json", protocols={id: {**scores, **values} for id, scores in protocols.items()})


DAMAGE = {
    "truncated results": (truncate, r"b/results\.json is damaged"),
    "no results": (lose("results.json"), r"b is not a run folder"),
    "empty results": (lambda run: (run / "results.json").write_text("{}"), r"has no 'stage'"),
    "results of another kind": (lambda run: (run / "results.json").write_text("[]"), r"is not a mapping"),
    "bytes for results": (lambda run: (run / "results.json").write_bytes(b"\xff\xfe"), r"results\.json is damaged"),
    "a note without text": (lambda run: change(run / "results.json", notes=[None]), r"notes is not a list of texts"),
    "a list as accuracy": (lambda run: change_scores(run, accuracy=[]), r"toy/test\.accuracy is \[\], not a number"),
    "a text as number": (lambda run: change_scores(run, n="20"), r"toy/test\.n is '20', not a number"),
    "a list for scores": (lambda run: change_scores(run, hd95=[1]), r"toy/test\.hd95 is \[1\], not a mapping"),
    "training is a number": (lambda run: change(run / "results.json", training=3), r"training is 3, not a mapping"),
    "a row without keys": (lambda run: empty_row(run, "null"), r"line 1 is damaged \(it is not a mapping"),
    "an empty row": (lambda run: empty_row(run, "{}"), r"line 1: id is None, not str"),
    "no scores": (lambda run: change(run / "results.json", protocols={}), r"has no scores"),
    "NaN in the results": (nan_accuracy, r"it contains NaN"),
    "no predictions": (lose("predictions/toy-test.jsonl"), r"toy-test\.jsonl is missing; `preceptor evaluate .*b`"),
    "a truncated line": (cut_line, r"toy-test\.jsonl, line 20 is damaged"),
    "a lost line": (drop_line, r"contains 19 questions, but results\.json says 20"),
    "NaN in the predictions": (lambda run: change_row(run, 3, probability=float("nan")), r"line 4 .*it contains NaN"),
    "a list as prediction": (lambda run: change_row(run, 3, prediction=[]), r"line 4: prediction is \[\], not str"),
    "no target": (lambda run: change_row(run, 0, target=None), r"line 1: target is None, not str"),
    "no score": (lambda run: change_row(run, 3, score=None), r"line 4: score is None, not float"),
    "a repeated id": (lambda run: change_row(run, 3, id="q7"), r"contains id 'q7' twice, in lines 4 and 8"),
    "other scores": (lambda run: change_row(run, 0, score=float(not hits(20, 0.6)[0])), r"but results\.json says"),
    "no recipe": (lose("recipe.yaml"), r"b has no recipe\.yaml"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(pair, damage: str):
    do, message = DAMAGE[damage]
    do(pair[1])
    with pytest.raises(UserError, match=message):
        read_models(pair)


def test_an_interrupted_run_names_its_finished_stages(tmp_path: Path):
    run = write_run(tmp_path / "run", {"teacher": hits(20, 0.9), "baseline": hits(20, 0.5)})
    (run / "results.json").unlink()
    with pytest.raises(UserError, match=r"not finished.*run/baseline .*run/teacher"):
        read_models([run])
    assert len(read_models([run / "baseline", run / "teacher"])[0]) == 2


def test_a_missing_folder():
    with pytest.raises(UserError, match="there is no run folder nowhere"):
        read_models([Path("nowhere")])


def test_other_questions(tmp_path: Path, pair):
    fewer = write_stage(tmp_path / "fewer", hits(19, 0.5))
    with pytest.raises(UserError, match=r"a and .*fewer, protocol toy/test, were not scored on the same units: 1 of"):
        read_models([pair[0], fewer])
    with pytest.raises(UserError, match="same units: 0 of the first are missing in the second and 1 are only in the"):
        read_models([fewer, pair[0]])


@pytest.mark.parametrize("values", [{"question_type": "plane"}, {"answer_type": "closed"}])
def test_the_same_ids_with_other_questions(pair, values):
    """An id alone does not identify a question: its types must be the same too."""
    change_row(pair[1], 0, **values)
    with pytest.raises(UserError, match="were not scored on the same units"):
        read_models(pair)


def test_runs_of_another_task(tmp_path: Path, pair):
    recipe = {"task": "segmentation", "name": "toy", "output": str(tmp_path), "stages": ["baseline"]}
    other = write_stage(tmp_path / "other", hits(20, 0.5), stage="baseline", seed=1)
    (other / "recipe.yaml").write_text(dump_recipe(recipe_from(recipe, "toy")), "utf-8")
    rows = [{"id": "a", "subset": "t1", "region": "wt", "dice": 0.5, "hd95": 1.0}]
    (other / "predictions" / "toy-test.jsonl").write_text(json.dumps(rows[0]) + "\n", "utf-8")
    change(other / "results.json", protocols={PROTOCOL: {"dice": 0.5, "n": 1}})
    with pytest.raises(UserError, match=r"task vqa and .*other of segmentation"):
        read_models([*pair, other])


def test_other_protocols(tmp_path: Path, pair):
    with pytest.raises(UserError, match=r"not scored under protocol 'toy/tset'; did you mean 'toy/test'"):
        read_models(pair, "toy/tset")
    other = write_stage(tmp_path / "other", hits(20, 0.5), protocols={"toy/other": {"accuracy": 0.5, "n": 20}})
    with pytest.raises(UserError, match=r"other was not scored under protocol 'toy/test'"):
        read_models([pair[0], other])


def test_other_data(tmp_path: Path, pair):
    other = write_stage(
        tmp_path / "other", hits(20, 0.5), data={"name": "toy", "variant": "", "sha256": "x", "test_sha256": "t" * 64}
    )
    with pytest.raises(UserError, match=r"different data \(data\.sha256 rows at 1"):
        read_models([pair[0], other])


def test_other_test_files_of_the_same_names(tmp_path: Path):
    def write(name: str, seed: int, **more: str) -> Path:
        data = {"name": "toy", "variant": "", "sha256": "rows", "test_sha256": "t"} | more
        return write_stage(tmp_path / name, hits(20, 0.5), data=data, seed=seed)

    old, one = write("old", 0), write("one", 1, test_files_sha256="a")
    same, other = write("same", 2, test_files_sha256="a"), write("other", 3, test_files_sha256="b")
    assert len(read_models([old, one, same])[0]) == 3
    with pytest.raises(UserError, match=r"one and .*other were tested on files .* different contents"):
        read_models([one, other])


def test_shares_of_the_training_data_must_have_the_same_test_rows(tmp_path: Path):
    def write(name: str, share: float, test: str | None) -> Path:
        data = {"name": "toy", "variant": "", "sha256": f"rows at {share}", "test_sha256": test}
        return write_stage(tmp_path / name, hits(20, 0.5), settings={"data": {"train_share": share}}, data=data)

    whole, half, other, unknown = (
        write(*given) for given in (("whole", 1.0, "t"), ("half", 0.5, "t"), ("other", 0.1, "u"), ("none", 0.25, None))
    )
    assert [model.share for model in read_models([whole, half])[0]] == [1.0, 0.5]
    for refused in (other, unknown):
        with pytest.raises(UserError, match=r"data\.test_sha256"):
            read_models([whole, half, refused])


def test_a_model_that_also_learned_from_rows_without_labels_is_compared_on_the_same_test_rows(tmp_path: Path):
    def write(name: str, unlabelled: list[str], test: str) -> Path:
        data = {"name": "toy", "variant": "", "sha256": f"rows of {name}", "test_sha256": test}
        settings = {"data": {"unlabelled": unlabelled}}
        return write_stage(tmp_path / name, hits(20, 0.5), settings=settings, data=data)

    labelled, more, other = write("labelled", [], "t"), write("more", ["images"], "t"), write("other", ["images"], "u")
    assert len(read_models([labelled, more])[0]) == 2
    with pytest.raises(UserError, match=r"different data \(data\.test_sha256"):
        read_models([labelled, other])
    with pytest.raises(UserError, match=r"different data \(data\.sha256"):
        read_models([labelled, write("rows", [], "t")])
