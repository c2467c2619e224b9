"""The training loop: batches in, a run folder out."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from introvae.data import ArrayData, Data, load_data
from introvae.errors import CheckpointError, ConfigError, DataError, DivergedError, InterruptedRunError, RunError
from introvae.model import IntrospectiveVAE, check_state
from introvae.objectives import Objective
from introvae.step import IntrospectiveStep, Noise
from introvae.training.checkpoint import list_checkpoints, save_checkpoint
from introvae.training.config import DEFAULT_STEPS, FitConfig
from introvae.training.controller import Controller
from introvae.training.ema import averaged
from introvae.training.preview import preview
from introvae.training.run import Run


class Step(Protocol):
    """What the loop knows of an update."""

    objective: Objective

    def __call__(
        self, x: Tensor, noise: Noise | None = None, values: Any = None, *, warming: bool = False
    ) -> dict[str, Tensor]: ...

    def set_lr(self, lr: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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
        self.data = load_data(config.data, config) if data is None else data
        self.config = config = resolve(config, self.data)
        self.device = pick_device(config.device)
        self.steps, latent_dim = config.steps or 0, config.latent_dim or 0  # resolve() filled them in
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # of the weights; all later draws have generators of their own
            values = "[0, 1]" if len(self.data.shape) == 3 else "unbounded"
            self.model = IntrospectiveVAE.build(
                self.data.shape,
                config.network,
                latent_dim,
                data={"name": Path(self.data.name).name, "range": values, **_preparation(self.data)},
                **config.network_options,
            ).to(self.device)
        self.step = IntrospectiveStep(
            self.model, config.objective, warmup=config.warmup, lr=config.lr, adam_betas=config.adam_betas
        )
        self.average = averaged(self.model, config.ema)
        self.controller = Controller(config.objective, config.warmup.steps, self.steps, self.device)
        self.batches = self.data.batches(config.batch_size, config.seed)
        self.noise = torch.Generator().manual_seed(config.seed + 1)  # on the CPU: any device can resume
        self.step_index, self.seconds = 0, 0.0

    def train(self, run: Run, progress: bool = True) -> Run:
        """Run to the end; the model is saved there.

        Raises:
            InterruptedRunError: after Ctrl-C or a termination signal; the state is saved.
            DivergedError: a loss is no longer finite; nothing of it is saved.
            RunError: the run folder cannot be written.
        """
        try:
            return self._train(run, progress)
        except OSError as error:
            raise RunError(
                f"{run.folder} cannot be written ({error}): give it room or rights, then go on with introvae fit "
                f"--resume {run.folder}"
            ) from error

    def _train(self, run: Run, progress: bool) -> Run:
        from tqdm import tqdm

        bar = tqdm(
            total=self.steps * self.config.batch_size,
            initial=self.step_index * self.config.batch_size,
            unit="img" if len(self.data.shape) == 3 else "sample",
            unit_scale=True,
            smoothing=0.1,
            disable=None if progress else True,  # None: where standard error is no terminal
            mininterval=0.5,
        )
        if self.step_index == 0:
            self._save(run)  # so that a run can be resumed from its first second, and a full disk shows at once
            if isinstance(self.data, ArrayData) and self.data.intake is not None and not run.events("data"):
                run.log_event("data", step=0, **self.data.intake.to_dict())
        with bar, open(run.log_path, "a") as log, _stop_on_signal() as stopped:
            while self.step_index < self.steps:
                row = self._one_step()
                bar.update(self.config.batch_size)
                if row is not None:
                    self._log(run, log, row, bar)
                done, config = self.step_index, self.config
                if config.checkpoint_every and done % config.checkpoint_every == 0 and done < self.steps:
                    self._save(run)
                if config.image_every and done % config.image_every == 0 and done < self.steps:
                    self._picture(run, f"step_{done:08d}.png")
                if stopped.is_set() and done < self.steps:
                    self._save(run)
                    raise InterruptedRunError(
                        f"stopped after step {done} of {self.steps}, state saved: "
                        f"go on with introvae fit --resume {run.folder}"
                    )
        self._save(run)
        self._picture(run, "final.png")
        self.averaged_model().save_pretrained(run.model_folder)
        return run

    def averaged_model(self) -> IntrospectiveVAE:
        """The model with averaged weights, in evaluation mode."""
        model: IntrospectiveVAE = self.average.module  # pyright: ignore[reportAssignmentType]
        return model.eval()

    def _one_step(self) -> dict[str, Any] | None:
        """Train on the next batch; the line for the log where one is due."""
        started = time.perf_counter()
        config, index = self.config, self.step_index
        warming = index < config.warmup.steps
        x = self.batches.next(self.device)
        noise = Noise.draw(len(x), self.model.latent_dim, self.noise, self.device)
        values = self.controller.update(index)
        lr = config.lr_at(index, self.steps)
        self.step.set_lr(lr)
        self.step.objective = config.objective.at(self.controller.progress(index))
        due = (index + 1) % config.log_every == 0 or index + 1 == self.steps
        fakes = self._fakes(x, noise) if due and (warming or not config.objective.adversarial) else {}
        record = self.step(x, noise, values, warming=warming)
        self.average.update_parameters(self.model)
        self.step_index += 1
        if not due:
            self.seconds += time.perf_counter() - started
            return None
        numbers = {name: value.item() for name, value in {**record, **fakes}.items()}
        self.seconds += time.perf_counter() - started
        return {
            "step": self.step_index,
            "samples_seen": self.step_index * config.batch_size,
            "seconds": round(self.seconds, 3),
            "phase": "warmup" if warming else "train",
            "lr": lr,
            **numbers,
            **self.controller.plain(),
        }

    @torch.no_grad()
    def _fakes(self, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        """The KLs of fakes in steps that make none, for the log."""
        self.model.eval()  # a look must not move the statistics of a batch normalisation
        z = self.model.encode(x).sample(noise.real)
        fakes = {"kl_reconstruction": z, "kl_sample": noise.prior}
        kls = {name: self.model.encode(self.model.decode(z)).kl().mean() for name, z in fakes.items()}
        self.model.train()
        return kls

    def _log(self, run: Run, log: Any, row: dict[str, Any], bar: Any) -> None:
        if not all(math.isfinite(value) for value in row.values() if isinstance(value, float)):
            raise self._diverged(run, "the losses are")
        log.write(json.dumps(row) + "\n")
        log.flush()
        shown = {"rec": "rec", "kl_real": "KL(real)", "kl_reconstruction": "KL(rec)", "kl_sample": "KL(sample)"}
        bar.set_postfix({title: f"{row[name]:.3g}" for name, title in shown.items()}, refresh=False)

    def _diverged(self, run: Run, what: str) -> DivergedError:
        checkpoints = list_checkpoints(run.checkpoints)
        kept = f" (the last good state is {checkpoints[-1]})" if checkpoints else ""
        return DivergedError(
            f"{what} not finite at step {self.step_index} of {self.steps}{kept}: start a new run with a lower lr, a "
            "longer warm-up or, where the objective has one, a higher beta_neg"
        )

    def _picture(self, run: Run, name: str) -> None:
        preview(self.averaged_model(), self.data, run.images / name)

    def _save(self, run: Run) -> None:
        weights = [*self.model.parameters(), *self.average.parameters()]
        if not bool(torch.stack([weight.isfinite().all() for weight in weights]).all()):
            raise self._diverged(run, "the weights are")
        save_checkpoint(run.checkpoints, self.step_index, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as tensors and plain values."""
        return {
            "players": self.step.state_dict(),
            "average": self.average.state_dict(),
            "controller": self.controller.state_dict(),
            "batches": self.batches.state_dict(),
            "noise": self.noise.get_state(),
            "seconds": self.seconds,
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
            self.batches.load_state_dict(state["batches"])
            self.noise.set_state(state["noise"].cpu())
            self.step_index, self.seconds = state["step"], state["seconds"]
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if str(path) in str(error):  # from check_state: it says all there is to say
                raise
            raise CheckpointError(f"{path} does not fit this run ({error}): remove it or start the run anew") from error


def _preparation(data: Data) -> dict[str, Any]:
    """What later commands must do to their data, and how to know the run's own again, for the model's config."""
    if not isinstance(data, ArrayData):
        return {}
    found: dict[str, Any] = {"fingerprint": data.fingerprint()}
    if data.preparation is not None:
        found["preparation"] = data.preparation.to_dict()
    return found


def resolve(config: FitConfig, data: Data) -> FitConfig:
    """Fill in what was left to be chosen: steps, latent_dim.

    Raises:
        ConfigError: a batch larger than the data, epochs of endless data, a kernel that does not fit the latents.
    """
    from introvae.networks import network_for

    steps = config.steps
    if config.epochs is not None:
        if not isinstance(data, ArrayData):
            raise ConfigError(f"{data.name} is endless and has no epochs: give steps")
        steps = max(1, round(config.epochs * data.steps_per_epoch(config.batch_size)))
    elif isinstance(data, ArrayData):
        data.steps_per_epoch(config.batch_size)
    steps = steps or DEFAULT_STEPS
    warmup = config.warmup.resolved(steps)
    if warmup.steps >= steps and config.objective.adversarial:
        raise ConfigError(f"warmup.steps {warmup.steps} leaves nothing of the {steps} steps: lower it")
    latent_dim = config.latent_dim
    if latent_dim is None:
        small = len(data.shape) == 3 and data.shape[0] == 1 and data.shape[1] <= 32
        latent_dim = data.shape[0] if len(data.shape) == 1 else 32 if small else 128
    objective = config.objective.fitted(math.prod(data.shape))
    objective.check(latent_dim, config.batch_size)
    network = network_for(data.shape) if config.network == "auto" else config.network
    return dataclasses.replace(
        config, objective=objective, steps=steps, epochs=None, warmup=warmup, latent_dim=latent_dim, network=network
    )


def pick_device(name: str) -> torch.device:
    """The device that "auto" or a name stands for.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}): choose auto or cpu") from error
    return device


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a termination signal sets, so that no step is cut in two; a second one interrupts."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(signum: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
