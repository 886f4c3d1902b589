"""`audit` and `doctor` count the same."""

from __future__ import annotations

from pathlib import Path

from preceptor.api import check
from preceptor.auditing.run import audit_data
from tests.auditing.made import picture, row, write_table


def test_the_ceiling_and_the_shared_images_are_those_of_doctor(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    rows = []
    for number, (split, answer) in enumerate(
        [
            ("train", "a"),
            ("train", "a"),
            ("train", "b"),
            ("validation", "a"),
            ("test", "a"),
            ("test", "b"),
            ("test", "c"),
        ]
    ):
        picture(number, 64).save(folder / f"{number}.png")
        rows.append(row(str(number), f"{number}.png", split, "Q?", answer) | {"group": f"g{number}"})
    (folder / "6.png").write_bytes((folder / "0.png").read_bytes())
    table = write_table(folder, rows)
    table = table / "questions.jsonl" if table.is_dir() else table
    for overrides, most in (([], "66.7%"), (["data.minimum_answer_count=2"], "33.3%")):
        reasons = " ".join(finding["reason"] for finding in check(str(table), overrides)["findings"])
        document = audit_data(str(table), overrides, None, None, None, tmp_path / "audit")
        assert f"{document['ceiling']:.1%}" == most
        assert f"at most {most}" in reasons
        assert "1 of 6 images are in more than one split" in reasons
        assert next(f["count"] for f in document["findings"] if f["check"] == "test_images") == 1
