import errno
import os
import re
import subprocess
import sys

import pytest
import typer

from llmc_cli.app import COMMANDS, error_message, handle_errors
from llmc_cli.errors import CheckError, DataError, MissingError, UsageError
from llmc_cli.formats.errors import SizeError


def llmc(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "llmc_cli.app", *arguments], capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CheckError("x"), 1),
        (UsageError("x"), 2),
        (DataError("x"), 3),
        (SizeError("f.bin", "1", "2"), 3),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "f.bin"), 3),
        (MissingError("x"), 4),
        (MemoryError(), 4),
        (OSError(errno.ENOSPC, "No space left on device"), 4),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 4),
        (ZeroDivisionError("x"), 70),
    ],
)
def test_exit_status_of_each_error(error, status, capsys, monkeypatch):
    monkeypatch.delenv("LLMC_DEBUG", raising=False)

    def command():
        raise error

    with pytest.raises(typer.Exit) as caught:
        handle_errors(command)()
    assert caught.value.exit_code == status
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("llmc: ")
    assert len(stderr.splitlines()) <= 2
    assert "Traceback" not in stderr


def test_os_error_message_names_the_file():
    assert "f.bin" in error_message(FileNotFoundError(errno.ENOENT, "No such file", "f.bin"))[0]


def test_llmc_debug_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv("LLMC_DEBUG", "1")

    def command():
        raise DataError("x")

    with pytest.raises(DataError):
        handle_errors(command)()


def test_keyboard_interrupt_exits_130():
    def command():
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as caught:
        handle_errors(command)()
    assert caught.value.exit_code == 130


def test_help_lists_every_command():
    run = llmc("--help")
    assert run.returncode == 0
    for command in COMMANDS:
        assert f" {command.__name__} " in run.stdout


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_help_of_every_command(command):
    run = llmc(command, "--help")
    assert (run.returncode, run.stderr) == (0, "")
    assert "\x1b" not in run.stdout


def test_unknown_command_exits_2():
    run = llmc("tarin")
    assert (run.returncode, run.stdout) == (2, "")
    assert "tarin" in run.stderr


@pytest.mark.parametrize("arguments", [["train", "--bogus"], ["train", "-b"], ["train", "-b", "x"], ["sample"]])
def test_usage_error_is_two_lines(arguments):
    run = llmc(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    first, second = run.stderr.splitlines()
    assert first.startswith("llmc: ")
    assert re.fullmatch(r"see `llmc( \w+)? --help`", second)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "-b", "x"], "expected a valid integer"),
        (["train", "-b", "0"], "expected a value greater than or equal to 1"),
        (["bench", "nothing"], ": 'nothing' is not one of 'kernels'"),
    ],
)
def test_invalid_value_is_explained_in_plain_words(arguments, expected):
    error = llmc(*arguments).stderr
    assert expected in error
    assert "Value error" not in error
    assert "Input should be" not in error


def test_no_arguments_prints_help():
    run = llmc()
    assert (run.returncode, run.stdout) == (0, llmc("--help").stdout)


def test_version():
    run = llmc("--version")
    assert run.returncode == 0
    assert run.stdout.startswith("llmc 0.")


posix = pytest.mark.skipif(os.name == "nt", reason="a POSIX shell closes streams")


@posix
@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("decode <&-", 0),
        ("decode 15496 >&-", 0),
        ("decode 15496 2>&-", 0),
        ("verify nothing >&- 2>&-", 3),
        ("verify nothing <&- >&- 2>&-", 3),
        ("prepro text - <&-", 3),
        ("bogus 2>&-", 2),
    ],
)
def test_closed_streams(command, status, tmp_path):
    run = subprocess.run(
        ["sh", "-c", f'"$0" -m llmc_cli.app {command}', sys.executable], capture_output=True, cwd=tmp_path
    )
    assert run.returncode == status, run.stderr
    assert b"internal error" not in run.stderr
    assert run.stdout == (b"Hello\n" if command == "decode 15496 2>&-" else b"")


@posix
@pytest.mark.parametrize(("command", "status"), [("verify nothing", 3), ("bogus", 2)])
def test_exit_status_when_stderr_is_closed_by_its_reader(command, status, tmp_path):
    script = f'("$0" -m llmc_cli.app {command} 2>&1 >/dev/null; echo $? >status) | true'
    subprocess.run(["sh", "-c", script, sys.executable], cwd=tmp_path, check=True)
    assert (tmp_path / "status").read_text() == f"{status}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_file_names_are_printed_unchanged(tmp_path):
    """A name with UTF-8 and other bytes, in an ASCII locale."""
    name = os.fsdecode(b"caf\xe9 \xc3\xbc")
    (tmp_path / f"{name}.txt").write_text("to be or not to be\n" * 9, "utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "llmc_cli.app", "prepro", "text", f"{name}.txt", "--out", name]
    run = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert os.fsencode(name) in run.stdout
