"""The labels of `method.pseudo_labels.store` are checked before a stage is trained, and by `preceptor doctor`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from preceptor.api import run_recipe
from preceptor.data.grounding.box_formats import write_box
from preceptor.errors import UserError
from preceptor.grounding.answer_checks import FIXES_OF_STAGE
from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.data import read_recipe_dialogues
from preceptor.grounding.experiment import GroundingExperiment
from preceptor.grounding.labeling import teach
from preceptor.grounding.local_teacher import LocalTeacher
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.pseudo_labels import ContentHashes, PseudoLabels, prompts_of_turn
from preceptor.teachers.label_store import Label, LabelStore, LabelStoreKey, read_labels
from tests.command_line import call
from tests.fault.tiny import CLINKD
from tests.grounding.asked_data import data
from tests.grounding.speaking_vlm import speaking_vlm


def recipe(root: Path, store: Path | str) -> GroundingRecipe:
    raw = yaml.safe_load(CLINKD)
    raw |= {"output": str(root / "run"), "stages": ["teacher", "distilled"]}
    raw["data"]["root"] = str(root / "phantom")
    raw["method"]["pseudo_labels"] |= {"store": str(store), "logits": "none"}
    return GroundingRecipe.model_validate(raw)


def write_store(root: Path, folder: Path, label: Callable[[str, int], Label]) -> Path:
    dialogues = read_recipe_dialogues(recipe(root, folder).data, root / "data", needed=()).samples
    rows = [d for d in dialogues if d.split in ("train", "unlabelled")]
    keys = [key for dialogue in rows for key in ContentHashes().keys(dialogue)]
    with LabelStore.open(folder, LabelStoreKey("m", {}), {}) as store:
        store.append([label(key, number) for number, key in enumerate(keys)])
    return folder


def usable(key: str, number: int) -> Label:
    return Label(key, 0, "nodule", True, 1, 0.9, 0.8, "top_logprobs")


def refused(key: str, number: int) -> Label:
    reasons = () if number % 20 == 0 else ("refusal",) if number % 2 else ("no box",)
    return Label(key, 0, "I cannot", True, 1, 0.9, 0.8, "top_logprobs", reasons=reasons)


def test_a_store_is_checked_before_a_stage_is_trained(tmp_path):
    few = write_store(tmp_path, tmp_path / "few", refused)
    other = data(tmp_path / "images", 1)
    with LabelStore.open(tmp_path / "other", LabelStoreKey("m", {}), {"f" * 64: "made"}) as store:
        store.append([usable(ContentHashes().keys(other.samples[0])[0], 0)])
    (tmp_path / "file").write_text("no folder")
    for store, said in [
        (tmp_path / "none", "no pseudo-labels in"),
        (tmp_path / "file", "no pseudo-labels in"),
        (tmp_path / "other", "are of other data"),
        (
            few,
            r"answers of the teacher are usable, fewer than method.pseudo_labels.min_usable=0.1 \(\d+ refusal, \d+ no",
        ),
    ]:
        with pytest.raises(UserError, match=said) as error:
            run_recipe(recipe(tmp_path, store))
        assert "method.pseudo_labels.store" in str(error.value)
        assert not (tmp_path / "run" / "teacher").exists()


@pytest.mark.parametrize(("reason", "fix"), [("empty", "train the teacher longer"), ("cut off", "max_new_tokens")])
def test_what_helps_a_teacher_of_the_recipe_is_no_setting_of_a_server(reason, fix, tmp_path):
    def failed(key: str, number: int) -> Label:
        return Label(key, 0, "" if reason == "empty" else "a", reason == "empty", 1, 0.9, 0.8, "top_logprobs")

    folder = write_store(tmp_path, tmp_path / "own", failed)
    labels = PseudoLabels.open(folder, read_recipe_dialogues(recipe(tmp_path, folder).data, tmp_path / "data"))
    with pytest.raises(UserError, match=f"{reason}.*{fix}") as error:
        labels.require_usable(0.1, folder, FIXES_OF_STAGE)
    assert "server" not in str(error.value)


def test_doctor_finds_what_is_wrong_with_a_store(tmp_path):
    def findings(store: Path) -> list[tuple[str, str]]:
        found = GroundingExperiment.for_check(recipe(tmp_path, store)).findings()
        return [(finding.severity, finding.reason) for finding in found if "answers" in finding.reason]

    good = write_store(tmp_path, tmp_path / "good", usable)
    half = write_store(tmp_path, tmp_path / "half", lambda key, n: (usable if n % 2 else refused)(key, n))
    few = write_store(tmp_path, tmp_path / "few", refused)
    assert findings(good) == []
    ((severity, reason),) = findings(half)
    assert severity == "warning"
    assert "answers of the teacher are usable" in reason
    ((severity, reason),) = findings(few)
    assert severity == "error"
    assert reason.startswith("method.pseudo_labels.store: ")


def test_a_local_teacher_is_asked_again_too(tmp_path):
    """Its samples of a random model differ from its greedy answers."""
    vlm = GroundedVlm.load(speaking_vlm(tmp_path / "vlm"))
    whole = data(tmp_path / "images", 2, 2)
    teacher = LocalTeacher(vlm, max_tokens=4, batch_size=4)
    teach(tmp_path / "store", whole, whole.samples, teacher)
    second: list[Label] = []
    prompts = list(prompts_of_turn(whole.samples, 0, ContentHashes(), {}))
    teacher.answer_again(prompts, second.extend)
    first = {label.key: label.answer for label in read_labels(tmp_path / "store")}
    assert {label.key for label in second} == set(first)
    assert any(label.answer != first[label.key] for label in second)


def test_a_store_that_cannot_be_written_is_a_sentence(tmp_path):
    file = tmp_path / "rows.jsonl"
    turns = [{"from": "human", "value": "Where is it?"}, {"from": "gpt", "value": write_box((1, 2, 30, 40))}]
    name = data(tmp_path / "images", 1, 1).samples[0].images[0].name
    file.write_text(json.dumps({"image": f"images/{name}", "split": "train", "conversations": turns}) + "\n")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "labels.sqlite").mkdir()
    (tmp_path / "file").write_text("")
    server = ("--endpoint", "http://127.0.0.1:1/v1", "--model", "m", "--yes", "--box-format", "gemma")
    for output in (tmp_path / "occupied", tmp_path / "file" / "store"):
        code, _, err = call("teach", str(file), *server, "--output", str(output))
        assert code == 2
        assert str(output.parent if "file" in str(output) else output) in err
        assert "Traceback" not in err


def test_a_full_disk_is_not_called_damage(tmp_path):
    """SQLite itself says that the disk is full if a file may have no more pages."""
    with LabelStore.open(tmp_path / "store", LabelStoreKey("m", {}), {}) as store:
        (pages,) = store._database.execute("PRAGMA page_count").fetchone()
        store._database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(UserError, match=r"labels\.sqlite: the disk is full; free some space"):
            store.append([Label("a" * 64, 0, "x" * 100_000, True)])
    assert read_labels(tmp_path / "store") == []
