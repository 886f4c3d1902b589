"""Trainings in two processes that are forked from one that has imported everything, so that a start costs no time.

No launcher watches the processes: what ends here, ends with every launcher.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
HANG = 300  # seconds after which a process counts as one that never ends


def fork_pair(arguments: list[str], folder: Path, fault: Callable[[int], object] = bool) -> list[int]:
    """Run the command line in two processes and return their ids.

    Their output goes to ``folder / "log-of-RANK"``, overwriting it. Each process first calls `fault` with its rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_fork(arguments, folder / f"log-of-{rank}", rank, port, fault) for rank in (0, 1)]


def _fork(arguments: list[str], log: Path, rank: int, port: int, fault: Callable[[int], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        import preceptor.cli.app

        fault(rank)
        sys.argv = ["preceptor", *arguments]
        preceptor.cli.app.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        os._exit(code)


def wait_pair(pids: list[int]) -> list[int]:
    """Return the exit codes, negative for a signal. A process that does not end is killed, and its code is -9."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + HANG
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            if time.monotonic() > deadline:
                os.kill(pid, 9)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def run_pair(arguments: list[str], folder: Path, fault: Callable[[int], object] = bool) -> tuple[list[int], str]:
    """Return the exit codes of a training in two processes, and what both wrote."""
    codes = wait_pair(fork_pair(arguments, folder, fault))
    return codes, "".join((folder / f"log-of-{rank}").read_text() for rank in (0, 1))


def run_scenario(module: str, name: str, folder: Path) -> None:
    """Call a function of a test module in a process of its own, which may fork."""
    program = (
        "import torch; torch.set_num_threads(1)\n"
        "import preceptor.vqa.experiment, preceptor.vqa.report, preceptor.vqa.model_card, transformers, pathlib\n"
        "import preceptor.grounding.experiment\n"
        f"from {module} import {name}\n"
        f"{name}(pathlib.Path({str(folder)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-6000:]
