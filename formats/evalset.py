"""Evaluation sets of multiple-choice questions (HellaSwag, MMLU): a context and four completions per example, as
GPT-2 token ids."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc_cli.formats.errors import RangeError, SizeError
from llmc_cli.formats.header import HEADER_BYTES, TRUNCATED_REMEDY, check_range, read_slots
from llmc_cli.formats.registry import Kind
from llmc_cli.formats.stream import check_ids

START = 65535
"""The first word of each example."""

COMPLETIONS = 4
FIXED_WORDS = 5  # start, size of the example in bytes, index, label, number of completions
MIN_EXAMPLE_BYTES = 2 * (FIXED_WORDS + 2 * (1 + COMPLETIONS))  # one token in each text
MAX_EXAMPLE_BYTES = 65534  # the largest even uint16


class EvalHeader(NamedTuple):
    magic: int
    version: int
    num_examples: int
    longest_example: int  # bytes


@dataclass(frozen=True, eq=False)
class Example:
    """One question. ``label`` is the index of the correct completion, ``index`` the example's line in its source."""

    context: NDArray[np.uint16]  # (tokens,)
    completions: list[NDArray[np.uint16]]  # four arrays (tokens,)
    label: int
    index: int


@dataclass(frozen=True)
class EvalSet:
    """An evaluation set. Iterating reads the file one example at a time and checks every length.

    Iteration raises RangeError for invalid values and SizeError if the file is too short or too long.
    """

    path: Path
    header: EvalHeader

    def __len__(self) -> int:
        return self.header.num_examples

    def __iter__(self) -> Iterator[Example]:
        longest = 0
        with self.path.open("rb") as file:
            file.seek(HEADER_BYTES)
            for number in range(len(self)):
                words = self._read_words(file, number)
                longest = max(longest, words.nbytes)
                yield self._parse(words, number)
            if file.read(1):
                raise SizeError(self.path, "extra bytes after the last example", "the end of the file")
        if longest != self.header.longest_example:
            raise RangeError(
                self.path,
                f"{longest} bytes in the longest example",
                f"{self.header.longest_example} bytes, as the header says",
            )

    def check(self, vocab_size: int) -> None:
        """Read the whole file. Raise RangeError if a token id is not below ``vocab_size``."""
        for example in self:
            completions = ((f"completion {number}", ids) for number, ids in enumerate(example.completions))
            for name, ids in (("context", example.context), *completions):
                check_ids(self.path, f"example {example.index} {name}", ids, vocab_size)

    def _read_words(self, file: io.BufferedReader, number: int) -> NDArray[np.uint16]:
        """Read all words of one example."""
        start = np.frombuffer(self._read(file, 4, number), "<u2")
        if start[0] != START:
            raise RangeError(self.path, f"{start[0]} at the start of example {number}", str(START))
        size = int(start[1])
        check_range(
            self.path, f"size of example {number} in bytes", size, MIN_EXAMPLE_BYTES, self.header.longest_example
        )
        if size % 2:
            raise RangeError(self.path, f"size of example {number} in bytes = {size}", "an even number")
        return np.concatenate([start, np.frombuffer(self._read(file, size - 4, number), "<u2")])

    def _read(self, file: io.BufferedReader, size: int, number: int) -> bytes:
        content = file.read(size)
        if len(content) < size:
            raise SizeError(
                self.path, f"the end of the file in example {number}", f"{len(self):,} examples", TRUNCATED_REMEDY
            )
        return content

    def _parse(self, words: NDArray[np.uint16], number: int) -> Example:
        index, label, completions = (int(word) for word in words[2:FIXED_WORDS])
        if completions != COMPLETIONS:
            raise RangeError(self.path, f"{completions} completions in example {number}", str(COMPLETIONS))
        check_range(self.path, f"label of example {number}", label, 0, COMPLETIONS - 1)
        texts: list[NDArray[np.uint16]] = []
        start = FIXED_WORDS
        for _ in range(1 + COMPLETIONS):
            length = int(words[start]) if start < words.size else 0
            check_range(self.path, f"length of a text in example {number}", length, 1, words.size - start - 1)
            texts.append(words[start + 1 : start + 1 + length].astype(np.uint16))
            start += 1 + length
        if start != words.size:
            raise RangeError(
                self.path,
                f"size of example {number} in bytes = {words.nbytes}",
                f"{2 * start}, the sum of the sizes of its texts",
            )
        return Example(texts[0], texts[1:], label, index)


def read_evalset(path: str | Path) -> EvalSet:
    """Open an evaluation set and check its header. Raises MagicError, VersionError, RangeError and SizeError."""
    slots = read_slots(path, Kind.EVALSET)
    header = EvalHeader(*(int(slot) for slot in slots[:4]))
    check_range(path, "number of examples", header.num_examples, 1)
    longest = header.longest_example
    check_range(path, "size of the longest example in bytes", longest, MIN_EXAMPLE_BYTES, MAX_EXAMPLE_BYTES)
    size = Path(path).stat().st_size
    low, high = (HEADER_BYTES + header.num_examples * each for each in (MIN_EXAMPLE_BYTES, longest))
    if not low <= size <= high:
        raise SizeError(
            path, f"a file size of {size:,} bytes", f"{low:,} to {high:,} bytes for {header.num_examples:,} examples"
        )
    return EvalSet(Path(path), header)
