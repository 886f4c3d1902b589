"""SLAKE's boxes and questions as the four tasks of grounded VQA: a real set that may be passed on.

SLAKE marks organs and findings by ``detection.json``, a list of ``{name: [x, y, width, height]}`` in pixels. From each
box come a question of visual grounding, of naming and of description, from each question one of image analysis, by
fixed templates; the same files give the same dialogues. Boxes are written in thousandths.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image

from preceptor.data.grounding.boxes import Box, Style, from_pixels, repair_box, validate_box
from preceptor.data.grounding.questions import LabeledBox, Picture, ask_about_boxes
from preceptor.data.texts import AS_RELEASED, read_text
from preceptor.data.types import Dialogue, GroundingDataset, Sample
from preceptor.data.vqa.slake import Language, read_slake
from preceptor.errors import UserError

BOXES = "detection.json"
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


def read_slake_grounding(root: Path, *, language: Language = "en", style: Style = "qwen") -> GroundingDataset:
    """Read SLAKE and return its dialogues; the splits are those of `read_slake`, which images never leave.

    Sides in descriptions are those of the picture, not of the patient. Boxes outside the image are cut to it and
    counted in `faults`; one of which nothing is left is left out. In Chinese the names are translated (`CHINESE`).

    Raises:
        UserError: as `read_slake`, and for a broken detection.json, with its place.
    """
    questions = read_slake(root, language=language)
    faults: Counter[str] = Counter()
    dialogues: list[Dialogue] = []
    by_image: defaultdict[Path, list[Sample]] = defaultdict(list)
    for sample in questions.samples:
        by_image[sample.image].append(sample)
    for image, samples in by_image.items():
        found = _boxes(image, faults)
        for spoken in dict.fromkeys(sample.tags["language"] for sample in samples):
            first = next(sample for sample in samples if sample.tags["language"] == spoken)
            names = {name: CHINESE.get(name, name) if spoken == "zh" else name.lower() for name in found}
            marked = [LabeledBox(names[name], tuple(boxes), name in FINDINGS) for name, boxes in found.items()]
            dialogues += ask_about_boxes(_picture(first), marked, style)
        for sample in samples:
            dialogues.append(_picture(sample).dialogue(f"mia-{sample.id}", sample.question, sample.answer, "mia"))
    data = GroundingDataset("slake-grounding", questions.variant, questions.root, dialogues, faults=dict(faults))
    data.notes = [*questions.notes, "Grounding questions are made from SLAKE's boxes by templates."]
    data.leaking = questions.leaking
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
    """Return the boxes of an image by name, in thousandths; none where it has no detection.json."""
    import json

    file = image.with_name(BOXES)
    if not file.is_file():
        return {}
    try:
        rows = json.loads(read_text(file))
        with Image.open(image) as opened:
            width, height = opened.size
        found: dict[str, list[Box]] = {}
        for row in rows:
            for name, (x, y, w, h) in row.items():
                box = from_pixels((x, y, x + w, y + h), width, height)
                faults.update(wrong := validate_box(box))
                good = repair_box(box) if wrong else box
                if good is not None:
                    found.setdefault(str(name), []).append(good)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{file} is broken ({error}); {AS_RELEASED}") from error
    return found
