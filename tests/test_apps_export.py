"""Models as files: they give what the model gives, for any batch, where introvae is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from introvae import CheckpointError, ConfigError, IntrospectiveVAE, MissingExtraError, cli_share, fit, from_array
from introvae.apps import export as exporting
from introvae.apps.export import export
from introvae.networks import register_network

NETWORKS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "mlp": ((3,), {}),
    "tiny-conv": ((1, 8, 8), {}),
    "tiny-residual": ((3, 32, 32), {}),
    "tiny-dcgan": ((1, 12, 12), {}),
    "tiny-disentangled": ((3, 8, 8), {}),
    "tiny-style": ((1, 16, 16), {}),
}


def build(name: str, classes: int | None = None) -> IntrospectiveVAE:
    shape, options = NETWORKS[name]
    torch.manual_seed(0)
    return IntrospectiveVAE.build(shape, name, 4, classes=classes, **options)


@pytest.mark.parametrize(("name", "classes"), [*((name, None) for name in NETWORKS), ("mlp", 3), ("tiny-conv", 3)])
def test_onnx_files_give_what_the_model_gives(name: str, classes: int | None, tmp_path: Path) -> None:
    model = build(name, classes)
    found = export(model, tmp_path)
    assert all(about["difference"] <= 1e-4 for about in found.values())
    assert model.training  # as it was
    model.eval()
    generator = torch.Generator().manual_seed(7)
    for n in (1, 4):
        x, z = torch.rand(n, *(model.shape or ()), generator=generator), torch.randn(n, 4, generator=generator)
        given = {} if classes is None else {"condition": (torch.arange(n) * 2) % classes}
        with torch.no_grad():
            posterior, image = model.encode(x, **given), model.decode(z, **given)
        encoder, decoder = (onnxruntime.InferenceSession(tmp_path / f"{part}.onnx") for part in ("encoder", "decoder"))
        labels = {key: value.numpy() for key, value in given.items()}
        mean, logvar = encoder.run(["posterior_mean", "posterior_logvar"], {"x": x.numpy(), **labels})
        (drawn,) = decoder.run(["reconstruction"], {"z": z.numpy(), **labels})
        for ours, theirs in ((mean, posterior.mean), (logvar, posterior.logvar), (drawn, image)):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


@pytest.mark.parametrize(("name", "classes"), [("mlp", None), ("tiny-conv", 3), ("tiny-style", None)])
def test_torch_archives_are_the_model(name: str, classes: int | None, tmp_path: Path) -> None:
    model = build(name, classes)
    assert all(about["difference"] < 1e-6 for about in export(model, tmp_path, "torch").values())
    export(build(name, classes), tmp_path, "torch")
    (tmp_path / "encoder.onnx").touch()
    told = json.loads((tmp_path / "export.json").read_text())
    (tmp_path / "export.json").write_text(json.dumps({**told, "weights": "others", "files": {"encoder.onnx": {}}}))
    export(model, tmp_path, "torch")  # what lies there of other weights is not told
    told = json.loads((tmp_path / "export.json").read_text())
    assert told["shape"] == list(model.shape or ())
    assert told["files"].keys() == {"encoder.pt2", "decoder.pt2"}


def test_files_run_where_introvae_is_not_installed(tmp_path: Path) -> None:
    model = build("tiny-conv").eval()
    export(model, tmp_path)
    export(model, tmp_path, "torch")
    assert json.loads((tmp_path / "export.json").read_text())["files"].keys() == {
        f"{part}.{kind}" for part in ("encoder", "decoder") for kind in ("onnx", "pt2")
    }
    code = """
import sys
sys.modules["introvae"] = None
import numpy as np, onnxruntime, torch
z = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
a = onnxruntime.InferenceSession("decoder.onnx").run(None, {"z": z})[0]
b = torch.export.load("decoder.pt2").module()(torch.from_numpy(z)).numpy()
print(a.shape, float(abs(a - b).max()) < 1e-4)
"""
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert said.stdout.strip() == "(2, 1, 8, 8) True", said.stderr


def test_a_file_that_gives_other_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_difference", lambda *_: 0.5)
    with pytest.raises(CheckpointError, match=r"gives values 0.5 from the model's and was not written"):
        export(build("mlp"), tmp_path, "torch")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    model = build("mlp")
    assert exporting._difference(lambda x: [x * torch.nan] * 2, exporting.Encoder(model), model, (3,)) == float("inf")


def test_what_cannot_be_exported_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="choose one of onnx, torch"):
        export(build("mlp"), tmp_path, "tflite")
    plain = IntrospectiveVAE(torch.nn.Linear(2, 2), torch.nn.Linear(1, 2), latent_dim=1)
    with pytest.raises(ConfigError, match="register your networks first"):
        export(plain, tmp_path)

    class Stubborn(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (x, x) if float(x.sum()) > 0 else (-x, x)

    register_network("stubborn", lambda shape, latent_dim: (Stubborn(), torch.nn.Linear(latent_dim, shape[0])))
    with pytest.raises(CheckpointError, match=r"the encoder cannot be exported \(.*\): mend its network") as refused:
        export(IntrospectiveVAE.build((2,), "stubborn", 2), tmp_path, "torch")
    assert len(str(refused.value).splitlines()) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        export(build("mlp"), tmp_path / "file" / "folder", "torch")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'introvae\[onnx\]'"):
        export(build("mlp"), tmp_path)


def test_the_command_exports_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = from_array(np.random.default_rng(0).random((40, 8, 8, 1), dtype=np.float32))
    settings: dict[str, Any] = {"network": "tiny-conv", "latent_dim": 4, "steps": 2, "batch_size": 8, "recipe": "none"}
    run = fit(data=data, out=str(tmp_path / "run"), progress=False, **settings)
    cli_share.export([str(run.folder)])
    said = capsys.readouterr().out
    assert "encoder.onnx: x [N, 1, 8, 8] -> posterior_mean [N, 4], posterior_logvar [N, 4]" in said
    assert (run.folder / "export" / "decoder.onnx").is_file()
    critic = fit(data=data, out=str(tmp_path / "critic"), progress=False, objective="WGANGP", **settings)
    cli_share.export([str(critic.folder), "--format", "torch", "-o", str(tmp_path / "files")])
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["decoder.pt2", "export.json"]
    with pytest.raises(SystemExit) as stop:
        cli_share.export(["--help"])
    assert stop.value.code == 0
    assert "introvae export runs/" in capsys.readouterr().out
