"""A pretrained BERT encoder with a linear classifier on the mean of its token vectors.

The parameters are named as in BERT: `embeddings.*`, `encoder.layer.N.*`, `classifier.*`. BERT's
pooler is left out: nothing here uses it, so it would never receive a gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamina.errors import TaskError, require

if TYPE_CHECKING:
    from transformers import BertConfig


class ReviewClassifier(nn.Module):
    """Embeddings, encoder layers, mean over the tokens, dropout, a linear layer."""

    def __init__(self, config: BertConfig, classes: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        bert = _bert(config)
        self.embeddings: nn.Module = bert.embeddings
        self.encoder: nn.Module = bert.encoder
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, classes)
        nn.init.normal_(self.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean vector of each text's tokens."""
        mask = attention_mask.bool()
        embedded = self.embeddings(input_ids=input_ids)
        hidden = self.encoder(embedded, attention_mask=mask[:, None, None, :]).last_hidden_state
        weights = mask[:, :, None].to(hidden.dtype)
        mean: Tensor = (hidden * weights).sum(1) / weights.sum(1)
        return mean

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits of each text."""
        logits: Tensor = self.classifier(self.dropout(self.features(input_ids, attention_mask)))
        return logits


def _bert(config: BertConfig) -> Any:
    """BERT without its pooler, with an attention that takes a boolean mask."""
    module = require("transformers.models.bert.modeling_bert", "hf", "The sentence encoder")
    config._attn_implementation = "sdpa"
    return module.BertModel(config, add_pooling_layer=False)


def load_classifier(folder: Path, classes: int = 2) -> ReviewClassifier:
    """A classifier with the pretrained weights of a folder (config.json, model.safetensors)."""
    bert = require("transformers.models.bert", "hf", "The sentence encoder")
    safetensors = require("safetensors", "hf", "The sentence encoder")
    load_file = require("safetensors.torch", "hf", "The sentence encoder").load_file
    try:
        config = bert.BertConfig.from_json_file(str(folder / "config.json"))
        weights = load_file(str(folder / "model.safetensors"))
        model = ReviewClassifier(config, classes)
        load_encoder(model, weights)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise TaskError(
            f"The sentence encoder in {folder} cannot be loaded ({' '.join(str(error).split())}). "
            "Remove that folder to fetch it anew."
        ) from error
    return model


def load_encoder(model: ReviewClassifier, weights: dict[str, Tensor]) -> None:
    """Copy pretrained weights; every parameter but the classifier's must be there."""
    unused = ("pooler.", "embeddings.position_ids")
    wanted = {name: value for name, value in weights.items() if not name.startswith(unused)}
    found = model.load_state_dict(wanted, strict=False)
    missing = [name for name in found.missing_keys if not name.startswith("classifier.")]
    if missing or found.unexpected_keys:
        raise ValueError(f"missing {missing[:3]}, unexpected {found.unexpected_keys[:3]}")


@torch.inference_mode()
def features_of(model: ReviewClassifier, batches: Any) -> tuple[Tensor, Tensor]:
    """The features and labels of all texts, computed without dropout."""
    device = next(model.parameters()).device
    was_training, features, labels = model.training, [], []
    model.eval()
    for batch in batches:
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        features.append(model.features(ids, mask).float().cpu())
        labels.append(batch["labels"].cpu())
    model.train(was_training)
    return torch.cat(features), torch.cat(labels)
