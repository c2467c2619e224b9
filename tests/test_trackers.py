"""What trackers are told: every line of the log and every picture; what is said where one is missing."""

from __future__ import annotations

import sys
import types
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from commands import Refused
from introvae import ConfigError, FitConfig, MissingExtraError, fit
from introvae.training.run import Run
from introvae.training.trackers import Trackers, plain

SETTINGS: dict[str, Any] = {"data": "digits", "steps": 4, "log_every": 2, "image_every": 3, "batch_size": 8}
SETTINGS |= {"network": "tiny-conv"}


def test_tensorboard_has_the_log_and_the_pictures(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard's own imports
        pytest.importorskip("tensorboard", reason="tensorboard is missing")
        run = fit(**SETTINGS, tracker="tensorboard", out=str(tmp_path / "run"))
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"images": 0})
        found.Reload()
    for name in ("rec", "kl_real", "lr"):
        expected = [(row["step"], row[name]) for row in run.log()]
        assert [(event.step, event.value) for event in found.Scalars(name)] == [
            (step, pytest.approx(value)) for step, value in expected
        ]
    assert "step" not in found.Tags()["scalars"]
    assert [event.step for event in found.Images("images")] == [3, 4]


class Recorder:
    """A tracker that writes down what it is told."""

    def __init__(self, *words: Any, **named: Any) -> None:
        self.told: list[tuple[str, Any]] = [("made", (words, named))]

    def __getattr__(self, name: str) -> Any:
        return lambda *words, **named: self.told.append((name, (words, named)))


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Recorder]]:
    """W&B and MLflow, which are not installed, as recorders."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    made: dict[str, list[Recorder]] = {"wandb": [], "mlflow": []}
    for name in made:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

        def make(those: list[Recorder], *words: Any, **named: Any) -> Recorder:
            those.append(Recorder(*words, **named))
            return those[-1]

        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, partial(make, made[name]))  # pyright: ignore
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return made


def test_several_trackers_are_told_the_same(recorders: dict[str, list[Recorder]], tmp_path: Path) -> None:
    run = fit(**SETTINGS, tracker="wandb, mlflow", out=str(tmp_path / "mine"))
    (wandb,), (mlflow,) = recorders["wandb"], recorders["mlflow"]
    assert wandb.told[0] == ("made", (("introvae",), {"name": "mine", "dir": str(run.folder)}))
    assert mlflow.told[0] == ("made", (("introvae",), {"run_name": "mine"}))
    for recorder in (wandb, mlflow):
        assert recorder.told[1][0] == "start"
        assert recorder.told[2] == ("store_init_configuration", ((plain(run.config().to_dict()),), {}))
        logged = [given for name, given in recorder.told if name == "log"]
        assert [named["step"] for _, named in logged] == [2, 4]
        for (words, _), row in zip(logged, run.log(), strict=True):
            assert words[0] == {key: x for key, x in row.items() if isinstance(x, int | float) and key != "step"}
        assert recorder.told[-1][0] == "finish"
    assert [named["step"] for name, (_, named) in wandb.told if name == "log_images"] == [3, 4]
    kept = [Path(words[0]).name for name, (words, _) in mlflow.told if name == "log_artifact"]
    assert kept == ["step_00000003.png", "final.png"]


def test_an_interrupted_run_ends_its_trackers(recorders: dict[str, list[Recorder]], tmp_path: Path) -> None:
    from introvae.training import loop

    class StopError(Exception):
        pass

    def stop(*_: Any) -> None:
        raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "preview", stop)
        with pytest.raises(StopError):
            fit(**SETTINGS, tracker="wandb", out=str(tmp_path / "mine"))
    assert recorders["wandb"][0].told[-1][0] == "finish"


def test_a_resumed_run_goes_on_in_its_trackers(recorders: dict[str, list[Recorder]], tmp_path: Path) -> None:
    run = fit(**SETTINGS, tracker="wandb", checkpoint_every=2, out=str(tmp_path / "mine"))
    (run.checkpoints / "step_00000004.pt").unlink()
    fit(resume=run.folder)
    second = recorders["wandb"][1]
    assert [named["step"] for name, (_, named) in second.told if name == "log"] == [4]


def test_no_tracker_is_imported_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    fit(**SETTINGS, out=str(tmp_path / "run"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_tracker_is_named_with_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"introvae\[{name}\]"):
        fit(**SETTINGS, tracker=name, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()  # so that the same command does, once it is installed


def test_a_tracker_that_does_not_start_is_said(
    recorders: dict[str, list[Recorder]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no login\nand more")

    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mlflow", refuse)  # pyright: ignore
    config = FitConfig(**SETTINGS, tracker="wandb,mlflow")
    with pytest.raises(ConfigError, match=r"tracker mlflow does not start \(no login\): "):
        Trackers(Run(tmp_path), config)
    assert recorders["wandb"][0].told[-1][0] == "finish"


def test_a_tracker_that_fails_later_does_not_end_the_training(
    recorders: dict[str, list[Recorder]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[int] = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(0)
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(Recorder, "log", fail, raising=False)
    run = fit(**SETTINGS, tracker="wandb", out=str(tmp_path / "run"))
    assert len(run.log()) == 2
    assert calls == [0]
    assert "tracker wandb fails and is told no more: the server is gone" in caplog.text


def test_an_unknown_tracker(refused: Refused) -> None:
    assert "tensorboard, wandb, mlflow" in refused("fit", "--data", "digits", "--tracker", "comet")
