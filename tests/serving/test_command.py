"""`preceptor serve` as a process: it listens, answers, needs no network, and leaves nothing behind."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.command_line import call
from tests.fuzz.model_folders import templates
from tests.serving.test_disconnect import half_a_request

# Serves in a network namespace that has no route, and asks there. Prints the status of /healthz and of an answer.
WITHOUT_NETWORK = """
ip link set lo up || exit 77
[ -z "$(ip route)" ] || exit 78
"$PYTHON" -m preceptor serve "$MODEL" --port 8017 > "$LOG" 2>&1 &
server=$!
for attempt in $(seq 600); do
  curl --silent --fail --output /dev/null http://127.0.0.1:8017/healthz && break
  sleep 0.2
done
curl --silent --fail -F image=@"$IMAGE" -F 'question=Where is the disc?' http://127.0.0.1:8017/v1/answer
kill -INT $server
wait $server
"""


# Serves with little shared memory, and uploads more than it holds, then an image.
LITTLE_SPACE = """
mount -t tmpfs -o size=3m none /dev/shm || exit 77
"$PYTHON" -m preceptor serve "$VQA" "$SEGMENTATION" --port 8018 > "$LOG" 2>&1 &
server=$!
for attempt in $(seq 600); do
  curl --silent --fail --output /dev/null http://127.0.0.1:8018/healthz && break
  sleep 0.2
done
curl --silent --write-out ' %{http_code}\n' -F image=@"$LARGE" -F question=? http://127.0.0.1:8018/v1/answer
curl --silent --write-out ' %{http_code}\n' -F t1=@"$LARGE" http://127.0.0.1:8018/v1/segment
curl --silent --write-out ' %{http_code}\n' -F t1=@"$HALF" http://127.0.0.1:8018/v1/segment
curl --silent -o /dev/null --write-out '%{http_code}\n' -F image=@"$IMAGE" -F question=? http://127.0.0.1:8018/v1/answer
kill -INT $server
wait $server
"""


def start(*arguments: object) -> tuple[subprocess.Popen[str], str]:
    """Start the server on a free port; return the process and its address."""
    command = [sys.executable, "-m", "preceptor", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
    assert address is not None
    return process, address[0]


def wait_until_ready(address: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{address}/healthz", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError("the models were not loaded within two minutes")


def uploads_of(process: subprocess.Popen[str]) -> Path:
    """Return the folder of the uploads, on which a server holds a lock. Other tests may run servers, too."""
    opened = {entry.readlink() for entry in Path(f"/proc/{process.pid}/fd").iterdir() if entry.is_symlink()}
    (folder,) = (path for path in opened if path.name.startswith("preceptor-serve-"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_server_answers_and_leaves_nothing_behind(number: signal.Signals) -> None:
    process, address = start(templates() / "vqa", templates() / "segmentation")
    try:
        wait_until_ready(address)
        with urllib.request.urlopen(f"{address}/v1/models", timeout=5) as opened:
            assert [model["name"] for model in json.load(opened)["models"]] == ["vqa", "segmentation"]
        uploads = uploads_of(process)
        assert uploads.is_dir()
    finally:
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode in (0, -number), output
    assert output.strip() == ""
    assert not uploads.exists()


@pytest.mark.slow
def test_a_second_interruption_ends_it_at_once_and_cleanly() -> None:
    process, address = start(templates() / "vqa")
    wait_until_ready(address)
    uploads = uploads_of(process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert output.strip() == ""
    assert not uploads.exists()


@pytest.mark.slow
@pytest.mark.parametrize("interruptions", [1, 2])
def test_a_client_that_stalls_does_not_keep_the_server_from_stopping(interruptions: int) -> None:
    process, address = start(templates() / "grounding")
    wait_until_ready(address)
    uploads = uploads_of(process)
    with half_a_request(address):
        time.sleep(1)  # until the request has begun
        for _ in range(interruptions):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)  # two signals at a time are one
        output, _ = process.communicate(timeout=45)  # below the 60 s after which the upload is refused
    assert process.returncode == 0
    # One line of uvicorn may say that the request was cancelled. No traceback follows.
    assert output.count("\n") <= 1, output
    assert not uploads.exists()


@pytest.mark.slow
def test_the_uploads_of_a_killed_server_are_removed_by_the_next_one() -> None:
    killed, _ = start(templates() / "vqa")
    left = uploads_of(killed)
    running, address = start(templates() / "vqa")
    try:
        wait_until_ready(address)
        assert left.is_dir(), "its server still runs"
    finally:
        killed.kill()
        killed.communicate(timeout=60)
    last, _ = start(templates() / "vqa")
    assert not left.exists()
    assert uploads_of(running).is_dir()
    for process in (running, last):
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@pytest.mark.slow
def test_no_network_is_needed(tmp_path: Path) -> None:
    if not all(map(shutil.which, ("unshare", "ip", "curl"))):
        pytest.skip("needs unshare, ip and curl")
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a network namespace")
    environment = {
        "PYTHON": sys.executable,
        "MODEL": str(templates() / "vqa"),
        "IMAGE": str(templates() / "image.png"),
        "LOG": str(tmp_path / "log.txt"),
    }
    done = subprocess.run(
        ["unshare", "-n", "bash", "-c", WITHOUT_NETWORK], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr + (tmp_path / "log.txt").read_text()
    assert len(json.loads(done.stdout)["answers"]) == 3


@pytest.mark.slow
def test_a_large_upload_lies_in_the_folder_of_uploads_while_it_is_received() -> None:
    process, address = start(templates() / "vqa")
    try:
        wait_until_ready(address)
        uploads = uploads_of(process)
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        connection.putrequest("POST", "/v1/answer")
        connection.putheader("Content-Type", "multipart/form-data; boundary=x")
        connection.putheader("Content-Length", str(2**23))
        connection.endheaders()
        head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        connection.send(head + bytes(2**22))  # half of it: the server waits for the rest
        received: list[Path] = []
        end = time.monotonic() + 60
        while not received and time.monotonic() < end:
            opened = [entry.readlink() for entry in Path(f"/proc/{process.pid}/fd").iterdir() if entry.is_symlink()]
            received = [path for path in opened if path.name.endswith("(deleted)")]
        assert [path.parent for path in received] == [uploads]
        connection.close()
    finally:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output


@pytest.mark.slow
def test_full_shared_memory_is_status_507_and_the_server_goes_on(tmp_path: Path) -> None:
    if not all(map(shutil.which, ("unshare", "mount", "curl"))):
        pytest.skip("needs unshare, mount and curl")
    for name, size in (("large", 2**22), ("half", 2**21)):
        (tmp_path / name).write_bytes((bytes(128) + b"DICM").ljust(size, b"\0"))
    environment = {
        "PYTHON": sys.executable,
        "VQA": str(templates() / "vqa"),
        "SEGMENTATION": str(templates() / "segmentation"),
        "IMAGE": str(templates() / "image.png"),
        "LARGE": str(tmp_path / "large"),
        "HALF": str(tmp_path / "half"),
        "LOG": str(tmp_path / "log.txt"),
    }
    command = ["unshare", "--map-root-user", "--mount", "bash", "-c", LITTLE_SPACE]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("this user may not make a mount namespace")
    refused = '{"detail":"the server has no space left for the files of this request; try again later"} 507'
    # Of the second volume, the received copy has space and the one in the folder of the case has not.
    assert done.stdout.splitlines() == [refused, refused, refused, "200"]
    assert (tmp_path / "log.txt").read_text().count("\n") == 1, "only the address"


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "token.txt").write_text("\n")
    for arguments, says in (
        (("serve", tmp_path / "none"), "none"),
        (("serve", tmp_path), "config.json"),
        (("serve", templates() / "vqa", "--host", "0.0.0.0"), "set a token"),
        (("serve", templates() / "vqa", "--token-file", tmp_path / "token.txt"), "is empty"),
        (("serve", templates() / "vqa", templates() / "vqa"), "given twice"),
        (("serve", templates() / "vqa", "--port", "70000"), "between 0 and 65535"),
        (("serve", templates() / "vqa", "--device", "gpu"), "the device 'gpu' cannot be used here"),
        (("serve", templates() / "vqa", "--device", "meta"), "available: cpu"),
    ):
        code, _, err = call(*arguments)
        assert code == 2, err
        assert says in err
        assert "Traceback" not in err


@pytest.mark.slow
def test_the_server_stops_if_no_model_can_be_loaded(tmp_path: Path) -> None:
    shutil.copytree(templates() / "vqa", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    process, _ = start(tmp_path / "damaged")
    uploads = uploads_of(process)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.startswith(f"error: {tmp_path / 'damaged'}")
    assert "Traceback" not in output
    assert not uploads.exists()
