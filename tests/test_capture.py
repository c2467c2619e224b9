"""A captured step is the plain one, whatever changes from step to step.

On the CPU a stand-in takes the place of CUDA's graphs: it makes the calls anew when played, as a graph would, on the
tensors it was recorded with.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from introvae import (
    VAE,
    ASIntroVAE,
    ConfigError,
    IntrospectiveStep,
    IntrospectiveVAE,
    IntroVAE,
    Noise,
    Objective,
    SoftIntroVAE,
    Warmup,
)
from introvae.capture import EAGER_STEPS, MAX_GRAPHS, CapturedStep, Record
from introvae.objectives import Values
from introvae.parallel import Alone
from test_runs import assert_same

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SOFT: dict[str, Any] = {"beta_rec": 0.7, "beta_kl": 0.4, "beta_neg": 1.9}
AS = ASIntroVAE(**SOFT)
OBJECTIVES: dict[str, Objective] = {
    "vae": VAE(beta_kl=0.5),
    "introvae": IntroVAE(beta=0.6, margin=2.0),
    "soft": SoftIntroVAE(**SOFT),
    "as": ASIntroVAE(**SOFT, contrast="real-sample"),
}
STEPS = 15
NETWORKS: dict[str, tuple[tuple[int, ...], str]] = {"mlp": ((2,), "tiny-mlp"), "conv": ((1, 8, 8), "tiny-conv")}


class Recorder:
    """Stands in for the recording of a CUDA graph."""

    def __init__(self) -> None:
        self.captures = self.plays = 0

    def __call__(self, run: Callable[[], Record]) -> tuple[Callable[[], None], Record]:
        self.captures += 1
        record: Record = {}

        def play() -> None:
            self.plays += 1
            for name, value in run().items():
                if name in record:
                    record[name].copy_(value)
                else:
                    record[name] = value.clone()

        return play, record


class Pair(Alone):
    """Two processes that never speak."""

    count = 2


def step_of(objective: Objective, network: str = "mlp", device: str = "cpu", **settings: Any) -> IntrospectiveStep:
    torch.manual_seed(0)
    shape, name = NETWORKS[network]
    model = IntrospectiveVAE.build(shape, name, 3).to(device)
    settings = {"lr": 1e-3, "warmup": Warmup(1, 0.8, 0.3), "capturable": True, **settings}
    return IntrospectiveStep(model, objective, **settings)


def batch(index: int, n: int = 4, network: str = "mlp") -> tuple[Tensor, Noise]:
    generator = torch.Generator().manual_seed(index)
    return torch.rand(n, *NETWORKS[network][0], generator=generator), Noise.draw(n, 3, generator)


def values_of(objective: Objective, factor: float = 1.0, progress: float = 0.06) -> dict[str, Tensor]:
    return {name: torch.tensor(factor * value) for name, value in objective.values(progress).items()}


class Both:
    """A captured and a plain step, taken together and compared after each."""

    def __init__(self, objective: Objective, network: str = "mlp", **settings: Any) -> None:
        self.recorder = Recorder()
        self.plain = step_of(objective, network, **settings)
        self.captured = CapturedStep(step_of(objective, network, **settings), capture=self.recorder)
        self.network, self.index = network, 0

    def __call__(self, n: int = 4, values: Values | None = None, *, warming: bool = False) -> Record:
        x, noise = batch(self.index, n, self.network)
        kept = [x.clone(), *(draws.clone() for draws in noise[:4])]
        ours = self.captured(x, noise, values, warming=warming)
        assert_same([x, *noise[:4]], kept, "inputs")
        theirs = self.plain(x, noise, values, warming=warming)
        assert_same(ours, theirs, "record")
        assert_same(self.captured.state_dict(), self.plain.state_dict())
        self.index += 1
        return ours

    def set_lr(self, lr: float) -> None:
        self.plain.set_lr(lr)
        self.captured.set_lr(lr)

    def set_objective(self, objective: Objective) -> None:
        self.plain.objective = self.captured.objective = objective
        assert self.captured.objective is objective


# --- equal to the plain step


@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_equal_bit_for_bit(name: str, network: str) -> None:
    both = Both(OBJECTIVES[name], network)
    records = [both().copy() for _ in range(STEPS)]
    assert len({value["rec"].data_ptr() for value in records[EAGER_STEPS:]}) == 1  # the graph's own
    assert (both.recorder.captures, both.recorder.plays) == (1, STEPS - EAGER_STEPS)


def test_equal_where_values_are_left_to_the_objective_and_noise_to_torch() -> None:
    both = Both(OBJECTIVES["soft"])
    for _ in range(STEPS):
        both()
    finals = []
    for step in (both.captured, both.plain):
        torch.manual_seed(5)
        for index in range(2):
            step(batch(index)[0])
        finals.append(step.state_dict())
    assert_same(*finals)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_equal_with_all_that_changes_in_a_run(name: str, precision: str) -> None:
    """Warm-up, batch size, rate and values, of which the same tensors are filled anew, as the controller does."""
    objective = OBJECTIVES[name]
    both = Both(objective, "conv", precision=precision)
    values = values_of(objective)
    for index in range(2 * STEPS):
        both.set_lr(1e-3 * (1 + index % 5) / 5)
        for value in values.values():
            value.mul_(1.01)
        both(4 + index % 2, values, warming=index < 12)
    assert both.recorder.captures == 4  # two sizes, warming and not
    assert both.recorder.plays == 2 * STEPS - 4 * EAGER_STEPS


def test_the_rate_and_the_values_really_reach_what_was_recorded() -> None:
    both = Both(AS)
    values = values_of(AS)
    for _ in range(STEPS):
        both(values=values)
    before = copy.deepcopy(both.captured.state_dict()["model"])
    both.set_lr(1e-30)
    both(values=values)
    assert_same(both.captured.state_dict()["model"], before)
    losses = []
    for factor in (1.0, 3.0, 1.0):
        both.index = 0
        losses.append(both(values=values_of(AS, factor))["loss_encoder"].item())
    assert losses[0] == losses[2] != losses[1]


def test_equal_when_one_objective_hands_over_to_another() -> None:
    both = Both(AS)
    kinds = []
    for index in range(2 * STEPS):
        progress = index / (2 * STEPS)
        objective = AS.at(progress)
        kinds.append(type(objective))
        both.set_objective(objective)
        both(values=values_of(AS, progress=progress))
    assert set(kinds) == {ASIntroVAE, SoftIntroVAE}
    assert both.recorder.captures == 2
    assert both.recorder.plays == 2 * STEPS - 2 * EAGER_STEPS


def test_the_step_before_its_recording_is_an_ordinary_one() -> None:
    both = Both(OBJECTIVES["soft"])
    for done in range(1, EAGER_STEPS + 3):
        both()
        assert both.recorder.captures == (done > EAGER_STEPS)
        assert both.recorder.plays == max(0, done - EAGER_STEPS)


def test_what_was_given_is_not_written_to_later() -> None:
    step, given = CapturedStep(step_of(OBJECTIVES["soft"]), capture=Recorder()), []
    for index in range(STEPS):
        x, noise = batch(index)
        values = values_of(OBJECTIVES["soft"], 1 + 0.1 * index)
        given.append([x, *noise, *values.values()])
        step(x, noise, values)
    for index, found in enumerate(given):
        x, noise = batch(index)
        assert_same(found, [x, *noise, *values_of(OBJECTIVES["soft"], 1 + 0.1 * index).values()])


def test_every_kind_is_recorded_once() -> None:
    both = Both(OBJECTIVES["soft"])
    for index in range(4 * (EAGER_STEPS + 2)):
        both(n=3 + index % 2, warming=index // 2 % 2 == 0)
    assert both.recorder.captures == 4
    for objective in (SoftIntroVAE(**SOFT), SoftIntroVAE(**SOFT, gamma_r=1.0)):  # the first is the old one, made anew
        both.set_objective(objective)
        for _ in range(EAGER_STEPS + 1):
            both()
    assert both.recorder.captures == 5


def test_more_kinds_than_can_be_kept_go_on_as_they_come() -> None:
    both = Both(VAE())
    sizes = range(2, MAX_GRAPHS + 4)
    for _ in range(EAGER_STEPS + 3):
        for n in sizes:
            both(n)
    assert both.recorder.captures == MAX_GRAPHS
    assert both.recorder.plays == 3 * MAX_GRAPHS


# --- where it cannot be


@pytest.mark.parametrize("message", ["operation not permitted\nwhen stream is capturing", ""])
def test_a_failed_recording_is_said_once_and_does_no_harm(caplog: pytest.LogCaptureFixture, message: str) -> None:
    class Failing(Recorder):
        def __call__(self, run: Callable[[], Record]) -> tuple[Callable[[], None], Record]:
            self.captures += 1
            for p in both.captured.step.model.parameters():  # what a half-recorded step leaves
                p.grad = torch.full_like(p, torch.nan)
            raise RuntimeError(message)

    both = Both(OBJECTIVES["soft"])
    both.recorder = Failing()
    both.captured = CapturedStep(step_of(OBJECTIVES["soft"]), capture=both.recorder)
    with caplog.at_level(logging.INFO, logger="introvae"):
        for index in range(2 * STEPS):
            both(n=4 + index % 2)
    assert both.recorder.captures == 1
    (said,) = [record.getMessage() for record in caplog.records if record.name == "introvae"]
    assert (
        said
        == f"CUDA graphs cannot record this step ({message.split(chr(10))[0] or 'RuntimeError'}): it goes on without"
    )


def test_other_errors_of_a_recording_are_raised() -> None:
    def broken(run: Callable[[], Record]) -> tuple[Callable[[], None], Record]:
        raise ZeroDivisionError

    step = CapturedStep(step_of(VAE()), capture=broken)
    for _ in range(EAGER_STEPS):
        step(*batch(0))
    with pytest.raises(ZeroDivisionError):
        step(*batch(0))


def test_loading_a_state_forgets_what_was_recorded() -> None:
    both = Both(OBJECTIVES["soft"])
    for _ in range(EAGER_STEPS + 2):
        both()
    state = copy.deepcopy(both.captured.state_dict())
    for _ in range(3):
        both()
    assert (both.recorder.captures, both.recorder.plays) == (1, 5)
    for step in (both.captured, both.plain):
        step.load_state_dict(copy.deepcopy(state))
    assert_same(both.captured.state_dict(), state)
    for _ in range(EAGER_STEPS):
        both()
    assert (both.recorder.captures, both.recorder.plays) == (1, 5)
    both.set_lr(5e-4)
    for _ in range(STEPS):
        both()
    assert (both.recorder.captures, both.recorder.plays) == (2, 5 + STEPS)


def test_a_state_crosses_between_captured_and_ordinary_steps() -> None:
    """A resumed run may compute in another way."""
    captured = CapturedStep(step_of(OBJECTIVES["soft"]), capture=Recorder())
    for index in range(STEPS):
        captured(*batch(index))
    plain = step_of(OBJECTIVES["soft"], capturable=False)
    plain.load_state_dict(copy.deepcopy(captured.state_dict()))
    plain.set_lr(2e-3)
    captured.set_lr(2e-3)
    for index in range(3):
        ours, theirs = captured(*batch(index)), plain(*batch(index))
        assert ours["rec"].item() == pytest.approx(theirs["rec"].item(), rel=1e-6)
    back = step_of(OBJECTIVES["soft"])
    back.load_state_dict(copy.deepcopy(plain.state_dict()))
    back.set_lr(2e-3)
    for index in range(3):
        ours, theirs = back(*batch(index)), plain(*batch(index))
        assert ours["rec"].item() == pytest.approx(theirs["rec"].item(), rel=1e-6)


def test_refused_without_a_gpu_and_with_several_processes() -> None:
    with pytest.raises(ConfigError, match="CUDA graphs need an NVIDIA GPU, the model is on cpu: take compile none"):
        CapturedStep(step_of(VAE()))
    with pytest.raises(ConfigError, match="recorded in a single process: take compile none for several"):
        CapturedStep(step_of(VAE(), peers=Pair()), capture=Recorder())


# --- on a GPU


def to_cuda(index: int, n: int, network: str) -> tuple[Tensor, Noise]:
    x, noise = batch(index, n, network)
    return x.cuda(), noise.map(Tensor.cuda)


@gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_gpu_s_graph_equals_its_eager_steps(caplog, name: str, network: str, precision: str) -> None:
    objective, settings = OBJECTIVES[name], {"device": "cuda", "precision": precision}
    plain = step_of(objective, network, **settings)
    captured = CapturedStep(step_of(objective, network, **settings))
    values = {name: value.cuda() for name, value in values_of(objective).items()}
    with caplog.at_level(logging.INFO, logger="introvae"):
        for index in range(20):
            for step in (plain, captured):
                step.set_lr(1e-5 * (1 + index % 3))
            x, noise = to_cuda(index, 8, network)
            ours = captured(x, noise, values, warming=index < 8)
            theirs = plain(x, noise, values, warming=index < 8)
            for value in values.values():
                value.mul_(1.01)
            for key, value in theirs.items():
                assert ours[key].item() == pytest.approx(value.item(), rel=1e-2 if precision == "bf16" else 1e-4), key
    assert not caplog.records, "it was not recorded"
    assert all(kind.play is not None for kind in captured._kinds.values())
    assert len(captured._kinds) == 2
    for a, b in zip(captured.step.model.parameters(), plain.model.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-4


@gpu
def test_a_gpu_s_step_goes_on_after_a_state_was_loaded() -> None:
    steps = [
        step_of(OBJECTIVES["soft"], device="cuda", capturable=False),
        CapturedStep(step_of(OBJECTIVES["soft"], device="cuda")),
    ]
    for index in range(6):
        for step in steps:
            step(*to_cuda(index, 8, "mlp"))
    state = copy.deepcopy(steps[0].state_dict())
    for step in steps:
        step.load_state_dict(copy.deepcopy(state))
        for index in range(10):
            step(*to_cuda(index, 8, "mlp"))
    models = [step.state_dict()["model"] for step in steps]
    for name, value in models[0].items():
        assert (models[1][name] - value).abs().max() <= 1e-4, name


@gpu
def test_recording_and_the_pinning_of_other_threads_leave_each_other_alone(caplog) -> None:
    """The feed's thread pins the next batches while a step is recorded."""
    step = CapturedStep(step_of(OBJECTIVES["soft"], device="cuda"))
    done, errors = threading.Event(), []

    def pin() -> None:
        n = 0
        while not done.is_set():
            n += 1
            try:
                torch.empty(1 + n % 1000, 1000).pin_memory()
            except RuntimeError as error:
                errors.append(error)

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        with caplog.at_level(logging.INFO, logger="introvae"):
            for index in range(MAX_GRAPHS * (EAGER_STEPS + 2)):
                step(*to_cuda(index, 2 + index % MAX_GRAPHS, "mlp"))
    finally:
        done.set()
        thread.join()
    assert not errors
    assert not caplog.records


@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("kind", ["eager", "captured"])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_gpu_s_steps_do_not_wait(name: str, kind: str) -> None:
    objective = OBJECTIVES[name]
    step: Any = step_of(objective, "conv", "cuda", capturable=kind == "captured")
    if kind == "captured":
        step = CapturedStep(step)
    values = {name: value.cuda() for name, value in values_of(objective).items()}
    inputs = [to_cuda(index, 8, "conv") for index in range(10)]
    for x, noise in inputs[:5]:  # libraries set up, graph recorded
        step(x, noise, values)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index, (x, noise) in enumerate(inputs[5:]):
            step.set_lr(1e-4 * (1 + index))
            for value in values.values():
                value.fill_(0.3 + 0.01 * index)
            step(x, noise, values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
