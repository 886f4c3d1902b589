"""The pages in headless Chromium, as a user meets them: by keyboard, on a small screen, without another host."""

from __future__ import annotations

import gzip
import io
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

from preceptor import api
from preceptor.errors import UserError
from preceptor.serving.app import NOTICE
from tests.data.dicom_series_files import noise, slices_of, write_slices
from tests.fuzz.case_tables import nifti
from tests.fuzz.model_folders import templates
from tests.serving.server import StubGrounding, running

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

SOFTWARE_WEBGL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
TIMEOUT = 180_000
"""Milliseconds; pictures are drawn by the processor, which other tests use, too."""
BOX = (125, 250, 500, 900)
MODELS = {"student": "vqa", "teacher": "vqa", "finder": "grounding", "segmenter": "segmentation"}
STUB = StubGrounding("the liver <b>", [BOX])
PATIENT = "DOE_JANE_19700101"


def load(folder: Path) -> Any:
    return STUB if folder.name == "grounding" else api.load(folder)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(MODELS, load) as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright.expect.set_options(timeout=TIMEOUT)
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=SOFTWARE_WEBGL)
        yield opened
        opened.close()


@contextmanager
def page_of(browser: Any, address: str, *, width: int = 1280, expected: str = "", **options: Any) -> Iterator[Any]:
    """Yield an opened page. At its end it must have asked no other host and have no error on the console.

    Console errors that contain `expected` are allowed.
    """
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    foreign, errors = [], []
    local = (f"{address}/", "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(local) else foreign.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{address}/")
    try:
        yield page
        assert foreign == []
        assert [text for text in errors if not (expected and expected in text)] == []
    finally:
        context.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with page_of(browser, address) as opened:
        opened.wait_for_selector("fieldset:not([disabled])")
        yield opened


def image() -> str:
    return str(templates() / "image.png")


def ask(page: Any, task: str, question: str) -> None:
    page.set_input_files(f"#{task}-image", image())
    page.fill(f"#{task}-question", question)
    page.click(f"#{task} button[type=submit]")


def press_until(page: Any, selector: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} cannot be reached by Tab")


def test_models_that_cannot_be_loaded_are_named_and_the_others_answer(browser: Any) -> None:
    loaded: list[Path] = []

    def load(folder: Path) -> Any:
        loaded.append(folder)
        if loaded.count(folder) > 1 or folder.name == "segmentation":
            raise UserError("damaged")
        return api.load(folder)

    models = {"first": "vqa", "second": "vqa", "masks": "segmentation"}
    with running(models, load) as address, page_of(browser, address, expected="503") as page:
        page.wait_for_selector("#vqa fieldset:not([disabled])")
        state = page.text_content("#state")
        assert state == "Model: first. Not loaded: second, masks; the log of the server says why."
        assert page.is_hidden("#segmentation")
        ask(page, "vqa", "Where is the disc?")
        page.wait_for_selector("#vqa .columns:not([hidden])")
        assert page.eval_on_selector_all("#vqa article", "all => all.map(one => one.dataset.model)") == ["first"]


def test_a_question_is_answered_by_keyboard_only(page: Any) -> None:
    page.on("filechooser", lambda chooser: None)  # dialogs are intercepted from here on, not only when one is expected
    press_until(page, "#vqa-image")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(image())
    press_until(page, "#vqa-question")
    page.keyboard.type("Where is the disc?")
    press_until(page, "#vqa button[type=submit]")
    page.keyboard.press("Enter")
    page.wait_for_selector("#vqa .columns:not([hidden])")
    (row,) = api.predict(templates() / "vqa", image=image(), question="Where is the disc?", top=5)
    expected = [(answer["answer"], f"{100 * answer['probability']:.1f} %") for answer in row["answers"]]
    for name in ("student", "teacher"):
        bars = page.locator(f"article[data-model={name}] .bars dl > div")
        found = [tuple(bar.locator("dt, b").all_inner_texts()) for bar in bars.all()]
        assert found == expected
    assert page.locator("#vqa .message").get_attribute("role") == "status"
    assert f"student: {expected[0][0]}" in page.locator("#vqa .message").inner_text()


def test_a_truncated_question_has_a_line_below_the_answers(page: Any) -> None:
    ask(page, "vqa", "disc " * 300)
    page.wait_for_selector("#vqa .columns:not([hidden])")
    (warning,) = api.load(templates() / "vqa").answer(image(), "disc " * 300).warnings
    for name in ("student", "teacher"):
        assert page.locator(f"article[data-model={name}] .bars ~ .warnings li").all_inner_texts() == [warning]
    ask(page, "vqa", "Where is the disc?")
    page.wait_for_selector("#vqa .warnings li", state="detached")


def test_bars_are_as_long_as_the_probabilities(page: Any) -> None:
    ask(page, "vqa", "Where is the disc?")
    page.wait_for_selector("#vqa .columns:not([hidden])")
    for bar in page.locator("article[data-model=student] .bars dl > div").all():
        shown = float(bar.locator("b").inner_text().removesuffix(" %")) / 100
        full, filled = (bar.locator(name).bounding_box()["width"] for name in (".track", ".fill"))
        assert abs(filled / full - shown) < 0.02


def test_the_slider_changes_the_opacity_of_all_maps(page: Any) -> None:
    ask(page, "vqa", "Where is the disc?")
    page.wait_for_selector("#vqa .columns:not([hidden])")
    slider = page.locator("#vqa-opacity")
    opacities = "Array.from(document.querySelectorAll('.map'), (map) => getComputedStyle(map).opacity)"
    assert page.evaluate(opacities) == ["0.7", "0.7"]
    slider.focus()
    page.keyboard.press("Home")
    assert page.evaluate(opacities) == ["0", "0"]
    page.keyboard.press("ArrowRight")
    assert page.evaluate(opacities) == ["0.05", "0.05"]
    assert page.locator("output[for=vqa-opacity]").inner_text() == "5 %"


def test_boxes_are_at_their_pixels_at_every_width(page: Any) -> None:
    page.select_option("#grounding-modality", "mr")
    ask(page, "grounding", "Where is the liver?")
    page.wait_for_selector("#grounding .columns:not([hidden])")
    assert STUB.asked[-1] == ("Where is the liver?", "mr")
    assert page.locator("#grounding .text").inner_text() == "the liver <b>"
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        outer = page.locator("#grounding .layers img").bounding_box()
        inner = page.locator("#grounding .box").evaluate(
            "(box) => { const {x, y, width, height} = box.getBBox(); const svg = box.ownerSVGElement"
            ".getBoundingClientRect(); return [svg.x + x, svg.y + y, svg.x + x + width, svg.y + y + height]; }"
        )
        corner, size = (outer["x"], outer["y"]), (outer["width"], outer["height"])
        expected = [corner[i % 2] + size[i % 2] * BOX[i] / 1000 for i in range(4)]
        assert np.allclose(inner, expected, atol=1)
    with Image.open(image()) as original:
        assert abs(outer["width"] / outer["height"] - original.width / original.height) < 0.01


def test_a_dicom_image_is_shown_with_the_answer(page: Any) -> None:
    from pydicom.data import get_testdata_file

    page.set_input_files("#vqa-image", get_testdata_file("CT_small.dcm"))
    page.fill("#vqa-question", "Where is the disc?")
    page.click("#vqa button[type=submit]")
    page.wait_for_selector("#vqa .columns:not([hidden])")
    assert page.locator("#vqa .preview").is_hidden()
    natural = "(image) => [image.naturalWidth, image.naturalHeight]"
    assert page.locator("article[data-model=student] .layers img").first.evaluate(natural) == [128, 128]


def case_files(folder: Path, *names: str) -> list[str]:
    rng = np.random.default_rng(5)
    folder.mkdir(exist_ok=True)
    for name in names:
        array = rng.integers(1, 99, (16, 16, 16)).astype(np.int16)
        (folder / f"{PATIENT}_{name}.nii.gz").write_bytes(gzip.compress(nifti(array)))
    return [str(folder / f"{PATIENT}_{name}.nii.gz") for name in names]


def shown_numbers(page: Any) -> dict[str, list[str]]:
    rows = page.locator(".volumes tbody tr").all()
    return {row.get_attribute("data-region"): row.locator("td").all_inner_texts() for row in rows}


def test_switching_contrasts_shows_the_numbers_of_the_api(page: Any, address: str, tmp_path: Path) -> None:
    files = case_files(tmp_path, "flair", "t1", "seg")
    page.set_input_files("#segmentation-files", files)
    playwright.expect(page.locator(".found select")).to_have_count(3)
    assert [select.input_value() for select in page.locator(".found select").all()] == ["flair", "t1", ""]
    assert page.locator(".found .volume .small").all_inner_texts() == ["by its name", "by its name", ""]
    page.click("#segmentation button[type=submit]")
    page.wait_for_selector("canvas[data-shown=flair]")
    upload = {name: ("x", Path(file).read_bytes()) for name, file in zip(("flair", "t1"), files, strict=False)}
    case = httpx.post(f"{address}/v1/segment", files=upload, timeout=60).json()["case"]
    volumes = set()
    for chosen in (["flair", "t1"], ["t1"], ["flair"]):
        for name in ("flair", "t1"):
            page.locator(f".contrasts input[value={name}]").set_checked(name in chosen)
        data = {"case": case, "modalities": "+".join(chosen)}
        row = httpx.post(f"{address}/v1/segment", data=data, timeout=60).json()
        playwright.expect(page.locator(".volumes caption")).to_contain_text(f"from {', '.join(chosen)}. Expected")
        expected = row["expected_dice"]["whole"] if row["expected_dice"] else None
        dice = "unknown" if expected is None else f"{expected:.3f}"
        assert shown_numbers(page) == {"whole": [f"{row['volumes_ml']['whole']:.2f}", dice, "0.750"]}
        assert page.locator(".warnings li").all_inner_texts() == row["warnings"]
        assert "4 validation cases" in page.locator(".volumes caption").inner_text()
        volumes.add(row["volumes_ml"]["whole"])
    assert len(volumes) > 1
    page.locator(".contrasts input[value=flair]").uncheck()
    playwright.expect(page.locator("#case-message.error")).to_have_text("choose at least one contrast")


def test_the_viewer_draws_the_mask_and_its_opacity(page: Any, tmp_path: Path) -> None:
    page.set_input_files("#segmentation-files", case_files(tmp_path, "flair", "t1"))
    page.click("#segmentation button[type=submit]")
    page.wait_for_selector("canvas[data-shown=flair]")
    page.locator(".canvas").scroll_into_view_if_needed()

    def colored(wanted: Callable[[float], bool]) -> float:
        """Return the share of red, the colour of the first region, once it is as wanted or the time is over."""
        end = time.monotonic() + TIMEOUT / 1000
        while True:
            shot = page.locator(".canvas").screenshot()
            pixels = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)
            share = float((pixels[..., 0] - pixels[..., 1] > 40).mean())
            if wanted(share) or time.monotonic() > end:
                return share
            page.wait_for_timeout(200)

    with_mask = colored(lambda share: share > 0.02)
    assert with_mask > 0.02
    page.locator("#mask-opacity").focus()
    page.keyboard.press("Home")
    assert colored(lambda share: share < with_mask / 10) < with_mask / 10
    page.select_option("#shown-contrast", "t1")
    page.wait_for_selector("canvas[data-shown=t1]")
    for view in ("0", "1", "2", "4"):
        page.select_option("#shown-view", view)
        page.locator("canvas").focus()
        page.keyboard.press("ArrowUp")


def test_a_folder_of_dicom_series_is_a_volume_for_each_folder(page: Any, tmp_path: Path) -> None:
    for seed, name in enumerate(("flair", "unnamed")):
        write_slices(tmp_path / "case" / name, slices_of(noise((16, 16, 16), seed)))
    page.set_input_files("#segmentation-folder", str(tmp_path / "case"))
    labels = page.locator(".found .volume label")
    playwright.expect(labels).to_have_count(2)
    assert sorted(labels.all_inner_texts()) == ["flair (16 files)", "unnamed (16 files)"]
    page.get_by_label("unnamed (16 files)").select_option("t1")
    page.click("#segmentation button[type=submit]")
    page.wait_for_selector("canvas[data-shown=flair]")
    assert "Segmented from flair, t1." in page.locator("#segmentation .message").first.inner_text()


@pytest.mark.parametrize("whole", [True, False])
def test_files_that_are_no_slices_by_their_names_are_not_used(page: Any, tmp_path: Path, whole: bool) -> None:
    write_slices(tmp_path / "case" / "flair", slices_of(noise((16, 16, 16))))
    for name in ("series.json", "DICOMDIR", "report.PDF"):
        (tmp_path / "case" / "flair" / name).write_bytes(b"{}")
    if whole:
        page.set_input_files("#segmentation-folder", str(tmp_path / "case"))
        playwright.expect(page.locator(".found .volume label")).to_have_text(["flair (16 files)"])
    else:
        page.set_input_files("#file-flair", [str(path) for path in (tmp_path / "case" / "flair").iterdir()])
    page.click("#segmentation button[type=submit]")
    says = "Segmented from flair. Not used, because they are no images by their names: 3 of the files."
    playwright.expect(page.locator("#segmentation form .message")).to_have_text(says)
    assert page.locator(".warnings li").all_inner_texts() == [], "they were not sent"


class Renamed:
    """The segmentation model of the template with another name for its region."""

    def __init__(self, model: Any) -> None:
        self.model, self.modalities, self.config = model, model.modalities, model.config
        self.max_voxels = model.max_voxels
        self.regions = {"core": model.regions["whole"]}

    def segment(self, *arguments: Any, **options: Any) -> Any:
        found = self.model.segment(*arguments, **options)
        return replace(
            found, regions=self.regions, volumes_ml={"core": 7.0}, expected_dice=None, expected_dice_of_all=None
        )


def held_requests(page: Any, path: str) -> list[Any]:
    """Return the list of requests to a path; they are held until the test continues them."""
    held: list[Any] = []
    page.route(f"**{path}", lambda route: held.append(route))
    return held


def wait_until(page: Any, condition: Callable[[], Any]) -> None:
    while not condition():
        page.wait_for_timeout(20)


def test_a_change_of_the_model_aborts_the_request_to_the_other_one(browser: Any, tmp_path: Path) -> None:
    loaded: list[Any] = []

    def load(folder: Path) -> Any:
        loaded.append(api.load(folder))
        return loaded[-1] if len(loaded) == 1 else Renamed(loaded[-1])

    models = {"first": "segmentation", "second": "segmentation"}
    with running(models, load) as address, page_of(browser, address) as page:
        page.wait_for_selector("#segmentation fieldset:not([disabled])")
        message, files = page.locator("#segmentation form .message"), case_files(tmp_path, "flair", "t1")
        held = held_requests(page, "/v1/segment")
        page.set_input_files("#file-flair", files[0])
        page.click("#segmentation button[type=submit]")
        wait_until(page, lambda: held)
        page.select_option("#segmentation-model", "second")
        playwright.expect(message).to_have_text("Cancelled.")
        with suppress(playwright.Error):  # Chromium has dropped it
            held[0].continue_()
        page.unroute("**/v1/segment")
        page.wait_for_timeout(1000)
        assert page.is_hidden("#segmentation .case")
        page.set_input_files("#file-flair", files[0])
        page.click("#segmentation button[type=submit]")
        page.wait_for_selector("canvas[data-shown=flair]")
        assert shown_numbers(page) == {"core": ["7.00", "unknown", "unknown"]}
        held = held_requests(page, "/v1/cases/**")
        page.select_option("#segmentation-model", "first")  # hides the case
        page.set_input_files("#file-t1", files[1])
        page.click("#segmentation button[type=submit]")
        wait_until(page, lambda: held)
        assert list(shown_numbers(page)) == ["whole"]


def test_a_change_of_the_question_or_the_image_aborts_the_request(page: Any, tmp_path: Path) -> None:
    Image.new("L", (30, 20), 99).save(tmp_path / "other.png")
    held = held_requests(page, "/v1/answer")
    message = page.locator("#vqa .message")
    changes = (
        lambda: page.fill("#vqa-question", "Another?"),
        lambda: page.set_input_files("#vqa-image", str(tmp_path / "other.png")),
    )
    for number, change in enumerate(changes, 1):
        ask(page, "vqa", "Where is the disc?")
        wait_until(page, lambda number=number: len(held) >= 2 * number)  # of both models
        playwright.expect(message).to_have_text("Waiting for the answer …")
        change()
        playwright.expect(message).to_have_text("Cancelled.")
    assert page.is_hidden("#vqa .columns")


def test_two_volumes_of_a_contrast_and_no_volume_are_sentences(page: Any, tmp_path: Path) -> None:
    message = page.locator("#segmentation form .message")
    page.click("#segmentation button[type=submit]")
    playwright.expect(message).to_have_text("give the files of at least one contrast: flair, t1")
    files = case_files(tmp_path, "flair", "t1")
    page.set_input_files("#segmentation-files", files)
    page.set_input_files("#file-flair", files[1])
    page.click("#segmentation button[type=submit]")
    playwright.expect(message).to_have_text("two volumes are given for flair; choose one")


def test_errors_of_the_api_are_sentences_in_a_live_region(browser: Any, address: str, tmp_path: Path) -> None:
    (tmp_path / f"{PATIENT}.png").write_bytes(b"no image")
    with page_of(browser, address, expected="422") as page:
        page.wait_for_selector("fieldset:not([disabled])")
        page.set_input_files("#vqa-image", str(tmp_path / f"{PATIENT}.png"))
        page.fill("#vqa-question", "Where is the disc?")
        page.click("#vqa button[type=submit]")
        page.wait_for_selector("#vqa .error[role=status]")
        sentence = page.locator("#vqa .message").inner_text()
        assert "not an image that can be read" in sentence
        assert PATIENT not in sentence


def test_a_running_question_can_be_cancelled(page: Any) -> None:
    page.route("**/v1/answer", lambda route: None)  # no answer ever
    ask(page, "vqa", "Where is the disc?")
    cancel = page.locator("#vqa .cancel")
    cancel.wait_for()
    cancel.focus()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#vqa .message")).to_have_text("Cancelled.")
    assert cancel.is_hidden()
    assert page.evaluate("document.activeElement.textContent") == "Ask"


def test_the_token_is_asked_for_and_not_stored(browser: Any) -> None:
    token = "correct horse battery"
    with (
        running({"finder": "grounding"}, load, token=token) as address,
        page_of(browser, address, expected="401") as page,
    ):
        playwright.expect(page.locator("#state")).to_contain_text("token")
        assert page.locator("#grounding-question").is_disabled()
        page.fill("#token-value", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#access .error")
        page.fill("#token-value", token)
        page.keyboard.press("Enter")
        page.wait_for_selector("#grounding fieldset:not([disabled])")
        page.select_option("#grounding-modality", "ct")
        ask(page, "grounding", "Where?")
        page.wait_for_selector("#grounding .columns:not([hidden])")
        stored = "[localStorage.length, sessionStorage.length, document.cookie, location.href]"
        assert page.evaluate(stored) == [0, 0, "", f"{address}/"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_all_sections_pass_axe_and_fit_the_screen(
    browser: Any, address: str, tmp_path: Path, width: int, scheme: str
) -> None:
    with page_of(browser, address, width=width, color_scheme=scheme, reduced_motion="reduce") as page:
        page.wait_for_selector("fieldset:not([disabled])")
        ask(page, "vqa", "Where is the disc?")
        page.select_option("#grounding-modality", "x")
        ask(page, "grounding", "Where is the liver?")
        page.set_input_files("#segmentation-files", case_files(tmp_path, "flair", "t1"))
        page.click("#segmentation button[type=submit]")
        page.wait_for_selector("#vqa .columns:not([hidden])")
        page.wait_for_selector("#grounding .columns:not([hidden])")
        page.wait_for_selector("canvas[data-shown=flair]")
        found = axe.Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.get_by_text(NOTICE).is_visible()


def test_the_api_page_lists_the_routes_under_the_strict_policy(browser: Any, address: str) -> None:
    with page_of(browser, address, width=400) as page:
        page.goto(f"{address}/docs")
        page.wait_for_selector(".opblock")
        paths = {text.replace("​", "") for text in page.locator(".opblock-summary-path").all_inner_texts()}
        assert {"/v1/answer", "/v1/ask", "/v1/segment", "/v1/models", "/healthz"} <= paths
        page.locator("#operations-default-answer_v1_answer_post button").first.click()
        page.wait_for_selector(".opblock-body")
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        assert page.get_by_text(NOTICE).first.is_visible()
