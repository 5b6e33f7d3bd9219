"""Compares the operations of the spec with every backend and with the table of operations.

Signatures of backends are read from their sources, so that no backend needs to be importable.
"""

import ast
import inspect

import pytest
from support.paths import ROOT

from llmc_cli.kernels.operations import OPERATIONS
from llmc_cli.kernels.spec import Kernels

KERNELS = ROOT / "llmc_cli" / "kernels"
BACKENDS = {path.parent.name: path for path in sorted(KERNELS.glob("*/kernels.py"))}


def class_node(path, name):
    (found,) = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef) and node.name == name
    ]
    return found


def signatures(*nodes):
    """Return the public methods in order: argument names by method (with defaults, of which the spec has none)."""
    return {
        item.name: ([argument.arg for argument in item.args.args], len(item.args.defaults), item.args.kwonlyargs)
        for node in nodes
        for item in node.body
        if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")
    }


def attributes(node):
    return {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}


SPEC = [class_node(KERNELS / "spec.py", name) for name in ("Runtime", "Kernels")]


def test_backends_are_found():
    assert {"cpu", "cuda", "reference"} <= set(BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_has_the_signatures_of_the_spec_in_order(backend):
    node = class_node(BACKENDS[backend], f"{backend.capitalize()}Kernels")
    found, expected = signatures(node), signatures(*SPEC)
    assert {name: found.get(name) for name in expected} == expected
    assert [name for name in found if name in expected] == list(expected)
    assert attributes(SPEC[0]) <= attributes(node)


def test_table_has_the_operations_of_the_spec_in_order():
    """Including the arguments, those of the cost function, and that every name in an entry is an argument."""
    operations = {
        name: list(inspect.signature(function).parameters)[1:]
        for name, function in vars(Kernels).items()
        if inspect.isfunction(function) and not name.startswith("_")
    }
    table = {name: [argument.name for argument in entry.arguments] for name, entry in OPERATIONS.items()}
    assert list(table.items()) == list(operations.items())
    for name, entry in OPERATIONS.items():
        assert list(inspect.signature(entry.cost).parameters) == table[name]
        outputs = {*entry.matmul_outputs, *entry.accumulated, *entry.updated}
        assert outputs <= set(entry.bounds) <= set(table[name])
        inputs = {*entry.values, *entry.normal, *entry.squared, *entry.forward_results, *entry.host_arguments}
        assert inputs <= set(table[name])
        assert entry.test_sizes
