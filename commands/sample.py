"""``llmc sample``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc_cli.commands import options, render
from llmc_cli.errors import UsageError
from llmc_cli.sampling.options import DEFAULT_MAX_TOKENS, DEFAULT_SEED, SamplingOptions

if TYPE_CHECKING:
    from llmc_cli.sampling.output import SampleFormatter


def sample(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model file.")],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Text to continue (- for stdin). If not given, start from end-of-text."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            show_default=f"{DEFAULT_MAX_TOKENS}, or what the context has room for",
            help="Maximum number of tokens to generate.",
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option("--temperature", help="Divisor of the logits: lower is less random, 0 is greedy decoding."),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option("--top-k", metavar="K", help="Sample from the K most likely tokens; 0 disables it.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            metavar="P",
            help="Sample from the smallest set of most likely tokens whose total probability is at least P; 1 disables "
            "it.",
        ),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p",
            metavar="P",
            help="Exclude tokens with less than P times the probability of the most likely one; 0 disables it.",
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Random seed.")] = DEFAULT_SEED,
    num: Annotated[int, typer.Option("--num", metavar="N", min=1, help="Number of samples.")] = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End before this string; can be given several times."),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print token ids instead of text.")] = False,
    prompt_ids: Annotated[
        str | None, typer.Option("--prompt-ids", metavar='"1 2 3"', help="The prompt as token ids.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="gpt2|FILE",
            show_default="gpt2 if the vocabulary size matches",
            help="Tokenizer: gpt2, a tokenizer.json (or a folder that contains one), or a tokenizer table (.bin).",
        ),
    ] = None,
    echo: Annotated[bool, typer.Option("--echo/--no-echo", help="Print the prompt before its continuation.")] = True,
    device: options.Device = "auto",
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="auto|fp32|bf16|int8",
            help="Storage type of the weights: smaller types are faster and less accurate. auto: fp32.",
        ),
    ] = "auto",
    threads: options.Threads = None,
    json: options.JsonLines = False,
    quiet: options.Quiet = False,
) -> None:
    """Generate text with a model.

    Print the prompt and stream its continuation until an end-of-text token, a --stop string or --max-tokens. With --num
    N, print N samples: one line of ids, one text, or one line of JSON each, depending on --ids and --json. With the
    same --seed, a larger --num only adds samples; the first ones stay the same, up to rounding. With --ids, if a --stop
    string begins inside a token, the part of the token before it is encoded again, so that `llmc decode` prints the
    same text as without --ids.
    """
    import sys
    import time

    from llmc_cli.kernels.backend import open_sampling
    from llmc_cli.machine.idle_threads import set_spin_wait
    from llmc_cli.models.files import load_model, read_config
    from llmc_cli.sampling.generation import generate, resolve_max_tokens
    from llmc_cli.sampling.output import IdsFormatter, JsonFormatter, OrderedWriter, TextFormatter, write_samples
    from llmc_cli.sampling.prompt import encode_prompt, find_tokenizer

    output = render.Output(json, quiet)
    sampling_options = SamplingOptions(temperature, top_k, top_p, min_p, seed)
    check_encodable(prompt, *(stop or ()))
    config = read_config(model)
    found_tokenizer = find_tokenizer(config, tokenizer)
    if found_tokenizer is None and not ids:
        raise UsageError(
            f"{model}: no tokenizer is known for a vocabulary of {config.vocab_size}; give --tokenizer, or --ids with "
            "--prompt-ids"
        )
    start = encode_prompt(sys.stdin.buffer if prompt == "-" else prompt, prompt_ids, found_tokenizer)
    max_tokens = resolve_max_tokens(config, start, max_tokens)  # checked before the model is loaded
    set_spin_wait()
    loaded = load_model(model, open_sampling(device, precision, threads, output.info).kernels)

    start_time = time.perf_counter()
    chunks = generate(loaded, start, sampling_options, max_tokens, num, found_tokenizer, stop or ())

    def make_formatter(number: int) -> "SampleFormatter":
        printed_prompt = start if echo else []
        if json:
            return JsonFormatter(render.SCHEMA, number, printed_prompt, None if ids else found_tokenizer)
        if ids or found_tokenizer is None:
            return IdsFormatter(printed_prompt)
        return TextFormatter(printed_prompt, found_tokenizer)

    def print_heading(number: int) -> None:
        if num > 1 and not ids and not json and sys.stdout.isatty():  # only a terminal mixes stderr with the samples
            output.info(f"sample {number + 1} of {num}:")

    writer = OrderedWriter(output.write, print_heading, num)
    num_tokens = write_samples(chunks, [make_formatter(number) for number in range(num)], writer)
    seconds = time.perf_counter() - start_time
    output.info(f"{num_tokens} tokens in {render.format_duration(seconds)}, {num_tokens / seconds:.1f} tokens/s")


def check_encodable(*texts: str | None) -> None:
    """Raise UsageError for arguments with bytes that are invalid in the terminal's encoding."""
    for text in texts:
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"an argument is not valid text ({error})") from None
