from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn, idctn

from preceptor.auditing.duplicates import COARSE, Pair, correlations, find_pairs
from preceptor.auditing.images import summarize, summarize_files
from preceptor.auditing.overlap import ImageIndex
from preceptor.data.phash import thumbnail
from preceptor.data.types import Dataset, Sample, Split
from tests.auditing.made import picture


def save(folder: Path, name: str, image: Image.Image, **options) -> Path:
    image.save(folder / name, **options)
    return folder / name


def test_every_kind_of_duplicate_is_found_once_by_its_surest_proof(tmp_path: Path) -> None:
    original = picture(0, 256)
    paths = [
        save(tmp_path, "a.png", original),
        save(tmp_path, "b.png", original),  # equal bytes
        save(tmp_path, "c.png", original.convert("RGB"), compress_level=1),  # equal pixels
        save(tmp_path, "d.jpg", original.resize((200, 200)), quality=70),  # a copy
        save(tmp_path, "e.png", picture(1, 256)),
        save(tmp_path, "f.png", Image.new("L", (99, 99), 5)),
        save(tmp_path, "g.png", Image.new("L", (99, 99), 5), compress_level=1),  # blank, equal pixels
    ]
    (tmp_path / "h.png").write_bytes(b"no image")
    pairs = find_pairs(summarize_files([*paths, tmp_path / "h.png"], workers=2))
    kinds = {(pair.left, pair.right): pair.kind for pair in pairs}
    assert kinds == {
        (0, 1): "bytes",
        (0, 2): "pixels",
        (1, 2): "pixels",
        (0, 3): "copy",
        (1, 3): "copy",
        (2, 3): "copy",
        (5, 6): "pixels",
    }
    assert len(pairs) == len(kinds)
    assert [pair.kind for pair in pairs] == ["bytes", "pixels", "pixels", "pixels", "copy", "copy", "copy"]


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_pixels_differ_if_one_channel_does(tmp_path: Path, channel: int) -> None:
    values = np.stack([np.asarray(picture(0, 64))] * 3, axis=-1)
    changed = values.copy()
    changed[..., channel] = 255 - changed[..., channel]
    paths = [save(tmp_path, f"{n}.png", Image.fromarray(array)) for n, array in enumerate((values, changed))]
    assert len({summary.pixels for summary in summarize_files(paths)}) == 2


def test_an_image_with_other_detail_is_alike_and_no_copy(tmp_path: Path) -> None:
    grey = thumbnail(picture(3)).astype(float)
    spectrum = dctn(grey, norm="ortho")
    rng = np.random.default_rng(0)
    fine = np.add.outer(np.arange(64), np.arange(64)) >= 22
    detail = rng.normal(0, np.abs(spectrum[fine]).std() * 2 + 20, fine.sum())
    spectrum[fine] += detail
    other = Image.fromarray(np.clip(idctn(spectrum, norm="ortho"), 0, 255).astype(np.uint8))
    paths = [save(tmp_path, "a.png", Image.fromarray(grey.astype(np.uint8))), save(tmp_path, "b.png", other)]
    assert [pair.kind for pair in find_pairs(summarize_files(paths))] == ["alike"]


def test_correlation_is_that_of_the_images_through_a_high_pass_filter() -> None:
    thumbs = np.stack([thumbnail(picture(seed)) for seed in (0, 1)])

    def detail(grey: np.ndarray) -> np.ndarray:
        spectrum = dctn(grey.astype(float), norm="ortho")
        spectrum[np.add.outer(np.arange(64), np.arange(64)) < COARSE] = 0
        return idctn(spectrum, norm="ortho").ravel()

    expected = np.corrcoef(detail(thumbs[0]), detail(thumbs[1]))[0, 1]
    found = correlations(thumbs, np.array([0, 0]), np.array([1, 0]))
    np.testing.assert_allclose(found, [expected, 1.0], atol=1e-9)


def test_a_broken_file_says_why_without_its_path(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture(0).save(buffer, "JPEG")
    path = tmp_path / "secret-name.jpg"
    path.write_bytes(buffer.getvalue()[:-200])
    found = summarize(path)
    assert "truncated" in found.broken
    assert "secret" not in found.broken
    assert "limit" in summarize(save(tmp_path, "large.png", picture(0, 64)), max_pixels=100).broken


def test_no_images_have_no_pairs() -> None:
    assert find_pairs([]) == []


def sample(id: str, image: str, split: Split) -> Sample:
    return Sample(id, Path(image), "q", ("a",), "open", id, split)


def data(*samples: Sample) -> Dataset[Sample]:
    return Dataset("made", "", Path(), list(samples))


def test_overlap_counts_each_image_once_by_its_surest_kind() -> None:
    one = data(
        sample("1", "a", "test"),
        sample("2", "a", "train"),
        sample("3", "b", "test"),
        sample("4", "c", "train"),
        sample("5", "d", "train"),
        sample("6", "e", "test"),
        sample("7", "f", "validation"),
        sample("8", "g", "test"),
    )
    index = ImageIndex.of([one])
    number = {path.name: n for path, n in index.numbers.items()}
    index.pairs = [
        Pair(number["b"], number["c"], "copy", 2, 0.99),
        Pair(number["b"], number["d"], "alike", 22, 0.9),
        Pair(number["e"], number["f"], "alike", 30, 0.8),
        Pair(number["c"], number["d"], "copy", 3, 0.98),
    ]
    overlap = index.overlap("test", [(0, "test")], "learnt", [(0, "train"), (0, "validation")])
    assert overlap.images == 4
    assert overlap.same == 2
    assert overlap.kinds == {number["a"]: "file", number["b"]: "copy", number["e"]: "alike"}
    classes = index.classes()
    assert classes[Path("b")] == classes[Path("c")] == classes[Path("d")]
    assert len(set(classes.values())) == 5


@pytest.mark.parametrize("workers", [1, 4])
def test_looks_keep_their_order(tmp_path: Path, workers: int) -> None:
    paths = [save(tmp_path, f"{n}.png", picture(n, 64)) for n in range(8)]
    assert [found.file for found in summarize_files(paths, workers=workers)] == [summarize(path).file for path in paths]
