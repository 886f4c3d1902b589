"""The JSON API: /v1/models, /v1/answer, /v1/segment, /v1/ask, /v1/cases, /healthz."""

# No `from __future__ import annotations`: FastAPI reads annotations that name local variables.

import asyncio
import base64
import errno
import hashlib
import inspect
import io
import json
import re
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, File, Form, Request, Response, Security, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from starlette import datastructures
from starlette.exceptions import HTTPException

from preceptor.data.images import load_image
from preceptor.data.nifti import write
from preceptor.data.segmentation.modalities import find_modality, spelled_as
from preceptor.data.types import VolumeFile
from preceptor.data.volumes import Reader
from preceptor.errors import UserError, nearest, printable
from preceptor.grounding.settings import as_modality
from preceptor.os_errors import describe_os_error
from preceptor.serving.jobs import JobQueue, QueueFull, RequestTimeout
from preceptor.serving.models import ServedModels
from preceptor.serving.pages import add_pages
from preceptor.serving.security import Guard
from preceptor.serving.uploads import Cases, Scratch, TooManyCases, save_image, save_volume

NOTICE = "For research only. Not a medical device; not for diagnosis or treatment."

_MAP_SIDE = 256
"""Pixels per side of an activation map; a page stretches it over the image."""

_PICTURE_SIDE = 1024
"""Most pixels per side of the picture of an uploaded image."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

_MOST_SECONDS_BETWEEN_SWEEPS = 60
"""Cases that were not used for `Limits.case_seconds` are removed at most so much later."""


@dataclass(frozen=True)
class Limits:
    """Ceilings of the server.

    Attributes:
        upload_bytes: Largest request.
        stalled_seconds: Longest time in which nothing of a request arrives; then status 408.
        images: Most images of a question.
        waiting: Most requests that wait for a model or use it; others get status 503.
        seconds: Longest time of a request after its upload; then status 504.
        cases: Most uploaded cases that are kept. If so many are in use, a request that uploads another gets status 503.
        case_seconds: Time without use after which a case is removed.
        question: Most characters of a question.
    """

    upload_bytes: int = 512 * 2**20
    stalled_seconds: float = 60.0
    images: int = 8
    waiting: int = 256
    seconds: float = 120.0
    cases: int = 4
    case_seconds: float = 900.0
    question: int = 2000


_PICTURE = "also the image as the model reads it, as PNG; browsers cannot show DICOM"

_SEGMENT_BODY = {
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "CONTRAST": {
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                        "description": "a field for each contrast, named as in /v1/models: a NIfTI file, or the "
                        "files of a DICOM series",
                    },
                    "case": {"type": "string", "description": "instead of files: id of an uploaded case"},
                    "modalities": {
                        "type": "string",
                        "description": "contrasts to use, such as flair+t1 or flair,t1; default: all",
                    },
                    "post": {"type": "boolean", "description": "whether to post-process the mask"},
                    "model": {"type": "string", "description": "default: the first segmentation model"},
                },
            }
        }
    }
}


DEFAULTS = Limits()


class Refused(Exception):
    """A request that cannot be answered: its status and the sentence for its sender."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


def create_app(models: ServedModels, *, token: str | None = None, limits: Limits = DEFAULTS) -> FastAPI:
    """Return the application that serves `models`. They are loaded when it starts.

    With a `token`, requests to the API need the header ``Authorization: Bearer TOKEN``.
    """
    scratch = Scratch()
    cases = Cases(scratch, limits.cases, limits.case_seconds)
    queue = JobQueue(limits.waiting, limits.seconds)

    async def sweep() -> None:
        while True:
            await asyncio.sleep(max(1, min(limits.case_seconds, _MOST_SECONDS_BETWEEN_SWEEPS)))
            cases.expire()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        models.start()
        sweeping = asyncio.create_task(sweep())
        yield
        sweeping.cancel()
        queue.close()
        cases.close()
        scratch.close()

    app = FastAPI(
        title="Preceptor",
        description=NOTICE,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        # Describes the token in /openapi.json; `Guard` checks it.
        dependencies=[Security(HTTPBearer(auto_error=False))] if token is not None else [],
    )
    app.add_middleware(Guard, token=token, most_bytes=limits.upload_bytes, seconds=limits.stalled_seconds)
    app.state.scratch = scratch
    add_pages(app, models.tasks, notice=NOTICE, token=token is not None)

    async def compute(request: Request, function: Callable[[], Any], folder: Path | None = None) -> Any:
        """Run a function of a model in the queue; its errors have no paths of this machine.

        If the client disconnects, a function that still waits is dropped.
        """
        try:
            return await unless_disconnected(request, queue.run(function))
        except QueueFull:
            raise Refused(503, f"{limits.waiting} requests are waiting; try again later") from None
        except RequestTimeout:
            raise Refused(504, f"the answer took longer than {limits.seconds:g} s") from None
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            if (found := refusal(error, 422, folder)) is None:
                raise
            raise found from None

    def refusal(error: Exception, status: int, folder: Path | None = None) -> Refused | None:
        """Return the refusal with a status for an error, without paths of this machine; None for a defect.

        If there is no space left for the files of a request, the status is 507.
        """
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return Refused(507, "the server has no space left for the files of this request; try again later")
        sentence = str(error) if isinstance(error, UserError) else describe_os_error(error)
        if sentence is None:
            return None
        words = {place: "the upload" for place in (folder, scratch.folder) if place is not None}
        words |= {place: f"the model {name}" for name, place in models.folders.items()}
        return Refused(status, without_paths(sentence, words))

    @app.get("/healthz")
    def health() -> Response:
        """Status 200 once all models are loaded, else 503: `loading`, then `failed` if one of them cannot be loaded."""
        state = "ready" if models.ready else "failed" if models.loaded else "loading"
        return JSONResponse({"status": state}, 200 if models.ready else 503)

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        """The served models, what they can be asked, and what validation promises."""
        return {"notice": NOTICE, "models": models.describe()}

    @app.post("/v1/answer")
    async def answer(
        request: Request,
        image: Annotated[UploadFile, File(description="PNG, JPEG, TIFF or DICOM")],
        question: Annotated[str, Form(max_length=limits.question)],
        model: Annotated[str, Form(description="default: the first VQA model")] = "",
        top: Annotated[int, Form(ge=1, le=100, description="number of answers")] = 3,
        heatmap: Annotated[bool, Form(description="also the activation map of the first answer, as PNG")] = False,
        picture: Annotated[bool, Form(description=_PICTURE)] = False,
    ) -> dict[str, Any]:
        """Answer a question about an image with probabilities."""
        await check_fields(request)
        served = await known(model, "vqa")
        with scratch.request() as folder:
            path = await save_image(image, folder)

            def run() -> dict[str, Any]:
                # Imported here: the page opens before torch is imported.
                from preceptor.vqa.activation_map import color_map

                found = served.answer(path, question, top=top)
                row = {name: value for name, value in found.to_dict().items() if name != "id"}
                if heatmap:
                    row["heatmap"] = png_url(color_map(found.heatmap(), _MAP_SIDE))
                return row | ({"picture": picture_url(path)} if picture else {})

            return await compute(request, run, folder)

    @app.post("/v1/ask")
    async def ask(
        request: Request,
        image: Annotated[list[UploadFile], File(description="PNG, JPEG, TIFF or DICOM; one or several")],
        question: Annotated[str, Form(max_length=limits.question)],
        model: Annotated[str, Form(description="default: the first grounding model")] = "",
        modality: Annotated[str, Form(description="ct, mr, x, ..., if the model needs it")] = "",
        max_new_tokens: Annotated[int, Form(ge=1, le=512)] = 128,
        picture: Annotated[bool, Form(description=f"{_PICTURE}; of several images the first")] = False,
    ) -> dict[str, Any]:
        """Ask a grounded model; boxes are x1, y1, x2, y2 in thousandths of the width and height of the image."""
        await check_fields(request, several=("image",))
        if len(image) > limits.images:
            raise Refused(422, f"{len(image)} images; at most {limits.images} are allowed")
        try:
            as_modality(modality)  # before the images are written
        except UserError as error:
            raise Refused(422, str(error)) from None
        served = await known(model, "grounding")
        with scratch.request() as folder:
            paths = [await save_image(upload, folder, number) for number, upload in enumerate(image, 1)]

            def run() -> dict[str, Any]:
                found = served.ask(paths, question, modality=modality, max_new_tokens=max_new_tokens)
                row = {name: value for name, value in found.to_dict().items() if name != "id"}
                return row | ({"picture": picture_url(paths[0])} if picture else {})

            return await compute(request, run, folder)

    @app.post("/v1/segment", openapi_extra={"requestBody": _SEGMENT_BODY})
    async def segment(request: Request) -> dict[str, Any]:
        """Segment a case from the contrasts that are given.

        The first request uploads a NIfTI file, or the files of a DICOM series, for each contrast, and gets the id of
        the case. Further requests give this `case` and the `modalities` to use, such as ``flair+t1``.
        """
        if sentence := not_a_form(request):
            raise Refused(422, sentence)
        with ExitStack() as use:
            async with request.form(max_files=10_000, max_fields=10) as form:
                fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
                files = [(name, value) for name, value in form.multi_items() if not isinstance(value, str)]
                served = await known(fields.get("model", ""), "segmentation")
                if text := next((name for name in fields if find_modality(name, served.modalities)), None):
                    raise Refused(422, not_a_file(text))
                texts = [name for name, value in form.multi_items() if isinstance(value, str)]
                refuse_fields(request, texts, ("case", "modalities", "post", "model"))
                post = parse_switch("post", fields.get("post", ""))
                if bool(files) == bool(fields.get("case")):
                    raise Refused(422, "give either one file field per contrast, or the field case with its id")
                if files:
                    try:
                        id = use.enter_context(cases.new())  # removed if this request fails
                    except TooManyCases:
                        raise Refused(503, f"{limits.cases} cases are in use; try again later") from None
                    available = await save_files(id, files, served.modalities)
                    cases.add(id, available)
                else:
                    id = fields["case"]
                    available = use.enter_context(case(id, 422))
            names = fields.get("modalities", "")
            try:
                chosen = spelled_as(list(available), dict.fromkeys(name for name in names.split("+") if name))
                if not set(chosen) <= set(available):  # in a urlencoded form, + means a blank
                    listed = (name for name in re.split(r"[+,\s]+", names) if name)
                    chosen = spelled_as(list(available), dict.fromkeys(listed))
            except UserError as error:
                raise Refused(422, str(error)) from None
            if names and not chosen:
                raise Refused(422, f"modalities is {names!r}, which names no contrast; give some, such as flair+t1")
            chosen = chosen or list(available)
            if unknown := sorted(set(chosen) - set(available)):
                raise Refused(422, f"the case has no {unknown[0]}; it has {', '.join(available)}")
            key = mask_key(fields.get("model", ""), chosen, post)

            def run() -> dict[str, Any]:
                with cases.use(id):  # also after a request that did not wait for it
                    found = served.segment({name: available[name] for name in chosen}, post=post)
                    found.save(scratch.folder / id / f"mask-{key}.nii.gz")
                return {name: value for name, value in found.to_dict().items() if name != "case"}

            row = await compute(request, run, scratch.folder / id)
            return {"case": id, "available": list(available), "mask": f"/v1/cases/{id}/masks/{key}", **row}

    async def save_files(
        id: str, files: Sequence[tuple[str, datastructures.UploadFile]], modalities: Sequence[str]
    ) -> dict[str, Path]:
        """Write the uploaded files of a case; return their paths by modality."""
        fields = list(dict.fromkeys(name for name, _ in files))
        try:
            given = dict(zip(spelled_as(modalities, fields), fields, strict=True))
            if unknown := sorted(set(given) - set(modalities)):
                raise Refused(422, f"{unknown[0]!r} is not a contrast of this model; it knows {', '.join(modalities)}")
            folder, names = scratch.folder / id, [name for name in modalities if name in given]
            return {name: await save_volume([f for n, f in files if n == given[name]], folder, name) for name in names}
        except UserError as error:
            raise Refused(422, str(error)) from None

    @app.get("/v1/cases/{id}/masks/{key}", response_class=Response)
    def mask(id: str, key: str) -> Response:
        """The label map of a segmentation, whose answer has this address as `mask`, as .nii.gz."""
        with case(id, 404):
            path = scratch.folder / id / f"mask-{key}.nii.gz"
            if not key.isalnum() or not path.is_file():
                raise Refused(404, "the case has no such mask; take the address from the answer of /v1/segment")
            return Response(path.read_bytes(), media_type="application/gzip")

    @app.get("/v1/cases/{id}/{contrast}", response_class=Response)
    async def volume(request: Request, id: str, contrast: str) -> Response:
        """The volume of a contrast of a case as the model reads it, as .nii.gz; from a DICOM series, too."""
        with case(id, 404) as available:
            contrast = find_modality(contrast, available) or contrast
            if contrast not in available:
                raise Refused(404, f"the case has no {contrast}; it has {', '.join(available)}")
            path = scratch.folder / id / "view" / f"{contrast}.nii.gz"

            def run() -> bytes:
                with cases.use(id):
                    if not path.is_file():
                        path.parent.mkdir(exist_ok=True)
                        voxels, grid = Reader(models.max_voxels).volume(VolumeFile(available[contrast]))
                        write(path, voxels.astype(np.float32), grid)
                    return path.read_bytes()

            return Response(await compute(request, run, scratch.folder / id), media_type="application/gzip")

    @contextmanager
    def case(id: str, status: int) -> Iterator[dict[str, Path]]:
        """Yield the files by modality of a case, which is kept meanwhile. If there is none, refuse with a status."""
        with ExitStack() as use:
            try:
                files = use.enter_context(cases.use(id))
            except UserError as error:
                raise Refused(status, str(error)) from None
            yield files

    async def known(name: str, task: str) -> Any:
        """Return a model, after the models are loaded."""
        try:
            chosen = models.choose(name, task)
        except UserError as error:
            raise Refused(404, str(error)) from None
        if not models.loaded:
            raise Refused(503, "the models are being loaded; try again in a few seconds")
        try:
            return models.get(chosen)
        except UserError:
            raise Refused(503, f"the model {chosen} cannot be loaded; the log of the server says why") from None

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> JSONResponse:
        headers = {"retry-after": "5"} if error.status == 503 else {}
        return JSONResponse({"detail": error.sentence}, error.status, headers)

    @app.exception_handler(OSError)
    def system_error(request: Request, error: OSError) -> JSONResponse:
        """Answer an error outside of `compute`: while an upload is received or written."""
        if (found := refusal(error, 503)) is None:
            raise error
        return refused(request, found)

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, OSError):  # FastAPI reports any error in the reading of a form as status 400
            return system_error(request, error.__cause__)
        detail = str(error.detail)
        if error.status_code == 400:  # raised by Starlette only, for a form
            large = "exceeded maximum size" in detail
            reason = "a field that is not a file is larger than 1 MiB; send files with a file name" if large else detail
            detail = f"the form cannot be read: {reason}"
        return JSONResponse({"detail": detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name, sentence = str(first["loc"][1]), not_a_form(request)
        if sentence is None and first["type"] == "missing":  # FastAPI takes a field without a text for missing
            sentence = f"the {name} is empty" if name in error.body else f"the field {name} is missing"
        elif sentence is None and isinstance(first["input"], str) and first["type"] == "value_error":
            sentence = not_a_file(name)
        return JSONResponse({"detail": sentence or f"{name}: {first['msg']}"}, 422)

    @app.exception_handler(Exception)
    def defect(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "an error inside the server; its log says more"}, 500)

    return app


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of `work`; cancel it if the client of a request, whose body was read, disconnects.

    Raises Refused, which nobody receives, after a disconnection.
    """
    job = asyncio.ensure_future(work)

    async def disconnection() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(disconnection())
    try:
        await asyncio.wait({job, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise Refused(499, "the client has disconnected")
        return job.result()
    finally:
        for task in (job, watch):
            task.cancel()


def not_a_form(request: Request) -> str | None:
    """Return the refusal of a request whose body is not a form, such as JSON; None for a form or an empty body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("", "multipart/form-data", "application/x-www-form-urlencoded"):
        return None
    return f"the request is {printable(kind)}; send its fields as a multipart form (curl: -F NAME=VALUE or NAME=@FILE)"


def not_a_file(name: str) -> str:
    """Return the refusal of a field that was sent as text, or as a file without its name, which forms take for text."""
    return f"{name} is a text, not a file; send it as a file, with a file name (curl: -F {name}=@FILE)"


async def check_fields(request: Request, several: Collection[str] = ()) -> None:
    """Refuse fields that the function of a route does not have as parameters, and all but `several` if given twice."""
    known = set(inspect.signature(request.scope["endpoint"]).parameters) - {"request"}
    names = [name for name, _ in (await request.form()).multi_items()]
    refuse_fields(request, names, known, several)


def refuse_fields(
    request: Request, names: Sequence[str], known: Collection[str], several: Collection[str] = ()
) -> None:
    """Refuse names of fields that are not known or are given twice, and all parameters in the address."""
    for name in request.query_params:
        raise Refused(422, f"{printable(name)} is in the address of the request; send it as a field of the form")
    for name in names:
        if name not in known:
            raise Refused(422, f"the field {name!r} is not known{nearest(name, known)}")
        if names.count(name) > 1 and name not in several:
            raise Refused(422, f"the field {name} is given {names.count(name)} times; give it once")


def parse_switch(name: str, text: str) -> bool:
    """Return the truth value of a field, which pydantic reads as FastAPI does for other routes; empty is false."""
    try:
        return bool(text) and TypeAdapter(bool).validate_python(text)
    except ValidationError:
        raise Refused(422, f"{name} is {text!r}; give true or false") from None


def mask_key(model: str, modalities: Sequence[str], post: bool) -> str:
    """Return a name of the mask of a case by a model from some of its modalities: requests run side by side."""
    return hashlib.sha256(json.dumps([model, list(modalities), post]).encode()).hexdigest()[:16]


def picture_url(path: Path) -> str:
    """Return an image as our reader shows it to the models, at most 1024 pixels wide and high, as the URL of a PNG."""
    image = load_image(path)
    image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    return png_url(image)


def png_url(picture: Image.Image) -> str:
    """Return a picture as the data URL of a PNG."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def without_paths(sentence: str, words: Mapping[Path, str]) -> str:
    """Return a sentence in which each folder of this machine is replaced by a word; files in it keep their names."""
    for place, word in words.items():
        for text in sorted({str(place), str(place.resolve()), str(place.absolute())}, key=len, reverse=True):
            sentence = sentence.replace(f"{text}/", "").replace(text, word)
    return sentence
