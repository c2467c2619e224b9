"""What a comparison runs: sections of rows, each row the words of an `introvae fit` command."""

from __future__ import annotations

import dataclasses
import logging
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from introvae.errors import ConfigError, checked_seed, unknown
from introvae.objectives import get_objective
from introvae.training.config import RECIPES, FitConfig, config_from_words, recommended_recipe, underscored, words_give

log = logging.getLogger("introvae")

COMPARISONS = RECIPES / "compare"
OWN = ("--seed", "--out", "--resume", "--evaluate", "--quiet", "--dry_run")
"""Options of fit that are not a row's."""
KEYS = {"title", "data", "rows", "seeds", "note", "order"}


@dataclass(frozen=True)
class Cell:
    """One row on one data set: what is run once for each seed.

    Arguments:
        section: key of its section.
        data: its name: what `--data` takes, or a short one for it.
        label: of its row.
        words: of `introvae fit`, beginning with `--data`, without seed and folder.
        seeds: of its runs.
        place: where this machine has the data, if not where the words say.
    """

    section: str
    data: str
    label: str
    words: tuple[str, ...]
    seeds: tuple[int, ...]
    place: str | None = None

    def folder(self, out: Path, seed: int) -> Path:
        """The run folder of a seed."""
        return out / "runs" / slug(self.section) / f"{slug(Path(self.data).stem)}--{slug(self.label)}--{seed}"

    def command(self, seed: int) -> list[str]:
        """The words with the seed."""
        words = self.words if self.place is None else ("--data", self.place, *self.words[2:])
        return [*words, "--seed", str(seed)]

    def config(self, seed: int) -> FitConfig:
        """The settings of a seed's run.

        Raises:
            ConfigError: a setting is wrong; the row is named.
        """
        return dataclasses.replace(self._parsed, seed=seed)

    @cached_property
    def gives_image_every(self) -> bool:
        """Whether the row or its recipe says how often a picture is drawn."""
        return words_give(self.command(self.seeds[0]), "image_every")

    @cached_property
    def _parsed(self) -> FitConfig:
        """The first seed's settings; reading them takes a twentieth of a second, and there are hundreds of runs."""
        try:
            return config_from_words(self.command(self.seeds[0]))
        except ConfigError as error:
            raise ConfigError(f"row {self.label!r} on {self.data}: {error}") from error


@dataclass(frozen=True)
class Section:
    """Rows that are compared with each other.

    Arguments:
        key: short name, also of its pictures.
        title: above its table.
        cells: in the order in which they are run; a row's are found by label.
        note: below its title.
        order: labels of rows as published, the one with the smallest Fréchet distance first.
    """

    key: str
    title: str
    cells: tuple[Cell, ...]
    note: str = ""
    order: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """All sections, the first ones run first.

    Arguments:
        title: of the whole.
        sections: key, title and cells of each.
    """

    title: str
    sections: tuple[Section, ...] = field(default_factory=tuple)

    @property
    def cells(self) -> list[Cell]:
        """The cells of all sections, in the order in which they are run."""
        return [cell for section in self.sections for cell in section.cells]


def from_words(objectives: Sequence[str], data: Sequence[str], seeds: int, settings: Sequence[str] = ()) -> Comparison:
    """Objectives x data x seeds, each with the recommended recipe under `settings`, further words of `introvae fit`.

    Raises:
        ConfigError: a setting is wrong.

    Example:
        >>> plan = from_words(["VAE", "SoftIntroVAE"], ["density:rings"], seeds=2, settings=["--steps", "10"])
        >>> [cell.label for cell in plan.cells], plan.cells[0].seeds
        (['VAE', 'SoftIntroVAE'], (0, 1))
    """
    if not objectives or not data:
        raise ConfigError(
            "nothing to compare: give --objectives A,B and --data X, --recipe NAME, or RUNS before all options"
        )
    _refuse(settings, ("--objective", "--recipe"), "the settings")
    rows = {name: shlex.join(["--objective", name, *settings]) for name in objectives}
    for name in data:
        bare = [objective for objective in objectives if recommended_recipe(name, objective) is None]
        if 0 < len(bare) < len(objectives):
            log.warning(
                "%s: no recommended recipe for %s, which have the defaults of fit, so other networks and lengths than "
                "the rows beside them: give --network, --network_options, --latent_dim, --batch_size, --steps and --lr",
                name,
                ", ".join(bare),
            )
    return Comparison("Comparison", (_section("comparison", {"data": list(data), "rows": rows, "seeds": seeds}),))


def from_file(name: str, local: str | Path | None = None) -> Comparison:
    """A comparison that comes with the package, by name, or from a YAML file.

    Arguments:
        name: of the comparison, or the path of its file.
        local: a folder with data sets by their short names, taken instead of what the file says where they are there.

    Raises:
        ConfigError: there is no such file or folder, or something in it is wrong.

    Example:
        >>> from_file("normalisers").sections[0].key
        'normalisers'
    """
    path = COMPARISONS / f"{name}.yaml" if name in list_comparisons() else Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise unknown("comparison", name, [*list_comparisons(), "a .yaml file"])
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())}): give it as YAML") from error
    sections = content.get("sections") if isinstance(content, dict) else None
    if not isinstance(sections, dict) or not sections:
        raise ConfigError(f"{path} has no sections: give sections: NAME: data, rows, seeds")
    if local is not None and not Path(local).is_dir():
        raise ConfigError(f"{local} is no folder: give the one that holds the data sets' folders")
    try:
        found = tuple(_section(str(key), block, local) for key, block in sections.items())
        _refuse_shared(cell for section in found for cell in section.cells)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return Comparison(str(content.get("title", path.stem)), found)


def list_comparisons() -> list[str]:
    """Names of the comparisons that come with the package."""
    return sorted(path.stem for path in COMPARISONS.glob("*.yaml"))


def _section(key: str, block: Any, local: str | Path | None = None) -> Section:
    if not isinstance(block, Mapping) or not {"data", "rows"} <= block.keys() or not block.keys() <= KEYS:
        raise ConfigError(f"section {key} must have data and rows, and may have {', '.join(sorted(KEYS))}: take these")
    seeds = block.get("seeds", 1)
    seeds = list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds
    if not isinstance(seeds, list) or not seeds or len({str(seed) for seed in seeds}) < len(seeds):
        raise ConfigError(
            f"section {key}: seeds is {block.get('seeds')}: give their number, or a list of different ones"
        )
    data = [block["data"]] if isinstance(block["data"], str) else block["data"]
    pairs = [(name, name) for name in data] if isinstance(data, list) else []
    pairs = list(data.items()) if isinstance(data, Mapping) else pairs
    if not pairs or not all(isinstance(name, str) for pair in pairs for name in pair):
        raise ConfigError(f"section {key}: data is {block['data']}: give a name, a list of names, or SHORT: NAME pairs")
    rows = block["rows"]
    if not isinstance(rows, Mapping) or not rows or not all(isinstance(words, str) for words in rows.values()):
        raise ConfigError(f"section {key}: rows must be LABEL: WORDS OF FIT, such as VAE: --objective VAE: give these")
    cells = []
    for name, source in pairs:
        here = None if local is None or name == source else Path(local) / name
        place = str(here) if here is not None and here.exists() else None
        for label, words in rows.items():
            try:
                split = shlex.split(words.replace("{data}", name.removeprefix("density:")))
                _refuse(split, ("--data",), f"row {label!r}")
                for seed in seeds:
                    checked_seed(seed)
                cells.append(Cell(key, name, str(label), ("--data", source, *split), tuple(seeds), place))
                cells[-1].config(seeds[0])
            except ConfigError as error:
                raise ConfigError(f"section {key}: {error}") from error
            except ValueError as error:
                raise ConfigError(f"section {key}: row {label!r} ({error}): give it as in a shell") from error
    _refuse_shared(cells)
    order = block.get("order", [])
    if not isinstance(order, list) or not set(map(str, order)) <= set(map(str, rows)):
        raise ConfigError(f"section {key}: order is {order}: give a list of labels of its rows")
    order = tuple(map(str, order))
    return Section(key, str(block.get("title", key)), tuple(cells), str(block.get("note", "")), order)


def _refuse(words: Sequence[str], more: Sequence[str], where: str) -> None:
    """Options that a comparison sets itself."""
    for word in words:
        name = underscored(word).partition("=")[0]
        if name in (*OWN, *more):
            raise ConfigError(f"{where}: {name} is set by compare for each run: leave it out")


def _refuse_shared(cells: Iterable[Cell]) -> None:
    """Cells whose runs would lie in the same folders."""
    seen: dict[Path, Cell] = {}
    for cell in cells:
        folder = cell.folder(Path(), 0)
        if folder in seen:
            raise ConfigError(
                f"row {cell.label!r} of section {cell.section} and row {seen[folder].label!r} of section "
                f"{seen[folder].section} would share a folder: give names that differ in their letters"
            )
        seen[folder] = cell


def same_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a run's settings, as plain values, are these; what the version that made it did not know counts as its
    default.

    Example:
        >>> now = FitConfig(steps=5).to_dict()
        >>> before = {name: value for name, value in now.items() if name != "ema"}
        >>> same_settings(before, now), same_settings(before, {**now, "ema": 0.5})
        (True, False)
    """
    usual = FitConfig().to_dict()
    kind = get_objective(now["objective"]["class_path"])
    usual["objective"] = {"init_args": {f.name: f.default for f in dataclasses.fields(kind)}}  # pyright: ignore
    return _same(before, now, usual)


def _same(before: Any, now: Any, usual: Any) -> bool:
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return before == now
    usual = usual if isinstance(usual, Mapping) else {}
    return before.keys() <= now.keys() and all(
        _same(before.get(name, usual.get(name, _same)), value, usual.get(name)) for name, value in now.items()
    )


def slug(name: str) -> str:
    """A name as part of a path.

    Example:
        >>> slug("density:8gaussians"), slug("Soft-IntroVAE, auto")
        ('8gaussians', 'soft-introvae-auto')
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.removeprefix("density:").lower()).strip("-") or "x"
