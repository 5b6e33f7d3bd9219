import io

import pytest

from llmc_cli.errors import DataError, UsageError
from llmc_cli.models.config import ModelConfig
from llmc_cli.sampling.prompt import encode_prompt, find_tokenizer
from llmc_cli.tokenizer.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


def test_default_tokenizer_depends_on_the_vocabulary_size():
    assert find_tokenizer(ModelConfig(8, 50257, 1, 1, 2), None).name == "gpt2"
    assert find_tokenizer(ModelConfig(8, 120, 1, 1, 2), None) is None
    assert find_tokenizer(ModelConfig(8, 120, 1, 1, 2), "gpt2").name == "gpt2"


@pytest.mark.parametrize(
    ("prompt", "prompt_ids", "expected"),
    [
        ("Hello", None, [15496]),
        (io.BytesIO(b"Hello"), None, [15496]),
        (None, " 7  15496 ", [7, 15496]),
        ("", None, [50256]),
        (None, None, [50256]),
    ],
)
def test_encode_prompt(gpt2, prompt, prompt_ids, expected):
    assert encode_prompt(prompt, prompt_ids, gpt2) == expected


def test_invalid_prompts_are_rejected(gpt2):
    with pytest.raises(UsageError, match="give one of them"):
        encode_prompt("Hello", "1", gpt2)
    with pytest.raises(UsageError, match="expected token ids separated by spaces"):
        encode_prompt(None, "1 x", gpt2)
    with pytest.raises(UsageError, match="give --prompt-ids or --tokenizer"):
        encode_prompt("Hello", None, None)
    with pytest.raises(DataError, match="not UTF-8"):
        encode_prompt(io.BytesIO(b"\xff"), None, gpt2)
