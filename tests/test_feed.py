"""What steps are given depends on nothing but the seed; numbers come back in order; the average follows its formula."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from introvae import DataError, IntrospectiveVAE, from_array, load_data
from introvae.data.arrays import ArrayBatches
from introvae.parallel import Alone
from introvae.training.ema import Average
from introvae.training.feed import AHEAD, Batches, Feed, Inputs
from introvae.training.readback import Readback

CPU = torch.device("cpu")
N, STEPS = 6, 9
"""Nine steps of six: three epochs of the 20 images, of which two are left over each time."""


def images() -> ArrayBatches:
    x = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ArrayBatches(x, N, seed=3)


def points() -> Batches:
    return load_data("density:rings").batches(N, seed=3)


def feed(batches: Batches | None = None, rows: slice | None = None, flip: bool = False, seed: int = 7) -> Feed:
    return Feed(batches or images(), 2, seed, CPU, rows or slice(0, N), flip)


def taken(feed: Feed, steps: int = STEPS) -> list[Inputs]:
    return [feed.next() for _ in range(steps)]


def assert_same(found: list[Inputs], expected: list[Inputs]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.noise.augment is b.noise.augment is None
        for ours, theirs in zip((a.x, *a.noise[:4]), (b.x, *b.noise[:4]), strict=True):
            assert ours.dtype == theirs.dtype == torch.float32
            assert torch.equal(ours, theirs)


def others() -> set[threading.Thread]:
    return set(threading.enumerate())


# --- the feed


@pytest.mark.parametrize(("source", "flip"), [(images, False), (images, True), (points, False)])
def test_a_thread_changes_no_input(source: Callable[[], Batches], flip: bool) -> None:
    expected = taken(feed(source(), flip=flip))
    with feed(source(), flip=flip) as threaded:
        assert_same(taken(threaded), expected)
    assert len({one.x.sum().item() for one in expected}) == STEPS


def test_images_arrive_in_0_to_1_and_noise_in_the_shapes_of_a_step() -> None:
    batches = images()
    x, noise, _ = feed().next()
    assert torch.equal(x, batches.stored().float() / 255)
    assert [tuple(draws.shape) for draws in noise[:4]] == [(N, 2), (N, 2), (2 * N, 2), (2 * N, 2)]
    again, draws, _ = feed(seed=8).next()
    assert torch.equal(again, x)
    assert not torch.equal(draws.real, noise.real)


@pytest.mark.parametrize("source", [images, points])
def test_a_state_from_the_midst_goes_on_in_another_feed(source: Callable[[], Batches]) -> None:
    expected = taken(feed(source(), flip=source is images), 2 * STEPS)
    with feed(source(), flip=source is images) as threaded:
        for done in range(1, STEPS):
            assert_same([threaded.next()], expected[done - 1 : done])
            time.sleep(0.002)  # let it read ahead
            state = threaded.state_dict()
            other = feed(source(), flip=source is images, seed=99)
            other.load_state_dict(state)
            assert_same(taken(other), expected[done : done + STEPS])
            assert other.state_dict().keys() == {"batches", "noise"}


def test_a_state_before_the_first_step_is_the_start() -> None:
    expected = taken(feed())
    with feed() as threaded:
        time.sleep(0.01)
        state = threaded.state_dict()
    other = feed(seed=99)
    other.load_state_dict(state)
    assert_same(taken(other), expected)


def test_what_was_read_ahead_is_given_out_after_the_thread_has_ended() -> None:
    expected = taken(feed(), 3 * STEPS)
    one = feed()
    found = []
    for _ in range(3):
        with one:
            found += taken(one, 5)
            time.sleep(0.005)
        found += taken(one, 4)
    assert_same(found, expected)


def test_the_thread_reads_only_a_little_ahead() -> None:
    counted: list[int] = []

    class Counting(ArrayBatches):
        def stored(self, share: slice = slice(None)) -> Tensor:
            counted.append(1)
            return super().stored(share)

    with feed(Counting(images().x, N, seed=3)) as threaded:
        for done in range(3):
            deadline = time.monotonic() + 5
            while len(counted) < done + AHEAD + 1 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)
            assert len(counted) == done + AHEAD + 1  # those that wait, and one in the thread's hand
            threaded.next()


def test_the_thread_ends_with_the_block_even_by_an_error() -> None:
    before = others()
    one = feed()
    with one:
        assert len(others() - before) == 1
        assert (others() - before).pop().daemon
    assert others() == before
    one.next()
    with pytest.raises(KeyError), one:
        raise KeyError
    assert others() == before


def test_other_threads_of_the_host_keep_their_number_of_threads() -> None:
    count = torch.get_num_threads()
    with feed() as threaded:
        taken(threaded)
    assert torch.get_num_threads() == count


class Broken(ArrayBatches):
    """A disk that fails at the fourth batch."""

    broken = True

    def stored(self, share: slice = slice(None)) -> Tensor:
        if self.broken and self.position == 3 * N:
            raise OSError("the disk is gone")
        return super().stored(share)


@pytest.mark.parametrize("threaded", [False, True])
def test_an_error_of_the_data_reaches_the_step(threaded: bool) -> None:
    batches = Broken(images().x.repeat(2, 1, 1, 1)[: 4 * N], N, seed=3)
    expected = taken(feed(ArrayBatches(batches.x, N, seed=3)), 4)
    before, one = others(), feed(batches)
    with one if threaded else nullcontext():
        assert_same(taken(one, 3), expected[:3])
        with pytest.raises(OSError, match="the disk is gone"):
            one.next()
    assert others() == before
    one.load_state_dict(one.state_dict())
    batches.broken = False
    assert_same([one.next()], expected[3:])


def test_waiting_is_counted() -> None:
    class Slow(ArrayBatches):
        def stored(self, share: slice = slice(None)) -> Tensor:
            time.sleep(0.1)
            return super().stored(share)

    one = feed(Slow(images().x, N, seed=3))
    taken(one, 2)
    assert one.seconds_waited >= 0.2
    before = one.seconds_waited
    with one:
        deadline = time.monotonic() + 10
        while one._ready is not None and not one._ready.full() and time.monotonic() < deadline:
            time.sleep(0.01)
        one.next()
        assert one.seconds_waited - before < 0.1


def test_another_data_set_s_state_is_refused() -> None:
    other = Feed(ArrayBatches(images().x[:19], N, seed=3), 2, 7, CPU, slice(0, N))
    with pytest.raises(DataError, match="the data are not the ones"):
        other.load_state_dict(feed().state_dict())


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("share", [1, 2, 3])
def test_rows_share_a_batch_out(share: int, flip: bool) -> None:
    whole = taken(feed(flip=flip))
    parts = [taken(feed(rows=slice(start, start + share), flip=flip)) for start in range(0, N, share)]
    for index, (x, noise, _) in enumerate(whole):
        given = [part[index] for part in parts]
        assert torch.equal(torch.cat([one.x for one in given]), x)
        for name in ("real", "prior"):
            assert torch.equal(torch.cat([getattr(one.noise, name) for one in given]), getattr(noise, name))
        for name in ("fakes", "again"):  # of reconstructions first, then of samples
            halves = zip(*(getattr(one.noise, name).chunk(2) for one in given), strict=True)
            assert torch.equal(torch.cat([torch.cat(half) for half in halves]), getattr(noise, name))


def mirrored(found: list[Inputs], plain: list[Inputs]) -> Tensor:
    """Which images are mirrored; each must be one or the other."""
    flags = []
    for a, b in zip(found, plain, strict=True):
        for ours, theirs in zip(a.x, b.x, strict=True):
            assert not torch.equal(theirs, theirs.flip(2))
            flags.append(torch.equal(ours, theirs.flip(2)))
            assert flags[-1] or torch.equal(ours, theirs)
    return torch.tensor(flags)


def test_half_of_the_images_are_mirrored_left_to_right_and_the_order_stays() -> None:
    plain, found = taken(feed(), 100), taken(feed(flip=True), 100)
    flags = mirrored(found, plain)
    assert flags.float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 600**0.5)
    assert flags.view(100, N).float().var(dim=1).max() > 0.2  # each image for itself, not whole batches
    assert flags.view(100, N).any(dim=0).all()
    for ours, theirs in zip(found[0].noise[:4], plain[0].noise[:4], strict=True):
        assert torch.equal(ours, theirs)


def test_the_same_images_are_not_mirrored_in_every_epoch() -> None:
    flags = mirrored(taken(feed(flip=True), 60), taken(feed(), 60)).view(20, 18)
    assert len({tuple(row.tolist()) for row in flags}) > 15


# --- the read-back


def record(*values: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=dtype) for name, value in zip("abc", values, strict=False)}


@pytest.mark.parametrize("wait", [False, True])
def test_lines_come_back_in_order_and_once(wait: bool) -> None:
    readback = Readback(Alone())
    assert list(readback.rows(wait)) == []
    for step in range(5):
        readback.put({"step": step}, record(step + 0.5, -step), {"beta": 2.0})
    found = list(readback.rows(wait))
    assert found == [{"step": step, "a": step + 0.5, "b": -step, "beta": 2.0} for step in range(5)]
    assert list(found[0]) == ["step", "a", "b", "beta"]
    assert list(readback.rows(wait)) == []
    readback.put({"step": 5}, record(1.0), {})
    assert list(readback.rows(wait)) == [{"step": 5, "a": 1.0}]


def test_a_line_holds_the_numbers_of_its_step() -> None:
    """A captured step overwrites its record in place."""
    readback, numbers = Readback(Alone()), record(1.0, 2.0)
    readback.put({}, numbers, {})
    for value in numbers.values():
        value.fill_(9.0)
    assert list(readback.rows()) == [{"a": 1.0, "b": 2.0}]


def test_doubles_keep_their_digits_and_graphs_are_let_go() -> None:
    readback = Readback(Alone())
    value = torch.tensor(1 / 3, dtype=torch.float64, requires_grad=True)
    readback.put({}, {"a": value * 3, "b": torch.tensor(float("nan"))}, {})
    assert not readback._waiting[0][2].requires_grad
    (row,) = readback.rows()
    assert row["a"] == 3 * (1 / 3)
    assert row["b"] != row["b"]


def test_numbers_are_means_over_the_processes() -> None:
    class Pair(Alone):
        count = 2

        def average(self, tensors: Iterable[Tensor]) -> None:
            for tensor in tensors:
                tensor.copy_((tensor + torch.tensor([3.0, 5.0])) / 2)

    readback = Readback(Pair())
    readback.put({"step": 1}, record(1.0, 2.0), {"c": 7.0})
    assert list(readback.rows()) == [{"step": 1, "a": 2.0, "b": 3.5, "c": 7.0}]


# --- the average


def networks(norm: str = "batch", count: int = 1) -> list[IntrospectiveVAE]:
    torch.manual_seed(0)
    return [IntrospectiveVAE.build((1, 8, 8), "tiny-conv", 2, norm=norm).double() for _ in range(count)]


def trained(model: nn.Module, generator: torch.Generator) -> None:
    """Move weights and buffers somewhere."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        for buffer in model.buffers():
            buffer.add_(torch.rand(buffer.shape, generator=generator) if buffer.is_floating_point() else 1)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9, 0.999])
def test_the_average_follows_its_formula(decay: float) -> None:
    (model,) = networks()
    average, generator = Average(model, decay), torch.Generator().manual_seed(1)
    expected: dict[str, Tensor] = {}
    for t in range(30):
        trained(model, generator)
        average.update(model)
        d = 0.0 if t == 0 else min(decay, (1 + t) / (10 + t))
        for name, p in model.named_parameters():
            expected[name] = d * expected.get(name, torch.zeros_like(p)) + (1 - d) * p.detach()
        for name, ours in average.model.named_parameters():
            assert ours.dtype == torch.float64
            assert not ours.requires_grad
            assert (ours - expected[name]).abs().max() < 1e-12
            if t == 0 or decay == 0:
                assert torch.equal(ours, dict(model.named_parameters())[name])
        for ours, theirs in zip(average.model.buffers(), model.buffers(), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.data_ptr() != theirs.data_ptr()
    assert average.updates == 30


def test_the_average_before_an_update_is_the_start_and_no_alias() -> None:
    (model,) = networks()
    average = Average(model, 0.9)
    before = [p.clone() for p in model.parameters()]
    trained(model, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(average.model.parameters(), before, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_an_average_s_state_goes_on_bit_for_bit() -> None:
    model, other = networks(count=2)
    generator = torch.Generator().manual_seed(1)
    average, twin = Average(model, 0.9), Average(other, 0.9)
    for _ in range(4):
        trained(model, generator)
        average.update(model)
    state: Mapping[str, Any] = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    assert state["n_averaged"].item() == 4
    assert {name.split(".")[0] for name in state} == {"n_averaged", "module"}
    twin.load_state_dict(state)
    assert twin.updates == 4
    for _ in range(3):
        trained(model, generator)
        average.update(model)
        twin.update(model)
    for ours, theirs in zip(twin.state_dict().values(), average.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_data_reach_a_feed_from_an_array() -> None:
    data = from_array(torch.rand(40, 1, 8, 8))
    x, noise, _ = Feed(data.batches(4, 0), 5, 1, CPU, slice(0, 4)).next()
    assert x.shape == (4, 1, 8, 8)
    assert noise.real.shape == (4, 5)
    assert any(torch.equal(x[0], one) for one in data.train.tensor())
