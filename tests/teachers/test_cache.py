import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.errors import UserError
from preceptor.task import Batch, TeacherSignal
from preceptor.teachers.array_store import differences
from preceptor.teachers.cache import CachedTeacher, CacheKey, verify, write_cache
from tests.teachers.tiny_teacher import FIXED, TOKEN_AXES, Samples, cache_key, teacher


@pytest.fixture
def samples():
    return Samples(24)


@pytest.fixture
def cache(tmp_path, samples):
    source = teacher()
    write_cache(tmp_path / "cache", source, samples.batches(), cache_key(source), token_axes=TOKEN_AXES)
    return tmp_path / "cache"


def open_cache(folder, **options):
    return CachedTeacher.open(folder, cache_key(teacher()), **options)


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(data)


# Reading


@pytest.mark.parametrize("seed", range(8))
def test_cached_equals_online_for_other_neighbours_order_and_padding(cache, samples, seed):
    rng = random.Random(seed)
    indices = [*rng.sample(range(24), rng.randint(1, 9)), 3]
    batch = samples.batch(indices, pad_to=rng.choice([0, 0, 5, 12]))
    cached, online = open_cache(cache).signal(batch), teacher().signal(batch)
    assert torch.equal(cached.mask, online.mask)
    torch.testing.assert_close(cached.logits, online.logits)
    assert cached.features.keys() == online.features.keys()
    torch.testing.assert_close(cached.features["pooled"], online.features["pooled"])
    for name, feature in online.features.items():
        assert cached.features[name].shape == feature.shape
    for row, i in enumerate(indices):
        q, n = samples.lengths[i], FIXED + samples.lengths[i]
        for name, window in {
            "embed_question": (row, slice(q)),
            "fusion": (row, slice(n)),
            "attention": (row, slice(None), slice(n), slice(n)),
        }.items():
            torch.testing.assert_close(cached.features[name][window], online.features[name][window])
            everything = cached.features[name][row].abs().sum()
            assert everything == pytest.approx(float(cached.features[name][window].abs().sum()), rel=1e-5)


def test_cached_signal_does_not_depend_on_how_the_cache_was_batched(tmp_path, samples):
    source = teacher()
    orders = {"small": samples.batches(2), "large": samples.batches(24), "back": samples.batches(5)[::-1]}
    batch = samples.batch([20, 1, 8])
    signals = []
    for name, batches in orders.items():
        assert write_cache(tmp_path / name, source, batches, cache_key(source), token_axes=TOKEN_AXES) == 24
        signals.append(open_cache(tmp_path / name).signal(batch))
    for other in signals[1:]:
        torch.testing.assert_close(other.logits, signals[0].logits)
        for name in other.features:
            torch.testing.assert_close(other.features[name], signals[0].features[name])


def test_signal_may_be_written_to_without_changing_the_cache(cache, samples):
    cached, batch = open_cache(cache), samples.batch([0, 1])
    expected = cached.signal(batch).logits.clone()
    cached.signal(batch).logits.zero_()
    assert torch.equal(cached.signal(batch).logits, expected)
    cached.store.verify_files()


def test_float16_is_half_the_size_and_close(tmp_path, cache, samples):
    source = teacher()
    write_cache(tmp_path / "half", source, samples.batches(), cache_key(source), token_axes=TOKEN_AXES, dtype="float16")
    batch = samples.batch([5, 6, 7])
    half, full = open_cache(tmp_path / "half"), open_cache(cache)
    assert half.signal(batch).logits.dtype == torch.float32
    torch.testing.assert_close(half.signal(batch).logits, full.signal(batch).logits, rtol=1e-3, atol=1e-3)
    sizes = [np.load(folder / "logits.npy").nbytes for folder in (tmp_path / "half", cache)]
    assert sizes[0] * 2 == sizes[1]
    assert verify(half, source, samples.batches(), fraction=1.0).mismatched == []


def test_fields_choose_what_is_written_and_features_what_is_read(tmp_path, cache, samples):
    source, batch = teacher(), samples.batch([1, 2])
    write_cache(
        tmp_path / "some", source, samples.batches(), cache_key(source), fields=["fusion"], token_axes=TOKEN_AXES
    )
    assert set(open_cache(tmp_path / "some").signal(batch).features) == {"fusion"}
    assert set(open_cache(cache, features=["attention"]).signal(batch).features) == {"attention"}
    with pytest.raises(UserError, match=r"lacks the feature 'fusions'.*did you mean 'fusion'\?"):
        open_cache(cache, features=["fusions"])
    with pytest.raises(UserError, match=r"no feature 'pool'"):
        write_cache(tmp_path / "none", source, samples.batches(), cache_key(source), fields=["pool"])
    assert not (tmp_path / "none").exists()


def test_repeated_keys_are_written_once(tmp_path, samples):
    source, seen = teacher(), []
    batches = [samples.batch([0, 1, 0]), samples.batch([1, 2]), samples.batch([2, 0])]
    rows = write_cache(
        tmp_path / "cache", source, batches, cache_key(source), token_axes=TOKEN_AXES, progress=seen.append
    )
    cached = open_cache(tmp_path / "cache")
    assert (rows, len(cached), seen) == (3, 3, [2, 3])
    assert np.load(tmp_path / "cache" / "logits.npy").shape[0] == 3
    batch = samples.batch([2, 2, 0])
    torch.testing.assert_close(cached.signal(batch).logits, source.signal(batch).logits)


def test_a_teacher_of_images_alone_needs_no_token_axes(tmp_path):
    class Images:
        fingerprint = "f" * 64

        def signal(self, batch):
            return TeacherSignal(batch["pixels"].mean((2, 3)), {"map": batch["pixels"]})

        def to(self, device):
            return self

    pixels = torch.randn(3, 3, 2, 2)
    batch = Batch({"pixels": pixels}, ["a", "b", "c"], [hashlib.sha256(bytes([i])).hexdigest() for i in range(3)])
    write_cache(tmp_path / "cache", Images(), [batch], cache_key(Images()))
    cached = CachedTeacher.open(tmp_path / "cache", cache_key(Images()))
    turned = Batch({"pixels": pixels[[2, 0]]}, ["c", "a"], [batch.keys[2], batch.keys[0]])
    assert cached.signal(turned).mask is None
    assert torch.equal(cached.signal(turned).features["map"], pixels[[2, 0]])


@settings(max_examples=40, deadline=None)
@given(
    stored=st.sets(st.binary(min_size=32, max_size=32) | st.sampled_from([bytes(32), b"\xff" * 32]), min_size=1),
    asked=st.lists(st.integers(0, 10**6), min_size=1, max_size=8),
    absent=st.binary(min_size=32, max_size=32),
    tail=st.integers(0, 31),
)
def test_keys_find_their_own_rows_and_no_others(tmp_path_factory, stored, asked, absent, tail):
    """Against a dictionary; keys that end in zero bytes must not be confused with each other."""
    rows = sorted(stored, key=lambda key: hashlib.sha256(key).digest())
    rows += [key for key in [rows[0][:tail] + bytes(32 - tail)] if key not in stored]
    folder = tmp_path_factory.mktemp("keys") / "cache"

    class Counter:
        fingerprint = "c" * 64

        def signal(self, batch):
            return TeacherSignal(torch.tensor([[float(rows.index(bytes.fromhex(key)))] for key in batch.keys]))

        def to(self, device):
            return self

    def batch(keys):
        return Batch({"pixels": torch.zeros(len(keys), 1)}, ["x"] * len(keys), [key.hex() for key in keys])

    write_cache(folder, Counter(), [batch(rows)], cache_key(Counter()))
    cached = CachedTeacher.open(folder, cache_key(Counter()))
    places = [i % len(rows) for i in asked]
    assert cached.signal(batch([rows[i] for i in places])).logits[:, 0].tolist() == places
    if absent not in rows:
        with pytest.raises(UserError, match="'x' is not in the teacher cache"):
            cached.signal(batch([rows[0], absent]))


# Refusals


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("teacher", "0" * 64, r"teacher: cached \w{12}\.\.\., wanted 000000000000\.\.\."),
        ("vocabulary", "w" * 64, r"vocabulary: cached v{12}\.\.\., wanted w{12}"),
        ("data", "tiny 4567", "data: cached tiny 0123, wanted tiny 4567"),
        ("variant", "published", "variant: cached clean, wanted published"),
        (
            "preprocessing",
            {"image_size": 16, "mean": [0.5] * 3, "tokenizer": "t" * 64},
            "preprocessing.image_size: cached 8, wanted 16",
        ),
        ("augmentation", {"views": 4, "flip": True}, "augmentation.flip: cached nothing, wanted True"),
    ],
)
def test_each_other_cache_key_is_refused_by_name(cache, name, value, shown):
    with pytest.raises(UserError, match=shown) as refusal:
        CachedTeacher.open(cache, cache_key(teacher(), **{name: value}))
    assert "preceptor cache" in str(refusal.value)
    assert not any(other in str(refusal.value) for other in {"vocabulary", "variant", "data"} - {name})


def test_every_difference_is_listed():
    old = cache_key(teacher())
    new = CacheKey("x", "y", "z", "w", {"image_size": 9}, {})
    names = [line.split(":")[0] for line in differences(asdict(old), asdict(new))]
    expected = ["teacher", "vocabulary", "data", "variant", "preprocessing.image_size", "preprocessing.mean"]
    assert names == [*expected, "preprocessing.tokenizer", "augmentation.views"]
    assert differences(asdict(old), asdict(cache_key(teacher()))) == []
    # None is a value of its own.
    assert differences({"augmentation": {"views": None}}, {"augmentation": {}})


def test_missing_keys_name_the_sample_and_the_cause(cache, samples):
    batch = samples.batch([4, 5], view=1)
    batch.keys[0] = samples.key(4)
    with pytest.raises(UserError, match=r"'sample-5' is not in the teacher cache .*augmentation view.*image file"):
        open_cache(cache).signal(batch)


def test_a_question_longer_than_it_comes_now_is_refused(cache, samples):
    longest = max(range(24), key=lambda i: samples.lengths[i])
    batch = samples.batch([longest])
    for name in ("input_ids", "attention_mask"):
        batch.tensors[name] = batch.tensors[name][:, :3]
    with pytest.raises(
        UserError, match=f"'sample-{longest}' was cached with {samples.lengths[longest]} tokens and now has at most 3"
    ):
        open_cache(cache).signal(batch)


@pytest.mark.parametrize(
    "name", ["logits.npy", "mask.npy", "feature.fusion.npy", "keys.npy", "rows.npy", "lengths.npy"]
)
def test_truncated_and_missing_files_are_refused_at_open(cache, name):
    path = cache / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{name} has {len(data) - 1} bytes instead of {len(data)}.*preceptor cache"):
        open_cache(cache)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        open_cache(cache)


@pytest.mark.parametrize("name", ["keys.npy", "rows.npy", "lengths.npy"])
def test_a_corrupted_index_is_refused_at_open(cache, name):
    flip_byte(cache / name, 130)
    with pytest.raises(UserError, match=f"{name} has another SHA-256"):
        open_cache(cache)


def test_a_corrupted_header_is_refused_at_open(cache):
    path = cache / "logits.npy"
    path.write_bytes(path.read_bytes().replace(b"(24, 5)", b"(20, 6)"))
    with pytest.raises(UserError, match=r"logits\.npy"):
        open_cache(cache)


def test_a_corrupted_byte_is_found_by_both_checks(cache, samples):
    source = teacher()
    row = 13
    flip_byte(cache / "logits.npy", 128 + (row * 5 + 2) * 4 + 3)
    cached = open_cache(cache)
    with pytest.raises(UserError, match=r"logits\.npy has another SHA-256"):
        cached.store.verify_files()
    report = verify(cached, source, samples.batches(7), fraction=1.0)
    assert (report.checked, report.mismatched) == (24, [f"sample-{row}"])
    assert report.worst > 1e-3


def test_a_value_that_became_nan_is_found(cache, samples):
    path = cache / "feature.fusion.npy"
    array = np.load(path)
    array[9, 2, 0] = np.nan
    np.save(path, array)
    report = verify(open_cache(cache), teacher(), samples.batches(), fraction=1.0)
    assert (report.mismatched, report.worst) == (["sample-9"], float("inf"))


@pytest.mark.parametrize(
    "arrays",
    [{}, {"logits": []}, {"logits": {}}, {"logits": {"dtype": "float16"}}, {"logits": {"dtype": "f", "shape": None}}],
)
def test_a_manifest_whose_arrays_are_not_described_is_refused(cache, arrays):
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "arrays": arrays}))
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(.*preceptor cache"):
        open_cache(cache)


@pytest.mark.parametrize("rows", [False, True, 0, 1, "3", None, 10**9])
def test_a_manifest_with_another_number_of_rows_is_refused(cache, rows):
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "rows": rows}))
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(ValueError: rows is "):
        open_cache(cache)


def test_a_manifest_of_other_bytes_is_not_quoted(cache):
    (cache / "manifest.json").write_bytes(b"\xff" + bytes(100_000))
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(UnicodeDecodeError: ") as error:
        open_cache(cache)
    assert len(str(error.value)) < 500 + len(str(cache))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format": 3}', '{"format": 3, "kind": "signals", "cache_key": 3}'],
)
def test_a_damaged_manifest_is_refused(cache, text):
    (cache / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged.*preceptor cache"):
        open_cache(cache)


def test_another_format_and_no_cache_are_refused(cache, tmp_path):
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        open_cache(cache)
    with pytest.raises(UserError, match=r"There is no teacher cache in .*nowhere"):
        open_cache(tmp_path / "nowhere")


def test_file_names_that_leave_the_folder_are_refused(cache, tmp_path):
    (tmp_path / "outside.npy").write_bytes((cache / "logits.npy").read_bytes())
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["arrays"]["feature.../../outside"] = manifest["arrays"]["logits"]
    manifest["files"]["feature.../../outside.npy"] = manifest["files"]["logits.npy"]
    (cache / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="outside"):
        open_cache(cache)


# Verifying


def test_verify_draws_the_asked_fraction_and_stops(cache, samples):
    passed = []

    def batches():
        for batch in samples.batches():
            passed.append(batch)
            yield batch

    source, cached = teacher(), open_cache(cache)
    assert verify(cached, source, batches(), fraction=0.25, seed=1).checked == 6
    assert verify(cached, source, samples.batches(), fraction=1e-9).checked == 1
    whole = verify(cached, source, [samples.batch([i, i], pad_to=9) for i in range(24)], fraction=1.0)
    assert (whole.checked, whole.mismatched) == (24, [])
    assert whole.worst < 1e-4
    passed.clear()
    first = verify(cached, source, batches(), fraction=1e-9, seed=1)
    assert first.checked == 1
    drawn = cached.store.sample(1e-9, 1)
    (place,) = (number for number, batch in enumerate(samples.batches()) if drawn & {*batch.keys})
    assert len(passed) == place + 1 < len(samples.batches())


def test_the_difference_is_relative_to_values_above_one(cache, samples):
    other = teacher()
    with torch.no_grad():
        other.model.head.bias[0] += 0.5
    new_N = torch.cat([other.signal(batch).logits[:, 0] for batch in samples.batches()])
    expected_N = 0.5 / new_N.abs().clamp(min=1)
    assert len(set(expected_N.tolist())) > 12
    report = verify(open_cache(cache), other, samples.batches(), fraction=1.0)
    assert report.worst == pytest.approx(expected_N.max().item(), rel=1e-4)
    tolerance = expected_N.sort().values[11:13].mean().item()
    report = verify(open_cache(cache), other, samples.batches(), fraction=1.0, tolerance=tolerance)
    assert report.mismatched == [f"sample-{i}" for i in range(24) if expected_N[i] > tolerance]


def test_verify_finds_another_teacher_and_other_data(cache, samples):
    report = verify(open_cache(cache), teacher(1), samples.batches(), fraction=1.0)
    assert len(report.mismatched) == 24
    report = verify(open_cache(cache), teacher(), Samples(4, seed=9).batches(), fraction=1.0)
    assert (report.checked, report.absent) == (0, 24)
    with pytest.raises(UserError, match=r"in \(0, 1\], not 0"):
        verify(open_cache(cache), teacher(), samples.batches(), fraction=0)


def test_verify_counts_drawn_rows_that_the_data_lack(cache, samples):
    report = verify(open_cache(cache), teacher(), samples.batches()[:-1], fraction=1.0)
    assert (report.checked, report.absent, report.mismatched) == (20, 4, [])
    report = verify(open_cache(cache), teacher(), samples.batches(), fraction=1.0)
    assert (report.checked, report.absent) == (24, 0)


# Writing


def test_token_axes_that_are_not_named_or_do_not_fit_are_refused(tmp_path, samples):
    source = teacher()
    batches = [samples.batch([0, 1], pad_to=8), samples.batch([2, 3], pad_to=9)]
    with pytest.raises(UserError, match=r"feature\.fusion has shape \(2, 14, 8\).*unlike the first batch"):
        write_cache(tmp_path / "a", source, batches, cache_key(source), fields=["fusion"])
    with pytest.raises(UserError, match=r"Token axes \(3,\) do not fit feature\.fusion of shape"):
        write_cache(tmp_path / "a", source, batches, cache_key(source), token_axes={"fusion": (3,)})
    with pytest.raises(UserError, match=r"'fusoin' to cache; did you mean 'fusion'"):
        write_cache(tmp_path / "a", source, batches, cache_key(source), token_axes={"fusoin": (1,)})
    with pytest.raises(UserError, match="no samples"):
        write_cache(tmp_path / "a", source, [], cache_key(source))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("bias", "dtype"), [(float("nan"), "float32"), (1e5, "float16")])
def test_values_that_are_not_finite_are_refused(tmp_path, samples, bias, dtype):
    source = teacher()
    with torch.no_grad():
        source.model.head.bias[1] = bias
    with pytest.raises(UserError, match=f"logits for sample 'sample-0' .* not finite as {dtype}"):
        write_cache(tmp_path / "a", source, samples.batches(), cache_key(source), token_axes=TOKEN_AXES, dtype=dtype)


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path, samples):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    source = teacher()
    with pytest.raises(UserError, match="is not a teacher cache"):
        write_cache(tmp_path / "notes", source, samples.batches(), cache_key(source))
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"


def test_a_cache_is_replaced_by_a_new_one_under_its_readers(cache, samples):
    reader, batch, source = open_cache(cache), samples.batch([0, 1]), teacher(1)
    write_cache(cache, source, samples.batches(), cache_key(source), token_axes=TOKEN_AXES)
    new = CachedTeacher.open(cache, cache_key(source))
    torch.testing.assert_close(new.signal(batch).logits, source.signal(batch).logits)
    torch.testing.assert_close(reader.signal(batch).logits, teacher().signal(batch).logits)
    with pytest.raises(UserError, match="teacher: cached"):
        open_cache(cache)
    assert os.listdir(cache.parent) == ["cache"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_writer_keeps_the_old_cache_and_resumes(cache, samples):
    """The batches that were written are not computed again, and the result is byte-equal to an undisturbed one."""
    source, before = teacher(1), contents(cache)

    def batches():
        yield from samples.batches()[:3]
        raise OSError("the network share is gone")

    for folder in (cache, cache.with_name("new")):
        with pytest.raises(OSError, match="share is gone"):
            write_cache(folder, source, batches(), cache_key(source), token_axes=TOKEN_AXES)
    assert not cache.with_name("new").exists()
    assert contents(cache) == before
    computed = []

    class Counting:
        fingerprint = source.fingerprint

        def signal(self, batch):
            computed.append(batch.ids)
            return source.signal(batch)

        def to(self, device):
            return self

    write_cache(cache, Counting(), samples.batches(), cache_key(source), token_axes=TOKEN_AXES)
    assert computed == [batch.ids for batch in samples.batches()[3:]]
    write_cache(cache.with_name("whole"), source, samples.batches(), cache_key(source), token_axes=TOKEN_AXES)
    assert contents(cache) == contents(cache.with_name("whole"))
    # Blocks of other settings are not resumed.
    write_cache(cache.with_name("new"), source, samples.batches(), cache_key(source), fields=["pooled"])
    assert CachedTeacher.open(cache.with_name("new"), cache_key(source)).features == ["pooled"]
    assert sorted(os.listdir(cache.parent)) == ["cache", "new", "whole"]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.teachers.tiny_teacher import *
from preceptor.teachers import array_store, cache

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def batches():
    yield Samples(24).batch([0, 1, 2])
    if sys.argv[2] == "batches":
        die()

if sys.argv[2] == "rename":
    array_store.replace_folder = die
source = teacher(1)
cache.write_cache(Path(sys.argv[1]), source, batches(), cache_key(source), token_axes=TOKEN_AXES)
"""


@pytest.mark.parametrize("moment", ["batches", "rename"])
def test_sigkill_leaves_no_half_cache_and_the_next_writer_cleans_up(cache, samples, moment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    for folder in (cache.with_name("new"), cache):
        done = subprocess.run([sys.executable, "-c", KILLED, str(folder), moment], env=environment, timeout=120)
        assert done.returncode == -signal.SIGKILL
    assert not cache.with_name("new").exists()
    with pytest.raises(UserError, match="no teacher cache"):
        open_cache(cache.with_name("new"))
    open_cache(cache).store.verify_files()
    assert sorted(os.listdir(cache.parent)) == [".cache.partial", ".new.partial", "cache"]
    source = teacher(1)
    for folder in (cache, cache.with_name("new")):
        write_cache(folder, source, samples.batches(), cache_key(source), token_axes=TOKEN_AXES)
        CachedTeacher.open(folder, cache_key(source)).store.verify_files()
    assert sorted(os.listdir(cache.parent)) == ["cache", "new"]


def test_two_writers_of_one_cache_do_not_mix(tmp_path, samples):
    partial = tmp_path / ".cache.partial"
    partial.mkdir()
    (partial / "logits.npy.raw").write_bytes(b"of the other writer")
    source, descriptor = teacher(), os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="Another process is writing"):
            write_cache(tmp_path / "cache", source, samples.batches(), cache_key(source), token_axes=TOKEN_AXES)
        assert (partial / "logits.npy.raw").read_bytes() == b"of the other writer"
    finally:
        os.close(descriptor)
    write_cache(tmp_path / "cache", source, samples.batches(), cache_key(source), token_axes=TOKEN_AXES)
    assert os.listdir(tmp_path) == ["cache"]
