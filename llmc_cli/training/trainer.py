"""A training run: its steps, and how it goes on after an interruption."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmc_cli.data.batches import Batches
from llmc_cli.errors import CheckError, DataError, MissingError, UsageError
from llmc_cli.evaluation.validation import mean_loss
from llmc_cli.formats.train_state import load_moments, read_train_state
from llmc_cli.kernels.backend import Backend
from llmc_cli.kernels.peak import peak_flops
from llmc_cli.machine.cores import available_cores
from llmc_cli.models.files import load_model, read_config, resolve_config
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.initialization import initialize
from llmc_cli.models.kv_cache import KVCache
from llmc_cli.rng import Xorshift
from llmc_cli.sampling.generation import sample_tokens
from llmc_cli.training.checkpoints import RunFolder, position_of, state_of
from llmc_cli.training.logs import RunLog
from llmc_cli.training.optimizer import AdamW
from llmc_cli.training.options import TrainOptions
from llmc_cli.training.outliers import OutlierDetector
from llmc_cli.training.plan import Plan, accumulation, check_memory, memory_by_use
from llmc_cli.training.reports import CheckpointReport, Report, SampleReport, StepReport, ValidationReport
from llmc_cli.training.schedules import Schedule

MODEL_SEED = 13371337
"""Of the generator that the C trainer keeps for stochastic rounding; drawn from as it does, so that states agree."""

DRAWS_PER_UPDATE = 16  # one per tensor

COURSE = (
    "model", "batch", "seq_len", "total_batch", "steps", "schedule", "lr", "warmup", "lr_final", "weight_decay",
    "skip_loss_z", "skip_grad_z", "overfit", "beta1", "beta2", "eps", "clip", "shuffle", "seed",
)  # fmt: skip
"""The options that change where a run goes: a resumed one must have the same."""


class Training:
    """One run. Making it reads headers only; ``run`` allocates and trains."""

    # made by ``run``
    model: GPT2
    optimizer: AdamW
    cache: KVCache
    loss_detector: OutlierDetector
    norm_detector: OutlierDetector
    generator: Xorshift
    generator_before_update: int

    def __init__(self, options: TrainOptions, backend: Backend) -> None:
        self.options, self.backend = options, backend
        self.folder = RunFolder(options.out) if options.out else None
        self.first_step = self._starting_step()
        resumed = self.folder.model_path(self.first_step) if self.folder and self.first_step else None
        config = self.config = read_config(resumed) if resumed else resolve_config(options.model)
        B, T = options.batch, options.seq_len
        if T > config.max_seq_len:
            raise UsageError(f"--seq-len {T}: {options.model} has {config.max_seq_len} positions")
        if options.sample_every and options.sample_tokens > config.max_seq_len:
            raise UsageError(
                f"--sample-tokens {options.sample_tokens}: {options.model} has {config.max_seq_len} positions"
            )
        self.micro_steps = accumulation(options)
        # as the C trainer does, overfit the validation data's first batch
        pattern, shuffle = (options.val_data, False) if options.overfit else (options.data, options.shuffle)
        self.train_data = Batches(pattern, B, T, config.vocab_size, shuffle, options.seed)
        self.val_data = Batches(options.val_data, B, T, config.vocab_size) if options.val_every else None
        steps = options.steps
        if steps is None:  # one epoch
            steps = self.train_data.num_tokens // (B * T * self.micro_steps)
            if steps == 0:
                raise UsageError(f"{pattern}: {self.train_data.num_tokens:,} tokens are less than one step takes")
        if steps < 1:
            raise UsageError(f"--steps {steps}: at least 1, or -1 for one epoch")
        if options.val_every and options.val_steps == 0:
            raise UsageError("--val-steps 0: at least 1, or -1 for all; --val-every 0 switches validation off")
        self.steps = steps
        self.schedule = Schedule(options.schedule, options.lr, options.warmup, steps, options.lr_final)
        check_memory(config, options, backend)
        peak = peak_flops(backend.kernels)  # before memory is counted: BLAS makes its own at the first product
        self.plan = Plan(
            model=options.model,
            config=config,
            device=backend.device,
            precision=backend.precision,
            threads=backend.threads,
            batch=B,
            seq_len=T,
            accumulation=self.micro_steps,
            first_step=self.first_step,
            steps=steps,
            train_tokens=self.train_data.num_tokens,
            val_tokens=self.val_data.num_tokens if self.val_data else 0,
            memory=memory_by_use(config, options, backend),
            peak_flops=peak,
        )
        self._check_course()
        self.stop_requested = False

    def stop(self) -> None:
        """Ask ``run`` to end after the step at hand, with a checkpoint where there is a folder."""
        self.stop_requested = True

    def run(self) -> Iterator[Report]:
        """Train, yielding what happens as it does.

        CheckError where a loss, gradient or weight is not finite: what had been saved before stands. UsageError where
        another run has the folder.
        """
        lock = self.folder.lock() if self.folder else None
        try:
            yield from self._run()
        finally:
            if lock:
                lock.release()

    def _run(self) -> Iterator[Report]:
        self._allocate()
        options = self.options
        step = self.first_step
        if step >= self.steps:
            return
        log = RunLog(options.out, step if self.first_step else None)
        if self.folder:
            self.folder.write_record({**self.folder.read_record(), **self._arguments()})
        while True:
            finished = step == self.steps
            # on an interrupt the rest is left to the run that goes on from here, which begins with it
            quiet = self.stop_requested and not finished
            if self.val_data and not quiet and (step % options.val_every == 0 or finished):
                validation = ValidationReport(step, mean_loss(self.model, self.val_data, options.val_steps))
                if not math.isfinite(validation.val_loss):
                    raise CheckError(self._not_finite(f"step {step}: validation loss {validation.val_loss}"))
                log.validation(step, validation.val_loss, validation.metrics())
                yield validation
            if options.sample_every and not quiet and ((step > 0 and step % options.sample_every == 0) or finished):
                yield SampleReport(step, sample_tokens(self.model, self.cache, self.end_of_text, options.sample_tokens))
            last = finished or self.stop_requested
            if self.folder and step > self.first_step and (last or self._checkpoint_due(step)):
                yield self._checkpoint(self.folder, step)
            if last:
                return
            report = self._step(step)
            log.update(step, report.loss, report.norm, report.lr, report.metrics())
            yield report
            step += 1

    def _step(self, step: int) -> StepReport:
        """The update that leads from ``step`` to step + 1."""
        options, model = self.options, self.model
        start = time.perf_counter()
        if options.overfit:
            self.train_data.rewind()
        tokens = self.plan.tokens_per_step
        loss = 0.0
        for micro_step in range(self.micro_steps):
            self.train_data.next()
            model.forward(self.train_data.inputs)
            model.backward(self.train_data.targets, 1 / tokens, acc=micro_step > 0)
            self._prefetch()
            loss += float(np.mean(model.losses(), dtype=np.float64)) / self.micro_steps
            self.generator.word()
        loss_z = self.loss_detector.score(loss)
        norm = self.optimizer.gradient_norm()
        norm_z = self.norm_detector.score(norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise CheckError(self._not_finite(f"step {step + 1}: loss {loss}, gradient norm {norm}"))
        lr = self.schedule(step)
        skipped = None
        if options.skip_loss_z and loss_z is not None and loss_z > options.skip_loss_z:
            skipped = f"the loss lies {loss_z:.1f} deviations above its last {len(self.loss_detector.values)}"
        elif options.skip_grad_z and norm_z is not None and norm_z > options.skip_grad_z:
            skipped = f"the gradient norm lies {norm_z:.1f} deviations above its last {len(self.norm_detector.values)}"
        else:
            self.generator_before_update = self.generator.state
            self.optimizer.step(lr, step + 1)
            for _ in range(DRAWS_PER_UPDATE):
                self.generator.word()
        elapsed = time.perf_counter() - start
        rate = tokens / elapsed
        mfu = rate * self.plan.flops_per_token / self.plan.peak_flops
        return StepReport(step + 1, self.steps, loss, norm, lr, 1000 * elapsed, rate, mfu, skipped)

    def _prefetch(self) -> None:
        """Read the next batch and start its upload."""
        ahead = None if self.options.overfit else self.train_data.look_ahead()  # that goes back to the first
        if ahead is not None:
            self.model.prefetch(*ahead)

    def _checkpoint(self, folder: RunFolder, step: int) -> CheckpointReport:
        """Write the checkpoint of ``step`` and delete the one that it pushes out."""
        options = self.options
        if not self.optimizer.is_finite():
            raise CheckError(self._not_finite(f"step {step}: weights or moments"))
        state = state_of(
            step,
            self.train_data.position,
            self.generator.state,
            self.generator_before_update,
            options.seed,
            has_master=options.master_weights,
        )
        detectors = {"loss": vars(self.loss_detector), "norm": vars(self.norm_detector)}
        folder.write(step, self.model, self.optimizer, state, {"detectors": detectors})
        pushed_out = step - options.keep * options.checkpoint_every
        major = options.major_every and pushed_out % options.major_every == 0
        if options.keep and 0 < pushed_out < step and not major:
            folder.delete(pushed_out)
        return CheckpointReport(step, folder.model_path(step))

    def _resume(self, folder: RunFolder) -> None:
        """Put moments, data and generators back to where the checkpoint left them."""
        step = self.first_step
        path = folder.state_path(step)
        state = read_train_state(path, self.model.params.flat.size)
        if state.processes != 1:
            raise MissingError(
                f"{path}: a checkpoint of {state.processes} processes; going on with it is not there yet"
            )
        if state.step != step:
            raise DataError(f"{path}: holds the state of step {state.step}")
        kernels, optimizer = self.backend.kernels, self.optimizer
        moments = {name: kernels.download(moment) for name, moment in (("m", optimizer.m), ("v", optimizer.v))}
        if state.has_master:
            with self.model.overwrite_params() as params:
                load_moments(path, state, **moments, master=params.flat)
        else:
            load_moments(path, state, **moments)
        kernels.upload(optimizer.m, moments["m"])
        kernels.upload(optimizer.v, moments["v"])
        self.generator.state, self.generator_before_update = state.rng_state, state.rng_state_before_update
        if not self.train_data.accepts(position_of(state)):
            raise UsageError(
                f"{path}: its place in the data fits neither the shards of {self.options.data} nor the batch; "
                "give the same --data, --batch, --seq-len and --shuffle as before"
            )
        self.train_data.position = position_of(state)
        record = folder.read_record()["checkpoints"].get(str(step))
        if record:
            self.loss_detector = OutlierDetector(**record["detectors"]["loss"])
            self.norm_detector = OutlierDetector(**record["detectors"]["norm"])

    def _not_finite(self, what: str) -> str:
        saved = self.folder.steps() if self.folder else []
        good = (
            f"the last good checkpoint is {self.folder.model_path(saved[-1])}"
            if self.folder and saved
            else ("no checkpoint had been written")
        )
        return f"{what}: not finite, so training stops here; {good}"

    def _checkpoint_due(self, step: int) -> bool:
        every = self.options.checkpoint_every
        return every > 0 and step % every == 0

    def _starting_step(self) -> int:
        """0, or the step of the checkpoint to resume from. UsageError where a fresh run would overwrite an old one."""
        done = self.folder.steps() if self.folder else []
        if self.options.resume and not self.folder:
            raise UsageError("--resume needs --out, the folder of the run to go on with")
        if not done:
            return 0
        if not self.options.resume:
            raise UsageError(
                f"{self.options.out} holds a finished checkpoint (step {done[-1]}); go on with it by --resume 1, "
                "or take another --out"
            )
        return done[-1]

    def _arguments(self) -> dict[str, Any]:
        """What run.json keeps of the course of this run."""
        values = {name: getattr(self.options, name) for name in COURSE}
        values |= {"steps": self.steps, "total_batch": self.plan.tokens_per_step}
        return {"arguments": values, "data": self.train_data.fingerprint()}

    def _check_course(self) -> None:
        """UsageError where this run resumes another whose arguments would have led elsewhere."""
        if not self.folder or not self.first_step or self.options.force:
            return
        before, now = self.folder.read_record(), self._arguments()
        if "arguments" not in before:
            return  # begun by the C trainer, which keeps none
        changed = [
            f"--{name.replace('_', '-')} was {before['arguments'].get(name)}, is {value}"
            for name, value in now["arguments"].items()
            if before["arguments"].get(name) != value
        ]
        if before["data"] != now["data"]:
            changed.append("the training data is another")
        if changed:
            raise UsageError(
                f"{self.options.out}: resuming would change the course of the run: {'; '.join(changed)}. "
                "Give the same arguments, or --force"
            )

    def _allocate(self) -> None:
        """Make the model and everything that training keeps, fresh or as the checkpoint left it."""
        options, kernels = self.options, self.backend.kernels
        self.loss_detector, self.norm_detector = OutlierDetector(), OutlierDetector()
        self.generator = Xorshift(MODEL_SEED)
        self.generator_before_update = self.generator.state
        if self.folder and self.first_step:
            self.model = load_model(self.folder.model_path(self.first_step), kernels)
        elif Path(options.model).is_file() and not options.model.endswith(".json"):
            self.model = load_model(options.model, kernels)
        else:
            self.model = GPT2(self.config, kernels)
            threads = self.backend.threads if self.backend.device == "cpu" else available_cores()
            initialize(self.model, options.seed, threads)
        self.model.prepare(options.batch, options.seq_len, recompute=options.recompute)
        self.optimizer = AdamW(
            self.model, options.beta1, options.beta2, options.eps, options.weight_decay, options.clip
        )
        self.end_of_text = self.config.vocab_size - 1
        if options.sample_every:
            self.cache = KVCache(self.config, kernels, 1, options.sample_tokens, 1)
        if self.folder and self.first_step:
            self._resume(self.folder)
