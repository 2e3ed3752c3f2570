"""One file per structure: its hyperparameters and its plan. Importing this package registers them all."""

from .block_diagonal import BlockDiagonal
from .btt import BTT
from .dense import Dense
from .dyad import Dyad
from .kronecker import Kronecker
from .low_rank import LowRank
from .monarch import Monarch

__all__ = ["BTT", "BlockDiagonal", "Dense", "Dyad", "Kronecker", "LowRank", "Monarch"]
