"""Format samples as ids, text or JSON, and put the output of several samples in order."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from llmc_cli.sampling.generation import SampleChunk
from llmc_cli.tokenizer.base import Tokenizer
from llmc_cli.tokenizer.text_stream import TextStream


class SampleFormatter(Protocol):
    """Formats one sample incrementally. Each method returns the next part of the output."""

    def start(self) -> str: ...

    def feed(self, ids: Sequence[int]) -> str: ...

    def finish(self, finish_reason: str) -> str: ...


class IdsFormatter:
    """Ids separated by spaces."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt, self.separator = prompt, ""

    def start(self) -> str:
        return self.feed(self.prompt)

    def feed(self, ids: Sequence[int]) -> str:
        text = self.separator + " ".join(map(str, ids))
        if ids:
            self.separator = " "
        return text if ids else ""

    def finish(self, finish_reason: str) -> str:
        return ""


class TextFormatter:
    """Text. A character is emitted once all of its bytes are known."""

    def __init__(self, prompt: list[int], tokenizer: Tokenizer) -> None:
        self.prompt, self.stream = prompt, TextStream(tokenizer)

    def start(self) -> str:
        return self.stream.feed(self.prompt)

    def feed(self, ids: Sequence[int]) -> str:
        return self.stream.feed(ids)

    def finish(self, finish_reason: str) -> str:
        return self.stream.finish()


class JsonFormatter:
    """One JSON object per sample, emitted when the sample is finished. Without a tokenizer it has ids but no text."""

    def __init__(self, schema: int, sample: int, prompt: list[int], tokenizer: Tokenizer | None) -> None:
        self.schema, self.sample, self.prompt, self.tokenizer = schema, sample, prompt, tokenizer
        self.ids: list[int] = []

    def start(self) -> str:
        return ""

    def feed(self, ids: Sequence[int]) -> str:
        self.ids += ids
        return ""

    def finish(self, finish_reason: str) -> str:
        content: dict[str, Any] = {"schema": self.schema, "sample": self.sample}
        if self.prompt:
            content |= {"prompt": self._decode(self.prompt), "prompt_ids": self.prompt}
        content |= {"text": self._decode(self.ids), "ids": self.ids, "ending": finish_reason}
        return json.dumps({name: value for name, value in content.items() if value is not None})

    def _decode(self, ids: list[int]) -> str | None:
        if self.tokenizer is None:
            return None
        stream = TextStream(self.tokenizer)
        return stream.feed(ids) + stream.finish()


class OrderedWriter:
    """Writes samples in order, each followed by a newline.

    The first unfinished sample is written as its output arrives; the output of later samples is buffered. ``on_sample``
    is called with the number of each sample before it is written.
    """

    def __init__(self, write: Callable[[str], None], on_sample: Callable[[int], None], num: int) -> None:
        self.write, self.on_sample = write, on_sample
        self.buffers, self.finished, self.current = [""] * num, [False] * num, 0
        on_sample(0)

    def add(self, sample: int, text: str, finished: bool) -> None:
        self.buffers[sample] += text
        self.finished[sample] = finished
        while self.current < len(self.finished):
            text, self.buffers[self.current] = self.buffers[self.current], ""
            if not self.finished[self.current]:
                if text:
                    self.write(text)
                return
            self.write(f"{text}\n")
            self.current += 1
            if self.current < len(self.finished):
                self.on_sample(self.current)


def write_samples(chunks: Iterable[SampleChunk], formatters: Sequence[SampleFormatter], writer: OrderedWriter) -> int:
    """Write the prompts and chunks of all samples. Return the number of generated tokens."""
    num_tokens = 0
    for sample, formatter in enumerate(formatters):
        writer.add(sample, formatter.start(), finished=False)
    for chunk in chunks:
        num_tokens += len(chunk.ids)
        text = formatters[chunk.sample].feed(chunk.ids)
        if chunk.finish_reason:
            text += formatters[chunk.sample].finish(chunk.finish_reason)
        writer.add(chunk.sample, text, finished=bool(chunk.finish_reason))
    return num_tokens
