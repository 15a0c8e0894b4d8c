"""A client of OpenAI's chat API with retries, which never shows its API key."""

from __future__ import annotations

import email.utils
import http.client
import json
import logging
import math
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]

_TRY_AGAIN = {408, 409, 425, 429}  # and 5xx
_REFUSED = {400, 413, 422}
_LONGEST_WAIT = 600.0  # seconds
_WORTH_A_WORD = 10.0  # seconds


class RefusedError(ValueError):
    """The server rejected the content of a request."""


class _FailedError(Exception):
    """A failed attempt that may succeed when retried, with the server's `Retry-After` if given."""

    def __init__(self, problem: str, wait: float | None = None):
        super().__init__(problem)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Rejects redirects, which would send the API key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass
class ChatClient:
    """Sends requests to one model on one server. Thread-safe.

    Parameters:
        base_url: The URL without `/chat/completions`, e.g. `http://localhost:8000/v1`.
        model: The model's name on the server.
        key: The API key, if the server needs one. It is only sent in the header of requests.
        options: Further fields of each request, e.g. `{"temperature": 0}`.
        timeout: Seconds without data from the server after which an attempt counts as failed.
        retries: Maximum number of retries after connection errors, the statuses 408, 409, 425, 429 and 5xx, and
            responses that are not chat completions.
        delay: Seconds before the first retry, doubled for each further one up to a minute, and reduced at random by
            up to half. A `Retry-After` of the server takes precedence, up to ten minutes.

    Raises ValueError for an invalid base URL, and for a timeout or a number of retries that is out of range.
    """

    base_url: str
    model: str
    key: str | None = field(default=None, repr=False)
    options: dict[str, Any] = field(default_factory=dict)
    timeout: float = 120.0
    retries: int = 7
    delay: float = 1.0

    def __post_init__(self) -> None:
        self.base_url = _checked_url(self.base_url)
        if self.key is not None and (not self.key.isascii() or not self.key.isprintable() or " " in self.key):
            raise ValueError("The API key contains a space, a line break or another invalid character. Check it.")
        if self.retries < 0 or not 0 < self.timeout < math.inf:
            raise ValueError(
                f"The judge's timeout is {self.timeout} seconds with {self.retries} retries; expected a time above 0 "
                "and at least 0 retries."
            )
        self._stopped = threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that affect replies, without the API key."""
        return {"judge_url": self.base_url, "judge_model": self.model, "judge_options": self.options}

    def start(self) -> None:
        """Allow requests again after `stop`."""
        self._stopped.clear()

    def stop(self) -> None:
        """Stop the waiting of all threads, and do not retry failed attempts."""
        self._stopped.set()

    def reply(self, messages: Messages, purpose: str) -> str | None:
        """The text of the reply; None if the reply has no text.

        Raises `RefusedError` for the statuses 400, 413 and 422, and ValueError, whose message contains `purpose`, for
        other errors that persist or cannot be retried.
        """
        body = json.dumps({**self.options, "model": self.model, "messages": messages}).encode()
        for number in range(self.retries + 1):
            try:
                return self._reply(body)
            except _FailedError as failed:
                problem = str(failed)
                if number == self.retries or self._stopped.is_set():
                    break
                wait = self.wait(number, failed.wait)
                level = logging.WARNING if wait >= _WORTH_A_WORD else logging.INFO
                logger.log(level, f"Retrying the request about {purpose} in {wait:.1f} s: {problem}")
                if self._stopped.wait(wait):
                    break
        raise ValueError(
            f"{self._url} gave no answer about {purpose} (attempts: {number + 1}, the last error: {problem}). Run the "
            "same command again to continue."
        )

    @property
    def _url(self) -> str:
        return f"{self.base_url}/chat/completions"

    def wait(self, number: int, told: float | None) -> float:
        """Seconds to wait before retry `number`, counted from 0; `told` is the server's `Retry-After`."""
        if told is not None:
            return min(max(told, 0.0), _LONGEST_WAIT)
        return min(self.delay * 2**number, 60.0) * random.uniform(0.5, 1.0)

    def _reply(self, body: bytes) -> str | None:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "halos_trl"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self._url, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return _content(response.read(), self._hidden)
        except urllib.error.HTTPError as error:
            with error:
                raise self._error_of(error.code, error.headers.get("Retry-After"), _body(error)) from None
        except (OSError, http.client.HTTPException) as error:  # URLError, timeouts, dropped connections
            reason = getattr(error, "reason", error)
            raise _FailedError(
                f"{type(reason).__name__}: {reason}" if str(reason) else type(reason).__name__
            ) from None

    def _error_of(self, status: int, retry_after: str | None, body: str) -> Exception:
        problem = self._hidden(f"status {status}: {_shortened(body)}")
        if status in _TRY_AGAIN or status >= 500:
            return _FailedError(problem, _seconds(retry_after))
        if status in _REFUSED:
            return RefusedError(problem)
        remedy = {
            401: "Check the API key." if self.key else "No API key was given.",
            403: "Check the API key and its permissions.",
            404: "Check the base URL (it ends where `/chat/completions` begins) and the model's name.",
        }.get(status, "Pass the address that it redirects to." if 300 <= status < 400 else "Check the base URL.")
        return ValueError(f"{self._url} answers with {problem}. {remedy}")

    def _hidden(self, text: str) -> str:
        return text.replace(self.key, "<the API key>") if self.key else text


def _checked_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"The judge's base URL is {url!r}; expected one like `http://localhost:8000/v1`, without `?` and `#`."
        )
    if parts.username or parts.password:
        raise ValueError("The judge's base URL contains a password. Pass the key in an environment variable instead.")
    return url.rstrip("/").removesuffix("/chat/completions")


def _body(error: urllib.error.HTTPError) -> str:
    try:
        return error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _content(body: bytes, hidden: Any) -> str | None:
    try:
        content = json.loads(body)["choices"][0]["message"].get("content")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _FailedError(hidden(f"no chat completion, but {_shortened(body.decode(errors='replace'))!r}")) from None
    return content if isinstance(content, str) else None


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _seconds(retry_after: str | None) -> float | None:
    """Parse a `Retry-After` header, which contains seconds or a date, into seconds."""
    if retry_after is None:
        return None
    try:
        return float(retry_after)
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
    except ValueError:
        return None


__all__ = ["ChatClient", "RefusedError"]
