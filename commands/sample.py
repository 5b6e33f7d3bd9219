"""``llmc sample``."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from llmc_cli.commands import options, render
from llmc_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from llmc_cli.models.config import ModelConfig
    from llmc_cli.tokenizer.base import Tokenizer


def sample(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file.")],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="The text to go on from; - reads it from stdin, without one: end-of-text."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="How many to make; if not given, what the context leaves, at most 256."),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Below 1 safer, above 1 wilder; 0 is greedy.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Choose among the K likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Choose among the likeliest that make up this probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option("--min-p", help="Leave out what is less likely than this share of the likeliest.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed, the same samples.")] = 1337,
    num: Annotated[int, typer.Option("--num", min=1, help="How many samples to make.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be given repeatedly.")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print token ids instead of text.")] = False,
    prompt_ids: Annotated[
        str | None, typer.Option("--prompt-ids", metavar='"1 2 3"', help="The prompt as token ids.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer", metavar="gpt2|FILE", help="The model's tokenizer; if not given, gpt2 where its size fits."
        ),
    ] = None,
    echo: Annotated[bool, typer.Option("--echo/--no-echo", help="Print the prompt before its continuation.")] = True,
    device: options.Device = "auto",
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="auto|fp32|bf16|int8",
            help="What the weights are kept in: less is faster and coarser; auto: fp32, the model as it is.",
        ),
    ] = "auto",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue a text with a model.

    Prints the prompt and its continuation as it is made, up to an end-of-text, a --stop text or --max-tokens. Several
    samples (--num) are lines of ids, texts one after the other, or lines of JSON; sample i is the same whatever their
    number, but for the rounding of sums. With --ids, a token that a stop text begins in the middle of is replaced by
    tokens for what stands before it, so that `llmc decode` prints the same text.
    """
    import sys
    import time

    from llmc_cli.kernels.backend import open_sampling
    from llmc_cli.machine.idle_threads import set_spin_wait
    from llmc_cli.models.files import load_model, read_config
    from llmc_cli.sampling.filters import SamplingOptions
    from llmc_cli.sampling.generation import generate, resolve_max_tokens

    output = render.Output(json, quiet)
    sampling_options = SamplingOptions(temperature, top_k, top_p, min_p, seed)
    refuse_broken_text(prompt, *(stop or ()))
    config = read_config(model)
    words = find_tokenizer(config, tokenizer)
    if words is None and not ids:
        raise UsageError(
            f"{model}: a vocabulary of {config.vocab_size} is not GPT-2's, so its text is unknown; "
            "give --tokenizer, or --ids with --prompt-ids"
        )
    start = starting_ids(prompt, prompt_ids, words)
    max_tokens = resolve_max_tokens(config, start, max_tokens)  # before the model is loaded, which may take a while
    set_spin_wait()
    loaded = load_model(model, open_sampling(device, precision, threads, output.info).kernels)

    begun, made = time.perf_counter(), 0
    pieces = generate(loaded, start, sampling_options, max_tokens, num, words, stop or ())
    voices = [make_voice(output, number, start, echo, ids, words) for number in range(num)]

    def announce(number: int) -> None:
        if num > 1 and not ids and not json and sys.stdout.isatty():  # elsewhere stderr does not stand between them
            output.info(f"sample {number + 1} of {num}:")

    blocks = Blocks(output.write, announce, num)
    for number, voice in enumerate(voices):
        blocks.add(number, voice.begin(), over=False)
    for piece in pieces:
        made += len(piece.ids)
        text = voices[piece.sample].more(piece.ids)
        if piece.finish_reason:
            text += voices[piece.sample].end(piece.finish_reason)
        blocks.add(piece.sample, text, over=bool(piece.finish_reason))
    seconds = time.perf_counter() - begun
    output.info(f"{made} tokens in {render.format_duration(seconds)}, {made / seconds:.1f} tokens/s")


def refuse_broken_text(*texts: str | None) -> None:
    """UsageError for arguments with bytes that the terminal's encoding has no character for."""
    for text in texts:
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"found an argument that is no valid text ({error})") from None


def find_tokenizer(config: "ModelConfig", name: str | None) -> "Tokenizer | None":
    """The tokenizer asked for, else GPT-2's where the vocabulary has its size, else none."""
    from llmc_cli.models.presets import GPT2_VOCAB_SIZE
    from llmc_cli.tokenizer.tokenizer import load_tokenizer

    if name is None and config.vocab_size != GPT2_VOCAB_SIZE:
        return None
    return load_tokenizer(name or "gpt2")


def starting_ids(prompt: str | None, prompt_ids: str | None, tokenizer: "Tokenizer | None") -> list[int]:
    """The ids to go on from; end-of-text where there is no prompt or an empty one."""
    import sys

    if prompt is not None and prompt_ids is not None:
        raise UsageError("a prompt and --prompt-ids: give one of them")
    if prompt_ids is not None:
        try:
            return [int(word) for word in prompt_ids.split()]
        except ValueError as error:
            raise UsageError(f"--prompt-ids: expected whole numbers with spaces between ({error})") from None
    if tokenizer is None:
        raise UsageError("without a tokenizer there is no text and no end-of-text; give --prompt-ids or --tokenizer")
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise DataError(f"prompt from stdin: found bytes that are not UTF-8 ({error})") from None
    return tokenizer.encode(prompt).tolist() if prompt else [tokenizer.end_of_text]


class Voice(Protocol):
    """What one sample says on stdout."""

    def begin(self) -> str: ...

    def more(self, ids: Sequence[int]) -> str: ...

    def end(self, ending: str) -> str: ...


def make_voice(
    output: render.Output, sample: int, prompt: list[int], echo: bool, ids: bool, tokenizer: "Tokenizer | None"
) -> Voice:
    prompt = prompt if echo else []
    if output.json:
        return JsonVoice(sample, prompt, None if ids else tokenizer)
    return IdsVoice(prompt) if ids or tokenizer is None else TextVoice(prompt, tokenizer)


class IdsVoice:
    """Ids with a space between."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt, self.gap = prompt, ""

    def begin(self) -> str:
        return self.more(self.prompt)

    def more(self, ids: Sequence[int]) -> str:
        text = "".join(f" {id}" for id in ids)
        if self.gap:
            return text
        self.gap = " " if ids else ""
        return text[1:]

    def end(self, ending: str) -> str:
        return ""


class TextVoice:
    """Text, a character as soon as its bytes are there."""

    def __init__(self, prompt: list[int], tokenizer: "Tokenizer") -> None:
        from llmc_cli.tokenizer.text_stream import TextStream

        self.prompt, self.stream = prompt, TextStream(tokenizer)

    def begin(self) -> str:
        return self.stream.feed(self.prompt)

    def more(self, ids: Sequence[int]) -> str:
        return self.stream.feed(ids)

    def end(self, ending: str) -> str:
        return self.stream.finish()


class JsonVoice:
    """A line of JSON once the sample is over; with a tokenizer it has texts beside the ids."""

    def __init__(self, sample: int, prompt: list[int], tokenizer: "Tokenizer | None") -> None:
        self.sample, self.prompt, self.tokenizer = sample, prompt, tokenizer
        self.ids: list[int] = []

    def begin(self) -> str:
        return ""

    def more(self, ids: Sequence[int]) -> str:
        self.ids += ids
        return ""

    def end(self, ending: str) -> str:
        content: dict[str, Any] = {"schema": render.SCHEMA, "sample": self.sample}
        if self.prompt:
            content |= {"prompt": self._text(self.prompt), "prompt_ids": self.prompt}
        content |= {"text": self._text(self.ids), "ids": self.ids, "ending": ending}
        return json.dumps({name: value for name, value in content.items() if value is not None})

    def _text(self, ids: list[int]) -> str | None:
        if self.tokenizer is None:
            return None
        voice = TextVoice(ids, self.tokenizer)
        return voice.begin() + voice.end("")


class Blocks:
    """Samples written one after the other, a newline behind each: the first that is not over streams, what later ones
    say waits. ``announce`` is told the number of each when its turn comes."""

    def __init__(self, write: Callable[[str], None], announce: Callable[[int], None], num: int) -> None:
        self.write, self.announce = write, announce
        self.waiting, self.over, self.turn = [""] * num, [False] * num, 0
        announce(0)

    def add(self, sample: int, text: str, over: bool) -> None:
        self.waiting[sample] += text
        self.over[sample] = over
        while self.turn < len(self.over):
            text, self.waiting[self.turn] = self.waiting[self.turn], ""
            if not self.over[self.turn]:
                if text:
                    self.write(text)
                return
            self.write(f"{text}\n")
            self.turn += 1
            if self.turn < len(self.over):
                self.announce(self.turn)
