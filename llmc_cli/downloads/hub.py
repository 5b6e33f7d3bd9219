"""Download models from the Hugging Face Hub with its own client, huggingface_hub.

The client manages the cache. It reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE from the environment when it is
first imported.
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
"""Files in which transformers stores a byte-level tokenizer."""

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
"""A repository id: a name, or an owner and a name."""

OnProgress = Callable[[str, int, int | None], None]
"""Called with a file name, the number of bytes received so far, and the total, None if unknown."""


def fetch_model(repository: str, tokenizer: bool, on_progress: OnProgress = lambda name, done, total: None) -> Path:
    """Download the config and weights of ``repository`` and return their folder in the client's cache.

    ``tokenizer``: also download the tokenizer files that exist. Cached files that are current are not downloaded again.
    Raises MissingError if the network, the server or the permission is missing, DataError if the repository does not
    exist, has no config or weights, or a file is damaged.
    """
    fetch = _Fetch(repository, on_progress)
    with _converted_errors(repository):
        config = fetch.file("config.json")
        if config is None:
            raise DataError(f"{repository}: found no config.json; expected a model for transformers")
        weights = next((path for name in CHECKPOINT_FILES if (path := fetch.file(name))), None)
        if weights is None:
            raise DataError(f"{repository}: found no weights, expected one of {', '.join(CHECKPOINT_FILES)}")
        if weights.name.endswith(".index.json"):
            for name in _shard_names(weights):
                if fetch.file(name) is None:
                    raise DataError(f"{repository}: {weights.name} lists {name}, which is missing")
        for name in TOKENIZER_FILES if tokenizer else ():
            fetch.file(name)
    return config.parent


class _Fetch:
    """Downloads files of one repository, all from the revision of the first file."""

    def __init__(self, repository: str, on_progress: OnProgress) -> None:
        self.repository, self.on_progress = repository, on_progress
        self.revision: str | None = None
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    def file(self, name: str) -> Path | None:
        """Return the path of the file in the cache, or None if the repository has no such file."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.constants import HF_HUB_OFFLINE
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        known = isinstance(try_to_load_from_cache(self.repository, name, revision=self.revision), str)
        try:
            path = Path(hf_hub_download(self.repository, name, revision=self.revision, **self._progress(name)))
        except LocalEntryNotFoundError:
            if self.revision is None or not HF_HUB_OFFLINE:
                raise
            return None  # offline: a file that is not cached counts as missing
        except EntryNotFoundError:
            return None
        if not known:
            _check_sha256(self.repository, path)
        self.revision = path.parent.name
        return path

    def _progress(self, name: str) -> dict[str, Any]:
        """Return the client option that reports progress to ``on_progress`` instead of drawing a bar.

        Older clients have no such option; their progress bars are disabled.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if "tqdm_class" not in inspect.signature(hf_hub_download).parameters:
            disable_progress_bars()
            return {}
        on_progress = self.on_progress

        class Bar:
            """The part of tqdm's interface that the client uses."""

            def __init__(self, *, total: int | None = None, initial: int = 0, **style: Any) -> None:
                self.done, self.total = initial, total

            def update(self, count: int = 1) -> None:
                self.done += count
                on_progress(name, self.done, self.total)

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *error: object) -> None:
                pass

        return {"tqdm_class": Bar}


def _check_sha256(repository: str, path: Path) -> None:
    """Verify a file against its SHA-256, which is its name in the cache if it is large. Remove it if it differs."""
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return
    with blob.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != blob.name:
        path.unlink()
        blob.unlink()
        raise DataError(
            f"{repository}: {path.name}: found SHA-256 {found}, expected {blob.name}; the file was removed, try again"
        )


def _shard_names(index: Path) -> list[str]:
    """Return the names of the weight files listed in an index."""
    try:
        return sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: not a valid weight index ({type(error).__name__}: {error})") from None


@contextlib.contextmanager
def _converted_errors(repository: str) -> Iterator[None]:
    """Convert the client's exceptions to DataError and MissingError; errors of the file system pass through.

    Other exceptions count as network errors: the client's HTTP library differs between versions.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except (DataError, MissingError):
        raise
    except GatedRepoError:
        raise MissingError(
            f"{repository}: access is restricted; request it on the model's page, and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise DataError(
            f"{repository}: no such file or folder, and no such model on the Hugging Face Hub "
            "(for a private model, set HF_TOKEN)"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        cause = error.__cause__ or error
        raise MissingError(
            f"{repository}: no such file or folder, and the download from the Hugging Face Hub failed "
            f"({_first_line(cause)}); check the name and the network, or give a local folder"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
