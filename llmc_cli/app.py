"""The command line's entry: the one tuple of commands, and how their failures end."""

import contextlib
import errno
import functools
import importlib.metadata
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

INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h: a bug of ours, never confused with a failed check


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with every failure turned into a line or two on stderr and its exit status."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, SystemExit):
            raise
        except BrokenPipeError:
            # The reader has gone (`llmc decode … | head`). Python flushes stdout once more at exit: let it go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            raise typer.Exit(128 + signal.SIGINT) from None
        except Exception as error:
            if os.environ.get("LLMC_DEBUG") == "1":
                raise
            message, status = explain(error)
            complain(message)
            raise typer.Exit(status) from None

    return run


def complain(message: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be listening any more
        print(f"llmc: {message}", file=sys.stderr)


def explain(error: Exception) -> tuple[str, int]:
    """The message and the exit status that ``error`` ends the program with."""
    if isinstance(error, LlmcError):
        return str(error), error.exit_code
    if isinstance(error, FormatError):
        return str(error), 3
    if isinstance(error, MemoryError):
        return f"not enough memory: {error or 'an allocation failed'}", 4
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", 4 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 3
    return f"internal error: {type(error).__name__}: {error}\nset LLMC_DEBUG=1 to see where", INTERNAL_ERROR


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"llmc {importlib.metadata.version('llmc-cli')}")
        raise typer.Exit


app = typer.Typer(name="llmc", pretty_exceptions_enable=False)


@app.callback()
def llmc(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Train, sample, convert and check GPT-2 language models."""


def unwrapped(docstring: str) -> str:
    """Each paragraph on one line: the help breaks lines to the terminal's width itself."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in docstring.split("\n\n"))


for _command in COMMANDS:
    app.command(help=unwrapped(_command.__doc__ or ""))(guarded(_command))


def end_on_sigterm(signum: int, frame: Any) -> NoReturn:
    """Unwind the stack, so that half-written files are removed."""
    raise SystemExit(128 + signum)


def open_streams() -> None:
    """Standard streams as the commands expect them: closed ones are empty or lead nowhere. What is written is UTF-8,
    whatever the locale (in a pipe on Windows it would be a code page, which has no U+FFFD), and the bytes of a file
    name that are not UTF-8 come out as they are (PEP 383)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 open to the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def main() -> None:
    open_streams()
    warnings.showwarning = lambda message, *_: complain(f"warning: {message}")
    set_passive_wait()  # before any command imports NumPy
    signal.signal(signal.SIGTERM, end_on_sigterm)
    try:
        status = app(args=sys.argv[1:] or ["--help"], prog_name="llmc", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):  # before the command itself began
        status = 128 + signal.SIGINT
    except Exception as error:
        # wrong usage, found by typer: one of several classes, of its own or of click, by its version
        if not hasattr(error, "format_message"):
            raise
        path = getattr(getattr(error, "ctx", None), "command_path", "llmc")
        complain(f"{error.format_message()}\nsee {path} --help")
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
