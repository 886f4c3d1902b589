"""Find headers that may identify a patient or a person. Only the names of tags are read, never their values."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import ExifTags, Image

from preceptor.data.images import DICOM_MARK, DICOM_MARK_OFFSET, PILLOW_FORMATS, silent_pydicom

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
# Technical entries among the information that Pillow reads in addition to EXIF; other entries are comments and texts.
TECHNICAL = {
    "jfif",
    "jfif_version",
    "jfif_unit",
    "jfif_density",
    "dpi",
    "adobe",
    "adobe_transform",
    "progression",
    "progressive",
    "exif",
    "icc_profile",
    "gamma",
    "srgb",
    "chromaticity",
    "transparency",
    "interlace",
    "aspect",
    "background",
    "compression",
    "loop",
    "duration",
    "timestamp",
    "mp",
    "mpoffset",
    "default_image",
    "resolution",
}
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
    """Return the sorted names of the identifying tags of an image file that have a value."""
    data = path.read_bytes()
    if data[DICOM_MARK_OFFSET : DICOM_MARK_OFFSET + len(DICOM_MARK)] == DICOM_MARK:
        return tuple(sorted(f"DICOM {name}" for name in _dicom_tags(data)))
    with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
        return tuple(sorted({*_exif_tags(image), *_other_tags(image)}))


def _exif_tags(image: Image.Image) -> set[str]:
    exif = image.getexif()
    numbers = {number for number, value in exif.items() if value not in ("", b"", None)}
    inner = exif.get_ifd(ExifTags.IFD.Exif)
    numbers |= {number for number, value in inner.items() if value not in ("", b"", None)}
    if exif.get_ifd(ExifTags.IFD.GPSInfo):
        numbers.add(ExifTags.Base.GPSInfo)
    names = {ExifTags.TAGS.get(number, "") for number in numbers}
    return {f"EXIF {name}" for name in names & EXIF_TAGS}


def _other_tags(image: Image.Image) -> set[str]:
    names = {str(key) for key, value in image.info.items() if str(key).lower() not in TECHNICAL and value}
    kind = image.format or ""
    # The name of a text chunk is arbitrary and may be that of a person, so only customary names are reported.
    customary = {"comment", "author", "description", "title", "software", "source", "copyright", "xmp", "photoshop"}
    return {f"{kind} {name.lower() if name.lower() in customary else 'text'}" for name in names}


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
