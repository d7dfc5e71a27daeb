"""The shapes of the parameters of two models that people fine-tune."""

from __future__ import annotations

import math

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


MODELS = {"MiniLM": minilm, "ResNet-18": resnet18}


def numbers(shapes: dict[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
