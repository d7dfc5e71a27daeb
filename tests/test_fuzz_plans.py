"""Damaged plan files: each is read, or refused by an error of lamina; no code runs."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

import lamina as lm
from lamina._util.grammar import parse

PLANS = [
    (Path(__file__).parents[1] / "examples" / "tasks" / "reviews.toml").read_text(),
    (Path(__file__).parents[1] / "examples" / "tasks" / "digits.toml").read_text(),
    """
optimizer = "SGD"
lr = "linear(0.1, 0.01, 50%) >> cosine(0.01, 0.001)"
momentum = 0.9
nonfinite = "skip"
stop = "early_stop('val_loss', patience=3)"
feedback = "plateau('val_loss', patience=2)"
gradients = ["clip_value(0.5)", "clip_norm(1.0, p=inf)"]
[[rule]]
match = "layer.{depth}.*"
lr = "x0.5"
thaw = "on_plateau('val_loss')"
rewarm = "warmup(3)"
[[rule]]
match = "norm | re:embed.*"
freeze = "50%"
hold = false
optimizer = "RMSprop"
lr = 0.01
""",
]
#: what a mutation inserts: words of the grammar, and what would run code if anything did
WORDS = [
    *("lr", "thaw", "frozen", "match", "[[rule]]", "optimizer", "=", '"', "\n", "#", "'", "[", "]"),
    *("(", ")", "((((((((", ">>", "*", "x", "x0.1", "-1", "1e999", "nan", "inf", "0", "true"),
    *("warmup(6%)", "cosine(to=", "top_down(every=", "by_depth(", "times(", "{depth}", "re:(a+)+$"),
    *("999999999999999999999 epochs", "0 epochs", "%", "\x00", "é", "\ud7ff", "\\", '"""'),
    '__import__("os").mkdir("ran")',
    "open('ran', 'w')",
    "!!python/object/apply:os.mkdir ['ran']",
    "lambda: exec('open(chr(114), chr(119))')",
    "().__class__.__bases__",
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layer = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.norm = nn.LayerNorm(4)
        self.classifier = nn.Linear(4, 2)


def mutate(text: str, chance: random.Random) -> str:
    """One to four of: a character changed, lines lost, doubled or moved, a word put in, a cut."""
    for _ in range(chance.randint(1, 4)):
        kind, place = chance.randrange(6), chance.randrange(max(len(text), 1))
        lines = text.splitlines(keepends=True)
        row = chance.randrange(max(len(lines), 1))
        if kind == 0:
            text = text[:place] + chr(chance.randrange(1, 0x250)) + text[place + 1 :]
        elif kind == 1:
            text = text[:place] + chance.choice(WORDS) + text[place + chance.randrange(4) :]
        elif kind == 2:
            text = "".join(lines[:row] + lines[row + 1 :])
        elif kind == 3:
            text = "".join(chance.sample(lines, len(lines)))
        elif kind == 4:
            text = "".join(lines[: row + 1] + lines[row:])
        else:
            text = text[:place]
    return text


def outcome(text: str) -> str:
    """What became of a text: the step at which it was refused, or "shown"."""
    try:
        plan = lm.Plan.from_toml(text + "\n")
    except lm.LaminaError:
        return "refused"
    assert lm.Plan.from_toml(plan.to_toml()) == plan
    try:
        str(plan.preview(Model(), steps=40, steps_per_epoch=8))
    except lm.LaminaError:
        return "does not fit"
    return "shown"


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_plans(tmp_path, monkeypatch, count):
    monkeypatch.chdir(tmp_path)
    chance = random.Random(0)
    torch.manual_seed(0)
    found = [outcome(mutate(chance.choice(PLANS), chance)) for _ in range(count)]
    assert not list(tmp_path.iterdir())  # nothing ran
    assert {kind: found.count(kind) > count // 50 for kind in set(found)} == {
        "refused": True,
        "does not fit": True,
        "shown": True,
    }


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("place", ['lr = "{}"', 'thaw = "{}"', 'match = "{}"', 'schedule = "{}"'])
def test_every_word_at_every_place(word, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = place.format(word.replace("\\", "\\\\").replace('"', '\\"'))
    rule = "" if line.startswith("match") else 'match = "*"\n'
    outcome(f'optimizer = "SGD"\nlr = 0.1\n[[rule]]\n{rule}{line}\n')
    assert not list(tmp_path.iterdir())


def test_canary_a_grammar_that_runs_code_is_seen(tmp_path, monkeypatch):
    """The same texts, if expressions were evaluated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lamina.plan.validate.parse", lambda text, *rest: eval(text, {}))
    with suppress(Exception):  # whatever comes of what the evaluation returned
        outcome("optimizer = \"SGD\"\nlr = \"open('ran', 'w').close()\"\n")
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["(" * 5000, "a>>" * 5000 + "a", "-" * 5000 + "1", "x" * 10**6])
def test_deep_and_long_texts_are_refused(text):
    with pytest.raises(lm.LaminaError):
        parse(text, {"a": lambda: None}, "here")
