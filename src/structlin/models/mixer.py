"""MLP-Mixer (Tolstikhin et al. 2021): patches mixed by one perceptron across positions and one across channels.

Written out since transformers has none and timm brings in torchvision.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Mixing(nn.Module):
    """Two linear layers with a GELU between, over the last axis (equation 1 of the paper)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to the same shape."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class MixerBlock(nn.Module):
    """``tokens`` mixes the patches of each channel, then ``channels`` the channels of each patch, both with a norm
    before and a residual sum after."""

    def __init__(self, patches: int, width: int, token_width: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.tokens = Mixing(patches, token_width)
        self.norm2 = nn.LayerNorm(width)
        self.channels = Mixing(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, patches, width]`` to the same shape."""
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.channels(self.norm2(x))
        return out


class Mixer(nn.Module):
    """Patches, ``depth`` blocks, a norm, the mean over patches, and a linear head that starts at zero.

    Args:
        image: pixels on a side of the square images.
        patch: pixels on a side of a patch; divides ``image``.
        channels: colours of a pixel.
        classes: outputs.
        width: features of a patch ("hidden size C" in table 1 of the paper).
        depth: blocks.
        token_width: hidden features across patches ("D_S").
        mlp_width: hidden features across channels ("D_C").

    Raises:
        ValueError: for a patch that does not divide the image.
    """

    def __init__(
        self,
        image: int,
        patch: int,
        channels: int,
        classes: int,
        width: int,
        depth: int,
        token_width: int,
        mlp_width: int,
    ) -> None:
        super().__init__()
        if image % patch:
            allowed = ", ".join(str(size) for size in range(1, image + 1) if image % size == 0)
            raise ValueError(f"patch={patch} does not divide the {image} pixels of an image; patch may be {allowed}")
        self.patches = nn.Conv2d(channels, width, patch, patch)
        count = (image // patch) ** 2
        self.blocks = nn.ModuleList(MixerBlock(count, width, token_width, mlp_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` of images ``[batch, channels, image, image]``."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x).mean(1))
        return out
