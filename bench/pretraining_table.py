r"""Write a table of VQA-Med 2019 (train) and SLAKE (English, train) to pretrain on before VQA-RAD.

    python bench/pretraining_table.py --output runs/pretraining-table
    preceptor train mhkd-vqa-rad output=runs/pretrained data.name=table data.variant=null \
        data.root=runs/pretraining-table/questions.jsonl 'stages=[teacher]' data.augment.views=0 \
        teacher.train.epochs=4 teacher.train.batch_size=64 teacher.train.learning_rate=7e-4 teacher.train.select=best \
        'teacher.model.vision.freeze=["embeddings.*", "encoder.blocks.?.*", "encoder.blocks.1[01].*", "encoder.top_*"]'
    preceptor train mhkd-vqa-rad teacher.model.init=runs/pretrained teacher.train.learning_rate=3e-4

Images of VQA-RAD are left out, whichever split they are in, as `data.exclude_images_of` would: by perceptual hash. (42
images are the same in both sets as released; sizes and bytes differ here, so hashes of files do not find them.) Images
are copied at a short side of 160 pixels; 4 % of them validate and 2 % test, so that the recipe runs. Needs
PRECEPTOR_DATA.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

from PIL import Image

from preceptor.data.provenance import hash_images, match_images


def sources(root: Path):
    """Yield (image, question, answer, group) of both sets."""
    folder = root / "vqa_med_2019" / "train"
    for line in (folder / "All_QA_Pairs_train.txt").read_text("utf-8").splitlines():
        name, question, answer = line.split("|")
        yield folder / "images" / f"{name}.jpg", question, answer.split("#")[0], f"med-{name}"
    for row in json.loads((root / "slake" / "train.json").read_text("utf-8")):
        if row["q_lang"] == "en":
            yield root / "slake" / "imgs" / row["img_name"], row["question"], row["answer"], f"slake-{row['img_id']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    root = Path(os.environ["PRECEPTOR_DATA"])
    tested = hash_images(sorted((root / "vqa_rad" / "VQA_RAD Image Folder").glob("*.jpg")))
    left_out = match_images(hash_images(path for path, *_ in sources(root)), dict(tested.values()))
    (args.output / "images").mkdir(parents=True)
    kept: dict[Path, str | None] = {}
    rows = []
    for number, (path, question, answer, group) in enumerate(sources(root)):
        if path not in kept:
            alike = path in left_out
            kept[path] = None if alike else f"images/{group}.jpg"
            if not alike:
                with Image.open(path) as image:
                    small = image.convert("RGB")
                    small.thumbnail((160 * 4, 160) if image.width > image.height else (160, 160 * 4))
                    small.save(args.output / "images" / f"{group}.jpg", quality=90)
        if kept[path] and question.strip() and answer.strip():
            share = int(hashlib.sha256(group.encode()).hexdigest()[:4], 16) / 2**16
            part = "validation" if share < 0.04 else "test" if share < 0.06 else "train"
            rows.append(
                {
                    "id": f"{group}-{number}",
                    "image": kept[path],
                    "question": question,
                    "answer": answer,
                    "group": group,
                    "split": part,
                }
            )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (args.output / "questions.jsonl").write_text(text, "utf-8")
    dropped = sum(target is None for target in kept.values())
    print(f"{len(rows)} questions about {len(kept) - dropped} images; {dropped} images left out as also in VQA-RAD")


if __name__ == "__main__":
    main()
