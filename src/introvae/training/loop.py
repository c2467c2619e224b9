"""The training loop: batches in, a run folder out."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from introvae.capture import CapturedStep
from introvae.data import ArrayData, Data
from introvae.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    InterruptedRunError,
    RunError,
)
from introvae.extras import import_extra
from introvae.machine import keep_freed_memory
from introvae.model import IntrospectiveVAE, check_state
from introvae.networks import use_gradient_checkpointing
from introvae.networks.disentangled import class_dim
from introvae.objectives import Objective
from introvae.parallel import Peers, processes
from introvae.players import Players
from introvae.precision import float32_multiplications, pick_precision
from introvae.progress import progress_bar
from introvae.step import OWN, IntrospectiveStep, Noise, step_class
from introvae.training.balance import ramp_from
from introvae.training.checkpoint import list_checkpoints, save_checkpoint
from introvae.training.config import FitConfig
from introvae.training.controller import Controller
from introvae.training.devices import can_compile, pick_device, share_statistics
from introvae.training.ema import Average
from introvae.training.feed import Feed
from introvae.training.growing import Grower, Schedule
from introvae.training.guard import Guard
from introvae.training.planner import Plan
from introvae.training.preview import preview
from introvae.training.readback import Readback
from introvae.training.resolve import classes_of, load_once, preparation_of, resolve
from introvae.training.run import Run
from introvae.training.signals import stop_on_signal
from introvae.training.target import Renewal
from introvae.training.trackers import Trackers

log = logging.getLogger("introvae")


SHOWN = {
    "rec": "rec",
    "kl_real": "KL(real)",
    "kl_reconstruction": "KL(rec)",
    "kl_sample": "KL(sample)",
    "divergence_real": "Δ(real)",
    "divergence_sample": "Δ(sample)",
    "wasserstein": "W",
    "gradient_penalty": "GP",
}
"""What the progress bar shows of a line of the log, and how it calls it."""

ASK_EVERY = 10
"""Steps after which several processes agree, at the latest, whether one of them was told to stop."""


class Step(Protocol):
    """What the loop knows of an update."""

    @property
    def objective(self) -> Objective: ...

    @objective.setter
    def objective(self, objective: Objective) -> None: ...

    def __call__(
        self,
        x: Tensor,
        noise: Noise | None = None,
        values: Any = None,
        *,
        warming: bool = False,
        gradients: bool = False,
        condition: Tensor | None = None,
    ) -> dict[str, Tensor]: ...

    def set_lr(self, lr: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Trainer:
    """Everything that a run keeps in memory, and the loop over it.

    Arguments:
        config: the settings; the ones left to be chosen (steps, network, latent_dim) are filled in.
        data: loaded from `config.data` when not given.

    Raises:
        ConfigError: settings that do not fit the data.
        DataError: the data cannot be read.
    """

    def __init__(self, config: FitConfig, data: Data | None = None) -> None:
        self.peers = processes(config.device)
        self.data = load_once(config, self.peers) if data is None else data
        self.config = config = resolve(config, self.data)
        classes = classes_of(config, self.data)
        self.device = self.peers.device if isinstance(self.peers, Peers) else pick_device(config.device)
        self.precision = pick_precision(config.precision, self.device, self.data.shape)
        self.steps, latent_dim = config.steps or 0, config.latent_dim or 0  # resolve() filled them in
        self.schedule = Schedule(config.growing, self.data.shape, config.batch_size)
        for size in self.schedule.batches:
            if (share := len(range(size)[self.peers.rows(size)])) % config.accumulation:
                raise ConfigError(
                    f"accumulation {config.accumulation} does not divide a process' {share} samples: take a divisor"
                )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # of the weights; all later draws have generators of their own
            values = "[0, 1]" if len(self.data.shape) == 3 else "unbounded"
            self.model = IntrospectiveVAE.build(
                self.data.shape,
                config.network,
                latent_dim,
                data={"name": Path(self.data.name).name, "range": values, **preparation_of(self.data)},
                classes=classes if config.conditional else None,
                **config.network_options,
            ).to(self.device)
        self.average = Average(self.model, config.ema)
        share_statistics(self.model, self.peers)
        if config.gradient_checkpointing:
            use_gradient_checkpointing(self.model.encoder)
            use_gradient_checkpointing(self.model.decoder)
        if config.flip and len(self.data.shape) != 3:
            raise ConfigError(f"flip mirrors images, {self.data.name} has vectors: leave it out")
        augment = config.augmentation is not None
        if augment and len(self.data.shape) != 3:
            raise ConfigError(f"augment changes images, {self.data.name} has vectors: leave it out")
        self.compile, self.grower = config.compile, None
        self.step = self._make_step()
        self._own = torch.tensor([0.0, 1.0], device=self.device)
        self._joint_steps = config.warmup.steps if config.objective.adversarial else self.steps
        self.controller = Controller(
            config.objective,
            config.warmup.steps,
            self.steps,
            self.device,
            math.prod(self.data.shape),
            self.peers,
            self.schedule.values,
            ramp_from(config.objective, config.warmup),
        )
        batches = self.data.batches(config.batch_size, config.seed)
        rows, sizes = self._batch(0)[1], self._batch if config.growing.on else None
        known = len(classes or ())
        self.feed = Feed(batches, latent_dim, config.seed + 1, self.device, rows, config.flip, sizes, known, augment)
        self.readback = Readback(self.peers)
        self.guard = Guard(config.guard, config.objective, latent_dim, self.controller, self._live, self.peers)
        self.step_index, self.seconds = 0, 0.0
        self._record: dict[str, Tensor] = {}
        self.trackers: Trackers | None = None
        for name in config.trackers:
            import_extra(name)  # what is missing is said before there is a run

    def _make_step(self) -> Step:
        config, captured = self.config, self.compile == "cudagraph"
        if self.compile == "inductor" and not can_compile(self.device):
            self.compile = "none"
        elif self.compile == "inductor":
            self.model.encoder.compile(dynamic=False)
            self.model.decoder.compile(dynamic=False)
        lent: dict[str, Any] = {}
        if config.paired:
            lent = {"lent": class_dim(self.model.encoder), "independence": config.independence}
        cls = step_class(config.objective)
        if lent and cls is not IntrospectiveStep:
            raise ConfigError(f"{type(config.objective).__name__} cannot lend latents: leave paired out")
        step = cls(
            self.model,
            config.objective,
            warmup=config.warmup,
            lr=config.lr,
            adam_betas=config.adam_betas,
            precision=self.precision,
            peers=self.peers,
            accumulation=config.accumulation,
            capturable=captured,
            augment=config.augmentation,
            **lent,
        )
        self.players: Players = step
        self.renewal = Renewal(step, config.objective, self.data, config.batch_size, config.growing.on)
        if config.growing.on:
            optimizers = (step.encoder_optimizer, step.decoder_optimizer)
            self.grower = Grower(self.schedule, (self.model, self.average.model), optimizers)
        return CapturedStep(step) if captured else step

    def _batch(self, step: int) -> tuple[int, slice]:
        """The size of a step's batch, over all processes, and this one's rows of it."""
        size = self.schedule.at(step).batch
        return size, self.peers.rows(size)

    def train(self, run: Run, progress: bool = True) -> Run:
        """Run to the end; the model is saved there.

        Raises:
            InterruptedRunError: after Ctrl-C or a termination signal; the state is saved.
            DivergedError: training went wrong and the guard could not help; nothing of it is saved.
            RunError: the run folder cannot be written.
        """
        try:
            with ExitStack() as stack:
                stack.enter_context(float32_multiplications(tf32=self.precision == "tf32"))
                if self.device.type == "cpu":
                    stack.enter_context(keep_freed_memory())
                before = torch.backends.cudnn.benchmark
                torch.backends.cudnn.benchmark = True  # batches are all of one size
                stack.callback(setattr, torch.backends.cudnn, "benchmark", before)
                return self._train(run, progress)
        except OSError as error:
            raise RunError(
                f"{run.folder} cannot be written ({error}): give it room or rights, then go on with introvae fit "
                f"--resume {run.folder}"
            ) from error

    def _train(self, run: Run, progress: bool) -> Run:
        bar = progress_bar(
            total=self.schedule.samples(self.steps),
            initial=self.schedule.samples(self.step_index),
            unit="img" if len(self.data.shape) == 3 else "sample",
            unit_scale=True,
            smoothing=0.1,
            shown=progress and self.peers.first,
            mininterval=0.5,
        )
        self.peers.copy_first(self.model)
        if self.peers.first:
            for before in run.events("start")[-1:]:
                if before["precision"] != self.precision:
                    log.info("precision was %s before, is %s from here on", before["precision"], self.precision)
            run.log_event("start", step=self.step_index, **self.machine())
        if self.step_index == 0:
            self._save(run)  # so that a run can be resumed from its first second, and a full disk shows at once
            known = isinstance(self.data, ArrayData) and self.data.intake is not None
            if known and self.peers.first and not run.events("data"):
                run.log_event("data", step=0, **self.data.intake.to_dict())  # pyright: ignore
        with ExitStack() as stack:
            stack.enter_context(bar)
            lines = stack.enter_context(open(run.log_path if self.peers.first else os.devnull, "a"))
            stopped = stack.enter_context(stop_on_signal())
            stack.enter_context(self.feed)
            if self.peers.first and self.config.trackers:
                self.trackers = Trackers(run, self.config)
                stack.callback(self.trackers.finish)
            self.guard.begin(self.step_index)
            while self.step_index < self.steps:
                due = self._one_step()
                bar.update(self._batch(self.step_index - 1)[0])
                done, config = self.step_index, self.config
                save = config.checkpoint_every and done % config.checkpoint_every == 0 and done < self.steps
                draw = config.image_every and done % config.image_every == 0 and done < self.steps
                ask = due or self.peers.count == 1 or done % ASK_EVERY == 0
                stop = ask and self.peers.any(stopped.is_set(), self.device)
                started = time.perf_counter()
                self._tell(run, self.guard.see(done, self._record))
                rows = list(self.readback.rows(wait=bool(save or draw or stop or done == self.steps)))
                self.seconds += time.perf_counter() - started
                for row in rows:
                    self._log(run, lines, row, bar)
                if save:
                    self._save(run)
                elif self.grower is not None and self.grower.ends_with(done):
                    self._make_sound(run)  # while there are copies of this level to go back to
                if draw:
                    self._picture(run, f"step_{done:08d}.png")
                if stop and done < self.steps:
                    self._save(run)
                    raise InterruptedRunError(
                        f"stopped after step {done} of {self.steps}, state saved: "
                        f"go on with introvae fit --resume {run.folder}"
                    )
            self._save(run)
            if self.peers.first:
                self._picture(run, "final.png")
                self.averaged_model().save_pretrained(run.model_folder)
        self.peers.wait()
        return run

    def machine(self) -> dict[str, Any]:
        """What the steps are computed on, and how."""
        count = self.peers.count
        facts = {"device": str(self.device), "precision": self.precision, "compile": self.compile}
        return {**facts, "processes": count, "threads": torch.get_num_threads()}

    def plan(self) -> Plan:
        """How much memory the steps will take."""
        config = dataclasses.replace(self.config, batch_size=self.schedule.batches[-1])  # that of the largest images
        return Plan(config, self.data.shape, self.model, self.precision, self.peers.count)

    def averaged_model(self) -> IntrospectiveVAE:
        """The model with averaged weights, in evaluation mode."""
        return self.average.model.eval()

    def _one_step(self) -> bool:
        """Train on the next batch; whether a line of the log came of it."""
        started = time.perf_counter()
        config, index = self.config, self.step_index
        warming = index < config.warmup.steps
        x, noise, condition = self.feed.next()
        if self.grower is not None:
            x = self._grown(self.grower, x)
        values = self.controller.update(index)
        if config.paired:
            values = {**values, OWN: self._own[int(2 * index >= self._joint_steps)]}
        lr = config.lr_at(index, self.steps) * self.guard.rate
        self.step.set_lr(lr)
        self.step.objective = config.objective.at(self.controller.progress(index))
        self.renewal.before(index)
        due = (index + 1) % config.log_every == 0 or index + 1 == self.steps
        apart = due and (warming or not config.objective.adversarial)
        fakes = self.players.fake_kls(x, noise, condition) if apart else {}
        every = config.gradient_every
        probing = bool(every and (index + 1) % every == 0)
        record = self.step(x, noise, values, warming=warming, gradients=probing, condition=condition)
        self.average.update(self.model)
        self.step_index += 1
        self._record = record
        if due:
            self.readback.put(
                {
                    "step": self.step_index,
                    "samples_seen": self.schedule.samples(self.step_index),
                    "seconds": round(self.seconds + time.perf_counter() - started, 3),
                    "seconds_waited": round(self.feed.seconds_waited, 3),
                    "phase": "warmup" if warming else "train",
                    **self.schedule.told(index),
                    "lr": lr,
                },
                {**record, **fakes, **self.controller.found()},
                self.controller.plain(),
            )
        self.controller.observe(index, record)  # after the line, which tells the values of this step
        self.seconds += time.perf_counter() - started
        return due

    def _grown(self, grower: Grower, x: Tensor) -> Tensor:
        """Bring all to the step's level; its batch for it."""
        if grower.begin(self.step_index):
            # The KLs of smaller images are no measure for these, and their networks nothing to go back to.
            self.guard.watch.begin_again(self.step_index)
            self.guard.watch.reference = None
            self.guard.begin(self.step_index)
        return grower.fit(x)

    def _log(self, run: Run, lines: Any, row: dict[str, Any], bar: Any) -> None:
        if not all(math.isfinite(value) for value in row.values() if isinstance(value, float)):
            if self.guard.mode == "off":
                self._tell(run, self.guard.lost(self.step_index, "the losses are not finite"))
            return  # the guard will find it, at the same step in every process
        lines.write(json.dumps(row) + "\n")
        lines.flush()
        if self.trackers is not None:
            self.trackers.log(row)
        bar.set_postfix({title: f"{row[name]:.3g}" for name, title in SHOWN.items() if name in row}, refresh=False)

    def _tell(self, run: Run, event: dict[str, Any] | None) -> None:
        """Log what the guard recognised and did.

        Raises:
            DivergedError: it had nothing left to do.
        """
        if event is None:
            return
        if self.peers.first:
            run.log_event("guard", **event)
        if event["change"] is not None:
            back = f"; back to the state of step {event['back_to']}" if "back_to" in event else ""
            log.info("guard, step %d: %s%s; %s", event["step"], event["cause"], back, event["change"])
            return
        checkpoints = list_checkpoints(run.checkpoints)
        kept = f" (the last good state is {checkpoints[-1]})" if checkpoints else ""
        tried = f", after {event['attempt']} changes that did not help" if event["attempt"] else ""
        raise DivergedError(
            f"{event['cause']} at step {self.step_index} of {self.steps}{tried}{kept}: {event['remedy']}"
        )

    def _live(self) -> list[Tensor]:
        """All tensors that training changes, but the controller's and the rate, which `set_lr` owns."""
        players = self.step.state_dict()
        moments = [part["state"] if isinstance(part, dict) and "state" in part else part for part in players.values()]
        states = tree_leaves([moments, self.average.model.state_dict()])
        return [leaf for leaf in states if isinstance(leaf, Tensor)]

    def _picture(self, run: Run, name: str) -> None:
        if self.peers.first:
            data = self.data if self.grower is None else self.grower.shown(self.data)
            preview(self.averaged_model(), data, run.images / name, self.config.objective.encodes)
            if self.trackers is not None:
                self.trackers.picture(run.images / name, self.step_index)

    def _finite(self) -> bool:
        weights = [*self.model.parameters(), *self.average.model.parameters()]
        return bool(torch.stack([weight.isfinite().all() for weight in weights]).all())

    def _make_sound(self, run: Run) -> None:
        """See to it that what is kept, or gone on from with other images, is a state without an alarm."""
        self._tell(run, self.guard.judge(self.step_index))
        while not self._finite():  # each attempt goes back to a good state; the last one raises
            self._tell(run, self.guard.lost(self.step_index, "the weights are not finite"))

    def _save(self, run: Run) -> None:
        self._make_sound(run)
        if self.peers.first:
            save_checkpoint(run.checkpoints, self.step_index, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as tensors and plain values."""
        return {
            "model": self.model.config,
            "players": self.step.state_dict(),
            "average": self.average.state_dict(),
            "controller": self.controller.state_dict(),
            "guard": self.guard.state_dict(),
            **self.feed.state_dict(),
            "seconds": self.seconds,
            "seconds_waited": self.feed.seconds_waited,
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Restore a checkpoint's content, read from `path`.

        Raises:
            CheckpointError: keys or shapes differ from this run's.
        """
        try:
            check_state(state["players"]["model"], self.model.state_dict(), str(path))
            check_state(state["average"], self.average.state_dict(), str(path))
            if state["step"] and not all(state["players"][f"{p}_optimizer"]["state"] for p in ("encoder", "decoder")):
                raise CheckpointError("it lacks the optimisers' moments")
            self.step.load_state_dict(state["players"])
            self.average.load_state_dict(state["average"])
            self.controller.load_state_dict(state["controller"])
            if "guard" in state:
                self.guard.load_state_dict(state["guard"])
            self.feed.load_state_dict(state)
            self.step_index, self.seconds = state["step"], state["seconds"]
            self.feed.seconds_waited = state.get("seconds_waited", 0.0)
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if str(path) in str(error):  # from check_state: it says all there is to say
                raise
            raise CheckpointError(f"{path} does not fit this run ({error}): remove it or start the run anew") from error
