"""Tables of results. To be replaced by the `summary` of the tasks' reports."""

from __future__ import annotations

from typing import Any

from preceptor.cli.terminal import percent, table


def show(results: dict[str, Any]) -> None:
    """Print what each stage of a run reached, with the baselines."""
    stages = results.get("stages") or {results.get("stage", "model"): results}
    if "regions" in results:
        return show_segmentation(results, stages)
    if any("tasks" in scores for scores in results["protocols"].values()):
        return show_grounding(results, stages)
    for protocol, scores in results["protocols"].items():
        rows = []
        for name, stage in stages.items():
            s = stage["protocols"][protocol]
            rows.append(
                [
                    name,
                    *(percent(s[key]) for key in ("accuracy", "open", "closed")),
                    f"{stage['parameters'] / 1e6:.2f} M" if "parameters" in stage else "",
                    f"{stage['latency_ms']:.1f}" if stage.get("latency_ms") is not None else "",
                ]
            )
        last = list(stages.values())[-1]
        for name, s in last["baselines"][protocol].items():
            rows.append([name.replace("_", " "), *(percent(s[key]) for key in ("accuracy", "open", "closed")), "", ""])
        ceiling = percent(scores["ceiling"])
        title = f"{protocol} (n = {scores['n']}, answer ceiling {ceiling})"
        table(title, ["model", scores["metric"], "open", "closed", "parameters", "ms / question"], rows)
        for name, value in results.get("comparison", {}).get(protocol, {}).items():
            if isinstance(value, dict):
                print(
                    f"{name}: {100 * value['difference']:+.1f} points, {value['interval']}: "
                    f"{100 * value['low']:+.1f} to {100 * value['high']:+.1f}"
                )
            else:
                print(f"{name}: {100 * value:.1f} %")
    for note in results.get("notes", []):
        print(f"note: {note}")


def show_segmentation(results: dict[str, Any], stages: dict[str, Any]) -> None:
    """Print the Dice of every subset by region and stage, means, parameters and milliseconds."""
    regions = results["regions"]
    for protocol, scores in results["protocols"].items():
        # Three stages and three regions fit 80 characters as long as the stages' names are said above.
        heads = {stage: stage if len(stages) == 2 else f"{i}" for i, stage in enumerate(stages, 1)}
        columns = [f"{region}\n{heads[stage]}" if len(stages) > 1 else region for region in regions for stage in stages]
        legend = "; " + ", ".join(f"{i} {stage}" for i, stage in enumerate(stages, 1)) if len(stages) > 2 else ""
        rows = []
        shown = scores["subsets"] if protocol == next(iter(results["protocols"])) else []  # of the others the means
        for subset in [*shown, None]:
            cells = []
            for region in regions:
                for stage in stages.values():
                    own = stage["protocols"][protocol]
                    cells.append(percent((own["subsets"][subset]["dice"] if subset else own["regions"])[region]))
            rows.append([subset or f"mean of {len(scores['subsets'])}", *cells])
        table(f"{protocol}: Dice (n = {scores['n']} cases){legend}", ["modalities", *columns], rows)
        for name, value in results.get("comparison", {}).get(protocol, {}).items():
            print(
                f"{name}: {100 * value['difference']:+.1f} points of mean Dice, {value['interval']}: "
                f"{100 * value['low']:+.1f} to {100 * value['high']:+.1f}"
            )
    rows = [
        [
            name,
            percent(next(iter(stage["protocols"].values()))["dice"]),
            f"{stage['parameters'] / 1e6:.2f} M" if "parameters" in stage else "",
            f"{stage['latency_ms']:.0f}" if stage.get("latency_ms") is not None else "",
        ]
        for name, stage in stages.items()
    ]
    table("models", ["model", "mean Dice", "parameters", "ms / case"], rows)
    for note in results.get("notes", []):
        print(f"note: {note}")


def show_grounding(results: dict[str, Any], stages: dict[str, Any]) -> None:
    """Print each task's score by stage, with what each part of the method adds."""
    from preceptor.grounding.metrics import MAIN

    for protocol, scores in results["protocols"].items():
        rows = []
        for name, stage in stages.items():
            chosen = stage.get("selection", {}).get("protocols", {}).get(protocol)
            for title, own, seconds in (
                (name, stage["protocols"][protocol], stage.get("latency_ms")),
                (f"{name}, chosen", chosen, 1000 * stage.get("selection", {}).get("seconds_per_answer", 0)),
            ):
                if own is not None:
                    cells = [percent(own["mean"].get(task, {}).get(metric)) for task, metric in MAIN.items()]
                    size = f"{stage['parameters'] / 1e6:.2f} M" if "parameters" in stage else ""
                    cells += [size, "" if seconds is None else f"{seconds:.0f}"]
                    rows.append([title, *cells])
        heads = ["model", "recall@0.5", "ROC accuracy", "RC ROUGE-L", "mBMR", "weights", "ms / answer"]
        table(f"{protocol} (n = {scores['n']})", heads, rows)
        for pair, tasks in results.get("comparison", {}).get(protocol, {}).items():
            said = ", ".join(
                f"{t} {100 * d['difference']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f})"
                for t, d in tasks.items()
            )
            print(f"{pair}: {said}")
    notes = [*results.get("notes", []), *(note for s in results["protocols"].values() for note in s["notes"])]
    for note in dict.fromkeys(notes):
        print(f"note: {note}")
