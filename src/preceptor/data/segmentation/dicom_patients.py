"""Put cases with one Patient ID (0010,0020) in the headers of their DICOM series into one group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from preceptor.data.dicom_series import patient_key
from preceptor.data.findings import Finding
from preceptor.data.groups import merge_groups
from preceptor.data.segmentation.layouts import MOST_SCANS
from preceptor.data.types import Case


def group_by_patient_id(cases: Sequence[Case]) -> tuple[list[Case], list[str], list[Finding]]:
    """Return the cases with merged groups, a note, and a finding on identifiers that seem to be no patient's.

    These are identifiers of more than 10 cases, or of all of them, as programs write that remove the patient from a
    file. They do not decide the groups. Neither texts nor cases contain an identifier.
    """
    keys = {case.id: {patient_key(file.path) for file in case.images.values() if file.path.is_dir()} for case in cases}
    by_key: defaultdict[str, list[str]] = defaultdict(list)
    for id, its_keys in keys.items():
        for key in its_keys:
            if key is not None:
                by_key[key].append(id)
    shared = {key: ids for key, ids in by_key.items() if len(ids) > 1}
    doubtful = {key: ids for key, ids in shared.items() if len(ids) > MOST_SCANS or len(ids) == len(cases)}
    used = {key: ids for key, ids in shared.items() if key not in doubtful}
    merged = merge_groups(cases, lambda case: [key for key in keys[case.id] if key in used])
    notes = []
    if used:
        number = len({id for ids in used.values() for id in ids})
        notes.append(
            f"{number} cases are scans of {len(used)} patient{'s' * (len(used) > 1)} by the Patient ID of their DICOM "
            "files; all cases of a patient are in one split."
        )
    findings = [
        Finding(
            tuple(ids),
            None,
            f"{len(ids)} of {len(cases)} cases have the same Patient ID in their DICOM files, such as "
            f"{' and '.join(ids[:2])}, and are taken for different patients; if they are of one patient, write a table "
            "with a column patient_id",
            "warning",
        )
        for ids in doubtful.values()
    ]
    return merged, notes, findings
