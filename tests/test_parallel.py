"""Processes that share every batch train the model that one process trains; they stop, resume and fail together."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from commands import Said, one_line
from introvae import ConfigError, Noise, Run, from_array
from introvae.cli import main
from introvae.machine import launched, speaks
from introvae.parallel import Alone, processes
from introvae.training.checkpoint import list_checkpoints
from introvae.training.feed import Feed
from parallel_worker import cases, own_rows, trained
from test_runs import rewound, rows

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DIGITS = [
    *("fit", "--data", "digits", "--recipe", "none", "--network", "tiny-conv", "--batch_size", "16", "--steps", "12"),
    *("--log_every", "4", "--checkpoint_every", "6", "--device", "cpu", "--precision", "float32", "--evaluate"),
]


@contextmanager
def started(*words: object, count: int = 2) -> Iterator[list[subprocess.Popen[str]]]:
    """Python processes as a launcher starts them, or one alone; none outlives the block."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment["OMP_NUM_THREADS"] = "1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        group: list[subprocess.Popen[str]] = []
        for rank in range(count):
            values = (rank, rank, count, count, "127.0.0.1", port)
            own = dict(zip(LAUNCHER, map(str, values), strict=True)) if count > 1 else {}
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, *map(str, words)],
                    env={**environment, **own},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            group.append(process)
        yield group


def ended(group: Sequence[subprocess.Popen[str]], timeout: float = 60) -> list[Said]:
    """The exit status of each process and what it printed."""
    printed = [process.communicate(timeout=timeout) for process in group]
    return [Said(process.returncode, *texts) for process, texts in zip(group, printed, strict=True)]


def assert_refused(found: Sequence[Said]) -> str:
    """All ended with status 2 and, but for those that kept silent, the same clear line; the first one's."""
    line = found[0].err
    assert one_line(line), line
    for rank, said in enumerate(found):
        assert said.err.replace(f"introvae, process {rank}: ", "introvae: ") in (line, ""), said.err
        assert (said.code, said.out) == (2, "")
    return line


def assert_finished(found: Sequence[Said]) -> None:
    """All ended well, and only the first spoke."""
    first, *others = found
    assert (first.code, first.err) == (0, ""), first
    assert first.out
    assert others == [Said(0, "", "")] * len(others)


def stopped_after(terminated: Terminated) -> int:
    """The step that the terminated processes name in their line."""
    line = assert_refused(terminated.said)
    assert "introvae fit --resume" in line
    return int(re.findall(r"stopped after step (\d+) ", line)[0])


# --- two processes


class Fitted(NamedTuple):
    """One command as two processes and as one."""

    two: Run
    one: Run
    said_by_two: list[Said]
    said_by_one: list[Said]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    folder = tmp_path_factory.mktemp("fitted")
    words = ["-m", "introvae", *DIGITS, "--out"]
    with started(*words, folder / "two") as pair, started(*words, folder / "one", count=1) as single:
        return Fitted(Run(folder / "two"), Run(folder / "one"), ended(pair), ended(single))


class Terminated(NamedTuple):
    """A run that two processes were to make, and what they said when they were told to end."""

    folder: Path
    said: list[Said]


STEPS, EVERY = 400, 50


@pytest.fixture(scope="module")
def terminated(tmp_path_factory: pytest.TempPathFactory) -> Terminated:
    """SIGTERM to both after the first line of the log. Nothing is asserted here: other tests need the workers."""
    folder = tmp_path_factory.mktemp("terminated") / "run"
    words = "--recipe none --quiet --data density:8gaussians --network tiny-mlp --batch_size 32 --checkpoint_every 0"
    words += f" --steps {STEPS} --log_every {EVERY} --device cpu --precision float32 --out {folder}"
    with started("-m", "introvae", "fit", *words.split()) as pair:
        deadline = time.monotonic() + 60
        while not rows(folder) and all(process.poll() is None for process in pair) and time.monotonic() < deadline:
            time.sleep(0.002)
        for process in pair:
            process.send_signal(signal.SIGTERM)
        return Terminated(folder, ended(pair))


class Workers(NamedTuple):
    """What both of parallel_worker's processes saw, and the folder that they saw it in."""

    folder: Path
    printed: list[Said]
    found: list[dict[str, Any]]

    def said(self, command: str) -> list[Said]:
        return [Said(*found["said"][command]) for found in self.found]


@pytest.fixture(scope="module")
def workers(fitted: Fitted, terminated: Terminated, tmp_path_factory: pytest.TempPathFactory) -> Workers:
    folder = tmp_path_factory.mktemp("workers")
    rewound(fitted.one, folder / "one", checkpoint=-2)
    if terminated.folder.is_dir():
        shutil.copytree(terminated.folder, folder / "terminated")
    with started(Path(__file__).parent / "parallel_worker.py", folder) as pair:
        printed = ended(pair, timeout=300)  # all cases, on what is left of the cores
    assert [said.code for said in printed] == [0, 0], printed
    return Workers(folder, printed, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)])


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two weights, relative to the largest weight of their tensor."""
    assert list(ours) == list(theirs)
    assert all(weight.isfinite().all() for weight in ours.values())
    largest = {name: weight.abs().max().clamp(min=torch.finfo(weight.dtype).tiny) for name, weight in theirs.items()}
    return max(float((ours[name] - theirs[name]).abs().max() / largest[name]) for name in ours)


# --- the step


@pytest.mark.parametrize("name", [name for name in cases() if name != "uncoupled"])
def test_two_processes_train_the_model_that_one_trains(workers: Workers, name: str) -> None:
    (ours, record), (others, other_record) = (found["trained"][name] for found in workers.found)
    assert record == other_record
    assert all(torch.equal(ours[weight], others[weight]) for weight in ours)
    theirs, expected = trained(cases()[name], Alone())
    assert all(weight.dtype == torch.float64 for weight in theirs.values())
    assert difference(ours, theirs) < 1e-10
    assert record == pytest.approx(expected, rel=1e-10)


def test_without_gathering_a_loss_over_the_whole_batch_would_train_another_model(workers: Workers) -> None:
    ours, others = (found["trained"]["uncoupled"][0] for found in workers.found)
    assert all(torch.equal(ours[weight], others[weight]) for weight in ours)
    alone = trained(cases()["uncoupled"], Alone())[0]
    assert difference(alone, trained(cases()["as-mlp"], Alone())[0]) == 0
    assert difference(ours, alone) > 1e-8


def test_training_leaves_nothing_to_say(workers: Workers) -> None:
    assert [(said.out, said.err) for said in workers.printed] == [("", ""), ("", "")]


# --- what processes exchange


def test_processes_know_themselves(workers: Workers) -> None:
    for rank, found in enumerate(workers.found):
        seen = found["exchanged"]
        assert (seen["index"], seen["count"], seen["first"]) == (rank, 2, rank == 0)
        assert torch.device(seen["device"]).type == "cpu"


def test_rows_are_shared_out(workers: Workers) -> None:
    assert [found["exchanged"]["rows"] for found in workers.found] == [[0, 3], [3, 6]]
    for found in workers.found:
        assert "batch_size 7 is no multiple of the 2 processes" in found["exchanged"]["refused"]


def test_averages_are_means_over_the_processes_in_place(workers: Workers) -> None:
    expected = [torch.tensor(2.0), torch.ones(3, 2), torch.tensor([1.0, 2.5])]
    for found in workers.found:
        averaged = found["exchanged"]["averaged"]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(averaged, expected, strict=True))


def test_gathered_rows_are_in_order_and_their_gradients_come_back_from_all_losses(workers: Workers) -> None:
    whole = torch.cat([own_rows(rank).detach() for rank in (0, 1)])
    for rank, found in enumerate(workers.found):
        seen, local = found["exchanged"], 2 * own_rows(rank).detach()
        assert torch.equal(seen["gathered"], whole)
        assert torch.equal(seen["gradient"], 2 * local)
        assert torch.equal(seen["gradient of unlike losses"], (1 + 2) * local)


def test_one_flag_is_enough(workers: Workers) -> None:
    assert [found["exchanged"]["any"] for found in workers.found] == [[False, True, True, True]] * 2


def test_all_are_told_what_the_first_has(workers: Workers) -> None:
    assert [found["exchanged"]["told"] for found in workers.found] == [[{"rank": 0, "none": None}, "run-0"]] * 2


def test_the_first_waits_for_the_last(workers: Workers) -> None:
    assert all(found["exchanged"]["waited"] for found in workers.found)


def test_all_get_the_weights_and_buffers_of_the_first(workers: Workers) -> None:
    first, second = (found["exchanged"]["copied"] for found in workers.found)
    assert any(value.ndim == 4 and value.shape[1] > 1 for value in first["before"].values())
    for name, value in first["before"].items():
        assert torch.equal(first["after"][name], value), name
        assert torch.equal(second["after"][name], value), name
    assert not torch.equal(second["before"]["encoder.stem.weight"], first["before"]["encoder.stem.weight"])
    assert int(second["before"]["encoder.norm.num_batches_tracked"]) == 4


def test_a_process_alone_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = processes("cpu")
    assert type(alone) is Alone
    assert (alone.index, alone.count, alone.first) == (0, 1, True)
    assert [alone.rows(n) for n in (1, 7)] == [slice(0, 1), slice(0, 7)]
    x = own_rows(1)
    alone.average([x])
    assert torch.equal(x, own_rows(1))
    assert alone.gather(x) is x
    assert [alone.any(flag, torch.device("cpu")) for flag in (False, True)] == [False, True]
    told = object()
    assert alone.tell(told) is told
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    alone.copy_first(module)
    alone.wait()
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize(
    ("world_size", "rank", "several", "first"),
    [(None, None, False, True), ("", "", False, True), ("1", "0", False, True), ("2", "0", True, True),
     ("2", "1", True, False), ("16", "10", True, False)],
)  # fmt: skip
def test_a_launcher_is_known_by_its_environment(
    monkeypatch: pytest.MonkeyPatch, world_size: str | None, rank: str | None, several: bool, first: bool
) -> None:
    for name, value in (("WORLD_SIZE", world_size), ("RANK", rank)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    for name in ("LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert (launched(), speaks()) == (False, True)  # a batch system says how many, and starts one
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert (launched(), speaks()) == (several, first)


def three() -> list[Alone]:
    """The three of a group, as far as they need no exchange."""
    group = [Alone() for _ in range(3)]
    for index, peers in enumerate(group):
        peers.index, peers.count = index, 3
    return group


def test_shares_cover_the_batch_once() -> None:
    whole = torch.arange(12)
    assert torch.equal(torch.cat([whole[peers.rows(12)] for peers in three()]), whole)
    assert [peers.first for peers in three()] == [True, False, False]


@pytest.mark.parametrize("n", [1, 10, 11])
def test_a_batch_that_cannot_be_shared_out_is_refused(n: int) -> None:
    for peers in three():
        with pytest.raises(ConfigError, match=f"batch_size {n} is no multiple of the 3 processes") as caught:
            peers.rows(n)
        advised = [int(number) for number in re.findall(r"\d+", str(caught.value).split("take")[1])]
        assert advised[-1] > n
        assert all(peers.rows(number) for number in advised)


def test_the_noise_of_the_shares_is_that_of_the_whole() -> None:
    whole = Noise.draw(6, 2, torch.Generator().manual_seed(0))
    shares = [whole.rows(peers.rows(6)) for peers in three()]
    for name in ("real", "prior"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name))
    for name in ("fakes", "again"):  # of reconstructions, then of samples, in each share
        pairs = [getattr(share, name).chunk(2) for share in shares]
        of_reconstructions, of_samples = (torch.cat([pair[half] for pair in pairs]) for half in (0, 1))
        assert torch.equal(torch.cat([of_reconstructions, of_samples]), getattr(whole, name))
    assert len({float(value) for field in whole[:4] for value in field.flatten()}) == 6 * 6 * 2  # no draw twice


def test_the_inputs_of_the_shares_are_those_of_the_whole() -> None:
    data = from_array(np.random.default_rng(0).integers(0, 256, (30, 1, 4, 4), dtype=np.uint8))

    def feed(share: slice) -> Feed:
        return Feed(data.batches(9, seed=1), 2, 3, torch.device("cpu"), share, flip=True)

    whole, shares = feed(slice(0, 9)), [feed(peers.rows(9)) for peers in three()]
    for _ in range(5):  # into the second epoch
        expected, found = whole.next(), [share.next() for share in shares]
        assert torch.equal(torch.cat([inputs.x for inputs in found]), expected.x)
        for inputs, peers in zip(found, three(), strict=True):
            assert all(map(torch.equal, inputs.noise[:4], expected.noise.rows(peers.rows(9))[:4]))


# --- the command


def assert_alike(found: Run, expected: Run) -> None:
    """The same log but for the time that it took, and the same model, to float32's rounding."""
    assert [row["step"] for row in found.log()] == [row["step"] for row in expected.log()] == [4, 8, 12]
    for ours, theirs in zip(found.log(), expected.log(), strict=True):
        assert list(ours) == list(theirs)
        for name in ours.keys() - {"seconds", "seconds_waited"}:
            alike = theirs[name] if isinstance(theirs[name], str) else pytest.approx(theirs[name], rel=1e-5)
            assert ours[name] == alike, name
    assert difference(*(load_file(run.model_folder / "model.safetensors") for run in (found, expected))) < 1e-5
    assert (found.model_folder / "config.json").read_text() == (expected.model_folder / "config.json").read_text()


def test_two_processes_fit_what_one_fits(fitted: Fitted) -> None:
    assert [said.code for said in (*fitted.said_by_two, *fitted.said_by_one)] == [0, 0, 0], fitted
    assert_alike(fitted.two, fitted.one)
    for run, count in ((fitted.two, 2), (fitted.one, 1)):
        (start,) = run.events("start")
        assert (start["step"], start["processes"]) == (0, count)
        assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step_00000006.pt", "step_00000012.pt"]
    files = [{path.relative_to(run.folder) for path in run.folder.rglob("*")} for run in (fitted.two, fitted.one)]
    assert files[0] == files[1]
    mse = [run.report()["metrics"]["mse"]["value"] for run in (fitted.two, fitted.one)]
    assert mse[0] == pytest.approx(mse[1], rel=1e-4)


def test_only_the_first_process_speaks(fitted: Fitted) -> None:
    assert_finished(fitted.said_by_two)
    first, alone = fitted.said_by_two[0], fitted.said_by_one[0]
    names, expected = ([line.split()[0] for line in said.out.splitlines()] for said in (first, alone))
    assert names == expected
    assert f"run      {fitted.two.folder}\n" in first.out


def test_one_process_goes_on_with_what_two_began(fitted: Fitted, tmp_path: Path) -> None:
    resumed = rewound(fitted.two, tmp_path / "run", checkpoint=-2)
    assert main(["fit", "--resume", str(resumed.folder), "--quiet"]) == 0
    assert_alike(resumed, fitted.one)
    assert [(start["step"], start["processes"]) for start in resumed.events("start")] == [(0, 2), (6, 1)]


def test_two_processes_go_on_with_what_one_began(workers: Workers, fitted: Fitted) -> None:
    assert_finished(workers.said("one"))
    resumed = Run(workers.folder / "one")
    assert_alike(resumed, fitted.one)
    assert [(start["step"], start["processes"]) for start in resumed.events("start")] == [(0, 1), (6, 2)]


def test_terminated_processes_save_their_state(terminated: Terminated) -> None:
    stopped = stopped_after(terminated)
    assert EVERY <= stopped < STEPS
    assert list_checkpoints(terminated.folder / "checkpoints")[-1].name == f"step_{stopped:08d}.pt"
    assert not (terminated.folder / "model").exists()


def test_terminated_processes_go_on(terminated: Terminated, workers: Workers) -> None:
    assert_finished(workers.said("terminated"))
    run, before = Run(workers.folder / "terminated"), rows(terminated.folder)
    assert [row["step"] for row in run.log()] == list(range(EVERY, STEPS + 1, EVERY))
    assert run.log()[: len(before)] == before
    starts = [(start["step"], start["processes"]) for start in run.events("start")]
    assert starts == [(0, 2), (stopped_after(terminated), 2)]
    assert run.model().sample(2).isfinite().all()


def test_a_batch_that_the_processes_cannot_share_is_refused(workers: Workers) -> None:
    line = assert_refused(workers.said("batch_size"))
    assert "batch_size 15" in line
    assert line.rstrip().endswith("take 14 or 16")
    assert not (workers.folder / "odd").exists()


def test_batch_normalisation_on_the_cpu_is_refused_with_a_remedy_that_helps(workers: Workers) -> None:
    assert "--network_options.norm pixel" in assert_refused(workers.said("norm"))
    assert_finished(workers.said("remedy"))
    assert (workers.folder / "norm" / "model" / "model.safetensors").is_file()


def test_a_dry_run_is_shown_once(workers: Workers) -> None:
    assert_finished(workers.said("dry_run"))
    assert "encoder: " in workers.said("dry_run")[0].out


def test_only_the_first_process_evaluates(workers: Workers) -> None:
    assert_finished(workers.said("evaluate"))
    assert f"page     {workers.folder / 'norm' / 'report.html'}\n" in workers.said("evaluate")[0].out


@pytest.mark.parametrize(("command", "message"), [("taken", "holds a run already"), ("missing", "none.npy")])
def test_what_only_the_first_process_meets_ends_all_with_one_line(workers: Workers, command: str, message: str) -> None:
    assert message in assert_refused(workers.said(command))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with a GPU, auto gives each process one")
def test_processes_on_a_machine_without_a_gpu_train_together_unasked() -> None:
    with started("-c", "from introvae.parallel import processes; print(processes().count)") as pair:
        assert [said.out.strip() for said in ended(pair)] == ["2", "2"]


def test_processes_that_would_each_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHER, ("0", "0", "2", "2", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("introvae.parallel._peers", lambda cpu: Alone())
    with pytest.raises(ConfigError, match=r"2 processes were launched and each would train alone.*--device cpu"):
        processes()
