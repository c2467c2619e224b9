"""Libraries that only some users need: imported when first used, named with the extra that brings them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from introvae.errors import MissingExtraError

EXTRAS = {
    "nibabel": "medical",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "gradio": "studio",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "shtab": "completion",
    "mlflow": "mlflow",
    "torch_fidelity": "fid",
    "lpips": "lpips",
}
"""Module to the extra that brings it."""


def missing_extras() -> list[tuple[str, str]]:
    """Each extra and whether it is there; if not, how to get it."""
    found = []
    for module, extra in EXTRAS.items():
        try:
            import_extra(module)
            found.append((extra, f"there ({module})"))
        except MissingExtraError:
            found.append((extra, f"missing: pip install 'introvae[{extra}]' brings {module}"))
    return found


def import_extra(module: str) -> ModuleType:
    """The optional library `module`.

    Raises:
        MissingExtraError: it is missing or broken; the message names the extra that brings it.

    Example:
        >>> import_extra("json").__name__
        'json'
    """
    try:
        return import_module(module)
    except Exception as error:  # a broken library may raise anything, not only ImportError
        extra = EXTRAS.get(module.partition(".")[0], module)
        raise MissingExtraError(
            f"{module} cannot be imported ({error}): give yourself the extra with pip install 'introvae[{extra}]'"
        ) from error
