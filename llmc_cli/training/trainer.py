"""The training loop: steps, validation, samples and checkpoints, fresh or resumed."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from llmc_cli.errors import CheckError, DataError, MissingError, UsageError
from llmc_cli.evaluation.validation import mean_loss
from llmc_cli.formats.train_state import load_moments, read_train_state
from llmc_cli.kernels.backend import Backend
from llmc_cli.machine.cores import available_cores
from llmc_cli.models.files import load_model
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.initialization import initialize
from llmc_cli.models.kv_cache import KVCache
from llmc_cli.rng import Xorshift
from llmc_cli.sampling.generation import sample_tokens
from llmc_cli.training.checkpoints import RunFolder, data_position, train_state
from llmc_cli.training.logs import RunLog
from llmc_cli.training.optimizer import AdamW
from llmc_cli.training.outliers import OutlierDetector
from llmc_cli.training.plan import Plan, run_record, train_batches, val_batches
from llmc_cli.training.reports import CheckpointReport, Report, SampleReport, StepReport, ValidationReport
from llmc_cli.training.schedules import Schedule

ROUNDING_SEED = 13371337
"""Seed of llm.c's generator for stochastic rounding. It is advanced as in llm.c, so that training states are equal."""

DRAWS_PER_UPDATE = 16  # one per parameter tensor


class Trainer:
    """A training run. The constructor locks the run's directory and allocates all memory; ``run`` trains.

    A resumed run continues from ``plan.checkpoint``. UsageError if another process uses the directory, or if the
    checkpoint's position does not fit the data; DataError or FormatError if a file is damaged.
    """

    def __init__(self, plan: Plan, backend: Backend) -> None:
        options, config = plan.options, plan.config
        self.plan, self.backend, self.options = plan, backend, options
        self.schedule = Schedule(options.schedule, options.lr, options.warmup, plan.steps, options.lr_final)
        self.loss_detector, self.norm_detector = OutlierDetector(), OutlierDetector()
        self.generator = Xorshift(ROUNDING_SEED)
        self.generator_before_update = self.generator.state
        self.folder = RunFolder(options.out) if options.out else None
        self.lock = self.folder.lock() if self.folder else None
        try:
            self.train_data, self.val_data = train_batches(options, config), val_batches(options, config)
            self.model = self._load_or_initialize()
            self.model.prepare(options.batch, options.seq_len, recompute=options.recompute)
            self.optimizer = AdamW(
                self.model, options.beta1, options.beta2, options.eps, options.weight_decay, options.clip
            )
            self.cache = KVCache(config, backend.kernels, 1, options.sample_tokens, 1) if options.sample_every else None
            if self.folder and plan.first_step:
                self._resume(self.folder)
        except BaseException:
            self._release()
            raise

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Report]:
        """Train and yield reports. Call once: the directory is unlocked at the end.

        After a step for which ``should_stop`` returns true, write a checkpoint if there is a directory, and return.
        CheckError if a loss, gradient or weight is not finite; earlier checkpoints remain.
        """
        try:
            yield from self._run(should_stop)
        finally:
            self._release()

    def _run(self, should_stop: Callable[[], bool]) -> Iterator[Report]:
        plan, options = self.plan, self.options
        step = plan.first_step
        if step >= plan.steps:
            return
        log = RunLog(options.out, step if plan.first_step else None)
        if self.folder:
            self.folder.write_record({**self.folder.read_record(), **run_record(plan)})
        while True:
            finished = step == plan.steps
            # when interrupted, leave validation and sample to the resumed run, which starts with them
            evaluate = finished or not should_stop()
            if self.val_data and evaluate and (step % options.val_every == 0 or finished):
                validation = ValidationReport(step, mean_loss(self.model, self.val_data, options.val_steps))
                if not math.isfinite(validation.val_loss):
                    raise CheckError(self._not_finite(f"step {step}: validation loss {validation.val_loss}"))
                log.validation(step, validation.val_loss, validation.metrics())
                yield validation
            if self.cache and evaluate and ((step > 0 and step % options.sample_every == 0) or finished):
                end_of_text = plan.config.vocab_size - 1
                yield SampleReport(step, sample_tokens(self.model, self.cache, end_of_text, options.sample_tokens))
            last = finished or should_stop()
            if self.folder and step > plan.first_step and (last or self._is_checkpoint_due(step)):
                yield self._write_checkpoint(self.folder, step)
            if last:
                return
            report = self._step(step)
            log.update(step, report.loss, report.norm, report.lr, report.metrics())
            yield report
            step += 1

    def _step(self, step: int) -> StepReport:
        """Do the update from ``step`` to step + 1."""
        options, model = self.options, self.model
        start = time.perf_counter()
        if options.overfit:
            self.train_data.rewind()
        tokens = self.plan.tokens_per_step
        loss = 0.0
        for micro_step in range(self.plan.accumulation):
            self.train_data.next_batch()
            model.forward(self.train_data.inputs)
            model.backward(self.train_data.targets, 1 / tokens, acc=micro_step > 0)
            self._prefetch_batch()
            loss += float(np.mean(model.losses(), dtype=np.float64)) / self.plan.accumulation
            self.generator.word()
        loss_z = self.loss_detector.score(loss)
        norm = self.optimizer.gradient_norm()
        norm_z = self.norm_detector.score(norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise CheckError(self._not_finite(f"step {step + 1}: loss {loss}, gradient norm {norm}"))
        lr = self.schedule(step)
        skipped = None
        if options.skip_loss_z and loss_z is not None and loss_z > options.skip_loss_z:
            skipped = f"the loss has a z-score of {loss_z:.1f}"
        elif options.skip_grad_z and norm_z is not None and norm_z > options.skip_grad_z:
            skipped = f"the gradient norm has a z-score of {norm_z:.1f}"
        else:
            self.generator_before_update = self.generator.state
            self.optimizer.step(lr, step + 1)
            for _ in range(DRAWS_PER_UPDATE):
                self.generator.word()
        elapsed = time.perf_counter() - start
        rate = tokens / elapsed
        mfu = rate * self.plan.flops_per_token / self.plan.peak_flops
        return StepReport(step + 1, self.plan.steps, loss, norm, lr, 1000 * elapsed, rate, mfu, skipped)

    def _prefetch_batch(self) -> None:
        """Read the next batch and start its upload while the backward pass runs; not if one batch is repeated."""
        batch = None if self.options.overfit else self.train_data.read_ahead()
        if batch is not None:
            self.model.prefetch(*batch)

    def _write_checkpoint(self, folder: RunFolder, step: int) -> CheckpointReport:
        """Write the checkpoint of ``step`` and delete the one that exceeds the number to keep."""
        options = self.options
        if not self.optimizer.is_finite():
            raise CheckError(self._not_finite(f"step {step}: weights or moments"))
        state = train_state(
            step,
            self.train_data.position,
            self.generator.state,
            self.generator_before_update,
            options.seed,
            has_master=options.master_weights,
        )
        detectors = {"loss": vars(self.loss_detector), "norm": vars(self.norm_detector)}
        folder.write(step, self.model, self.optimizer, state, {"detectors": detectors})
        oldest = step - options.keep * options.checkpoint_every
        major = options.major_every and oldest % options.major_every == 0
        if options.keep and 0 < oldest < step and not major:
            folder.delete(oldest)
        return CheckpointReport(step, folder.model_path(step))

    def _load_or_initialize(self) -> GPT2:
        """Return the model of the checkpoint or the file, or one with fresh weights."""
        kernels, name = self.backend.kernels, self.options.model
        if self.plan.checkpoint:
            return load_model(self.plan.checkpoint, kernels)
        if Path(name).is_file() and not name.endswith(".json"):
            return load_model(name, kernels)
        model = GPT2(self.plan.config, kernels)
        threads = self.backend.threads if self.backend.device == "cpu" else available_cores()
        initialize(model, self.options.seed, threads)
        return model

    def _resume(self, folder: RunFolder) -> None:
        """Restore the moments, the position in the data, the generators and the detectors from the checkpoint."""
        step = self.plan.first_step
        path = folder.state_path(step)
        state = read_train_state(path, self.model.params.flat.size)
        if state.processes != 1:
            raise MissingError(
                f"{path}: found the state of {state.processes} processes, expected 1; resuming a run of several "
                "processes is not implemented yet"
            )
        if state.step != step:
            raise DataError(f"{path}: found the state of step {state.step}, expected step {step}")
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
        position = data_position(state)
        if not self.train_data.accepts(position):
            raise UsageError(
                f"{path}: its position in the data does not fit the shards of {self.options.data} or the batch; "
                "use the same --data, --batch, --seq-len and --shuffle as before"
            )
        self.train_data.position = position
        record = folder.read_record()["checkpoints"].get(str(step))
        if record:
            self.loss_detector = OutlierDetector(**record["detectors"]["loss"])
            self.norm_detector = OutlierDetector(**record["detectors"]["norm"])

    def _not_finite(self, what: str) -> str:
        saved = self.folder.steps() if self.folder else []
        last = "no checkpoint was written"
        if self.folder and saved:
            last = f"the last good checkpoint is {self.folder.model_path(saved[-1])}"
        return f"{what}: not finite, training stopped; {last}"

    def _is_checkpoint_due(self, step: int) -> bool:
        every = self.options.checkpoint_every
        return every > 0 and step % every == 0

    def _release(self) -> None:
        if self.lock:
            self.lock.release()
