"""Cases in use stay; memory is bounded; nothing is left behind by what still runs when its request has ended."""

from __future__ import annotations

import asyncio
import gzip
import io
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from starlette.datastructures import UploadFile

from preceptor import api
from preceptor.errors import UserError
from preceptor.serving import uploads
from preceptor.serving.app import Limits
from preceptor.serving.uploads import _SHARED_MEMORY, Cases, Scratch, TooManyCases
from tests.fuzz.case_tables import nifti
from tests.serving.server import running
from tests.serving.test_disconnect import wait_for


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    made = Scratch()
    yield made
    made.close()


def test_temporary_files_lie_in_the_folder_of_uploads_and_as_before_at_the_end(scratch: Scratch) -> None:
    before = tempfile.gettempdir()
    # Starlette makes such a file.
    with scratch.as_temporary_folder(), tempfile.SpooledTemporaryFile(max_size=1) as received:
        received.write(b"12")
        assert Path(f"/proc/self/fd/{received.fileno()}").readlink().parent == scratch.folder
    assert tempfile.gettempdir() == before
    assert [path for path in scratch.folder.iterdir() if not path.name.startswith(".")] == []


def test_a_file_that_is_dropped_by_its_name_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = uploads._write

    async def record(upload: UploadFile, path: Path) -> None:
        written.append(path.name)
        await write(upload, path)

    monkeypatch.setattr(uploads, "_write", record)
    dicom = bytes(128) + b"DICM"
    names = {"1.dcm": dicom, "DICOMDIR": dicom, "SMITH.JSON": b"{}", "2": dicom}
    received = [UploadFile(io.BytesIO(data), filename=name) for name, data in names.items()]
    folder = asyncio.run(uploads.save_volume(received, tmp_path, "t1"))
    assert written == ["00000.dcm", "00003.dcm"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "00000.dcm": dicom,
        "00001dicomdir": b"",
        "00002.json": b"",
        "00003.dcm": dicom,
    }
    assert all(one.file.closed for one in received)


def test_one_file_is_kept_by_its_content_and_another_kind_is_not_written(tmp_path: Path) -> None:
    for number, (data, name) in enumerate(
        ((bytes(128) + b"DICM", "t1/00000.dcm"), (b"\x1f\x8b1", "t1.nii.gz"), (bytes(344) + b"n+1\0", "t1.nii"))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        made = asyncio.run(uploads.save_volume([UploadFile(io.BytesIO(data), filename="a.txt")], folder, "t1"))
        assert made == folder / name.partition("/")[0]
        assert (folder / name).read_bytes() == data
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the file of t1 is neither NIfTI nor DICOM"):
        asyncio.run(uploads.save_volume([UploadFile(io.BytesIO(b"text"), filename="a.nii")], empty, "t1"))
    assert not list(empty.iterdir())


def upload(cases: Cases) -> str:
    """Return the id of a new case with a file, which is not in use."""
    with cases.new() as id:
        path = cases.scratch.folder / id / "t1.nii"
        path.touch()
        cases.add(id, {"t1": path})
    return id


def folders(cases: Cases) -> set[str]:
    return {path.name for path in cases.scratch.folder.iterdir() if path.is_dir()}


def test_a_case_in_use_makes_no_room(scratch: Scratch) -> None:
    cases = Cases(scratch, 2, 900)
    old, other = upload(cases), upload(cases)
    with cases.use(old):
        new = upload(cases)
        assert folders(cases) == {old, new}
        with pytest.raises(UserError, match="upload it again"), cases.use(other):
            pass


def test_the_case_that_was_unused_for_the_longest_time_makes_room(scratch: Scratch) -> None:
    cases = Cases(scratch, 2, 900)
    first, second = upload(cases), upload(cases)
    with cases.use(first):
        pass
    assert folders(cases) == {first, second}
    third = upload(cases)
    assert folders(cases) == {first, third}


def test_a_case_is_refused_when_all_are_in_use_and_their_number_stays_bounded(scratch: Scratch) -> None:
    cases = Cases(scratch, 2, 900)
    kept = [upload(cases), upload(cases)]
    with ExitStack() as use:
        made = [use.enter_context(cases.new()) for _ in kept]
        with pytest.raises(TooManyCases), cases.new():
            pass
        assert len(folders(cases)) == 4
        for id in made:
            cases.add(id, {"t1": scratch.folder / id / "t1.nii"})
        assert folders(cases) == set(made)
    assert folders(cases) == set(made)


def test_a_case_in_use_does_not_expire(scratch: Scratch) -> None:
    cases = Cases(scratch, 2, 0)
    id = upload(cases)
    other = cases.new()
    with other as used:
        cases.expire()
        assert folders(cases) == {used}
        assert id != used
    cases.expire()
    assert folders(cases) == set()


def test_a_case_that_is_removed_in_use_is_unknown_at_once_and_its_files_go_when_it_is_free(scratch: Scratch) -> None:
    cases = Cases(scratch, 2, 900)
    id = upload(cases)
    with cases.use(id):
        cases.remove(id)
        assert folders(cases) == {id}
        with pytest.raises(UserError, match="upload it again"), cases.use(id):
            pass
    assert folders(cases) == set()


def test_an_error_in_a_new_case_removes_it(scratch: Scratch) -> None:
    cases = Cases(scratch, 1, 900)
    kept = upload(cases)
    with pytest.raises(ZeroDivisionError), cases.new():
        raise ZeroDivisionError
    assert folders(cases) == {kept}


def test_what_is_written_after_the_end_is_removed(scratch: Scratch) -> None:
    cases = Cases(scratch, 2, 900)
    id = upload(cases)
    with cases.use(id):
        cases.close()
        scratch.close()
        (scratch.folder / id).mkdir(parents=True)  # as writing a mask does
    assert not scratch.folder.exists()


class Gated:
    """A segmentation model that waits for its gate, if it has one, before it returns."""

    def __init__(self, folder: Path) -> None:
        self.model, self.gate = api.load(folder), threading.Event()
        self.config, self.modalities, self.regions = self.model.config, self.model.modalities, self.model.regions

    def segment(self, *arguments: Any, **options: Any) -> Any:
        found = self.model.segment(*arguments, **options)
        self.gate.wait(60)
        return found


def volume() -> bytes:
    return gzip.compress(nifti(np.random.default_rng(3).integers(1, 99, (16, 16, 16)).astype(np.int16)))


def test_more_clients_than_places_get_an_answer_or_are_asked_to_try_again() -> None:
    models: list[Gated] = []

    def load(folder: Path) -> Gated:
        models.append(Gated(folder))
        return models[0]

    with running({"segmentation": "segmentation"}, load, limits=Limits(cases=2)) as address:

        def segment(_: int) -> httpx.Response:
            return httpx.post(f"{address}/v1/segment", files={"t1": ("x", volume())}, timeout=120)

        with ThreadPoolExecutor(6) as clients:
            futures = [clients.submit(segment, number) for number in range(6)]
            wait_for(lambda: sum(future.done() for future in futures) == 4)
            models[0].gate.set()
            found = [future.result() for future in futures]
        assert sorted(one.status_code for one in found) == [200, 200, 503, 503, 503, 503]
        assert {one.headers.get("retry-after") for one in found if one.status_code == 503} == {"5"}
        for one in found:
            if one.status_code == 200:
                again = httpx.post(f"{address}/v1/segment", data={"case": one.json()["case"]}, timeout=120)
                assert again.status_code == 200
        assert segment(0).status_code == 200, "those cases are free now"


def test_an_upload_that_took_too_long_leaves_nothing() -> None:
    models: list[Gated] = []

    def load(folder: Path) -> Gated:
        models.append(Gated(folder))
        return models[0]

    before = set(_SHARED_MEMORY.glob("preceptor-serve-*"))
    with running({"segmentation": "segmentation"}, load, limits=Limits(seconds=0.5)) as address:
        (place,) = set(_SHARED_MEMORY.glob("preceptor-serve-*")) - before
        found = httpx.post(f"{address}/v1/segment", files={"t1": ("x", volume())}, timeout=120)
        assert found.status_code == 504
        models[0].gate.set()
        wait_for(lambda: [path for path in place.iterdir() if path.is_dir()] == [])
