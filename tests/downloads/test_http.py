import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llmc_cli.downloads import http
from llmc_cli.downloads.http import download
from llmc_cli.errors import DataError, MissingError
from llmc_cli.machine.cache_folder import cache_folder

BODY = bytes(range(256)) * 4096  # 1 MiB
CUT = 18 * http.BLOCK  # bytes sent before a connection is dropped
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Handles each request with the next function of ``script``; the last one is repeated.

    ``requests`` lists the headers of all requests.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.body, self.etag = [send_file], [], BODY, '"one"'

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/file"

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(dict(self.headers))
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def log_message(self, *args):
        pass

    def send_headers(self, status, length, **headers):
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


def send_file(handler, cut=None):
    """Send the file or the requested range. ``cut``: close the connection after this number of bytes."""
    body, headers = handler.server.body, handler.headers
    start = int(headers.get("Range", "bytes=0-")[len("bytes=") : -1])
    if headers.get("If-Range", handler.server.etag) != handler.server.etag:
        start = 0
    if start >= len(body):
        handler.send_headers(416, 0, Content_Range=f"bytes */{len(body)}")
    elif start:
        handler.send_headers(206, len(body) - start, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
    else:
        handler.send_headers(200, len(body))
    handler.wfile.write(body[start:][:cut])


def drop_connection(handler):
    send_file(handler, cut=CUT)


def ignore_range(handler):
    handler.send_headers(200, len(BODY))
    handler.wfile.write(BODY)


def send_without_length(handler):
    handler.send_headers(200, None)
    handler.wfile.write(BODY)


def send_wrong_range(handler):
    handler.send_headers(206, 10, Content_Range=f"bytes 5-14/{len(BODY)}")
    handler.wfile.write(BODY[5:15])


def respond(status):
    return lambda handler: handler.send_headers(status, 0)


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """A separate cache, no proxy, and short retry delays."""
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(http, "RETRY_DELAYS_S", (0.001, 0.002))


def partial_files():
    return [path for path in (cache_folder() / "parts").iterdir() if path.suffix != ".lock"]


def interrupt_download(server, dest):
    """Start a download that fails after CUT bytes."""
    server.script = [drop_connection, respond(503)]
    with pytest.raises(MissingError):
        download(server.url, dest, SHA256)
    assert not dest.exists()
    server.script = [send_file]
    server.requests.clear()


@pytest.mark.parametrize("checks", [{}, {"sha256": SHA256}, {"size": len(BODY)}, {"sha256": SHA256, "size": len(BODY)}])
def test_download_reports_progress(server, tmp_path, checks):
    reported = []
    dest = tmp_path / "new" / "file"
    assert download(server.url, dest, **checks, on_progress=lambda *amounts: reported.append(amounts)) == dest
    assert dest.read_bytes() == BODY
    assert reported[0] == (0, len(BODY)) and reported[-1] == (len(BODY), len(BODY))
    assert reported == sorted(reported)
    assert not partial_files()
    assert server.requests[0]["Accept-Encoding"] == "identity"


def test_existing_file_with_the_right_hash_is_kept(server, tmp_path):
    (tmp_path / "file").write_bytes(BODY)
    download(server.url, tmp_path / "file", SHA256)
    assert not server.requests
    (tmp_path / "file").write_bytes(b"another")
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY


def test_dropped_connection_is_resumed(server, tmp_path):
    server.script = [drop_connection]
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY
    assert [headers.get("Range") for headers in server.requests] == [
        None, "bytes=294912-", "bytes=589824-", "bytes=884736-",
    ]  # fmt: skip
    assert {headers.get("If-Range") for headers in server.requests[1:]} == {'"one"'}


def test_later_call_resumes(server, tmp_path):
    interrupt_download(server, tmp_path / "file")
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY
    assert [headers.get("Range") for headers in server.requests] == ["bytes=294912-"]


def test_server_that_ignores_ranges(server, tmp_path):
    interrupt_download(server, tmp_path / "file")
    server.script = [ignore_range]
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY


def test_changed_file_is_downloaded_again(server, tmp_path):
    interrupt_download(server, tmp_path / "file")
    server.body, server.etag = BODY[::-1], '"two"'
    download(server.url, tmp_path / "file", size=len(BODY))
    assert (tmp_path / "file").read_bytes() == BODY[::-1]
    assert server.requests[0]["If-Range"] == '"one"'


def test_changed_file_without_etag_is_detected_by_its_hash(server, tmp_path):
    """The partial data is discarded, and the file is downloaded in one request."""
    server.etag = None
    interrupt_download(server, tmp_path / "file")
    server.body = BODY[::-1]
    download(server.url, tmp_path / "file", hashlib.sha256(BODY[::-1]).hexdigest())
    assert (tmp_path / "file").read_bytes() == BODY[::-1]
    assert [headers.get("Range") for headers in server.requests] == ["bytes=294912-", None]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_etag_and_hash_nothing_is_resumed(server, tmp_path, etag):
    """The rest could belong to another version of the file, so the download starts again."""
    server.etag = etag
    interrupt_download(server, tmp_path / "file")
    download(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert [headers.get("Range") for headers in server.requests] == [None]


def test_complete_partial_file_is_used(server, tmp_path):
    """An earlier run stopped after the last byte, before the rename."""
    interrupt_download(server, tmp_path / "file")
    next(path for path in partial_files() if path.suffix == ".part").write_bytes(BODY)
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY
    assert len(server.requests) == 1


def test_partial_file_that_is_too_long_is_discarded(server, tmp_path):
    interrupt_download(server, tmp_path / "file")
    next(path for path in partial_files() if path.suffix == ".part").write_bytes(BODY + b"more")
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY


def test_damaged_version_file_is_ignored(server, tmp_path):
    interrupt_download(server, tmp_path / "file")
    next(path for path in partial_files() if path.suffix == ".json").write_text("{")
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY


def test_wrong_range_restarts_the_download(server, tmp_path):
    interrupt_download(server, tmp_path / "file")
    server.script = [send_wrong_range, send_file]
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY
    assert [headers.get("Range") for headers in server.requests] == ["bytes=294912-", None]


@pytest.mark.parametrize("status", [500, 502, 503, 408, 429])
def test_temporary_errors_are_retried(server, tmp_path, status):
    server.script = [respond(status), respond(status), send_file]
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY
    assert len(server.requests) == 3


def test_received_data_resets_the_retry_delays(server, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(http.time, "sleep", slept.append)
    server.script = [respond(500), respond(500), drop_connection, respond(500), send_file]
    download(server.url, tmp_path / "file", SHA256)
    assert slept == [0.001, 0.002, 0.001, 0.002]


def test_gives_up_after_the_last_retry(server, tmp_path):
    server.script = [respond(503)]
    with pytest.raises(MissingError, match=rf"{server.url}: the server returned 503 .*; check the network connection"):
        download(server.url, tmp_path / "file", SHA256)
    assert len(server.requests) == 3
    assert not (tmp_path / "file").exists()


def test_error_says_that_partial_data_is_kept(server, tmp_path):
    server.script = [drop_connection, respond(503)]
    with pytest.raises(MissingError, match="294,912 bytes are kept: run it again to resume"):
        download(server.url, tmp_path / "file", SHA256)


@pytest.mark.parametrize("status", [404, 403, 410, 304])
def test_permanent_errors_are_not_retried(server, tmp_path, status):
    server.script = [respond(status)]
    with pytest.raises(MissingError, match=f"the server returned {status}"):
        download(server.url, tmp_path / "file", SHA256)
    assert len(server.requests) == 1


def test_truncated_file_without_content_length(server, tmp_path):
    """Only the expected size shows that data is missing."""

    def send_truncated(handler):
        handler.send_headers(200, None)
        handler.wfile.write(BODY[:1000])

    server.script = [send_truncated]
    with pytest.raises(MissingError, match="the connection ended after 1,000 of 1,048,576 bytes"):
        download(server.url, tmp_path / "file", size=len(BODY))
    server.script = [send_without_length]
    download(server.url, tmp_path / "file", size=len(BODY))
    assert (tmp_path / "file").read_bytes() == BODY


def test_file_larger_than_expected_is_rejected(server, tmp_path):
    server.script = [send_without_length]
    with pytest.raises(DataError, match="found more than the expected 1,000 bytes"):
        download(server.url, tmp_path / "file", size=1000)
    assert not partial_files()


def test_wrong_content_length_is_rejected_before_the_download(server, tmp_path):
    reported = []
    with pytest.raises(DataError, match="found a file of 1,048,576 bytes, expected 1,000"):
        download(server.url, tmp_path / "file", size=1000, on_progress=lambda *amounts: reported.append(amounts))
    assert not reported and not partial_files()


def test_wrong_hash_is_rejected(server, tmp_path):
    with pytest.raises(DataError, match=f"found SHA-256 {SHA256}, expected 000"):
        download(server.url, tmp_path / "file", "0" * 64)
    assert not partial_files() and not (tmp_path / "file").exists()
    assert len(server.requests) == 1


def test_refused_connection(tmp_path):
    with Server() as server:
        url = server.url
    with pytest.raises(MissingError, match=r"(?i)refused.*; check the network connection"):
        download(url, tmp_path / "file", retry_delays_s=())


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1/x"])
def test_invalid_url(tmp_path, url):
    with pytest.raises(MissingError, match=url):
        download(url, tmp_path / "file")


def test_timeout(server, tmp_path):
    wait = threading.Event()
    server.script = [lambda handler: wait.wait(10)]
    with pytest.raises(MissingError, match="timed out"):
        download(server.url, tmp_path / "file", timeout_s=0.05, retry_delays_s=())
    wait.set()


def test_cache_on_another_file_system(server, tmp_path, monkeypatch):
    real = Path.replace

    def replace(self, target):
        if self.suffix == ".part" and self.parent.name == "parts":
            raise OSError(http.errno.EXDEV, "cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY
    assert not partial_files()


def test_concurrent_calls_download_once(server, tmp_path):
    """The other calls wait for the first one and then find the file."""
    threads = [threading.Thread(target=download, args=(server.url, tmp_path / "file", SHA256)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() == BODY
    assert len(server.requests) == 1
