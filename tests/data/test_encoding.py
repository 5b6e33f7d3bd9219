import contextlib

import pytest
from support.text_tokenizers import LetterTokenizer, documents, gpt2_tokenizer

from llmc_cli.data import encoding
from llmc_cli.data.documents import Piece
from llmc_cli.data.encoding import Worker, encode_batch, encode_batches
from llmc_cli.errors import MissingError


@pytest.fixture
def gpt2():
    return gpt2_tokenizer()


def test_end_of_text_precedes_each_document():
    pieces = [Piece("ab", True), Piece("c", False), Piece("", True), Piece("d", True)]
    assert encode_batch(LetterTokenizer(), pieces).tolist() == [0, 1, 2, 3, 0, 0, 4]


def test_single_batch_starts_no_process(gpt2, monkeypatch):
    monkeypatch.setattr(encoding, "Worker", None)
    assert len(list(encode_batches(iter([documents("a")]), gpt2, 8))) == 1
    assert list(encode_batches(iter([]), gpt2, 8)) == []


def test_batches_are_read_on_demand(gpt2):
    """At most one batch per worker and the next one are read before their ids are requested."""
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield documents(f"batch {read}")

    with contextlib.closing(encode_batches(endless(), gpt2, 2)) as arrays:
        for returned in range(1, 8):
            assert gpt2.decode_bytes(next(arrays).tolist()) == f"<|endoftext|>batch {returned}".encode()
            assert read <= returned + 2


def test_sending_to_a_dead_worker_is_an_error():
    worker = Worker("gpt2")
    worker.process.kill()
    worker.process.join()
    with pytest.raises(MissingError, match="a worker process exited with code"):
        worker.send(documents("a" * 1_000_000))
    worker.stop()


def test_exception_in_a_worker_is_raised(gpt2):
    faulty = [Piece(None, True)]
    arrays = encode_batches(iter([faulty, faulty]), gpt2, 2)
    with pytest.raises(RuntimeError, match="TypeError"), contextlib.closing(arrays):
        next(arrays)
