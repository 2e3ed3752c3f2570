"""What a user writes: small frozen dataclasses, one per structure, found by name.

A spec holds hyperparameters only: no shape, no device, no kernel choice. `Spec.plan` fixes the shape.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from math import gcd
from typing import Any, ClassVar, Literal, Self, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from .plan import Plan

STRUCTURES: dict[str, type[Spec]] = {}
"""Registered structures by name."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """A family of structured matrices and its hyperparameters; subclass it and decorate with `register`.

    Fields are positive integers or `typing.Literal` choices; both are checked on construction.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field, kind in self._fields().items():
            _check(self.name, field, kind, getattr(self, field))

    @classmethod
    def _fields(cls) -> dict[str, Any]:
        hints = get_type_hints(cls)
        return {field.name: hints[field.name] for field in dataclasses.fields(cls)}

    def plan(self, out_features: int, in_features: int) -> Plan:
        """The matrix of this family with ``out_features`` rows and ``in_features`` columns.

        Raises:
            ValueError: when the shape does not fit, naming the parameters that do.
        """
        raise NotImplementedError

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        """Yield small ``(spec, (out_features, in_features))`` that the contract tests run over."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_dict` reads back."""
        return {"structure": self.name, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Spec:
        """The spec that `to_dict` described.

        Raises:
            ValueError: for an unknown structure or parameter, naming the nearest known one.
        """
        arguments = dict(values)
        cls = find(arguments.pop("structure", ""))
        for key in arguments:
            if key not in cls._fields():
                raise ValueError(f"{cls.name} has no parameter {key!r}; {_allowed(key, cls._fields())}")
        return cls(**arguments)

    def __str__(self) -> str:
        """The spec as `parse` reads it; the first field always shows, others when they are not the default."""
        shown = [f for i, f in enumerate(dataclasses.fields(self)) if i == 0 or getattr(self, f.name) != f.default]
        return ":".join([self.name, *(f"{f.name}={getattr(self, f.name)}" for f in shown)])


S = TypeVar("S", bound=Spec)


@dataclass_transform(frozen_default=True)
def register(name: str) -> Callable[[type[S]], type[S]]:
    """Make a subclass of `Spec` a frozen dataclass that checkpoints, the command line and the tests find by name.

    Raises:
        ValueError: when the name is taken.
    """

    def add(cls: type[S]) -> type[S]:
        if name in STRUCTURES:
            raise ValueError(f"structure {name!r} is taken by {STRUCTURES[name].__qualname__}")
        cls.name = name
        # __str__ is ours; repr stays that of the dataclass, a Python expression
        spec = dataclasses.dataclass(frozen=True)(cls)
        STRUCTURES[name] = spec
        return spec

    return add


def find(name: str) -> type[Spec]:
    """The structure registered under ``name``.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    if name not in STRUCTURES:
        raise ValueError(f"unknown structure {name!r}; {_allowed(name, STRUCTURES)}")
    return STRUCTURES[name]


def parse(text: str) -> Spec:
    """A spec from the command line: the name, then parameters, all joined by colons.

    >>> parse("dyad:nblocks=8:variant=ot")
    Dyad(nblocks=8, variant='ot')

    Raises:
        ValueError: for an unknown structure or parameter or a bad value, naming what is allowed.
    """
    name, *parts = text.strip().split(":")
    cls = find(name)
    fields = cls._fields()
    values: dict[str, Any] = {"structure": name}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} in {text!r} is not of the form parameter=value")
        if key in values:
            raise ValueError(f"parameter {key!r} is given twice in {text!r}")
        values[key] = int(value) if fields.get(key) is int and value.isdecimal() else value
    return Spec.from_dict(values)


def divide(what: str, parts: int, **sizes: int) -> tuple[int, ...]:
    """Each of ``sizes`` divided by ``parts``, exactly.

    >>> divide("nblocks", 4, in_features=64, out_features=32)
    (16, 8)

    Raises:
        ValueError: naming the parameter ``what``, the size that it does not divide, and the values that would do.
    """
    for name, size in sizes.items():
        if size % parts:
            raise ValueError(f"{what}={parts} does not divide {name}={size}; {_fitting(what, gcd(*sizes.values()))}")
    return tuple(size // parts for size in sizes.values())


def balanced(size: int) -> tuple[int, int]:
    """The two factors of ``size`` nearest its square root, smaller first: ``balanced(768) == (24, 32)``."""
    small = next(d for d in range(int(size**0.5), 0, -1) if size % d == 0)
    return small, size // small


def _fitting(what: str, size: int) -> str:
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    shown = divisors if len(divisors) <= 12 else [*divisors[:11], "...", divisors[-1]]
    return f"{what} may be {', '.join(map(str, shown))}"


def _allowed(given: str, names: Any) -> str:
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(sorted(names)) or 'none'}"


def _check(structure: str, field: str, kind: Any, value: Any) -> None:
    where = f"{structure}: {field}={value!r}"
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{where} is unknown; {_allowed(str(value), get_args(kind))}")
    elif kind is int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where} must be a positive whole number")
    else:
        raise TypeError(f"{where}: fields are int or Literal, not {kind}")
