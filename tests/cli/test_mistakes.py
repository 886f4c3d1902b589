"""Mistakes of the user: one sentence and exit code 2, before any slow package is imported."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from preceptor.cli import app as cli
from preceptor.cli.data import refuse_data_as_recipe
from preceptor.cli.errors import exit_with
from preceptor.errors import UserError
from preceptor.os_errors import describe_os_error
from preceptor.recipe import dump_recipe
from preceptor.tasks import load_recipe

SLOW = ("torch", "transformers", "monai", "scipy", "matplotlib")

# Every line is called in one process. {empty} is an empty folder, {file} a text file, {run} a run without a model,
# {own} a model of a class of the user.
CALLS = """
train mhkd-demo data.image_sizee=3
train lckd-demo method.cross_modal.wieght=1
train clinkd-demo stages=[bsaeline]
train nonsense
train no/recipe.yaml
train mhkd-vqa-rad
train mhkd-vqa-rad data.root=/nonexistent
train lckd-brats data.root=/nonexistent
train mhkd-demo output={file}
train mhkd-demo --seeds 0
evaluate /nonexistent
evaluate {empty}
evaluate {run}
predict /nonexistent --table {file}
predict {empty}
predict {empty} --image {file}
predict {empty} --image /nonexistent.png --question what?
predict {empty} --image {file} --question what?
predict {empty} --table /nonexistent.csv
predict {empty} --case /nonexistent
predict {empty} flair=/nonexistent.nii.gz
predict {empty} flair
train lckd-demo method.teaching_run=/nonexistent
train lckd-demo data.split_file=/nonexistent
evaluate {own}
predict {own} --case {empty}
cache mhkd-demo data.nmae=x
cache mhkd-demo output={file}
cache mhkd-demo method.teaching.kind=ema
cache clinkd-demo method.pseudo_labels.share=0
cache lckd-demo
doctor mhkd-vqa-rad data.root=/nonexistent
doctor nonsense
doctor /nonexistent.csv
report /nonexistent
report {empty}
compare /nonexistent
audit slakee
audit slake --root /nonexistent
score /nonexistent --protocol x
score {file} --protocol x --metric bleuu
teach {file} --output {empty}
teach /nonexistent --output {empty} --teacher {empty}
teach {file} --output {file} --teacher {empty}
new-vlm {empty}
new-vlm {empty} --corpus /nonexistent
recipes show mhkdd
recipes accelerate fsdp3
demo lckdd
trian
"""

PROGRAM = """
import contextlib, io, json, sys
from preceptor.cli.app import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["preceptor", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as error:
            code = error.code
    slow = [name for name in SLOW_PACKAGES if name in sys.modules]
    print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue(), "slow": slow}))
"""


def test_mistakes_are_reported_before_slow_packages_are_imported(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump_recipe(load_recipe("mhkd-demo")))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text('{"model_type": "preceptor-multimodal-unet", "net": "mine:Net"}')
    (tmp_path / "own" / "model.safetensors").touch()
    places = {name: str(tmp_path / name) for name in ("empty", "file", "run", "own")}
    calls = [line.format(**places).split() for line in CALLS.strip().splitlines()]
    program = PROGRAM.replace("SLOW_PACKAGES", repr(SLOW))
    environment = {key: value for key, value in os.environ.items() if key != "PRECEPTOR_DATA"}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(calls)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(calls)
    for arguments, result in zip(calls, results, strict=True):
        assert result["code"] == 2, (arguments, result)
        assert result["out"] == "", (arguments, result)
        assert result["err"].splitlines()[-1].lower().startswith("error: "), (arguments, result)
        assert result["slow"] == [], (arguments, result)


def test_a_slow_package_would_be_found():
    """The test above is empty if it does not see an import."""
    program = f"import sys, torch; print([name for name in {SLOW!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "torch" in done.stdout


def fail(action) -> OSError:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        action()
    return caught.value


def test_errors_of_the_system_become_sentences(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("x")
    folder.mkdir()
    for action, sentence in [
        (lambda: (file / "run").mkdir(parents=True), f"{file}/run cannot be used: a file is in the place of one"),
        (lambda: file.mkdir(), f"{file} is a file, but a folder is needed"),
        (lambda: folder.read_text(), f"{folder} is a folder, but a file is needed"),
        (lambda: (tmp_path / "none").read_text(), f"{tmp_path}/none does not exist"),
        (lambda: (tmp_path / ("x" * 300)).read_text(), "is too long for a path"),
        (lambda: Path("/dev/full").write_text("x" * 100_000), "the disk is full"),
    ]:
        assert sentence in str(describe_os_error(fail(action)))


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.EACCES, "out/model cannot be read or written: permission denied"),
        (errno.EROFS, "out/model is on a read-only file system"),
        (errno.EDQUOT, "the disk is full for out/model"),
        (errno.ENXIO, "out/model cannot be used: No such device or address"),
    ],
)
def test_errors_that_root_cannot_provoke(number, sentence, capsys):
    assert exit_with(OSError(number, os.strerror(number), "out/model")) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_safetensors_on_a_full_disk():
    safetensors = pytest.importorskip("safetensors")
    error = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "disk is full" in str(describe_os_error(error))
    assert describe_os_error(safetensors.SafetensorError("invalid header")) is None


def test_defects_keep_their_traceback():
    defects = [
        ValueError("a defect"),
        ConnectionResetError("no path"),
        FileNotFoundError(errno.ENOENT, "missing", str(Path(cli.__file__).with_name("missing.py"))),
        FileNotFoundError(errno.ENOENT, "missing", json.__file__),
    ]
    for defect in defects:
        with pytest.raises(type(defect)):
            exit_with(defect)


def test_a_mistake_and_an_interruption_have_their_exit_codes(capsys):
    assert exit_with(UserError("data.root=x does not exist")) == 2
    assert exit_with(KeyboardInterrupt()) == 130
    assert exit_with(BrokenPipeError(errno.EPIPE, "Broken pipe")) == 141
    assert capsys.readouterr().err == "error: data.root=x does not exist\ninterrupted\n"


def test_output_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "preceptor", "recipes"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the disk is full")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "fix"),
    [
        ("omni.json", b'\xef\xbb\xbf [{"question": "q"}]', "is a JSON list.*one object per line into a .jsonl file"),
        ("images.zip", b"PK\x03\x04\x14\0\0\0", "is an archive or another binary file.*unpack it"),
    ],
)
def test_doctor_does_not_take_data_for_a_recipe(tmp_path, name, content, fix):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} {fix}"):
        refuse_data_as_recipe(str(tmp_path / name))
    for name, content in {"mine.json": b'{"task": "vqa"}', "mine.yaml": b"task: vqa", "table.csv": b"image"}.items():
        (tmp_path / name).write_bytes(content)
        refuse_data_as_recipe(str(tmp_path / name))
    refuse_data_as_recipe("mhkd-demo")
    refuse_data_as_recipe(str(tmp_path))
