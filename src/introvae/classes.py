"""The classes that a conditional model knows: their names, how often they occur, and labels as the model takes them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from introvae.errors import ConfigError, DataError, not_negative, positive, unknown, whole

SAID = 20
"""So many names an error lists at most."""
WIDEST = 32
"""Classes that get a column each on a sheet; with more, a sheet is as wide as high."""


@dataclass(frozen=True)
class Classes:
    """Names and frequencies of the classes 0 ... K - 1; they are saved with the model.

    Arguments:
        names: of the classes, in the order of their indices.
        counts: how often each occurs in the training data: without a given class, samples are drawn as often.

    Raises:
        ConfigError: fewer than two classes, or not a count for each.

    Example:
        >>> classes = Classes(("cat", "dog"), (30, 10))
        >>> classes.index("dog"), classes.shares
        (1, (0.75, 0.25))
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise ConfigError(f"{len(self.names)} class is no condition: give two classes at least, or none")
        if len(self.counts) != len(self.names):
            raise ConfigError(f"{len(self.counts)} counts for {len(self.names)} classes: give one for each")
        for index, count in enumerate(self.counts):
            whole(**{f"counts[{index}]": count})
            not_negative(**{f"counts[{index}]": count})
        positive(**{"the sum of all counts": sum(self.counts)})

    @classmethod
    def of(cls, classes: int | Sequence[str] | Classes) -> Classes:
        """Classes from their number or names, each as frequent as the others."""
        if isinstance(classes, Classes):
            return classes
        if isinstance(classes, int):
            whole(classes=classes)
            return cls(tuple(map(str, range(classes))), (1,) * classes)
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
            raise ConfigError(f"classes is {classes!r}: give their number or a list of their names")
        return cls(tuple(classes), (1,) * len(classes))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shares(self) -> tuple[float, ...]:
        """How often each occurs, as a share of all."""
        return tuple(count / sum(self.counts) for count in self.counts)

    def index(self, label: str | int) -> int:
        """The index of a class from its name, or from its index, also as a word.

        Raises:
            ConfigError: there is no such class.
        """
        if label in self.names:
            return self.names.index(str(label))
        number = int(label) if str(label).isdecimal() else -1
        if not 0 <= number < len(self):
            names = [*self.names[:SAID], *(["..."] if len(self) > SAID else []), f"0 to {len(self) - 1}"]
            raise unknown("class", label, names)
        return number

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n class indices, int64 `[n]` on the CPU, as often as the classes occur; from a CPU `generator`."""
        shares = torch.tensor(self.counts, dtype=torch.float64)
        return torch.multinomial(shares, n, replacement=True, generator=generator)

    @property
    def occurring(self) -> tuple[int, ...]:
        """Indices of the classes that the training data have."""
        return tuple(index for index, count in enumerate(self.counts) if count)

    def in_turn(self, n: int) -> Tensor:
        """n class indices, int64 `[n]`: each one that occurs, in their order, and again from the first."""
        return torch.tensor(self.occurring)[torch.arange(n) % len(self.occurring)]

    def columns(self, most: int) -> int:
        """In how many columns, at most so many, every column of a picture of samples in turn is of one class; where
        there are more classes, `most`.
        """
        each = len(self.occurring)
        return most - most % each if each <= most else most

    def indices(self, labels: Tensor | None, names: Sequence[str] = ()) -> Tensor:
        """Labels of data, `[N]`, as this model's class indices, int64 `[N]`.

        Arguments:
            labels: class indices of the data.
            names: of the data's classes, which may be others or in another order than the model's; where there are
                none, the indices are the model's.

        Raises:
            DataError: a sample has no class, or one that the model does not know.
        """
        if labels is None or bool((labels < 0).any()):
            missing = "no class labels" if labels is None else f"{int((labels < 0).sum())} samples without a class"
            raise DataError(f"the data have {missing}, the model needs each one's class: label them or leave them out")
        if names and tuple(names) != self.names:
            known = {name: index for index, name in enumerate(self.names)}
            place = torch.tensor([known.get(name, -1) for name in names])
            strange = [str(names[index]) for index in labels.unique().tolist() if place[index] < 0]
            if strange:
                listed = ", ".join(strange[:SAID])
                raise DataError(f"the model knows no class {listed}: give data of {', '.join(self.names[:SAID])}")
            return place[labels]
        if len(labels) and int(labels.max()) >= len(self):
            raise DataError(f"the labels go up to {int(labels.max())}, the model knows 0 to {len(self) - 1}: mend them")
        return labels.long()

    def given(self, condition: Tensor | int | str | None, n: int, device: torch.device | str = "cpu") -> Tensor:
        """A condition of n samples as networks take it: class indices int64 `[n]` or shares `[n, K]`, on the device.

        Raises:
            ConfigError: there is none, or an index that is no class.
            DataError: a tensor of another shape or type, or with an index that is no class (of one that is on a GPU
                already, CUDA says so).
        """
        if condition is None:
            raise ConfigError(
                f"the model knows {len(self)} classes: give the condition (or label), each sample's class"
            )
        if not isinstance(condition, Tensor):
            return torch.full((n,), self.index(condition), device=device)
        if condition.is_floating_point():
            fits = condition.shape == (n, len(self))
        else:
            fits = condition.shape == (n,) and condition.dtype == torch.int64
        if not fits:
            raise DataError(
                f"the condition is {condition.dtype} {tuple(condition.shape)}: give a class index for each of {n} "
                f"samples as int64, or shares ({n}, {len(self)}) as floats"
            )
        if condition.dtype == torch.int64 and condition.device != torch.device(device):
            self.indices(condition)  # where it is used, only a CPU says what is wrong
        return condition.to(device)

    def mixture(self, condition: Tensor | int | str | None, like: Tensor) -> Tensor:
        """The same as shares `[N, K]` of the type and for the samples of `like: [N, ...]`."""
        given = self.given(condition, len(like), like.device)
        one_hot = given if given.is_floating_point() else torch.nn.functional.one_hot(given, len(self))
        return one_hot.to(like.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the model's config.json."""
        return {"names": list(self.names), "counts": list(self.counts)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any] | None) -> Classes | None:
        """Classes from what `to_dict` gave; None for a model without.

        Raises:
            ConfigError: the content is damaged.
        """
        if content is None:
            return None
        try:
            names, counts = content["names"], content["counts"]
            if not all(isinstance(name, str) for name in names):
                raise TypeError("a name is no text")
            return cls(tuple(names), tuple(counts))
        except (KeyError, TypeError, ConfigError) as error:
            raise ConfigError(f"its classes are damaged: {error}") from error


def named(classes: Classes | None, labels: Sequence[str], count: int) -> Tensor | None:
    """The condition of `count` samples from the words of a `--label`: one for all, or one for each.

    Raises:
        ConfigError: classes and labels do not go together; an unknown class, or another number of them.

    Example:
        >>> named(Classes.of(["cat", "dog"]), ["dog"], count=3)
        tensor([1, 1, 1])
    """
    if classes is None or not labels:
        if classes is None and not labels:
            return None
        raise ConfigError(
            "the model knows no classes: leave --label out"
            if classes is None
            else f"the model knows classes ({', '.join(classes.names[:SAID])}): give --label, the class of each sample"
        )
    if len(labels) not in (1, count):
        raise ConfigError(f"--label names {len(labels)} classes for {count} samples: give one, or one for each")
    return torch.tensor([classes.index(label) for label in labels]).expand(count)


def parts_of(condition: Tensor | None, count: int, size: int) -> list[Tensor] | list[None]:
    """The condition of `count` samples, `size` at a time.

    Example:
        >>> parts_of(torch.tensor([0, 1, 0]), 3, size=2), parts_of(None, 3, size=2)
        ([tensor([0, 1]), tensor([0])], [None, None])
    """
    return [None] * math.ceil(count / size) if condition is None else list(condition.split(size))


class Samples(NamedTuple):
    """What the samples of a command are to be.

    Arguments:
        condition: int64 `[N]`, or None for a model without classes.
        names: `[N]`, of single pictures' files.
        columns: of a sheet; None for as many as rows.
    """

    condition: Tensor | None
    names: list[str]
    columns: int | None

    def parts(self, size: int) -> list[tuple[int, Tensor | None]]:
        """Number and condition, at most `size` at a time."""
        n = len(self.names)
        return [(min(size, n - size * i), part) for i, part in enumerate(parts_of(self.condition, n, size))]


def samples_of(classes: Classes | None, label: str | None, count: int) -> Samples:
    """Samples of the class that `--label` names; of every class in turn, a column of a sheet for each, without.

    Raises:
        ConfigError: there is no such class, or the model knows none.
    """
    names = [f"sample_{index:05d}" for index in range(count)]
    columns = None
    if classes is None or label is not None:
        condition = named(classes, [] if label is None else [label], count)
    else:
        condition, near = classes.in_turn(count), math.ceil(math.sqrt(count))
        each = len(classes.occurring)
        columns = classes.columns(max(near, each) if each <= WIDEST else near)
    if classes is not None and condition is not None:
        words = [re.sub(r"[^\w.-]+", "-", name) for name in classes.names]
        names = [f"{name}_{words[index]}" for name, index in zip(names, condition.tolist(), strict=True)]
    return Samples(condition, [f"{name}.png" for name in names], columns)
