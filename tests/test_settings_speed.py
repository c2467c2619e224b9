"""Settings that say how a run is computed: refused where they cannot be, without a compiler done without."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands import Command, Refused, one_line
from introvae import VAE, ConfigError, FitConfig, Run, RunError, SoftIntroVAE, fit, load_data
from introvae.capture import CapturedStep
from introvae.step import IntrospectiveStep
from introvae.training.devices import can_compile
from introvae.training.fit import MACHINES, config_for
from introvae.training.loop import Trainer

PLANE = ("fit", "--data", "density:rings", "--network", "tiny-mlp", "--recipe", "none", "--steps", 2, "--quiet")
DIGITS = ("fit", "--data", "digits", "--network", "tiny-conv", "--recipe", "none", "--steps", 2, "--quiet")


@pytest.fixture(autouse=True)
def torch_s_settings() -> Any:
    """What looking for a compiler changes in torch."""
    inductor = logging.getLogger("torch._inductor")
    level = inductor.level
    yield
    inductor.setLevel(level)


def small(out: Path, **settings: Any) -> Run:
    base: dict[str, Any] = {"data": "digits", "network": "tiny-conv", "batch_size": 16, "steps": 4, "log_every": 1}
    base |= {"objective": SoftIntroVAE(beta_neg=8.0), "device": "cpu", "image_every": 0}
    return fit(**{**base, "out": str(out), "recipe": "none", "progress": False, **settings})


def weights(run: Run) -> bytes:
    return (run.model_folder / "model.safetensors").read_bytes()


# --- names


@pytest.mark.parametrize(
    ("setting", "choices"),
    [("precision", "auto, float32, tf32, bf16"), ("compile", "none, cudagraph, inductor")],
)
def test_unknown_names_are_refused_with_the_choices(
    refused: Refused, tmp_path: Path, setting: str, choices: str
) -> None:
    message = f"unknown {setting} 'nope': choose one of {choices}"
    with pytest.raises(ConfigError, match=message):
        config_for("none", {setting: "nope"})
    err = refused(*PLANE, f"--{setting}", "nope", "--out", tmp_path / "run")
    assert message in err
    assert not (tmp_path / "run").exists()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: density:rings\n{setting}: nope\n")
    assert message in refused("fit", "--recipe", recipe, "--out", tmp_path / "run")


@pytest.mark.parametrize("setting", ["gradient_checkpointing", "flip"])
def test_switches_are_true_or_false(refused: Refused, tmp_path: Path, setting: str) -> None:
    assert setting in refused(*DIGITS, f"--{setting.replace('_', '-')}", "perhaps", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_defaults() -> None:
    config = FitConfig()
    assert (config.precision, config.compile) == ("auto", "none")
    assert (config.gradient_checkpointing, config.flip) == (False, False)
    assert {"precision", "compile", "gradient_checkpointing"} <= set(MACHINES)
    assert "flip" not in MACHINES  # it changes what is learned


def test_they_stand_in_the_run_s_settings(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("--precision", "float32", "--gradient-checkpointing", "true", "--flip", "true", "--out", folder)
    assert command(*DIGITS, *words).code == 0
    config = Run(folder).config()
    assert (config.precision, config.compile) == ("float32", "none")
    assert (config.gradient_checkpointing, config.flip) == (True, True)


# --- where they cannot be


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU could do it")
def test_cuda_graphs_without_a_gpu_are_refused(command: Command, tmp_path: Path) -> None:
    said = command(*PLANE, "--compile", "cudagraph", "--device", "cpu", "--out", tmp_path / "run")
    assert said.code == 2
    assert one_line(said.err), said.err
    assert said.err == "introvae: CUDA graphs need an NVIDIA GPU, the model is on cpu: take compile none\n"
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="CUDA graphs need an NVIDIA GPU"):
        Trainer(FitConfig(data="density:rings", network="tiny-mlp", compile="cudagraph", device="cpu"))


def test_tf32_without_a_gpu_is_refused(refused: Refused, tmp_path: Path) -> None:
    err = refused(*DIGITS, "--precision", "tf32", "--device", "cpu", "--out", tmp_path / "run")
    assert "precision 'tf32' is for NVIDIA GPUs, this run is on cpu: choose auto or float32" in err
    assert not (tmp_path / "run").exists()


def test_vectors_cannot_be_mirrored(refused: Refused, tmp_path: Path) -> None:
    err = refused(*PLANE, "--flip", "true", "--out", tmp_path / "run")
    assert "flip mirrors images, density:rings has vectors: leave it out" in err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="flip mirrors images"):
        small(tmp_path / "run", data=np.zeros((40, 3), np.float32), network="tiny-mlp", flip=True)


def test_a_network_without_stages_cannot_forget_them(command: Command, tmp_path: Path) -> None:
    said = command(*PLANE, "--gradient-checkpointing", "true", "--out", tmp_path / "run")
    assert said.code == 2
    assert one_line(said.err), said.err
    assert "MLPEncoder has no stages to forget: take gradient_checkpointing false" in said.err
    assert not (tmp_path / "run").exists()


def test_both_networks_forget_their_stages() -> None:
    for asked in (True, False):
        config = FitConfig(data="digits", network="tiny-conv", steps=2, gradient_checkpointing=asked)
        model = Trainer(config).model
        assert model.encoder.gradient_checkpointing == model.decoder.gradient_checkpointing == asked


# --- mirrored images


def test_mirrored_images_are_another_training(tmp_path: Path) -> None:
    plain, flipped, again = (
        small(tmp_path / name, flip=flip) for name, flip in (("a", False), ("b", True), ("c", True))
    )
    assert weights(flipped) == weights(again) != weights(plain)


# --- without a compiler


def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The networks that are given to torch.compile, which are left as they are."""
    seen: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: seen.append(type(self).__name__))
    return seen


def test_a_run_without_a_compiler_goes_on_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[torch.device] = []
    seen = compiled(monkeypatch)
    monkeypatch.setattr("introvae.training.loop.can_compile", asked.append)
    run = small(tmp_path / "run", compile="inductor")
    assert asked == [torch.device("cpu")]
    assert seen == []
    assert run.config().compile == "inductor"
    assert run.events("start")[0]["compile"] == "none"  # what it was computed with
    plain = small(tmp_path / "plain")
    assert len(asked) == 1
    assert weights(run) == weights(plain)


def test_with_a_compiler_both_networks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = compiled(monkeypatch)
    monkeypatch.setattr("introvae.training.loop.can_compile", lambda device: True)
    trainer = Trainer(FitConfig(data="digits", network="tiny-conv", steps=4, device="cpu", compile="inductor"))
    assert seen == ["ConvEncoder", "ConvDecoder"]
    assert trainer.machine()["compile"] == "inductor"
    assert isinstance(trainer.step, IntrospectiveStep)


def broken_compile(error: Exception) -> Any:
    def compile_(*_: Any, **__: Any) -> Any:
        raise error

    return compile_


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("\nno C++ compiler found\nSet TORCH_LOGS for more"), "no C++ compiler found"),
        (ImportError("no module named triton"), "no module named triton"),
        (AssertionError(), ""),
    ],
)
def test_no_compiler_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, reason: str
) -> None:
    monkeypatch.setattr(torch, "compile", broken_compile(error))
    with caplog.at_level(logging.INFO, logger="introvae"):
        assert not can_compile(torch.device("cpu"))
    (said,) = [record.getMessage() for record in caplog.records if record.name == "introvae"]
    assert "\n" not in said
    assert f"no compiler ({reason}" in said
    assert "training goes on without; install a C++ compiler" in said


def test_an_error_of_the_compiled_function_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile itself is lazy: the compiler is missed at the first call."""
    monkeypatch.setattr(torch, "compile", lambda function: broken_compile(RuntimeError("g++ failed")))
    assert not can_compile(torch.device("cpu"))


def test_a_compiler_is_found_where_a_function_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo

    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", False)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert can_compile(torch.device("cpu"))


# --- resumed in another way


@pytest.mark.parametrize(
    "settings",
    [{"compile": "inductor"}, {"gradient_checkpointing": True}, {"precision": "bf16"}],
    ids=str,
)
def test_a_run_may_be_resumed_in_another_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr("introvae.training.loop.can_compile", lambda device: False)
    run = small(tmp_path / "run", precision="float32")
    before = weights(run)
    fit(resume=run.folder, progress=False, **settings)  # it has ended: nothing is left to do but to save it
    assert weights(run) == before
    assert len(run.events("start")) == 2


def test_a_run_cannot_be_resumed_with_other_images(tmp_path: Path) -> None:
    run = small(tmp_path / "run")
    with pytest.raises(RunError, match="flip is False in the run, True here"):
        fit(resume=run.folder, progress=False, flip=True)


def test_a_captured_run_has_a_captured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where this needs no stand-in."""

    class Unrefusing(CapturedStep):
        def __init__(self, step: IntrospectiveStep) -> None:
            super().__init__(step, capture=lambda run: (lambda: None, run()))

    monkeypatch.setattr("introvae.training.loop.CapturedStep", Unrefusing)
    config = FitConfig(data="density:rings", network="tiny-mlp", steps=9, compile="cudagraph", objective=VAE())
    trainer = Trainer(config, load_data("density:rings"))
    assert isinstance(trainer.step, CapturedStep)
    assert trainer.step.step.capturable
    assert trainer.machine()["compile"] == "cudagraph"
    for _ in range(2):
        trainer._one_step()
