"""Test the direction of imports, and that light commands do not load heavy libraries.

The layers are read from docs/architecture.md: a package may import only from packages on lower layers.
"""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from support.paths import ROOT

STANDARD_LIBRARY = set(sys.stdlib_module_names)
HEAVY = {"numpy", "numba", "scipy", "cupy", "tiktoken", "tokenizers", "requests", "torch", "safetensors", "rich"}
FOLDERS = {"llmc_cli": "llmc_cli", "llmc_cli.formats": "formats", "llmc_cli.commands": "commands"}
MAX_TOP_LEVEL_MODULES = 6
MAX_LINES = 400


def read_layers():
    """Return the layer of each package, 0 for the lowest."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = re.search(r"^```text layers\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1].splitlines()
    return {name: len(lines) - number for number, line in enumerate(lines) for name in line.split()}


def read_modules():
    """Return the path of each module by its import name."""
    modules = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            modules[".".join((package, *parts)).removesuffix(".__init__")] = path
    return modules


LAYERS = read_layers()
MODULES = read_modules()


def imported_names(path, only_at_import=False):
    """Return the names that a file imports: anywhere in it, or only those loaded when the file itself is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if only_at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def package_of(module):
    """Return the package that has a layer: ``kernels`` for ``llmc_cli.kernels.cpu.blas``."""
    return module.split(".")[1]


def read_imports():
    """Return every import within the project as pairs (importing module, imported module)."""
    return {
        (module, name)
        for module, path in MODULES.items()
        for name in imported_names(path)
        if name in MODULES and name != module and MODULES[name].name != "__init__.py"
    }


IMPORTS = read_imports()


def upward(imports):
    """Return the imports between packages that do not point to a lower layer."""
    pairs = ((package_of(a), package_of(b), a, b) for a, b in imports)
    return sorted((a, b) for above, below, a, b in pairs if above != below and LAYERS[above] <= LAYERS[below])


def cycle(imports):
    """Return the modules of an import cycle; empty if there is none."""
    graph = {}
    for importer, imported in imports:
        graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_package_has_a_layer():
    packages = {package_of(module) for module in MODULES if module != "llmc_cli"} - {"assets"}
    assert packages == set(LAYERS)


def test_imports_point_to_lower_layers():
    assert upward(IMPORTS) == []


def test_there_is_no_import_cycle():
    assert cycle(IMPORTS) == []


@pytest.mark.parametrize(
    "edge", [edge for edge in sorted(IMPORTS) if package_of(edge[0]) != package_of(edge[1])], ids=" -> ".join
)
def test_a_reversed_import_is_found(edge):
    assert upward(IMPORTS - {edge} | {edge[::-1]}) == [edge[::-1]]


def test_an_added_cycle_is_found():
    edge = next(iter(sorted(IMPORTS)))
    assert set(cycle(IMPORTS | {edge[::-1]})) == set(edge)


def test_few_modules_at_the_top_level():
    assert len(list((ROOT / "llmc_cli").glob("*.py"))) <= MAX_TOP_LEVEL_MODULES


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("llmc_cli.formats.")])
def test_formats_depend_on_numpy_and_safetensors_only(module):
    for name in imported_names(MODULES[module]):
        allowed = STANDARD_LIBRARY | {"numpy", "safetensors"}
        assert name.split(".")[0] in allowed or name.startswith("llmc_cli.formats"), name


@pytest.mark.parametrize(
    "module", [name for name in MODULES if not name.startswith(("llmc_cli.commands", "llmc_cli.app"))]
)
def test_only_commands_print(module):
    calls = [node for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))) if isinstance(node, ast.Call)]
    assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("llmc_cli.commands")])
def test_commands_import_heavy_libraries_late(module):
    assert not {name.split(".")[0] for name in imported_names(MODULES[module], only_at_import=True)} & HEAVY


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_package_files_are_empty(module):
    assert MODULES[module].read_bytes() == b""


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
