"""The directions of imports: commands → engine → formats, and what a light command must not load."""

import ast
import subprocess
import sys

import pytest
from support.paths import ROOT

STANDARD = set(sys.stdlib_module_names)
HEAVY = {"numpy", "numba", "scipy", "cupy", "tiktoken", "tokenizers", "requests", "torch", "safetensors", "rich"}


def modules(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path, everywhere=True):
    """The modules that a file imports: anywhere in it, or only when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    nodes = list(ast.walk(tree)) if everywhere else list(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", modules("formats"), ids=lambda path: path.name)
def test_formats_know_bytes_only(path):
    for name in imported(path):
        top = name.split(".")[0]
        assert top in STANDARD | {"numpy", "safetensors"} or name.startswith("llmc_cli.formats"), name


@pytest.mark.parametrize("path", modules("llmc_cli"), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_app_knows_commands(path):
    if path.name != "app.py":
        assert not any(name.startswith(("llmc_cli.commands", "llmc_cli.app")) for name in imported(path))


@pytest.mark.parametrize("path", modules("llmc_cli"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_engine_never_prints(path):
    if path.name != "app.py":
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)


@pytest.mark.parametrize("path", modules("commands"), ids=lambda path: path.name)
def test_commands_load_heavy_modules_late(path):
    tops = {name.split(".")[0] for name in imported(path, everywhere=False)}
    assert not tops & HEAVY


@pytest.mark.parametrize("path", [p for f in ("formats", "commands") for p in modules(f) if p.name == "__init__.py"])
def test_package_files_are_empty(path):
    assert path.read_bytes() == b""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["sample", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    program = (
        "import sys\nfrom llmc_cli import app\nsys.argv = ['llmc', *sys.argv[1:]]\n"
        "try:\n    app.main()\nexcept SystemExit:\n    pass\n"
        "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.splitlines()[-1].split()[1:])
    assert not loaded & (HEAVY - {"rich"})  # typer draws its help with rich
