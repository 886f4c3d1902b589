"""NIfTI files with contradicting headers and damaged bytes, against SimpleITK and a decoder by the standard."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from hypothesis import strategies as st

from preceptor.data.types import Case, VolumeFile
from preceptor.data.volumes import load_case, load_label
from tests.fuzz.mutate import DAMAGE, Mutation, mostly, mutate, place
from tests.fuzz.outcome import PATIENT, Wrong, attempt, recorded, require
from tests.fuzz.target import Target

# Name: (byte offset, struct format) of NIfTI-1 (nifti1.h).
FIELDS = {
    "sizeof_hdr": (0, "i"),
    "dim_info": (39, "b"),
    **{f"dim{i}": (40 + 2 * i, "h") for i in range(8)},
    "intent_code": (68, "h"),
    "datatype": (70, "h"),
    "bitpix": (72, "h"),
    "slice_start": (74, "h"),
    **{f"pixdim{i}": (76 + 4 * i, "f") for i in range(8)},
    "vox_offset": (108, "f"),
    "scl_slope": (112, "f"),
    "scl_inter": (116, "f"),
    "slice_end": (120, "h"),
    "slice_code": (122, "b"),
    "xyzt_units": (123, "b"),
    "cal_max": (124, "f"),
    "cal_min": (128, "f"),
    "qform_code": (252, "h"),
    "sform_code": (254, "h"),
    **{f"quatern_{n}": (256 + 4 * i, "f") for i, n in enumerate("bcd")},
    **{f"qoffset_{n}": (268 + 4 * i, "f") for i, n in enumerate("xyz")},
    **{f"srow_{n}{i}": (280 + 16 * row + 4 * i, "f") for row, n in enumerate("xyz") for i in range(4)},
    "magic": (344, "4s"),
    "extension": (348, "4s"),
}
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
OTHER_TYPES = (0, 1, 32, 128, 255, 1536, 1792, 2048, 2304, -1, 3)

SHORTS = st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 255, 32767, -32768])
BYTES = st.sampled_from([-1, 0, 1, 2, 3, 127, -128])
FLOATS = st.sampled_from(
    [0.0, -1.0, 1.0, 2.0, 0.5, 1e-3, 1e3, 1e10, -2.5, 352.0, 353.0, 348.0, 1e-30, float("nan"), float("inf")]
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "datatype": st.sampled_from([*TYPES, *OTHER_TYPES]),
    "bitpix": st.sampled_from([0, 1, 8, 16, 32, 64, 128, -8]),
    "xyzt_units": st.sampled_from([0, 1, 2, 3, 4, 8, 10, 11, 24, 64, -1]),
    "qform_code": st.sampled_from([0, 1, 2, 4, 5, -1, 99]),
    "sform_code": st.sampled_from([0, 1, 2, 4, 5, -1, 99]),
    "magic": st.sampled_from([b"n+1\0", b"ni1\0", b"n+2\0", b"\0\0\0\0", b"n+1 "]),
    "extension": st.sampled_from([b"\0\0\0\0", b"\1\0\0\0", b"\xff\0\0\0"]),
    "sizeof_hdr": st.sampled_from([348, 540, 0, 1543569408, -1]),
    "vox_offset": st.sampled_from([352.0, 0.0, 348.0, 353.0, 368.0, 400.0, -16.0, 1e9, float("nan")]),
}
FIELD = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda name: st.tuples(st.just(name), VALUES.get(name, {"h": SHORTS, "b": BYTES}.get(FIELDS[name][1], FLOATS)))
)
GZIP_DAMAGE = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 65535), st.integers(0, 7)),
    st.tuples(st.just("crc")),
    st.tuples(st.just("length")),
    st.tuples(st.just("truncate"), st.integers(0, 65535)),
    st.tuples(st.just("two members")),
    st.tuples(st.just("tail")),
)


@dataclass(frozen=True)
class NiftiInput:
    """A valid file of a shape, type and geometry, the header fields to overwrite, and damage to its bytes."""

    shape: tuple[int, ...]
    datatype: int
    order: str
    form: str
    axes: tuple[int, int, int]
    signs: tuple[int, int, int]
    spacing: tuple[float, float, float]
    labels: bool
    fields: tuple[tuple[str, Any], ...]
    mutations: tuple[Mutation, ...]
    compressed: bool
    gzip_damage: tuple[Any, ...] | None
    seed: int


INPUTS = st.builds(
    NiftiInput,
    shape=st.one_of(
        st.tuples(*[st.integers(2, 5)] * 3), st.sampled_from([(3, 4, 5, 1), (3, 4, 5, 2), (4, 5), (1, 4, 5)])
    ),
    datatype=st.sampled_from(sorted(TYPES)),
    order=st.sampled_from("<>"),
    form=st.sampled_from(["sform", "qform", "both", "none"]),
    axes=st.permutations([0, 1, 2]).map(tuple),
    signs=st.tuples(*[st.sampled_from([1, -1])] * 3),
    spacing=st.tuples(*[st.sampled_from([1.0, 0.5, 1.3, 10.0])] * 3),
    labels=st.booleans(),
    fields=st.lists(FIELD, max_size=3).map(tuple),
    mutations=DAMAGE,
    compressed=st.booleans(),
    gzip_damage=mostly(st.none(), GZIP_DAMAGE, 3),
    seed=st.integers(0, 99),
)


def encode(case: NiftiInput) -> bytes:
    """Return the bytes of the file before compression."""
    values = np.random.default_rng(case.seed).integers(0, 5 if case.labels else 100, case.shape)
    dtype = np.dtype(case.order + TYPES[case.datatype])
    header = bytearray(352)

    def put(name: str, value: Any) -> None:
        offset, kind = FIELDS[name]
        struct.pack_into(case.order + kind, header, offset, value)

    put("sizeof_hdr", 348)
    header[4:14] = PATIENT[:10].encode()  # data_type
    header[148:228] = PATIENT.encode().ljust(80, b"\0")  # descrip
    header[228:252] = PATIENT.encode().ljust(24, b"\0")  # aux_file
    header[328:344] = PATIENT[:15].encode().ljust(16, b"\0")  # intent_name
    put("dim0", len(case.shape))
    for axis, side in enumerate((*case.shape, *[1] * (7 - len(case.shape))), start=1):
        put(f"dim{axis}", side)
    put("datatype", case.datatype)
    put("bitpix", 8 * dtype.itemsize)
    put("pixdim0", 1.0)
    for axis, side in enumerate(case.spacing, start=1):
        put(f"pixdim{axis}", side)
    put("vox_offset", 352.0)
    put("xyzt_units", 2)
    put("magic", b"n+1\0")
    rows = np.zeros((3, 4))
    for column, (axis, sign) in enumerate(zip(case.axes, case.signs, strict=True)):
        rows[axis, column] = sign * case.spacing[column]
    rows[:, 3] = (-10, 20, 30)
    if case.form in ("sform", "both"):
        put("sform_code", 1)
        for name, row in zip("xyz", rows, strict=True):
            for column, value in enumerate(row):
                put(f"srow_{name}{column}", value)
    if case.form in ("qform", "both"):
        rotation = rows[:, :3] / np.array(case.spacing)
        handed = np.sign(np.linalg.det(rotation))
        quaternion = quaternion_of(rotation * np.array([1, 1, handed]))
        put("qform_code", 1)
        put("pixdim0", float(handed))
        for name, value in zip("bcd", quaternion, strict=True):
            put(f"quatern_{name}", value)
        for name, value in zip("xyz", rows[:, 3], strict=True):
            put(f"qoffset_{name}", value)
    for name, value in case.fields:
        put(name, value)
    return bytes(header) + values.astype(dtype).tobytes(order="F")


def quaternion_of(rotation: np.ndarray) -> tuple[float, float, float]:
    """Return (b, c, d) of the unit quaternion with a >= 0 of a proper rotation."""
    from scipy.spatial.transform import Rotation

    b, c, d, a = Rotation.from_matrix(rotation).as_quat()
    return (b, c, d) if a >= 0 else (-b, -c, -d)


def compress(data: bytes, damage: tuple[Any, ...] | None) -> bytes:
    """Return gzip bytes with the given damage."""
    packed = bytearray(gzip.compress(data, mtime=0))
    kind = damage[0] if damage else ""
    if kind == "flip":
        packed[place(damage[1], len(packed))] ^= 1 << damage[2]
    elif kind == "crc":
        packed[-8] ^= 1
    elif kind == "length":
        packed[-4] ^= 1
    elif kind == "truncate":
        del packed[place(damage[1], len(packed)) :]
    elif kind == "two members":
        half = len(data) // 2
        packed = bytearray(gzip.compress(data[:half]) + gzip.compress(data[half:]))
    elif kind == "tail":
        packed += b"\0\0garbage"
    return bytes(packed)


def whole(path: Path) -> bytes | None:
    """Return the uncompressed bytes of a file, None if `gzip -t` would fail."""
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error):
        return None


def header_of(data: bytes) -> dict[str, Any] | None:
    """Return the fields of a NIfTI-1 header and its byte `order`, None if the bytes are too few or not NIfTI-1."""
    if len(data) < 352:
        return None
    for order in "<>":
        fields = {name: struct.unpack_from(order + kind, data, offset)[0] for name, (offset, kind) in FIELDS.items()}
        # The size of the header tells the order; the number of axes does if that is damaged.
        if 1 <= fields["dim0"] <= 7 and fields["magic"] in (b"n+1\0", b"ni1\0"):
            return {"order": order, **fields}
    return None


def decode(data: bytes) -> np.ndarray | None:
    """Return the voxels in the order of the file by the words of nifti1.h, None if the header is not valid NIfTI-1."""
    header = header_of(data)
    if header is None or header["datatype"] not in TYPES:
        return None
    shape = [header[f"dim{axis}"] for axis in range(1, header["dim0"] + 1)]
    dtype = np.dtype(header["order"] + TYPES[header["datatype"]])
    offset = header["vox_offset"] or 352.0  # as nibabel does; a file of another length is refused
    if min(shape) < 1 or not 352 <= offset <= len(data) or offset != int(offset):
        return None
    count = int(np.prod(shape, dtype=object))
    if int(offset) + count * dtype.itemsize > len(data):
        return None
    voxels = np.frombuffer(data, dtype, count, int(offset)).reshape(shape, order="F").astype(np.float64)
    return voxels if not is_scaled(header) else voxels * header["scl_slope"] + header["scl_inter"]


def is_scaled(header: dict[str, Any]) -> bool:
    """Return whether the header has a scale. A slope of 0 means none (nifti1.h)."""
    return header["scl_slope"] != 0 and np.isfinite(header["scl_slope"]) and np.isfinite(header["scl_inter"])


def check(case: NiftiInput, folder: Path) -> bool:
    """Read a file as an image and as a label map, and compare voxels and positions with other readers."""
    data = mutate(encode(case), case.mutations)
    path = folder / ("x.nii.gz" if case.compressed else "x.nii")
    path.write_bytes(compress(data, case.gzip_damage) if case.compressed else data)
    file = VolumeFile(path)
    image = attempt(lambda: load_case(Case("x", {"t1": file}, None, "x", "test")), place=path)
    label = attempt(lambda: load_label(file), place=path)
    if not image.accepted and not label.accepted:
        return False
    content = whole(path)
    require(content is not None, "a broken gzip stream was read", case.gzip_damage)
    assert content is not None
    header, voxels = header_of(content), decode(content)
    require(header is not None and voxels is not None, "an invalid NIfTI header was read")
    assert header is not None
    assert voxels is not None
    if image.accepted:
        loaded = image.value
        compare(loaded.images["t1"], loaded.geometry, header, voxels, path, tolerance=1e-6)
    if label.accepted:
        values, geometry = label.value
        compare(values, geometry, header, voxels, path, tolerance=2e-6)  # rounding errors of scaled float32
    return True


def compare(
    volume: np.ndarray, geometry: Any, header: dict[str, Any], voxels: np.ndarray, path: Path, tolerance: float
) -> None:
    """Raise Wrong unless a volume (D, H, W) has the values and positions that the standard and SimpleITK give."""
    found = geometry.source(volume).astype(np.float64)
    expected = voxels.reshape(found.shape)
    scale = max(1.0, float(np.abs(expected).max()))
    require(np.allclose(found, expected, rtol=1e-6, atol=tolerance * scale), "voxels differ from the file")
    if header["vox_offset"] == 0:
        return  # SimpleITK begins at byte 348
    with recorded():
        try:
            other = SimpleITK.ReadImage(str(path))
        except RuntimeError:
            return
        dimension = other.GetDimension()
        if dimension != 3 and not (dimension > 3 and set(other.GetSize()[3:]) == {1}):
            return
    values = SimpleITK.GetArrayFromImage(other).astype(np.float64).reshape(found.T.shape)
    # SimpleITK takes a very small slope for 1, and adds the intercept to a slope of 0.
    if abs(header["scl_slope"]) > 1e-6 or header["scl_slope"] == header["scl_inter"] == 0:
        require(np.allclose(found.T, values, rtol=1e-5, atol=1e-4 * scale), "voxels differ from SimpleITK")
    sides = np.linalg.norm(geometry.affine[:3, :3], axis=0)
    require(sides.min() > 1e-6 and sides.max() < 1e4, "an absurd voxel size was read", sides)
    if header["qform_code"] <= 0 and header["sform_code"] <= 0:  # the standard does not define the orientation
        same = np.allclose(sorted(sides), sorted(other.GetSpacing()[:3]), rtol=1e-3)
        require(same, f"the voxel size differs from SimpleITK{contradiction(header)}")
        return
    if header["sform_code"] > 0 and skew(header) > 1e-5:
        # SimpleITK makes the axes perpendicular. The sform is read as it is, and a visible skew is remarked on.
        rows = sform(header) * {1: 1000.0, 3: 0.001}.get(header["xyzt_units"] & 7, 1.0)
        require(np.allclose(geometry.affine[:3], rows, rtol=1e-6), "a skewed sform was changed", rows)
        require(geometry.remarks or skew(header) <= 0.01 + 1e-6, "a skewed sform was read without a remark", rows)
        return
    direction = np.array(other.GetDirection()).reshape(dimension, dimension)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(other.GetSpacing()[:3])
    affine[:3, 3] = other.GetOrigin()[:3]
    affine[:2] *= -1  # LPS to RAS
    gap = np.abs(affine[:3] - geometry.affine[:3]).max()
    if not gap <= 1e-3 * max(1.0, np.abs(affine[:3]).max()) and header["sform_code"] > 0 and header["qform_code"] > 0:
        # SimpleITK may prefer the qform. The sform is read, as the standard says, and a difference is remarked on.
        scale = {1: 1000.0, 3: 0.001}.get(header["xyzt_units"] & 7, 1.0)
        require(np.allclose(geometry.affine[:3], sform(header) * scale, rtol=1e-6), "the sform was not used")
        shift = gap * max(geometry.source(volume).shape)
        require(geometry.remarks or shift <= 8 * sides.max(), "a qform that differs was ignored without a remark", gap)
        return
    if not gap <= 1e-3 * max(1.0, np.abs(affine[:3]).max()):
        kind = f"the grid differs from SimpleITK{contradiction(header)}"
        raise Wrong(kind, f"{affine[:3].tolist()} and {geometry.affine[:3].tolist()}")
    # The canonical array must hold each voxel at its position.
    corner = tuple(side - 1 for side in found.shape)
    for index in ((0, 0, 0), corner, (corner[0], 0, 0)):
        position = affine @ np.array([*index, 1.0])
        x, y, z = np.rint(np.linalg.solve(geometry.canonical_affine, position))[:3].astype(int)
        require(volume[z, y, x] == geometry.source(volume)[index], "a voxel is at another place", index)


def sform(header: dict[str, Any]) -> np.ndarray:
    """Return the rows (3, 4) of the sform."""
    return np.array([[header[f"srow_{n}{i}"] for i in range(4)] for n in "xyz"])


def skew(header: dict[str, Any]) -> float:
    """Return the largest cosine between two axes of the sform."""
    axes = sform(header)[:, :3] / np.linalg.norm(sform(header)[:, :3], axis=0)
    return float(np.abs(axes.T @ axes - np.eye(3)).max())


def contradiction(header: dict[str, Any]) -> str:
    """Return what may explain another grid, so that failures of different kinds are told apart."""
    if header["xyzt_units"] & 7 not in (0, 2):
        return ", unit of length"
    rows = sform(header)[:, :3]
    sides = [abs(header[f"pixdim{axis}"]) for axis in (1, 2, 3)]
    if header["sform_code"] > 0 and not np.allclose(np.linalg.norm(rows, axis=0), sides, rtol=1e-3):
        return ", sform against pixdim"
    return ", sform against qform" if header["sform_code"] > 0 and header["qform_code"] > 0 else ""


TARGET = Target(INPUTS, check, 400)
