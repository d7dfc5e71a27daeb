"""Hostile plan texts and files: a plan, or one error of lamina; no other, no code, no long wait."""

from __future__ import annotations

import random
import re
import string
from pathlib import Path

import torch

import lamina as lm
import test_fuzz_plans as fuzz

from .count import Counts, Wrong, empty_folder

#: plans that can be read and fit the model, in which every word of the grammar has a place
PLANS = [
    fuzz.PLANS[0].replace("encoder.layer", "layer").replace("embeddings", "embed"),
    fuzz.PLANS[1]
    .replace("_blocks", "layer")
    .replace("_fc", "classifier")
    .replace("_conv_stem | type:BatchNorm2d", "embed | type:LayerNorm"),
    fuzz.PLANS[2],
    """
optimizer = "AdamW"
lr = "multi_step([10, 20], start=1e-3)"
weight_decay = "linear(0.1, 0.2)"
clip_norm = 1.0
feedback = "plateau('val_loss', factor=0.5, patience=2, cooldown=1)"
[[rule]]
match = "layer.{depth}.* & !re:.*norm.*$"
lr = "by_depth(0.65)"
weight_decay = 0
[[rule]]
match = "embed & trainable | type:Embedding"
thaw = ["1 epochs", "50%"]
freeze = ["2 epochs"]
rewarm = "warmup(5, start=0.1)"
[[rule]]
match = "classifier.*"
optimizer = "SGD"
lr = 0.1
schedule = "warm_restarts(10, mult=2)"
momentum = "one_cycle_momentum()"
frozen_state = "drop"
freeze = "80%"
""",
    """
optimizer = "LAMB"
lr = 1e-3
schedule = "warmup(6%, start=0.1) >> repeat(linear(to=0.1), 4)"
gradients = "agc(0.01)"
[[rule]]
match = "layer.{depth}.*"
thaw = "top_down(every=10%)"
schedule = "wsd(10%, '20%') * polynomial(power=2)"
[[rule]]
match = "*.bias"
frozen = true
""",
]
NUMBERS = (
    *(
        "0",
        "-0",
        "-1",
        "1",
        "2",
        "0.5",
        "1e-400",
        "1e400",
        "-1e308",
        "1e-320",
        "nan",
        "-inf",
        "inf",
    ),
    *(
        "9" * 400,
        "9" * 5000,
        "0." + "0" * 4000 + "1",
        "1_0",
        "0x10",
        "1e999999999",
        "٣",
        "1j",
        "1.",
    ),
    *("999999999 epochs", "101%", "-1%", "1e9 steps", "1e300%", "0.0000001%", "2**63", "True"),
)
WORDS = (
    *(name for name in lm.__all__ if name.islower()),
    *(name for name in lm.__all__ if name[0].isupper()),
    *("self", "cls", "plan", "rules", "rule", "optimizer", "lr", "params", "__class__", "None"),
    *("Adam.__init__", "lambda", "import", "exec", "open", "eval", "os.mkdir", "ℵ", "x", "e"),
)
#: texts that cost much to match, expand or show
COSTLY = (
    *("*" * 30 + "x", "re:(.*)*!", "re:(a|a)*b", "re:(?:(?:a*)*)*$", "re:a{1,65535}{1,65535}"),
    *("re:" + "(" * 200 + ")" * 200, "re:(?i:" + "(a?)" * 40 + "a" * 40 + ")", "{depth}" * 30),
    *(
        "re:(?P<depth>a)(?P<depth>b)",
        "{depth}.{depth}",
        "{}",
        "{depth:99}",
        "re:\\1",
        "re:[",
        "re:",
    ),
    *("!" * 3000 + "a", "(" * 3000, " & ".join(["*"] * 3000), "|".join(["a*b*c*d*"] * 500)),
    *("**" * 500, "[!", "type:" + "A" * 10_000, "ndim<" + "9" * 5000, "numel>1e400"),
)
TOKEN = re.compile(r"""\d[\d.]*(?:e[-+]?\d+)?|[A-Za-z_]\w*|>>|[-+*/%&|!(){}\[\]=,."':<]|\s+|.""")
CODE = (
    '__import__("os").mkdir("ran")',
    "open('ran','w')",
    "exec('open(chr(114))')",
    "os.mkdir('ran')",
)


def by_grammar(text: str, chance: random.Random) -> str:
    """Change one to five tokens or values of a plan, so that the rest can still be read."""
    for _ in range(chance.choice((1, 1, 1, 2, 3, 5))):
        change = chance.choice((_number, _word, _value, _nested, _key, _swapped, _doubled, _code))
        text = change(text, chance)
    return text


def _replace_one(pattern: str, text: str, new: str, chance: random.Random) -> str:
    found = list(re.finditer(pattern, text))
    if not found:
        return text
    place = chance.choice(found)
    return text[: place.start()] + new + text[place.end() :]


def _number(text: str, chance: random.Random) -> str:
    return _replace_one(r"\d[\d.]*(?:e-?\d+)?", text, chance.choice(NUMBERS), chance)


def _word(text: str, chance: random.Random) -> str:
    return _replace_one(r"[A-Za-z_]\w*", text, chance.choice(WORDS), chance)


def _value(text: str, chance: random.Random) -> str:
    """Give a key another kind of value."""
    others = (
        *("true", "[]", "{}", "[[1]]", "{a = 1}", "1979-05-27", "''", "inf", "-nan", "[1, 'a']"),
        *("9" * 4000, '"' + chance.choice(COSTLY).replace("\\", "\\\\") + '"', "[true, 2.5]"),
        *(f"'{chance.choice(NUMBERS)}'", f"['{chance.choice(WORDS)}()']", "'" + "a " * 2000 + "'"),
    )
    return _replace_one(r"(?<== ).*", text, chance.choice(others), chance)


def _nested(text: str, chance: random.Random) -> str:
    """Put an expression into another one, often."""
    depth = chance.choice((1, 3, 30, 300))
    name = chance.choice(WORDS)
    joined = chance.choice((" >> ", " * ", ", ", " & ", " | ")).join
    forms = (
        lambda m: f"{name}(" * depth + m[0] + ")" * depth,
        lambda m: joined([m[0]] * depth),
        lambda m: "(" * depth + m[0] + ")" * depth,
        lambda m: "-" * depth + m[0],
    )
    calls = list(re.finditer(r"\w+\([^()]*\)", text))
    if not calls:
        return text
    place = chance.choice(calls)
    return text[: place.start()] + chance.choice(forms)(place) + text[place.end() :]


def _key(text: str, chance: random.Random) -> str:
    """Another key, a dotted one, or a table."""
    keys = ("rule", "self", "lr", "lr.x", "a" + ".a" * 60, "[lr]\nx", '""', "betas", "match", "x-y")
    keys += ("[[rule.rule]]\nlr", "rules", "state", "params", "name", "__class__", "'\\u0000'")
    return _replace_one(r"(?m)^\w+(?= =)", text, chance.choice(keys), chance)


def _swapped(text: str, chance: random.Random) -> str:
    """Exchange two tokens."""
    tokens = TOKEN.findall(text)
    a, b = chance.randrange(len(tokens)), chance.randrange(len(tokens))
    tokens[a], tokens[b] = tokens[b], tokens[a]
    return "".join(tokens)


def _doubled(text: str, chance: random.Random) -> str:
    """Repeat a token or leave it out."""
    tokens = TOKEN.findall(text)
    place = chance.randrange(len(tokens))
    tokens[place] *= chance.choice((0, 0, 2, 50))
    return "".join(tokens)


def _code(text: str, chance: random.Random) -> str:
    code = chance.choice(CODE).replace('"', '\\"')
    return _replace_one(r'(?<=").*?(?=")', text, code, chance)


def plans(full: bool = True) -> list[Counts]:
    """Read damaged plans, and show those that can be read for a model."""
    texts = Counts("hostile plan texts")
    torch.manual_seed(0)
    with empty_folder():
        for seed in range(6000 if full else 150):
            chance = random.Random(seed)
            mutate = fuzz.mutate if seed % 4 == 0 else by_grammar
            text = mutate(chance.choice(PLANS), chance)
            texts.attempt(seed, lambda text=text: read_and_show(text))
    return [texts, plan_files(full)]


def read_and_show(text: str) -> str:
    """Read a plan; what can be read must be written and read to the same, and fit or be refused."""
    try:
        told = fuzz.outcome(text)
    except AssertionError as error:
        raise Wrong(f"written and read again it is another plan: {error}") from error
    return "taken" if told == "shown" else "refused"


# ------------------------------------------------------------------------------------------ files


def plan_files(full: bool) -> Counts:
    """Read files that are no plans: bytes, sizes, links and devices; and names that are none."""
    counts = Counts("hostile plan files")
    with empty_folder() as folder:
        for label, path in odd_paths(folder):
            counts.attempt(label, lambda path=path: open_plan(path))
        for seed in range(1500 if full else 40):
            chance = random.Random(seed)
            path = folder / "plan.toml"
            path.write_bytes(odd_bytes(chance))
            counts.attempt(seed, lambda path=path: open_plan(path))
    return counts


def open_plan(path: str | Path) -> str:
    plan = lm.Plan.from_toml(path)
    if lm.Plan.from_toml(plan.to_toml()) != plan:
        raise Wrong("written and read again it is another plan")
    return "taken"


def odd_bytes(chance: random.Random) -> bytes:
    """Return the bytes of a plan, damaged below the level of its text."""
    data = chance.choice(PLANS).encode(chance.choice(("utf-8", "utf-8", "utf-16", "utf-8-sig")))
    for _ in range(chance.randint(0, 3)):
        place, kind = chance.randrange(len(data) + 1), chance.randrange(4)
        if kind == 0:
            data = data[:place] + chance.randbytes(chance.choice((1, 4, 100))) + data[place:]
        elif kind == 1:
            data = data[:place] + bytes(chance.choice((1, 100_000))) + data[place:]
        elif kind == 2:
            data = data[:place].replace(b"\n", b"\r") + data[place:]
        else:
            filler = chance.choice(string.ascii_letters + '[{("=.#\n').encode()
            data = data[:place] + filler * chance.choice((5, 3000, 900_000)) + data[place:]
    return data


def odd_paths(folder: Path) -> list[tuple[str, str | Path]]:
    """Return what may be given as the path of a plan and is none."""
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "zeros").symlink_to("/dev/zero")
    (folder / "nothing").symlink_to(folder / "missing")
    (folder / "inside").mkdir()
    with (folder / "large").open("wb") as file:
        file.truncate(50 * 2**30)  # takes no room on the disk
    return [
        *((name, folder / name) for name in ("loop", "zeros", "nothing", "inside", "large")),
        *(("empty name", ""), ("NUL", "plan\0.toml"), ("surrogate", "plan\udcff\ud800.toml")),
        *(("long name", "a" * 5000), ("deep name", "a/" * 3000), ("device", "/dev/null")),
        *(("steering", "\x1b[2J\r.toml"), ("a path of a NUL", Path("plan\0.toml"))),
        *(("many lines", "\n" * 1_000_001), ("NUL in a text", "lr = 1\0"), ("one mark", "=")),
    ]
