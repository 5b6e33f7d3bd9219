import hashlib
import http.server
import threading
from pathlib import Path

import pytest

from llmc_cli.downloads import http
from llmc_cli.downloads.http import download
from llmc_cli.errors import DataError, MissingError
from llmc_cli.machine.cache_folder import cache_folder

BODY = bytes(range(256)) * 4096  # 1 MiB
CUT = 18 * http.BLOCK
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Answers each request by the next of ``script``, the last of them for ever; ``asked`` keeps the headers."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.body, self.etag = [whole], [], BODY, '"one"'

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/file"

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(dict(self.headers))
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def log_message(self, *args):
        pass

    def head(self, status, length, **headers):
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


def whole(handler, cut=None):
    """The file, or the range that was asked for; with ``cut`` the connection ends after so many bytes."""
    body, asked = handler.server.body, handler.headers
    start = int(asked.get("Range", "bytes=0-")[len("bytes=") : -1])
    if asked.get("If-Range", handler.server.etag) != handler.server.etag:
        start = 0
    if start >= len(body):
        handler.head(416, 0, Content_Range=f"bytes */{len(body)}")
    elif start:
        handler.head(206, len(body) - start, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
    else:
        handler.head(200, len(body))
    handler.wfile.write(body[start:][:cut])


def dropping(handler):
    whole(handler, cut=CUT)


def ignoring_range(handler):
    handler.head(200, len(BODY))
    handler.wfile.write(BODY)


def without_length(handler):
    handler.head(200, None)
    handler.wfile.write(BODY)


def wrong_range(handler):
    handler.head(206, 10, Content_Range=f"bytes 5-14/{len(BODY)}")
    handler.wfile.write(BODY[5:15])


def answering(status):
    return lambda handler: handler.head(status, 0)


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(http, "PAUSES_S", (0.001, 0.002))


def parts():
    return [path for path in (cache_folder() / "parts").iterdir() if path.suffix != ".lock"]


def half_done(server, dest):
    """A download that is given up after CUT bytes."""
    server.script = [dropping, answering(503)]
    with pytest.raises(MissingError):
        download(server.url, dest, SHA256)
    assert not dest.exists()
    server.script = [whole]
    server.asked.clear()


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("LLMC_CACHE", "/c")
    assert cache_folder() == Path("/c")
    monkeypatch.delenv("LLMC_CACHE")
    assert cache_folder() == Path("/x/llmc")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "llmc"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(FileNotFoundError, match="LLMC_CACHE"):
        cache_folder()


@pytest.mark.parametrize("checks", [{}, {"sha256": SHA256}, {"size": len(BODY)}, {"sha256": SHA256, "size": len(BODY)}])
def test_a_plain_download(server, tmp_path, checks):
    told = []
    dest = tmp_path / "new" / "file"
    assert download(server.url, dest, **checks, on_progress=lambda *amounts: told.append(amounts)) == dest
    assert dest.read_bytes() == BODY
    assert told[0] == (0, len(BODY)) and told[-1] == (len(BODY), len(BODY)) and told == sorted(told)
    assert not parts()
    assert server.asked[0]["Accept-Encoding"] == "identity"


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    (tmp_path / "file").write_bytes(BODY)
    download(server.url, tmp_path / "file", SHA256)
    assert not server.asked
    (tmp_path / "file").write_bytes(b"another")
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY


def test_dropped_connections_are_resumed(server, tmp_path):
    server.script = [dropping]
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY
    assert [asked.get("Range") for asked in server.asked] == [
        None, "bytes=294912-", "bytes=589824-", "bytes=884736-",
    ]  # fmt: skip
    assert {asked.get("If-Range") for asked in server.asked[1:]} == {'"one"'}


def test_a_later_run_resumes(server, tmp_path):
    half_done(server, tmp_path / "file")
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY
    assert [asked.get("Range") for asked in server.asked] == ["bytes=294912-"]


def test_a_server_that_ignores_ranges(server, tmp_path):
    half_done(server, tmp_path / "file")
    server.script = [ignoring_range]
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_file_that_changed(server, tmp_path):
    half_done(server, tmp_path / "file")
    server.body, server.etag = BODY[::-1], '"two"'
    download(server.url, tmp_path / "file", size=len(BODY))
    assert (tmp_path / "file").read_bytes() == BODY[::-1]
    assert server.asked[0]["If-Range"] == '"one"'


def test_a_file_that_changed_under_a_server_without_versions(server, tmp_path):
    """Only the hash can tell: the pieces are thrown away, and the file is fetched in one go."""
    server.etag = None
    half_done(server, tmp_path / "file")
    server.body = BODY[::-1]
    download(server.url, tmp_path / "file", hashlib.sha256(BODY[::-1]).hexdigest())
    assert (tmp_path / "file").read_bytes() == BODY[::-1]
    assert [asked.get("Range") for asked in server.asked] == ["bytes=294912-", None]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_nothing_to_tell_versions_by(server, tmp_path, etag):
    """Neither ETag nor hash: a second piece could belong to another file, so it starts anew."""
    server.etag = etag
    half_done(server, tmp_path / "file")
    download(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert [asked.get("Range") for asked in server.asked] == [None]


def test_a_part_that_is_whole(server, tmp_path):
    """An earlier run ended between the last byte and the rename."""
    half_done(server, tmp_path / "file")
    next(path for path in parts() if path.suffix == ".part").write_bytes(BODY)
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY
    assert len(server.asked) == 1


def test_a_part_that_is_too_long(server, tmp_path):
    half_done(server, tmp_path / "file")
    next(path for path in parts() if path.suffix == ".part").write_bytes(BODY + b"more")
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_damaged_note_of_the_version(server, tmp_path):
    half_done(server, tmp_path / "file")
    next(path for path in parts() if path.suffix == ".json").write_text("{")
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_range_that_was_not_asked_for(server, tmp_path):
    half_done(server, tmp_path / "file")
    server.script = [wrong_range, whole]
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY
    assert [asked.get("Range") for asked in server.asked] == ["bytes=294912-", None]


@pytest.mark.parametrize("status", [500, 502, 503, 408, 429])
def test_passing_troubles(server, tmp_path, status):
    server.script = [answering(status), answering(status), whole]
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY
    assert len(server.asked) == 3


def test_pauses_grow_and_progress_starts_them_anew(server, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(http.time, "sleep", slept.append)
    server.script = [answering(500), answering(500), dropping, answering(500), whole]
    download(server.url, tmp_path / "file", SHA256)
    assert slept == [0.001, 0.002, 0.001, 0.002]


def test_giving_up(server, tmp_path):
    server.script = [answering(503)]
    with pytest.raises(MissingError, match=rf"{server.url}: the server answers 503 .*; is there a network\?"):
        download(server.url, tmp_path / "file", SHA256)
    assert len(server.asked) == 3
    assert not (tmp_path / "file").exists()


def test_giving_up_half_way(server, tmp_path):
    server.script = [dropping, answering(503)]
    with pytest.raises(MissingError, match="294,912 bytes are kept: run it again"):
        download(server.url, tmp_path / "file", SHA256)


@pytest.mark.parametrize("status", [404, 403, 410, 304])
def test_a_file_that_is_not_there(server, tmp_path, status):
    server.script = [answering(status)]
    with pytest.raises(MissingError, match=f"the server answers {status}"):
        download(server.url, tmp_path / "file", SHA256)
    assert len(server.asked) == 1


def test_short_without_a_length(server, tmp_path):
    """Only the expected size shows that something is missing."""

    def short(handler):
        handler.head(200, None)
        handler.wfile.write(BODY[:1000])

    server.script = [short]
    with pytest.raises(MissingError, match="the connection ended after 1,000 of 1,048,576 bytes"):
        download(server.url, tmp_path / "file", size=len(BODY))
    server.script = [without_length]
    download(server.url, tmp_path / "file", size=len(BODY))
    assert (tmp_path / "file").read_bytes() == BODY


def test_more_than_the_expected_size(server, tmp_path):
    server.script = [without_length]
    with pytest.raises(DataError, match="found more than the expected 1,000 bytes"):
        download(server.url, tmp_path / "file", size=1000)
    assert not parts()


def test_another_size_is_not_even_fetched(server, tmp_path):
    told = []
    with pytest.raises(DataError, match="found a file of 1,048,576 bytes, expected 1,000"):
        download(server.url, tmp_path / "file", size=1000, on_progress=lambda *amounts: told.append(amounts))
    assert not told and not parts()


def test_another_hash(server, tmp_path):
    with pytest.raises(DataError, match=f"found sha256 {SHA256}, expected 000"):
        download(server.url, tmp_path / "file", "0" * 64)
    assert not parts() and not (tmp_path / "file").exists()
    assert len(server.asked) == 1


def test_no_server(tmp_path):
    with Server() as server:
        url = server.url
    with pytest.raises(MissingError, match=r"(?i)refused.*; is there a network\?"):
        download(url, tmp_path / "file", pauses_s=())


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1/x"])
def test_no_address(tmp_path, url):
    with pytest.raises(MissingError, match=url):
        download(url, tmp_path / "file")


def test_silence(server, tmp_path):
    wait = threading.Event()
    server.script = [lambda handler: wait.wait(10)]
    with pytest.raises(MissingError, match="timed out"):
        download(server.url, tmp_path / "file", timeout_s=0.05, pauses_s=())
    wait.set()


def test_a_cache_on_another_file_system(server, tmp_path, monkeypatch):
    real = Path.replace

    def replace(self, target):
        if self.suffix == ".part" and self.parent.name == "parts":
            raise OSError(http.errno.EXDEV, "cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY
    assert not parts()


def test_two_at_once(server, tmp_path):
    """The second waits for the first and finds the file there."""
    threads = [threading.Thread(target=download, args=(server.url, tmp_path / "file", SHA256)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() == BODY
    assert len(server.asked) == 1
