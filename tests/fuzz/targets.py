"""All targets by name. The test suite tries a few inputs of each, `bench/fuzz.py` as many as time allows."""

from __future__ import annotations

from tests.fuzz import (
    case_tables,
    checkpoints,
    dialogues,
    dicom_files,
    dicom_series,
    model_folders,
    nifti_files,
    predictions,
    public_questions,
    public_volumes,
    question_tables,
    raster_files,
    recipes,
    run_folders,
    stores,
    teacher_answers,
)
from tests.fuzz.target import Target

TARGETS: dict[str, Target] = {
    "nifti": nifti_files.TARGET,
    "dicom": dicom_files.TARGET,
    "images": raster_files.TARGET,
    "question-tables": question_tables.TARGET,
    "parquet": question_tables.PARQUET,
    "case-tables": case_tables.TABLE,
    "split-files": case_tables.SPLIT,
    "dialogues": dialogues.TARGET,
    "recipe-overrides": recipes.OVERRIDES,
    "recipe-files": recipes.FILE,
    "score-questions": predictions.QUESTIONS_TARGET,
    "score-boxes": predictions.BOXES_TARGET,
    "score-masks": predictions.MASKS_TARGET,
    "predictions": predictions.STREAM_TARGET,
    "teacher-cache": stores.CACHE,
    "pseudo-labels": stores.STORE,
    "run-folders": run_folders.TARGET,
    "vqa-rad": public_questions.RAD,
    "slake": public_questions.SLAKE,
    "vqa-med-2019": public_questions.MED,
    "brats": public_volumes.BRATS_TARGET,
    "decathlon": public_volumes.DECATHLON_TARGET,
    "dicom-series": dicom_series.TARGET,
    "teacher-answers": teacher_answers.TARGET,
    "checkpoints": checkpoints.TARGET,
    "vqa-models": model_folders.VQA,
    "segmentation-models": model_folders.SEGMENTATION,
    "grounding-models": model_folders.GROUNDING,
}
