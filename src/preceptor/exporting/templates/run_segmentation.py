"""Segment a case: python run_onnx.py OUTPUT.nii.gz MODALITY=FILE.nii.gz ... [MODEL.onnx]

Needs numpy, scipy, nibabel and onnxruntime. Of the files beside this one, intensity.py normalises the
images, and region_masks.py applies the threshold.
"""

import itertools
import json
import os
import sys
import zlib
from pathlib import Path

import nibabel
import numpy as np
import onnxruntime
from intensity import bounding_box, normalise
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import OrientationError, apply_orientation, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from region_masks import threshold_regions
from scipy.ndimage import gaussian_filter, zoom

FOLDER = Path(__file__).parent
CONFIG = json.loads((FOLDER / "model.json").read_text("utf-8"))
WINDOW = CONFIG["window"]


def read(path):
    """Return a NIfTI file, and its voxels (D, H, W) from feet to head, back to front, left to right."""
    try:
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Pair) or image.get_data_dtype().kind not in "biuf":
            raise ValueError("another format, or voxels that are not real numbers")
        canonical = nibabel.as_closest_canonical(image)
        voxels = np.asarray(canonical.dataobj, np.float32).squeeze()
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, OrientationError) as error:
        sys.exit(f"{path}: not a readable NIfTI file ({' '.join(str(error).split())}); check the path")
    if voxels.ndim != 3 or not voxels.size or not np.isfinite(voxels).all() or voxels.min() == voxels.max():
        sys.exit(f"{path}: not a 3-D image with finite and different voxels")
    if image.header.get_xyzt_units()[0] not in ("mm", "unknown"):
        sys.exit(f"{path}: its unit of length is not mm; convert it, or use preceptor predict")
    return image, canonical.affine, voxels.transpose(2, 1, 0)


def resample(volume, spacing):
    """Return a volume with voxels of the spacing that the network knows (mm along D, H, W)."""
    factors = [new / old for new, old in zip(CONFIG["spacing"] or spacing, spacing)]
    smooth = gaussian_filter(volume, [max(0.0, (factor - 1) / 2) for factor in factors], mode="nearest")
    shape = [max(2, round(side / factor)) for side, factor in zip(volume.shape, factors)]
    scales = [new / side for new, side in zip(shape, volume.shape)]
    return zoom(smooth, scales, order=1, mode="nearest", grid_mode=True)


def window_weights():
    """Return the weights (D, H, W) of the voxels of a window in the mean over windows."""
    if CONFIG["mode"] == "constant":
        return np.ones(WINDOW, np.float32)
    axes = [np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * (n / 8) ** 2)) for n in WINDOW]
    weights = np.einsum("i,j,k", *axes).astype(np.float32)
    return np.maximum(weights, max(weights.min(), 1e-3))


def probabilities(images, available, model="model.onnx"):
    """Return the probabilities (R, D, H, W) of images (N, D, H, W): the weighted mean over overlapping windows."""
    session = onnxruntime.InferenceSession(FOLDER / model, providers=["CPUExecutionProvider"])
    shape = images.shape[1:]
    before = [max(0, (w - n) // 2) for w, n in zip(WINDOW, shape)]
    padding = [(b, max(0, w - n - b)) for w, n, b in zip(WINDOW, shape, before)]
    images = np.pad(images, [(0, 0), *padding])
    starts = []
    for w, n in zip(WINDOW, images.shape[1:]):
        step = max(1, int(w * (1 - CONFIG["overlap"])))
        starts.append([min(start, n - w) for start in range(0, n - w + step, step)])
    weights, total = window_weights(), np.zeros(images.shape[1:], np.float32)
    result = np.zeros((len(CONFIG["regions"]), *images.shape[1:]), np.float32)
    for corner in itertools.product(*starts):
        place = tuple(slice(a, a + w) for a, w in zip(corner, WINDOW))
        inputs = {"images": images[(slice(None), *place)], "available": available}
        result[(slice(None), *place)] += weights * session.run(["probabilities"], inputs)[0]
        total[place] += weights
    return (result / total)[(slice(None), *(slice(b, b + n) for b, n in zip(before, shape)))]


def segment(files, model="model.onnx"):
    """Return the label map (D, H, W) of files by modality, and the first file."""
    unknown = [name for name in files if name not in CONFIG["modalities"]]
    if unknown or not files:
        sys.exit(f"{', '.join(unknown) or 'nothing'} was given; the modalities are {', '.join(CONFIG['modalities'])}")
    loaded = {name: read(path) for name, path in files.items()}
    first, affine, source = next(iter(loaded.values()))
    if any(v.shape != source.shape or np.abs(a - affine).max() > 1e-3 for _, a, v in loaded.values()):
        sys.exit("the files are not on one grid; resample them")
    spacing = nibabel.affines.voxel_sizes(affine)[::-1]
    volumes = {name: resample(v, spacing) if CONFIG["spacing"] else v for name, (_, _, v) in loaded.items()}
    volumes = {name: normalise(volume, CONFIG["intensity"]) for name, volume in volumes.items()}
    box = bounding_box(np.any([volume != 0 for volume in volumes.values()], axis=0))
    available = np.array([name in volumes for name in CONFIG["modalities"]])
    shape = next(iter(volumes.values())).shape
    images = np.stack([volumes.get(name, np.zeros(shape, np.float32))[box] for name in CONFIG["modalities"]])
    label = np.zeros(shape, np.uint8)
    present = threshold_regions(probabilities(images, available, model), CONFIG["regions"], CONFIG["threshold"])
    label[box] = np.array(CONFIG["labels"], np.uint8)[(present << np.arange(len(present))[:, None, None, None]).sum(0)]
    nearest = [((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(source.shape, shape)]
    return label[np.ix_(*nearest)], first


def save(label, image, path):
    """Write a label map (D, H, W) on the grid of an image. Nothing but the geometry of its header is copied."""
    back = ornt_transform([[0, 1], [1, 1], [2, 1]], io_orientation(image.affine))
    result = nibabel.Nifti1Image(apply_orientation(label.transpose(2, 1, 0), back), image.affine)
    result.set_sform(image.affine, int(image.header["sform_code"]) or (0 if image.header["qform_code"] else 2))
    result.set_qform(image.affine, int(image.header["qform_code"]))
    result.header.set_xyzt_units("mm")
    nibabel.save(result, path)


def parse(arguments):
    """Return the output, the files by modality and the model. Mistakes are found before anything is computed."""
    pairs = [text.split("=", 1) for text in arguments[1:] if "=" in text]
    models = [text for text in arguments[1:] if "=" not in text] or ["model.onnx"]
    if arguments and arguments[0].split("=")[0] in CONFIG["modalities"] and "=" in arguments[0]:
        sys.exit(f"{arguments[0]} is in the place of OUTPUT; give first the file to write, such as mask.nii.gz")
    if not pairs:
        sys.exit(__doc__.strip())
    output = arguments[0]
    if not output.endswith((".nii", ".nii.gz")):
        sys.exit(f"{output} cannot be written; name a file that ends in .nii.gz")
    if doubled := [name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number])]:
        sys.exit(f"{doubled[0]} is given twice; give one file for each modality")
    if len(models) > 1 or models[0] not in [path.name for path in FOLDER.glob("*.onnx")]:
        sys.exit(f"{models[-1]} is neither MODALITY=FILE nor a model in the folder of {Path(__file__).name}")
    try:
        open(output, "xb").close()  # permissions do not tell whether a file can be created
        os.remove(output)
    except FileExistsError:
        sys.exit(f"{output} exists and is not overwritten; give another output")
    except OSError as error:
        sys.exit(f"{output} cannot be written ({error.strerror}); give a file in a folder that exists and is writable")
    return output, dict(pairs), models[0]


def main(arguments):
    output, files, model = parse(arguments)
    label, image = segment(files, model)
    try:
        save(label, image, output)
    except OSError as error:
        Path(output).unlink(missing_ok=True)
        sys.exit(f"{output} cannot be written to its end ({error.strerror}); free some space, or give another output")
    millilitres = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    volumes = {name: np.isin(label, ids).sum() * millilitres for name, ids in CONFIG["regions"].items()}
    # Two digits, so that a lesion of a few voxels is not 0.
    digits = {name: f"{ml:.2f}" if ml == 0 or ml >= 0.1 else f"{ml:.2g}" for name, ml in volumes.items()}
    print(f"mask {output},", ", ".join(f"{name}_ml {text}" for name, text in digits.items()))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name may not be valid UTF-8
    try:
        main(sys.argv[1:])
    except SystemExit as error:
        print(error, file=sys.stderr)
        sys.exit(2)
