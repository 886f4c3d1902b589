"""One recipe trained with several seeds, and the comparison over them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preceptor.comparison.run import compare_seeds, write_comparison
from preceptor.config import BaseRecipe
from preceptor.distributed import processes
from preceptor.errors import UserError
from preceptor.pipeline.run import exclusive, run
from preceptor.tasks import module

log = logging.getLogger("preceptor")


def train_seeds(recipe: BaseRecipe, seeds: int | Sequence[int]) -> tuple[Path, dict[str, Any]]:
    """Train a recipe once per seed into ``OUTPUT/seed-N`` (each resumes) and compare the stages over all seeds.

    Args:
        recipe: the recipe; its own seed is the first one if `seeds` is a number.
        seeds: number of seeds, or the seeds themselves.

    Returns:
        The output folder, and the document of the comparison, which is also written to ``OUTPUT/compare``.

    Raises:
        UserError: no seed is given, or one is given twice.
    """
    chosen = list(range(recipe.seed, recipe.seed + seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"seeds must be at least one number, each once, not {seeds}")
    root = recipe.output_folder
    folders = [root / f"seed-{seed}" for seed in chosen]
    document: dict[str, Any] = {}
    with exclusive(root):
        for seed, folder in zip(chosen, folders, strict=True):
            log.info("seed %s", seed)
            own = recipe.model_copy(deep=True)
            own.seed, own.output = seed, str(folder)
            if "phantom" in recipe.data.name and recipe.data.root is None:
                own.data.root = str(root / "data")  # generated once for all seeds
            run(module(recipe.task, "experiment").EXPERIMENT, own)
        if processes().is_main_process:
            document = write_comparison(compare_seeds(folders), root / "compare")
        processes().wait_for_everyone()
    return root, document
