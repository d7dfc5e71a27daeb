"""Reuse changes no bit: models of many shapes, stages and ways to train."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lamina as lm
from lamina.reuse import IndexedDataset
from reuse_models import (
    GPT2,
    EfficientNet,
    MiniLM,
    ResNet,
    Training,
    TwoHeads,
    UNet,
    freeze,
    images,
    plain,
    points,
    same_result,
    thaw_top_down,
    words,
)

MODELS = {
    "MiniLM": (MiniLM, words(), "!classifier.*", ["layer.2.*", "layer.1.*", "layer.0.*"]),
    "GPT-2": (GPT2, words()[:1], "!score.*", ["ln_f.* | h.2.*", "h.1.*"]),
    "ResNet": (ResNet, images(), "!fc.*", ["layer2.*", "layer1.*"]),
    "EfficientNet": (EfficientNet, images(), "!classifier.*", ["head.*", "blocks.1.*"]),
    "U-Net": (UNet, images(), "down1.* | down2.*", ["down2.*"]),
    "two heads": (TwoHeads, points(), "body.* | shared.*", ["shared.*"]),
}


def both(model, rules, data, **options):
    """A training without and one with reuse."""
    reuse = options.pop("reuse", {})
    return (
        Training(model, rules, data, **options),
        Training(model, rules, data, reuse=reuse, **options),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_part_is_replayed_bit_for_bit(name):
    model, data, frozen, _ = MODELS[name]
    without, reusing = (each.run(3) for each in both(model, freeze(frozen), data))
    assert same_result(without, reusing)
    assert reusing.reused.counts["replayed"] >= 6  # of two later epochs of three steps


@pytest.mark.parametrize("name", MODELS)
def test_parts_that_thaw_one_after_the_other_are_replayed_bit_for_bit(name):
    model, data, frozen, stages = MODELS[name]
    rules = freeze(frozen) + thaw_top_down(*stages)
    without, reusing = (each.run() for each in both(model, rules, data, optimizer=lm.SGD))
    assert same_result(without, reusing)
    assert reusing.reused.counts["replayed"] >= 3
    assert not reusing.reused.refused


def test_each_example_passes_each_frozen_module_once():
    _, reusing = both(MiniLM, freeze("!classifier.*") + thaw_top_down("layer.2.*"), words())
    passed = []
    for name in ("0", "1"):
        layer = reusing.model.layer[int(name)]
        layer.dense.forward = counting(layer.dense, passed)
    assert passed == []
    reusing.run()


def counting(module, passed):
    own = type(module).forward.__get__(module)

    def forward(x):
        passed.append(len(x))
        return own(x)

    return forward
