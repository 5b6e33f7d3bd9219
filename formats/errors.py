"""Exceptions for invalid files: one class per kind of failure."""

from pathlib import Path


class FormatError(Exception):
    """Base class of all errors of this package: a file does not have the expected content.

    ``path`` names the file, ``found`` and ``expected`` describe the mismatch, and ``remedy`` (may be empty) says what
    to do about it. The message contains all four on one line.
    """

    def __init__(self, path: str | Path, found: str, expected: str, remedy: str = "") -> None:
        self.path, self.found, self.expected, self.remedy = str(path), found, expected, remedy
        text = f"{path}: found {found}, expected {expected}"
        super().__init__(f"{text}; {remedy}" if remedy else text)


class MagicError(FormatError):
    """The magic number is unknown, or is that of another format than the one requested."""


class VersionError(FormatError):
    """The format is supported, but this version of it is not."""


class SizeError(FormatError):
    """The file is shorter or longer than its header says."""


class RangeError(FormatError):
    """A header field, a token id or another value is outside its valid range."""


class NonFiniteError(FormatError):
    """A weight, gradient or moment is NaN or infinite."""


class RefusedError(FormatError):
    """A known variant that is not read, because its content would be ambiguous or is not supported."""


class UnsafePickleError(FormatError):
    """A pickle contains something other than tensors."""
