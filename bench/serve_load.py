"""Load on `preceptor serve`: requests at the same time, memory over many requests, and malformed requests.

    python bench/serve_load.py runs/mhkd-demo --image IMAGE.png
    python bench/serve_load.py runs/mhkd-demo --image IMAGE.png --requests 1000 --malformed 1000

Starts a server of its own on a free port, with the given model folder of visual question answering, and prints: the
seconds until it listens and until the model is loaded; the latency of 200 requests that are sent together; the resident
memory while 10,000 requests are answered; and the outcomes of 10,000 malformed requests. The client runs on the same
machine, so it takes a part of the processors.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

FORBIDDEN = ("Traceback", "/tmp", "/dev/shm", "/home", "site-packages", ".py")
"""What no response may contain."""


def multipart(fields: dict[str, bytes], file: str | None = "image") -> tuple[bytes, str]:
    """Return a body and its content type; the field `file` gets a file name."""
    boundary = uuid.uuid4().hex
    parts = []
    for name, value in fields.items():
        named = '; filename="DOE_JANE.png"' if name == file else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode()
        parts.append(head + value + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def post(port: int, path: str, body: bytes, content_type: str) -> tuple[int, str, float]:
    """Send a request; return its status, its text and the seconds that it took."""
    begun = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=40)
    try:
        connection.request("POST", path, body, {"content-type": content_type})
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
    finally:
        connection.close()
    return answer.status, text, time.perf_counter() - begun


def damaged(rng: random.Random, image: bytes) -> tuple[str, bytes, str]:
    """Return the path, the body and the content type of a request that is wrong somewhere."""
    path = rng.choice(["/v1/answer", "/v1/segment", "/v1/ask", "/v1/answer/../../etc/passwd", "/v1/cases/x/masks/y"])
    body, content_type = multipart({"image": image, "question": b"Where is the lesion?"})
    kind = rng.randrange(6)
    if kind == 0:
        body = body[: rng.randrange(len(body))]
    elif kind == 1:
        cut = bytearray(body)
        for _ in range(rng.randrange(1, 40)):
            cut[rng.randrange(len(cut))] = rng.randrange(256)
        body = bytes(cut)
    elif kind == 2:
        content_type = rng.choice(["application/json", "text/plain", "multipart/form-data", "", "x" * 500])
    elif kind == 3:
        fields = {"image": rng.randbytes(rng.randrange(3000)), "question": rng.randbytes(rng.randrange(99))}
        body, content_type = multipart(fields | {"top": str(rng.randrange(-9, 999)).encode()})
    elif kind == 4:
        fields = {"question": b"x" * rng.randrange(5000), "model": rng.choice([b"../..", b"none", b"\xff\xfe"])}
        body, content_type = multipart(fields)
    else:
        body = rng.choice([b"", b"{", b"null", b"\0" * 100])
    return path, body, content_type


def resident(process: subprocess.Popen) -> float:
    """Return the resident memory of a process in MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--question", default="Where is the lesion?")
    parser.add_argument("--together", type=int, default=200)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--malformed", type=int, default=10_000)
    args = parser.parse_args(arguments)
    image = args.image.read_bytes()
    begun = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "preceptor", "serve", str(args.model), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        port = int(re.search(r":(\d+)", server.stdout.readline())[1])  # type: ignore[index,union-attr]
        print(f"listens after {time.perf_counter() - begun:.1f} s", flush=True)
        body, content_type = multipart({"image": image, "question": args.question.encode()})

        def ask(_: int = 0) -> tuple[int, str, float]:
            return post(port, "/v1/answer", body, content_type)

        while ask()[0] == 503:
            time.sleep(0.1)
        print(f"answers after {time.perf_counter() - begun:.1f} s", flush=True)
        with ThreadPoolExecutor(args.together) as pool:
            found = list(pool.map(ask, range(args.together)))
        seconds = [row[2] for row in found]
        middle, high, most = (np.quantile(seconds, q) for q in (0.5, 0.95, 1))
        statuses = dict(Counter(row[0] for row in found))
        print(f"{args.together} at once: statuses {statuses}, seconds: median {middle:.2f}, 95 % {high:.2f}, "
              f"most {most:.2f}", flush=True)  # fmt: skip
        memory = [resident(server)]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(10):
                last = Counter(row[0] for row in pool.map(ask, range(args.requests // 10)))
                memory.append(resident(server))
        print(f"{args.requests} requests: last statuses {dict(last)}, MiB {[round(m) for m in memory]}", flush=True)
        rng = random.Random(0)
        inputs = [damaged(rng, image) for _ in range(args.malformed)]
        with ThreadPoolExecutor(8) as pool:
            rows = list(pool.map(lambda given: post(port, *given), inputs))
        leaks = [text for _, text, _ in rows if any(word in text for word in FORBIDDEN) or "DOE_JANE" in text]
        statuses = dict(sorted(Counter(row[0] for row in rows).items()))
        print(f"{args.malformed} malformed: statuses {statuses}, {len(leaks)} with a path, a name or a traceback "
              f"{leaks[:3]}; MiB {resident(server):.0f}", flush=True)  # fmt: skip
        print(f"and then: {json.loads(ask()[1])['answers'][0]}", flush=True)
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    print(f"exit code {server.returncode}; standard error: {errors.strip() or 'empty'}")


if __name__ == "__main__":
    main()
