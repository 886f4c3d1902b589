from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.data.groups import group_by_content
from preceptor.data.splits import cross_questions, cut_validation, subsample
from preceptor.data.types import Sample
from preceptor.errors import UserError


def make(sizes: list[int], part: str = "train", prefix: str = "g") -> list[Sample]:
    return [
        Sample(f"{prefix}{g}-{i}", Path(f"{g}.png"), "Q?", ("yes",), "closed", f"{prefix}{g}", part)  # type: ignore[arg-type]
        for g, size in enumerate(sizes)
        for i in range(size)
    ]


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=25)
fractions = st.floats(0.02, 0.6)
seeds = st.integers(0, 5)


@given(sizes, fractions, seeds, st.randoms(use_true_random=False))
def test_validation_divides_no_group_and_meets_the_fraction(sizes, fraction, seed, rng):
    samples = make(sizes) + make([2, 3], "test", "t")
    cut = cut_validation(samples, fraction, seed)
    assert [s.id for s in cut] == [s.id for s in samples]
    parts = {}
    for sample in cut:
        assert parts.setdefault(sample.group, sample.split) == sample.split
    counts = Counter(s.split for s in cut)
    assert counts["test"] == 5
    if len(sizes) > 1:
        assert counts["train"] > 0
        assert counts["validation"] > 0
        groups = Counter(parts.values())
        if groups["train"] > 1 and groups["validation"] > 1:
            assert abs(counts["validation"] - fraction * sum(sizes)) <= max(sizes) / 2 + 1e-9
    else:
        assert counts["validation"] == 0

    shuffled = rng.sample(samples, len(samples))
    assert {s.id: s.split for s in cut_validation(shuffled, fraction, seed)} == {s.id: s.split for s in cut}


@given(sizes, st.floats(0.01, 1), st.floats(0.01, 1), seeds, st.randoms(use_true_random=False))
def test_subsamples_are_nested_whole_groups(sizes, one, other, seed, rng):
    samples = make(sizes) + make([2], "validation", "v") + make([3], "test", "t")
    small, large = (subsample(samples, share, seed) for share in sorted([one, other]))
    small_ids, large_ids = ({s.id for s in rows} for rows in (small, large))
    assert small_ids <= large_ids
    for rows, share in ((small, min(one, other)), (large, max(one, other))):
        kept = Counter(s.group for s in rows)
        assert all(kept[f"g{g}"] in (0, size) for g, size in enumerate(sizes))
        assert (kept["v0"], kept["t0"]) == (2, 3)
        train = sum(s.split == "train" for s in rows)
        assert share * sum(sizes) - 1e-9 <= train < share * sum(sizes) + max(sizes)
    shuffled = subsample(rng.sample(samples, len(samples)), one, seed)
    assert {s.id for s in shuffled} == {s.id for s in subsample(samples, one, seed)}
    assert subsample(samples, 1.0, seed) == samples


def test_seeds_differ():
    samples = make([3] * 40)
    cuts = {tuple(s.split for s in cut_validation(samples, 0.2, seed)) for seed in range(5)}
    assert len(cuts) == 5
    shares = {tuple(s.id for s in subsample(samples, 0.25, seed)) for seed in range(5)}
    assert len(shares) == 5


def test_a_share_of_the_rest_is_no_copy_of_the_validation_order():
    """With one order for both, the smallest shares would be the groups next to validation, whatever the seed says."""
    samples = make([1] * 200)
    first_out = [s.group for s in cut_validation(samples, 0.2, 0) if s.split == "validation"]
    first_in = [s.group for s in subsample(samples, 0.2, 0)]
    assert len(set(first_out) & set(first_in)) < 20


def test_a_group_too_large_for_the_fraction_is_passed_over():
    cut = cut_validation(make([1000, 1, 1, 1]), 0.1, 0)
    moved = {s.group for s in cut if s.split == "validation"}
    assert moved == {"g1", "g2", "g3"}
    only_large = cut_validation(make([1000, 900]), 0.1, 0)
    assert {s.group for s in only_large if s.split == "validation"} == {"g1"}


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_wrong_fractions(fraction):
    with pytest.raises(UserError, match=r"validation fraction .* is not between 0 and 1"):
        cut_validation(make([1, 1]), fraction, 0)
    if fraction != 1:
        with pytest.raises(UserError, match="training share"):
            subsample(make([1, 1]), fraction, 0)


def test_known_cut():
    # The three least of `printf validation:0:gN | sha256sum`. Another order would move rows between parts for everyone
    # who resumes or compares runs.
    cut = cut_validation(make([2] * 10), 0.3, 0)
    assert sorted({s.group for s in cut if s.split == "validation"}) == ["g0", "g6", "g7"]


@given(sizes, st.integers(0, 4), seeds)
def test_cross_questions_are_new_unanswered_and_of_the_same_organ(sizes, number, seed):
    samples = [
        replace(s, question=f"Q{i % 7}?", tags={"image_organ": "HEAD" if int(s.group[1:]) % 2 else "CHEST"})
        for i, s in enumerate(make(sizes))
    ]
    test = [replace(s, question="never to be asked") for s in make([3], "test", "t")]
    found = cross_questions(samples + test, number, seed)
    assert len(found) <= number * len(samples)
    by_id = {s.id: s for s in samples}
    asked = {(s.group, s.question) for s in samples}
    assert len({(s.group, s.question) for s in found}) == len(found)
    for s in found:
        mine, other = (by_id[name] for name in s.id.split("+"))
        assert (s.image, s.group, s.question, s.answers) == (mine.image, mine.group, other.question, ())
        assert mine.tags == other.tags
        assert (s.group, s.question) not in asked
        assert s.split == "train"


@given(sizes, sizes, st.integers(0, 3), seeds)
def test_unlabelled_images_are_asked_questions_of_training_rows(sizes, others, number, seed):
    samples = [replace(s, question=f"Q{i % 7}?") for i, s in enumerate(make(sizes))]
    asking = [
        replace(s, id=f"u{s.id}", group=f"u{s.group}", question="" if i % 2 else "own?", answers=())
        for i, s in enumerate(make(others, "unlabelled"))
    ]
    found = [s for s in cross_questions(samples + asking, number, seed) if s.split == "unlabelled"]
    by_id = {s.id: s for s in samples + asking}
    drawn = Counter()
    for s in found:
        mine, other = (by_id[name] for name in s.id.split("+"))
        assert (mine.split, other.split, s.question, s.answers) == ("unlabelled", "train", other.question, ())
        drawn[mine.id] += 1
    assert all(drawn[s.id] <= max(number, 0 if s.question else 1) for s in asking)
    kinds = len({s.question for s in samples})
    for group in {s.group for s in asking}:
        mine = [s for s in asking if s.group == group]
        wanted = sum(max(number, 0 if s.question else 1) for s in mine)
        assert sum(drawn[s.id] for s in mine) == min(wanted, kinds)  # no question twice of one image


def test_the_rest_of_a_share_is_kept_without_its_answers():
    samples = make([3] * 20) + make([2], "validation", "v")
    kept = subsample(samples, 0.25, 0, keep_rest=True)
    assert [s for s in kept if s.split != "unlabelled"] == subsample(samples, 0.25, 0)
    rest = [s for s in kept if s.split == "unlabelled"]
    assert {s.id for s in kept} == {s.id for s in samples}
    assert len(rest) == 45
    assert all(s.answers == () for s in rest)


def test_cross_questions_fill_up_and_draw_every_question_alike():
    samples = [replace(s, question=f"Q{s.id}?") for s in make([4] * 10)]
    found = cross_questions(samples, 3, 0)
    assert len(found) == 120
    assert max(Counter(s.question for s in found).values()) <= 6
    assert {s.id for s in found} != {s.id for s in cross_questions(samples, 3, 1)}
    assert [s.id for s in found] != [s.id for s in samples]
    again = cross_questions(samples[::-1], 3, 0)
    assert {s.id for s in again} == {s.id for s in found}


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
def test_images_of_the_same_content_are_one_group(tmp_path_factory, drawn):
    """Against a brute-force closure: rows of one group, or of one content, stand together, and no others do."""
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for number, (group, content) in enumerate(drawn):
        image = folder / f"{number}.png"
        image.write_bytes(b"ab"[content % 2 : content % 2 + 1] * (1 + content // 2))
        rows.append(Sample(str(number), image, "Q?", ("yes",), "closed", f"g{group}", "train"))
    expected = list(range(len(drawn)))
    for _ in drawn:
        for i, (group, content) in enumerate(drawn):
            for j, other in enumerate(drawn):
                if group == other[0] or content == other[1]:
                    expected[i] = expected[j] = min(expected[i], expected[j])
    found = [sample.group for sample in group_by_content(rows)]
    for i in range(len(drawn)):
        for j in range(len(drawn)):
            assert (found[i] == found[j]) == (expected[i] == expected[j])
