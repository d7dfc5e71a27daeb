"""Starter plans for models of well-known shapes; `python -m benchmarks.starter_plans` prints them.

The models are on the meta device: they have the names and shapes of the real ones, and no weights.
With `--write` the page `docs/how-to/starter-plans.md` is written, which a test holds current.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lamina as lm

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "how-to" / "starter-plans.md"
#: the beginning of what a plan says of the names of its model
NAMES = "# Names and shapes"


def transformers_model(kind: str, model: str, **settings: Any) -> nn.Module:
    """A model of Transformers by its configuration, without weights."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    package = importlib.import_module(f"transformers.models.{kind}")
    config = next(name for name in dir(package) if name.lower() == f"{kind}config")
    with torch.device("meta"):
        made: nn.Module = getattr(package, model)(getattr(package, config)(**settings))
    return made


def lite0() -> nn.Module:
    """The image network of the example task."""
    folder = str(ROOT / "examples" / "tasks")
    if folder not in sys.path:
        sys.path.append(folder)
    module = importlib.import_module("task_helpers.lite0")
    with torch.device("meta"):
        made: nn.Module = module.Lite0(10)
    return made


MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
SWIN = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
RESNET = {
    "layer_type": "basic",
    "depths": [2, 2, 2, 2],
    "hidden_sizes": [64, 128, 256, 512],
    "embedding_size": 64,
}
LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "MiniLM-L6 (a BERT) with a classifier": lambda: transformers_model(
        "bert", "BertForSequenceClassification", **MINILM, num_attention_heads=12
    ),
    "EfficientNet-Lite0": lite0,
    "GPT-2": lambda: transformers_model("gpt2", "GPT2LMHeadModel"),
    "ViT-Base": lambda: transformers_model("vit", "ViTForImageClassification"),
    "Swin-Tiny": lambda: transformers_model("swin", "SwinForImageClassification", **SWIN),
    "T5-Small": lambda: transformers_model("t5", "T5ForConditionalGeneration"),
    "ResNet-18": lambda: transformers_model("resnet", "ResNetForImageClassification", **RESNET),
    "Llama of 7 billion": lambda: transformers_model("llama", "LlamaForCausalLM", **LLAMA),
}

INTRODUCTION = """# Starter plans

`lm.starter_plan(model)` writes a first plan that fits a model; `lamina init` writes it to a file:

```
lamina init my_task.py -o plan.toml
lamina init --model my_models:build -o plan.toml
```

Head, layers, what lies below and above them, norms, biases, embeddings and tokens are found by
looking at modules, shapes and their order. Nothing is computed, so a model on the meta device will
do. The plan is for fine-tuning pretrained weights; its values are usual ones with their source
beside them, not tuned for your data. It ends with the names and shapes of the model, as patterns
that can be copied into a rule.

```python
import lamina as lm
from lamina.toy import toy_problem

model = toy_problem().model
found = lm.starter_plan(model)
print(found)                                # the text, with comments
print(found.plan.preview(model, steps=1000))
optimizer = found.plan.build(model, steps=1000)
```

What it writes for models of these shapes is below (`python -m benchmarks.starter_plans --write`
writes this page, and a test holds it current). The list of names is shown for the first of them.
"""


def page() -> str:
    """The page of the docs."""
    parts = [INTRODUCTION]
    for place, (name, build) in enumerate(MODELS.items()):
        text = str(lm.starter_plan(build()))
        if place:
            text = text.partition(NAMES)[0]
        parts.append(f"\n## {name}\n\n```toml\n{text.strip()}\n```\n")
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Starter plans for well-known models.")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    text = page()
    if parser.parse_args().write:
        PAGE.write_text(text, encoding="utf-8")
        print(f"{PAGE} is written")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
