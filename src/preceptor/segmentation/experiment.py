"""Segmentation with missing modalities as an experiment: its stages, models, scores and files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from preceptor.data.findings import Finding
from preceptor.data.segmentation.check import check_cases
from preceptor.data.segmentation.folders import listed
from preceptor.data.types import Case, SegmentationDataset, Split
from preceptor.distributed import broadcast_from_main, processes
from preceptor.errors import UserError, nearest
from preceptor.files import write_text
from preceptor.pipeline.experiment import SPLITS, Evaluation, Experiment, Stage, Training
from preceptor.pipeline.run_dir import model_folder, read_results, require_same_evaluation, weights_sha256
from preceptor.pipeline.speed import SpeedTest
from preceptor.recipe import read_recipe
from preceptor.scores import Metrics
from preceptor.segmentation import metrics
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.segmentation.data import examples, held_out_batches, hold_out, read_cases
from preceptor.segmentation.dataset import VolumeExamples, WholeCase
from preceptor.segmentation.evaluate import (
    dice_by_case,
    doubts_of_votes,
    mean_by_subset,
    mean_from_all,
    mean_of,
    predict_case,
    score_cases,
    voters,
    votes,
    write_worst,
)
from preceptor.segmentation.figures import write_figures
from preceptor.segmentation.initial_weights import (
    copied_parameters,
    copy_weights,
    load_network,
    require_same_network,
)
from preceptor.segmentation.intensity import bounding_box, foreground
from preceptor.segmentation.lckd import LckdConfig
from preceptor.segmentation.metrics import DESCRIBES, table
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from preceptor.segmentation.model_card import model_card
from preceptor.segmentation.predict import INFERENCE_CONFIG, read_inference_config
from preceptor.segmentation.report import write_report
from preceptor.segmentation.task import SegmentationTask
from preceptor.segmentation.teachers import PartialNetwork, require_same
from preceptor.task import Task


class SegmentationExperiment(Experiment):
    """Segmentation of volumes in which any modality may be missing."""

    task = "segmentation"
    metrics: ClassVar[Metrics] = metrics
    validation_metric = "mean Dice from all modalities"
    packages = ("monai", "nibabel", "scipy")
    recipe: SegmentationRecipe
    data: SegmentationDataset

    @classmethod
    def read_data(cls, recipe: SegmentationRecipe, needed: tuple[Split, ...] = SPLITS) -> SegmentationDataset:
        return read_cases(recipe.data, recipe.output_folder / "data", needed=needed)

    # Training

    def trainings(self, stage: Stage, folder: Path) -> Iterator[Training]:
        recipe, data, state = self.recipe, self.data, processes()
        distils = stage.kind == "distilled"
        teacher = self._teacher_network() if recipe.method.needs_teacher(stage.kind) else None
        held_out = self._held_out if distils else []
        # A stage that holds out cases takes as many steps as the others.
        labelled, validating = len(data.split("train")), examples(recipe, data, "validation", stage.seed)
        train = examples(recipe, data, "train", stage.seed, unlabelled=distils, without=held_out)
        network = self.new_network(stage.seed)
        pretrained: frozenset[str] = frozenset()
        if distils and recipe.method.starts_from_teacher and teacher is not None:
            network.load_state_dict(teacher.state_dict())
            pretrained = frozenset(name for name, _ in network.named_parameters())
        elif recipe.model.init:
            pretrained = self._start_from(network, Path(recipe.model.init))
        task = recipe.method.build_task(
            network,
            stage=stage.kind,
            teacher=teacher,
            votes=lambda student: self._votes(student, validating),
            held_out=held_out_batches(recipe, data, held_out, stage.seed) if held_out else None,
            steps_per_epoch=labelled / recipe.train.batch_size,
            pretrained=pretrained,
            seed=stage.seed,
        )
        if task.teacher is not None:
            task.teacher.to(state.device)
        if held_out:
            data.add_note(
                f"{len(held_out)} training cases were held out of the stage distilled (method.importance.held_out)."
            )
        validation_dice: dict[str, dict[str, float]] = {}

        def validate(_: Task) -> dict[str, float]:
            network.eval()
            scores = dice_by_case(network, validating, recipe)
            network.train()
            self._warn_of_unreadable(validating, "validation")
            validation_dice.clear()
            validation_dice.update(mean_by_subset(scores, validating))
            # A teacher is trained and used with all that a case has, so that no other subset may select its weights.
            selecting = {"": mean_from_all(scores, validating)} if stage.kind == "teacher" else validation_dice
            by_region = {
                region: float(statistics.fmean(means[region] for means in selecting.values()))
                for region in data.regions
            }
            return {"score": mean_of(selecting), **by_region}

        def export(target: Path) -> None:
            network.save(target)
            write_text(target / INFERENCE_CONFIG, json.dumps(self._inference_config(validation_dice), indent=1))

        def summary() -> dict[str, Any]:
            saved = json.loads((folder / "model" / INFERENCE_CONFIG).read_text("utf-8"))
            return {"elections": [], **task.results(), "validation_subsets": saved["validation"]}

        yield Training(
            folder=folder,
            title=stage.name,
            task=task,
            config=recipe.train,
            loader=lambda batches: train.loader(batches, recipe.data.workers),
            samples=len(train),
            epoch_samples=labelled,
            validate=validate,
            export=export,
            resume_config=self._resume_config(stage, task, validating),
            resume_defaults=lambda: self._resume_defaults(stage, folder, validating),
            summary=summary,
        )
        self._store_evaluation_settings(stage, folder)

    def _store_evaluation_settings(self, stage: Stage, folder: Path) -> None:
        """Write the settings of the evaluation into the model, unless it is evaluated. A resume may change them.

        Raises UserError if it was evaluated with other settings.
        """
        file, results = folder / "model" / INFERENCE_CONFIG, read_results(folder) or {}
        if results and results.get("weights_sha256") == weights_sha256(file.parent):
            require_same_evaluation(results, self.evaluation_settings(stage), folder)
        elif processes().is_main_process:
            stored = json.loads(file.read_text("utf-8"))
            stored["inference"] = self.recipe.evaluation.model_dump(mode="json")
            write_text(file, json.dumps(stored, indent=1))

    def _votes(self, student: MultimodalUNet, cases: VolumeExamples) -> Tensor:
        """Return the votes of validation cases, and warn of those that are missing and of what follows."""
        scores = broadcast_from_main(votes(student, cases, self.recipe))
        for sentence in doubts_of_votes(scores, self.data, self.recipe.method):
            self.warn(sentence)
        return scores

    def _start_from(self, network: MultimodalUNet, run: Path) -> frozenset[str]:
        """Give a network the weights of an earlier run, and return the names of the parameters that it has from it."""
        earlier = load_network(model_folder(run), self.data.modalities)
        regions = ", ".join(copy_weights(network, earlier, f"model.init={run}")) or "no region"
        self.data.add_note(f"Initial weights: those of an earlier run (model.init), with its outputs for {regions}.")
        return copied_parameters(network, earlier)

    def new_network(self, seed: int) -> MultimodalUNet:
        """Return a new network; its weights depend on `seed` alone. Raises UserError for sizes that do not fit it."""
        network = MultimodalUNet(self._network_config, seed=seed)
        network.check_size(self.recipe.data.patch_size, "data.patch_size")
        return network

    @property
    def _network_config(self) -> MultimodalUNetConfig:
        model = self.recipe.model
        return MultimodalUNetConfig(
            modalities=tuple(self.data.modalities),
            regions=tuple(self.data.regions),
            net=model.net,
            encoder=model.encoder,
            channels=model.channels,
            fill=model.fill,
            norm_per_modality=model.norm_per_modality,
            arguments=model.arguments,
        )

    def require_checkpoints(self) -> None:
        method, init = self.recipe.method, self.recipe.model.init
        if init:
            earlier = load_network(model_folder(Path(init)), self.data.modalities)
            require_same_network(self._network_config, earlier.config, f"model.init={init}")
        self.recipe.require_distillation(self.data.modalities)
        if "distilled" in self.recipe.stages:
            teacher: nn.Module | None = None
            if method.needs_teacher("distilled"):
                teacher = self._teacher_network() if method.teacher_runs() else self.new_network(self.recipe.seed)
            assert self._held_out is not None  # refuses an overlap
            # Refuses terms that do not fit the networks before the stages that come first are trained.
            no_votes = torch.zeros(len(self.data.modalities), len(self.data.regions))
            method.build_task(
                self.new_network(self.recipe.seed), stage="distilled", teacher=teacher, votes=lambda _: no_votes
            )

    @cached_property
    def _held_out(self) -> list[Case]:
        """The training cases that the stage `distilled` does not train on. Raises UserError for an overlap."""
        share = self.recipe.method.held_out_share
        return hold_out(self.data, share, self.recipe.data.split_seed) if share else []

    def _teacher_network(self) -> nn.Module:
        """Return the network of the runs that teach. Raises UserError if one does not fit the recipe."""
        networks = {key: self._load_teacher(run) for key, run in self._teacher_runs().items()}
        teacher = self.recipe.method.combine_teachers(networks, self.data.modalities)
        if isinstance(teacher, PartialNetwork):
            self._note_unseen(teacher)
        return teacher

    def _note_unseen(self, teacher: PartialNetwork) -> None:
        """Note the training cases without any modality of the teacher, which do not learn from it.

        Raises UserError if no other case is left, or if a loss term of the user's compares all cases with the teacher.
        """
        names, ((key, run), *_) = teacher.config.modalities, self._teacher_runs().items()
        cases = [*self.data.split("train"), *self.data.split("unlabelled")]
        unseen = [case.id for case in cases if not case.images.keys() & set(names)]
        found = f"{len(unseen)} of {len(cases)} training cases have none of the modalities {', '.join(names)}"
        if len(unseen) == len(cases) or (unseen and self.recipe.method.losses):
            why = "" if len(unseen) == len(cases) else ", and method.losses may compare them with it"
            raise UserError(
                f"{found} that the teacher {key}={run} sees{why}: {listed(unseen)}; leave them out of the training, "
                "such as with data.split_file, or give a teacher that sees more modalities"
            )
        if unseen:
            self.data.add_note(f"{found} that the teacher ({key}) sees, and do not learn from it: {listed(unseen)}.")

    def _load_teacher(self, run: Path) -> MultimodalUNet:
        recipe = self.recipe
        folder = model_folder(run)
        teacher, preparation = load_network(folder, self.data.modalities), read_inference_config(folder)["preparation"]
        require_same(f"the teacher {folder}", "regions", teacher.config.regions, self.data.regions)
        for key in ("spacing", "intensity"):
            own, its = getattr(recipe.data, key), preparation[key]
            if (list(own) if isinstance(own, tuple) else own) != its:
                raise UserError(
                    f"the teacher {folder} was trained with data.{key}={its}, and the recipe has data.{key}={own}, so "
                    f"that its inputs would be preprocessed differently; set data.{key}={its}, or give another teacher"
                )
        model = recipe.model
        same = (teacher.config.net, tuple(teacher.config.channels)) == (model.net, tuple(model.channels))
        if recipe.method.compares_features and not same:
            raise UserError(
                f"method.full.features compares bottlenecks, and the teacher {folder} is another network "
                f"({teacher.config.net} {list(teacher.config.channels)}); set it to 0"
            )
        if recipe.method.starts_from_teacher:
            what = f"the teacher {folder} of method.initialise_from_teacher=true"
            require_same_network(self._network_config, teacher.config, what)
        return teacher

    def _teacher_runs(self) -> dict[str, Path]:
        """Return the runs that teach, or else the stage that does, by key."""
        method = self.recipe.method
        runs = {key: Path(run) for key, run in method.teacher_runs().items()}
        return runs or {"teacher": self.recipe.output_folder / method.teaching_stage}

    def teaching_folders(self, kind: str) -> list[Path]:
        # In self-training the teacher need not be better than the baseline: what is new are its masks.
        if not self.has_teacher(kind) or self.recipe.method.teaching_stage == "baseline":
            return []
        return list(self._teacher_runs().values())

    def validation(self, folder: Path, training: dict[str, Any]) -> dict[str, Any]:
        """The teacher sees all modalities, so only the score from all of them tells what it can teach."""
        found = super().validation(folder, training) | {"score": None}
        if by_region := training["validation_subsets"].get("+".join(self.data.modalities)):
            found["score"] = statistics.fmean(by_region.values())
        return found

    def _inference_config(self, validation_dice: Mapping[str, dict[str, float]]) -> dict[str, Any]:
        recipe, data = self.recipe, self.data
        return {
            "regions": {name: list(values) for name, values in data.regions.items()},
            "preparation": {
                "spacing": recipe.data.spacing,
                "intensity": recipe.data.intensity,
                "patch_size": list(recipe.data.patch_size),
                "max_voxels": recipe.data.max_voxels,
            },
            "inference": recipe.evaluation.model_dump(mode="json"),
            "data": {"name": data.name, "variant": data.variant, "validation": len(data.split("validation"))},
            "validation": validation_dice,
        }

    def _resume_config(self, stage: Stage, task: SegmentationTask, validating: VolumeExamples) -> dict[str, Any]:
        recipe = self.recipe
        data = recipe.data.model_dump(mode="json", exclude={"root", "workers", "max_voxels", "split", "split_file"})
        train = recipe.train.model_dump(mode="json", exclude={"keep_checkpoints", "log_every", "trackers"})
        if not task.pretrained_parameters and train["pretrained_lr_scale"] == 1:
            train["pretrained_lr_scale"] = 0.1  # the former default, so that such a run can be resumed
        config = {
            "data": {**data, "rows": self.data.fingerprint()},
            "seed": stage.seed,
            "model": recipe.model.model_dump(mode="json"),
            "train": train,
            "method": recipe.method.stage_settings(stage.kind),
            # They select the weights, and elect teachers.
            "evaluation": recipe.evaluation.model_dump(mode="json", include={"validation_overlap", "mode"}),
            "full": task.teacher.fingerprint if task.teacher is not None else None,
        }
        if limit := self._most_voters(stage):
            config["voters"] = _ids(validating, islice(voters(validating), limit))
        # All refuse runs of earlier versions: these selected a teacher by the mean over all subsets, and did not apply
        # train.pretrained_lr_scale.
        if stage.kind == "teacher" and recipe.train.select == "best":
            config["selection"] = "Dice from all modalities"
        if recipe.data.spacing and recipe.train.select == "best":  # formerly on the grid of the network
            config["validation"] = "Dice on the grid of the files"
        if task.pretrained_parameters:
            config["pretrained_parameters"] = len(task.pretrained_parameters)
        return json.loads(json.dumps(config))

    def _resume_defaults(self, stage: Stage, folder: Path, validating: VolumeExamples) -> dict[str, Any]:
        """Return the settings that checkpoints of earlier versions in `folder` do not contain, as they were then."""
        file = folder / "recipe.yaml"
        before = read_recipe(str(file))[0] if file.is_file() else {}
        defaults: dict[str, Any] = {"model": {"init": None}}
        if mode := (before.get("evaluation") or {}).get("mode"):
            defaults["evaluation"] = {"mode": mode}
        if limit := self._most_voters(stage):  # the first cases voted, whatever their modalities
            readable = ((n, case) for n in range(len(validating)) if (case := validating.readable(n)) is not None)
            defaults["voters"] = _ids(validating, islice(readable, limit))
        return defaults

    def _most_voters(self, stage: Stage) -> int | None:
        """Return `method.election.cases` if a stage has elections and not all validation cases vote, or else None."""
        method = self.recipe.method
        if stage.kind != "distilled" or not isinstance(method, LckdConfig) or method.cross_modal.weight == 0:
            return None
        return method.election.cases

    def stage_recipe(self, stage: Stage, folder: Path) -> SegmentationRecipe:
        recipe = self.recipe.model_copy(deep=True)
        recipe.stages, recipe.output, recipe.seed = (stage.kind,), str(folder), stage.seed  # type: ignore[assignment]
        if recipe.method.needs_teacher(stage.kind) and not recipe.method.teacher_runs():
            recipe.method.teaching_run = str(self._teacher_runs()["teacher"])
        if recipe.data.name == "phantom" and recipe.data.root is None:
            recipe.data.root = str(self.recipe.output_folder / "data")
        return recipe

    def starting_points(self, kinds: Collection[str]) -> dict[str, Path]:
        method, init = self.recipe.method, self.recipe.model.init
        found = {"model.init": Path(init)} if init else {}
        if any(method.needs_teacher(kind) for kind in kinds):
            found |= {key: Path(run) for key, run in method.teacher_runs().items()}
        return found

    def has_teacher(self, kind: str) -> bool:
        return self.recipe.method.needs_teacher(kind)

    # Provenance

    def images(self, split: Split) -> dict[str, Sequence[Path]]:
        return {case.id: list({file.path: None for file in case.images.values()}) for case in self.data.split(split)}

    def label_files(self, split: Split) -> dict[str, Path]:
        return {case.id: case.mask.path for case in self.data.split(split) if case.mask is not None}

    def hash_images(self, paths: Sequence[Path]) -> dict[Path, tuple[str, str]]:
        return {path: (self.file_sha256(path), "") for path in dict.fromkeys(paths) if path.exists()}

    # Evaluation

    def load(self, folder: Path) -> MultimodalUNet:
        network = load_network(folder, self.data.modalities).to(processes().device).eval()
        for name in ("modalities", "regions"):
            require_same(f"the network of {folder}", name, getattr(network.config, name), getattr(self.data, name))
        return network

    def evaluate(self, model: MultimodalUNet, *, protocol: str | None = None, stage: Stage | None = None) -> Evaluation:
        data = self.data
        prefix = f"{data.name}/{data.variant}"
        ids = {f"{prefix}/{key}": key for key in DESCRIBES}
        if protocol is not None and protocol not in ids:
            raise UserError(f"protocol {protocol!r} is not known{nearest(protocol, ids)}")
        cases = examples(self.recipe, data, "test", 0)
        found = score_cases(model, cases, self.recipe)
        self._warn_of_unreadable(cases, "test")
        rows = {id: found[key] for id, key in ids.items() if protocol in (None, id)}
        return Evaluation(
            rows=rows,
            scores={id: table(value) for id, value in rows.items()},
            describes={id: DESCRIBES[ids[id]] for id in rows},
            extras={"modalities": list(data.modalities), "regions": list(data.regions)},
        )

    def _warn_of_unreadable(self, cases: VolumeExamples, split: Split) -> None:
        if cases.unreadable:
            self.warn(
                f"{len(cases.unreadable)} of the {len(cases)} {split} cases could not be read and got the Dice 0 "
                f"(data.broken=skip): {', '.join(cases.unreadable)}."
            )

    def evaluation_settings(self, stage: Stage | None = None) -> dict[str, Any]:
        return {"evaluation": self.recipe.evaluation.model_dump(mode="json", exclude={"validation_overlap"})}

    def parameter_count(self, model: MultimodalUNet) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    def speed_test(self, model: MultimodalUNet) -> SpeedTest:
        cases = examples(self.recipe, self.data, "test", 0)
        case = next((case for case in map(cases.readable, range(len(cases))) if case is not None), None)
        if case is None:
            return SpeedTest("case with all its modalities", list, 0)
        subset = tuple(bool(there) for there in case.available)

        def one_case() -> None:
            predict_case(model, case, self.recipe.evaluation, self.recipe.data.patch_size, only=[subset])

        return SpeedTest("case with all its modalities", one_case, 1)

    # Files

    def write_figures(self, folder: Path, model: MultimodalUNet, evaluation: Evaluation) -> None:
        worst = next(iter(evaluation.rows.values()))
        cases = examples(self.recipe, self.data, "test", 0)
        write_worst(folder / "predictions" / "masks", model, cases, self.recipe, worst)
        write_figures(folder, self.data, self.recipe, evaluation.rows)

    def model_card(self, results: dict[str, Any]) -> str:
        return model_card(results, self.recipe)

    def write_report(self, run: Path) -> Path:
        return write_report(run)

    # Commands beside training

    def findings(self) -> list[Finding]:
        data = self.recipe.data

        def foreground_box(image: np.ndarray) -> tuple[slice, slice, slice]:
            return bounding_box(foreground(image, data.intensity))

        return check_cases(self.data, max_voxels=data.max_voxels, foreground_box=foreground_box)


def _ids(cases: VolumeExamples, chosen: Iterable[tuple[int, WholeCase]]) -> list[str]:
    """Return the ids of chosen cases, in the order of all."""
    return [cases.cases[index].id for index in sorted(index for index, _ in chosen)]


EXPERIMENT = SegmentationExperiment
