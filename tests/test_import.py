"""What importing costs, what the package gives, and which way its imports point."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import introvae

SOURCE = Path(introvae.__file__).parent
SCRIPT = Path(sys.executable).parent / "introvae"
HEAVY = {
    "accelerate",
    "pandas",
    "pyarrow",
    "jinja2",
    "nibabel",
    "datasets",
    "sklearn",
    "matplotlib",
    "torchmetrics",
    "jsonargparse",
}

LAYERS = [
    {"errors", "files"},
    {"precision"},
    {"machine"},
    {"extras", "parallel", "progress"},
    {"gaussian", "networks", "data", "metrics", "pictures", "augment", "classes"},
    {"objectives", "model"},
    {"players"},
    {"step"},
    {"capture", "baselines"},
    {"training"},
    {"measures"},
    {"report"},
    {"evaluation", "exchange"},
    {"apps"},
    {"comparison", "studio"},
    {"commands"},
    {"cli_explore", "cli_share", "cli_detect", "cli_completion"},
    {"cli"},
    {"__main__"},
]
"""From the bottom to the top: a module imports from lower layers and from its own folder, never sideways or up."""
LAYER_OF = {name: level for level, names in enumerate(LAYERS) for name in names}


def loaded_after(code: str) -> set[str]:
    """Top-level packages in a fresh interpreter's `sys.modules` after `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


# --- what importing costs


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not loaded_after("import introvae") & (HEAVY | {"torch", "numpy"})


def test_the_model_needs_torch_and_nothing_else_heavy() -> None:
    loaded = loaded_after("import introvae\nintrovae.IntrospectiveVAE")
    assert "torch" in loaded
    assert not loaded & HEAVY


def test_building_training_and_sampling_a_model_need_no_data_or_plot_library() -> None:
    code = """
import torch, introvae
model = introvae.IntrospectiveVAE.build((2,), "tiny-mlp", latent_dim=2)
introvae.IntrospectiveStep(model, introvae.ASIntroVAE())(torch.zeros(4, 2))
model.sample(2)
introvae.load_data("density:rings").batches(4, seed=0).next("cpu")
"""
    assert not loaded_after(code) & HEAVY


COMPUTING = (
    "sample",
    "evaluate",
    "reconstruct",
    "interpolate",
    "traverse",
    "edit",
    "neighbours",
    "latents",
    "mix",
    "detect",
)


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["nope"], ["doctor", "--help"], *([name, "--help"] for name in COMPUTING)]
)
def test_commands_that_compute_nothing_import_nothing_heavy(words: list[str]) -> None:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([SCRIPT, *words], env=environment, capture_output=True, text=True, check=False, timeout=120)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "introvae" in imported  # the profile is there
    needless = HEAVY if words[0] in COMPUTING else HEAVY | {"torch", "numpy"}
    assert not imported & needless


# --- what the package gives


@pytest.mark.parametrize("name", introvae.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(introvae, name) is not None
    assert name in dir(introvae)


def test_public_names_are_sorted_and_come_from_where_type_checkers_see_them() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    seen = {
        alias.name: statement.module
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert set(seen) | {"__version__"} == set(introvae.__all__)
    for name, module in seen.items():
        assert module is not None
        assert getattr(introvae, name) is getattr(import_module(module), name)


def test_star_import_gives_exactly_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from introvae import *", names)
    assert set(names) - {"__builtins__"} == set(introvae.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'IntroGAN'"):
        introvae.IntroGAN  # noqa: B018
    assert not hasattr(introvae, "_private")
    with pytest.raises(ImportError, match="IntroGAN"):
        exec("from introvae import IntroGAN")


def test_the_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert introvae.__version__ == version("introvae")


# --- which way imports point


def module_name(path: Path) -> str:
    """introvae/data/__init__.py as introvae.data."""
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imports(name: str, *, at_import_time: bool) -> set[str]:
    """Modules of the package that `name` imports: all, or only those that importing it runs."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if at_import_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import: write it in full"
            module = node.module or ""
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                found.add(submodule if submodule in MODULES else module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[name].read_text()))
    return {module for module in found if module.partition(".")[0] == "introvae"}


def part(name: str) -> str:
    """The module or folder directly under the package: introvae.data.arrays as data."""
    return name.split(".")[1]


def test_the_parser_sees_the_imports() -> None:
    assert imports("introvae.step", at_import_time=True) >= {"introvae.model", "introvae.objectives"}
    everything = imports("introvae.cli", at_import_time=False)
    assert "introvae.evaluation" in everything - imports("introvae.cli", at_import_time=True)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "introvae"])
def test_imports_point_down(name: str) -> None:
    assert part(name) in LAYER_OF, f"{part(name)} is new: give it a place in LAYERS"
    for other in imports(name, at_import_time=False):
        if other == "introvae":
            assert part(name) == "cli", f"{name} imports the public package instead of the module it needs"
            continue
        down = LAYER_OF[part(other)] < LAYER_OF[part(name)]
        assert down or part(other) == part(name), f"{name} must not import {other}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(("introvae.data", "introvae.metrics"))])
def test_data_and_metrics_know_neither_training_nor_each_other(name: str) -> None:
    parts = {part(other) for other in imports(name, at_import_time=False)}
    assert parts <= {part(name), "errors", "files", "extras", "machine", "progress"}


def test_there_are_no_import_cycles() -> None:
    graph = {name: imports(name, at_import_time=True) - {name} for name in MODULES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert set(MODULES) <= set(order)
    assert order.index("introvae.errors") < order.index("introvae.model") < order.index("introvae.training.loop")
