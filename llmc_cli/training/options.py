"""The options of a training run: each field declares its command-line option. Light to import: `--help` reads it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc_cli.errors import MissingError, UsageError
from llmc_cli.models.preset_shapes import PRESETS_HELP
from llmc_cli.training.schedules import SCHEDULES

SMALLEST, LARGEST = 1e-37, 1e38  # roughly the range of float32

DATA = "data/tinyshakespeare/tiny_shakespeare_{}.bin"  # written by `llmc prepro tinyshakespeare`

MODEL, DATA_PANEL, LENGTH, RATE, OPTIMIZER, EVALUATION, COMPATIBILITY = (
    "Model and output", "Data", "Batch and length", "Learning rate", "Optimizer", "Evaluation", "llm.c compatibility"
)  # fmt: skip


@dataclass(frozen=True)
class Option:
    """The command-line option of a field.

    ``names``: the long name, and llm.c's letter if it has one. ``zero_one``: on the command line a bool is written as 0
    or 1, as in llm.c. ``changes_course``: a resumed run must have the same value.
    """

    names: tuple[str, ...]
    help: str
    panel: str
    min: float | None = None
    max: float | None = None
    choices: tuple[str, ...] = ()
    zero_one: bool = False
    default_text: str | None = None
    changes_course: bool = False

    def check(self, value: Any) -> None:
        """Raise UsageError if ``value`` is not one of the choices or not within the range; NaN never is."""
        name = self.names[0].split("/")[0]
        if self.choices and value not in self.choices:
            raise UsageError(f"{name} {value}: expected one of {', '.join(self.choices)}")
        if isinstance(value, int | float):
            low = -LARGEST if self.min is None else self.min
            high = LARGEST if self.max is None else self.max
            if not low <= value <= high:
                raise UsageError(f"{name} {value:g}: expected {low:g} to {high:g}")


def option(default: Any, names: str, panel: str, help: str, **settings: Any) -> Any:
    """A dataclass field with the ``Option`` in its metadata."""
    metadata = {"option": Option(tuple(names.split()), help, panel, **settings)}
    return dataclasses.field(default=default, metadata=metadata)


def course_option(default: Any, names: str, panel: str, help: str, **settings: Any) -> Any:
    return option(default, names, panel, help, changes_course=True, **settings)


@dataclass(frozen=True)
class TrainOptions:
    """The options of ``llmc train`` that define a run. UsageError if a value is out of range."""

    model: str = course_option(
        "d6", "--model -e", MODEL, f"Model file, Hugging Face config.json, or a preset: {PRESETS_HELP}."
    )
    data: str = option(
        DATA.format("train"), "--data -i", DATA_PANEL, "Training shards (a glob).", default_text="Tiny Shakespeare"
    )
    val_data: str = option(
        DATA.format("val"), "--val-data -j", DATA_PANEL, "Validation shards (a glob).", default_text="Tiny Shakespeare"
    )
    out: Path | None = option(  # noqa: RUF009 it returns a dataclass field
        None, "--out -o", MODEL, "Output directory for checkpoints and logs; without it, nothing is saved."
    )
    checkpoint_every: int = option(
        0, "--checkpoint-every -n", MODEL, "Steps between checkpoints; 0: only at the end.", min=0
    )
    keep: int = option(0, "--keep -nk", MODEL, "Number of most recent checkpoints to keep; 0: all.", min=0)
    major_every: int = option(
        0, "--major-every -nm", MODEL,
        "Never delete checkpoints whose step is a multiple of this; 0: no exception.", min=0,
    )  # fmt: skip
    resume: bool = option(False, "--resume -y", MODEL, "1: resume from the latest checkpoint in --out.", zero_one=True)
    force: bool = option(
        False, "--force", MODEL, "Resume even if options that affect training differ from those of the saved run."
    )
    batch: int = course_option(4, "--batch -b", LENGTH, "Sequences per micro-batch.", min=1)
    seq_len: int = course_option(1024, "--seq-len -t", LENGTH, "Sequence length in tokens.", min=1)
    total_batch: int = course_option(
        -1, "--total-batch -d", LENGTH,
        "Tokens per step, a multiple of --batch x --seq-len; -1: one micro-batch per step.", min=-1,
    )  # fmt: skip
    steps: int = course_option(-1, "--steps -x", LENGTH, "Number of steps, at least 1; -1: one epoch.", min=-1)
    schedule: str = course_option(
        "cosine", "--schedule -k", RATE,
        "Learning rate schedule. wsd: warmup-stable-decay. constant: without warmup.", choices=SCHEDULES,
    )  # fmt: skip
    lr: float = course_option(3e-4, "--lr -l", RATE, "Maximum learning rate.", min=0)
    warmup: int = course_option(0, "--warmup -u", RATE, "Steps of linear warmup.", min=0)
    lr_final: float = course_option(
        1.0, "--lr-final -q", RATE, "Final learning rate as a fraction of the maximum; 1: no decay.", min=0
    )
    weight_decay: float = course_option(
        0.0, "--weight-decay -c", OPTIMIZER, "Weight decay of matrices and embeddings.", min=0
    )
    skip_loss_z: float = course_option(
        0.0, "--skip-loss-z -sl", OPTIMIZER, "Skip updates whose loss has a z-score above this; 0: never.", min=0
    )
    skip_grad_z: float = course_option(
        0.0, "--skip-grad-z -sg", OPTIMIZER, "Skip updates whose gradient norm has a z-score above this; 0: never.",
        min=0,
    )  # fmt: skip
    val_every: int = option(20, "--val-every -v", EVALUATION, "Steps between validations; 0: never.", min=0)
    val_steps: int = option(20, "--val-steps -m", EVALUATION, "Batches per validation; -1: all.", min=-1)
    sample_every: int = option(20, "--sample-every -s", EVALUATION, "Steps between samples; 0: never.", min=0)
    sample_tokens: int = option(64, "--sample-tokens -g", EVALUATION, "Length of a sample in tokens.", min=1)
    overfit: bool = course_option(
        False, "--overfit -a", DATA_PANEL, "1: train on the first validation batch only.", zero_one=True
    )
    beta1: float = course_option(0.9, "--beta1", OPTIMIZER, "AdamW's beta1.", min=0, max=0.999999)
    beta2: float = course_option(0.95, "--beta2", OPTIMIZER, "AdamW's beta2.", min=0, max=0.999999)
    eps: float = course_option(  # with 0, parameters without gradients, such as the padding, would become NaN
        1e-8, "--eps", OPTIMIZER, "AdamW's epsilon.", min=SMALLEST
    )
    clip: float = course_option(1.0, "--clip", OPTIMIZER, "Maximum gradient norm; 0: no clipping.", min=0)
    recompute: int = option(
        2, "--recompute -r", LENGTH,
        "Recompute in the backward pass. 0: nothing; 1: GELU; 2: GELU and layernorm.", min=0, max=2,
    )  # fmt: skip
    shuffle: bool = course_option(
        True, "--shuffle/--no-shuffle", DATA_PANEL, "Shuffle the shards and the samples in them."
    )
    seed: int = course_option(42, "--seed", DATA_PANEL, "Seed of initial weights and shuffling.", min=0, max=2**32 - 1)
    master_weights: bool = option(
        True, "--master-weights -w", COMPATIBILITY,
        "1: store float32 weights in training states, as llm.c does.", zero_one=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            field.metadata["option"].check(getattr(self, field.name))

    def course(self) -> dict[str, Any]:
        """The values of the options that change the course of a run."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata["option"].changes_course
        }


@dataclass(frozen=True)
class CompatibilityOptions:
    """Options of llm.c's trainer that are accepted for compatibility; only --tf32 has an effect.

    MissingError if one asks for a missing feature.
    """

    hellaswag: bool = option(
        False, "--hellaswag -h", COMPATIBILITY, "HellaSwag evaluation; not implemented yet.", zero_one=True
    )
    zero: int = option(
        0, "--zero -z", COMPATIBILITY,
        "ZeRO stage: 0 or 1, equivalent with one process; 2 and 3 are not implemented yet.", min=0, max=3,
    )  # fmt: skip
    tf32: bool | None = option(
        None, "--tf32 -f", COMPATIBILITY, "1: use tf32 if --precision is auto or fp32; GPUs only.", zero_one=True
    )
    gelu_fusion: int = option(
        -1, "--gelu-fusion -ge", COMPATIBILITY, "Ignored; the backend decides whether GELU is fused.", min=-1, max=2
    )
    log_gpu_every: int = option(-1, "--log-gpu-every -lg", COMPATIBILITY, "Ignored.", min=-1)
    num_processes: int = option(
        1, "--num-processes -pn", COMPATIBILITY, "Number of processes; more than 1 is not implemented yet.", min=1
    )
    process_rank: int = option(0, "--process-rank -pr", COMPATIBILITY, "Rank of this process.", min=0)
    gpus_per_node: int = option(8, "--gpus-per-node -pg", COMPATIBILITY, "Ignored.", min=1)
    init_method: str = option("mpi", "--init-method -pi", COMPATIBILITY, "Ignored: mpi, tcp or fs.")
    server_ip: str = option("", "--server-ip -ps", COMPATIBILITY, "Ignored.")
    fs_path: str = option("", "--fs-path -pf", COMPATIBILITY, "Ignored.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            field.metadata["option"].check(getattr(self, field.name))
        if self.hellaswag:
            raise MissingError("--hellaswag 1: HellaSwag evaluation is not implemented yet")
        for name, value, expected in (
            ("--num-processes", self.num_processes, 1), ("--process-rank", self.process_rank, 0)
        ):  # fmt: skip
            if value > expected:
                raise MissingError(
                    f"{name} {value}: multi-process training is not implemented yet; expected {expected}"
                )
        if self.zero > 1:
            raise MissingError(f"--zero {self.zero}: ZeRO stages 2 and 3 are not implemented yet; expected 0 or 1")
