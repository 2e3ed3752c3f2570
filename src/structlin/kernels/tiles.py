"""How tokens are laid out by the set of experts that they chose: in tiles of one set each, and tiles in units.

A token that visits several experts stays one row. The places of a set start at a whole tile, so a tile is whole rows of
one set, padded with places that hold no token; how many tiles there are at most follows from the number of tokens.
Tiles of a set that follow each other form a unit, for sums over tokens.
"""

from __future__ import annotations

from math import comb
from typing import NamedTuple

from torch import Tensor

TILE = 128  # places of a tile
UNIT = 8  # tiles of a unit at most
BLOCK = 128  # tokens that one program counts
MOST_SETS, MOST_ROWS = 128, 256


class Sets(NamedTuple):
    """Where the tokens are. All int32, on the device.

    Attributes:
        token: (places,), the token of each place, or the number of tokens where there is none.
        choice: (top_k, places), the index in the flattened (tokens, top_k) of the choice of each place and slot; the
            slots of a place are its experts in ascending order. Not set where there is no token.
        place: (tokens, top_k), the index in the flattened (top_k, places) of each choice.
        tile: (tiles, top_k), the experts of each tile, -1 where it holds no token.
        first: (units,), the first tile of each unit.
        tiles: (units,), the number of its tiles, possibly 0.
        unit: (units, top_k), its experts, -1 where it has no tile.
    """

    token: Tensor
    choice: Tensor
    place: Tensor
    tile: Tensor
    first: Tensor
    tiles: Tensor
    unit: Tensor


def limits(tokens: int, experts: int, top_k: int) -> tuple[int, int]:
    """Tiles and units at most."""
    sets = comb(experts, top_k)
    tiles = -(-tokens // TILE) + sets
    return tiles, sets + tiles // UNIT


def power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def block(digit: int) -> int:
    """The edge of a tile that holds a digit."""
    return max(16, power(digit))


def joined(top_k: int, digit: int) -> int:
    """The same for the digits of all experts of a tile."""
    return power(top_k * block(digit))


def few_sets(tokens: int, experts: int, top_k: int) -> bool:
    """Whether a set has a whole tile of tokens on average, so that half of all places are empty at worst."""
    sets = comb(experts, top_k)
    return sets <= MOST_SETS and tokens >= TILE * sets


def fits(digits: tuple[int, int, int, int], top_k: int) -> bool:
    """Whether the kernels take these digits (c, a, f, o): rows of whole 16 bytes, a group of all experts in a tile."""
    c, _, f, _ = digits
    wide = max(joined(top_k, c), joined(top_k, f))
    return all(digit % 8 == 0 and 16 <= digit <= 128 for digit in digits) and wide <= MOST_ROWS
