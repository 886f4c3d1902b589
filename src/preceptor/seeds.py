"""One recipe trained with several seeds, and the comparison over them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preceptor.arguments import as_list, is_integer
from preceptor.comparison.run import compare_seeds, write_comparison
from preceptor.config import BaseRecipe
from preceptor.distributed import processes
from preceptor.errors import UserError
from preceptor.pipeline.run import exclusive, require_layout, run
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
        UserError: no seed is given, one is given twice, or one is not a whole number from 0 to 2**32 - 1; or the output
            folder is itself a run.
    """
    chosen = _chosen_seeds(recipe, seeds)
    root = recipe.output_folder
    folders = [root / f"seed-{seed}" for seed in chosen]
    document: dict[str, Any] = {}
    with exclusive(root):
        require_layout(recipe, "one run per seed")
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


def _chosen_seeds(recipe: BaseRecipe, seeds: Any) -> list[int]:
    chosen = list(range(recipe.seed, recipe.seed + seeds)) if is_integer(seeds) else as_list(seeds, "seeds")
    for seed in chosen:
        if not is_integer(seed) or not 0 <= seed < 2**32:
            raise UserError(f"seeds contains {seed!r}; a seed is a whole number from 0 to {2**32 - 1}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"seeds must be at least one number, each once, not {seeds}")
    return [int(seed) for seed in chosen]
