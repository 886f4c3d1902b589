"""Answer a question about a PNG or JPEG file: python run_onnx.py IMAGE QUESTION [MODEL.onnx]

Needs numpy, onnxruntime and tokenizers, and Pillow to decode the file. All preprocessing is in the model.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

FOLDER = Path(__file__).parent


def read_image(path):
    """Return the pixels (H, W, 3) uint8 of an image of 8 bits, upright and on a black background."""
    try:
        image = Image.open(path, formats=["PNG", "JPEG"])
        deep = ";16" in str(image.tile) or image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA")
        several = getattr(image, "n_frames", 1) > 1
        image.load()
        for key in ("XML:com.adobe.xmp", "xmp", "Raw profile type exif"):
            image.info.pop(key, None)  # only EXIF says how the image is turned
        upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        sys.exit(f"{path}: not a readable PNG or JPEG file ({error}); check the path, or use preceptor predict")
    if deep or several or ("transparency" in image.info and image.mode != "P"):
        sys.exit(f"{path}: only single 8-bit images are read; convert it, or use preceptor predict")
    return np.asarray(upright.convert("RGBA").convert("RGBa"))[..., :3]


def answer(image, question, model="model.onnx"):
    """Return the answers to a question about pixels (H, W, 3) uint8 with their probabilities, best first."""
    tokens = Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(question)  # truncates and pads
    if tokens.overflowing:
        print(f"the question has more than {len(tokens.ids)} tokens and is truncated; shorten it", file=sys.stderr)
    session = onnxruntime.InferenceSession(FOLDER / model, providers=["CPUExecutionProvider"])
    ids, mask = np.array([tokens.ids]), np.array([tokens.attention_mask])
    (scores,) = session.run(["probabilities"], {"image": image, "input_ids": ids, "attention_mask": mask})[0]
    answers = json.loads((FOLDER / "model.json").read_text("utf-8"))["answers"]
    return [(answers[number], float(scores[number])) for number in np.argsort(-scores, kind="stable")]


def main(arguments):
    if len(arguments) not in (2, 3) or not arguments[1].strip():
        sys.exit(__doc__.strip())
    if any("\ud800" <= character <= "\udfff" for character in arguments[1]):  # how Python keeps other bytes
        sys.exit(f"the question {arguments[1]!a} is not valid UTF-8; set the terminal or the program to UTF-8")
    if len(arguments) == 3 and arguments[2] not in [path.name for path in FOLDER.glob("*.onnx")]:
        sys.exit(f"{arguments[2]}: no such model in the folder of {Path(__file__).name}; put the question in quotes")
    best = answer(read_image(arguments[0]), *arguments[1:])[:3]
    print(", ".join(f"{text} ({probability:.2f})" for text, probability in best))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # an answer may have characters that the terminal cannot show
    try:
        main(sys.argv[1:])
    except SystemExit as error:
        print(error, file=sys.stderr)
        sys.exit(2)
