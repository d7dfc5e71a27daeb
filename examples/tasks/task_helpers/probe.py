"""A linear probe: logistic regression on fixed features, the figure fine-tuning has to beat."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lamina.errors import TaskError

STRENGTHS = tuple(10.0**power for power in range(-5, 2))
HELD_BACK = 5  # every fifth training example chooses the strength of the penalty


def probe_accuracy(
    train: Tensor, train_labels: Tensor, held_out: Tensor, held_out_labels: Tensor
) -> float:
    """The held-out accuracy of a converged logistic regression.

    The L2 penalty is chosen on a part of the training set only, then all of it is used.
    """
    if len(train) < 2 * HELD_BACK:
        raise TaskError(f"A probe needs at least {2 * HELD_BACK} examples, got {len(train)}.")
    strength = choose_strength(train, train_labels)
    weight, bias = fit(train, train_labels, strength)
    return accuracy(held_out, held_out_labels, weight, bias)


def choose_strength(features: Tensor, labels: Tensor) -> float:
    """The penalty with the best likelihood on a held-back part of the training set."""
    back = torch.arange(len(features)) % HELD_BACK == 0
    losses = []
    for strength in STRENGTHS:
        weight, bias = fit(features[~back], labels[~back], strength)
        logits = features[back].double() @ weight + bias
        losses.append(float(functional.cross_entropy(logits, labels[back])))
    return STRENGTHS[losses.index(min(losses))]


def fit(features: Tensor, labels: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Minimise mean cross entropy + strength/2 · ‖w‖² over standardised features, by LBFGS.

    The weights returned apply to the features as given.
    """
    features = features.double()
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-8)
    inputs, classes = (features - mean) / scale, int(labels.max()) + 1
    weight = torch.zeros(inputs.shape[1], classes, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.double, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = functional.cross_entropy(inputs @ weight + bias, labels)
        loss = loss + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    scaled = weight.detach() / scale[:, None]
    return scaled, bias.detach() - mean @ scaled


def accuracy(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> float:
    """The share of examples whose class has the highest logit."""
    chosen = (features.double() @ weight + bias).argmax(1)
    return float((chosen == labels).double().mean())
