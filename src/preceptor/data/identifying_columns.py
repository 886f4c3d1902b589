"""Recognize the columns that name patients or examinations by their names, and check the identifiers in them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from preceptor.data.findings import Finding
from preceptor.data.texts import MISSING
from preceptor.normalizers import compatible, plain

_HIDDEN = {
    *("anon", "anonymous", "anonymised", "anonymized", "deid", "deidentified", "hashed"),
    *("pseudo", "pseudonymised", "pseudonymized"),
}
_QUALIFIERS = _HIDDEN | {"dicom", "original", "study", "unique"}
_PATIENTS = {
    *("patient", "participant", "paciente", "patienten", "patientin", "病人", "患者", "受试者"),
    *("mrn", "usubjid", "subjid", "uhid"),
}
_PERSONS = _PATIENTS | {
    *("pat", "pt", "subject", "subj", "sub", "person", "individual", "animal", "donor", "volunteer", "proband"),
    *("pid", "ssn", "nhs", "pseudonym"),
}
_ABBREVIATIONS = {"pat", "pt", "sub"}
_NUMBERS = {
    *("id", "ids", "identifier", "uid", "uuid", "guid", "number", "nummer", "no", "nr", "num", "key", "code", "name"),
    *("hash", "index", "ref", "reference", "token", "编号", "号", "番号", "姓名"),
}
_ATTRIBUTES = {
    *("age", "sex", "gender", "size", "height", "weight", "bmi", "birth", "date", "birthdate", "dob", "race", "state"),
    *("ethnicity", "species", "position", "orientation", "history", "comments", "comment", "status", "type", "class"),
    *("years", "year", "count", "category", "address", "matter", "diagnosis", "outcome", "cohort", "view"),
}
"""Words for what several patients share, as in the tags of DICOM: PatientAge, PatientPosition."""
_RECORDS = {"medicalrecord", "hospital", "chart"}
_EXAMINATIONS = {
    *("case", "study", "accession", "exam", "examination", "encounter", "admission", "hadm", "stay", "series", "scan"),
    *("session", "record", "report", "病例", "检查"),
}
_JOINED = {person + number for person in _PERSONS for number in _NUMBERS} | {
    record + number for record in _RECORDS for number in ("number", "no", "nr", "num")
}
_JOINED_EXAMINATIONS = {name + number for name in _EXAMINATIONS for number in _NUMBERS} | {
    *("studyinstanceuid", "seriesinstanceuid", "hn", "mrno", "mrnumber", "medicalrecordid", "hospitalid", "chartid"),
}
_UNKNOWN = MISSING | {"unknown", "anonymous", "anonymised", "anonymized", "-", "?"}


def _words(column: str) -> list[str]:
    """Return the words of a column's name in lower case, without numbers. A capital letter starts a word: PatientID.

    The suffixes `_x` and `_y`, which pandas gives the columns of merged tables, are left out: `patient_id_x`.
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", compatible(column)).lower()
    words = re.findall(r"[^\W\d_]+", spaced)
    return words[:-1] if len(words) > 2 and words[-1] in ("x", "y") else words


def names_patient(column: str) -> bool:
    """Return whether a column has a usual name of a patient's identifier, such as PatientID, id_patient or MRN.

    The whole name must match: `patient_age` and `subject_matter` do not.
    """
    named = [word for word in _words(column) if word not in _QUALIFIERS]
    person = bool(_PERSONS.intersection(named)) and all(word in _PERSONS or word in _NUMBERS for word in named)
    return person or "".join(named) in _JOINED


def names_examination(column: str) -> bool:
    """Return whether a column may identify examinations, or patients in other words.

    Such names are accession_number, case_no, case_group, HN, anon_id, patient_label and source_subject_id. Their values
    may also be those of a trial, a visit, a scanner or a diagnosis. They do not decide the groups; `unused_patients`
    reports them.
    """
    words = _words(column)
    named = [word for word in words if word not in _HIDDEN]
    if names_patient(column) or not named:
        return False
    numbers = [word for word in named if word in _NUMBERS or word in ("instance", "nbr", "group")]
    examination = len(named) - len(numbers) == 1 and bool(_EXAMINATIONS.intersection(named))
    alone = len(named) > 1 or named[0] in ("case", "study", "accession", "exam", "病例")
    return (examination and alone) or "".join(named) in _JOINED_EXAMINATIONS or _may_name_person(set(words))


def _may_name_person(words: set[str]) -> bool:
    """Return whether a name has a word for patients, or for persons or a pseudonym with one for an identifier."""
    persons = words & (_PERSONS - _ABBREVIATIONS)
    numbers = words & _NUMBERS
    pseudonym = bool(numbers) and numbers < words and words <= _HIDDEN | _NUMBERS
    return not words & _ATTRIBUTES and bool(words & _PATIENTS or (persons and numbers) or pseudonym)


def patient_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns that name a patient, in order."""
    return [column for column in columns if names_patient(column)]


def examination_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns that may name an examination or a patient, in order (see `names_examination`)."""
    return [column for column in columns if names_examination(column)]


def identifier_findings(column: str, values: Iterable[str]) -> list[Finding]:
    """Return warnings about the identifiers in a column that decides the groups. They contain no identifier.

    Names that differ only in case, leading zeros, a decimal ``.0`` or in signs that look alike are different groups,
    and a text such as ``nan`` is the name of one group.
    """
    counts = Counter(value for value in values if value)
    spellings: defaultdict[str, set[str]] = defaultdict(set)
    for value in counts:
        spellings[_spelled_alike(value)].add(value)
    alike = sum(len(names) > 1 for names in spellings.values())
    missing = sorted(value for value in counts if plain(value).lower() in _UNKNOWN)
    findings = []
    if alike:
        reason = (
            f"column {column!r}: {alike} names are written in several ways that differ only in case, zeros or signs "
            "that look alike, and are different groups; write each name in one way"
        )
        findings.append(Finding((), None, reason, "warning"))
    if missing:
        rows = sum(counts[value] for value in missing)
        reason = (
            f"column {column!r}: {rows} rows contain {missing[0]!r}, which is read as the name of one group; leave the "
            "cell empty if the patient is not known"
        )
        findings.append(Finding((), None, reason, "warning"))
    return findings


def _spelled_alike(name: str) -> str:
    text = "".join(plain(name).casefold().split())
    return str(int(number[1])) if (number := re.fullmatch(r"(\d{1,18})(?:\.0+)?", text)) else text
