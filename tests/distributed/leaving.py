"""Exit as a member of a process group, and write down what the interpreter finds when it ends.

With the argument "pending", the second process exits with code 2 while it waits for the first one, which does not come.
"""

import atexit
import os
import sys
import time
from pathlib import Path

import torch.distributed

import preceptor.distributed
from preceptor.distributed import broadcast_from_main, processes


def record(folder: Path, rank: int) -> None:
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    gloo = sum("gloo" in name for name in threads)
    (folder / f"end-of-{rank}.txt").write_text(f"{torch.distributed.is_initialized()} {gloo}")


if __name__ == "__main__":
    folder, situation = Path(sys.argv[1]), sys.argv[2]
    rank = int(os.environ["RANK"])
    atexit.register(record, folder, rank)  # the last one to be registered is the first to be called
    state = processes()
    assert broadcast_from_main(state.process_index) == 0
    if situation == "pending":
        preceptor.distributed.LEAVE_SECONDS = 1
        if state.is_main_process:
            time.sleep(3600)
        torch.distributed.all_reduce(torch.ones(4), async_op=True)
        sys.exit(2)
