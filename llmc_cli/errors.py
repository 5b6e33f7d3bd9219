"""What can go wrong besides a bad file (``formats.errors``): one class per exit status of the command line."""


class LlmcError(Exception):
    """Base: the message is one or two lines that say what, which file, what was expected, and what to do."""

    exit_code = 1


class CheckError(LlmcError):
    """A check failed: a difference, a regression, a loss that is not finite."""


class UsageError(LlmcError):
    """Options that contradict each other or the state of things. Nothing was changed."""

    exit_code = 2


class DataError(LlmcError):
    """Input that cannot be used, beyond what a format's reader rejects."""

    exit_code = 3


class MissingError(LlmcError):
    """The network, an optional package, a device or disk space is missing, or a feature is not there yet."""

    exit_code = 4
