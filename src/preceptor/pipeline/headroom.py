"""What a teacher can give to a student, estimated before a long training, and the difference that a test can show.

Only validation data are used; of the test split, the number of questions and how many share an image or a patient.

The difference of distilled and baseline student on question i with seed s is modelled as d + u_i + e_si: `persistent`
is the variance of u, in which all seeds agree, and `noise` that of e. Over S seeds and N questions, the mean then has
the variance persistent / N + noise / (S N) (the components of `statistics.crossed_test`). For one seed it is
(disagreement - d^2) / N, the variance of the difference of paired shares (Connor 1987, Biometrics 43:207-211). Both
components follow from the disagreement of models that are right or wrong:

- Two students that differ in the seed disagree in the share 2 E[p (1 - p)] of the questions, if p_i is the chance that
  a student answers question i correctly. The difference of two students has this noise.
- A fixed teacher and a student disagree in the share E[(t - p)^2] + E[p (1 - p)].
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from preceptor.errors import UserError
from preceptor.files import scratch_folder
from preceptor.pipeline import run_dir
from preceptor.pipeline.experiment import Experiment, Stage
from preceptor.pipeline.stage import run_training
from preceptor.report.contents import get_nested
from preceptor.report.format import percent
from preceptor.scores import UnitScore, align
from preceptor.statistics import MINIMUM_UNITS, compare_scores

HALF_WAY = 0.5
"""The share of the teacher's lead that a successful student takes over, for the interval to expect."""
SHORT_STUDENTS = 2
"""Number of students that are trained for a short time: two of them show how much of a disagreement is noise."""
_REPEATS, _RESAMPLES = 40, 500


@dataclass(frozen=True)
class Components:
    """The variance of the difference of teacher and student on a question, see the module.

    `correlation` is that of two questions of one group (image or patient).
    """

    persistent: float
    noise: float
    correlation: float = 0.0


def components(teacher: ArrayLike, students: ArrayLike, groups: Sequence[Hashable]) -> Components:
    """Return the components of right (1) and wrong (0) answers to validation questions.

    With a single student the noise is unknown. It is then taken to be the whole disagreement, the largest value, so
    that the interval to expect is an upper bound for several seeds.

    Args:
        teacher: (n,) answers of the teacher.
        students: (seeds, n) answers of the students, each of another seed.
        groups: (n,) the group of each question.
    """
    t_N, x_SN = np.asarray(teacher, dtype=float), np.asarray(students, dtype=float)
    difference_N = t_N - x_SN.mean(axis=0)
    lead = float(difference_N.mean())
    disagreement = float(((t_N - x_SN) ** 2).mean())
    noise = _between(x_SN) if len(x_SN) > 1 else disagreement - lead**2
    persistent = max(0.0, disagreement - noise / 2 - lead**2)
    return Components(persistent, noise, intraclass_correlation(difference_N, groups))


def _between(students_SN: np.ndarray) -> float:
    """Return the mean disagreement over all pairs of students: twice the unbiased variance over seeds."""
    return 2 * float(students_SN.var(axis=0, ddof=1).mean())


def intraclass_correlation(values: ArrayLike, groups: Sequence[Hashable]) -> float:
    """Return the correlation of the values of one group, over all pairs (Fisher 1925), or 0 if it is negative."""
    x = np.asarray(values, dtype=float)
    _, member_N = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    centred = x - x.mean()
    sizes_G = np.bincount(member_N)
    pairs, variance = int((sizes_G * (sizes_G - 1)).sum()), float(centred @ centred) / len(x)
    if not pairs or variance == 0:
        return 0.0
    products = float((np.bincount(member_N, centred) ** 2).sum() - centred @ centred)
    return min(1.0, max(0.0, products / pairs / variance))


def expected_half_width(found: Components, groups: Sequence[Hashable], seeds: int) -> float | None:
    """Return half of the width to expect of the 95 % interval of distilled minus baseline; None for too few groups.

    Planned comparisons are simulated with normal values, and their intervals are those of
    `statistics.compare_scores`, which are wider than the variance of the mean alone for several seeds. The median over
    40 of them is returned. The student is `HALF_WAY` to its teacher. Whole seeds that are better or worse than others
    are not modelled; if there are any, the interval is wider.

    Args:
        found: components of the teacher and the student.
        groups: (n,) the group of each test question.
        seeds: number of seeds of distilled and baseline student each.
    """
    _, member_N = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    number = int(member_N.max(initial=-1)) + 1
    if number < MINIMUM_UNITS:
        return None
    rng = np.random.default_rng(0)
    shared, own = math.sqrt(found.correlation), math.sqrt(1 - found.correlation)

    def draw(rows: int) -> np.ndarray:
        of_group = rng.standard_normal((rows, number))[:, member_N]
        return shared * of_group + own * rng.standard_normal((rows, len(member_N)))

    widths = []
    for _ in range(_REPEATS):
        d_SN = HALF_WAY * math.sqrt(found.persistent) * draw(1) + math.sqrt(found.noise) * draw(seeds)
        one = compare_scores(d_SN, np.zeros_like(d_SN), paired=True, groups=list(groups), resamples=_RESAMPLES)
        assert one.low is not None
        assert one.high is not None
        widths.append((one.high - one.low) / 2)
    return float(np.median(widths))


def estimate_headroom(
    experiment_class: type[Experiment],
    recipe: Any,
    teacher: Path,
    students: Sequence[Path],
    *,
    seeds: int,
    budget: float,
) -> dict[str, Any]:
    """Return what `doctor` says about a teacher: its lead, the headroom, and the difference that a test can show.

    Args:
        experiment_class: that of the recipe's task.
        recipe: the recipe of the students.
        teacher: run, stage or model folder of the teacher.
        students: runs of the baseline, each of another seed. Without any, `SHORT_STUDENTS` are trained for a share
            `budget` of the recipe's epochs, into a temporary folder.
        seeds: number of seeds that are planned.
        budget: share of the recipe's epochs.

    Raises:
        UserError: the task has no questions with right and wrong answers, a model cannot be used, or there are too few
            validation images for an interval.
    """
    if not experiment_class.estimates_headroom:
        raise UserError(
            f"--teacher: what a teacher can give is estimated for visual question answering only, and this recipe is "
            f"for {experiment_class.task}; leave it out"
        )
    experiment = experiment_class.read(recipe)
    notes: list[str] = []
    right = _answers(experiment, teacher, "teacher", notes)
    answers = [_answers(experiment, run, "baseline", notes) for run in students]
    short = None
    if not students:
        answers, short = _short_students(experiment, budget)
    what = f"{teacher} and the student"
    t_N = [one.value for one in right]
    x_SN = [[one.value for one in align(each, right, what)] for each in answers]
    groups = [one.group for one in right]
    lead = compare_scores([t_N], x_SN, paired=False, groups=groups)
    if lead.low is None:
        raise UserError(
            f"--teacher: the {lead.n} validation questions are about {lead.groups} images or patients, too few for an "
            f"estimate; at least {MINIMUM_UNITS} are needed"
        )
    alone_N = np.mean([np.asarray(t_N) * (1 - np.asarray(x)) for x in x_SN], axis=0)
    other_N = np.mean([(1 - np.asarray(t_N)) * np.asarray(x) for x in x_SN], axis=0)
    test = experiment.test_groups()
    found: dict[str, Any] = {
        "teacher": str(teacher),
        "students": [str(run) for run in students],
        "short": short,
        "validation": {"n": lead.n, "groups": lead.groups},
        "scores": {"teacher": float(np.mean(t_N)), "student": float(np.mean(x_SN))},
        "lead": {"difference": lead.difference, "low": lead.low, "high": lead.high},
        "disagreement": float((alone_N + other_N).mean()),
        "teacher_alone_right": float(alone_N.mean()),
        "student_alone_right": float(other_N.mean()),
        "between_students": _between(np.asarray(x_SN)) if len(x_SN) > 1 else None,
        "test": {"n": len(test), "groups": len(set(test))},
        "seeds": seeds,
        "half_width": expected_half_width(components(t_N, x_SN, groups), test, seeds),
        "notes": list(dict.fromkeys(notes)),
    }
    return found | {"verdict": verdict(found)}


def verdict(found: dict[str, Any]) -> str:
    """Return one sentence: whether the teacher's lead is large enough to be seen on the test questions."""
    lead, least = found["lead"]["difference"], found["half_width"]
    n, seeds = found["test"]["n"], found["seeds"]
    if round(100 * lead, 1) <= 0:
        return (
            f"The teacher does not lead the student ({percent(lead)} points on {found['validation']['n']} validation "
            "questions), so there is nothing to gain from imitating it."
        )
    leads = f"The teacher leads by {percent(lead)} points"
    if least is None:
        return (
            f"{leads}; the test questions are about fewer than {MINIMUM_UNITS} images or patients, so no gain can be "
            "detected."
        )
    among = f"with {n:,} questions and {seeds} {'seed' if seeds == 1 else 'seeds'}"
    text = f"{leads}; {among} a difference below {percent(least)} points cannot be distinguished from 0, so "
    if least >= lead:
        return f"{text}not even a student that equals its teacher could be distinguished from the baseline."
    return f"{text}a student must take over more than {100 * least / lead:.0f} % of this lead to show a gain."


def _answers(experiment: Experiment, run: Path, stage: str, notes: list[str]) -> list[UnitScore]:
    """Return the validation answers of a run, of its stage of that name if it has several.

    A note is added if it was trained with other splits, whose training images may be validation images here.
    """
    model = run_dir.model_folder(run / stage if (run / stage / "model").is_dir() else run)
    results = run_dir.read_results(model.parent) or {}
    if get_nested(results, "data", "sha256") != experiment.data.fingerprint():
        notes.append(
            f"{run} was trained on other data or another split; if it knows validation images, it looks too good"
        )
    return experiment.validation_answers(experiment.load(model))


def _short_students(experiment: Experiment, budget: float) -> tuple[list[list[UnitScore]], dict[str, Any]]:
    """Train the baseline for a share of its epochs with several seeds; return its answers and what it cost."""
    answers, seconds, epochs = [], 0.0, experiment.recipe.student.train.epochs
    with scratch_folder() as scratch:
        for number in range(SHORT_STUDENTS):
            recipe = experiment.recipe.model_copy(deep=True)
            recipe.stages, recipe.seed, recipe.output = ("baseline",), recipe.seed + number, str(scratch / str(number))
            recipe.student.train.epochs, recipe.student.train.trackers = epochs * budget, []
            own = type(experiment)(recipe, experiment.data)
            stage, folder = Stage("baseline", "baseline", recipe.seed), recipe.output_folder
            folder.mkdir(parents=True)
            for training in own.trainings(stage, folder):
                seconds += run_training(own, stage, training).seconds
            answers.append(own.validation_answers(own.load(folder / "model")))
    return answers, {"epochs": epochs * budget, "of": epochs, "seconds": round(seconds, 1), "students": len(answers)}
