"""What a teacher can give: components of simulated answers, the closed form of one seed, and real comparisons."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import preceptor
from preceptor.errors import UserError
from preceptor.pipeline.headroom import (
    HALF_WAY,
    Components,
    components,
    expected_half_width,
    intraclass_correlation,
    verdict,
)
from preceptor.statistics import compare_scores
from preceptor.vqa import experiment
from preceptor.vqa.evaluate import predict_examples
from tests.command_line import call
from tests.fault.tiny import write_recipe


def answers(chance: np.ndarray, seeds: int, rng: np.random.Generator) -> np.ndarray:
    return (rng.random((seeds, len(chance))) < chance).astype(float)


def test_the_components_of_known_chances_are_found() -> None:
    """The noise is that of two students, 2 E[p (1 - p)]; the rest is the variance of teacher minus chance."""
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.2, 0.8, 40_000)
    teacher = answers(chance * 0.5 + 0.4, 1, rng)[0]
    found = components(teacher, answers(chance, 2, rng), range(len(chance)))
    assert found.noise == pytest.approx(2 * (chance * (1 - chance)).mean(), rel=0.03)
    assert found.persistent == pytest.approx((teacher - chance).var(), rel=0.03)
    assert found.correlation == 0.0


def test_a_single_student_gives_an_upper_bound() -> None:
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.2, 0.8, 5_000)
    teacher, students = answers(chance, 1, rng)[0], answers(chance, 2, rng)
    groups = [str(number) for number in range(450)]
    two, one = (expected_half_width(components(teacher, students[:n], range(5_000)), groups, 5) for n in (2, 1))
    assert two is not None
    assert one is not None
    assert two < one


@pytest.mark.parametrize(("disagreement", "lead"), [(0.2, 0.0), (0.1, 0.05)])
def test_one_seed_has_the_width_of_the_difference_of_paired_shares(disagreement: float, lead: float) -> None:
    """Connor (1987): the variance of the difference is (share of discordant pairs - difference squared) / n."""
    noise = disagreement - lead**2
    found = expected_half_width(Components(0.0, noise), [str(n) for n in range(451)], 1)
    assert found == pytest.approx(1.96 * math.sqrt(noise / 451), rel=0.02)


def test_what_all_seeds_share_does_not_shrink_with_seeds_and_noise_does() -> None:
    groups = [str(n) for n in range(400)]

    def width(persistent: float, noise: float, seeds: int) -> float:
        found = expected_half_width(Components(persistent, noise), groups, seeds)
        assert found is not None
        return found

    assert width(0.2, 0.0, 10) == pytest.approx(width(0.2, 0.0, 1), rel=0.02)
    assert width(0.2, 0.0, 5) == pytest.approx(1.96 * HALF_WAY * math.sqrt(0.2 / 400), rel=0.04)
    assert width(0.0, 0.2, 20) < 0.5 * width(0.0, 0.2, 1)


def test_questions_about_one_image_count_as_one_if_they_always_agree() -> None:
    single = expected_half_width(Components(0.1, 0.1, 0.0), [str(n) for n in range(100)], 1)
    fivefold = expected_half_width(Components(0.1, 0.1, 1.0), [str(n // 5) for n in range(500)], 1)
    assert fivefold == pytest.approx(single, rel=0.05)
    assert expected_half_width(Components(0.1, 0.1), ["a", "b"] * 20, 5) is None  # two patients


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 1, 0, 0], 1.0), ([1, 0, 1, 0], 0.0), ([1, 1, 0, 1, 0, 0], 1 / 3), ([1, 1, 1, 1], 0.0)],
)
def test_the_intraclass_correlation_is_that_of_all_pairs(values: list[int], expected: float) -> None:
    """1/3: three pairs with the products 1/4, -1/4 and 1/4 over the variance 1/4."""
    groups = [number // 2 for number in range(len(values))]
    assert intraclass_correlation(values, groups) == pytest.approx(expected)


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_real_comparisons_have_the_expected_width_and_their_estimates_lie_within_it(seeds: int) -> None:
    """Right and wrong answers: the width is predicted from 2,000 validation questions, and 150 tests are drawn."""
    rng = np.random.default_rng(seeds)
    n = 300

    def chances(size: int) -> tuple[np.ndarray, np.ndarray]:
        chance = rng.uniform(0.2, 0.8, size)
        return chance, answers(chance * 0.6 + 0.35, 1, rng)[0]

    chance, teacher = chances(2_000)
    found = components(teacher, answers(chance, 2, rng), range(2_000))
    expected = expected_half_width(found, [str(number) for number in range(n)], seeds)
    assert expected is not None
    widths, held = [], 0
    for _ in range(150):
        chance, teacher = chances(n)
        better = chance + HALF_WAY * (teacher - chance)
        one = compare_scores(answers(better, seeds, rng), answers(chance, seeds, rng), paired=True, resamples=300)
        assert one.low is not None
        assert one.high is not None
        widths.append((one.high - one.low) / 2)
        # Over all questions that could be drawn, teacher minus chance is 0.35 - 0.4 chance, on average 0.15.
        held += abs(one.difference - HALF_WAY * 0.15) <= expected
    assert expected == pytest.approx(float(np.median(widths)), rel=0.12)
    assert held / 150 >= 0.93


def document(lead: float, half_width: float | None, seeds: int = 5) -> dict[str, Any]:
    return {
        "lead": {"difference": lead},
        "half_width": half_width,
        "seeds": seeds,
        "test": {"n": 451},
        "validation": {"n": 200},
    }


def test_the_verdict_is_one_sentence_with_the_numbers() -> None:
    assert verdict(document(0.018, 0.023)) == (
        "The teacher leads by 1.8 points; with 451 questions and 5 seeds a difference below 2.3 points cannot be "
        "distinguished from 0, so not even a student that equals its teacher could be distinguished from the baseline."
    )
    assert verdict(document(0.069, 0.0173, 1)).endswith(
        "with 451 questions and 1 seed a difference below 1.7 points cannot be distinguished from 0, so a "
        "student must take over more than 25 % of this lead to show a gain."
    )
    assert "does not lead the student (-0.5 points on 200 validation questions)" in verdict(document(-0.005, 0.02))
    assert "no gain can be detected" in verdict(document(0.1, None))


@pytest.mark.parametrize("recipe", ["lckd-demo", "clinkd-demo"])
def test_other_tasks_are_refused(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from preceptor import api, tasks

    kind = tasks.module(tasks.load_recipe(recipe).task, "experiment").EXPERIMENT
    monkeypatch.setattr(kind, "check", classmethod(lambda *_: {}))
    with pytest.raises(UserError, match="for visual question answering only, and this recipe is for"):
        api.check(recipe, [f"output={tmp_path}"], teacher=tmp_path)


def test_students_without_a_teacher_and_impossible_budgets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --teacher RUN"):
        preceptor.check("mhkd-demo", students=[tmp_path])
    with pytest.raises(UserError, match="budget must be above 0 and at most 1, not 2"):
        preceptor.check("mhkd-demo", teacher=tmp_path, budget=2)


@pytest.mark.slow
def test_doctor_estimates_from_short_and_from_finished_students(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only validation questions are answered."""
    recipe = write_recipe(tmp_path)
    settings = [f"data.root={tmp_path / 'data'}", "data.phantom.cases=90"]
    run = preceptor.train(str(recipe), [*settings, "stages=[teacher,baseline]", f"output={tmp_path / 'run'}"])
    command = ["doctor", recipe, *settings, f"output={tmp_path / 'planned'}", "--teacher", run.folder, "--seeds", "3"]
    answered = set()

    def predict(model: Any, examples: Any) -> Any:
        answered.update(sample.split for sample in examples.samples)
        return predict_examples(model, examples)

    monkeypatch.setattr(experiment, "predict_examples", predict)
    code, out, err = call(*command, "--json", "--budget", "0.5")
    assert code == 0, err
    found = json.loads(out)["headroom"]
    assert code == 0
    short = found["short"]
    assert (short["epochs"], short["of"], short["students"]) == (2.0, 4, 2)
    assert found["disagreement"] == pytest.approx(found["teacher_alone_right"] + found["student_alone_right"])
    assert found["lead"]["difference"] == pytest.approx(found["teacher_alone_right"] - found["student_alone_right"])
    assert found["scores"]["teacher"] == pytest.approx(run.results["stages"]["teacher"]["validation"]["score"])
    assert not found["notes"]
    assert not (tmp_path / "planned" / "model").exists()

    code, out, _ = call(*command, "--student", run.folder)
    assert code == 0
    assert answered == {"validation"}
    assert out.splitlines()[-1].startswith("The teacher ")
    assert "students were trained" not in out
