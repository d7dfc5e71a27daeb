"""Random plans as plain data (see `oracle`), and the same plans as lamina's objects."""

from hypothesis import strategies as st

import lamina as lm
from oracle import SHAPES, length_of

RUNS = [
    {"steps": 12, "steps_per_epoch": 4},
    {"steps": 13, "steps_per_epoch": 5},
    {"steps": 17, "steps_per_epoch": 7},
]
PATTERNS = [
    "encoder.layer.{depth}.*",
    "encoder.layer.{depth}.* | classifier",
    "embeddings | encoder.layer.{depth}.dense.*",
    "encoder",
    "encoder & !*.bias",
    "classifier.*",
    "embeddings",
    "*.bias | type:LayerNorm",
    "type:Linear & ndim<2",
    "*",
]
MODEST = st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0, 1.5])
LENGTHS = st.sampled_from([1, 2, "3 steps", "0.4 epochs", "0.3 epochs", "7%", "12.5%", "10%"])
THAWS = st.sampled_from([0, 1, 3, "5 steps", "0.4 epochs", "1 epochs", "1.3 epochs", "25%", "33%"])
#: windows that alternate in every run: at least a step lies between any two of these times
TURNS = [1, "25%", "45%", "60%", "75%", "90%"]
FREEZES = st.sampled_from([9, "75%", "2 epochs", "90%", "100%"])


@st.composite
def shapes(draw, value, ends):
    """One shape; `value` with an absolute start, `ends` with a length of its own."""
    kinds = ["constant", "linear", "cosine", "step_decay"] + (
        ["warmup"] if not value and ends else []
    )
    kind = draw(st.sampled_from(kinds))
    start = draw(MODEST) if value else None
    length = draw(LENGTHS) if ends else None
    if kind == "warmup":
        return (kind, length, draw(st.sampled_from([0.0, 0.1])))
    if kind == "constant":
        return (kind, draw(MODEST), length)
    if kind == "step_decay":
        return (kind, draw(LENGTHS), draw(st.sampled_from([0.1, 0.5])), start, length)
    return (kind, start, draw(st.sampled_from([0.0, 0.01, 0.2, 0.5])), length)


@st.composite
def schedules(draw, value=False):
    """A shape, phases one after the other, or (for factors) a product of these."""
    parts = [draw(shapes(value, True)) for _ in range(draw(st.integers(0, 2)))]
    parts.append(draw(shapes(value, draw(st.booleans()))))
    tree = parts[0] if len(parts) == 1 else (">>", parts)
    if not value and draw(st.integers(0, 4)) == 0:
        tree = ("*", [tree, draw(schedules())])
    return tree if not value or _has_start(tree) else ("linear", draw(MODEST), 0.5, None)


def _has_start(tree):
    return tree[0] in ("linear", "cosine", "step_decay") or (
        tree[0] == ">>" and _has_start(tree[1][0])
    )


@st.composite
def plain_settings(draw, default, layered):
    """The settings of a rule, or of the plan itself."""
    found = {}
    choices = ["lr", "weight_decay", "schedule", "clip_norm"]
    choices += [] if default else ["window", "factor", "exempt"]
    for choice in draw(st.lists(st.sampled_from(choices), min_size=1, max_size=3, unique=True)):
        if choice in ("lr", "weight_decay"):
            found[choice] = draw(st.one_of(MODEST, schedules(value=True)))
        elif choice == "schedule":
            found[choice] = draw(schedules())
        elif choice == "exempt":
            found["schedule"] = None
        elif choice == "clip_norm":
            found[choice] = draw(st.one_of(st.none(), MODEST, schedules(value=True)))
        elif choice == "factor":
            key = draw(st.sampled_from(["lr", "weight_decay"]))
            found[key] = draw(factors(layered))
        else:
            found |= draw(windows(layered))
    if default:
        found.setdefault("lr", draw(MODEST))
        found.setdefault("weight_decay", draw(MODEST))
    return found


@st.composite
def factors(draw, layered):
    if layered and draw(st.booleans()):
        return ("by_depth", draw(st.sampled_from([0.5, 0.9, 0.95])))
    return ("times", draw(st.one_of(MODEST, schedules())))


@st.composite
def windows(draw, layered):
    kinds = ["frozen", "thaw", "freeze", "both", "top_down", "rewarm", "several"]
    kind = draw(st.sampled_from(kinds))
    if kind == "several":
        return draw(several_windows())
    if kind == "frozen":
        return {"frozen": draw(st.sampled_from([True, True, False]))}
    if kind == "freeze":
        return {"freeze": draw(FREEZES)}
    if kind == "top_down" and layered:
        every = draw(st.sampled_from([1, 2, "0.4 epochs", "7%"]))
        return {"thaw": ("top_down", every, draw(st.sampled_from([None, 0, 2, "0.5 epochs"])))}
    found = {"thaw": draw(THAWS)}
    if kind == "both":
        found["freeze"] = draw(FREEZES)
    if kind == "rewarm" and found["thaw"] != 0:
        found["rewarm"] = ("warmup", draw(LENGTHS), 0.0)
    return found


@st.composite
def several_windows(draw):
    """Thaws and freezes in turn, either of them first."""
    times = draw(st.lists(st.sampled_from(TURNS), min_size=2, unique=True).map(_in_turn))
    names = ["thaw", "freeze"] if draw(st.booleans()) else ["freeze", "thaw"]
    found = dict(zip(names, (times[::2], times[1::2]), strict=True))
    if draw(st.booleans()):
        found["rewarm"] = ("warmup", draw(LENGTHS), 0.5)
    return found


def _in_turn(times):
    return sorted(times, key=TURNS.index)


@st.composite
def plain_plans(draw):
    """A plan as plain data."""
    rules = []
    for pattern in draw(st.lists(st.sampled_from(PATTERNS), max_size=4)):
        settings = draw(plain_settings(False, "{depth}" in pattern))
        rules.append({"match": pattern, "settings": settings})
    return {"settings": draw(plain_settings(True, False)), "rules": rules}


def fits(tree, run):
    """Whether the phases of a schedule leave something for the last one."""
    if tree[0] in ("*", ">>"):
        if not all(fits(part, run) for part in tree[1]):
            return False
        parts = tree[1][:-1] if tree[0] == ">>" else []
        return sum(length_of(part, run) for part in parts) < run["steps"] - 1
    return True


# ------------------------------------------------------------------------------- lamina's objects


def to_schedule(tree):
    kind, *rest = tree
    if kind in (">>", "*"):
        made = to_schedule(rest[0][0])
        for part in rest[0][1:]:
            made = made >> to_schedule(part) if kind == ">>" else made * to_schedule(part)
        return made
    names = {
        "warmup": ("length", "start"),
        "constant": ("value", "length"),
        "linear": ("start", "to", "length"),
        "cosine": ("start", "to", "length"),
        "step_decay": ("every", "gamma", "start", "length"),
    }[kind]
    given = {name: item for name, item in zip(names, rest, strict=True) if item is not None}
    return getattr(lm, kind)(**given)


def to_value(value):
    if isinstance(value, list):
        return list(value)
    if not isinstance(value, tuple):
        return value
    if value[0] in SHAPES:
        return to_schedule(value)
    return getattr(lm, value[0])(*(to_value(part) for part in value[1:] if part is not None))


def to_plan(plain, optimizer=lm.SGD):
    """The plan that the plain data describe."""
    rules = [
        lm.Rule(rule["match"], **{key: to_value(item) for key, item in rule["settings"].items()})
        for rule in plain["rules"]
    ]
    given = {key: to_value(item) for key, item in plain["settings"].items()}
    return lm.Plan(optimizer, rules=rules, **given)
