"""Files from the network: resumed, checked, and never half under their final name."""

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

Progress = Callable[[int, int | None], None]
"""Takes the bytes there are so far and the bytes in all, None where the server does not say."""

PAUSES_S = (1.0, 2.0, 4.0, 8.0)
"""Waits between attempts that bring nothing; one that brings bytes starts the row anew."""

BLOCK = 1 << 14  # bytes; those of a block that a broken connection cuts off are lost
PASSING = (408, 425, 429)  # statuses below 500 that a later attempt may not meet


def download(
    url: str,
    dest: str | Path,
    sha256: str | None = None,
    size: int | None = None,
    on_progress: Progress | None = None,
    timeout_s: float = 30.0,
    pauses_s: tuple[float, ...] | None = None,
) -> Path:
    """Fetch ``url`` into ``dest``; nothing is done where a file with the known ``sha256`` is there already.

    What has come so far waits in the cache as a ``.part`` file, which a later call goes on with where the server can
    and its file is still the same. ``timeout_s`` is for connecting and for each silence; between failed attempts it
    waits ``pauses_s``, else ``PAUSES_S``. Raises MissingError where the network or the server fails, DataError where
    what came is not of ``size`` bytes or has not ``sha256``.
    """
    import filelock

    dest = Path(dest)
    if _is_there(dest, sha256):
        return dest
    parts = cache_folder() / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    part = _Part(parts / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.part")
    with filelock.FileLock(part.path.with_suffix(".lock")):
        if not _is_there(dest, sha256):  # another process may have fetched it while this one waited
            transfer = _Transfer(url, part, sha256, size, on_progress or (lambda done, total: None), timeout_s)
            transfer.run(PAUSES_S if pauses_s is None else pauses_s)
            _move(part.path, dest)
            part.remove()
    return dest


def _is_there(dest: Path, sha256: str | None) -> bool:
    return sha256 is not None and dest.is_file() and _digest(dest) == sha256


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _move(source: Path, dest: Path) -> None:
    """Rename, or copy where the cache lies on another file system."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.replace(dest)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with source.open("rb") as old, atomic_write(dest) as new:
            shutil.copyfileobj(old, new, BLOCK)


class _Part:
    """The bytes so far, and beside them which version of the server's file they belong to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version = path.with_suffix(".json")

    def length(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self) -> str | None:
        """The ETag or date of the file that the bytes came from, as If-Range takes it."""
        try:
            found = json.loads(self._version.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, str) else None

    def restart(self, version: str | None) -> None:
        """Forget all bytes; those to come are of ``version``."""
        self.path.write_bytes(b"")
        self._version.write_text(json.dumps(version), "utf-8")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._version.unlink(missing_ok=True)


class _Interrupted(Exception):
    """An attempt failed in a way that another may not; the text says how."""


class _Transfer:
    def __init__(
        self, url: str, part: _Part, sha256: str | None, size: int | None, on_progress: Progress, timeout_s: float
    ) -> None:
        self.url, self.part, self.sha256, self.size = url, part, sha256, size
        self.on_progress, self.timeout_s = on_progress, timeout_s

    def run(self, pauses_s: tuple[float, ...]) -> None:
        """Attempts until the part file is whole and right."""
        failures = 0
        resumed = self.part.length() > 0
        while True:
            before = self.part.length()
            try:
                self._attempt()
            except _Interrupted as error:
                failures = 1 if self.part.length() > before else failures + 1
                if failures > len(pauses_s):
                    kept = f"{self.part.length():,} bytes are kept: run it again to go on from there"
                    raise MissingError(
                        f"{self.url}: {error}; {kept if self.part.length() else 'is there a network?'}"
                    ) from None
                time.sleep(pauses_s[failures - 1])
                resumed = True
                continue
            found = _digest(self.part.path) if self.sha256 else None
            if found == self.sha256:
                return
            self.part.remove()
            if not resumed:
                raise DataError(f"{self.url}: found sha256 {found}, expected {self.sha256}; nothing was kept")
            resumed = False  # the pieces may be of two versions of the file: once more in one go

    def _attempt(self) -> None:
        """Ask for what is missing and append it."""
        import requests

        have, version = self.part.length(), self.part.version()
        headers = {"Accept-Encoding": "identity"}  # lengths and ranges must be those of the file
        if have and version is None and self.sha256 is None:
            have = 0  # nothing could tell whether the rest belongs to the same file
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
            raise _Interrupted(_reason(error)) from None
        except requests.RequestException as error:
            raise MissingError(f"{self.url}: {_reason(error)}") from None

    def _receive(self, response: "requests.Response", have: int) -> None:
        status = response.status_code
        start, total = _content_range(response)
        if status == 416 and have and total == have:
            return  # whole already: an earlier run stopped between the last byte and the rename
        if status == 416 or (status == 206 and start != have):
            self.part.remove()
            raise _Interrupted(f"the server does not continue at byte {have}")
        if status >= 500 or status in PASSING:
            raise _Interrupted(f"the server answers {status} {response.reason}")
        if status not in (200, 206):
            raise MissingError(f"{self.url}: the server answers {status} {response.reason}")
        if status == 200:
            have = 0
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
            self.part.restart(_version(response))
        if total is not None and self.size is not None and total != self.size:
            self.part.remove()
            raise DataError(f"{self.url}: found a file of {total:,} bytes, expected {self.size:,}; nothing was kept")
        have = self._append(response, have, total := self.size if total is None else total)
        if total is not None and have < total:
            raise _Interrupted(f"the connection ended after {have:,} of {total:,} bytes")
        if total is not None and have > total:
            self.part.remove()
            raise DataError(f"{self.url}: found more than the expected {total:,} bytes; nothing was kept")

    def _append(self, response: "requests.Response", have: int, total: int | None) -> int:
        """The length of the part file once everything that comes is in it."""
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
    """The first byte and the length of the file as ``Content-Range`` gives them."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if not match:
        return None, None
    start, total = match[1], match[2]
    return (int(start) if start else None), (int(total) if total != "*" else None)


def _version(response: "requests.Response") -> str | None:
    """What If-Range may name this version of the file by; weak ETags (RFC 9110, 13.1.5) do not count."""
    etag = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("Last-Modified")


def _reason(error: Exception) -> str:
    """The innermost cause, which says more to a person than the layers around it."""
    inner: BaseException = error
    while True:
        deeper = inner.__cause__ or inner.__context__ or getattr(inner, "reason", None)
        if deeper is None and inner.args and isinstance(inner.args[0], BaseException):
            deeper = inner.args[0]
        if not isinstance(deeper, BaseException):
            return str(inner) or type(inner).__name__
        inner = deeper
