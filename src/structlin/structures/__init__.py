"""One file per structure: its hyperparameters and its plan. Importing this package registers them all."""

from .algebra import Product, Sum, Transpose
from .blast import Blast
from .block_butterfly import BlockButterfly
from .block_dense import BlockDense
from .block_diagonal import BlockDiagonal
from .block_shuffle import BlockShuffle
from .block_sparse import BlockSparse
from .btt import BTT
from .chain import Chain
from .dense import Dense
from .dyad import Dyad
from .einsum import Einsum
from .gblr import Gblr
from .kronecker import Kronecker
from .low_rank import LowRank
from .moe import MoE, btt_moe, dense_moe, low_rank_moe, monarch_moe
from .monarch import Monarch
from .pixelfly import Pixelfly
from .tensor_train import TensorTrain

__all__ = [
    "BTT",
    "Blast",
    "BlockButterfly",
    "BlockDense",
    "BlockDiagonal",
    "BlockShuffle",
    "BlockSparse",
    "Chain",
    "Dense",
    "Dyad",
    "Einsum",
    "Gblr",
    "Kronecker",
    "LowRank",
    "MoE",
    "Monarch",
    "Pixelfly",
    "Product",
    "Sum",
    "TensorTrain",
    "Transpose",
    "btt_moe",
    "dense_moe",
    "low_rank_moe",
    "monarch_moe",
]
