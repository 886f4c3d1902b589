"""A made-up run folder of a segmentation, as a run writes it: no network was trained for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import nibabel
import numpy as np

from preceptor.data.types import Case, SegmentationDataset, VolumeFile
from preceptor.recipe import dump_recipe
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.segmentation.figures import write_figures
from preceptor.statistics import paired_bootstrap

MODALITIES = ("flair", "t1", "t1ce", "t2")
REGIONS = {"et": (4,), "tc": (1, 4), "wt": (1, 2, 4)}
SHARES = {"teacher": 0.35, "baseline": 0.62, "distilled": 0.68}


@dataclass
class MadeSegmentation:
    folder: Path
    data: SegmentationDataset
    recipe: SegmentationRecipe


def all_subsets(modalities: Sequence[str]) -> list[str]:
    sizes = range(1, len(modalities) + 1)
    return ["+".join(subset) for size in sizes for subset in combinations(modalities, size)]


def ball(shape: tuple[int, int, int], centre: Sequence[float], radius: float) -> np.ndarray:
    away = [(axis - at) ** 2 for axis, at in zip(np.ogrid[: shape[0], : shape[1], : shape[2]], centre, strict=True)]
    return away[0] + away[1] + away[2] <= radius**2


def save(path: Path, voxels: np.ndarray, affine: np.ndarray) -> VolumeFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return VolumeFile(path)


def make_cases(
    folder: Path, modalities: Sequence[str], regions: dict[str, tuple[int, ...]], count: int, side: int = 20
) -> SegmentationDataset:
    """Return cases of a ball in a head; the files are stored from left to right, and named after a patient."""
    rng, shape = np.random.default_rng(0), (side, side + 4, side - 2)
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])
    cases = []
    for number in range(count):
        name = f"patient-smith-{number}"
        head = ball(shape, np.array(shape) / 2, side * 0.45)
        at = np.array(shape) / 2 + rng.uniform(-3, 3, 3)
        label = np.zeros(shape, np.uint8)
        for place, value in enumerate(sorted({v for values in regions.values() for v in values})):
            label[ball(shape, at, side * (0.28 - 0.07 * place))] = value
        images = {}
        for place, modality in enumerate(modalities):
            voxels = head * (60 + 30 * (label > 0) * (place + 1) + rng.normal(0, 4, shape))
            images[modality] = save(folder / f"{name}_{place}.nii.gz", voxels.astype(np.float32), affine)
        mask = save(folder / f"{name}_seg.nii.gz", label, affine)
        cases.append(Case(f"case-{number}", images, mask, name, "test"))
    return SegmentationDataset("phantom", "by-file", folder, cases, modalities=tuple(modalities), regions=regions)


def scored_rows(seed: int, data: SegmentationDataset, share: float) -> list[dict]:
    """Return a row per case, combination and region, better with more modalities and a larger `share`."""
    rng, own = np.random.default_rng(7), np.random.default_rng(seed)
    subsets, total = all_subsets(data.modalities), len(data.modalities)
    worth = {name: rng.uniform(0.5, 1) for name in subsets if "+" not in name}
    rows = []
    for case in data.samples:
        easy = rng.normal(0, 0.05)
        for subset in subsets:
            parts = subset.split("+")
            level = share * max(worth[part] for part in parts) + 0.2 * len(parts) / total
            for place, region in enumerate(data.regions):
                dice = float(np.clip(level + easy + 0.07 * (place - 1) + own.normal(0, 0.05), 0, 1))
                hd95 = float(60 * (1 - dice)) if dice > 0.1 else None
                rows.append({"id": case.id, "subset": subset, "region": region, "dice": dice, "hd95": hd95})
    return rows


def protocol_of(rows: list[dict]) -> dict:
    subsets: dict[str, dict] = {}
    for name in dict.fromkeys(row["subset"] for row in rows):
        scores: dict[str, dict] = {"dice": {}, "hd95": {}}
        for region in dict.fromkeys(row["region"] for row in rows):
            for key in scores:
                held = [r[key] for r in rows if (r["subset"], r["region"]) == (name, region) and r[key] is not None]
                scores[key][region] = float(np.mean(held)) if held else None
        subsets[name] = scores
    regions = {
        region: float(np.mean([scores["dice"][region] for scores in subsets.values()]))
        for region in subsets[next(iter(subsets))]["dice"]
    }
    return {
        "metric": "dice",
        "dice": float(np.mean(list(regions.values()))),
        "n": len({row["id"] for row in rows}),
        "regions": regions,
        "hd95": dict.fromkeys(regions, 9.5),
        "subsets": subsets,
    }


def make_elections(rng: np.random.Generator, modalities: Sequence[str], regions: Sequence[str], votes: int) -> list:
    found = []
    for vote in range(votes):
        scores = {r: {m: float(min(1, 0.1 + 0.06 * vote + rng.uniform(0, 0.25))) for m in modalities} for r in regions}
        elected = {region: max(modalities, key=lambda m, r=region: scores[r][m]) for region in regions}
        overall = max(modalities, key=lambda m: sum(scores[r][m] for r in regions))
        found.append({"step": 50 * vote, "soft_dice": scores, "elected": elected, "overall": overall})
    return found


def write_predicted(
    folder: Path, data: SegmentationDataset, subsets: Sequence[str], rng: np.random.Generator, cases: int
) -> None:
    for case in data.samples[:cases]:
        assert case.mask is not None
        source = nibabel.load(case.mask.path)
        label = np.asarray(source.dataobj)
        for subset in subsets:
            moved = np.roll(label, int(rng.integers(0, 3)), axis=0).astype(np.uint8)
            save(folder / f"{case.id}__{subset}.nii.gz", moved, source.affine)


def make_stage(
    folder: Path, name: str, data: SegmentationDataset, recipe: SegmentationRecipe, seed: int, masks: int, votes: int
) -> dict:
    rng = np.random.default_rng(seed)
    modalities, regions = data.modalities, list(data.regions)
    base = f"{data.name}/{data.variant}/A"
    rows = {base: scored_rows(seed, data, SHARES.get(name, 0.6))}
    rows[f"{base}-post"] = [row | {"dice": min(1.0, row["dice"] + 0.013)} for row in rows[base]]
    (folder / "predictions").mkdir(parents=True)
    for protocol, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "predictions" / f"{protocol.replace('/', '-')}.jsonl").write_text(text, "utf-8")
    lines = []
    for step in range(1, 201):
        fall = float(np.exp(-step / 60) + rng.normal(0, 0.02))
        line = {"step": step, "epoch": step / 30, "lr": 1e-3, "grad_norm": 1.0, "loss": 2 * fall, "dice": fall + 0.2}
        line |= {"bce": 0.6 * fall, "samples/s": 3.2}
        if name == "distilled":
            line |= {"cross_modal": 0.3 * fall, "full/output": 0.2 * fall}
        lines.append(line)
        if step % 20 == 0:
            lines.append({"step": step, "validation/score": 0.7 * (1 - float(np.exp(-step / 70)))})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    protocols = {protocol: protocol_of(found) for protocol, found in rows.items()}
    by_subset = protocols[base]["subsets"].items()
    results = {
        "stage": name,
        "protocols": protocols,
        "describes": {base: "Dice by case, both empty is 1", f"{base}-post": "the same after post-processing"},
        "notes": ["Generated volumes: the numbers show nothing about medicine."],
        "modalities": list(modalities),
        "regions": regions,
        "elections": make_elections(rng, modalities, regions, votes) if name == "distilled" else [],
        "validation_subsets": {subset: {r: v * 0.98 for r, v in s["dice"].items()} for subset, s in by_subset},
        "parameters": 1_234_567,
        "latency_ms": 431.2,
        "latency": "one case with all its modalities, float32",
        "seed": seed,
        "versions": {"preceptor": "0.1.0", "torch": "2.13.0", "monai": "1.5.0"},
        "machine": {"processor": "Xeon", "threads": 2},
        "data": {
            "name": data.name,
            "variant": data.variant,
            "sha256": data.fingerprint(),
            "test_sha256": data.fingerprint("test"),
            "train": 60,
            "validation": 20,
            "test": len(data.samples),
        },
        "training": {
            "steps": 200,
            "best_step": 180,
            "kept_step": 180,
            "seconds": 612.4,
            "samples_per_second": 3.2,
            "skipped": [],
            "validations": [{"step": 180, "score": 0.65}],
        },
    }
    if masks:
        shown = ["+".join(modalities[:size]) for size in range(len(modalities), 0, -1)][:4]
        write_predicted(folder / "predictions" / "masks", data, shown, rng, masks)
    (folder / "results.json").write_text(json.dumps(results), "utf-8")
    write_figures(folder, data, recipe, rows)
    return results


def by_case(folder: Path, protocol: str, regions: Sequence[str]) -> np.ndarray:
    rows = [json.loads(s) for s in (folder / "predictions" / f"{protocol.replace('/', '-')}.jsonl").open()]
    ids = dict.fromkeys(row["id"] for row in rows)
    held = {(id, region): [] for id in ids for region in regions}
    for row in rows:
        held[row["id"], row["region"]].append(row["dice"])
    return np.array([[np.mean(held[id, region]) for region in regions] for id in ids])


def make_segmentation(
    root: Path,
    *,
    stages: Sequence[str] = ("teacher", "baseline", "distilled"),
    modalities: Sequence[str] = MODALITIES,
    regions: dict[str, tuple[int, ...]] | None = None,
    cases: int = 5,
    masks: int = 2,
    votes: int = 4,
    data: SegmentationDataset | None = None,
) -> MadeSegmentation:
    """Write a run folder below `root`, and cases beside it unless `data` are given."""
    regions = regions or REGIONS
    data = data or make_cases(root / "jane-doe", modalities, regions, cases)
    folder = root / "run"
    recipe = SegmentationRecipe.model_validate(
        {
            "name": "toy-<run>",
            "description": "A toy",
            "output": str(folder),
            "stages": list(stages),
            "data": {
                "name": "volumes",
                "root": str(data.root),
                "split_file": "jane-doe/split.csv",
                "modalities": list(modalities),
                "regions": {r: list(v) for r, v in regions.items()},
            },
        }
    )
    several = len(stages) > 1
    folder.mkdir(parents=True)
    found = {}
    for seed, name in enumerate(stages):
        place, last = folder / name if several else folder, name == stages[-1]
        found[name] = make_stage(place, name, data, recipe, seed, masks if last else 0, votes)
    if several:
        results = {"protocols": found[stages[-1]]["protocols"], "stages": found, "comparison": {}, "seed": 0}
        if {"baseline", "distilled"} <= set(stages):
            for protocol in results["protocols"]:
                mine, theirs = (by_case(folder / name, protocol, list(regions)) for name in ("distilled", "baseline"))
                entry = difference(mine.mean(1), theirs.mean(1)) | {
                    "interval": "95 %, the wider of paired bootstrap and analysis of variance over cases, one seed",
                    "regions": {r: difference(mine[:, i], theirs[:, i]) for i, r in enumerate(regions)},
                }
                results["comparison"][protocol] = {"distilled - baseline": entry}
        results |= {key: found[stages[-1]][key] for key in ("versions", "data", "notes")}
        (folder / "results.json").write_text(json.dumps(results), "utf-8")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), "utf-8")
    return MadeSegmentation(folder, data, recipe)


def difference(mine: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    found = paired_bootstrap(mine, theirs)
    return {"difference": found.mean, "low": found.low, "high": found.high}
