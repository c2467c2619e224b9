"""Steps between two lines of the log never make the host wait for the device, and reuse the memory they free."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from introvae import VAE, ASIntroVAE, FitConfig, IntroVAE, Objective, SoftIntroVAE, Warmup
from introvae.machine import keep_freed_memory
from introvae.training.feed import Inputs
from introvae.training.loop import Trainer

WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"),
    "lift_fresh",
}
"""Operations whose result (a number, or a shape that depends on values) the host must wait for; the last makes a tensor
of a number, and to a GPU that too is a copy that is waited for."""
COPYING = {"tolist", "numpy", "__array__", "cpu"}
"""Methods that bring values to the host without such an operation."""

OBJECTIVES: dict[str, Objective] = {
    "vae": VAE(),
    "introvae": IntroVAE(margin=5.0),
    "soft": SoftIntroVAE(beta_neg=8.0),
    "soft-gamma": SoftIntroVAE(beta_neg=8.0, gamma_r=0.1),
    "as": ASIntroVAE(beta_neg=8.0),
    "as-official": ASIntroVAE(beta_neg=8.0, variant="official_code", contrast="real-sample"),
}
STEPS = 12


class Copies(TorchFunctionMode):
    """Notes the calls of `COPYING`."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in COPYING:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class Spy(TorchDispatchMode):
    """Counts the operations that reach a device, and the copies to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.copies = Copies(self.seen)

    def __enter__(self) -> Spy:
        self.copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.copies.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_") and torch.bool in [getattr(t, "dtype", None) for t in args[1]]:
            name = "nonzero"  # which a mask's indices are
        self.seen[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waiting(self) -> dict[str, int]:
        return {name: count for name, count in self.seen.items() if name in WAITING | COPYING}


def trainer(objective: Objective, **settings: Any) -> Trainer:
    base: dict[str, Any] = {"data": "digits", "network": "tiny-conv", "batch_size": 8, "log_every": 500, "ema": 0.9}
    base |= {"steps": 1000, "device": "cpu", "lr_schedule": "cosine", "lr_warmup": 3, "warmup": Warmup(4)}
    return Trainer(FitConfig(objective=objective, **{**base, **settings}))


def spied(made: Trainer) -> list[Spy]:
    """The operations of each of the next steps; inputs are made before it."""
    given: list[Inputs] = [made.feed.next() for _ in range(STEPS)]
    made.feed.next = given.pop
    spies = []
    for _ in range(STEPS):
        with Spy() as spy:
            assert not made._one_step()
        spies.append(spy)
    return spies


@pytest.mark.parametrize(
    "see",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x.clone()),
        lambda x: x.unique(),
        lambda x: x.new_tensor(3.0),
    ],
)
def test_the_spy_sees_who_waits(see: Callable[[torch.Tensor], Any]) -> None:
    with Spy() as spy:
        see(torch.ones(3) * 2)
    assert spy.waiting, spy.seen
    with Spy() as spy:
        torch.ones(3).mul_(2).detach().clone().to(torch.float64)
    assert not spy.waiting
    assert spy.seen["mul_"] == 1


def test_the_spy_sees_a_number_that_is_read_in_a_backward_pass() -> None:
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda grad: grad * grad.sum().item())
    loss = x.sum()
    with Spy() as spy:
        loss.backward()
    assert spy.waiting == {"_local_scalar_dense": 1}


@pytest.mark.parametrize("case", list(OBJECTIVES))
def test_steps_without_a_line_in_the_log_do_not_wait(case: str) -> None:
    """With warm-up, annealing, rates that change and the average: all that a step may do."""
    spies = spied(trainer(OBJECTIVES[case]))
    for index, spy in enumerate(spies):
        assert not spy.waiting, f"step {index}: {spy.waiting}"
        assert spy.seen["convolution"] > 0
        assert spy.seen["_fused_adam_"] == 2
    # After the first step, which makes Adam's moments, and the second, whose average moves, all are alike.
    assert spies[2].seen == spies[3].seen
    assert spies[-2].seen == spies[-1].seen


@pytest.mark.parametrize(
    "settings",
    [
        {"network_options": {"norm": "batch"}},
        {"network_options": {"norm": "group", "coarse": 4, "upsample": "bilinear"}},
        {"precision": "bf16"},
        {"gradient_checkpointing": True},
        {"data": "density:8gaussians", "network": "tiny-mlp"},
        {"network": "mlp"},
    ],
    ids=str,
)
def test_nor_do_they_with_other_networks_and_formats(settings: dict[str, Any]) -> None:
    for spy in spied(trainer(SoftIntroVAE(beta_neg=8.0), **settings)):
        assert not spy.waiting
        assert len(spy.seen) > 10


def test_nor_where_annealing_ends_and_the_objective_changes_hands() -> None:
    made = trainer(ASIntroVAE(beta_neg=8.0), steps=20, log_every=50, warmup=Warmup(2))
    spies = spied(made)
    assert isinstance(made.step.objective, SoftIntroVAE)
    assert not any(spy.waiting for spy in spies)


def test_the_feed_s_mirrored_images_do_not_wait_either() -> None:
    made = trainer(VAE(), flip=True)
    with Spy() as spy:
        for _ in range(STEPS):
            made.feed.next()
    assert spy.seen["where"] == STEPS
    assert not spy.waiting


@pytest.mark.parametrize("warming", [True, False])
def test_a_line_in_the_log_costs_one_reading(warming: bool) -> None:
    made = trainer(SoftIntroVAE(beta_neg=8.0), log_every=1, warmup=Warmup(STEPS if warming else 0))
    given = [made.feed.next() for _ in range(3)]
    made.feed.next = given.pop
    with Spy() as spy:
        for _ in range(3):
            assert made._one_step()
    assert not spy.waiting  # the numbers are on their way
    rows = list(made.readback.rows())
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {row["phase"] for row in rows} == {"warmup" if warming else "train"}
    assert {"kl_reconstruction", "kl_sample", "rec"} <= rows[0].keys()


@pytest.mark.parametrize("objective", [VAE(), SoftIntroVAE(beta_neg=8.0)], ids=["vae", "warming"])
def test_fakes_are_made_for_the_log_only_where_there_is_a_line(objective: Objective) -> None:
    made = trainer(objective, log_every=3, warmup=Warmup(STEPS))
    calls: list[int] = []
    made.model.encoder.register_forward_hook(lambda *_: calls.append(made.step_index))
    due = [made._one_step() for _ in range(6)]
    assert due == [False, False, True] * 2
    assert [calls.count(step) for step in range(6)] == [1, 1, 4] * 2  # the real batch once more, and two of fakes


# --- memory


def touch(megabytes: int) -> float:
    return float(torch.ones(megabytes * 2**18).sum())


def test_kept_memory_changes_no_value_and_may_be_nested() -> None:
    x = torch.arange(2**20, dtype=torch.float32)
    before = x.clone()
    with keep_freed_memory():
        inside = x * 2
        assert touch(48) == 48 * 2**18
        with keep_freed_memory():
            assert touch(48) == 48 * 2**18
        assert touch(48) == 48 * 2**18
        assert torch.equal(inside, before * 2)
    assert torch.equal(x, before)
    assert torch.equal(inside, before * 2)
    assert touch(96) == 96 * 2**18


class Library:
    """A C library that notes what it is told."""

    def __init__(self) -> None:
        self.told: dict[int, int] = {}
        self.trimmed = 0

    def mallopt(self, parameter: int, value: int) -> int:
        self.told[parameter] = value
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.trimmed += 1
        return 1


def test_what_glibc_is_told_is_taken_back_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    with keep_freed_memory():
        assert library.told == {-4: 0, -1: 2**31 - 1}
        assert library.trimmed == 0
    taken_back = {-4: 65536, -3: 2**25, -1: 2**26}
    assert (library.told, library.trimmed) == (taken_back, 1)
    with pytest.raises(KeyError), keep_freed_memory():
        raise KeyError
    assert (library.told, library.trimmed) == (taken_back, 2)


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: Any) -> Any:
        raise OSError("no such library")

    def unknown(name: Any) -> Any:
        raise TypeError("bad argument")  # as on Windows

    for library in (lambda name: object(), absent, unknown):
        monkeypatch.setattr(ctypes, "CDLL", library)
        with keep_freed_memory():
            assert touch(1) == 2**18
        with pytest.raises(KeyError), keep_freed_memory():
            raise KeyError
