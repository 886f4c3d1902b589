"""Find headers that may identify a patient or a person. Only the names of tags are read, never their values."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from PIL import ExifTags

from preceptor.data.containers import read_container
from preceptor.data.dicom_header import is_dicom, silent_pydicom
from preceptor.data.image_structure import Entry, Refused

# EXIF and TIFF tags with texts, names, times, places or serial numbers. The other tags are technical.
EXIF_TAGS = {
    "Artist",
    "BodySerialNumber",
    "CameraOwnerName",
    "Copyright",
    "DateTime",
    "DateTimeDigitized",
    "DateTimeOriginal",
    "DocumentName",
    "GPSInfo",
    "HostComputer",
    "ImageDescription",
    "ImageID",
    "ImageUniqueID",
    "LensSerialNumber",
    "MakerNote",
    "PageName",
    "UserComment",
    "XPAuthor",
    "XPComment",
    "XPKeywords",
    "XPSubject",
    "XPTitle",
}
# The name of a text chunk is arbitrary and may be that of a person, so only customary names are reported.
TEXTS = {"comment", "author", "description", "title", "software", "source", "copyright", "xmp", "photoshop"}
# Direct and indirect identifiers of the basic confidentiality profile of DICOM (PS3.15, table E.1-1).
DICOM_TAGS = (
    "AccessionNumber",
    "AcquisitionDate",
    "AcquisitionDateTime",
    "AdmissionID",
    "AdmittingDate",
    "ContentDate",
    "CountryOfResidence",
    "DeviceSerialNumber",
    "EthnicGroup",
    "InstanceCreationDate",
    "InstitutionAddress",
    "InstitutionName",
    "IssuerOfPatientID",
    "MilitaryRank",
    "NameOfPhysiciansReadingStudy",
    "Occupation",
    "OperatorsName",
    "OtherPatientIDs",
    "OtherPatientIDsSequence",
    "OtherPatientNames",
    "PatientAddress",
    "PatientAge",
    "PatientBirthDate",
    "PatientBirthName",
    "PatientBirthTime",
    "PatientComments",
    "PatientID",
    "PatientInsurancePlanCodeSequence",
    "PatientMotherBirthName",
    "PatientName",
    "PatientReligiousPreference",
    "PatientSex",
    "PatientSize",
    "PatientTelephoneNumbers",
    "PatientWeight",
    "PerformingPhysicianName",
    "PhysiciansOfRecord",
    "ReferringPhysicianName",
    "RegionOfResidence",
    "RequestingPhysician",
    "ResponsiblePerson",
    "SeriesDate",
    "StationName",
    "StudyDate",
    "StudyID",
)

ROWS = 0x00280010  # pydicom skips the values of all other tags
PIXELS = 0x7FE00008  # the first pixel tag; these tags come last


def identifying_tags(path: Path) -> tuple[str, ...]:
    """Return the sorted names of the identifying tags of an image file that have a value.

    Raises:
        Refused: the file is broken. `load_image` refuses such files too.
    """
    if path.exists() and not path.is_file():
        raise Refused("not a file", "give the path of an image file")
    data = path.read_bytes()
    if is_dicom(data):
        return tuple(sorted(f"DICOM {name}" for name in _dicom_tags(data)))
    container = read_container(data)
    if container is None:
        raise Refused("not an image that can be read")
    texts = {name.lower() if name.lower() in TEXTS else "text" for name in container.comments}
    return tuple(sorted({*_exif_tags(container.exif), *(f"{container.format} {name}" for name in texts)}))


def _exif_tags(entries: Iterable[Entry]) -> set[str]:
    """Return the names of tags in EXIF data or a TIFF file, except those whose value is blank."""
    names = {ExifTags.TAGS.get(entry.tag, "") for entry in entries if entry.value.strip(b"\0 ")}
    return {f"EXIF {name}" for name in names & EXIF_TAGS}


def _dicom_tags(data: bytes) -> set[str]:
    from pydicom.datadict import tag_for_keyword
    from pydicom.filereader import read_partial

    names = {tag_for_keyword(name): name for name in DICOM_TAGS}
    found: set[str] = set()

    def visit(tag: int, vr: str | None, length: int) -> bool:
        """Record an element. pydicom calls this before it reads the value."""
        if length and tag in names:
            found.add(names[tag])
        return tag >= PIXELS

    with silent_pydicom():
        read_partial(io.BytesIO(data), stop_when=visit, specific_tags=[ROWS])
    return found
