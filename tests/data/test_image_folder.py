"""Folders of images."""

from __future__ import annotations

import pytest

from preceptor.data.image_folder import find_images
from preceptor.errors import UserError
from tests.data.dicom_files import dicom
from tests.data.test_images import GRADIENT, png


def test_folder_names_what_it_leaves_out(tmp_path):
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("a/1.png", "2.PNG", "._2.png", "notes.txt", ".hidden/3.png"):
        png(folder / name, GRADIENT)
    dicom(folder / "IM0001", GRADIENT)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    files, findings = find_images(folder)
    assert [file.relative_to(folder).as_posix() for file in files] == ["2.PNG", "IM0001", "a/1.png"]
    assert [finding.severity for finding in findings] == ["warning"]
    assert findings[0].reason == (
        "some entries of the folder are not used: 1 broken links (gone.png); 2 hidden (._2.png, .hidden); "
        "1 of another kind (notes.txt)"
    )


def test_links_to_folders_are_followed_once(tmp_path):
    store, folder = tmp_path / "store", tmp_path / "images"
    for case in ("p1", "p2"):
        (store / case).mkdir(parents=True)
        png(store / case / "0.png", GRADIENT)
    folder.mkdir()
    for case in ("p1", "p2"):
        (folder / case).symlink_to(store / case)
    assert [file.relative_to(folder).as_posix() for file in find_images(folder)[0]] == ["p1/0.png", "p2/0.png"]
    (store / "p1" / "loop").symlink_to(folder)
    (folder / "again").symlink_to(store / "p2")
    files, findings = find_images(folder)
    assert len(files) == 2
    assert "2 links to a folder that is already included" in findings[0].reason


def test_folder_without_images_says_what_is_there(tmp_path):
    png(tmp_path / "._a.png", GRADIENT)
    with pytest.raises(UserError, match=r"contains no image files .*; not used: 1 hidden \(\._a\.png\)"):
        find_images(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        find_images(tmp_path / "gone")
