"""Download files over HTTP: resume, verify, and move into place only when complete."""

import errno
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmc_cli.errors import DataError, MissingError
from llmc_cli.formats.atomic import atomic_write
from llmc_cli.machine.cache_folder import cache_folder

if TYPE_CHECKING:
    import requests

OnProgress = Callable[[int, int | None], None]
"""Called with the number of bytes received so far and the total, None if the server does not send it."""

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0)
"""Delays between failed attempts. An attempt that receives data starts the sequence again."""

BLOCK = 1 << 14  # bytes; an incomplete block is lost when the connection breaks
RETRYABLE_STATUSES = (408, 425, 429)  # besides 5xx


def download(
    url: str,
    dest: str | Path,
    sha256: str | None = None,
    size: int | None = None,
    on_progress: OnProgress | None = None,
    timeout_s: float = 30.0,
    retry_delays_s: tuple[float, ...] | None = None,
) -> Path:
    """Download ``url`` to ``dest`` and return ``dest``. Does nothing if a file with hash ``sha256`` exists there.

    Received data is stored in the cache as a ``.part`` file. A later attempt or call resumes from it if the server
    supports ranges and its file has not changed. ``timeout_s`` limits connecting and each wait for data. Failed
    attempts are repeated after ``retry_delays_s`` (default RETRY_DELAYS_S). Raises MissingError if the network or the
    server fails, DataError if the received file differs from ``size`` or ``sha256``.
    """
    import filelock

    dest = Path(dest)
    if _exists(dest, sha256):
        return dest
    parts = cache_folder() / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    part = _PartialFile(parts / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.part")
    with filelock.FileLock(part.path.with_suffix(".lock")):
        if not _exists(dest, sha256):  # another process may have downloaded it while this one waited for the lock
            transfer = _Transfer(url, part, sha256, size, on_progress or (lambda done, total: None), timeout_s)
            transfer.run(RETRY_DELAYS_S if retry_delays_s is None else retry_delays_s)
            _move(part.path, dest)
            part.remove()
    return dest


def _exists(dest: Path, sha256: str | None) -> bool:
    return sha256 is not None and dest.is_file() and _digest(dest) == sha256


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _move(source: Path, dest: Path) -> None:
    """Rename the file, or copy it if the cache is on another file system."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.replace(dest)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with source.open("rb") as old, atomic_write(dest) as new:
            shutil.copyfileobj(old, new, BLOCK)


class _PartialFile:
    """The data received so far and, in a ``.json`` file beside it, the version of the server's file it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version = path.with_suffix(".json")

    def length(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self) -> str | None:
        """Return the ETag or modification date of the server's file, as used in If-Range."""
        try:
            found = json.loads(self._version.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, str) else None

    def restart(self, version: str | None) -> None:
        """Discard all data. New data belongs to ``version``."""
        self.path.write_bytes(b"")
        self._version.write_text(json.dumps(version), "utf-8")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._version.unlink(missing_ok=True)


class _TemporaryError(Exception):
    """An attempt failed for a reason that a retry may resolve. The text gives the reason."""


class _Transfer:
    """The download of one URL into a partial file."""

    def __init__(
        self,
        url: str,
        part: _PartialFile,
        sha256: str | None,
        size: int | None,
        on_progress: OnProgress,
        timeout_s: float,
    ) -> None:
        self.url, self.part, self.sha256, self.size = url, part, sha256, size
        self.on_progress, self.timeout_s = on_progress, timeout_s

    def run(self, retry_delays_s: tuple[float, ...]) -> None:
        """Repeat attempts until the partial file is complete and verified."""
        failures = 0
        resumed = self.part.length() > 0
        while True:
            before = self.part.length()
            try:
                self._attempt()
            except _TemporaryError as error:
                length = self.part.length()
                failures = 1 if length > before else failures + 1
                if failures > len(retry_delays_s):
                    advice = (
                        f"{length:,} bytes are kept: run it again to resume"
                        if length
                        else "check the network connection"
                    )
                    raise MissingError(f"{self.url}: {error}; {advice}") from None
                time.sleep(retry_delays_s[failures - 1])
                resumed = True
                continue
            found = _digest(self.part.path) if self.sha256 else None
            if found == self.sha256:
                return
            self.part.remove()
            if not resumed:
                raise DataError(f"{self.url}: found SHA-256 {found}, expected {self.sha256}; the data was discarded")
            resumed = False  # the data may mix two versions of the file: download it again in one attempt

    def _attempt(self) -> None:
        """Request the missing part of the file and append it."""
        import requests

        have, version = self.part.length(), self.part.version()
        headers = {"Accept-Encoding": "identity"}  # lengths and ranges must refer to the uncompressed file
        if have and version is None and self.sha256 is None:
            have = 0  # without version or hash, a changed file would go unnoticed
        if have:
            headers["Range"] = f"bytes={have}-"
            if version is not None:
                headers["If-Range"] = version
        try:
            timeouts = (self.timeout_s, self.timeout_s)
            with requests.get(self.url, headers=headers, stream=True, timeout=timeouts) as response:
                self._receive(response, have)
        except requests.exceptions.SSLError as error:
            raise MissingError(f"{self.url}: {_reason(error)}") from None
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise _TemporaryError(_reason(error)) from None
        except requests.RequestException as error:
            raise MissingError(f"{self.url}: {_reason(error)}") from None

    def _receive(self, response: "requests.Response", have: int) -> None:
        status = response.status_code
        start, total = _content_range(response)
        if status == 416 and have and total == have:
            return  # already complete: an earlier run stopped before the rename
        if status == 416 or (status == 206 and start != have):
            self.part.remove()
            raise _TemporaryError(f"the server did not resume at byte {have:,}")
        if status >= 500 or status in RETRYABLE_STATUSES:
            raise _TemporaryError(f"the server returned {status} {response.reason}")
        if status not in (200, 206):
            raise MissingError(f"{self.url}: the server returned {status} {response.reason}")
        if status == 200:
            have = 0
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
            self.part.restart(_version(response))
        if total is not None and self.size is not None and total != self.size:
            self.part.remove()
            raise DataError(f"{self.url}: found a file of {total:,} bytes, expected {self.size:,}")
        have = self._append(response, have, total := self.size if total is None else total)
        if total is not None and have < total:
            raise _TemporaryError(f"the connection ended after {have:,} of {total:,} bytes")
        if total is not None and have > total:
            self.part.remove()
            raise DataError(f"{self.url}: found more than the expected {total:,} bytes; the data was discarded")

    def _append(self, response: "requests.Response", have: int, total: int | None) -> int:
        """Append the response body at byte ``have`` and return the new length of the partial file."""
        with self.part.path.open("r+b") as file:
            file.truncate(have)
            file.seek(have)
            self.on_progress(have, total)
            for block in response.iter_content(BLOCK):
                file.write(block)
                have += len(block)
                self.on_progress(have, total)
        return have


def _content_range(response: "requests.Response") -> tuple[int | None, int | None]:
    """Return the first byte and the file size given by the Content-Range header; None for missing values."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if not match:
        return None, None
    start, total = match[1], match[2]
    return (int(start) if start else None), (int(total) if total != "*" else None)


def _version(response: "requests.Response") -> str | None:
    """Return a value for If-Range that identifies this version of the file. Weak ETags are not allowed (RFC 9110,
    13.1.5)."""
    etag = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("Last-Modified")


def _reason(error: Exception) -> str:
    """Return the message of the innermost cause, which is more informative than the exceptions that wrap it."""
    inner: BaseException = error
    while True:
        deeper = inner.__cause__ or inner.__context__ or getattr(inner, "reason", None)
        if deeper is None and inner.args and isinstance(inner.args[0], BaseException):
            deeper = inner.args[0]
        if not isinstance(deeper, BaseException):
            return str(inner) or type(inner).__name__
        inner = deeper
