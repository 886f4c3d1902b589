"""Requests to an OpenAI-compatible chat-completions server: retried, spaced, stopped where they cannot succeed.

Patient images are in them. They leave the machine only where that was allowed: other addresses than loopback are
refused without `allow_remote`, redirects are not followed, and to a loopback address no proxy of the environment is
used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from preceptor.errors import UserError

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
STOPPING = {
    401: "it refuses the API key; set the right one in {key_variable}",
    403: "it forbids this; see which models and addresses the API key is for",
    404: "it does not know the model {model!r} or the path /chat/completions; see GET {url}/models for the models' "
    "names, and end the address in /v1 where the server's paths begin so",
}


class RequestRejected(Exception):
    """The server does not answer this one request; `body` is what it said, which is not for logs: it may repeat parts
    of the request."""

    def __init__(self, reason: str, body: str = "") -> None:
        super().__init__(reason)
        self.body = body


@dataclass(frozen=True)
class ClientSettings:
    """How to ask.

    Args:
        url: the server's address to the point where ``/chat/completions`` follows, such as ``http://127.0.0.1:8000/v1``.
        allow_remote: let images leave this machine.
        key_variable: name of the environment variable that holds the API key, where there is one.
        timeout: the longest silence of the server, in seconds.
        retries: tries after the first, where the failure may pass.
        backoff: seconds before the first retry; they double up to `longest_wait`, and each is drawn from half of it to
            the whole (Brooker, "Exponential backoff and jitter", 2015, called equal jitter there).
        longest_wait: no wait is longer, a server's own ``Retry-After`` excepted, which may be ten times as long.
        max_failures: requests in a row that may fail, with all their retries, before all end.
        requests_per_minute: the most requests begun in a minute, evenly spaced; None for no limit.
    """

    url: str
    allow_remote: bool = False
    key_variable: str = "PRECEPTOR_API_KEY"
    timeout: float = 300.0
    retries: int = 6
    backoff: float = 0.5
    longest_wait: float = 60.0
    max_failures: int = 5
    requests_per_minute: float | None = None


def check_address(url: str, allow_remote: bool) -> bool:
    """Return whether an address is on this machine.

    Raises UserError where it is no http address, has a password in it, or is not on this machine and that is not
    allowed.
    """
    parts = urlsplit(url)
    try:
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"the address {url!r} is no http address; give one such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError("the address holds a name, password or query; leave it out: a key goes into PRECEPTOR_API_KEY")
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host.lower().rstrip(".") == "localhost"
    if not local and not allow_remote:
        raise UserError(
            f"{host} is not this machine, and patients' images and questions would be sent there: give --allow-remote "
            "if they may, or run the server here, or reach it through an SSH tunnel to 127.0.0.1"
        )
    return local


class ChatClient:
    """A client of one server and model; use it in an `async with` block.

    `unknown` are names of optional fields that the server does not take; those that it refuses are added.
    """

    def __init__(
        self, settings: ClientSettings, model: str, api_key: str | None, unknown: set[str] | None = None
    ) -> None:
        self.settings, self.model, self._key = settings, model, api_key
        self.unknown = set() if unknown is None else unknown
        self.url = settings.url.rstrip("/")
        self._local = check_address(settings.url, settings.allow_remote)
        if api_key and not self._local and self.url.startswith("http:"):
            log.warning("the API key is sent unencrypted, as the images are: the address is http, not https")
        self._jitter = random.Random()
        self._in_a_row = 0
        self._next = 0.0
        self._http: httpx2.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        import httpx2

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(self.settings.timeout, connect=min(30.0, self.settings.timeout), pool=None),
            trust_env=not self._local,
            follow_redirects=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def complete(self, body: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the server's answer to a request, a JSON object that has at least one choice.

        `optional` fields go along, except those that the server is known not to take: where it refuses a request and
        names one of them, the request is made again without.

        Raises:
            RequestRejected: the server will not answer this request, or did not in all tries.
            UserError: it will answer none (401, 403, 404), or `max_failures` requests in a row have failed.
        """
        try:
            found = await self._known_fields(body, optional or {})
        except RequestRejected as error:
            self._in_a_row += 1
            if self._in_a_row >= self.settings.max_failures:
                raise UserError(
                    f"{self.url}: {self._in_a_row} requests in a row have failed, the last since {error}"
                    f"{self._said(error.body)}; see to the server, then run the same command again: what is answered "
                    "is kept"
                ) from None
            raise
        self._in_a_row = 0
        return found

    def _said(self, body: str) -> str:
        """Return the beginning of the server's own explanation, for the user's eyes alone."""
        try:
            found = json.loads(body)
            error = found.get("error", found)
            text = error if isinstance(error, str) else error.get("message", error.get("detail"))
        except (ValueError, AttributeError):
            return ""
        if not isinstance(text, str) or not text.strip() or (self._key and self._key in text):
            return ""
        return f" ({' '.join(text.split())[:200]})"

    async def _known_fields(self, body: Mapping[str, Any], optional: Mapping[str, Any]) -> dict[str, Any]:
        while True:
            extra = {name: value for name, value in optional.items() if name not in self.unknown}
            try:
                return await self._tried({**body, **extra})
            except RequestRejected as error:
                named = {name for name in extra if re.search(rf"\b{name}\b", error.body)}
                if not named:
                    raise
                if named - self.unknown:
                    log.info("the server does not take %s; asking without", ", ".join(sorted(named)))
                self.unknown |= named

    async def _tried(self, body: Mapping[str, Any]) -> dict[str, Any]:
        tries = self.settings.retries + 1
        for attempt in range(tries):
            await self._turn()
            try:
                return await self._once(body)
            except RetryableError as error:
                if attempt + 1 == tries:
                    raise RequestRejected(f"{error}, in {tries} tries") from None
                log.info("%s; try %d of %d follows", error, attempt + 2, tries)
                await self._wait(attempt, error.wait)
        raise AssertionError("unreachable")

    async def _once(self, body: Mapping[str, Any]) -> dict[str, Any]:
        import httpx2

        assert self._http is not None, "the client is used in an `async with` block"
        try:
            response = await self._http.post(f"{self.url}/chat/completions", json={"model": self.model, **body})
        except httpx2.TimeoutException as error:
            raise RetryableError(f"it was silent for {self.settings.timeout:g} s ({type(error).__name__})") from None
        except httpx2.TransportError as error:
            raise RetryableError(f"the connection failed ({type(error).__name__})") from None
        except httpx2.DecodingError:
            raise RetryableError("its answer cannot be decoded") from None
        status = response.status_code
        if status in STOPPING:
            names = {"model": self.model, "url": self.url, "key_variable": self.settings.key_variable}
            raise UserError(f"{self.url} answers with {status}: {STOPPING[status].format_map(names)}")
        if status in RETRIED:
            wait = _retry_after(response.headers.get("Retry-After"))
            if wait is not None:  # the others need not find out for themselves
                self._next = max(self._next, time.monotonic() + min(wait, 10 * self.settings.longest_wait))
            raise RetryableError(f"it answers with {status}", wait)
        if status != 200:
            raise RequestRejected(f"it answers with {status}", response.text[:4000])
        try:
            found = response.json()
            if not isinstance(found["choices"][0]["message"], dict):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError):
            raise RetryableError("its answer is no chat completion") from None
        return found

    async def _turn(self) -> None:
        """Wait until the next request may begin."""
        now = time.monotonic()
        begin = max(now, self._next)
        if self.settings.requests_per_minute is not None:
            self._next = begin + 60 / self.settings.requests_per_minute
        if begin > now:
            await asyncio.sleep(begin - now)

    async def _wait(self, attempt: int, asked_for: float | None) -> None:
        longest = self.settings.longest_wait
        own = min(longest, self.settings.backoff * 2**attempt)
        drawn = own / 2 + self._jitter.uniform(0, own / 2)
        await asyncio.sleep(max(drawn, min(asked_for or 0.0, 10 * longest)))


class RetryableError(Exception):
    """A failure that may pass; `wait` are the seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def _retry_after(text: str | None) -> float | None:
    """Return the seconds of a Retry-After header (RFC 9110, 10.2.3): a number, or a date."""
    if not text:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
