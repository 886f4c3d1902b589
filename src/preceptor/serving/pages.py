"""The pages for a browser: `/` with a section for each task, `/docs` with the API, and their scripts and styles."""

# No `from __future__ import annotations`: FastAPI reads annotations that name local variables.

from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException

from preceptor.data.dicom_series import OTHER_ENDINGS

# A page loads its own files and asks this server, nothing else. Pictures are data: URLs of the API and blob: URLs of
# chosen files; Swagger UI and NiiVue have icons and a font in data: URLs. Neither needs WebAssembly, workers, eval or
# inline styles.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
"""The files of `static` that are served; a browser refuses a script of another type."""

TASKS = ("vqa", "grounding", "segmentation")
"""The sections in their order."""


def add_pages(app: FastAPI, tasks: Mapping[str, str], *, notice: str, token: bool) -> None:
    """Add the pages to the application.

    Args:
        app: The application.
        tasks: Task of each model by its name.
        notice: Sentence on the use of the models, at the top of each page.
        token: Whether the API asks for a token.
    """
    models = {task: names for task in TASKS if (names := [name for name, kind in tasks.items() if kind == task])}
    package = resources.files("preceptor")
    static = dict(_files(package / "serving" / "static"))
    static["base.css"] = package / "report" / "templates" / "page.css"  # one look for reports and pages

    def page(template: str, **context: Any) -> HTMLResponse:
        html = _environment().get_template(template).render(notice=notice, **context)
        return HTMLResponse(html, headers={"content-security-policy": POLICY})

    @app.get("/", include_in_schema=False)
    def home() -> Response:
        return page("home.html.j2", models=models, token=token, other_endings=OTHER_ENDINGS)

    @app.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return page("docs.html.j2")

    @app.get("/static/{path:path}", include_in_schema=False)
    def file(path: str) -> Response:
        if path not in static:
            raise HTTPException(404)
        media_type = MEDIA_TYPES[path[path.rindex(".") :]]
        return Response(static[path].read_bytes(), media_type=media_type)


def _files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    """Yield the served files of a folder by their paths, whatever the package is installed as."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(tuple(MEDIA_TYPES)):
            yield f"{prefix}{entry.name}", entry


@lru_cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("preceptor", "serving/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
