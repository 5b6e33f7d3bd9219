"""Every backend has the operations of the spec, with the same arguments in the same order: read from the sources, so
that no backend need be importable here."""

import ast

import pytest
from support.paths import ROOT

KERNELS = ROOT / "llmc_cli" / "kernels"
BACKENDS = {path.parent.name: path for path in sorted(KERNELS.glob("*/kernels.py"))}


def class_of(path, name):
    (found,) = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef) and node.name == name
    ]
    return found


def signatures(node):
    """Public methods in order: name to argument names (with defaults, none of which the spec has)."""
    return {
        item.name: ([argument.arg for argument in item.args.args], len(item.args.defaults), item.args.kwonlyargs)
        for item in node.body
        if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")
    }


def attributes(node):
    return {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}


SPEC = class_of(KERNELS / "spec.py", "Kernels")


def test_backends_are_found():
    assert {"cpu", "reference"} <= set(BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_follows_the_spec(backend):
    node = class_of(BACKENDS[backend], f"{backend.capitalize()}Kernels")
    found, expected = signatures(node), signatures(SPEC)
    assert {name: found.get(name) for name in expected} == expected
    assert [name for name in found if name in expected] == list(expected)
    assert attributes(SPEC) <= attributes(node)
