"""What can be wrong with a file: one exception class per kind of failure."""

from pathlib import Path


class FormatError(Exception):
    """A file is not what it should be. Base of all errors of this package.

    ``path`` names the file, ``found`` and ``expected`` say what was met and what would have been right, ``remedy``
    (may be empty) what to do about it. The text of the exception carries all four on one line.
    """

    def __init__(self, path: str | Path, found: str, expected: str, remedy: str = "") -> None:
        self.path, self.found, self.expected, self.remedy = str(path), found, expected, remedy
        text = f"{path}: found {found}, expected {expected}"
        super().__init__(f"{text}; {remedy}" if remedy else text)


class MagicError(FormatError):
    """The first bytes are of no known format, or of another than the one asked for."""


class VersionError(FormatError):
    """The format is known, this version of it is not."""


class SizeError(FormatError):
    """The file is shorter or longer than its header says."""


class RangeError(FormatError):
    """A header slot, a token id or another value lies outside what is possible."""


class NonFiniteError(FormatError):
    """A weight, gradient or moment is NaN or infinite."""


class RefusedError(FormatError):
    """A variant that is known by name and deliberately not read, since reading it would be a guess."""


class UnsafePickleError(FormatError):
    """A pickle asks for something other than tensors."""
