"""EfficientNet-Lite0: a small image network with BatchNorm, under the names of its checkpoint.

Names: `_conv_stem`, `_bn0`, `_blocks.N._expand_conv` and so on, `_conv_head`, `_bn1`, `_fc`.

Source: Tan and Le, EfficientNet (2019), table 1; the Lite variants have no squeeze-and-excitation
and ReLU6 in place of swish.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from lamina.errors import TaskError

#: stages: (blocks, kernel, stride of the first block, expansion, channels)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: an odd pixel goes to the right and below.

    Formula: output size `ceil(input / stride)`, so in all
    `max((output - 1) * stride + kernel - input, 0)` pixels of padding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The convolved images."""
        padding = []
        for size, kernel, stride in zip(
            reversed(x.shape[2:]), reversed(self.kernel_size), reversed(self.stride), strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(functional.pad(x, padding) if any(padding) else x)


def _conv(inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1) -> SameConv:
    return SameConv(inside, outside, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Widen, filter each channel, narrow; with a shortcut where the shape stays."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.expands = expansion != 1
        self.shortcut = stride == 1 and inside == outside
        if self.expands:
            self._expand_conv = _conv(inside, wide, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = _conv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = _conv(wide, outside, 1)
        self._bn2 = _norm(outside)

    def forward(self, x: Tensor) -> Tensor:
        """The features after this block."""
        wide = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        filtered = functional.relu6(self._bn1(self._depthwise_conv(wide)))
        y: Tensor = self._bn2(self._project_conv(filtered))
        return x + y if self.shortcut else y


class Lite0(nn.Module):
    """The whole network.

    Args:
        classes: the outputs of the last layer, `_fc`.
        dropout: before the last layer.
    """

    def __init__(self, classes: int, dropout: float = 0.2) -> None:
        super().__init__()
        self._conv_stem = _conv(3, STEM, 3, stride=2)
        self._bn0 = _norm(STEM)
        self._blocks = nn.ModuleList()
        inside = STEM
        for count, kernel, stride, expansion, outside in STAGES:
            for index in range(count):
                step = stride if index == 0 else 1
                self._blocks.append(Block(inside, outside, kernel, step, expansion))
                inside = outside
        self._conv_head = _conv(inside, HEAD, 1)
        self._bn1 = _norm(HEAD)
        self._dropout = nn.Dropout(dropout)
        self._fc = nn.Linear(HEAD, classes)

    def features(self, images: Tensor) -> Tensor:
        """The mean over all places of the last features, for images scaled by `normalised`."""
        x = functional.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
        return functional.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """The logits of each image."""
        logits: Tensor = self._fc(self._dropout(self.features(images)))
        return logits


def normalised(pixels: Tensor) -> Tensor:
    """Pixels from 0 to 255 on the scale that the network was trained on."""
    return (pixels - 127.0) / 128.0


def load_pretrained(path: Path, classes: int | None = None) -> Lite0:
    """The network with the pretrained weights of a file.

    Args:
        path: the checkpoint.
        classes: outputs of a fresh last layer; None keeps the 1,000 classes of ImageNet.

    Raises:
        TaskError: if the file is not this network's checkpoint.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        model = Lite0(1000 if classes is None else classes)
        if classes is not None:
            weights = {k: v for k, v in weights.items() if not k.startswith("_fc.")}
        found = model.load_state_dict(weights, strict=False)
        missing = [name for name in found.missing_keys if classes is None or "_fc." not in name]
        if missing or found.unexpected_keys:
            raise ValueError(f"missing {missing[:3]}, unexpected {found.unexpected_keys[:3]}")
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise TaskError(
            f"The image network {path} cannot be loaded ({' '.join(str(error).split())}). "
            f"Remove the folder {path.parent} to fetch it anew."
        ) from error
    if classes is not None:
        nn.init.normal_(model._fc.weight, std=0.01)
        nn.init.zeros_(model._fc.bias)
    return model
