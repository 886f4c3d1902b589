"""The JSON API against the answers of the Python API, and requests that it must refuse."""

from __future__ import annotations

import base64
import errno
import gzip
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from starlette.datastructures import UploadFile
from starlette.testclient import TestClient

from preceptor import api, files
from preceptor.errors import UserError
from preceptor.serving.app import DEFAULTS, Limits, create_app, without_paths
from preceptor.serving.models import ServedModels, unique_names
from preceptor.serving.server import check_token, listen
from preceptor.serving.uploads import Scratch
from tests.data.dicom_series_files import noise, slices_of, write_slices
from tests.fuzz.case_tables import nifti
from tests.fuzz.model_folders import templates

TASKS = ("vqa", "segmentation", "grounding")
QUESTION = "Where is the disc?"
FORM = "application/x-www-form-urlencoded"
PATIENT = "DOE_JANE_19700101"


def client(*tasks: str, limits: Limits = DEFAULTS, token: str | None = None, **options: Any) -> TestClient:
    """Return a client of a server with the untrained models of tasks, loaded before the first request."""
    models = ServedModels({task: templates() / task for task in tasks}, partial(api.load, **options))
    models.load()
    models.start = lambda: None  # type: ignore[method-assign]
    app = create_app(models, limits=limits, token=token)
    return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def served() -> Iterator[TestClient]:
    with client(*TASKS) as opened:
        yield opened


@pytest.fixture(scope="module")
def image() -> bytes:
    return (templates() / "image.png").read_bytes()


@pytest.fixture(scope="module")
def volumes() -> dict[str, bytes]:
    rng = np.random.default_rng(3)
    arrays = {name: rng.integers(1, 99, (16, 16, 16)).astype(np.int16) for name in ("flair", "t1")}
    return {name: gzip.compress(nifti(array)) for name, array in arrays.items()}


def upload(volumes: dict[str, bytes]) -> dict[str, Any]:
    return {name: (f"{PATIENT}_{name}.nii.gz", data) for name, data in volumes.items()}


def test_an_answer_equals_that_of_predict(served: TestClient, image: bytes) -> None:
    found = served.post("/v1/answer", files={"image": ("x.png", image)}, data={"question": QUESTION, "top": 2})
    (row,) = api.predict(templates() / "vqa", image=templates() / "image.png", question=QUESTION, top=2)
    assert found.status_code == 200
    assert found.json() == {"answers": row["answers"], "warnings": []}


def test_a_truncated_question_is_answered_with_a_warning(served: TestClient, image: bytes) -> None:
    question = "disc " * 300
    found = served.post("/v1/answer", files={"image": ("x.png", image)}, data={"question": question})
    expected = api.load(templates() / "vqa").answer(templates() / "image.png", question)
    assert found.status_code == 200
    assert found.json()["warnings"] == list(expected.warnings)
    assert "is truncated" in found.json()["warnings"][0]


def test_the_activation_map_is_a_png_that_matches_the_model(served: TestClient, image: bytes) -> None:
    data = {"question": QUESTION, "heatmap": "true"}
    url = served.post("/v1/answer", files={"image": ("x.png", image)}, data=data).json()["heatmap"]
    head, _, encoded = url.partition(",")
    assert head == "data:image/png;base64"
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))[..., 3]
    expected = api.load(templates() / "vqa").answer(templates() / "image.png", QUESTION).heatmap()
    assert alpha.shape == (256, 256)
    assert (alpha.max() > 0) == (expected.max() > 0)


def test_a_grounded_answer_equals_that_of_the_model(served: TestClient, image: bytes) -> None:
    data = {"question": "Where is the liver?", "max_new_tokens": 3}
    found = served.post("/v1/ask", files={"image": ("x.png", image)}, data=data)
    expected = api.load(templates() / "grounding").ask(
        templates() / "image.png", "Where is the liver?", max_new_tokens=3
    )
    assert found.status_code == 200
    assert found.json() == {key: value for key, value in expected.to_dict().items() if key != "id"}


def test_every_subset_of_an_uploaded_case_gives_the_mask_of_the_model(
    served: TestClient, volumes: dict[str, bytes], tmp_path: Path
) -> None:
    first = served.post("/v1/segment", files=upload(volumes)).json()
    assert first["available"] == ["flair", "t1"]
    model = api.load(templates() / "segmentation")
    for name, data in volumes.items():
        (tmp_path / f"{name}.nii.gz").write_bytes(data)
    for chosen in ("flair", "t1", "flair+t1"):
        row = served.post("/v1/segment", data={"case": first["case"], "modalities": chosen}).json()
        expected = model.segment({name: tmp_path / f"{name}.nii.gz" for name in chosen.split("+")})
        assert row["modalities"] == expected.modalities
        assert row["volumes_ml"] == expected.volumes_ml
        assert row["expected_dice"] == expected.expected_dice
        mask = served.get(row["mask"])
        assert mask.headers["content-type"] == "application/gzip"
        (tmp_path / "mask.nii.gz").write_bytes(mask.content)
        theirs = expected.save(tmp_path / "expected.nii.gz")
        ours = nibabel.load(tmp_path / "mask.nii.gz")
        assert np.array_equal(ours.get_fdata(), nibabel.load(theirs).get_fdata())
        assert np.array_equal(ours.affine, nibabel.load(theirs).affine)


def test_a_mask_stays_that_of_its_contrasts_when_others_are_segmented(
    served: TestClient, volumes: dict[str, bytes]
) -> None:
    """A program may ask for all combinations first, and fetch the masks then."""
    case = served.post("/v1/segment", files=upload(volumes)).json()["case"]
    combinations = ("flair", "t1", "flair+t1")
    rows = [served.post("/v1/segment", data={"case": case, "modalities": c}).json() for c in combinations]
    masks = [gzip.decompress(served.get(row["mask"]).content) for row in rows]
    for row, mask in zip(rows, masks, strict=True):
        voxels = nibabel.Nifti1Image.from_bytes(mask).get_fdata()
        counted = {
            r: np.isin(voxels, v).sum() for r, v in served.get("/v1/models").json()["models"][1]["labels"].items()
        }
        assert {r: n / 1000 for r, n in counted.items()} == pytest.approx(row["volumes_ml"], abs=0.00501)  # two digits
    assert len(set(masks)) > 1, "otherwise nothing is tested"
    for key in ("0" * 16, "..", "%2e%2e%2fflair"):
        assert served.get(f"/v1/cases/{case}/masks/{key}").status_code == 404


def test_the_picture_is_what_our_reader_shows_whatever_the_format(served: TestClient, tmp_path: Path) -> None:
    from preceptor.data.images import load_image

    path = tmp_path / "x.dcm"
    shutil.copy(get_testdata_file("CT_small.dcm"), path)
    data = {"question": QUESTION, "picture": "true"}
    for route, more in (("/v1/answer", {}), ("/v1/ask", {"max_new_tokens": "1"})):
        found = served.post(route, files={"image": ("x", path.read_bytes())}, data=data | more).json()
        assert np.array_equal(decode_png(found["picture"]), np.asarray(load_image(path)))


def test_the_picture_of_a_large_image_is_small(served: TestClient) -> None:
    encoded = io.BytesIO()
    Image.new("L", (3000, 1500)).save(encoded, "PNG")
    data = {"question": QUESTION, "picture": "true"}
    found = served.post("/v1/answer", files={"image": ("x", encoded.getvalue())}, data=data).json()
    assert decode_png(found["picture"]).shape == (512, 1024)


def decode_png(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_the_volume_of_a_contrast_is_on_the_grid_of_the_mask(served: TestClient, volumes: dict[str, bytes]) -> None:
    found = served.post("/v1/segment", files=upload(volumes)).json()
    mask = nibabel.Nifti1Image.from_bytes(gzip.decompress(served.get(found["mask"]).content))
    for name, data in volumes.items():
        for _ in range(2):
            got = served.get(f"/v1/cases/{found['case']}/{name}")
            assert got.headers["content-type"] == "application/gzip"
            ours = nibabel.Nifti1Image.from_bytes(gzip.decompress(got.content))
            theirs = nibabel.Nifti1Image.from_bytes(gzip.decompress(data))
            assert np.array_equal(ours.get_fdata(), theirs.get_fdata())
            assert np.array_equal(ours.affine, mask.affine)
    assert served.get(f"/v1/cases/{found['case']}/t2").status_code == 404
    assert served.get(f"/v1/cases/{found['case']}/..%2f..%2fmask").status_code == 404
    assert served.get("/v1/cases/none/flair").status_code == 404


def test_a_dicom_series_can_be_shown(served: TestClient, tmp_path: Path) -> None:
    from preceptor.data.dicom_series import read_series

    write_slices(tmp_path, slices_of(noise((16, 16, 16))))
    files = [("flair", ("x", path.read_bytes())) for path in sorted(tmp_path.iterdir())]
    case = served.post("/v1/segment", files=files).json()["case"]
    got = served.get(f"/v1/cases/{case}/flair")
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(got.content))
    voxels, geometry = read_series(tmp_path)
    assert np.array_equal(image.get_fdata(), voxels)
    assert np.allclose(image.affine, geometry.affine)


def test_other_files_of_a_series_are_ignored_and_reported_as_by_predict(served: TestClient, tmp_path: Path) -> None:
    write_slices(tmp_path, slices_of(noise((16, 16, 16))))
    slices = [("flair", (path.name, path.read_bytes())) for path in sorted(tmp_path.iterdir())]
    names = [f"{PATIENT}.JSON", "DICOMDIR", "notes.txt"]
    others = [("flair", (name, b"{}")) for name in names]
    found = served.post("/v1/segment", files=[others[0], *slices, *others[1:]])
    assert found.status_code == 200, found.text
    (warning,) = found.json()["warnings"]
    assert "3 files that are not DICOM were ignored" in warning
    assert PATIENT not in found.text
    alone = served.post("/v1/segment", files=slices).json()
    assert (alone["volumes_ml"], alone["warnings"]) == (found.json()["volumes_ml"], [])
    for name in ("slice", "slice.dcm", "1.2.840.3"):
        damaged = served.post("/v1/segment", files=[*slices, ("flair", (name, b"{}" * 200))])
        assert (damaged.status_code, "not a DICOM file" in damaged.text) == (422, True), damaged.text


def test_contrasts_may_have_other_names(served: TestClient, volumes: dict[str, bytes]) -> None:
    found = served.post("/v1/segment", files=upload({"T2f": volumes["flair"], "t1w": volumes["t1"]}))
    assert found.json()["available"] == ["flair", "t1"]
    case = found.json()["case"]
    row = served.post("/v1/segment", data={"case": case, "modalities": "T1n"}).json()
    assert row["modalities"] == "t1"
    assert served.get(f"/v1/cases/{case}/t1n").status_code == 200
    twice = served.post("/v1/segment", files=upload({"t1": volumes["flair"], "t1w": volumes["t1"]}))
    assert (twice.status_code, twice.json()["detail"]) == (
        422,
        "'t1' and 't1w' are the same modality; give one of them",
    )
    twice = served.post("/v1/segment", data={"case": case, "modalities": "t1+t1w"})
    assert (twice.status_code, twice.json()["detail"]) == (
        422,
        "'t1' and 't1w' are the same modality; give one of them",
    )
    text = served.post("/v1/segment", data={"t1w": "x"})
    assert text.json()["detail"].startswith("t1w is a text, not a file")


def test_several_files_of_a_contrast_are_one_series(served: TestClient, volumes: dict[str, bytes]) -> None:
    found = served.post("/v1/segment", files=[("flair", (name, data)) for name, data in volumes.items()])
    assert found.status_code == 422
    assert found.json()["detail"].startswith("flair has 2 files, and one of them is NIfTI; give one NIfTI file")


@pytest.mark.parametrize("text", ["t1+flair", "t1,flair", "t1 flair", " t1, flair "])
def test_contrasts_may_be_separated_as_a_form_writes_them(
    served: TestClient, volumes: dict[str, bytes], text: str
) -> None:
    case = served.post("/v1/segment", files=upload(volumes)).json()["case"]
    found = served.post("/v1/segment", data={"case": case, "modalities": text})
    assert found.json()["modalities"] == "flair+t1"
    refused = served.post("/v1/segment", data={"case": case, "modalities": "t1,t2"})
    assert refused.json()["detail"] == "the case has no t2; it has flair, t1"
    raw = {"content": f"case={case}&modalities=t1+flair", "headers": {"content-type": FORM}}
    assert served.post("/v1/segment", **raw).json()["modalities"] == "flair+t1"


def test_models_are_described(served: TestClient) -> None:
    found = served.get("/v1/models").json()
    assert "research" in found["notice"].lower()
    vqa, segmentation, grounding = found["models"]
    assert vqa["answers"] == len(api.load(templates() / "vqa").bundle.vocabulary.answers)
    assert segmentation["modalities"] == ["flair", "t1"]
    assert segmentation["validation"] == {"flair": {"whole": 0.5}, "flair+t1": {"whole": 0.75}}
    assert grounding["needs_modality"] is False


MALFORMED: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/answer", {}, 422),
    ("/v1/answer", {"data": {"question": "Where?"}}, 422),
    ("/v1/answer", {"files": {"image": ("/etc/x.png", b"")}, "data": {"question": "Where?"}}, 422),
    ("/v1/answer", {"files": {"image": (f"{PATIENT}.png", b"no image")}, "data": {"question": "Where?"}}, 422),
    ("/v1/answer", {"files": {"image": ("x", b"\x89PNG\r\n\x1a\n" + bytes(99))}, "data": {"question": "?"}}, 422),
    ("/v1/answer", {"files": {"image": ("x", b"GIF89a")}, "data": {"question": "?" * 3000}}, 422),
    ("/v1/answer", {"files": {"image": ("x", b"GIF89a")}, "data": {"question": "?", "top": "many"}}, 422),
    ("/v1/answer", {"files": {"image": ("x", b"GIF89a")}, "data": {"question": "?", "model": "../../etc"}}, 404),
    ("/v1/answer", {"content": b"{", "headers": {"content-type": "application/json"}}, 422),
    ("/v1/answer", {"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400),
    ("/v1/answer", {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=y"}}, 400),
    ("/v1/ask", {"files": [("image", ("x", b"1"))] * 9, "data": {"question": "?"}}, 422),
    ("/v1/segment", {}, 422),
    ("/v1/segment", {"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400),
    ("/v1/segment", {"data": {"case": "../../etc"}}, 422),
    ("/v1/segment", {"files": {"dwi": (f"{PATIENT}.nii", b"1")}}, 422),
    ("/v1/segment", {"files": {"flair": (f"{PATIENT}.nii", b"1")}}, 422),
    ("/v1/segment", {"files": {"flair": (f"{PATIENT}.nii", gzip.compress(b"1"))}}, 422),
    ("/v1/segment", {"files": {"flair": (f"{PATIENT}.nii", bytes(128) + b"DICM" + bytes(300))}}, 422),
    ("/v1/segment", {"files": [("flair", ("a", b"1")), ("flair", ("b", b"2"))]}, 422),
    ("/v1/ask", {"files": {"image": ("x", b"GIF89a")}, "data": {"question": "?", "modality": "CT"}}, 422),
]


@pytest.mark.parametrize(("path", "request_", "status"), MALFORMED)
def test_a_malformed_request_gets_a_sentence_without_paths_and_names(
    served: TestClient, caplog: pytest.LogCaptureFixture, path: str, request_: dict[str, Any], status: int
) -> None:
    with caplog.at_level(logging.DEBUG):
        found = served.post(path, **request_)
    assert found.status_code == status, found.text
    assert set(found.json()) == {"detail"}
    for text in (found.text, caplog.text.replace(f"{path} ", "")):
        assert PATIENT not in text
        assert "/tmp" not in text
        assert "/dev/shm" not in text
        assert "Traceback" not in text


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"flair": "flair.nii.gz"}, "flair is a text, not a file; send it as a file"),
        ({"modality": "t1"}, "the field 'modality' is not known; did you mean 'modalities'?"),
        ({"post": "maybe"}, "post is 'maybe'; give true or false"),
        ({"modalities": ["t1", "flair"]}, "the field modalities is given 2 times; give it once"),
    ],
)
def test_a_field_of_a_segmentation_that_is_not_understood_is_refused(
    served: TestClient, volumes: dict[str, bytes], fields: dict[str, Any], says: str
) -> None:
    found = served.post("/v1/segment", files=upload({"t1": volumes["t1"]}), data=fields)
    assert found.status_code == 422
    assert says in found.json()["detail"]


@pytest.mark.parametrize(("text", "post"), [("True", True), ("yes", True), ("ON", True), ("No", False), ("", False)])
def test_post_is_read_as_other_truth_values(
    served: TestClient, volumes: dict[str, bytes], text: str, post: bool
) -> None:
    found = served.post("/v1/segment", files=upload(volumes), data={"post": text})
    assert found.json()["post_processed"] is post


def test_a_field_of_a_question_that_is_not_understood_is_refused(served: TestClient, image: bytes) -> None:
    files, twice = {"image": ("x", image)}, [("image", ("x", image)), ("image", ("y", image))]
    for path, request, says in (
        ("/v1/answer", {"data": {"question": "?", "tpo": "5"}, "files": files}, "'tpo' is not known; did you mean"),
        ("/v1/answer", {"data": {"question": "?", "modality": "ct"}, "files": files}, "'modality' is not known"),
        ("/v1/answer", {"data": {"question": "?"}, "files": twice}, "the field image is given 2 times"),
        ("/v1/answer", {"data": {"question": ["?", "!"]}, "files": files}, "the field question is given 2 times"),
        ("/v1/answer?top=5", {"data": {"question": "?"}, "files": files}, "top is in the address of the request"),
        ("/v1/ask", {"data": {"question": "?", "top": "5"}, "files": files}, "'top' is not known"),
        (
            "/v1/ask",
            {"data": {"question": "?", "modality": "CT"}, "files": files},
            "modality 'CT' is not known; known: ct, ",
        ),
        ("/v1/segment?post=true", {"files": {"t1": ("x", b"1")}}, "post is in the address of the request"),
    ):
        found = served.post(path, **request)
        assert (found.status_code, says in found.json()["detail"]) == (422, True), found.text


JSON = {"content": b'{"question": "?"}', "headers": {"content-type": "application/json"}}
IMAGE = {"image": ("x", b"GIF89a")}


@pytest.mark.parametrize(
    ("path", "request_", "says"),
    [
        ("/v1/answer", JSON, "the request is application/json; send its fields as a multipart form"),
        ("/v1/ask", JSON, "the request is application/json; send its fields as a multipart form"),
        ("/v1/segment", JSON, "the request is application/json; send its fields as a multipart form"),
        ("/v1/answer", {"files": IMAGE}, "the field question is missing"),
        ("/v1/answer", {"files": IMAGE, "data": {"question": ""}}, "the question is empty"),
        ("/v1/ask", {"files": IMAGE, "data": {"question": ""}}, "the question is empty"),
        ("/v1/answer", {"data": {"question": "?"}}, "the field image is missing"),
        (
            "/v1/answer",
            {"data": {"question": "?"}, "files": {"image": (None, b"GIF89a")}},
            "image is a text, not a file",
        ),
        ("/v1/ask", {"data": {"question": "?"}, "files": {"image": (None, b"GIF89a")}}, "image is a text, not a file"),
        (
            "/v1/answer",
            {"files": IMAGE, "data": {"question": "?", "top": "many"}},
            "top: Input should be a valid integer",
        ),
    ],
)
def test_a_request_that_is_not_understood_is_told_what_is_wrong(
    served: TestClient, path: str, request_: dict[str, Any], says: str
) -> None:
    found = served.post(path, **request_)
    assert found.status_code == 422
    assert found.json()["detail"].startswith(says)


def test_a_text_of_more_than_a_mebibyte_is_refused(served: TestClient, image: bytes) -> None:
    large = bytes(2**20 + 1)
    for uploads in ({"image": ("x", image), "question": (None, large)}, {"image": (None, large)}):
        found = served.post("/v1/answer", files=uploads)
        assert found.status_code == 400
        assert found.json()["detail"].endswith(
            "a field that is not a file is larger than 1 MiB; send files with a file name"
        )


@pytest.mark.parametrize("text", [",", "+", " ", ", ,"])
def test_contrasts_without_a_name_are_not_all_contrasts(
    served: TestClient, volumes: dict[str, bytes], text: str
) -> None:
    found = served.post("/v1/segment", files=upload(volumes), data={"modalities": text})
    assert (found.status_code, "names no contrast; give some" in found.text) == (422, True)


def test_unknown_paths_cases_and_methods(served: TestClient) -> None:
    assert served.get("/v1/cases/none/masks/0").status_code == 404
    assert served.get("/v1/cases/..%2f..%2fetc/masks/0").status_code == 404
    assert served.get("/v1/answer").status_code == 405
    assert served.get("/static/../app.py").status_code == 404


def test_a_refused_case_leaves_no_files_and_takes_no_place(volumes: dict[str, bytes]) -> None:
    with client("segmentation", limits=Limits(cases=1)) as opened:
        case = opened.post("/v1/segment", files=upload(volumes)).json()["case"]
        broken = {"flair": ("x", volumes["flair"][:-40])}
        folder = scratch_folders()
        assert opened.post("/v1/segment", files={"flair": ("x", b"1")}).status_code == 422
        assert opened.post("/v1/segment", data={"case": case}).status_code == 200
        assert opened.post("/v1/segment", files=broken).status_code == 422
        assert len(scratch_folders()) <= len(folder)


def scratch_folders() -> list[Path]:
    from preceptor.serving.uploads import _SHARED_MEMORY

    return [path for path in _SHARED_MEMORY.glob("preceptor-serve-*/*") if path.is_dir()]


def test_uploads_are_removed_after_the_answer_and_at_the_end(image: bytes, volumes: dict[str, bytes]) -> None:
    from preceptor.serving.uploads import _SHARED_MEMORY

    with client("vqa", "segmentation") as opened:
        folder = opened.app.state.scratch.folder  # type: ignore[attr-defined]  # other tests have folders there, too
        assert folder in _SHARED_MEMORY.glob("preceptor-serve-*")
        assert folder.stat().st_mode & 0o077 == 0
        opened.post("/v1/answer", files={"image": ("x", image)}, data={"question": QUESTION})
        opened.post("/v1/answer", files={"image": ("x", b"1")}, data={"question": QUESTION})
        assert list(folder.iterdir()) == []
        opened.post("/v1/segment", files=upload(volumes))
        assert all(PATIENT not in str(path) for path in folder.rglob("*"))
    assert not folder.exists()


def test_old_cases_make_room(volumes: dict[str, bytes]) -> None:
    with client("segmentation", limits=Limits(cases=2)) as opened:
        ids = [opened.post("/v1/segment", files=upload(volumes)).json()["case"] for _ in range(3)]
        codes = [opened.post("/v1/segment", data={"case": id}).status_code for id in ids]
    assert codes == [422, 200, 200]


def test_a_case_expires(volumes: dict[str, bytes]) -> None:
    with client("segmentation", limits=Limits(case_seconds=0)) as opened:
        first = opened.post("/v1/segment", files=upload(volumes))
        assert first.status_code == 200, "a case in use does not expire"
        again = opened.post("/v1/segment", data={"case": first.json()["case"]})
        assert again.status_code == 422
        assert "upload it again" in again.json()["detail"]


def test_a_case_expires_without_any_further_request(volumes: dict[str, bytes]) -> None:
    before = set(scratch_folders())
    with client("segmentation", limits=Limits(case_seconds=0.5)) as opened:
        assert opened.post("/v1/segment", files=upload(volumes)).status_code == 200
        assert set(scratch_folders()) - before
        end = time.monotonic() + 20
        while set(scratch_folders()) - before:
            assert time.monotonic() < end
            time.sleep(0.1)


def test_a_body_above_the_limit_is_refused_with_and_without_its_length(image: bytes) -> None:
    with client("vqa", limits=Limits(upload_bytes=2000)) as opened:
        large = opened.post("/v1/answer", files={"image": ("x", bytes(5000))}, data={"question": "?"})
        assert large.status_code == 413
        assert "larger than" in large.json()["detail"]

        def chunks() -> Iterator[bytes]:
            yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
            for _ in range(10):
                yield bytes(1000)

        chunked = opened.post(
            "/v1/answer", content=chunks(), headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert chunked.status_code == 413


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example"}, 400),
        ({"host": "127.0.0.1.evil.example"}, 400),
        ({"host": "["}, 400),
        ({"host": "[foo]"}, 400),
        ({"origin": "http://[foo]"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "http://127.0.0.1:9"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "https://evil.example"}, 403),
    ],
)
def test_pages_of_other_sites_cannot_use_the_server(served: TestClient, headers: dict[str, str], status: int) -> None:
    assert served.get("/v1/models", headers=headers).status_code == status


def test_the_page_works_behind_a_proxy_that_passes_on_the_host() -> None:
    headers = {"origin": "https://ai.example:8443", "authorization": f"Bearer {'a' * 20}"}
    with client("vqa", token="a" * 20) as served:
        assert served.get("/v1/models", headers={**headers, "host": "ai.example:8443"}).status_code == 200
        refused = served.get("/v1/models", headers={**headers, "host": "127.0.0.1:8000"})
    assert (refused.status_code, "a proxy in front of it must pass on the header Host" in refused.text) == (403, True)


def test_a_token_guards_the_api_and_not_the_health_check() -> None:
    token = "a" * 20
    with client("segmentation", token=token) as opened:
        assert opened.get("/healthz", headers={"host": "hospital.example"}).status_code == 200
        assert opened.get("/v1/models").status_code == 401
        assert opened.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert opened.get("/v1/models", headers={"authorization": "Bearer é".encode()}).status_code == 401
        assert opened.get("/v1/models", headers={"authorization": f"Bearer {token}"}).status_code == 200


def test_every_response_forbids_other_sources(served: TestClient) -> None:
    for found in (served.get("/healthz"), served.get("/nothing"), served.get("/v1/models", headers={"host": "x"})):
        assert "default-src 'none'" in found.headers["content-security-policy"]
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["cache-control"] == "no-store"


def with_damaged(tmp_path: Path) -> ServedModels:
    """Return models of which the first has damaged weights, after they were loaded."""
    shutil.copytree(templates() / "vqa", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"1")
    models = ServedModels({"damaged": tmp_path / "damaged", "whole": templates() / "vqa"}, api.load)
    models.load()
    models.start = lambda: None  # type: ignore[method-assign]
    return models


def test_a_model_that_cannot_be_loaded_is_reported_without_its_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = with_damaged(tmp_path)
    assert str(tmp_path) in str(models.error)
    assert f"the model damaged cannot be loaded: {models.error}" in caplog.text
    with TestClient(create_app(models), base_url="http://127.0.0.1") as opened:
        assert (opened.get("/healthz").status_code, opened.get("/healthz").json()) == (503, {"status": "failed"})
        found = opened.post("/v1/answer", files={"image": ("x", b"1")}, data={"question": "?"})
        assert found.status_code == 503
        assert "the model damaged cannot be loaded" in found.text
        assert str(tmp_path) not in found.text


def test_the_other_models_answer_when_one_cannot_be_loaded(tmp_path: Path, image: bytes) -> None:
    models = with_damaged(tmp_path)
    assert not models.all_failed
    with TestClient(create_app(models), base_url="http://127.0.0.1") as opened:
        data = {"question": QUESTION, "model": "whole"}
        assert opened.post("/v1/answer", files={"image": ("x", image)}, data=data).status_code == 200


def test_a_lack_of_memory_in_torch_is_a_sentence(image: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from preceptor.vqa.predict import VqaModel

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(VqaModel, "answer", fail)
    with client("vqa") as opened:
        found = opened.post("/v1/answer", files={"image": ("x", image)}, data={"question": QUESTION})
    assert (found.status_code, "there is not enough memory" in found.text) == (422, True)


def failing(number: int, folder: Path) -> Any:
    """Return a function that fails as the system does, with a path of this machine."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(folder / "image-1"))

    return fail


ROUTES = (
    ("/v1/answer", {"image": ("x", b"1")}, {"question": QUESTION}),
    ("/v1/ask", {"image": ("x", b"1")}, {"question": QUESTION}),
    ("/v1/segment", {"t1": ("x", b"1")}, {}),
)


@pytest.mark.parametrize(
    ("number", "status", "says"),
    [
        (errno.ENOSPC, 507, "the server has no space left for the files of this request"),
        (errno.EDQUOT, 507, "the server has no space left for the files of this request"),
        (errno.EMFILE, 503, "too many files are open"),
        (errno.EIO, 503, "image-1 cannot be read or written"),
    ],
)
@pytest.mark.parametrize("place", ["received", "written", "folder"])
def test_an_upload_that_the_system_cannot_keep_is_a_sentence_without_paths(
    monkeypatch: pytest.MonkeyPatch, place: str, number: int, status: int, says: str
) -> None:
    owner, name = {"received": (UploadFile, "write"), "written": (UploadFile, "read"), "folder": (Scratch, "new")}[
        place
    ]
    with client(*TASKS) as opened:
        folder = opened.app.state.scratch.folder
        monkeypatch.setattr(owner, name, failing(number, folder))
        for path, files, data in ROUTES:
            found = opened.post(path, files=files, data=data)
            assert (found.status_code, says in found.json()["detail"]) == (status, True), found.text
            assert str(folder) not in found.text
        assert [path for path in folder.iterdir() if path.is_dir()] == []


def test_a_mask_and_a_view_without_space_are_status_507(
    served: TestClient, volumes: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = served.post("/v1/segment", files=upload(volumes)).json()["case"]
    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", failing(errno.ENOSPC, served.app.state.scratch.folder))
        assert served.post("/v1/segment", data={"case": case}).status_code == 507
        assert served.get(f"/v1/cases/{case}/t1").status_code == 507
    assert served.post("/v1/segment", data={"case": case}).status_code == 200
    assert served.get(f"/v1/cases/{case}/t1").status_code == 200


def test_an_error_of_the_system_that_is_a_defect_stays_one(
    served: TestClient, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("a defect")

    for name in ("read", "write"):
        with monkeypatch.context() as patch:
            patch.setattr(UploadFile, name, fail)
            found = served.post("/v1/answer", files={"image": ("x", image)}, data={"question": QUESTION})
        assert (found.status_code, found.json()["detail"]) == (500, "an error inside the server; its log says more")


def test_a_volume_may_be_as_large_as_a_model_was_trained_with(
    volumes: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from preceptor.data import limits

    models = ServedModels({"segmentation": templates() / "segmentation"}, api.load)
    models.load()
    assert models.max_voxels == limits.MAX_VOXELS
    preparation = models.get("segmentation").config["preparation"]
    monkeypatch.setitem(preparation, "max_voxels", limits.MAX_VOXELS + 1)
    assert models.max_voxels == limits.MAX_VOXELS + 1


def test_requests_wait_for_models_that_are_being_loaded() -> None:
    models = ServedModels({"vqa": templates() / "vqa"}, api.load)
    models.start = lambda: None  # type: ignore[method-assign]
    with TestClient(create_app(models), base_url="http://127.0.0.1") as opened:
        assert opened.get("/healthz").json() == {"status": "loading"}
        assert opened.get("/v1/models").json()["models"] == [{"name": "vqa", "task": "vqa"}]
        found = opened.post("/v1/answer", files={"image": ("x", b"1")}, data={"question": "?"})
        assert (found.status_code, found.headers["retry-after"]) == (503, "5")


def test_names_of_models_are_as_short_as_possible(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "teacher", tmp_path / "b" / "teacher", tmp_path / "c" / "student"]
    assert list(unique_names(folders[1:])) == ["teacher", "student"]
    assert list(unique_names(folders)) == ["a/teacher", "b/teacher", "c/student"]
    with pytest.raises(UserError, match="given twice"):
        unique_names([folders[0], tmp_path / "b" / ".." / "a" / "teacher"])


@pytest.mark.parametrize(
    ("host", "token", "says"),
    [
        ("0.0.0.0", None, "set a token"),
        ("192.168.0.7", None, "set a token"),
        ("::", None, "set a token"),
        ("hospital.example", None, "set a token"),
        ("127.0.0.1", "short", "at least 16"),
        ("127.0.0.1", None, None),
        ("::1", None, None),
        ("localhost", None, None),
        ("0.0.0.0", "x" * 16, None),
    ],
)
def test_an_address_that_others_can_reach_needs_a_token(host: str, token: str | None, says: str | None) -> None:
    if says is None:
        check_token(host, token)
        return
    with pytest.raises(UserError, match=says):
        check_token(host, token)


def test_a_port_that_cannot_be_used_is_a_sentence() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1, port"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match=r"cannot listen on 203\.0\.113\.7"):
        listen("203.0.113.7", 0)
    with pytest.raises(UserError, match="between 0 and 65535"):
        listen("127.0.0.1", 65536)


def test_paths_become_words() -> None:
    words = {Path("/a/b"): "the upload", Path("/models/x"): "the model x"}
    assert without_paths("/a/b/image-1: broken; /models/x: bad", words) == "image-1: broken; the model x: bad"


def test_the_openapi_description_names_all_routes(served: TestClient) -> None:
    found = json.loads(served.get("/openapi.json").text)
    assert {"/healthz", "/v1/models", "/v1/answer", "/v1/segment", "/v1/ask"} <= set(found["paths"])
    assert found["paths"]["/v1/segment"]["post"]["requestBody"]["content"]["multipart/form-data"]
