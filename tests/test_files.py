"""Files and folders that are written completely or not at all."""

from __future__ import annotations

import pytest

from preceptor import files
from preceptor.files import new_folder, write_bytes, write_text


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_a_failed_write_keeps_the_earlier_file_and_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_text(path, "é1")
    assert path.read_bytes() == "é1".encode()
    monkeypatch.setattr(files, "flush", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"2")
    assert path.read_text("utf-8") == "é1"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_keeps_the_earlier_one_and_no_temporary_folder(tmp_path):
    folder, temporary = tmp_path / "model", tmp_path / ".model.tmp"
    temporary.mkdir()
    (temporary / "left by a kill").touch()
    with new_folder(folder, temporary) as new:
        assert list(new.iterdir()) == []
        (new / "weights").write_text("1")

    def fail() -> None:
        with new_folder(folder, temporary) as new:
            (new / "weights").write_text("2")
            full_disk()

    with pytest.raises(OSError, match="No space"):
        fail()
    assert (folder / "weights").read_text() == "1"
    assert list(tmp_path.iterdir()) == [folder]
