"""KL and cross-entropy over a large vocabulary: chunked against plain, in memory, time and gradients.

    python bench/chunked_kl.py                  # 2,048 tokens x a vocabulary of 151,936, width 1,536, as Qwen2-VL-2B
    python bench/chunked_kl.py --tokens 512 --repeats 3

"Plain" computes the loss as the code published with ClinKD does: full logits of both models, cross_entropy, log_softmax
and softmax at the temperature, kl_div. Each run is a separate process. Its memory is the peak resident set (ru_maxrss)
minus the resident set after both models' weights and hidden states are allocated: the memory of the loss and its
gradients. "Above" is this memory without the returned gradients, which no method can avoid; the gradient of the output
weights is as large as the weights. With --frozen there is none. The time is that of the forward and the backward pass.
Runs of both methods alternate. For Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary-size", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--chunk", type=int, default=None, help="tokens at a time; default: the library's")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--frozen", action="store_true", help="output weights that do not learn, as with adapters")
    parser.add_argument("--way", choices=("plain", "chunked"), help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        run(args)
        return
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "chunked": []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.repeats):
            for way, rows in found.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
                if number == 0:
                    command += ["--write", str(Path(scratch) / f"{way}.safetensors")]
                rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        distance = differences(Path(scratch))
    memory = {way: max(row["bytes"] for row in rows) for way, rows in found.items()}
    above = {way: memory[way] - found[way][0]["gradients"] for way in found}
    seconds = {way: statistics.median(row["seconds"] for row in rows) for way, rows in found.items()}
    print(
        f"{args.tokens} tokens x vocabulary of {args.vocabulary_size}, width {args.width}, {args.dtype}, "
        f"{found['plain'][0]['threads']} threads, {args.repeats} runs of each"
    )
    for way in found:
        print(
            f"{way:8} {memory[way] / 2**30:6.2f} GiB, {above[way] / 2**30:.2f} above; {seconds[way]:.1f} s; "
            f"loss {found[way][0]['loss']:.6f}"
        )
    print(
        f"memory: plain / chunked = {memory['plain'] / memory['chunked']:.1f}, "
        f"above {above['plain'] / above['chunked']:.1f}"
    )
    print(f"time:   chunked / plain = {seconds['chunked'] / seconds['plain']:.2f}")
    for name, value in distance.items():
        print(f"gradient to {name}: largest difference {value:.1e} of its largest value")


def run(args: argparse.Namespace) -> None:
    import torch
    import torch.nn.functional as F

    from preceptor.distill.chunked_kl import CHUNK, HiddenTeacher, distillation_loss

    g, dtype = torch.Generator().manual_seed(0), getattr(torch, args.dtype)

    def draw(rows: int, scale: float) -> Any:
        return torch.randn(rows, args.width, generator=g).mul_(scale).to(dtype)

    # Hidden states after a norm are about 1; logits then have a standard deviation of about 3.
    scale = 3 / args.width**0.5
    hidden = draw(args.tokens, 1.0).requires_grad_()
    weight = draw(args.vocabulary_size, scale).requires_grad_(not args.frozen)
    teacher_hidden, teacher_weight = draw(args.tokens, 1.0), draw(args.vocabulary_size, scale)
    targets = torch.randint(0, args.vocabulary_size, (args.tokens,), generator=g)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    begun = time.perf_counter()
    if args.way == "plain":
        student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
        entropy = F.cross_entropy(student.float(), targets)
        log_q = F.log_softmax(student.float() / 0.5, dim=-1)
        p = F.softmax(teacher.float() / 0.5, dim=-1)
        loss = (0.5 * F.kl_div(log_q, p, reduction="batchmean") + entropy) / 1.5
    else:
        weights = torch.full((args.tokens,), 1 / args.tokens)
        teach = HiddenTeacher(teacher_hidden, teacher_weight)
        loss = distillation_loss(hidden, weight, targets, teach, weights_T=weights, chunk=args.chunk or CHUNK).loss
    loss.backward()
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if args.write:
        from safetensors.torch import save_file

        slopes = {"hidden states": hidden.grad, "output weights": weight.grad}
        save_file({name: value for name, value in slopes.items() if value is not None}, args.write)
    returned = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, weight) if x.grad is not None)
    row = {"bytes": peak, "gradients": returned, "seconds": seconds, "loss": loss.item()}
    print(json.dumps(row | {"threads": torch.get_num_threads()}))


def differences(folder: Path) -> dict[str, float]:
    """Return the largest difference of each gradient, as a share of its largest value."""
    from safetensors.torch import load_file

    plain, chunked = (load_file(folder / f"{way}.safetensors") for way in ("plain", "chunked"))
    return {name: float((chunked[name].sub_(plain[name])).abs().max() / plain[name].abs().max()) for name in plain}


if __name__ == "__main__":
    main()
