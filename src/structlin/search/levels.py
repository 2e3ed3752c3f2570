"""Small images as integers from 0 to 63, which the tasks on pixels predict, and the part of them that is held out.

Only training images are read, so that a search does not choose by the test.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..problems.vision.images import Pictures
from ..train.config import OptionError

LEVELS, VALID_SHARE = 64, 0.1


def small(pictures: Pictures, size: int) -> Tensor:
    """Images as means over ``size`` x ``size`` areas, rounded, uint8 ``[n, size, size, channels]`` from 0 to 63.

    Images with values above 63 are divided by 4 first.

    Raises:
        OptionError: for more images than fit into memory.
    """
    if pictures.pixels is None:
        raise OptionError("--data", f"{len(pictures)} images of {pictures.shape[0]} pixels do not fit into memory")
    values = torch.from_numpy(pictures.pixels).float()
    if pictures.pixels.max() >= LEVELS:
        values = (values / 4).floor()
    areas = F.adaptive_avg_pool2d(values.permute(0, 3, 1, 2), size)
    return areas.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
