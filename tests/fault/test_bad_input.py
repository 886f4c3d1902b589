"""Broken images and infinite losses: an error that names them, and nothing that was computed is lost."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command_line import call
from tests.fault.tiny import write_recipe


def write_table(folder: Path) -> Path:
    """Write 16 training, 4 validation and 4 test rows, each with an image of its own."""
    rng = np.random.default_rng(0)
    rows = ["image,question,answer,split"]
    for number in range(24):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"scan-{number}.png")
        part = "test" if number >= 20 else "validation" if number >= 16 else "train"
        rows.append(f"scan-{number}.png,is it red?,{'yes' if number % 2 else 'no'},{part}")
    (folder / "table.csv").write_text("\n".join(rows))
    return folder / "table.csv"


def bomb(path: Path) -> None:
    """Write a PNG of a few bytes whose header announces 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


DAMAGE = {
    "corrupted": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "empty": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("Report of the radiologist"),
    "a page": lambda path: path.write_text("<html>404 not found</html>"),
    "too many pixels": bomb,
    "too many bytes": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 200_000),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
LIMIT = "data.max_image_bytes=100000"


def settings(folder: Path, *more: str) -> list[str]:
    return [
        str(write_recipe(folder)),
        "data.name=table",
        f"data.root={folder / 'table.csv'}",
        f"output={folder / 'run'}",
        "teacher.train.epochs=1",
        "student.train.epochs=1",
        LIMIT,
        *more,
    ]


def test_doctor_lists_every_kind_of_broken_file(tmp_path):
    write_table(tmp_path)
    kinds = [kind for kind in DAMAGE if kind != "a folder"]  # a missing file stops the reading of the table
    for number, kind in enumerate(kinds):
        DAMAGE[kind](tmp_path / f"scan-{3 * number}.png")
    code, out, err = call("doctor", *settings(tmp_path), "--json")
    assert code == 1, err
    found = {f["file"]: f for f in json.loads(out)["findings"] if f["severity"] == "error"}
    assert set(found) == {f"scan-{3 * number}.png" for number in range(len(kinds))}
    assert all(len(f["ids"]) == 1 and f["reason"] for f in found.values())
    assert "100,000" in found["scan-18.png"]["reason"]
    code, out, _ = call("doctor", *settings(tmp_path))
    assert code == 1
    assert all(f"scan-{3 * number}.png" in out for number in range(len(kinds)))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", DAMAGE)
def test_training_names_the_broken_file(tmp_path, kind, workers):
    write_table(tmp_path)
    DAMAGE[kind](tmp_path / "scan-7.png")
    code, out, err = call("train", *settings(tmp_path, f"data.workers={workers}"))
    assert code == 2
    assert "scan-7.png" in err
    assert "Traceback" not in err
    assert "Caught" not in err
    assert out == ""


def fingerprints(root: Path) -> dict[str, str]:
    kept = ("*.safetensors", "state.json", "predictions/*.jsonl")
    found = [path for pattern in kept for path in root.rglob(pattern)]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_an_image_that_breaks_between_stages_loses_nothing(tmp_path):
    write_table(tmp_path)
    code, _, err = call("train", *settings(tmp_path, "stages=[teacher,baseline]"))
    assert code == 0, err
    before = fingerprints(tmp_path / "run")
    assert any(name.startswith("teacher/model") for name in before)
    whole = (tmp_path / "scan-2.png").read_bytes()
    DAMAGE["truncated"](tmp_path / "scan-2.png")
    # tiny.yaml has one stage, which would be trained in the run folder itself.
    code, _, err = call("train", *settings(tmp_path))
    assert code == 2
    assert "already contains a run of several stages" in err
    assert fingerprints(tmp_path / "run").items() >= before.items()
    code, _, err = call("train", *settings(tmp_path, "stages=[teacher,baseline,distilled]"))
    assert code == 2
    assert "scan-2.png" in err
    assert fingerprints(tmp_path / "run").items() >= before.items()
    (tmp_path / "scan-2.png").write_bytes(whole)
    code, out, err = call("train", *settings(tmp_path, "stages=[teacher,baseline,distilled]"), "--json")
    assert code == 0, err
    assert set(json.loads(out)["stages"]) == {"teacher", "baseline", "distilled"}
    assert fingerprints(tmp_path / "run").items() >= before.items()


def test_broken_training_rows_are_counted_and_broken_test_rows_are_wrong(tmp_path):
    write_table(tmp_path)
    for number in (1, 4, 22):
        DAMAGE["truncated"](tmp_path / f"scan-{number}.png")
    policy = ["data.broken=skip", "data.skip_limit=0.2", "data.workers=1", "teacher.train.epochs=2"]
    code, out, err = call("train", *settings(tmp_path, *policy), "--json")
    assert code == 0, err
    results = json.loads(out)
    assert results["training"]["skipped"] == ["row-3", "row-6"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["training"]["skipped"] == ["row-3", "row-6"]
    (protocol, scores), *_ = results["protocols"].items()
    assert scores["n"] == 4
    lines = (tmp_path / "run" / "predictions" / f"{protocol.replace('/', '-')}.jsonl").read_text().splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines)}
    assert (rows["row-24"]["prediction"], rows["row-24"]["correct"]) == ("", False)


def test_more_skipped_rows_than_the_limit_stop_the_training(tmp_path):
    write_table(tmp_path)
    for number in (1, 4):
        DAMAGE["truncated"](tmp_path / f"scan-{number}.png")
    policy = ["data.broken=skip", "data.skip_limit=0.01", "teacher.train.epochs=2"]
    code, _, err = call("train", *settings(tmp_path, *policy))
    assert code == 2
    assert "skip_limit=0.01" in err


def test_one_question_is_enough_to_time(tmp_path):
    write_table(tmp_path)
    code, _, err = call("train", *settings(tmp_path, "report.latency_questions=1"))
    assert code == 0, err


def test_an_infinite_loss_stops_the_training(tmp_path):
    write_table(tmp_path)
    wild = ["teacher.train.learning_rate=1e30", "teacher.train.clip_norm=null", "teacher.train.warmup=0"]
    code, _, err = call("train", *settings(tmp_path, *wild, "teacher.train.epochs=4"))
    assert code == 2
    assert "is not finite" in err
    assert "row-" in err
    assert "train.learning_rate" in err
    assert "Traceback" not in err
