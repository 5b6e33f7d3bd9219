"""Models from the Hugging Face hub, through its own client: with its cache, its token, its mirror and its offline mode.

The client reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE from the environment when it is first imported.
"""

import contextlib
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from llmc_cli.errors import DataError, MissingError
from llmc_cli.formats.safetensors import CHECKPOINT_FILES

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
"""What transformers may keep a byte-level tokenizer in."""

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
"""What an id on the hub looks like: a name, or an owner and a name."""

OnBytes = Callable[[str, int, int | None], None]
"""Takes the name of a file, the bytes of it there are so far, and the bytes in all, None where unknown."""


def fetch_model(repository: str, tokenizer: bool, on_bytes: OnBytes = lambda name, done, total: None) -> Path:
    """The folder in the client's cache that holds config and weights of ``repository``, and with ``tokenizer`` its
    tokenizer files, as far as it has any. What is in the cache and still current is not fetched again.

    Raises MissingError where the network, the server or the permission is missing, DataError where there is no such
    repository, it holds no weights, or a file arrives damaged.
    """
    fetch = _Fetch(repository, on_bytes)
    with _explained(repository):
        config = fetch.file("config.json")
        if config is None:
            raise DataError(f"{repository}: there is no config.json in it, so it is no model of transformers")
        weights = next((path for name in CHECKPOINT_FILES if (path := fetch.file(name))), None)
        if weights is None:
            raise DataError(f"{repository}: there are no weights in it ({', '.join(CHECKPOINT_FILES)})")
        if weights.name.endswith(".index.json"):
            for name in _parts(weights):
                if fetch.file(name) is None:
                    raise DataError(f"{repository}: {weights.name} names {name}, which is not in it")
        for name in TOKENIZER_FILES if tokenizer else ():
            fetch.file(name)
    return config.parent


class _Fetch:
    """Files of one repository, all of the revision that the first of them had."""

    def __init__(self, repository: str, on_bytes: OnBytes) -> None:
        self.repository, self.on_bytes = repository, on_bytes
        self.revision: str | None = None
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    def file(self, name: str) -> Path | None:
        """Where the file lies, or None where the repository has none of this name."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.constants import HF_HUB_OFFLINE
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        known = isinstance(try_to_load_from_cache(self.repository, name, revision=self.revision), str)
        try:
            path = Path(hf_hub_download(self.repository, name, revision=self.revision, **self._progress(name)))
        except LocalEntryNotFoundError:
            if self.revision is None or not HF_HUB_OFFLINE:
                raise
            return None  # offline, only what is in the cache counts
        except EntryNotFoundError:
            return None
        if not known:
            _check_sha256(self.repository, path)
        self.revision = path.parent.name
        return path

    def _progress(self, name: str) -> dict[str, Any]:
        """The client's option that reports through ``on_bytes`` instead of drawing; older clients cannot, and are told
        to draw nothing."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if "tqdm_class" not in inspect.signature(hf_hub_download).parameters:
            disable_progress_bars()
            return {}
        on_bytes = self.on_bytes

        class Bar:
            """As much of tqdm as the client uses."""

            def __init__(self, *, total: int | None = None, initial: int = 0, **style: Any) -> None:
                self.done, self.total = initial, total

            def update(self, count: int = 1) -> None:
                self.done += count
                on_bytes(name, self.done, self.total)

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *error: object) -> None:
                pass

        return {"tqdm_class": Bar}


def _check_sha256(repository: str, path: Path) -> None:
    """A large file lies in the cache under its SHA-256: hold it against that, and remove it where it differs."""
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return
    with blob.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != blob.name:
        path.unlink()
        blob.unlink()
        raise DataError(
            f"{repository}: {path.name} came with sha256 {found}, expected {blob.name}; it is removed, try again"
        )


def _parts(index: Path) -> list[str]:
    """The files that an index of weights names."""
    try:
        return sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: not an index of weights ({type(error).__name__}: {error})") from None


@contextlib.contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn the client's exceptions into ours. Its network library is not ours to know, and has changed before: what is
    neither of the client's own classes nor the disk's is the network's."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except (DataError, MissingError):
        raise
    except GatedRepoError:
        raise MissingError(
            f"{repository}: access to it has to be granted; ask for it on its page, and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise DataError(
            f"{repository}: no such file or folder, and no such model on the hub (or a private one: set HF_TOKEN)"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        cause = error.__cause__ or error
        raise MissingError(
            f"{repository}: it cannot be fetched from the Hugging Face hub ({_first_line(cause)}); "
            "try again, or give a folder"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
