"""Models as files that other programs run, without this package: ONNX, or torch's own archives."""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from introvae.errors import CheckpointError, ConfigError, first_line, one_of
from introvae.extras import import_extra
from introvae.files import write_atomically
from introvae.gaussian import DiagonalGaussian
from introvae.model import IntrospectiveVAE

FORMATS = ("onnx", "torch")
SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-4
"""How far a file's values may be from the model's; images are in [0, 1], latents of the order of 1."""
BATCHES = (1, 5)
"""Sizes of the batches that a file is tried with; it is exported from one of 3."""
OPSET = 20
"""Version of ONNX's operators; onnxruntime knows it since 1.17."""


class Encoder(nn.Module):
    """The encoder with the bounds of its posterior: `x: [N, ...]` (and its classes `[N]`) to mean and log-variance."""

    def __init__(self, model: IntrospectiveVAE) -> None:
        super().__init__()
        self.network = model.encoder

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        posterior = DiagonalGaussian.bounded(*(self.network(x) if condition is None else self.network(x, condition)))
        return posterior.mean, posterior.logvar


class Decoder(nn.Module):
    """The decoder: `z: [N, Z]` (and its classes `[N]`) to images or vectors."""

    def __init__(self, model: IntrospectiveVAE) -> None:
        super().__init__()
        self.network = model.decoder

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.network(z) if condition is None else self.network(z, condition)


def export(
    model: IntrospectiveVAE, folder: str | Path, format: str = "onnx", latents: bool = True
) -> dict[str, dict[str, Any]]:
    """Write `encoder` and `decoder` as files that need no `introvae`, and `export.json`, which tells what they take.

    Weights are float32, batches may have any size. What is written was loaded again and gave what the model gives, to
    `TOLERANCE`, for batches of 1 and 5. Of objectives that encode the mode alone, the log-variance is untrained.

    Arguments:
        model: in any mode and place; exported in evaluation mode, for the CPU.
        folder: made if need be.
        format: "onnx" (`encoder.onnx`; extra `[onnx]`) or "torch" (`encoder.pt2`, for `torch.export.load`).
        latents: leave the encoder out where it gives none (a critic).

    Returns:
        For each file its path, its inputs and outputs with their shapes, and the largest difference from the model.

    Raises:
        ConfigError: an unknown format; a model that was not built from a registered network.
        MissingExtraError: the extra `[onnx]` is not installed.
        CheckpointError: a network cannot be exported, or would give other values; nothing of it is written.

    Example:
        >>> model = IntrospectiveVAE.build(shape=(2,), network="tiny-mlp", latent_dim=3)
        >>> import tempfile
        >>> found = export(model, tempfile.mkdtemp(), format="torch")
        >>> found["decoder"]["inputs"], found["decoder"]["difference"] < 1e-4
        ({'z': ['N', 3]}, True)
    """
    one_of(FORMATS, format=format)
    sample = model.shape
    if sample is None or model.config is None:
        raise ConfigError("only a model from IntrospectiveVAE.build can be exported: register your networks first")
    if format == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            import_extra(module)
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    folder, latent, found = Path(folder), (model.latent_dim,), {}
    for name, player, shape, outputs in (
        ("encoder", Encoder(model), sample, dict.fromkeys(("posterior_mean", "posterior_logvar"), latent)),
        ("decoder", Decoder(model), latent, {"reconstruction": sample}),
    ):
        if name == "encoder" and not latents:
            continue
        inputs = {"x" if name == "encoder" else "z": ["N", *shape]}
        if model.classes is not None:
            inputs["condition"] = ["N"]
        path = folder / f"{name}{SUFFIX[format]}"
        try:
            program = _program(player, _example(model, shape, 3))
            content = _onnx(program, list(inputs), list(outputs)) if format == "onnx" else _archive(program)
            difference = _difference(_loaded(content, format), player, model, shape)
        except Exception as error:  # whatever a registered network does that cannot be traced, written or run
            raise CheckpointError(f"the {name} cannot be exported ({first_line(error)}): mend its network") from error
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"the exported {name} gives values {difference:.2g} from the model's and was not written: mend its "
                "network"
            )
        _write(path, content)
        shapes = {output: ["N", *shape] for output, shape in outputs.items()}
        found[name] = {"path": str(path), "inputs": inputs, "outputs": shapes, "difference": difference}
    _tell(model, folder, found)
    return found


def _tell(model: IntrospectiveVAE, folder: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `export.json`; files of the other format that lie there, of the same model, stay in it."""
    path = folder / "export.json"
    config = model.config or {}
    told = {key: config.get(key) for key in ("network", "shape", "latent_dim", "data", "classes")}
    told["weights"] = sha256(b"".join(p.numpy().tobytes() for p in model.state_dict().values())).hexdigest()
    files: dict[str, Any] = {}
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if all(before.get(key) == value for key, value in told.items()):
            files = {name: about for name, about in before["files"].items() if (folder / name).is_file()}
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    files |= {Path(about["path"]).name: {k: v for k, v in about.items() if k != "path"} for about in found.values()}
    _write(path, (json.dumps({**told, "files": files}, indent=2) + "\n").encode())


def _example(model: IntrospectiveVAE, shape: Sequence[int], n: int) -> tuple[Tensor, ...]:
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(n))
    return (x,) if model.classes is None else (x, torch.arange(n) % len(model.classes))


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}): choose another folder") from error


def _program(player: nn.Module, example: tuple[Tensor, ...]) -> Any:
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in example)
    with torch.no_grad():
        return torch.export.export(player, example, dynamic_shapes=dynamic)


def _archive(program: Any) -> bytes:
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer)
    return buffer.getvalue()


def _onnx(program: Any, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    with _quiet():
        written = torch.onnx.export(
            program, input_names=inputs, output_names=outputs, opset_version=OPSET, verbose=False
        )
        assert written is not None
        return written.model_proto.SerializeToString()


def _loaded(content: bytes, format: str) -> Callable[..., list[Tensor]]:
    """The file's own computation, of arguments on the CPU."""
    if format == "torch":
        with _quiet():
            module = torch.export.load(io.BytesIO(content)).module()

        def run(*arguments: Tensor) -> list[Tensor]:
            found = module(*arguments)
            return [found] if isinstance(found, Tensor) else list(found)

        return run
    runtime = import_extra("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [wanted.name for wanted in session.get_inputs()]
    return lambda *arguments: [
        torch.from_numpy(found)
        for found in session.run(None, {n: a.numpy() for n, a in zip(names, arguments, strict=True)})
    ]


def _difference(
    file: Callable[..., list[Tensor]], player: nn.Module, model: IntrospectiveVAE, shape: Sequence[int]
) -> float:
    """The largest difference between a file's values and the network's."""
    largest = 0.0
    for n in BATCHES:
        example = _example(model, shape, n)
        with torch.no_grad():
            theirs = player(*example)
        theirs = [theirs] if isinstance(theirs, Tensor) else list(theirs)
        for a, b in zip(file(*example), theirs, strict=True):
            if a.shape != b.shape:
                return float("inf")
            largest = max(largest, float((a - b).abs().max().nan_to_num(math.inf)))
    return largest


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of libraries that nobody needs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
