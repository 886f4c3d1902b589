from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preceptor.data.types import Dialogue
from preceptor.distill.chunked_kl import chunked_kl, topk_kl
from preceptor.errors import UserError
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.new_vlm import train_tokenizer
from preceptor.grounding.pseudo_labels import ContentHashes
from preceptor.grounding.topk_cache import (
    TopKCache,
    TopKCacheKey,
    TopKRow,
    _distance,
    answers_key,
    teacher_rows,
    top_k,
    topk_cache_key,
    verify,
    write_topk_cache,
)
from tests.grounding.asked_data import data, image
from tests.grounding.speaking_vlm import speaking_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return speaking_vlm(tmp_path_factory.mktemp("vlm") / "m")


@pytest.fixture(scope="module")
def vlm(folder) -> GroundedVlm:
    return GroundedVlm.load(folder)


def cache_key(vlm: GroundedVlm, **changes) -> TopKCacheKey:
    own = topk_cache_key(vlm, vlm.encoder.tokenizer, len(vlm.lm_head_weight), "d" * 64, k=8)
    return replace(own, **changes)


def dialogues(folder: Path, images: int = 3) -> list[Dialogue]:
    """Answers of different lengths, and one dialogue of two turns without an image."""
    rows = data(folder, images, 2).samples
    rows = [replace(d, turns=((d.turns[0][0], "the liver " * (i + 1)),)) for i, d in enumerate(rows)]
    return [*rows, Dialogue("text", (), (("What?", "a liver"), ("Where?", "at the left")), "mia", "ct", "g", "train")]


def keys(rows: list[Dialogue]) -> list[str]:
    hashes = ContentHashes()
    return [answers_key(row, hashes) for row in rows]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 1e-5)])
def test_cached_tokens_equal_a_softmax_over_the_whole_vocabulary(vlm, tmp_path, dtype, tolerance):
    """Against a plain softmax over all words of each dialogue alone; in any order of the rows."""
    rows = dialogues(tmp_path / "images")
    wanted = cache_key(vlm, dtype=dtype)
    assert write_topk_cache(tmp_path / "cache", vlm, rows, wanted, ContentHashes()) == 7
    cache = TopKCache.open(tmp_path / "cache", wanted)
    order = [5, 0, 6, 2, 0]
    picked = [rows[i] for i in order]
    states = vlm.hidden(vlm.encoder.collate([vlm.encoder.encode(row) for row in picked]))
    found = cache.gather(keys(picked), states.targets)
    log_p = (states.hidden @ vlm.lm_head_weight.T / 0.5).log_softmax(-1).detach()
    best = log_p.topk(8, dim=-1)
    assert found.log_probabilities_TK.exp().numpy() == pytest.approx(best.values.exp().numpy(), abs=tolerance)
    at_ids = log_p.gather(1, found.ids_TK).exp()
    assert at_ids.numpy() == pytest.approx(best.values.exp().numpy(), abs=1e-5)
    rest = 1 - best.values.double().exp().sum(-1)
    assert found.log_tail_T.exp().numpy() == pytest.approx(rest.numpy(), abs=tolerance)
    whole = found.log_probabilities_TK.exp().sum(1) + found.log_tail_T.exp()
    assert whole.numpy() == pytest.approx(np.ones(len(whole)), abs=1e-5)
    assert cache.tokens == sum(len(cache.row(key).targets) for key in keys(rows))
    # In bytes a token takes what the module says.
    names = ("ids", "log_probabilities", "log_tail", "targets")
    size = sum((tmp_path / "cache" / f"{name}.npy").stat().st_size - 128 for name in names)
    assert size == cache.tokens * (8 * (4 + (2 if dtype == "float16" else 4)) + 8)


def test_the_cached_divergence_is_a_bound_that_grows_to_the_whole(vlm, tmp_path):
    """KL over cached words and a tail is at most that over all, rises with K, and reaches it at K = V."""
    rows = dialogues(tmp_path / "images")
    states = vlm.hidden(vlm.encoder.collate([vlm.encoder.encode(row) for row in rows]))
    teacher, weight = states.hidden.detach(), vlm.lm_head_weight.detach()
    student = teacher + 0.3 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    full = chunked_kl(student, weight, teacher, weight, temperature=0.5).item()
    values = []
    for k in (1, 2, 8, 64, len(weight)):
        wanted = cache_key(vlm, k=k, dtype="float32")
        write_topk_cache(tmp_path / f"cache-{k}", vlm, rows, wanted, ContentHashes())
        cached = TopKCache.open(tmp_path / f"cache-{k}", wanted).gather(keys(rows), states.targets)
        values.append(topk_kl(student, weight, cached.log_probabilities_TK, cached.ids_TK, cached.log_tail_T).item())
    assert values == sorted(values)
    assert values[0] < 0.9 * full
    assert values[-1] == pytest.approx(full, rel=1e-4)
    assert all(value <= full * (1 + 1e-4) for value in values)
    # The rounding to float16 moves it by little.
    half = cache_key(vlm, k=8)
    write_topk_cache(tmp_path / "half", vlm, rows, half, ContentHashes())
    cached = TopKCache.open(tmp_path / "half", half).gather(keys(rows))
    rounded = topk_kl(student, weight, cached.log_probabilities_TK, cached.ids_TK, cached.log_tail_T).item()
    assert rounded == pytest.approx(values[2], rel=2e-2)


@given(
    st.integers(1, 12), st.integers(0, 5), st.integers(0, 2**31), st.sampled_from([0.5, 1.0, 3.0]), st.integers(1, 4)
)
def test_words_and_tail_against_plain_sums(k, extra, seed, temperature, chunk):
    words = k + extra
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64) * 3
    weight = torch.randn(words + 3, 4, generator=generator, dtype=torch.float64)
    ids, logs, tail = top_k(hidden, weight, k=k, vocab_size=words, temperature=temperature, chunk=chunk)
    p = torch.softmax(hidden @ weight[:words].T / temperature, dim=-1)
    ordered = p.sort(dim=-1, descending=True).values
    assert torch.allclose(logs.exp(), ordered[:, :k], rtol=1e-9, atol=0)
    assert torch.allclose(p.gather(1, ids), ordered[:, :k], rtol=1e-9, atol=0)
    assert torch.allclose(tail.exp(), ordered[:, k:].sum(1), rtol=1e-9, atol=0)


def test_a_student_of_other_words_has_no_cache(vlm):
    other = train_tokenizer(["quite another text about a kidney and a spleen of a dog"] * 4, 300)
    with pytest.raises(UserError, match="student and teacher have different vocabularies"):
        topk_cache_key(vlm, other, len(other), "d")


def test_no_tokens_and_too_many_words():
    ids, logs, tail = top_k(torch.zeros(0, 4), torch.zeros(9, 4), k=3, vocab_size=9, temperature=1.0)
    assert (ids.shape, logs.shape, tail.shape) == ((0, 3), (0, 3), (0,))
    with pytest.raises(UserError, match="k 5 is larger than the 4 tokens that student and teacher share"):
        top_k(torch.zeros(1, 4), torch.zeros(4, 4), k=5, vocab_size=9, temperature=1.0)


def test_what_was_written_for_something_else_is_refused_by_name(vlm, tmp_path):
    rows = dialogues(tmp_path / "images", 1)
    right = cache_key(vlm)
    write_topk_cache(tmp_path / "cache", vlm, rows, right, ContentHashes())
    for change, said in [
        ({"temperature": 1.0}, "temperature: cached 0.5, wanted 1.0"),
        ({"k": 16}, "k: cached 8, wanted 16"),
        ({"teacher": "0" * 64}, "teacher: cached .*, wanted 0000"),
        ({"tokenizer": "0" * 64}, "tokenizer: cached .*, wanted 0000"),
        ({"data": "0" * 64}, "data: cached dddd.*, wanted 0000"),
        ({"preprocessing": {"max_length": 7}}, "preprocessing.max_length: cached 2048, wanted 7"),
    ]:
        with pytest.raises(UserError, match=said):
            TopKCache.open(tmp_path / "cache", replace(right, **change))
    with pytest.raises(UserError, match="There is no teacher cache"):
        TopKCache.open(tmp_path / "none", right)
    for change in ({"k": 0}, {"k": 10**6}, {"temperature": 0.0}, {"dtype": "int8"}):
        with pytest.raises(UserError, match="must be from 1 to the vocabulary size"):
            replace(right, **change)


def test_other_content_is_not_found_and_other_tokens_are_noticed(vlm, tmp_path):
    rows = dialogues(tmp_path / "images", 2)
    write_topk_cache(tmp_path / "cache", vlm, rows, cache_key(vlm), ContentHashes())
    cache = TopKCache.open(tmp_path / "cache", cache_key(vlm))
    targets = torch.from_numpy(cache.row(keys(rows)[0]).targets.astype(np.int64))
    cache.gather(keys(rows[:1]), targets)
    with pytest.raises(UserError, match="the answers have other tokens"):
        cache.gather(keys(rows[:1]), targets + 1)
    with pytest.raises(UserError, match="the answers have other tokens"):
        cache.gather(keys(rows[:2]), targets)
    changed = replace(rows[0], turns=((rows[0].turns[0][0], "another answer"),))
    with pytest.raises(UserError, match="is not in the teacher cache"):
        cache.row(keys([changed])[0])
    image(tmp_path / "images", 77).rename(rows[0].images[0])
    with pytest.raises(UserError, match="is not in the teacher cache"):
        cache.gather(keys(rows[:1]))


@pytest.mark.parametrize("name", ["keys", "rows", "lengths", "targets", "ids", "log_probabilities", "log_tail"])
def test_a_flipped_bit_is_found(vlm, tmp_path, name):
    rows = dialogues(tmp_path / "images", 1)
    write_topk_cache(tmp_path / "cache", vlm, rows, cache_key(vlm), ContentHashes())
    file = tmp_path / "cache" / f"{name}.npy"
    content = bytearray(file.read_bytes())
    content[-2] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match=rf"{name}\.npy has another SHA-256"):
        TopKCache.open(tmp_path / "cache", cache_key(vlm)).store.verify_files()
    file.write_bytes(bytes(content[:-1]))
    with pytest.raises(UserError, match=rf"{name}\.npy has .* bytes instead of"):
        TopKCache.open(tmp_path / "cache", cache_key(vlm))


def test_verify_computes_again(folder, vlm, tmp_path):
    rows = dialogues(tmp_path / "images", 2)
    write_topk_cache(tmp_path / "cache", vlm, rows, cache_key(vlm), ContentHashes(), batch_size=3)
    cache = TopKCache.open(tmp_path / "cache", cache_key(vlm))
    report = verify(cache, vlm, rows, ContentHashes(), fraction=1.0)
    assert (report.checked, report.mismatched, report.absent) == (len(rows), [], 0)
    fewer = verify(cache, vlm, rows[1:], ContentHashes(), fraction=1.0)
    assert (fewer.checked, fewer.absent) == (len(rows) - 1, 1)
    assert report.worst < 1e-3
    other = GroundedVlm.load(folder)
    with torch.no_grad():
        other.lm_head_weight.mul_(0.9)
    wrong = verify(cache, other, rows, ContentHashes(), fraction=0.5)
    assert wrong.checked == math.ceil(len(rows) / 2) == len(wrong.mismatched)
    assert wrong.worst > 1e-3
    worst = [verify(cache, other, [row], ContentHashes(), fraction=1.0).worst for row in rows]
    largest_first = sorted(rows, key=lambda row: -worst[rows.index(row)])
    assert verify(cache, other, largest_first, ContentHashes(), fraction=1.0).worst == pytest.approx(max(worst))
    assert max(worst) > 1.01 * min(worst)


def test_a_token_that_the_other_row_lacks_is_at_most_as_likely_there_as_its_last_one():
    old, new = (
        TopKRow(np.array([ids]), np.log([shares]), np.log([0.1]), np.array([0]))
        for ids, shares in (([0, 1, 2], [0.5, 0.3, 0.1]), ([0, 3, 4], [0.5, 0.2, 0.2]))
    )
    assert _distance(old, new) == pytest.approx(0.3 - 0.2)
    assert _distance(old, old) == 0


def test_a_teacher_with_non_finite_logits_is_refused(folder, tmp_path):
    broken = GroundedVlm.load(folder)
    with torch.no_grad():
        broken.lm_head_weight[5] = torch.nan
    with pytest.raises(UserError, match="the teacher's probabilities for dialogue '0-0' are not finite"):
        write_topk_cache(tmp_path / "cache", broken, dialogues(tmp_path / "i", 1), cache_key(broken), ContentHashes())
    assert not (tmp_path / "cache").exists()


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_writer_that_was_stopped_goes_on_and_its_work_is_byte_equal(vlm, tmp_path):
    rows = dialogues(tmp_path / "images", 4)  # 9 of them

    def stop(done: int, whole: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_topk_cache(tmp_path / "cut", vlm, rows, cache_key(vlm), ContentHashes(), block=2, progress=stop)
    assert not (tmp_path / "cut").exists()
    partial = tmp_path / ".cut.partial"
    assert sorted(file.name for file in partial.glob("block-*")) == ["block-000000", "block-000001"]
    times = {file: file.stat().st_mtime_ns for file in partial.glob("block-*/*")}
    seen: dict[Path, int] = {}

    def look(done: int, whole: int) -> None:
        seen.update({file: file.stat().st_mtime_ns for file in times})

    write_topk_cache(tmp_path / "cut", vlm, rows, cache_key(vlm), ContentHashes(), block=2, progress=look)
    assert seen == times  # what was there is not computed again
    assert not partial.exists()
    write_topk_cache(tmp_path / "whole", vlm, rows, cache_key(vlm), ContentHashes(), block=2)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    # Blocks of other settings are not gone on with.
    with pytest.raises(KeyboardInterrupt):
        write_topk_cache(tmp_path / "other", vlm, rows, cache_key(vlm), ContentHashes(), block=2, progress=stop)
    warm = cache_key(vlm, temperature=2.0)
    write_topk_cache(tmp_path / "other", vlm, rows, warm, ContentHashes(), block=2)
    assert verify(TopKCache.open(tmp_path / "other", warm), vlm, rows, ContentHashes(), 1.0).mismatched == []


def test_a_folder_of_something_else_and_no_dialogues(vlm, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.docx").touch()
    with pytest.raises(UserError, match="is not a teacher cache"):
        write_topk_cache(tmp_path / "mine", vlm, dialogues(tmp_path / "i", 1), cache_key(vlm), ContentHashes())
    with pytest.raises(UserError, match="There are no samples to write"):
        write_topk_cache(tmp_path / "cache", vlm, [], cache_key(vlm), ContentHashes())


def test_a_narrower_student_gets_its_own_words(vlm, tmp_path):
    rows = dialogues(tmp_path / "images", 1)
    words = len(vlm.lm_head_weight) - 7
    (row, *_) = teacher_rows(vlm, rows, cache_key(vlm, vocab_size=words, k=words))
    assert row.ids.max() < words
    assert np.exp(row.log_probabilities.astype(np.float64)).sum(1) == pytest.approx(
        np.ones(len(row.log_probabilities)), abs=2e-3
    )
    assert np.isneginf(row.log_tail).all()


def _write(folder: str, output: str) -> None:
    """What the killed process does."""
    vlm = GroundedVlm.load(folder)
    rows = dialogues(Path(output).with_name("images"), 12)
    write_topk_cache(Path(output), vlm, rows, cache_key(vlm), ContentHashes(), block=1)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_byte_equal(folder, vlm, tmp_path):
    rows = dialogues(tmp_path / "images", 12)
    write_topk_cache(tmp_path / "whole", vlm, rows, cache_key(vlm), ContentHashes(), block=1)
    program = f"import sys, torch; torch.set_num_threads(1); from tests.grounding.test_topk_cache import _write; _write({str(folder)!r}, sys.argv[1])"  # noqa: E501
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-c", program, str(tmp_path / "cut")]
    partial = tmp_path / ".cut.partial"
    for point in (1, 9, 20):
        process = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + 300
        while len(list(partial.glob("block-*"))) < point:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        assert process.wait(300) == -signal.SIGKILL
        assert not (tmp_path / "cut").exists()
    assert subprocess.run(command, env=environment, timeout=600).returncode == 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert json.loads((tmp_path / "cut" / "manifest.json").read_text())["rows"] == 25
