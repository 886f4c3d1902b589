"""Write masks as a DICOM Segmentation object (DICOM PS3.3, A.51) that refers to the slices that were segmented."""

from __future__ import annotations

from collections.abc import Mapping
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
"""Fields of the slices, also inside sequences, that an object without fields of the patient is made from."""


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

    Raises:
        UserError: highdicom is not installed, the name does not end in .dcm, or a field that the standard requires is
            missing in the series.
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
        for data in sources.values():
            _complete(data, copy_patient)
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
                segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
                segmented_property_type=codes.SCT.Lesion,
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
                tracking_id=description,
                tracking_uid=hd.UID(),
            )
            for number, (label, description) in enumerate(regions.items(), 1)
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
        except (AttributeError, ValueError, TypeError) as error:
            raise UserError(f"{series}: a DICOM segmentation cannot refer to it ({error})") from error
    write_bytes(path, _encoded(found))


def _complete(data: Any, copy_patient: bool) -> None:
    """Set the fields that every object needs, and remove all but the geometry unless the patient shall be copied."""
    if not copy_patient:
        _keep_geometry(data)
        data.SpecificCharacterSet = "ISO_IR 192"  # UTF-8, for the names of the regions
    for name, empty in _PATIENT.items():
        if name not in data:
            setattr(data, name, empty)


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
