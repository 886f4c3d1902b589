"""Convert the boxes and questions of SLAKE to the four tasks of grounded VQA.

SLAKE stores the boxes of organs and findings in ``detection.json``, a list of ``{name: [x, y, width, height]}`` in
pixels. Templates turn each box into questions of visual grounding, classification and description; each question of
SLAKE becomes one of image analysis. The same files always give the same dialogues. Boxes are in thousandths.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from preceptor.data.findings import Finding
from preceptor.data.grounding.box_formats import BOX_FORMATS, WrittenBox
from preceptor.data.grounding.box_policy import require_unit
from preceptor.data.grounding.boxes import Box, from_pixels, repair_box, validate_box
from preceptor.data.grounding.questions import LabeledBox, Picture, ask_about_boxes
from preceptor.data.locations import data_folder
from preceptor.data.texts import AS_RELEASED, read_json
from preceptor.data.types import Dialogue, GroundingDataset, Sample
from preceptor.data.vqa.release import MOST_LISTED
from preceptor.data.vqa.slake import Language, read_slake
from preceptor.errors import UserError

BOXES = "detection.json"
_FORMAT = BOX_FORMATS["xywh-pixels"]
MODALITIES = {"ct": "ct", "mri": "mr", "x-ray": "x"}
CHINESE = {
    "Brain Edema": "脑水肿",
    "Liver": "肝脏",
    "Brain Non-enhancing Tumor": "脑非增强肿瘤",
    "Brain Enhancing Tumor": "脑增强肿瘤",
    "Small Bowel": "小肠",
    "Spinal Cord": "脊髓",
    "Colon": "结肠",
    "Liver Cancer": "肝癌",
    "Spleen": "脾脏",
    "Left Kidney": "左肾",
    "Right Kidney": "右肾",
    "Right Lung": "右肺",
    "Left Lung": "左肺",
    "Cardiomegaly": "心脏肥大",
    "Atelectasis": "肺不张",
    "Pneumonia": "肺炎",
    "Nodule": "结节",
    "Rectum": "直肠",
    "Esophagus": "食道",
    "Mass": "肿块",
    "Heart": "心脏",
    "Bladder": "膀胱",
    "Effusion": "积液",
    "Lung Cancer": "肺癌",
    "Left Mandible": "左下颌骨",
    "Pneumothorax": "气胸",
    "Right Mandible": "右下颌骨",
    "Duodenum": "十二指肠",
    "Right Femoral Head": "右股骨头",
    "Left Femoral Head": "左股骨头",
    "Brain Stem": "脑干",
    "Infiltrate": "浸润",
    "Stomach": "胃",
    "Left Parotid": "左腮腺",
    "Right Parotid": "右腮腺",
    "Right Temporal Lobe": "右颞叶",
    "Larynx": "喉",
    "Left Temporal Lobe": "左颞叶",
    "Trachea": "气管",
    "Tooth": "牙齿",
    "Left Eye": "左眼",
    "Right Eye": "右眼",
    "Left Ear": "左耳",
    "Right Ear": "右耳",
}
FINDINGS = {
    "Brain Edema",
    "Brain Non-enhancing Tumor",
    "Brain Enhancing Tumor",
    "Liver Cancer",
    "Cardiomegaly",
    "Atelectasis",
    "Pneumonia",
    "Nodule",
    "Mass",
    "Effusion",
    "Lung Cancer",
    "Pneumothorax",
    "Infiltrate",
}


def read_slake_grounding(root: Path, *, language: Language = "en") -> GroundingDataset:
    """Read SLAKE as dialogues, in the splits of `read_slake`.

    Left and right in descriptions are those of the image, not of the patient. Boxes that leave the image are clipped
    and counted in `faults`; if nothing remains, the box is dropped. In Chinese the names are translated.

    Raises:
        UserError: `read_slake` refuses the data, a detection.json is invalid, or no image has one.
    """
    questions = read_slake(root, language=language)
    faults: Counter[str] = Counter()
    dialogues: list[Dialogue] = []
    by_image: defaultdict[Path, list[Sample]] = defaultdict(list)
    for sample in questions.samples:
        by_image[sample.image].append(sample)
    absent = sorted(image.parent.name for image in by_image if not image.with_name(BOXES).is_file())
    if len(absent) == len(by_image):
        raise UserError(f"{questions.root}: no image has a {BOXES}, which contains its boxes; {AS_RELEASED}")
    for image, samples in by_image.items():
        boxes_by_name = _boxes(image, faults)
        for language_of_samples in dict.fromkeys(sample.tags["language"] for sample in samples):
            first = next(sample for sample in samples if sample.tags["language"] == language_of_samples)
            names = {
                name: CHINESE.get(name, name) if language_of_samples == "zh" else name.lower() for name in boxes_by_name
            }
            labels = [LabeledBox(names[name], tuple(boxes), name in FINDINGS) for name, boxes in boxes_by_name.items()]
            dialogues += ask_about_boxes(_picture(first), labels)
        for sample in samples:
            dialogues.append(_picture(sample).dialogue(f"mia-{sample.id}", sample.question, sample.answer, "mia"))
    data = GroundingDataset("slake-grounding", questions.variant, questions.root, dialogues, faults=dict(faults))
    data.notes = [*questions.notes, "Grounding questions are generated from the boxes of SLAKE by templates."]
    data.leaking = questions.leaking
    data.findings = list(questions.findings)
    if absent:
        listed = ", ".join(absent[:MOST_LISTED]) + (", ..." if len(absent) > MOST_LISTED else "")
        reason = f"{len(absent)} of {len(by_image)} images have no {BOXES}, but all released images have one: {listed}"
        data.findings.append(Finding((), questions.root, reason, "warning"))
    return data


def _picture(sample: Sample) -> Picture:
    modality = sample.tags["modality"].lower()
    return Picture(
        sample.image,
        sample.image.parent.name,
        sample.group,
        sample.split,
        MODALITIES.get(modality, modality),
        sample.tags["modality"],
        sample.tags["location"].replace("_", " ").lower(),
        sample.tags["language"],
    )


def _boxes(image: Path, faults: Counter[str]) -> dict[str, list[Box]]:
    """Return the boxes of an image by name, in thousandths. Without detection.json there are none."""
    file = image.with_name(BOXES)
    if not file.is_file():
        return {}
    rows = read_json(file)
    if not isinstance(rows, list):
        raise UserError(f"{file} is invalid (not a list); {AS_RELEASED}")
    try:
        with Image.open(image) as opened:
            width, height = opened.size
            orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
        if rows and orientation not in (0, 1):
            # The boxes may be those of the stored or of the upright image: SLAKE as released has no such field.
            raise UserError(
                f"{image}: the EXIF field Orientation is {orientation}, so that the boxes in {BOXES} may belong to the "
                f"turned or to the stored image; {AS_RELEASED}"
            )
        boxes: dict[str, list[Box]] = {}
        for row in rows:
            for name, numbers in row.items():
                x, y, w, h = _numbers(numbers)
                require_unit([WrittenBox("list", (x, y, w, h), False)], _FORMAT, str(file), AS_RELEASED)
                box = from_pixels((x, y, x + w, y + h), width, height)
                faults.update(faults_of_box := validate_box(box))
                valid = repair_box(box) if faults_of_box else box
                if valid is not None:
                    boxes.setdefault(str(name), []).append(valid)
    except UserError:
        raise
    except (ValueError, TypeError, OverflowError, AttributeError, OSError) as error:
        raise UserError(f"{file} is invalid ({error}); {AS_RELEASED}") from error
    return boxes


def _numbers(value: Any) -> list[float]:
    """Return four finite numbers. Raises ValueError if the value is anything else."""
    numbers = value if isinstance(value, list) and len(value) == 4 else []
    if numbers and all(type(number) in (int, float) and abs(number) < math.inf for number in numbers):  # not NaN
        return numbers
    raise ValueError(f"{str(value)[:60]} is not [x, y, width, height] in pixels")


def read(config: Any, scratch: Path) -> GroundingDataset:
    """Read the language of a recipe's data settings."""
    return read_slake_grounding(data_folder(config.name, config.root), language=config.language)
