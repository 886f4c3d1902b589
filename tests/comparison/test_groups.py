"""Which models are one group, what it is called, and what it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from preceptor.comparison.groups import Group, baseline_of, choose_baseline, group_models, short_names, shown_value
from preceptor.comparison.models import read_models
from preceptor.errors import UserError
from tests.comparison.made import hits, write_run, write_stage


def groups_of(*runs: Path) -> list[Group]:
    return group_models(read_models(runs)[0])


def output_weight(weight: float) -> dict[str, Any]:
    return {"method": {"output": {"weight": weight}}}


def test_seed_output_caches_and_teachers_make_no_difference(tmp_path: Path):
    settings = {
        "data": {"root": "/data/here", "workers": 3},
        "report": {"questions": 3},
        "allow_downloads": True,
        "method": {"teaching": {"cache": "/scratch/cache"}},
    }
    (group,) = groups_of(
        write_stage(tmp_path / "b", hits(20, 0.5), seed=3, settings=settings),
        write_stage(tmp_path / "a", hits(20, 0.6), seed=1),
    )
    assert (group.name, group.seeds) == ("distilled", [1, 3])
    assert group.values.shape == (2, 20)
    assert [row.mean() for row in group.values] == [0.6, 0.5]


def test_the_stage_is_part_of_a_group(tmp_path: Path):
    run = write_run(tmp_path / "r", {"distilled": hits(20, 0.5), "teacher": hits(20, 0.9), "baseline": hits(20, 0.4)})
    assert [group.name for group in groups_of(run)] == ["teacher", "baseline", "distilled"]


def test_teachers_of_an_ensemble_are_seeds_of_one_group(tmp_path: Path):
    a = write_stage(tmp_path / "teacher", hits(20, 0.5), stage="teacher")
    b = write_stage(tmp_path / "teacher-2", hits(20, 0.6), stage="teacher", seed=1000)
    (b / "results.json").write_text((b / "results.json").read_text().replace('"teacher"', '"teacher-2"', 1))
    (group,) = groups_of(a, b)
    assert group.seeds == [0, 1000]


def test_groups_are_named_by_what_differs(tmp_path: Path):
    runs = [
        write_stage(tmp_path / f"{weight}-{seed}", hits(20, 0.5, seed), seed=seed, settings=output_weight(weight))
        for weight in (1.0, 5.0)
        for seed in (0, 1)
    ]
    groups = groups_of(*runs)
    assert [group.name for group in groups] == ["distilled output.weight=1.0", "distilled output.weight=5.0"]
    assert [group.seeds for group in groups] == [[0, 1], [0, 1]]
    assert groups[0].differs == {"method.output.weight": 1.0}


def test_settings_of_the_method_do_not_divide_students_that_learn_alone(tmp_path: Path):
    """They do not read them; nor does a teacher read the student's."""
    for stage in ("baseline", "teacher"):
        runs = [
            write_stage(tmp_path / f"{stage}-{i}", hits(20, 0.5), stage=stage, seed=i, settings=settings)
            for i, settings in enumerate(({}, output_weight(5)))
        ]
        assert len(groups_of(*runs)) == 1
    other = write_stage(
        tmp_path / "other",
        hits(20, 0.5),
        stage="baseline",
        seed=2,
        settings={"teacher": {"model": {"text": {"layers": 3}}}},
    )
    assert len(groups_of(tmp_path / "baseline-0", other)) == 2  # it shares the teacher's tokens


def test_another_number_of_teachers_is_another_group(tmp_path: Path):
    teachers = {"method": {"teaching": {"runs": ["runs/a", "runs/b"]}}}
    runs = write_stage(tmp_path / "1", hits(20, 0.5)), write_stage(tmp_path / "2", hits(20, 0.5), settings=teachers)
    assert [group.differs for group in groups_of(*runs)] == [
        {"method.teaching.runs": 1},
        {"method.teaching.runs": 2},
    ]


def test_many_differences_are_named_by_the_recipe(tmp_path: Path):
    method = {term: {"weight": 0.25} for term in ("output", "embedding", "hidden", "attention", "relation")}
    runs = (
        write_stage(tmp_path / "a", hits(20, 0.5)),
        write_stage(tmp_path / "b", hits(20, 0.5), settings={"name": "quarter", "method": method}),
    )
    assert [group.name for group in groups_of(*runs)] == ["distilled toy", "distilled quarter"]


def test_no_path_is_part_of_a_name(tmp_path: Path):
    runs = [
        write_stage(tmp_path / str(i), hits(20, 0.5), settings={"student": {"model": {"init": path}}})
        for i, path in enumerate(("/home/smith/runs/first", "/home/smith/runs/second"))
    ]
    assert [group.name for group in groups_of(*runs)] == [
        f"distilled model.init={name}" for name in ("first", "second")
    ]


def shares(tmp_path: Path, stages: tuple[str, ...] = ("baseline", "distilled")) -> list[Path]:
    return [
        write_run(
            tmp_path / f"{share}",
            {stage: hits(20, share) for stage in stages},
            settings={"data": {"train_share": share}},
        )
        for share in (1.0, 0.1, 0.5)
    ]


def test_shares_divide_groups_but_not_methods(tmp_path: Path):
    groups = groups_of(*shares(tmp_path))
    assert [group.name for group in groups][:3] == ["baseline at 10 %", "baseline at 50 %", "baseline at 100 %"]
    assert len({group.method for group in groups}) == 2
    baseline = choose_baseline(groups, None)
    assert baseline.name == "baseline at 100 %"
    against = {group.name: other and other.name for group in groups if (other := baseline_of(group, baseline, groups))}
    assert against == {f"distilled at {share} %": f"baseline at {share} %" for share in (10, 50, 100)}


def test_shares_of_one_method_are_compared_with_the_largest(tmp_path: Path):
    groups = groups_of(*shares(tmp_path, ("baseline",)))
    baseline = choose_baseline(groups, None)
    assert [baseline_of(group, baseline, groups) for group in groups] == [baseline, baseline, None]


def test_choosing_a_baseline(tmp_path: Path):
    run = write_run(tmp_path / "run", {"teacher": hits(20, 0.9), "baseline": hits(20, 0.4), "distilled": hits(20, 0.5)})
    other = write_stage(tmp_path / "other", hits(20, 0.5), settings=output_weight(5))
    groups = groups_of(run, other)
    assert choose_baseline(groups, None).name == "baseline"
    assert choose_baseline(groups, "teacher").name == "teacher"
    assert choose_baseline(groups, "distilled output.weight=5.0").models[0].folder == other
    assert choose_baseline(groups, str(other)).models[0].folder == other
    assert choose_baseline(groups, str(run / "teacher")).name == "teacher"
    with pytest.raises(
        UserError, match=r"fits several groups: teacher, baseline, distilled output\.weight=1\.0; name one"
    ):
        choose_baseline(groups, str(run))
    with pytest.raises(UserError, match="'distilled' fits several groups"):
        choose_baseline(groups, "distilled")
    with pytest.raises(UserError, match=r"neither a group nor one of the runs; did you mean 'teacher'\?"):
        choose_baseline(groups, "techer")


def test_short_names_stay_apart():
    assert short_names(["a.b.c", "x.b.c", "data.share", "name"]) == {
        "a.b.c": "a.b.c",
        "x.b.c": "x.b.c",
        "data.share": "data.share",
        "name": "name",
    }
    assert short_names(["method.output.weight"]) == {"method.output.weight": "output.weight"}


def test_shown_values():
    assert shown_value(None) == "(none)"
    assert shown_value(["package:a/b", "~/models/bert"]) == "[package:a/b, bert]"
    assert [shown_value(value) for value in (True, 0.5, [1, 2])] == ["true", "0.5", "[1, 2]"]
