import json

import pytest

from llmc_cli.sampling.generation import SampleChunk
from llmc_cli.sampling.output import IdsFormatter, JsonFormatter, OrderedWriter, TextFormatter, write_samples
from llmc_cli.tokenizer.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


def test_ordered_writer_buffers_later_samples():
    calls = []
    writer = OrderedWriter(calls.append, lambda number: calls.append(number), 3)
    for sample, text, finished in ((0, "a", False), (2, "x", True), (1, "m", False), (0, "", False), (0, "b", True)):
        writer.add(sample, text, finished)
    assert calls == [0, "a", "b\n", 1, "m"]
    writer.add(1, "", True)
    assert calls[5:] == ["\n", 2, "x\n"]


@pytest.mark.parametrize(
    ("prompt", "parts", "expected"),
    [([], [[1], [], [2, 3]], "1 2 3"), ([7, 8], [[], [1]], "7 8 1"), ([], [[], []], "")],
)
def test_ids_are_separated_by_single_spaces(prompt, parts, expected):
    formatter = IdsFormatter(prompt)
    assert formatter.start() + "".join(map(formatter.feed, parts)) + formatter.finish("stop") == expected


def test_text_waits_for_complete_characters(gpt2):
    first, *rest = gpt2.encode("\N{SLIGHTLY SMILING FACE}").tolist()
    formatter = TextFormatter([15496], gpt2)
    assert formatter.start() == "Hello"
    assert formatter.feed([first]) == ""
    assert formatter.feed(rest) == "\N{SLIGHTLY SMILING FACE}"
    assert formatter.finish("length") == ""


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_json_is_one_object_at_the_end(gpt2, with_tokenizer):
    formatter = JsonFormatter(1, 4, [15496], gpt2 if with_tokenizer else None)
    assert formatter.start() == formatter.feed([995]) == formatter.feed([0]) == ""
    texts = {"prompt": "Hello", "text": " world!"} if with_tokenizer else {}
    assert json.loads(formatter.finish("stop")) == {
        "schema": 1, "sample": 4, "prompt_ids": [15496], "ids": [995, 0], "ending": "stop", **texts
    }  # fmt: skip


def test_write_samples_counts_generated_tokens():
    parts = []
    chunks = [
        SampleChunk(1, [5], ""),
        SampleChunk(0, [3], ""),
        SampleChunk(1, [], "stop"),
        SampleChunk(0, [4], "length"),
    ]
    writer = OrderedWriter(parts.append, lambda number: None, 2)
    assert write_samples(chunks, [IdsFormatter([1, 2]), IdsFormatter([1, 2])], writer) == 3
    assert "".join(parts) == "1 2 3 4\n1 2 5\n"
