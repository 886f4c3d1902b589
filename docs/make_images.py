"""Take the pictures of the README: the report of a demonstration and the page of `preceptor serve`.

    preceptor demo mhkd && preceptor demo lckd
    python docs/make_images.py runs/mhkd-demo runs/lckd-demo

Needs playwright, Pillow and Chromium. All images in the pictures are generated.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parent / "images"
SOFTWARE_WEBGL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
DRAWN_MS = 5000
"""Time for the viewer to draw without a graphics card."""


def save(name: str, shot: bytes) -> None:
    """Write a picture as WebP, which is a few times smaller than PNG."""
    Image.open(io.BytesIO(shot)).convert("RGB").save(IMAGES / f"{name}.webp", quality=88, method=6)


def report(browser: Any, run: Path) -> None:
    page = browser.new_page(viewport={"width": 1100, "height": 775})
    page.goto((run / "report.html").resolve().as_uri())
    save("report", page.screenshot())


def served(browser: Any, address: str, vqa: Path, lckd: Path) -> None:
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.set_default_timeout(120_000)
    page.goto(address)
    page.wait_for_selector("#segmentation fieldset:not([disabled])")
    rows = [json.loads(line) for line in (vqa / "data" / "questions.jsonl").read_text("utf-8").splitlines()]
    row = next(row for row in rows if row["split"] == "test" and row["answer"] not in ("yes", "no"))
    page.set_input_files("#vqa-image", vqa / "data" / row["image"])
    page.fill("#vqa-question", row["question"])
    page.click("#vqa button[type=submit]")
    page.wait_for_selector("#vqa .columns:not([hidden])")
    save("serve-vqa", page.locator("#vqa").screenshot())
    case = max(path for path in (lckd / "data").iterdir() if path.is_dir())  # the last cases are those to test
    page.set_input_files("#segmentation-files", [path for path in sorted(case.iterdir()) if "seg" not in path.name])
    page.click("#segmentation button[type=submit]")
    page.wait_for_selector("canvas[data-shown]")
    page.wait_for_timeout(DRAWN_MS)
    save("serve-segmentation", page.locator("#segmentation").screenshot())


def main(vqa: Path, lckd: Path) -> None:
    IMAGES.mkdir(exist_ok=True)
    folders = [str(vqa / "distilled"), str(vqa / "teacher"), str(lckd)]
    command = [sys.executable, "-m", "preceptor", "serve", *folders, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://\S+:\d+", server.stdout.readline())[0]  # type: ignore[index,union-attr]
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=SOFTWARE_WEBGL)
            report(browser, vqa)
            served(browser, address, vqa, lckd)
            browser.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
