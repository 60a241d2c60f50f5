"""The residual networks for small images of He et al. (arXiv 1512.03385, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class Block(nn.Module):
    """Two 3x3 convolutions beside an identity; (batch, inputs, h, w) to (batch, outputs, ...).

    Where the shape changes the identity skips every other pixel and pads channels with zeros
    (the paper's option A: no parameters), or is a 1x1 convolution (option B).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, projected: bool = False) -> None:
        super().__init__()
        self.conv1, self.norm1 = _convolution(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _convolution(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs
        self.beside = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        ) if projected and inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.beside is not None:
            return F.relu(y + self.beside(x))
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(x, (0, 0, 0, 0, 0, self.extra)))


class ResNet(nn.Module):
    """Stages of blocks, each of twice the width and half the size of the one before; images of any size.

    Parameters
    ----------
    channels, classes : int
    width : int
        Channels of the first stage.
    blocks : sequence of int
        Blocks of each stage, two layers each.
    projected : bool
        Where the shape changes, a 1x1 convolution (option B) instead of skipping and padding (option A).
    """

    def __init__(self, channels: int, classes: int, width: int = 16, blocks: Sequence[int] = (3, 3, 3),
                 projected: bool = False) -> None:
        super().__init__()
        self.stem, self.norm = _convolution(channels, width), nn.BatchNorm2d(width)
        widths = [width * 2**stage for stage, count in enumerate(blocks) for _ in range(count)]
        before = [width, *widths[:-1]]
        self.blocks = nn.Sequential(
            *(Block(i, o, 1 if i == o else 2, projected) for i, o in zip(before, widths))
        )
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))
