"""Downloads from a local server that imitates the Hugging Face Hub.

The client reads its settings when it is imported, so each test runs it in a separate process.
"""

import errno
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import huggingface_hub
import pytest
from support.paths import TINY_GPT2

from llmc_cli.downloads.hub import fetch_model
from llmc_cli.errors import MissingError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves ``files[repository][name]``; ``downloads`` lists requested names, ``tokens`` authorization headers."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.downloads, self.tokens = {}, [], set()
        self.gated, self.damaged = set(), set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        repository, _, rest = self.path[1:].partition("/resolve/")
        name = rest.partition("/")[2]
        if not name:
            return self.respond(404, b"", {})  # other API requests, which a mirror may not support
        hub.tokens.add(self.headers.get("Authorization"))
        if self.command == "GET":
            hub.downloads.append(name)
        if repository in hub.gated:
            return self.respond(403, b"", {"X-Error-Code": "GatedRepo"})
        if repository not in hub.files:
            return self.respond(401, b"", {"X-Error-Code": "RepoNotFound"})
        content = hub.files[repository].get(name)
        commit = {"X-Repo-Commit": COMMIT}
        if content is None:
            return self.respond(404, b"", {**commit, "X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(content).hexdigest()
        if name in hub.damaged:
            content = content[:-1] + b"?"
        return self.respond(200, content, {**commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"})

    def respond(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    with FakeHub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.files["someone/tiny"] = {
            path.name: path.read_bytes() for path in (TINY_GPT2 / "safetensors").iterdir() if path.is_file()
        }
        yield server
        server.shutdown()


@pytest.fixture
def llmc(hub, tmp_path):
    """A function that runs ``llmc convert`` against the fake hub and returns its status, stdout and stderr."""

    def run(*arguments, **settings):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")} | settings
        command = [sys.executable, "-m", "llmc_cli.app", "convert", *map(str, arguments)]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return result.returncode, result.stdout, result.stderr

    return run


def test_only_required_files_are_downloaded_once(hub, llmc, tmp_path):
    assert llmc("someone/tiny", "tiny.bin", HF_TOKEN="hf_secret")[0] == 0
    assert (tmp_path / "tiny.bin").read_bytes() == (TINY_GPT2 / "model.bin").read_bytes()
    assert hub.downloads == ["config.json", "model.safetensors"]
    assert hub.tokens == {"Bearer hf_secret"}
    assert llmc("someone/tiny", "again.bin", HF_HUB_OFFLINE="1")[0] == 0
    assert (tmp_path / "again.bin").read_bytes() == (TINY_GPT2 / "model.bin").read_bytes()
    assert len(hub.downloads) == 2


def test_pickled_weights_are_downloaded_if_there_are_no_safetensors(hub, llmc, tmp_path):
    hub.files["someone/old"] = {path.name: path.read_bytes() for path in (TINY_GPT2 / "pytorch").iterdir()}
    assert llmc("someone/old", "tiny.bin", "--quiet") == (
        0,
        "writing 9,024 parameters (fp32, version 3) to tiny.bin\n",
        "",
    )
    assert hub.downloads == ["config.json", "pytorch_model.bin"]
    assert llmc("someone/old", "again.bin", HF_HUB_OFFLINE="1")[0] == 0
    assert (tmp_path / "again.bin").read_bytes() == (TINY_GPT2 / "model.bin").read_bytes()


def test_files_listed_in_a_weight_index_are_downloaded(hub, llmc, tmp_path):
    files = hub.files["someone/tiny"]
    content = files.pop("model.safetensors")
    names = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    index = {"weight_map": {name: "part-1.safetensors" for name in names if name != "__metadata__"}}
    files |= {"part-1.safetensors": content, "model.safetensors.index.json": json.dumps(index).encode()}
    assert llmc("someone/tiny", "tiny.bin")[0] == 0
    assert (tmp_path / "tiny.bin").read_bytes() == (TINY_GPT2 / "model.bin").read_bytes()
    del files["part-1.safetensors"]
    status, _, error = llmc("someone/tiny", "again.bin", HF_HOME=str(tmp_path / "another"))
    assert status == 3
    assert "model.safetensors.index.json lists part-1.safetensors" in error


def test_tokenizer_files_are_downloaded_for_a_folder(hub, llmc, tmp_path):
    hub.files["someone/tiny"]["vocab.json"] = b'{"a": 0}'
    assert llmc("someone/tiny", "folder")[0] == 0
    assert (tmp_path / "folder" / "vocab.json").read_bytes() == b'{"a": 0}'


def test_unknown_repository_is_rejected(llmc):
    status, out, error = llmc("someone/else", "tiny.bin")
    assert (status, out) == (3, "")
    assert error.startswith("llmc: someone/else: no such file or folder, and no such model on the Hugging Face Hub")
    assert error.count("\n") == 1


def test_gated_repository_needs_a_token(hub, llmc):
    hub.gated.add("someone/gated")
    status, _, error = llmc("someone/gated", "tiny.bin")
    assert status == 4
    assert "HF_TOKEN" in error


@pytest.mark.parametrize(("missing", "message"), [("config.json", "no config.json"), ("model.safetensors", "weights")])
def test_repository_without_config_or_weights_is_rejected(hub, llmc, missing, message):
    del hub.files["someone/tiny"][missing]
    status, _, error = llmc("someone/tiny", "tiny.bin")
    assert status == 3
    assert message in error


def test_damaged_file_is_removed(hub, llmc, tmp_path):
    hub.damaged.add("model.safetensors")
    status, _, error = llmc("someone/tiny", "tiny.bin")
    assert status == 3
    assert "SHA-256" in error
    assert not (tmp_path / "tiny.bin").exists()
    hub.damaged.clear()
    assert llmc("someone/tiny", "tiny.bin")[0] == 0


def test_offline_without_a_cached_copy(llmc):
    status, _, error = llmc("someone/tiny", "tiny.bin", HF_HUB_OFFLINE="1")
    assert status == 4
    assert "offline" in error
    assert error.count("\n") == 1


def test_network_and_disk_errors_are_distinguished(monkeypatch):
    def fail(error):
        def download(*arguments, **options):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    fail(ConnectionError("no route to host"))
    with pytest.raises(MissingError, match=r"someone/tiny.*no route to host"):
        fetch_model("someone/tiny", tokenizer=False)
    fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        fetch_model("someone/tiny", tokenizer=False)
