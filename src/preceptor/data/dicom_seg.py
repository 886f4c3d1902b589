"""Write masks as a DICOM Segmentation object (DICOM PS3.3, A.51) that refers to the slices that were segmented."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data.dicom_header import silent_pydicom
from preceptor.data.dicom_series import slice_frames
from preceptor.errors import UserError
from preceptor.files import write_bytes

_PATIENT = {
    "PatientName": "",
    "PatientID": "",
    "PatientBirthDate": "",
    "PatientSex": "",
    "AccessionNumber": "",
    "ReferringPhysicianName": "",
    "StudyID": "",
    "StudyDate": "",
    "StudyTime": "",
}
"""Fields of the patient and the study that the standard wants in every object (type 2), and their empty values."""

_GEOMETRY = frozenset(
    (
        "SOPClassUID",
        "SOPInstanceUID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "FrameOfReferenceUID",
        "Modality",
        "ImageType",
        "Rows",
        "Columns",
        "NumberOfFrames",
        "PixelSpacing",
        "SliceThickness",
        "SpacingBetweenSlices",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "LossyImageCompression",
        "LossyImageCompressionRatio",
        "LossyImageCompressionMethod",
        "SharedFunctionalGroupsSequence",
        "PerFrameFunctionalGroupsSequence",
        "PlanePositionSequence",
        "PlaneOrientationSequence",
        "PixelMeasuresSequence",
    )
)
"""Fields of the slices, also inside sequences, that the object is made from before fields of the patient are copied."""

_REFERENCE = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPClassUID")
"""Fields with the same value in all slices, by which the object refers to them."""

_TUMOR_REGIONS = frozenset(("et", "tc", "wt"))
"""Names of regions of BraTS."""

_LESION = re.compile(r"(?<![a-z])(tumou?r|lesion)s?(?![a-z])")
"""Words that say that a region is a lesion."""


def import_highdicom() -> Any:
    """Return the package that writes DICOM segmentations. Raises UserError if it is not installed."""
    try:
        import highdicom
    except ImportError:
        raise UserError("DICOM segmentations need highdicom: pip install 'preceptor[dicom-seg]'") from None
    return highdicom


def write_dicom_seg(
    path: Path, masks: np.ndarray, regions: Mapping[str, str], series: Path, *, copy_patient: bool = False
) -> None:
    """Write the masks of regions as the segments of one object, in the order of `regions`.

    Args:
        path: File to write, ending in .dcm.
        masks: (R, X, Y, Z) bool on the grid of `read_series` of the series. Regions may overlap.
        regions: Label of each region, and its description.
        series: Folder of the DICOM series that was segmented.
        copy_patient: Copy name, id, birth date, sex and further fields of the patient and the study from the series.
            Else they are empty, and nothing is taken from the series but its geometry, how it was compressed, and the
            unique identifiers of the study and of the slices, because the object refers to them.

    Regions that are lesions by their names are coded as lesions, all others as tissue.

    Raises:
        UserError: highdicom is not installed, the name does not end in .dcm, a field that the standard requires is
            missing in the series, or a field of the patient cannot be read. Values of fields are never quoted.
    """
    if path.suffix.lower() != ".dcm":
        raise UserError(f"{path} must end in .dcm")
    hd = import_highdicom()
    from pydicom import dcmread
    from pydicom.sr.codedict import codes

    slices = slice_frames(series)
    assert masks.shape[3] == len(slices), f"{masks.shape[3]} slices of masks, {len(slices)} of the series"
    with silent_pydicom():
        sources = {file: dcmread(file, stop_before_pixels=True) for file, _ in slices}
        _require_references(series, sources)
        places = [np.array(data.get("ImagePositionPatient", 0), np.float64) for data in sources.values()]
        distance = float(np.linalg.norm(places[-1] - places[0])) / max(1, len(places) - 1)
        for data in sources.values():
            _complete(data, distance)
        # Frames of a file with several are in the order of the file.
        order = sorted(range(len(slices)), key=lambda z: slices[z][1]) if len(sources) == 1 else range(len(slices))
        pixels = masks.transpose(3, 2, 1, 0)[list(order)].astype(np.uint8)
        algorithm = hd.AlgorithmIdentificationSequence(
            name="Preceptor", version=version("preceptor"), family=codes.DCM.ArtificialIntelligence
        )
        segments = [
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=label,
                segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure if lesion else codes.SCT.Tissue,
                segmented_property_type=codes.SCT.Lesion if lesion else codes.SCT.Tissue,
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
                tracking_id=description,
                tracking_uid=hd.UID(),
            )
            for number, (label, description) in enumerate(regions.items(), 1)
            for lesion in [is_lesion(label)]
        ]
        try:
            found = hd.seg.Segmentation(
                source_images=list(sources.values()),
                pixel_array=pixels,
                segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=segments,
                series_instance_uid=hd.UID(),
                series_number=1,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="Preceptor",
                manufacturer_model_name="Preceptor",
                software_versions=version("preceptor"),
                device_serial_number="0",
                series_description="Segmentation, for research only",
                content_label="SEGMENTATION",
            )
        except (AttributeError, LookupError, ValueError, TypeError) as error:
            # The text of the error may quote the header.
            raise UserError(
                f"{series}: a DICOM segmentation cannot refer to it ({type(error).__name__}); write NIfTI"
            ) from None
        if copy_patient:
            _copy_patient(found, next(iter(sources)))
        content = _encoded(found)
    write_bytes(path, content)


def is_lesion(region: str) -> bool:
    """Return whether a region is a lesion by its name: a region of BraTS, or a name with the word tumor or lesion."""
    name = region.lower()
    return name in _TUMOR_REGIONS or _LESION.search(name) is not None


def _require_references(series: Path, sources: Mapping[Path, Any]) -> None:
    """Raise UserError if a slice lacks a field by which the object refers to it, or if slices differ in one."""
    for name in (*_REFERENCE, "SOPInstanceUID"):
        if missing := next((file.name for file, data in sources.items() if not data.get(name)), None):
            raise UserError(
                f"{series}: a DICOM segmentation cannot refer to it, because {missing} has no {name}; take the series "
                "from its source again, or write NIfTI"
            )
    for name in _REFERENCE:
        if (number := len({data[name].value for data in sources.values()})) > 1:
            raise UserError(
                f"{series}: a DICOM segmentation cannot refer to it, because its slices have {number} different "
                f"{name}; correct the headers, or write NIfTI"
            )


def _complete(data: Any, distance: float) -> None:
    """Remove all fields but the geometry, and set the fields that every object needs.

    The voxels of a mask are as thick as the `distance` of the slices in mm if the series gives no thickness.
    """
    _keep_geometry(data)
    data.SpecificCharacterSet = "ISO_IR 192"  # UTF-8, for the names of the regions
    for name, empty in _PATIENT.items():
        setattr(data, name, empty)
    if distance and data.get("SliceThickness") is None:
        data.SliceThickness = float(f"{distance:.9g}")


def _copy_patient(found: Any, file: Path) -> None:
    """Copy the fields of the patient and the study from a slice as they are, with their texts in UTF-8.

    Raises UserError, which names fields and never quotes them, if one cannot be read.
    """
    from pydicom import dcmread
    from pydicom.charset import convert_encodings, default_encoding

    source = dcmread(file, stop_before_pixels=True)
    # pydicom uses the default if the field is missing or unknown. It defines no characters beyond ASCII.
    declared = {*convert_encodings(source.get("SpecificCharacterSet"))} != {default_encoding}
    before = {element.tag: element for element in found}
    try:
        found.copy_patient_and_study_information(source)
        copied = [element for element in found if before.get(element.tag) is not element]
        texts = {element.keyword: list(_texts(element)) for element in copied}
    except (AttributeError, LookupError, ValueError, TypeError, NotImplementedError):
        raise _unreadable(file, "a field of the patient or the study cannot be read") from None
    wrong = [name for name, values in texts.items() if any("\ufffd" in text for text in values)]
    if wrong:
        raise _unreadable(file, f"{' and '.join(wrong)} is not written in the SpecificCharacterSet of the file")
    if not declared and not all(text.isascii() for values in texts.values() for text in values):
        # Nobody knows which characters these are. Without a declaration, the bytes of the series are written.
        if not all(segment.SegmentLabel.isascii() for segment in found.SegmentSequence):
            raise _unreadable(file, "texts beyond ASCII have no SpecificCharacterSet, and names of regions need one")
        del found.SpecificCharacterSet


def _texts(element: Any) -> Iterator[str]:
    """Decode an element, also inside sequences, and yield its texts."""
    if element.VR != "SQ":
        yield str(element.value)
        return
    for item in element.value:
        item.decode()
        for inner in item:
            yield from _texts(inner)


def _unreadable(file: Path, reason: str) -> UserError:
    return UserError(f"{file}: {reason}; correct its header, or copy no fields of the patient (without --copy-patient)")


def _keep_geometry(data: Any) -> None:
    """Remove every field that is not in `_GEOMETRY`, also inside sequences."""
    from pydicom.datadict import keyword_for_tag

    for tag in list(data.keys()):
        if keyword_for_tag(tag) not in _GEOMETRY:
            del data[tag]
        elif data[tag].VR == "SQ":
            for item in data[tag].value:
                _keep_geometry(item)


def _encoded(data: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
