"""Each recipe beside the code that it stands for: the difference of the weights after 20 steps.

`python -m benchmarks.recipes` prints the table of `docs/how-to/recipes.md`; what is not installed
is left out. The original runs as its package has it wherever there is one; else it is written by
hand from the formula of the paper.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import tempfile
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn

import lamina as lm
from lamina import recipes

STEPS = 20
LAYERS = 3
#: steps between two thaws
EVERY = 5
Train = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Case:
    """A recipe, and a function that trains a model with the original.

    `module` has to be installed for it; `tolerance` is what the weights may differ by. `at` is
    called with the plan's optimizer before each step.
    """

    recipe: str
    original: str
    module: str
    model: Callable[[], nn.Module]
    plan: lm.Plan
    train: Train
    tolerance: float = 1e-9
    at: Callable[[lm.Optimizer, int], None] | None = None
    #: what all gradients are multiplied by
    scale: float = 1.0

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str:
        return importlib.metadata.version(_PACKAGES.get(self.module, self.module))


@dataclass(frozen=True)
class Compared:
    """The largest difference of the weights, the largest way that one went, and who went none."""

    difference: float
    moved: float
    still: frozenset[str]


_PACKAGES = {"muon": "muon-optimizer"}


# --- models ----------------------------------------------------------------------------------


def bert() -> transformers.BertForSequenceClassification:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    """Build a small vision transformer of timm."""
    import timm

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16}
    return timm.create_model(
        "vit_tiny_patch16_224", depth=LAYERS, num_heads=2, num_classes=2, **sizes
    )


def lora(*targets: str) -> nn.Module:
    """Build a small BERT with LoRA."""
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=list(targets)))


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(1, 50, (4, 8), generator=generator)
    if hasattr(model, "patch_embed"):
        dtype = next(model.parameters()).dtype
        images = torch.randn(4, 3, 16, 16, generator=generator).to(dtype)
        nn.functional.cross_entropy(model(images), words[:, 0] % 2).backward()
    else:
        model(input_ids=words, labels=words[:, 0] % 2).loss.backward()


def loop(
    model: nn.Module, *optimizers: Any, scheduler: Any = None, at: Any = None, scale: float = 1.0
) -> None:
    for step in range(STEPS):
        if at is not None:
            at(step)
        backward(model, step)
        for param in model.parameters():
            if param.grad is not None and scale != 1:
                param.grad.mul_(scale)
        for optimizer in optimizers:
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        model.zero_grad()


#: The Muon of the speedruns adds 1e-7 to the norm that it divides by, torch's and lamina's take it
#: for the least norm: the same where gradients are large.
_LARGE = 1e7


# --- originals -------------------------------------------------------------------------------


def transformers_trainer(model: nn.Module) -> None:
    """Take the groups that the Trainer makes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, use_cpu=True, report_to=[], learning_rate=1e-3, weight_decay=0.1
        )
        loop(model, transformers.Trainer(model, arguments).create_optimizer())


def timm_layer_decay(model: Any, skip: bool = False) -> None:
    from timm.optim import param_groups_layer_decay
    from timm.scheduler import StepLRScheduler

    listed = model.no_weight_decay() if skip else ()
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.6, no_weight_decay_list=listed
    )
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    # The groups hold `lr_scale` only; it is timm's schedulers that multiply by it.
    StepLRScheduler(optimizer, decay_t=STEPS + 1).step(0)
    loop(model, optimizer)


def depth_of(name: str) -> int:
    """Number the parts of a BERT from below: embeddings 0, layers from 1, head at the end."""
    if ".embeddings." in name:
        return 0
    if ".layer." in name:
        return int(name.split(".layer.")[1].split(".")[0]) + 1
    return LAYERS + 1


def by_formula(model: nn.Module, gap: int) -> None:
    """Take groups by the formula of BEiT (gap 1) or ELECTRA (gap 2)."""
    groups = []
    for name, param in model.named_parameters():
        above = LAYERS + gap - depth_of(name)
        power = 0 if depth_of(name) > LAYERS else above
        decay = 0.0 if param.ndim < 2 else 0.05
        groups.append({"params": [param], "lr": 1e-3 * 0.6**power, "weight_decay": decay})
    loop(model, torch.optim.AdamW(groups))


def fastai_parts(model: nn.Module) -> list[list[nn.Parameter]]:
    """Split a BERT as fastai's splitters do: embeddings, each layer, head."""
    parts: list[list[nn.Parameter]] = [[] for _ in range(LAYERS + 2)]
    for name, param in model.named_parameters():
        parts[depth_of(name)].append(param)
    return parts


def fastai_unfreezing(model: nn.Module) -> None:
    """Use fastai's Learner: `slice` for the rates, `freeze_to` for each stage."""
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    learner = Learner(
        types.SimpleNamespace(),
        model,
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
        splitter=fastai_parts,
        train_bn=False,  # True, its default, trains the norms of frozen parts too
    )
    learner.create_opt()
    learner.opt.set_hyper("lr", slice(1e-3 / 2.6 ** (LAYERS + 1), 1e-3))
    stages = {step: -1 - step // EVERY for step in range(0, STEPS, EVERY)}
    loop(model, learner.opt, at=lambda s: s in stages and learner.freeze_to(stages[s]))


def restart_at_thaws(optimizer: lm.Optimizer, step: int) -> None:
    if step and step % EVERY == 0:
        optimizer.restart_state("*")


def unfreezing(model: nn.Module) -> None:
    """Set flags and rates by hand, as ULMFiT describes them."""

    def at(step: int) -> None:
        for name, param in model.named_parameters():
            if ".layer." in name:
                param.requires_grad_(step >= EVERY * (LAYERS + 1 - depth_of(name)))

    groups = []
    for name, param in model.named_parameters():
        param.requires_grad_(".embeddings." not in name)
        power = LAYERS + 1 - depth_of(name) if ".layer." in name else 0
        groups.append({"params": [param], "lr": 1e-3 / 2.6**power})
    loop(model, torch.optim.AdamW(groups), at=at)


def probing(model: nn.Module) -> None:
    """Set flags and rates by hand, as LP-FT describes them."""
    body = [p for n, p in model.named_parameters() if not n.startswith("classifier")]
    head = list(model.get_submodule("classifier").parameters())
    optimizer = torch.optim.AdamW([{"params": head, "lr": 1e-2}, {"params": body, "lr": 1e-4}])

    def at(step: int) -> None:
        for param in body:
            param.requires_grad_(step >= 8)

    loop(model, optimizer, at=at)


def peft_lora_plus(model: nn.Module) -> None:
    from peft.optimizers import create_loraplus_optimizer

    settings = {"lr": 1e-3, "loraplus_lr_ratio": 8, "loraplus_lr_embedding": 1e-4}
    loop(model, create_loraplus_optimizer(model, torch.optim.AdamW, **settings))


def hidden_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    named = dict(model.named_parameters())
    hidden = [p for n, p in named.items() if ".layer." in n and p.ndim == 2]
    known = {id(p) for p in hidden}
    return hidden, [p for p in named.values() if id(p) not in known]


def torch_muon(model: nn.Module) -> None:
    hidden, rest = hidden_and_rest(model)
    loop(
        model,
        torch.optim.Muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0),
    )


def speedrun_muon(model: nn.Module) -> None:
    """Use the Muon of the speedruns, by its author."""
    from muon import SingleDeviceMuonWithAuxAdam

    hidden, rest = hidden_and_rest(model)
    groups = [{"params": hidden, "use_muon": True}, {"params": rest, "use_muon": False}]
    loop(model, SingleDeviceMuonWithAuxAdam(groups), scale=_LARGE)


def transformers_wsd(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    lengths = {"num_warmup_steps": 4, "num_decay_steps": 6, "num_training_steps": STEPS}
    scheduler = transformers.get_wsd_schedule(optimizer, **lengths, decay_type="linear")
    loop(model, optimizer, scheduler=scheduler)


# --- the recipes beside them -----------------------------------------------------------------

_BERT_DECAY = partial(
    recipes.layer_decay,
    "bert.encoder.layer.{depth}.*",
    lr=1e-3,
    decay=0.6,
    embeddings="bert.embeddings.*",
)
_VIT_DECAY = partial(
    recipes.layer_decay,
    "blocks.{depth}.*",
    lr=1e-3,
    decay=0.6,
    embeddings="cls_token | pos_embed | patch_embed.*",
    top="norm.*",
)
_ULMFIT = recipes.ulmfit(
    "bert.encoder.layer.{depth}.*",
    lr=1e-3,
    head="bert.pooler.* | classifier.*",
    rest="bert.embeddings.*",
    every=EVERY,
)

CASES = [
    Case(
        "no_decay",
        "the optimizer of Transformers' Trainer",
        "transformers",
        bert,
        recipes.no_decay(lr=1e-3, weight_decay=0.1),
        transformers_trainer,
    ),
    Case(
        "layer_decay",
        "timm's `param_groups_layer_decay`",
        "timm",
        vit,
        _VIT_DECAY(),
        timm_layer_decay,
    ),
    Case(
        "layer_decay(undecayed=...)",
        "the same with the model's `no_weight_decay()`",
        "timm",
        vit,
        _VIT_DECAY(undecayed="ndim<2 | pos_embed | cls_token"),
        partial(timm_layer_decay, skip=True),
    ),
    Case(
        "layer_decay",
        "the formula of BEiT, by hand",
        "torch",
        bert,
        _BERT_DECAY(gap=1),
        partial(by_formula, gap=1),
    ),
    Case(
        "layer_decay(gap=2)",
        "the formula of ELECTRA, by hand",
        "torch",
        bert,
        _BERT_DECAY(gap=2),
        partial(by_formula, gap=2),
    ),
    Case(
        "ulmfit",
        "fastai's `freeze_to` and `slice(lr)`, `train_bn=False`; the plan with `restart_state`",
        "fastai",
        bert,
        _ULMFIT,
        fastai_unfreezing,
        at=restart_at_thaws,
    ),
    Case("ulmfit", "flags and rates of ULMFiT, by hand", "torch", bert, _ULMFIT, unfreezing),
    Case(
        "probe_then_finetune",
        "flags and rates of LP-FT, by hand",
        "torch",
        bert,
        recipes.probe_then_finetune("classifier.*", probe=8, lr=1e-2, finetune_lr=1e-4),
        probing,
    ),
    Case(
        "lora_plus",
        "PEFT's `create_loraplus_optimizer`",
        "peft",
        partial(lora, "query", "value"),
        recipes.lora_plus(lr=1e-3, ratio=8.0),
        peft_lora_plus,
    ),
    Case(
        "lora_plus(embeddings=...)",
        "the same, with adapters of embeddings",
        "peft",
        partial(lora, "query", "value", "word_embeddings"),
        recipes.lora_plus(lr=1e-3, ratio=8.0, embeddings="*lora_embedding_*", embedding_lr=1e-4),
        peft_lora_plus,
    ),
    Case(
        "muon",
        "torch's `Muon` and `AdamW`",
        "torch",
        bert,
        recipes.muon("bert.encoder.layer.*"),
        torch_muon,
    ),
    Case(
        "muon(eps=1e-10)",
        "`SingleDeviceMuonWithAuxAdam` of the speedruns, large gradients",
        "muon",
        bert,
        recipes.muon("bert.encoder.layer.*", eps=1e-10),
        speedrun_muon,
        tolerance=1e-6,
        scale=_LARGE,
    ),
    Case(
        "warmup_stable_decay",
        "Transformers' `get_wsd_schedule`",
        "transformers",
        bert,
        recipes.warmup_stable_decay(lr=1e-3, warm=4, decay=6, weight_decay=0.01),
        transformers_wsd,
    ),
]


def compare(case: Case) -> Compared:
    """Train two copies of a model in float64, one by the recipe and one by the original.

    Muon rounds to bfloat16 in the middle, where another order of the same operations gives other
    last digits; without this rounding it is seen whether the operations are the same.
    """
    with mock.patch.object(torch.Tensor, "bfloat16", lambda tensor: tensor):
        return _compare(case)


def _compare(case: Case) -> Compared:
    model = case.model().double()
    start = copy.deepcopy(model)
    other = copy.deepcopy(model)
    optimizer = case.plan.build(model, steps=STEPS)
    at = case.at
    before_step = None if at is None else lambda step: at(optimizer, step)
    loop(model, optimizer, at=before_step, scale=case.scale)
    case.train(other)
    there, before = dict(other.named_parameters()), dict(start.named_parameters())
    ways = {n: float((p - before[n]).detach().abs().max()) for n, p in model.named_parameters()}
    apart = [float((p - there[n]).detach().abs().max()) for n, p in model.named_parameters()]
    still = frozenset(name for name, way in ways.items() if way == 0)
    return Compared(max(apart), max(ways.values()), still)


def main() -> None:
    warnings.simplefilter("ignore")
    print("| recipe | original | version | largest difference | largest way of a weight |")
    print("|---|---|---|---|---|")
    for case in CASES:
        if not case.installed:
            print(f"| `{case.recipe}` | {case.original} | not installed | | |")
            continue
        found = compare(case)
        version = f"{_PACKAGES.get(case.module, case.module)} {case.version}"
        numbers = f"{found.difference:.1e} | {found.moved:.1e}"
        print(f"| `{case.recipe}` | {case.original} | {version} | {numbers} |")


if __name__ == "__main__":
    main()
