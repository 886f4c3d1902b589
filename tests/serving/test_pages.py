"""The pages and their files: which sections there are, what they may load, and what is served."""

from __future__ import annotations

import re

import pytest
from starlette.testclient import TestClient

from preceptor import api
from preceptor.serving.app import NOTICE, create_app
from preceptor.serving.models import ServedModels
from tests.fuzz.model_folders import templates


def client(*tasks: str, token: str | None = None) -> TestClient:
    """Return a client of a server whose models are never loaded."""
    models = ServedModels({f"<{task}>": templates() / task for task in tasks}, api.load)
    models.start = lambda: None  # type: ignore[method-assign]
    return TestClient(create_app(models, token=token), base_url="http://127.0.0.1:8000")


@pytest.mark.parametrize("tasks", [("vqa",), ("segmentation", "grounding"), ("vqa", "grounding", "segmentation")])
def test_the_page_has_a_section_for_each_task_before_the_models_are_loaded(tasks: tuple[str, ...]) -> None:
    html = client(*tasks).get("/").text
    assert set(re.findall(r'data-task="(\w+)"', html)) == set(tasks)
    assert "Loading" in html
    assert all(f"&lt;{task}&gt;" in html for task in tasks)
    assert "<vqa>" not in html


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_run_and_load_only_files_of_this_server(path: str) -> None:
    found = client("vqa", "grounding", "segmentation").get(path)
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    assert NOTICE in found.text
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script>|https?://", found.text)
    for link in re.findall(r'(?:src|href)="(/[^"#]*)"', found.text):
        assert client("vqa").get(link).status_code == 200, link


def test_the_token_form_is_there_if_a_token_is_set() -> None:
    assert 'id="token"' not in client("vqa").get("/").text
    assert 'id="token"' in client("vqa", token="a" * 20).get("/").text
    assert "HTTPBearer" in client("vqa", token="a" * 20).get("/openapi.json").text


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("page.js", "text/javascript; charset=utf-8"),
        ("base.css", "text/css; charset=utf-8"),
        ("page.css", "text/css; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
        ("vendor/niivue/niivue.js", "text/javascript; charset=utf-8"),
        ("vendor/swagger-ui/swagger-ui.css", "text/css; charset=utf-8"),
    ],
)
def test_files_have_strict_types(path: str, media_type: str) -> None:
    found = client("vqa").get(f"/static/{path}")
    assert found.status_code == 200
    assert found.headers["content-type"] == media_type
    assert found.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["", "app.py", "../app.py", "..%2fapp.py", "/etc/passwd", "vendor", "vendor/README.md"]
)
def test_nothing_else_is_served(path: str) -> None:
    assert client("vqa").get(f"/static/{path}").status_code == 404


def test_scripts_name_no_other_host() -> None:
    opened = client("vqa")
    for name in ("api", "case_files", "docs", "dom", "grounding", "page", "segmentation", "viewer", "vqa"):
        text = opened.get(f"/static/{name}.js").text.replace('"http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|eval\(|innerHTML|localStorage|sessionStorage|document\.cookie", text), name
