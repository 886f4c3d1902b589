from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import preceptor
from preceptor.data.images import load_image
from preceptor.exporting.image_graph import preprocessing_graph
from preceptor.exporting.run import TEMPLATES
from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.dataset import Preprocessing, pixels, resize
from tests.command_line import call
from tests.exporting.conftest import Exported, export

QUESTION = "Where is the disc?"
ALL_ANSWERS = """
import json, sys, run_onnx
cases = json.load(open(sys.argv[1]))
print(json.dumps([dict(run_onnx.answer(run_onnx.read_image(image), question)) for image, question in cases]))
"""


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("run_vqa", TEMPLATES / "run_vqa.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def largest_difference(exported: Exported, cases: list[tuple[Path, str]], scratch: Path) -> float:
    """Compare all probabilities of the runner with those of `preceptor.load(...).answer`, from the files."""
    (scratch / "cases.json").write_text(json.dumps([(str(image), question) for image, question in cases]))
    found = exported.compute(ALL_ANSWERS, scratch / "cases.json")
    expected = preceptor.load(exported.model).answer_many(cases, top=10**6, batch_size=1)
    differences = []
    for answers, answer in zip(found, expected, strict=True):
        assert answers.keys() == dict(answer.alternatives).keys()
        differences += [abs(answers[text] - p) for text, p in answer.alternatives]
    return max(differences)


@pytest.mark.parametrize("side", [16, 33, 112])
def test_the_graph_resizes_to_the_same_bytes_as_pillow(side):
    preprocessing = Preprocessing(side, (0.5, 0.4, 0.1), (0.2, 0.5, 1.0))
    graph = preprocessing_graph(preprocessing, 20, 10)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(side)
    sizes = [*rng.integers(1, 300, (40, 2)).tolist(), (side, side), (1, 1), (400, 30), (30, 400), (2 * side, side)]
    for height, width in sizes:
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        if height % 2:
            image = 255 * (image > 127).astype(np.uint8)
        expected = pixels(resize(Image.fromarray(image), side).copy()[None], preprocessing)
        np.testing.assert_array_equal(session.run(None, {"image": image})[0], expected, f"{height} x {width}")


def saved(folder: Path) -> dict[str, Path]:
    """Write one image of each kind that the runner reads."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (20, 31, 3)).astype(np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (20, 31, 4)).astype(np.uint8))
    grey = colour.convert("L")
    smooth = colour.resize((64, 48), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = alpha.quantize(30)
    kinds = {
        "colour.png": (colour, {}),
        "grey.png": (grey, {}),
        "black-and-white.png": (grey.convert("1"), {}),
        "palette.png": (colour.quantize(16), {}),
        "transparent-palette.png": (palette, {"transparency": bytes(range(0, 240, 8))}),
        "alpha.png": (alpha, {}),
        "grey-alpha.png": (alpha.convert("LA"), {}),
        "turned.png": (colour, {"exif": turned}),
        "colour.jpg": (smooth, {"quality": 80}),
        "subsampled.jpg": (smooth, {"quality": 40, "subsampling": 2, "progressive": True}),
        "grey.jpg": (smooth.convert("L"), {}),
        "turned.jpg": (smooth, {"exif": turned}),
    }
    for name, (image, options) in kinds.items():
        image.save(folder / name, **options)
    return {name: folder / name for name in kinds}


def test_the_runner_reads_the_same_pixels_as_preceptor(runner, tmp_path):
    for name, path in saved(tmp_path).items():
        np.testing.assert_array_equal(runner.read_image(path), np.asarray(load_image(path).convert("RGB")), name)


def test_the_runner_refuses_what_it_would_read_differently(runner, tmp_path):
    deep = np.arange(0, 40000, 100).astype(np.uint16).reshape(20, 20)
    Image.fromarray(deep).save(tmp_path / "grey16.png")
    png = (tmp_path / "grey16.png").read_bytes()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + np.stack([row] * 3, 1).astype(">u2").tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)
    colour = png[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "colour16.png").write_bytes(colour)
    small = Image.fromarray(np.arange(256).astype(np.uint8).reshape(16, 16))
    small.convert("CMYK").save(tmp_path / "cmyk.jpg")
    small.save(tmp_path / "transparent.png", transparency=3)
    small.save(tmp_path / "frames.png", save_all=True, append_images=[small.rotate(90)])
    for name in ("grey16.png", "colour16.png", "cmyk.jpg", "transparent.png", "frames.png"):
        with pytest.raises(SystemExit, match=f"{name}: only single 8-bit images are read"):
            runner.read_image(tmp_path / name)
    small.save(tmp_path / "image.tif")
    with pytest.raises(SystemExit, match=r"image\.tif: not a readable PNG or JPEG file"):
        runner.read_image(tmp_path / "image.tif")


def test_a_mistake_at_the_runner_is_one_sentence_with_exit_code_2(vqa, tmp_path):
    image = saved(tmp_path)["colour.png"]
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:200])
    Image.new("RGB", (9, 7)).save(tmp_path / "exif.png", exif=b"Exif\0\0no TIFF")
    for arguments, says in (
        ((tmp_path / "none.png", QUESTION), "none.png: not a readable PNG or JPEG file"),
        ((tmp_path / "cut.png", QUESTION), "cut.png: not a readable PNG or JPEG file"),
        ((tmp_path / "exif.png", QUESTION), "exif.png: not a readable PNG or JPEG file"),
        ((image, "Is", "there"), "put the question in quotes"),
        ((image, QUESTION, "README.md"), "README.md: no such model"),
        ((image, QUESTION, "model.json"), "model.json: no such model"),
        ((image, QUESTION, "../onnx/model.onnx"), "../onnx/model.onnx: no such model"),
        ((image, "\udcff lesion"), r"the question '\udcff lesion' is not valid UTF-8"),
    ):
        result = vqa.run(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert says in result.stderr
        assert len(result.stderr.splitlines()) == 1
    for arguments in ((), (image,), (image, " "), (image, "Is", "there", "a", "disc?")):
        result = vqa.run(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("Answer a question about")


def test_the_runner_without_torch_prints_what_predict_prints(vqa, tmp_path):
    image = saved(tmp_path)["turned.jpg"]
    result = vqa.run(image, QUESTION)
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == (
        call("predict", vqa.model, "--image", image, "--question", QUESTION)[1],
        "",
    )
    assert "tokens and is truncated" in vqa.run(image, "disc " * 60).stderr
    for arguments in ((QUESTION, "model.int8.onnx"), ("Größe \u2013 \u4e2d?",)):
        assert vqa.run(image, *arguments).returncode == 0
    blocked = vqa.run(code="import torch")
    assert blocked.returncode == 1
    assert "torch" in blocked.stderr
    assert "PNG or JPEG" in vqa.run(image, " ").stderr


def test_probabilities_from_the_file_are_those_of_torch(vqa, tmp_path):
    questions = [QUESTION, "disc " * 60, "Größe \u2013 \u2460 \u4e2d?"]
    cases = [(image, questions[n % 3]) for n, image in enumerate(saved(tmp_path).values())]
    assert largest_difference(vqa, cases, tmp_path) < 1e-5


def test_the_export_reports_its_check_and_what_int8_costs(vqa):
    settings = json.loads((vqa.folder / "model.json").read_text())
    assert settings == json.loads(json.dumps(vqa.settings))
    assert settings["answers"] == VqaBundle.load(vqa.model).vocabulary.answers
    assert settings["check"]["inputs"] == 10
    assert 0 <= settings["check"]["largest_difference"] < 1e-5
    sizes = {
        name: (vqa.folder / f"model{end}.onnx").stat().st_size for name, end in (("float32", ""), ("int8", ".int8"))
    }
    assert settings["int8"]["bytes"] == sizes
    assert sizes["int8"] < sizes["float32"]
    assert 0 < settings["int8"]["largest_difference"] < 0.2
    answers = [
        answer.text
        for answer in preceptor.load(vqa.model).answer_many(
            [(image, QUESTION) for image in sorted((vqa.model.parent / "images").glob("*.png"))[:4]]
        )
    ]
    accuracy = sum(answer == ("yes", "right")[n % 2] for n, answer in enumerate(answers)) / 4
    assert settings["accuracy"]["torch"] == settings["accuracy"]["float32"] == accuracy
    assert settings["accuracy"]["questions"] == 4


def test_the_files_name_no_folder_of_this_machine(vqa, segmentation):
    for exported in (vqa, segmentation):
        for file in exported.folder.iterdir():
            data = file.read_bytes()
            for place in (str(exported.model.parent), "site-packages", os.path.dirname(preceptor.__file__)):
                assert place.encode() not in data, (file.name, place)


def trained_on_vqa_rad(folder: Path, rows: list[dict], images: Path) -> None:
    """Train a small model from scratch for a minute's fraction on some questions."""
    from preceptor.data.types import Dataset, Sample
    from tests.vqa.conftest import make_bundle

    samples = [
        Sample(str(n), images / row["image_name"], row["question"], (str(row["answer"]),), "open", str(n), "train")
        for n, row in enumerate(rows)
    ]
    torch.manual_seed(0)
    bundle = make_bundle(Dataset("vqa-rad", "some", images, samples, [], False), 32, 0)
    from preceptor.vqa.config import DataConfig

    known = [sample for sample in samples if sample.answer in bundle.vocabulary.answers]
    optimizer = torch.optim.Adam(bundle.model.parameters(), 3e-3)
    examples = bundle.examples(known, DataConfig())
    for epoch in range(6):
        for batch in examples.loader(
            [list(range(n, min(n + 32, len(known)))) for n in range(0, len(known), 32)], epoch
        ):
            logits = bundle.model(batch["pixels"], batch["input_ids"], batch["attention_mask"]).logits
            torch.nn.functional.cross_entropy(logits, batch["labels"], ignore_index=-1).backward()
            optimizer.step()
            optimizer.zero_grad()
    bundle.model.eval()
    bundle.save(folder)


@pytest.mark.real_data
@pytest.mark.slow
def test_one_hundred_questions_of_vqa_rad_are_answered_alike(tmp_path):
    root = Path(os.environ["PRECEPTOR_DATA"]) / "vqa_rad"
    images = root / "VQA_RAD Image Folder"
    rows = json.loads((root / "VQA_RAD Dataset Public.json").read_text())
    by_image = {row["image_name"]: row for row in rows if (images / row["image_name"]).is_file()}
    chosen = list(by_image.values())[:100]
    trained_on_vqa_rad(tmp_path / "model", chosen, images)
    exported = export(tmp_path / "model", tmp_path / "onnx", int8=True)
    cases = [(images / row["image_name"], row["question"]) for row in chosen]
    assert len(cases) == 100
    difference = largest_difference(exported, cases, tmp_path)
    print(f"largest difference {difference:.2g}, int8 {exported.settings['int8']}")
    assert difference < 1e-4


def test_a_table_without_answers_is_refused(vqa, tmp_path):
    shutil.copy(saved(tmp_path)["grey.png"], tmp_path / "a.png")
    (tmp_path / "table.csv").write_text("id,image,question,answer\nq1,a.png,Where?,\n")
    with pytest.raises(preceptor.UserError, match=r"table\.csv:2: the answer is empty"):
        preceptor.export(vqa.model, tmp_path / "onnx", table=tmp_path / "table.csv")
    assert not (tmp_path / "onnx").exists()
