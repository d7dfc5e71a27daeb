"""The shapes that are measured: two models that people fine-tune, and very many or few tensors."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

Shape = tuple[int, ...]


def minilm() -> dict[str, Shape]:
    """sentence-transformers/all-MiniLM-L6-v2 without its pooler: 101 tensors, 22.6 M numbers."""
    width, inner = 384, 1536
    shapes: dict[str, Shape] = {
        "embeddings.word": (30522, width),
        "embeddings.position": (512, width),
        "embeddings.type": (2, width),
        "embeddings.norm.weight": (width,),
        "embeddings.norm.bias": (width,),
    }
    parts = {
        "query": (width, width),
        "key": (width, width),
        "value": (width, width),
        "output": (width, width),
        "norm1": (width,),
        "intermediate": (inner, width),
        "dense": (width, inner),
        "norm2": (width,),
    }
    for layer in range(6):
        for part, shape in parts.items():
            shapes[f"layer.{layer}.{part}.weight"] = shape
            shapes[f"layer.{layer}.{part}.bias"] = shape[:1]
    return shapes


def resnet18() -> dict[str, Shape]:
    """ResNet-18: 62 tensors, 11.7 M numbers."""
    shapes: dict[str, Shape] = {"conv1.weight": (64, 3, 7, 7)}

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    norm("bn1", 64)
    before = 64
    for layer, after in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            name = f"layer{layer}.{block}"
            shapes[f"{name}.conv1.weight"] = (after, before, 3, 3)
            norm(f"{name}.bn1", after)
            shapes[f"{name}.conv2.weight"] = (after, after, 3, 3)
            norm(f"{name}.bn2", after)
            if before != after:
                shapes[f"{name}.downsample.0.weight"] = (after, before, 1, 1)
                norm(f"{name}.downsample.1", after)
            before = after
    return {**shapes, "fc.weight": (1000, 512), "fc.bias": (1000,)}


def split(shapes: dict[str, Shape], count: int) -> dict[str, Shape]:
    """The same numbers in `count` tensors: the largest is halved by rows, again and again."""
    parts = dict(shapes)
    # a heap gives its smallest item first, so the sizes are negative
    heap = [(-math.prod(shape), name) for name, shape in shapes.items()]
    heapq.heapify(heap)
    while len(parts) < count:
        _, name = heapq.heappop(heap)
        rows, *rest = parts.pop(name)
        if rows < 2:
            raise ValueError(f"{name} has {rows} row and cannot be halved; ask for fewer tensors")
        for half, size in enumerate((rows // 2, rows - rows // 2)):
            parts[f"{name}.{half}"] = (size, *rest)
            heapq.heappush(heap, (-size * math.prod(rest), f"{name}.{half}"))
    return parts


def minilm_in_1000() -> dict[str, Shape]:
    """The numbers of MiniLM in 1,000 tensors, so that each can be a group of its own."""
    return split(minilm(), 1000)


def two_matrices() -> dict[str, Shape]:
    """Two matrices of MiniLM: what Muon is for, and no more, since one of its steps takes long."""
    names = ("layer.0.query.weight", "layer.0.key.weight")
    return {name: minilm()[name] for name in names}


def tiny(count: int) -> dict[str, Shape]:
    """Tensors of 16 numbers: what a step costs beside its arithmetic."""
    return {f"tiny.{index}": (16,) for index in range(count)}


SHAPES: dict[str, Callable[[], dict[str, Shape]]] = {
    "MiniLM": minilm,
    "MiniLM in 1,000 tensors": minilm_in_1000,
    "two matrices of MiniLM": two_matrices,
    "ResNet-18": resnet18,
    "10,000 tiny tensors": lambda: tiny(10_000),
    "10 tiny tensors": lambda: tiny(10),
}


def numbers(shapes: dict[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
