import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.text_tokenizers import gpt2_tokenizer

from llmc_cli.errors import DataError
from llmc_cli.formats.vocabulary import write_vocabulary
from llmc_cli.tokenizer.text_stream import TextStream
from llmc_cli.tokenizer.tokenizer import load_tokenizer


@settings(deadline=None)
@given(text=st.text(min_size=1), data=st.data())
def test_text_does_not_depend_on_how_ids_are_split(text, data):
    """No returned part contains an incomplete character."""
    tokenizer = gpt2_tokenizer()
    ids = tokenizer.encode(text).tolist()
    stream, parts = TextStream(tokenizer), []
    while ids:
        count = data.draw(st.integers(1, len(ids)))
        parts.append(stream.feed(ids[:count]))
        ids = ids[count:]
    assert "".join(parts) + stream.finish() == text.encode().decode()


def test_incomplete_character_is_buffered():
    gpt2 = gpt2_tokenizer()
    ids = gpt2.encode("🙂").tolist()
    assert len(ids) == 2
    stream = TextStream(gpt2)
    assert [stream.feed([id]) for id in ids] == ["", "🙂"]
    assert stream.feed(ids[:1]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.feed(gpt2.encode("a").tolist()) == "a"


def test_special_tokens_are_hidden_by_default():
    ids = [50256, 15496, 50256]
    assert TextStream(gpt2_tokenizer()).feed(ids) == "Hello"
    assert TextStream(gpt2_tokenizer(), show_special=True).feed(ids) == "<|endoftext|>Hello<|endoftext|>"


def test_error_gives_position_in_stream():
    stream = TextStream(gpt2_tokenizer(), position=100)
    stream.feed([50256, 1, 2])
    with pytest.raises(DataError, match="token id 60000 at position 104 "):
        stream.feed([3, 60000])


def test_invalid_utf8_is_replaced(tmp_path):
    write_vocabulary(tmp_path / "t.bin", [b"", b"\xff", b"ab"], 0)
    stream = TextStream(load_tokenizer(str(tmp_path / "t.bin")))
    assert stream.feed([2, 1, 2, 0]) == "ab\ufffdab"
