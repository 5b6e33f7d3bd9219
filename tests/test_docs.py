"""The documentation is correct: links, commands, examples, generated sections, and the tutorial's code."""

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib

import pytest
import typer
from support.paths import ROOT

from llmc_cli.app import app

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]

BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)

COMMANDS = typer.main.get_command(app).commands
OPTIONS = {
    name: {option for each in command.params for option in (*each.opts, *each.secondary_opts)} | {"--help"}
    for name, command in COMMANDS.items()
}
OPTIONS_OF_LLMC = {"--help", "--version", "--install-completion", "--show-completion"}


def read(page):
    return page.read_text(encoding="utf-8")


def blocks(page):
    """Yield language, attribute (the rest of the opening line), content and line number of each code block."""
    text = read(page)
    for match in BLOCK.finditer(text):
        yield match[1], match[2].strip(), match[3], text[: match.start(3)].count("\n")


def anchors(page):
    """Return the anchors that GitHub generates for the headings of a page."""
    text = BLOCK.sub("", read(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for target in LINK.findall(BLOCK.sub("", read(page))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert ROOT in (place, *place.parents), target
        if anchor:
            assert anchor in anchors(place), target


def test_readme_links_every_page():
    links = set(LINK.findall(read(ROOT / "README.md")))
    assert {f"docs/{page.name}" for page in DOCS.glob("*.md")} | {"CHANGELOG.md", "LICENSE"} <= links


def command_lines(page):
    """Yield the command lines of a page: lines of shell blocks, and code spans."""
    for language, _, content, _ in blocks(page):
        if language in ("console", "sh"):
            prompt = "$ " if language == "console" else ""
            for line in content.replace("\\\n", " ").splitlines():
                if line.startswith(prompt):
                    yield from (part.strip() for part in line.removeprefix(prompt).split(" | "))
    yield from SPAN.findall(BLOCK.sub("", read(page)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page):
    for line in command_lines(page):
        if line != "llmc" and not line.startswith("llmc "):
            continue
        words = shlex.split(line)[1:]
        known = OPTIONS_OF_LLMC
        if words and not words[0].startswith("-") and words[0] != "COMMAND":
            assert words[0] in COMMANDS, line
            known = OPTIONS[words[0]]
        for word in words:
            if re.match(r"--?[a-z]", word):
                assert word.partition("=")[0] in known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_mentioned_in_text_exist(page):
    known = OPTIONS_OF_LLMC.union(*OPTIONS.values())
    for span in SPAN.findall(BLOCK.sub("", read(page))):
        if re.match(r"--?[a-z]", span):
            assert span.split()[0] in known, span


def test_generated_pages_are_current():
    pages = dict(runpy.run_path(str(ROOT / "fixtures" / "make_docs.py"))["pages"]())
    assert DOCS / "commands.md" in pages
    stale = [path.name for path, content in pages.items() if read(path) != content]
    assert not stale, "out of date; run: python fixtures/make_docs.py"


def test_generated_cuda_sections_are_current():
    page = runpy.run_path(str(ROOT / "fixtures" / "make_cuda_estimates.py"))["page"]
    text = read(DOCS / "cuda.md")
    assert page(text) == text, "out of date; run: python fixtures/make_cuda_estimates.py"


EXAMPLES = [
    pytest.param(content, id=f"line {line}")
    for language, _, content, line in blocks(DOCS / "formats.md")
    if language == "console"
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_format_examples(example):
    command, _, shown = example.partition("\n")
    words = shlex.split(command.removeprefix("$ llmc "))
    run = subprocess.run(
        [sys.executable, "-P", "-m", "llmc_cli.app", *words],  # -P: the installed package, not this folder
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert (run.stdout + run.stderr).replace("\\", "/") == shown  # Windows paths


def run_tutorial(monkeypatch, with_torch):
    monkeypatch.chdir(ROOT)
    names = {}
    for language, kind, content, line in blocks(DOCS / "tutorial.md"):
        if language == "python" and (kind == "" or (kind == "torch" and with_torch)):
            exec(compile("\n" * line + content, "tutorial.md", "exec"), names)
    return names


def test_tutorial_runs(monkeypatch):
    assert "kernels" in run_tutorial(monkeypatch, with_torch=False)


@pytest.mark.witness
def test_tutorial_runs_with_torch(monkeypatch):
    assert "torch" in run_tutorial(monkeypatch, with_torch=True)


def test_excerpts_match_the_code():
    excerpts = [(kind, content) for _, kind, content, _ in blocks(DOCS / "tutorial.md") if kind.startswith("excerpt ")]
    assert excerpts
    for kind, content in excerpts:
        assert content in read(ROOT / kind.removeprefix("excerpt ")), kind


def test_readme_make_commands_exist():
    commands = [
        line
        for language, _, content, _ in blocks(ROOT / "README.md")
        if language == "sh"
        for line in content.splitlines()
        if line.startswith("make ")
    ]
    assert [line.split("#")[0].strip() for line in commands] == ["make demo", "make test"]


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w[\w-]*):", read(ROOT / "Makefile"), re.MULTILINE))
    callers = [*PAGES, ROOT / ".pre-commit-config.yaml", *sorted((ROOT / ".github" / "workflows").glob("*.yml"))]
    for path in callers:
        for target in re.findall(r"(?:^|run: |entry: |`)make ([\w-]+)", read(path), re.MULTILINE):
            assert target in targets, f"{path}: make {target}"


def test_architecture_page_is_current():
    page = runpy.run_path(str(ROOT / "fixtures" / "make_architecture.py"))["page"]
    text = read(DOCS / "architecture.md")
    assert page(text) == text, "out of date; run: python fixtures/make_architecture.py"


def test_packages_are_installed():
    """A package that pyproject.toml does not list would be missing from the wheel."""
    listed = tomllib.loads(read(ROOT / "pyproject.toml"))["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "llmc_cli").rglob("__init__.py")}
    assert set(listed) == {folder.replace("/", ".") for folder in folders} | {"llmc_cli.formats", "llmc_cli.commands"}
