"""From the options of a recipe to rules of `to_structured_`: how a structure is read, and whether it fits a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..nn.init import check as check_init
from ..spec import Spec, parse
from ..surgery import to_structured_
from .config import OptionError


def spec(option: str, text: str) -> Spec:
    """The structure that ``text`` says; OptionError of ``option`` for one that is not known."""
    try:
        return parse(text)
    except ValueError as error:
        raise OptionError(option, str(error)) from None


def check(model: nn.Module, rules: Mapping[str, Spec | None], init: str) -> None:
    """See that ``rules`` fit the layers of ``model``, which may be on the meta device and stays as it is.

    Raises:
        OptionError: for a structure that does not fit, or layers that are not there.
    """
    try:
        check_init(init)
    except ValueError as error:
        raise OptionError("--init", str(error)) from None
    try:
        to_structured_(model, rules, init=init, dry_run=True)
    except ValueError as error:
        first, *more = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        also = f" (and {len(more)} more)" if more else ""
        raise OptionError("--structure, --layers", f"{first}{also}") from None
