"""The weight files of a model as one mapping from names to tensors, read one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Weights:
    """The tensors of some safetensors files, by name; only headers are read until one is asked for.

    Attributes:
        shapes: name -> shape, of every tensor in the files.
        sizes: name -> bytes.

    Raises:
        ValueError: for a file that is not there, is no safetensors file or is damaged, and a name in two files.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]) -> None:
        self.files = [Path(file) for file in files]
        self._where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sizes: dict[str, int] = {}
        for file in self.files:
            if file.suffix != ".safetensors":
                raise ValueError(f"{file} is not a safetensors file, and nothing else is read")
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118, not a dict
                        view = opened.get_slice(name)
                        self._add(name, file, tuple(view.get_shape()), view.get_dtype())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is missing or damaged ({error}); copy it again") from None

    def _add(self, name: str, file: Path, shape: tuple[int, ...], dtype: str) -> None:
        if name in self._where:
            raise ValueError(
                f"{name} stands in two files, {self._where[name].name} and {file.name}; delete the stale one"
            )
        entries = 1
        for width in shape:
            entries *= width
        bits = int("".join(filter(str.isdigit, dtype.partition("_")[0])) or 8)
        self._where[name], self.shapes[name], self.sizes[name] = file, shape, entries * bits // 8

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        try:
            with safe_open(self._where[name], framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self._where[name]}: {name} cannot be read ({error})") from None
        return tensor

    @classmethod
    def of(cls, folder: Path) -> Weights:
        """The weights in a folder that transformers wrote: one file, or those that its index names.

        Raises:
            ValueError: also for a folder without safetensors, and an index that its files do not match.
        """
        if (folder / INDEX).is_file():
            try:
                places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
                weights = cls(folder / name for name in sorted(set(places.values())))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{folder / INDEX} is damaged ({error!r}); copy it again") from None
            wrong = [name for name, file in places.items() if weights._where.get(name) != folder / file]
            if wrong:
                raise ValueError(f"{folder / INDEX} names tensors that its files do not have: {', '.join(wrong[:5])}")
            return weights
        if not (folder / SINGLE).is_file():
            raise ValueError(
                f"{folder} has no {SINGLE} and no {INDEX}; give a folder that save_pretrained wrote. Pickled weights "
                "are not read: load them with transformers and save them again"
            )
        return cls([folder / SINGLE])
