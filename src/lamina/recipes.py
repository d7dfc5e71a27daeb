"""Well-known ways to train, each as a function that returns a plan to read, print and change.

    plan = lamina.recipes.layer_decay("encoder.layer.{depth}.*", lr=1e-3)
    print(plan.to_toml())

Nothing here is new: each recipe is a plan that could be written by hand, with its source beside it.
Names of layers, heads and embeddings are those of the model; `plan.preview(model)` shows what each
pattern selects, and a pattern that selects nothing is an error.
"""

from __future__ import annotations

from typing import Any

from ._util.numbers import is_number, is_whole
from .errors import PlanError
from .optim import AdamW, Muon
from .plan.operators import by_depth, times, top_down
from .plan.plan import Plan, Rule
from .schedules import wsd
from .schedules.duration import TimeLike

#: norms and biases have one dimension
_SMALL = "ndim<2"


def no_decay(
    *, lr: float, weight_decay: float = 0.01, match: str = _SMALL, **settings: Any
) -> Plan:
    """Return AdamW with weight decay on matrices only: none on norms and biases.

    Args:
        lr: the learning rate.
        weight_decay: the decay of what does not match.
        match: a pattern for what is not decayed.
        **settings: other settings of the plan, such as `schedule=` or `clip_norm=`.

    Example:
        >>> no_decay(lr=2e-5)
        Plan(AdamW, lr=2e-05, weight_decay=0.01, rules=[Rule('ndim<2', weight_decay=0.0)])

    References:
        Devlin et al., BERT (2018): its optimizer leaves out `LayerNorm`, `layer_norm` and `bias`.
    """
    rules = [Rule(match, weight_decay=0.0)]
    return Plan(AdamW, lr=lr, weight_decay=weight_decay, rules=rules, **settings)


def layer_decay(
    match: str,
    *,
    lr: float,
    decay: float = 0.75,
    embeddings: str | None = None,
    top: str | None = None,
    gap: int = 1,
    weight_decay: float = 0.05,
    undecayed: str = _SMALL,
    **settings: Any,
) -> Plan:
    """Return AdamW with a learning rate that falls from the head down, layer by layer.

    Formula: layer i of n (from 0) has `lr * decay ** (n - 1 - i + gap)`, the embeddings have
    `lr * decay ** (n + gap)`, everything else `lr`. Norms and biases have no weight decay.

    timm's `param_groups_layer_decay` gives the last norm the rate of the top layer, and leaves out
    the decay of what the model's `no_weight_decay()` lists; BEiT and ELECTRA give that norm the
    rate of the head. Both are said by `top` and `undecayed`.

    Args:
        match: the layers, with their number captured: `"encoder.layer.{depth}.*"`.
        lr: the learning rate of the head.
        decay: the factor from a layer to the next lower one.
        embeddings: a pattern for what lies below the layers; None if there is nothing.
        top: a pattern for what has the rate of the top layer beside it; None if there is nothing.
        gap: how many factors lie between the head and the top layer: 1 in BEiT and timm, 2 in
            ELECTRA.
        weight_decay: of what is decayed.
        undecayed: a pattern for what is not.
        **settings: other settings of the plan, such as `schedule=` or `clip_norm=`.

    Example:
        >>> layer_decay("layer.{depth}.*", lr=1e-3, embeddings="embeddings.*").rules[0]
        Rule('layer.{depth}.*', lr=by_depth(0.75, below='embeddings.*'))

    References:
        Clark et al., ELECTRA (2020), table 9; Bao et al., BEiT (2021), appendix H.
    """
    if not is_whole(gap) or gap < 0:
        raise PlanError(f"gap={gap!r}: expected a whole number of factors, 0 or more.")
    rules = [Rule(match, lr=by_depth(decay, below=embeddings))]
    beside = [each for each in (embeddings, top) if each is not None]
    rules += [Rule(each, lr=times(decay**gap)) for each in (match, *beside)]
    rules.append(Rule(undecayed, weight_decay=0.0))
    return Plan(AdamW, lr=lr, weight_decay=weight_decay, rules=rules, **settings)


def ulmfit(
    match: str,
    *,
    lr: float,
    head: str,
    rest: str | None = None,
    factor: float = 2.6,
    every: TimeLike = "1 epochs",
    **settings: Any,
) -> Plan:
    """Return discriminative fine-tuning with gradual unfreezing.

    Formula: each layer has the learning rate of the one above it divided by `factor`, and thaws
    one interval after it; the head trains from the start.

    fastai's `freeze_to` empties the state of all parameters at each thaw, those that train already
    included; a plan keeps it. `optimizer.restart_state("*")` at each thaw does what fastai does.

    Args:
        match: the layers, with their number captured: `"encoder.layer.{depth}.*"`.
        lr: the learning rate of the head.
        head: a pattern for the head.
        rest: a pattern for what lies below the layers, which stays frozen; None if there is
            nothing.
        factor: how much slower each lower layer learns.
        every: the time from one thaw to the next; the top layer thaws after the first.
        **settings: other settings of the plan, such as `schedule=` or `clip_norm=`.

    Example:
        >>> ulmfit("layer.{depth}.*", lr=1e-3, head="head.*").rules[1]
        Rule('layer.{depth}.*', thaw=top_down('1 epochs'))

    References:
        Howard and Ruder, ULMFiT (2018), sections 3.2 and 3.3.
    """
    _check_positive("factor", factor)
    rules = [
        Rule(match, lr=by_depth(1 / factor)),
        Rule(match, thaw=top_down(every)),
        Rule(match, lr=times(1 / factor)),
        Rule(head, lr=lr),
    ]
    if rest is not None:
        rules.append(Rule(rest, frozen=True))
    return Plan(AdamW, lr=lr, rules=rules, **settings)


def probe_then_finetune(
    head: str, *, probe: TimeLike, lr: float, finetune_lr: float, **settings: Any
) -> Plan:
    """Return linear probing, then fine-tuning: the head alone first, then everything.

    Fine-tuning from the start moves the features while the head is still random, which costs
    accuracy on data of another kind; a head that was trained first does not ask for that.

    Args:
        head: a pattern for the head.
        probe: how long the head trains alone.
        lr: the learning rate of the head.
        finetune_lr: the learning rate of everything else, once it trains.
        **settings: other settings of the plan, such as `schedule=` or `clip_norm=`.

    Example:
        >>> plan = probe_then_finetune("head.*", probe="2 epochs", lr=1e-3, finetune_lr=1e-5)
        >>> plan.rules
        (Rule('!(head.*)', lr=1e-05, thaw='2 epochs'),)

    References:
        Kumar et al., "Fine-Tuning can Distort Pretrained Features" (2022), LP-FT.
    """
    rules = [Rule(f"!({head})", lr=finetune_lr, thaw=probe)]
    return Plan(AdamW, lr=lr, rules=rules, **settings)


def lora_plus(
    *,
    lr: float,
    ratio: float = 16.0,
    match: str = "*lora_B*",
    embeddings: str | None = None,
    embedding_lr: float = 1e-6,
    **settings: Any,
) -> Plan:
    """Return AdamW for LoRA with a larger learning rate for the matrices B.

    Formula: `lr` for A and `ratio * lr` for B. Adapters of embeddings have a rate of their own.

    Args:
        lr: the learning rate of the matrices A.
        ratio: how many times faster the matrices B learn.
        match: a pattern for the matrices B.
        embeddings: a pattern for the adapters of embeddings, such as `"*lora_embedding_*"`.
        embedding_lr: their learning rate.
        **settings: other settings of the plan, such as `schedule=` or `clip_norm=`.

    Example:
        >>> lora_plus(lr=1e-4)
        Plan(AdamW, lr=0.0001, weight_decay=0.0, rules=[Rule('*lora_B*', lr=times(16.0))])

    References:
        Hayou, Ghosh and Yu, LoRA+ (2024).
    """
    _check_positive("ratio", ratio)
    rules = [Rule(match, lr=times(ratio))]
    if embeddings is not None:
        rules.append(Rule(embeddings, lr=embedding_lr))
    return Plan(AdamW, lr=lr, rules=rules, **{"weight_decay": 0.0, **settings})


def muon(
    match: str,
    *,
    lr: float = 0.02,
    momentum: float = 0.95,
    adam_lr: float = 3e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
    **settings: Any,
) -> Plan:
    """Return Muon for the matrices of the hidden layers, with AdamW for all the rest.

    Args:
        match: a pattern for the hidden layers; of what it selects, the matrices get Muon.
        lr: the learning rate of Muon.
        momentum: the momentum of Muon.
        adam_lr: the learning rate of AdamW, for embeddings, head, norms and biases.
        betas: those of AdamW.
        weight_decay: of both.
        **settings: other settings of the plan, such as `schedule=` or `clip_norm=`.

    Example:
        >>> muon("layer.*").rules[0].match
        '(layer.*) & ndim==2'

    References:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    matrices = Rule(
        f"({match}) & ndim==2",
        optimizer=Muon,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    return Plan(
        AdamW, lr=adam_lr, betas=betas, weight_decay=weight_decay, rules=[matrices], **settings
    )


def warmup_stable_decay(
    *, lr: float, warm: TimeLike = "5%", decay: TimeLike = "20%", **settings: Any
) -> Plan:
    """Return AdamW whose learning rate rises, stays, and falls linearly to 0 at the end.

    A run can go on from its stable phase with other data or to another length.

    Args:
        lr: the learning rate of the stable phase.
        warm: how long it rises.
        decay: how long it falls.
        **settings: other settings of the plan, such as `weight_decay=` or `clip_norm=`.

    Example:
        >>> warmup_stable_decay(lr=1e-3).settings[1][0]
        'schedule'

    References:
        Hu et al., MiniCPM (2024), section 4; Hägele et al., "Scaling Laws and Compute-Optimal
        Training Beyond Fixed Training Durations" (2024).
    """
    return Plan(AdamW, lr=lr, schedule=wsd(warm, decay), **settings)


def _check_positive(name: str, value: object) -> None:
    if not is_number(value) or not value > 0:
        raise PlanError(f"{name}={value!r}: expected a number above 0.")
