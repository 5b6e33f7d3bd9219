"""Errors other than invalid files (see ``formats.errors``): one class per exit status of the command line."""


class LlmcError(Exception):
    """Base class. The message is one or two lines: what failed, which file, what was expected, what to do."""

    exit_code = 1


class CheckError(LlmcError):
    """A check failed: a verification, a performance regression, or a loss that is not finite."""


class UsageError(LlmcError):
    """Invalid or conflicting options, or options that conflict with existing files. Nothing was changed."""

    exit_code = 2


class DataError(LlmcError):
    """Valid files whose content cannot be used."""

    exit_code = 3


class MissingError(LlmcError):
    """The network, an optional package, a device or disk space is missing, or a feature is not implemented yet."""

    exit_code = 4
