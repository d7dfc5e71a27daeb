"""A commented plan that fits a model, to be read, changed and tried."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tomli_w
from torch import nn

from .._util.text import listed
from ..errors import printable
from ..plan.plan import Plan
from .anatomy import Anatomy, examine
from .listing import names_and_types
from .selecting import Selector

#: deep models would hardly move their lowest layers
_LEAST = 0.01
#: of more layers, each differs less from the next
_FEW_LAYERS = 8
_WIDTH = 98


@dataclass(frozen=True)
class StarterPlan:
    """A first plan for a model; prints as its TOML text.

    Args:
        plan: the plan.
        toml: the same as TOML text, with comments and the names of the model.
        anatomy: the parts of the model that were found.
    """

    plan: Plan
    toml: str = field(repr=False)
    anatomy: Anatomy = field(repr=False)

    def __str__(self) -> str:
        return self.toml


@dataclass(frozen=True)
class _Advice:
    """Values to begin with, for a kind of model, and where they come from."""

    kind: str
    settings: dict[str, Any]
    #: the factor from a layer to the next lower one; None for one lr in all layers
    rate: float | None
    #: how many times faster a fresh head learns; None if its place above the layers is enough
    head: float | None
    why: str
    about_rate: str = ""


def starter_plan(model: nn.Module) -> StarterPlan:
    """Write a commented plan that fits a model, to begin with.

    It is for fine-tuning pretrained weights. The head, the layers, what lies below and above them,
    norms, biases and embeddings are found by looking at modules, shapes and their order; nothing is
    computed, so that the model may be on the meta device. The values are usual ones, with their
    source in the comments, and are not tuned for your data.

    Args:
        model: the model, as it will be trained.

    Returns:
        The plan, and its TOML text with comments and with the names and types of the model.

    Raises:
        PlanError: if it is no model, or has no parameters.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = nn.Embedding(50, 4)
        ...         self.layer = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        ...         self.head = nn.Linear(4, 2)
        >>> for rule in starter_plan(Net()).plan.rules:
        ...     print(rule)
        Rule('layer.{depth}.*', lr=by_depth(0.9, below='embed.*', above='head.*'))
        Rule('head.*', lr=0.0005)
        Rule('ndim<2', weight_decay=0.0)
    """
    anatomy = examine(model)
    advice = _advice(anatomy)
    selector = Selector(anatomy.infos)
    blocks = [_head_of_file(type(model).__name__, anatomy, advice)]
    for comment, rule in _rules(anatomy, advice, selector):
        blocks.append(_comment(comment) + "[[rule]]\n" + _table(rule))
    blocks += _suggestions(anatomy, advice, selector)
    text = "\n".join([*blocks, _names(anatomy)])
    return StarterPlan(Plan.from_toml(text), text, anatomy)


_SCHEDULE = "warmup(6%) >> cosine(to=0.01)"


def _advice(anatomy: Anatomy) -> _Advice:
    """Return values to begin with."""
    rest = {"schedule": _SCHEDULE, "clip_norm": 1.0}

    def settings(lr: float, weight_decay: float) -> dict[str, Any]:
        return {"optimizer": "AdamW", "lr": lr, "weight_decay": weight_decay, **rest}

    if anatomy.adapters:
        why = "lr as for LoRA on GPT-2 in Hu et al. (2021), table 11."
        return _Advice("a frozen model with adapters", settings(2e-4, 0.0), None, None, why)
    if anatomy.output and not anatomy.head and len(anatomy.stacks) > 1:
        why = "lr as the page on T5 in the documentation of Transformers advises for AdamW."
        return _Advice("an encoder and decoder of texts", settings(1e-4, 0.01), None, None, why)
    if anatomy.output and not anatomy.head:
        why = "lr as for fine-tuning LLaMA in Taori et al., Alpaca (2023)."
        return _Advice("a language model", settings(2e-5, 0.01), None, None, why)
    if anatomy.stacks and anatomy.convolves and anatomy.batch_norms:
        return _Advice(
            "a convolutional network",
            settings(5e-4, 0.01),
            0.8 if anatomy.layers <= _FEW_LAYERS else 0.9,
            10.0,
            "lr is a usual one for AdamW and pretrained weights.",
            "Lower layers are more general (Yosinski et al., 2014).",
        )
    if anatomy.stacks and anatomy.convolves:
        return _Advice(
            "a vision transformer",
            settings(5e-4, 0.05),
            0.75,
            None,
            "Weight decay and decay by layer as in Bao et al., BEiT (2021), appendix H.",
            "Embeddings and head count as layers, as in BEiT.",
        )
    if anatomy.stacks and anatomy.owns("Embedding"):
        return _Advice(
            "an encoder of texts",
            settings(5e-5, 0.01),
            0.9,
            10.0,
            "lr as for fine-tuning in Devlin et al., BERT (2018), appendix A.3.",
            "The factor is that of ELECTRA (2020), table 9.",
        )
    why = "lr is the default of Adam."
    return _Advice("a network of no known form", settings(1e-3, 0.01), None, None, why)


def _head_of_file(name: str, anatomy: Anatomy, advice: _Advice) -> str:
    """Return what the file is, the parts that were found, and the settings for all parameters."""
    numbers = sum(info.numel for info in anatomy.infos)
    tied = [" = ".join(info.names) for info in anatomy.infos if len(info.names) > 1]
    found = [f"{len(anatomy.infos):,} tensors with {numbers:,} numbers"]
    for stack in anatomy.stacks:
        first, last = stack.numbers[0], stack.numbers[-1]
        layers = f"{stack.prefix}{first} to {stack.prefix}{last}"
        found.append(f"{len(stack.numbers)} layers of class {stack.kind}: {layers}")
    if tied:
        found.append(f"tied, each updated once: {listed(tied)}")
    lines = [
        f"A starter plan for {name}, which looks like {advice.kind}.",
        "It is for fine-tuning pretrained weights: usual values, not tuned for your data. Change "
        "them, and look at what they mean: lamina show TASK THIS_FILE",
        "Found: " + "; ".join(found) + ".",
    ]
    settings = _comment(advice.why) + _table(advice.settings)
    return "".join(map(_comment, lines)) + "\n" + settings


def _rules(
    anatomy: Anatomy, advice: _Advice, selector: Selector
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield the rules, each with its comment."""
    layers = selector.layers(anatomy.stacks) if anatomy.stacks else None
    if layers is not None and advice.rate is not None:
        decay = _by_depth(anatomy, advice.rate, selector)
        yield _about_layers(anatomy, advice), {"match": layers, "lr": decay}
    if anatomy.head and advice.head is not None:
        lr = float(f"{advice.settings['lr'] * advice.head:.3g}")
        comment = "The head starts from random weights and has far to go; ten times the lr is a "
        comment += "usual start. If it is pretrained, delete this rule."
        yield comment, {"match": selector.pattern(anatomy.head), "lr": lr}
    if any(info.ndim < 2 for info in anatomy.infos) and advice.settings["weight_decay"] > 0:
        tokens = selector.pattern(anatomy.tokens) if anatomy.tokens else ""
        what = "Norms and biases" + (", tokens, positions and tables of biases" if tokens else "")
        joined = tokens if tokens.startswith("re:") else ""
        match = "ndim<2" + (f" | {tokens}" if tokens and not joined else "")
        yield f"{what} are not pulled to 0.", {"match": match, "weight_decay": 0.0}
        if joined:
            yield "The same for these.", {"match": joined, "weight_decay": 0.0}
    if anatomy.frozen and len(anatomy.frozen) < len(anatomy.infos):
        comment = "These have requires_grad=False in the model. To train them: frozen = false"
        yield comment, {"match": selector.pattern(anatomy.frozen), "frozen": True}


def _by_depth(anatomy: Anatomy, rate: float, selector: Selector) -> str:
    """Return the decay by layer, with the parts below and above the layers as far as there are."""
    output = [name for name in anatomy.output if name not in anatomy.below]
    above = (*anatomy.above, *output, *anatomy.head)
    given = [f"{rate:g}", *_ends(selector, anatomy.below, above)]
    if rate ** (anatomy.layers + 1) < _LEAST:
        given.append(f"least={_LEAST:g}")
    return f"by_depth({', '.join(given)})"


def _ends(selector: Selector, below: Sequence[str], above: Sequence[str]) -> list[str]:
    """Return what lies beside the layers as arguments of `by_depth`."""
    patterns = {
        key: selector.pattern(names) for key, names in (("below", below), ("above", above)) if names
    }
    # A plan in TOML puts them in quotation marks, so that none may be inside.
    return [f'{key}="{pattern}"' for key, pattern in patterns.items() if '"' not in pattern]


def _about_layers(anatomy: Anatomy, advice: _Advice) -> str:
    """Return the comment on the layers: what the rule means, and numbers inside of a layer."""
    text = f"Each layer learns {advice.rate:g} times as fast as the one above it"
    text += "; what lies below the layers counts as one more" if anatomy.below else ""
    text += f". {advice.about_rate}"
    if anatomy.inner:
        parts = listed([str(inner) for inner in anatomy.inner], 2)
        text += f" The layers are stages with numbered parts of their own ({parts})."
    return text


def _by_part(anatomy: Anatomy, rate: float, selector: Selector) -> list[dict[str, Any]]:
    """Return rules for a decay from part to part of all stages, from the top stage down.

    In each, what lies below a stage counts as one layer below its lowest part. So the factors of
    all rules together are those of parts that are numbered through.
    """
    if len(anatomy.stacks) != 1:
        return []
    (stack,) = anatomy.stacks
    stages: dict[int, list[str]] = {number: [] for number in stack.numbers}
    for name in stack.names:
        stages[int(name.removeprefix(stack.prefix).partition(".")[0])].append(name)
    inner = {each.stage: each for each in anatomy.inner}
    above = [*anatomy.above, *anatomy.output, *anatomy.head]
    rules = []
    for number in reversed(stack.numbers):
        if number not in inner:
            return []
        path = f"{inner[number].path}."
        above += [name for name in stages[number] if not name.startswith(path)]
        lower = [name for each in stack.numbers if each < number for name in stages[each]]
        ends = _ends(selector, [*anatomy.below, *lower], above)
        decay = f"by_depth({', '.join([f'{rate:g}', *ends])})"
        rules.append({"match": f"{path}{{depth}}.*", "lr": decay})
        above = []
    return rules


def _suggestions(anatomy: Anatomy, advice: _Advice, selector: Selector) -> list[str]:
    """Return rules that are often wanted, as comments."""
    found = []
    layers = selector.layers(anatomy.stacks) if anatomy.stacks else None
    if layers is not None and advice.rate is None and not anatomy.adapters:
        decay = _by_depth(anatomy, 0.9, selector)
        text = "To let lower layers learn more slowly:"
        found.append(_disabled(text, {"match": layers, "lr": decay}))
    by_part = _by_part(anatomy, advice.rate, selector) if anatomy.inner and advice.rate else []
    if by_part:
        text = "In place of the rule for the stages, decay from part to part of all of them:"
        found.append(_disabled(text, *by_part))
    if anatomy.batch_norms and anatomy.convolves:
        text = "With small batches the running statistics of BatchNorm drift. To keep them as they "
        text += "were pretrained:"
        kinds = " | ".join(f"type:{kind}" for kind in anatomy.batch_norms)
        found.append(_disabled(text, {"match": kinds, "frozen": True}))
    if layers is not None and anatomy.head:
        text = "To let the layers join one at a time from the top, each 5% of the run later:"
        found.append(_disabled(text, {"match": layers, "thaw": "top_down(every=5%)"}))
    if anatomy.below and not anatomy.output and anatomy.owns("Embedding"):
        text = "To save time and memory, embeddings can stay as they are:"
        found.append(_disabled(text, {"match": selector.pattern(anatomy.below), "frozen": True}))
    return found


def _disabled(comment: str, *rules: dict[str, Any]) -> str:
    """Return rules as a comment, which takes effect when the # before each line are removed."""
    lines = [line for rule in rules for line in ["[[rule]]", *_table(rule).splitlines()]]
    return _comment(comment) + "".join(f"# {line}\n" for line in lines)


def _names(anatomy: Anatomy) -> str:
    lines = ["Names and shapes, as patterns for rules of your own:", *names_and_types(anatomy)]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _table(settings: dict[str, Any]) -> str:
    """Return settings as lines of TOML, in the form in which people write them."""
    return "".join(f"{key} = {_value(value)}\n" for key, value in settings.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-")
    if isinstance(value, str) and '"' in value and "'" not in value and value.isprintable():
        return f"'{value}'"  # quotation marks need no backslash in it
    return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()


def _comment(text: str) -> str:
    """Return a comment of a TOML file, wrapped; a name may not end it."""
    lines: Sequence[str] = textwrap.wrap(printable(text).replace("\n", " "), _WIDTH) or [""]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)
