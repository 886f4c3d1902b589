"""What a program that does not know guided positions makes of a ClinKD model, and what further training repairs.

    python bench/plain_positions.py runs/clinkd-demo/guided --output runs/plain-positions

RUN is a stage that was trained with guided positions. Its test dialogues are answered by

- guided: the model as it was trained;
- plain: the same weights with plain positions, which is what transformers, vLLM and llama.cpp compute;
- further-plain: the weights trained further with plain positions, for `--share` of the epochs;
- further-guided: the same with guided positions, so that a difference is not one of more steps.

Printed: each minus guided, and further-plain minus further-guided.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import yaml

import preceptor
from preceptor.files import write_text
from preceptor.grounding.model import GUIDANCE_FILE
from preceptor.pipeline.run_dir import model_folder
from preceptor.tasks import load_recipe
from seeds import compare, results

PLAIN = {"kind": "none"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.25, help="further training, as a share of the epochs")
    parser.add_argument("--protocol", choices=["birdeval", "strict"], default="birdeval")
    args = parser.parse_args()
    guided, plain = args.run, args.output / "plain"
    if not plain.is_dir():
        unfinished = args.output / "plain.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(guided, unfinished, ignore=shutil.ignore_patterns("checkpoints"))
        write_text(model_folder(unfinished) / GUIDANCE_FILE, json.dumps(PLAIN))
        settings = yaml.safe_load((guided / "recipe.yaml").read_text("utf-8"))
        settings["method"]["guidance"] = PLAIN  # otherwise it would be compared as the same run
        write_text(unfinished / "recipe.yaml", yaml.safe_dump(settings, sort_keys=False))
        preceptor.evaluate(unfinished)
        unfinished.rename(plain)
    recipe = load_recipe(str(guided))
    epochs = args.share * recipe.student.train.epochs
    settings = [
        f"student.model.source={model_folder(guided)}",
        *(f"student.train.{key}={epochs:g}" for key in ("epochs", "evaluate_every", "checkpoint_every")),
    ]
    runs = [guided, plain]
    for name, stage in (("further-plain", "baseline"), ("further-guided", "guided")):
        preceptor.train(str(guided), [*settings, f"stages=[{stage}]", f"name={name}", f"output={args.output / name}"])
        runs.append(args.output / name)
    protocol = next(id for id in results(guided)["protocols"] if id.endswith(f"/{args.protocol}"))
    compare(runs, args.output / "compare", protocol=protocol, baseline=str(guided))
    compare(runs[2:], args.output / "further", protocol=protocol, baseline=str(runs[3]))


if __name__ == "__main__":
    main()
