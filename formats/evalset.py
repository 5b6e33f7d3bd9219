"""Multiple-choice sets (HellaSwag, MMLU): per example a context and four completions, as GPT-2 token ids."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc_cli.formats.atomic import atomic_write
from llmc_cli.formats.errors import RangeError, SizeError
from llmc_cli.formats.header import HEADER_BYTES, check_range, new_slots, read_slots
from llmc_cli.formats.registry import Kind
from llmc_cli.formats.stream import check_ids

START = 65535
"""The word that each example begins with."""

COMPLETIONS = 4
FIXED_WORDS = 5  # start, bytes of the example, index, label, number of completions
SMALLEST = 2 * (FIXED_WORDS + 2 * (1 + COMPLETIONS))  # bytes: one token in each text
LARGEST = 65534  # bytes: even, and a uint16


class EvalHeader(NamedTuple):
    magic: int
    version: int
    num_examples: int
    longest_example: int  # bytes


@dataclass(frozen=True, eq=False)
class Example:
    """``label`` is the right one of ``completions``; ``index`` the example's line in its source."""

    context: NDArray[np.uint16]  # (tokens,)
    completions: list[NDArray[np.uint16]]  # four of (tokens,)
    label: int
    index: int


@dataclass(frozen=True)
class EvalSet:
    """An evaluation set; iterating reads the file as it goes and checks every length in it.

    Iterating raises RangeError for impossible values and SizeError where the file ends early or late.
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
                raise SizeError(self.path, "bytes after the last example", "none")
        if longest != self.header.longest_example:
            raise RangeError(
                self.path, f"a longest example of {longest} bytes", f"{self.header.longest_example} as in the header"
            )

    def check(self, vocab_size: int) -> None:
        """Read everything; raise RangeError where a token id is not below ``vocab_size``."""
        for example in self:
            for name, ids in (("context", example.context), *_numbered(example.completions)):
                check_ids(self.path, f"example {example.index} {name}", ids, vocab_size)

    def _read_words(self, file: io.BufferedReader, number: int) -> NDArray[np.uint16]:
        """One example, whole."""
        start = np.frombuffer(self._read(file, 4, number), "<u2")
        if start[0] != START:
            raise RangeError(self.path, f"word {start[0]} at the start of example {number}", str(START))
        size = int(start[1])
        check_range(self.path, f"bytes of example {number}:", size, SMALLEST, self.header.longest_example)
        if size % 2:
            raise RangeError(self.path, f"example {number} of {size} bytes", "an even number")
        return np.concatenate([start, np.frombuffer(self._read(file, size - 4, number), "<u2")])

    def _read(self, file: io.BufferedReader, size: int, number: int) -> bytes:
        content = file.read(size)
        if len(content) < size:
            raise SizeError(self.path, f"its end within example {number}", f"{len(self):,} examples", "it is cut off")
        return content

    def _parse(self, words: NDArray[np.uint16], number: int) -> Example:
        index, label, completions = (int(word) for word in words[2:FIXED_WORDS])
        if completions != COMPLETIONS:
            raise RangeError(self.path, f"{completions} completions in example {number}", str(COMPLETIONS))
        check_range(self.path, f"label of example {number}", label, 0, COMPLETIONS - 1)
        texts: list[NDArray[np.uint16]] = []
        at = FIXED_WORDS
        for _ in range(1 + COMPLETIONS):
            length = int(words[at]) if at < words.size else 0
            check_range(self.path, f"tokens of a text in example {number}:", length, 1, words.size - at - 1)
            texts.append(words[at + 1 : at + 1 + length].astype(np.uint16))
            at += 1 + length
        if at != words.size:
            raise RangeError(self.path, f"example {number} of {words.nbytes} bytes", f"{2 * at} as its texts add up to")
        return Example(texts[0], texts[1:], label, index)


def read_evalset(path: str | Path) -> EvalSet:
    """Check the header of an evaluation set. Raises MagicError, VersionError, RangeError and SizeError."""
    slots = read_slots(path, Kind.EVALSET)
    header = EvalHeader(*(int(slot) for slot in slots[:4]))
    check_range(path, "number of examples", header.num_examples, 1)
    check_range(path, "bytes of the longest example:", header.longest_example, SMALLEST, LARGEST)
    size = Path(path).stat().st_size
    low, high = (HEADER_BYTES + header.num_examples * each for each in (SMALLEST, header.longest_example))
    if not low <= size <= high:
        raise SizeError(path, f"{size:,} bytes", f"{low:,} to {high:,} for {header.num_examples:,} examples")
    return EvalSet(Path(path), header)


def write_evalset(path: str | Path, examples: Iterable[Example]) -> int:
    """Write an evaluation set, one example after the other, and give their number. Raises RangeError for an example
    that the format cannot hold."""
    slots = new_slots(Kind.EVALSET, 1)
    with atomic_write(path) as file:
        file.write(bytes(HEADER_BYTES))
        for example in examples:
            words = _pack(path, example)
            file.write(words.data)
            slots[2] += 1
            slots[3] = max(int(slots[3]), words.nbytes)
        check_range(path, "number of examples", int(slots[2]), 1)
        file.seek(0)
        file.write(slots.data)
    return int(slots[2])


def _pack(path: str | Path, example: Example) -> NDArray[np.uint16]:
    name = f"example {example.index}"
    check_range(path, "index of an example", example.index, 0, 65535)
    check_range(path, f"completions of {name}:", len(example.completions), COMPLETIONS, COMPLETIONS)
    check_range(path, f"label of {name}", example.label, 0, COMPLETIONS - 1)
    words = [START, 0, example.index, example.label, COMPLETIONS]
    for part, ids in (("context", example.context), *_numbered(example.completions)):
        check_range(path, f"tokens in {name} {part}:", len(ids), 1)
        check_ids(path, f"{name} {part}", np.asarray(ids), 1 << 16)
        words += [len(ids), *(int(token) for token in ids)]
    words[1] = 2 * len(words)
    check_range(path, f"bytes of {name}:", words[1], SMALLEST, LARGEST)
    return np.array(words, "<u2")


def _numbered(completions: list[NDArray[np.uint16]]) -> list[tuple[str, NDArray[np.uint16]]]:
    return [(f"completion {number}", ids) for number, ids in enumerate(completions)]
