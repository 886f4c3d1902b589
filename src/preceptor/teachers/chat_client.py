"""Requests to an OpenAI-compatible chat-completions server through the `openai` client.

The requests contain patient images. They leave the machine only with `allow_remote`: other addresses than loopback are
refused, redirects are not followed, and a loopback address is never reached through a proxy. Retries and timeouts are
those of the `openai` client; this module adds the check of the address, a rate limit that all requests share, and the
decision when to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from preceptor.errors import UserError

if TYPE_CHECKING:
    import openai

log = logging.getLogger(__name__)

LONGEST_WAIT = 600.0
"""Seconds that a server's Retry-After may ask for; more is cut to it."""

STOPPING = {
    401: "it refuses the API key; set the right one in {key_variable}",
    403: "access is forbidden; check which models and addresses the API key is for",
    404: "it does not know the model {model!r} or the path /chat/completions; see GET {url}/models for the models' "
    "names, and end the address in /v1 if the server's paths begin with it",
}


class RequestRejected(Exception):
    """The server does not answer this request. `body` is its explanation, which may repeat parts of the request and is
    therefore never logged."""

    def __init__(self, reason: str, body: str = "") -> None:
        super().__init__(reason)
        self.body = body


@dataclass(frozen=True)
class ClientSettings:
    """Settings of a client.

    Args:
        url: address of the server up to ``/chat/completions``, such as ``http://127.0.0.1:8000/v1``.
        allow_remote: let images leave this machine.
        key_variable: name of the environment variable with the API key, if there is one.
        timeout: the longest silence of the server, in seconds.
        retries: tries after the first one, for failures that may pass (timeouts, lost connections, 408, 409, 429, 5xx
            and answers that are not chat completions). The `openai` client waits 0.5 s before the first retry, then
            twice as long each time, up to 8 s; a server's Retry-After delays all requests.
        max_failures: number of consecutive requests that may fail, with all their retries, before the client stops.
        requests_per_minute: the maximum rate of requests, evenly spaced; None for no limit.
    """

    url: str
    allow_remote: bool = False
    key_variable: str = "PRECEPTOR_API_KEY"
    timeout: float = 300.0
    retries: int = 6
    max_failures: int = 5
    requests_per_minute: float | None = None


def check_address(url: str, allow_remote: bool) -> bool:
    """Return whether an address is on this machine.

    Raises UserError if it is not an http address, contains a password, or is remote without `allow_remote`.
    """
    parts = urlsplit(url)
    try:
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"the address {url!r} is not an http address; give one such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError(
            "the address contains a name, password or query; leave it out: a key goes into PRECEPTOR_API_KEY"
        )
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host.lower().rstrip(".") == "localhost"
    if not local and not allow_remote:
        raise UserError(
            f"{host} is not this machine, and patients' images and questions would be sent there: pass --allow-remote "
            "if that is permitted, run the server here, or reach it through an SSH tunnel to 127.0.0.1"
        )
    return local


class ChatClient:
    """A client of one server and model; use it in an `async with` block.

    `unknown` are names of optional fields that the server does not accept; those that it refuses are added.
    """

    def __init__(
        self, settings: ClientSettings, model: str, api_key: str | None, unknown: set[str] | None = None
    ) -> None:
        self.settings, self.model, self._key = settings, model, api_key
        self.unknown = set() if unknown is None else unknown
        self.url = settings.url.rstrip("/")
        self._local = check_address(settings.url, settings.allow_remote)
        if api_key and not self._local and self.url.startswith("http:"):
            log.warning("the API key and the images are sent unencrypted: the address is http, not https")
        self._failures = 0
        self._next = 0.0
        self._client: openai.AsyncOpenAI | None = None

    async def __aenter__(self) -> Self:
        import openai

        # At level DEBUG it would log the requests, which contain images.
        logging.getLogger("openai").setLevel(logging.WARNING)
        timeout = openai.Timeout(self.settings.timeout, connect=min(30.0, self.settings.timeout), pool=None)
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self.url,
            timeout=timeout,
            max_retries=self.settings.retries,
            http_client=openai.DefaultAsyncHttpxClient(
                timeout=timeout,
                trust_env=not self._local,
                follow_redirects=False,
                event_hooks={"request": [self._before_request], "response": [self._after_response]},
            ),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.close()

    async def complete(self, body: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the server's answer to a request, a JSON object with at least one choice.

        `optional` fields are sent, too, except those that the server is known not to accept: if it refuses a request
        and names one of them, the request is repeated without it.

        Raises:
            RequestRejected: the server refuses this request, or has failed in all tries.
            UserError: it will answer no request (401, 403, 404), or `max_failures` consecutive requests have failed.
        """
        try:
            answer = await self._with_known_fields(body, optional or {})
        except RequestRejected as error:
            self._failures += 1
            if self._failures >= self.settings.max_failures:
                raise UserError(
                    f"{self.url}: {self._failures} requests in a row have failed, the last one because "
                    f"{error}{self._explanation(error.body)}; check the server, then run the same command again: the "
                    "answers so far are stored"
                ) from None
            raise
        self._failures = 0
        return answer

    def _explanation(self, body: str) -> str:
        """Return the beginning of the server's explanation, for the user's eyes only."""
        try:
            document = json.loads(body)
            error = document.get("error", document)
            text = error if isinstance(error, str) else error.get("message", error.get("detail"))
        except (ValueError, AttributeError):
            return ""
        if not isinstance(text, str) or not text.strip() or (self._key and self._key in text):
            return ""
        return f" ({' '.join(text.split())[:200]})"

    async def _with_known_fields(self, body: Mapping[str, Any], optional: Mapping[str, Any]) -> dict[str, Any]:
        while True:
            extra = {name: value for name, value in optional.items() if name not in self.unknown}
            try:
                return await self._send({**body, **extra})
            except RequestRejected as error:
                refused = {name for name in extra if re.search(rf"\b{name}\b", error.body)}
                if not refused:
                    raise
                if refused - self.unknown:
                    log.info("the server does not accept %s; asking without", ", ".join(sorted(refused)))
                self.unknown |= refused

    async def _send(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request with all its retries; translate the client's errors."""
        import openai

        assert self._client is not None, "the client is used in an `async with` block"
        tries = f", in {self.settings.retries + 1} tries"
        try:
            answer = await self._client.post("/chat/completions", cast_to=object, body={"model": self.model, **body})
        except openai.APITimeoutError as error:
            silence = f"it was silent for {self.settings.timeout:g} s ({type(error.__cause__).__name__})"
            raise RequestRejected(silence + tries) from None
        except openai.APIConnectionError as error:
            raise RequestRejected(f"the connection failed ({type(error.__cause__).__name__}){tries}") from None
        except openai.APIStatusError as error:
            status = error.status_code
            if status in STOPPING:
                names = {"model": self.model, "url": self.url, "key_variable": self.settings.key_variable}
                raise UserError(f"{self.url} answers with {status}: {STOPPING[status].format_map(names)}") from None
            if error.response.extensions.get("invalid"):
                raise RequestRejected(f"its answer is not a chat completion{tries}") from None
            retried = status in (408, 409, 429) or status >= 500
            reason = f"it answers with {status}" + tries * retried
            raise RequestRejected(reason, "" if retried else error.response.text[:4000]) from None
        assert isinstance(answer, dict)
        return answer

    async def _before_request(self, request: Any) -> None:
        """Wait for the rate limit, and send no header that the user has not asked for. Called before every try."""
        # The client adds the user's operating system, and keys and names of the environment that are for OpenAI alone.
        for name in list(request.headers):
            if name.lower().startswith(("x-stainless", "openai-", "authorization")):
                del request.headers[name]
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        now = time.monotonic()
        begin = max(now, self._next)
        if self.settings.requests_per_minute is not None:
            self._next = begin + 60 / self.settings.requests_per_minute
        if begin > now:
            await asyncio.sleep(begin - now)

    async def _after_response(self, response: Any) -> None:
        """Delay all requests if the server asks for it, and check that an answer is a chat completion."""
        wait = _retry_after(response.headers.pop("Retry-After", None))
        if wait is not None and response.status_code != 200:
            log.info("the server asks to wait for %.0f s", wait)
            self._next = max(self._next, time.monotonic() + min(wait, LONGEST_WAIT))
        if response.status_code == 200:
            await response.aread()
            try:
                valid = isinstance(response.json()["choices"][0]["message"], dict)
            except (ValueError, KeyError, IndexError, TypeError):
                valid = False
            if not valid:
                # 502 Bad Gateway, an invalid answer from a server behind, which the client retries.
                response.status_code = 502
                response.extensions["invalid"] = True


def _retry_after(text: str | None) -> float | None:
    """Return the seconds of a Retry-After header (RFC 9110, 10.2.3), which is a number or a date."""
    if not text:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None
