"""What a training step costs with a teacher's cached tokens, compared with the baseline. Prints ratios of one run.

    python bench/cached_topk.py                              # a small Qwen2-VL, 2,000 tokens
    python bench/cached_topk.py --vocabulary-size 151936     # that of Qwen2-VL: most of a step is then the loss

A step is reading, images and tokens, the forward pass, the loss in chunks, the backward pass and AdamW. Baseline:
cross-entropy. Cached: (0.5 KL + CE) / 1.5 with the K most likely tokens of a teacher of the same shape, found by
content key in memory-mapped files. Online: the same with the teacher's own forward pass and its whole vocabulary. The
steps take turns on the same batches, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--vocabulary-size", type=int, default=None, help="pad the vocabulary to so many tokens")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import numpy as np
    import torch
    from PIL import Image

    from preceptor.data.types import Dialogue
    from preceptor.distill.chunked_kl import chunked_cross_entropy, distillation_loss
    from preceptor.environment import machine
    from preceptor.grounding.model import GroundedVlm
    from preceptor.grounding.new_vlm import new_vlm
    from preceptor.grounding.pseudo_labels import ContentHashes
    from preceptor.grounding.topk_cache import TopKCache, answers_key, topk_cache_key, write_topk_cache
    from preceptor.task import HiddenTeacher

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        generator = np.random.default_rng(0)
        rows = []
        for number in range(args.batch * 4):
            file = root / f"{number}.png"
            Image.fromarray(generator.integers(0, 255, (224, 224, 3), np.uint8)).save(file)
            answer = f"A nodule in the upper left part, at <|box_start|>({number},345),(567,890)<|box_end|>."
            turns = ((f"Where is the nodule of case {number}? Answer with boxes.", answer),)
            rows.append(Dialogue(str(number), (file,), turns, "vg", "x", str(number), "train"))
        corpus = [text for row in rows for turn in row.turns for text in turn]
        folder = new_vlm(root / "model", corpus, size=args.size)
        models = {name: GroundedVlm.load(folder) for name in ("baseline", "cached", "online", "teacher")}
        if args.vocabulary_size:
            for model in models.values():
                model.base.resize_token_embeddings(args.vocabulary_size, mean_resizing=False)
        teacher = models.pop("teacher").requires_grad_(False).eval()
        vocabulary_size = len(teacher.lm_head_weight)
        cache_key = topk_cache_key(teacher, teacher.encoder.tokenizer, vocabulary_size, "bench", k=args.k)
        hashes = ContentHashes()
        begun = time.perf_counter()
        write_topk_cache(root / "cache", teacher, rows, cache_key, hashes)
        written = time.perf_counter() - begun
        cache = TopKCache.open(root / "cache", cache_key)
        optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-5) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        reading: list[float] = []
        for number in range(args.steps + 2):
            picked = [rows[(number * args.batch + i) % len(rows)] for i in range(args.batch)]
            for name, model in models.items():
                begun = time.perf_counter()
                batch = model.encoder.collate([model.encoder.encode(row) for row in picked])
                hidden, targets, _ = model.hidden(batch)
                weight = model.lm_head_weight
                if name == "baseline":
                    loss = chunked_cross_entropy(hidden, weight, targets)
                elif name == "cached":
                    before = time.perf_counter()
                    teacher_tokens = cache.gather([answers_key(row, hashes) for row in picked], targets)
                    reading.append(time.perf_counter() - before)
                    loss = distillation_loss(hidden, weight, targets, teacher_tokens).loss
                else:
                    far = teacher.lm_head_weight
                    with torch.no_grad():
                        states = teacher.hidden(batch)
                    loss = distillation_loss(hidden, weight, targets, HiddenTeacher(states.hidden, far)).loss
                loss.div(len(targets)).backward()
                optimizers[name].step()
                optimizers[name].zero_grad(set_to_none=True)
                if number >= 2:
                    times[name].append(time.perf_counter() - begun)
        size = sum(file.stat().st_size for file in (root / "cache").iterdir())
        tokens = cache.tokens
    plain = times["baseline"]
    for name, values in times.items():
        # Of the same batch each, so that the ratio is not one of two moments of the machine.
        ratio = statistics.median(a / b for a, b in zip(values, plain, strict=True))
        print(f"{name:11s} {1000 * statistics.median(values):8.1f} ms a step   ratio {ratio:.3f}")
    print(f"reading the cache {1000 * statistics.median(reading):.2f} ms a step; written in {written:.1f} s")
    print(
        json.dumps(
            {
                "vocabulary_size": vocabulary_size,
                "k": args.k,
                "batch": args.batch,
                "steps": args.steps,
                "size": args.size,
                "tokens": tokens,
                "bytes_per_1000_tokens": round(1000 * size / tokens),
                "threads": torch.get_num_threads(),
                **machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
