"""What a user writes: small frozen dataclasses, one per structure, found by name.

A spec holds hyperparameters only: no shape, no device, no kernel choice. `Spec.plan` fixes the shape. Specs add,
multiply and transpose as the matrices do, and every one of them is also a line of text and a JSON object.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from .masks import Boxcar
from .padding import with_padding
from .plan import Plan

STRUCTURES: dict[str, type[Spec]] = {}
"""Registered structures by name."""

MIXTURES: dict[str, type[Spec]] = {}
"""Specs by name that are several matrices instead of one, and so no structures."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """A family of structured matrices and its hyperparameters; subclass it and decorate with `register`.

    Fields are positive integers, fractions from 0 to 1 (float), bool, str, `typing.Literal` choices, specs, tuples of
    one of these (``tuple[int, ...]``), or unions of them with each other and None. They are checked on construction.

    Every structure has the field ``pad``: where a width does not fit, take the smallest wider matrix that does and keep
    its first rows and columns. A spec made of others pads as a whole, and does so where one of them asks for it.
    """

    name: ClassVar[str]
    pad: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        inner = {field: _unpadded(getattr(self, field)) for field in self._fields()}
        for field, value in inner.items():
            if value != getattr(self, field):
                object.__setattr__(self, field, value)
                object.__setattr__(self, "pad", True)
        for field, kind in self._fields().items():
            value = _frozen(kind, getattr(self, field))
            object.__setattr__(self, field, value)
            _check(self.name, field, kind, value)

    @classmethod
    def _fields(cls) -> dict[str, Any]:
        hints = get_type_hints(cls)
        fields = sorted(dataclasses.fields(cls), key=lambda field: field.kw_only is True)
        return {field.name: hints[field.name] for field in fields}

    def plan(self, out_features: int, in_features: int) -> Plan:
        """The matrix of this family with ``out_features`` rows and ``in_features`` columns.

        A structure writes the exact case only; `register` adds the padding.

        Raises:
            ValueError: when the shape does not fit, naming the parameters that do and what ``pad=True`` would take.
        """
        raise NotImplementedError

    def multiples(self, out_features: int, in_features: int) -> tuple[int, int]:
        """What the widths of a matrix that pads one of these widths are multiples of.

        Padding looks for widths among these only, which makes it fast. A structure that says nothing tries all.
        """
        return 1, 1

    @classmethod
    def examples(cls) -> Iterator[tuple[Self, tuple[int, int]]]:
        """Yield small ``(spec, (out_features, in_features))`` that the contract tests run over."""
        raise NotImplementedError

    def reference_init(self, plan: Plan) -> dict[str, tuple[str, float]]:
        """How the structure's published code draws its factors, for ``init="reference"``.

        Name of a factor, or "bias", -> ("normal", standard deviation), ("uniform", bound) or ("orthogonal", singular
        value). A factor left out starts at spectral scale, a bias left out at zero.
        """
        return {}

    def masks(self, plan: Plan) -> dict[str, Boxcar]:
        """Which factors of ``plan`` are multiplied by a trained mask: name of the factor -> mask, none unless given."""
        return {}

    def __add__(self, other: Spec) -> Spec:
        """The sum of both matrices."""
        return _make(find("sum"), {"terms": (self, other)}) if isinstance(other, Spec) else NotImplemented

    def __matmul__(self, other: Spec) -> Spec:
        """The product of both matrices, ``other`` applied first."""
        return _make(find("product"), {"factors": (self, other)}) if isinstance(other, Spec) else NotImplemented

    @property
    def T(self) -> Spec:
        """The transposed matrix."""
        return _make(find("transpose"), {"of": self})

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_dict` reads back."""
        values = {field: _to_json(getattr(self, field)) for field in self._fields() if field != "pad" or self.pad}
        return {"structure": self.name, **values}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Spec:
        """The spec that `to_dict` described.

        Raises:
            ValueError: for an unknown structure or parameter, naming the nearest known one.
        """
        arguments = {key: _from_json(value) for key, value in values.items()}
        return _make(find(arguments.pop("structure", "")), arguments)

    def __str__(self) -> str:
        """The spec as `parse` reads it; the first field always shows, others when they are not the default."""
        default = {field.name: field.default for field in dataclasses.fields(self)}
        first = next(field for field in self._fields())
        values = {field: getattr(self, field) for field in self._fields()}
        always = [first] if first != "pad" else []
        shown = [f for f, v in values.items() if v is not None and (f in always or v != default[f])]
        return ":".join([self.name, *(f"{field}={_text(values[field])}" for field in shown)])

    def __repr__(self) -> str:
        """A Python expression that gives the spec back."""
        values = {field: getattr(self, field) for field in self._fields() if field != "pad" or self.pad}
        return f"{type(self).__name__}({', '.join(f'{field}={value!r}' for field, value in values.items())})"


S = TypeVar("S", bound=Spec)


@dataclass_transform(frozen_default=True)
def register(name: str, registry: dict[str, type[Spec]] = STRUCTURES) -> Callable[[type[S]], type[S]]:
    """Make a subclass of `Spec` a frozen dataclass that checkpoints, the command line and the tests find by name.

    Raises:
        ValueError: when the name is taken, ends in _moe, or is not made of letters, digits and underscores.
    """
    if not name.isidentifier() or name.endswith("_moe"):
        raise ValueError(f"{name!r} is no name for a structure; use letters, digits and underscores, and no _moe last")

    def add(cls: type[S]) -> type[S]:
        if name in registry:
            raise ValueError(f"structure {name!r} is taken by {registry[name].__qualname__}")
        cls.name = name
        spec = dataclasses.dataclass(frozen=True, repr=False)(cls)
        if "plan" in vars(spec) and registry is STRUCTURES:
            spec.plan = with_padding(spec.plan)  # type: ignore[method-assign, assignment]
        registry[name] = spec
        return spec

    return add


def _unpadded(value: Any) -> Any:
    """A field with the padding of the specs in it turned off."""
    if isinstance(value, list | tuple):
        return type(value)(_unpadded(item) for item in value)
    return dataclasses.replace(value, pad=False) if isinstance(value, Spec) and value.pad else value


def find(name: str) -> type[Spec]:
    """The structure registered under ``name``.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    if not isinstance(name, str) or name not in STRUCTURES | MIXTURES:
        raise ValueError(f"unknown structure {name!r}; {_allowed(name, STRUCTURES)}")
    return (STRUCTURES | MIXTURES)[name]


def parse(text: str) -> Spec:
    """A spec from the command line: the name, then parameters, all joined by colons.

    Sums, products and transposes are written with ``+``, ``@`` and ``.T``, in this order of precedence from the
    weakest, and with parentheses, after which ``:pad=true`` may stand. A number between two ``@`` is the width there.

    >>> parse("dyad:nblocks=8:variant=ot")
    Dyad(nblocks=8, variant='ot')
    >>> parse("(monarch:nblocks=4 + low_rank:rank=8).T") == (Monarch(nblocks=4) + LowRank(rank=8)).T
    True

    Raises:
        ValueError: for an unknown structure or parameter or a bad value, naming what is allowed.
    """
    text = text.strip()
    if len(terms := _split(text, "+")) > 1:
        return _make(find("sum"), {"terms": tuple(map(parse, terms))})
    if len(factors := _split(text, "@")) > 1:
        specs = tuple(parse(factor) for factor in factors if not factor.strip().isdecimal())
        widths = {int(factor) for factor in factors if factor.strip().isdecimal()}
        if len(widths) > 1 or len(factors) - len(specs) not in (0, len(specs) - 1):
            raise ValueError(f"{text!r} must give one width, between all factors or none")
        return _make(find("product"), {"factors": specs, "width": widths.pop() if widths else None})
    if match := re.fullmatch(r"(\(.*\)|\w+)_moe((?::.*)?)", text):
        own = [part for part in match[2].split(":") if part.startswith(("experts=", "top_k=", "balance="))]
        rest = [part for part in match[2].split(":")[1:] if part not in own]
        return _make(find("moe"), {"of": parse(":".join([match[1], *rest])), **_values(find("moe"), own, text)})
    if text.endswith(".T"):
        return parse(text[:-2]).T
    if text.startswith("("):
        if text.endswith("):pad=true"):
            return dataclasses.replace(parse(text.removesuffix(":pad=true")), pad=True)
        if not text.endswith(")"):
            raise ValueError(f"{text!r} has a parenthesis that is not closed, or text after it")
        return parse(text[1:-1])
    return _parse_one(text)


def _split(text: str, operator: str) -> list[str]:
    """The parts of ``text`` between the operators that stand outside parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == operator and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _parse_one(text: str) -> Spec:
    name, *parts = text.split(":")
    return _make(find(name), _values(find(name), parts, text))


def _values(cls: type[Spec], parts: Sequence[str], text: str) -> dict[str, Any]:
    """The parameters of ``cls`` that ``parts`` of the ``text`` give."""
    fields = cls._fields()
    values: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} in {text!r} is not of the form parameter=value")
        if key in values:
            raise ValueError(f"parameter {key!r} is given twice in {text!r}")
        values[key] = _from_text(fields.get(key), value)
    return values


def _make(cls: type[Spec], arguments: dict[str, Any]) -> Spec:
    for key in arguments:
        if key not in cls._fields():
            raise ValueError(f"{cls.name} has no parameter {key!r}; {_allowed(key, cls._fields())}")
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in arguments:
            raise ValueError(f"{cls.name} needs the parameter {field.name!r}")
    return cls(**arguments)


def _allowed(given: object, names: Any) -> str:
    near = difflib.get_close_matches(str(given).lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(sorted(names)) or 'none'}"


def _check(structure: str, field: str, kind: Any, value: Any) -> None:
    where = f"{structure}: {field}={value!r}"
    if _fits(kind, value):
        return
    if get_origin(kind) is Literal:
        raise ValueError(f"{where} is unknown; {_allowed(value, get_args(kind))}")
    raise ValueError(f"{where} must be {_described(kind)}")


KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a positive whole number", lambda value: isinstance(value, int) and value >= 1),
    float: ("a fraction from 0 to 1", lambda value: isinstance(value, float) and 0 <= value <= 1),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    str: ("text", lambda value: isinstance(value, str)),
    NoneType: ("left out", lambda value: value is None),
    Spec: ("a spec", lambda value: isinstance(value, Spec)),
}


def _fits(kind: Any, value: Any) -> bool:
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return isinstance(value, str | int) and value in inner
    if get_origin(kind) is UnionType:
        return any(_fits(choice, value) for choice in inner)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and len(value) > 0 and all(_fits(inner[0], item) for item in value)
    if kind not in KINDS:
        raise TypeError(f"a field of a spec cannot be {kind}; {Spec.__doc__}")
    return KINDS[kind][1](value) and (kind is bool or not isinstance(value, bool))


def _described(kind: Any) -> str:
    if get_origin(kind) is UnionType:
        return " or ".join(map(_described, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"several of: {_described(get_args(kind)[0])}"
    return KINDS[kind][0]


def _frozen(kind: Any, value: Any) -> Any:
    """``value`` as it is stored: sequences as tuples, whole numbers in a tuple of fractions as floats."""
    if isinstance(value, list | tuple):
        exact = kind == tuple[float, ...] or tuple[float, ...] in get_args(kind)
        return tuple(float(item) if exact and isinstance(item, int) else item for item in value)
    return value


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value.to_dict() if isinstance(value, Spec) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    return Spec.from_dict(value) if isinstance(value, dict) else value


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _from_text(kind: Any, text: str) -> Any:
    """``text`` as the first kind of field that it is the text of; the text itself when there is none."""
    inner = get_args(kind)
    if get_origin(kind) is UnionType:
        values = (_from_text(choice, text) for choice in inner)
        return next((value for value in values if value is not text), text)
    if get_origin(kind) is tuple:
        return tuple(_from_text(inner[0], part) for part in text.split("x"))
    if kind is int and text.isdecimal():
        return int(text)
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind is float:
        try:
            return float(text)
        except ValueError:
            return text
    return text
