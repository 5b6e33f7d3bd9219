"""Entry point of the command line: the commands, and how errors become messages and exit statuses."""

import contextlib
import errno
import functools
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from llmc_cli.commands import bench, convert, decode, prepro, sample, train, verify
from llmc_cli.errors import LlmcError
from llmc_cli.formats.errors import FormatError
from llmc_cli.machine.idle_threads import set_passive_wait

COMMANDS = (prepro.prepro, convert.convert, train.train, sample.sample, decode.decode, verify.verify, bench.bench)

INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h; distinct from 1, a failed check


def handle_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``command`` so that every error becomes one or two lines on stderr and an exit status."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, SystemExit):
            raise
        except BrokenPipeError:
            # The reader closed the pipe (`llmc decode … | head`). Discard what Python flushes to stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            raise typer.Exit(128 + signal.SIGINT) from None
        except Exception as error:
            if os.environ.get("LLMC_DEBUG") == "1":
                raise
            message, status = error_message(error)
            print_error(message)
            raise typer.Exit(status) from None

    return run


def print_error(message: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be closed
        print(f"llmc: {message}", file=sys.stderr)


def error_message(error: Exception) -> tuple[str, int]:
    """Return the message and the exit status for ``error``."""
    if isinstance(error, LlmcError):
        return str(error), error.exit_code
    if isinstance(error, FormatError):
        return str(error), 3
    if isinstance(error, MemoryError):
        return f"not enough memory: {error or 'an allocation failed'}", 4
    if isinstance(error, OSError) and error.strerror:
        path = f"{error.filename}: " if error.filename else ""
        return f"{path}{error.strerror}", 4 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 3
    return f"internal error: {type(error).__name__}: {error}\nset LLMC_DEBUG=1 to see the traceback", INTERNAL_ERROR


def print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version as package_version  # loads much that --help does not need

        print(f"llmc {package_version('llmc-cli')}")
        raise typer.Exit


app = typer.Typer(name="llmc", pretty_exceptions_enable=False)


def llmc(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train, sample, convert and verify GPT-2 language models.

    Exit status: 0 success, 1 a check failed, 2 wrong usage, 3 invalid data, 4 missing package, device, memory or
    network, 130 or 143 interrupted.
    """


def unwrap(docstring: str) -> str:
    """Join each paragraph into one line; the help is wrapped to the terminal's width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in docstring.split("\n\n"))


app.callback(help=unwrap(llmc.__doc__ or ""))(llmc)
for _command in COMMANDS:
    app.command(help=unwrap(_command.__doc__ or ""))(handle_errors(_command))


def plain_message(message: str) -> str:
    """Return a message of typer without the phrases of pydantic, which checks the values."""
    message = message.replace("Value error, ", "").replace("Input should be a valid", "expected a valid")
    return message.replace("Input should be", "expected a value")


def exit_on_sigterm(signum: int, frame: Any) -> NoReturn:
    """Exit by an exception, so that incomplete files are removed."""
    raise SystemExit(128 + signum)


def set_up_streams() -> None:
    """Replace closed standard streams by the null device, and make stdout and stderr UTF-8 whatever the locale.

    In a pipe on Windows the encoding would be a code page without U+FFFD. Bytes of file names that are not UTF-8 are
    written unchanged (PEP 383).
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 stays open
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def main() -> None:
    set_up_streams()
    warnings.showwarning = lambda message, *_: print_error(f"warning: {message}")
    set_passive_wait()  # before any command imports NumPy
    signal.signal(signal.SIGTERM, exit_on_sigterm)
    try:
        status = app(args=sys.argv[1:] or ["--help"], prog_name="llmc", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):  # before the command has started
        status = 128 + signal.SIGINT
    except Exception as error:
        # a usage error of typer or click; its class depends on their versions
        if not hasattr(error, "format_message"):
            raise
        path = getattr(getattr(error, "ctx", None), "command_path", "llmc")
        print_error(f"{plain_message(error.format_message())}\nsee `{path} --help`")
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
