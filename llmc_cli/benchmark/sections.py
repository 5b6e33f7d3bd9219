"""One section of ``bench``: rows, each a share of a ceiling, and beside PyTorch where that is asked for."""

import dataclasses
import statistics

from llmc_cli.benchmark.ceilings import Ceilings
from llmc_cli.benchmark.interleave import Answer, Contestant, Note, alternate, contest
from llmc_cli.benchmark.job import Work
from llmc_cli.benchmark.results import Measured, Row, Side, model_flops_utilization, share_of_ceiling
from llmc_cli.errors import MissingError
from llmc_cli.kernels.backend import sampling_precisions

WARM_UP = {"kernels": 1, "train": 2, "sample": 1, "prepro": 1}
UNTIMED = {"kernels": 1}  # short runs: what the other side's run pushed out of the caches comes back first
SPLIT_RUNS = 2

TORCH_MODES = {"kernels": ("torch eager",), "train": ("torch eager", "torch compiled"),
               "sample": ("torch eager", "torch compiled", "transformers")}  # fmt: skip
ON_GPU = {"sample": ("torch graphs",)}  # further modes there: our tokens are graphs, too

SAME_PRECISION = {"kernels": ("fp32", "tf32", "bf16"), "train": ("fp32", "tf32", "bf16"), "sample": ("fp32",)}
"""What PyTorch can be asked for too; beside any other precision of ours its side is fp32. On a GPU it samples in both
precisions that ours has there."""


def measure(work: Work, ceilings: Ceilings, torch: bool, note: Note, budget: float | None = None) -> Measured:
    """What ``work``, of our side, comes to in ``work.steps`` runs, and with ``torch`` PyTorch at the same, in turns;
    with a ``budget`` of seconds for each row in fewer runs where they are long."""
    section = work.section
    works = [work]
    if torch and section in TORCH_MODES:
        works += _others(work)
    note(f"{section}: starting {', '.join(each.side for each in works)}")
    with contest(works) as (contestants, absent):
        if absent and len(contestants) == 1:
            raise MissingError(f"--against torch: {section}: {'; '.join(dict.fromkeys(absent.values()))}")
        ours, others = contestants[0], contestants[1:]
        rows: list[Row] = []
        for task in ours.tasks:
            if task == "split":
                continue
            taking_part = [ours, *(other for other in others if task in other.tasks)]
            note(f"{section}: {task}")
            answers = alternate(taking_part, task, work.steps, WARM_UP[section], _untimed(work), note, budget)
            rows.append(_row(work, task, answers, ceilings))
        if section == "prepro":
            rows = _against_tokenizer(rows)
        for each in contestants:
            for text in each.warnings:
                note(f"{section}: {each.side} warns: {text}")
            if each.warnings:
                each.configuration["warnings"] = "; ".join(each.warnings)
        # what the split itself holds must not count, so memory is read before it
        sides = [Side(section, each.side, each.configuration, each.peak_memory) for each in contestants]
        if "split" in ours.tasks:
            rows += _split(ours, rows[0], ceilings)
    return Measured(rows, sides, absent)


def _others(work: Work) -> list[Work]:
    """What PyTorch's modes are asked for beside ``work``."""
    section, modes = work.section, TORCH_MODES[work.section]
    precision = work.precision if work.precision in SAME_PRECISION[section] else "fp32"
    if _on_gpu(work):
        modes += ON_GPU.get(section, ())
        if section == "sample":
            precision = " ".join(sampling_precisions(work.device, work.precision))
    return [dataclasses.replace(work, side=mode, precision=precision) for mode in modes]


def _untimed(work: Work) -> int:
    """Runs that go before each timed one: on a GPU a side gives back what it does not use while others work there."""
    return max(UNTIMED.get(work.section, 0), int(_on_gpu(work)))


def _on_gpu(work: Work) -> bool:
    return work.device != "cpu" and work.section in TORCH_MODES


def _row(work: Work, task: str, answers: dict[str, list[Answer]], ceilings: Ceilings) -> Row:
    ours, *others = answers
    times = [answer.seconds for answer in answers[ours]]
    seconds, last = statistics.median(times), answers[ours][-1]
    tokens = {"train": work.batch * work.seq_len, "sample": work.batch}.get(work.section, 0)
    if work.section == "prepro":
        tokens = last.detail["tokens"]
    if work.section == "train":  # the formula counts arithmetic only, and its share is called MFU
        share, ceiling = model_flops_utilization(last.flops / seconds, ceilings)
    elif work.section == "prepro":
        share, ceiling = 0.0, ""
    elif work.section == "sample":  # nothing is written that counts
        share, ceiling = last.bytes / seconds / ceilings.memory["read"], "read"
    else:
        share, ceiling = share_of_ceiling(last.flops / seconds, last.bytes / seconds, ceilings)
    return Row(
        name=f"{work.section}/{task}",
        seconds=seconds,
        best=min(times),
        runs=len(times),
        flops_per_s=last.flops / seconds,
        bytes_per_s=last.bytes / seconds,
        tokens_per_s=tokens / seconds,
        share=share,
        ceiling=ceiling,
        torch={side: statistics.median(answer.seconds for answer in answers[side]) for side in others},
        launches=last.detail["launches"] if work.section == "train" else 0,
    )


def _against_tokenizer(rows: list[Row]) -> list[Row]:
    """Of the way from text to files, the share that the tokenizer needs anyway: nothing can be faster than that."""
    files, tokenizer = rows
    fields = {**vars(files), "share": tokenizer.seconds / files.seconds, "ceiling": "tokenizer"}
    return [Row(**fields), tokenizer]


def _split(ours: Contestant, step: Row, ceilings: Ceilings) -> list[Row]:
    """Where a step's time goes: the operations, the longest first, and what is none of them."""
    answers = [ours.ask("split") for _ in range(SPLIT_RUNS)]
    rows = []
    for name, last in answers[-1].detail.items():
        times = [answer.detail[name]["seconds"] for answer in answers]
        seconds = statistics.median(times)
        flops_per_s, bytes_per_s = last["flops"] / seconds, last["bytes"] / seconds
        share, ceiling = share_of_ceiling(flops_per_s, bytes_per_s, ceilings)
        rows.append(
            Row(f"{step.name}/{name}", seconds, min(times), SPLIT_RUNS, flops_per_s, bytes_per_s, 0.0, share, ceiling,
                last["calls"], launches=last["launches"])
        )  # fmt: skip
    rows.sort(key=lambda row: -row.seconds)
    rest = [answer.seconds - sum(operation["seconds"] for operation in answer.detail.values()) for answer in answers]
    return [*rows, Row(f"{step.name}/other", statistics.median(rest), min(rest), SPLIT_RUNS)]
