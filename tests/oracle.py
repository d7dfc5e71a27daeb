"""What a plan means, written again from the design in plain Python; imports nothing of lamina.

A plan is plain data, a parameter is {"name", "types", "ndim", "requires_grad"}:

    plan      {"settings": {...}, "rules": [{"match": pattern, "settings": {...}}, ...]}
    setting   a number, True, False, None, a time, ("times", x), ("by_depth", rate),
              ("top_down", every, start or None), or a schedule
    schedule  ("warmup", length, start)          ("constant", value, length)
              ("linear", start, to, length)      ("cosine", start, to, length)
              ("step_decay", every, gamma, start, length)
              (">>", [schedule, ...])            ("*", [schedule, ...])
    times     of thaw and freeze: a time, or a list of them
    time      500, "500 steps", "0.4 epochs", "10%"; None as a length is the rest of the run
    run       {"steps": n or None, "steps_per_epoch": m or None}
"""

import math
import re
from fractions import Fraction

SHAPES = ("warmup", "constant", "linear", "cosine", "step_decay", ">>", "*")
DEFAULTS = {"lr": 1e-3, "weight_decay": 0.0}  # of SGD
FOREVER = math.inf


# ---------------------------------------------------------------------------------------- time


def exact(time, run):
    """The exact number of steps of a time, not rounded."""
    if isinstance(time, int):
        return Fraction(time)
    amount, unit = re.fullmatch(r"([\d.]+) ?(steps|epochs|%)", time).groups()
    if unit == "steps":
        return Fraction(amount)
    if unit == "epochs":
        return Fraction(amount) * run["steps_per_epoch"]
    return Fraction(amount) * run["steps"] / 100


# ----------------------------------------------------------------------------------- schedules


def length_of(tree, run):
    """The exact length of a schedule; None if it takes the rest of the run."""
    if tree[0] == ">>":
        lengths = [length_of(part, run) for part in tree[1]]
        return None if None in lengths else sum(lengths)
    if tree[0] == "*":
        lengths = [length_of(part, run) for part in tree[1]]
        return None if None in lengths else max(lengths)
    length = tree[1] if tree[0] == "warmup" else tree[-1]
    return None if length is None else exact(length, run)


def value_of(tree, step, run, begin=Fraction(0)):
    """The value of a schedule at a step; `begin` is the exact position where it begins."""
    if tree[0] == "*":
        return math.prod(value_of(part, step, run, begin) for part in tree[1])
    if tree[0] == ">>":
        *earlier, last = tree[1]
        for part in earlier:
            end = begin + length_of(part, run)
            if step < math.ceil(end):
                return value_of(part, step, run, begin)
            begin = end
        return value_of(last, step, run, begin)
    length = length_of(tree, run)
    end = begin + length if length is not None else Fraction(run["steps"])
    first, total = math.ceil(begin), math.ceil(end) - math.ceil(begin)
    return shape(tree, step - first, total, run)


def shape(tree, t, total, run):
    """One shape, t steps into its phase of `total` steps; past the end its left limit there."""
    kind = tree[0]
    if kind == "constant":
        return tree[1]
    if kind == "step_decay":
        _, every, gamma, start, _ = tree
        last = max(total - 1, 0)  # drops fall on whole steps; one on the end is not reached
        drops = math.floor(Fraction(min(t, last)) / exact(every, run))
        return (1.0 if start is None else start) * gamma**drops
    progress = min(t / total, 1.0)
    if kind == "warmup":
        return tree[2] + (1.0 - tree[2]) * progress
    start, to = (1.0 if tree[1] is None else tree[1]), tree[2]
    if kind == "linear":
        return start + (to - start) * progress
    return to + (start - to) * (1.0 + math.cos(math.pi * progress)) / 2.0


# ------------------------------------------------------------------------------------ patterns


def select(pattern, param):
    """Whether the pattern selects the parameter, and the layer number it captures (or None)."""
    found, depth = False, None
    for alternative in pattern.split("|"):
        hits = [_atom(part.strip(), param) for part in alternative.split("&")]
        if all(hit for hit, _ in hits):
            found = True
            depth = next((number for _, number in hits if number is not None), depth)
    return found, depth


def _atom(text, param):
    if text.startswith("!"):
        return not _atom(text[1:].strip(), param)[0], None
    if text.startswith("type:"):
        return text[5:] in param["types"], None
    if text.startswith("ndim<"):
        return param["ndim"] < int(text[5:]), None
    if not any(wild in text for wild in ("*", "{depth}")):
        return param["name"] == text or param["name"].startswith(text + "."), None
    regex = re.escape(text).replace(r"\*", ".*").replace(r"\{depth\}", r"(\d+)")
    match = re.fullmatch(regex, param["name"])
    number = int(match[1]) if match and match.groups() else None
    return bool(match), number


# ------------------------------------------------------------------------------------- cascade


class Meaning:
    """What a plan means for each of some parameters."""

    def __init__(self, plan, params, run):
        self.run = run
        self.tracks = {param["name"]: _Track(plan["settings"], run) for param in params}
        for param in params:
            if not param.get("requires_grad", True):
                self.tracks[param["name"]].frozen = True
        for index, rule in enumerate(plan["rules"], 1):
            chosen = {param["name"]: select(rule["match"], param) for param in params}
            chosen = {name: depth for name, (hit, depth) in chosen.items() if hit}
            layers = sorted({depth for depth in chosen.values() if depth is not None})
            for name, depth in chosen.items():
                below = None if depth is None else len(layers) - 1 - layers.index(depth)
                self.tracks[name].take(rule["settings"], index, below, run)

    def trains(self, name, step):
        return self.tracks[name].trains(step)

    def lr(self, name, step):
        """The lr applied at a step; 0 while frozen."""
        if not self.trains(name, step):
            return 0.0
        track = self.tracks[name]
        value = self.hyper(name, "lr", step)
        if track.schedule is not None:
            value *= value_of(track.schedule, step, self.run)
        thaw = max((begin for begin in track.thaws if begin <= step), default=0)
        if track.rewarm is not None and thaw > 0:  # what trains from step 0 has no thaw
            value *= value_of(track.rewarm, step - thaw, self.run)
        return value

    def hyper(self, name, key, step):
        base, factors = self.tracks[name].hyper[key]
        return _number(base, step, self.run) * math.prod(
            _number(factor, step, self.run) for factor in factors
        )

    def clip_factors(self, step, square_norms):
        """The factor of clipping for each parameter, given the squared norm of each gradient."""
        totals = {}
        for name, square in square_norms.items():
            clip = self.tracks[name].clip
            if clip is not None and self.trains(name, step):
                totals[clip[0]] = totals.get(clip[0], 0.0) + square
        factors = {}
        for name in square_norms:
            clip = self.tracks[name].clip
            factors[name] = 1.0
            if clip is not None and self.trains(name, step):
                threshold = _number(clip[1], step, self.run)
                factors[name] = min(1.0, threshold / (math.sqrt(totals[clip[0]]) + 1e-6))
        return factors


def _number(value, step, run):
    return value_of(value, step, run) if isinstance(value, tuple) else value


class _Track:
    """The settings of one parameter, as the rules leave them."""

    def __init__(self, settings, run):
        self.hyper = {key: (value, []) for key, value in DEFAULTS.items()}
        self.schedule = self.rewarm = self.clip = None
        self.frozen, self.thaws, self.freezes = False, [0], []
        self.take(settings, 0, None, run)

    def take(self, settings, rule, below, run):
        window = {k: v for k, v in settings.items() if k in ("frozen", "thaw", "freeze")}
        if window:
            self.set_window(window, below, run)
        for key, value in settings.items():
            if key in ("schedule", "rewarm"):
                setattr(self, key, value)
            elif key == "clip_norm":
                self.clip = None if value is None else (rule, value)
            elif key not in window:
                self.set_hyper(key, value, below)

    def set_hyper(self, key, value, below):
        base, factors = self.hyper[key]
        if isinstance(value, tuple) and value[0] == "times":
            self.hyper[key] = base, [*factors, value[1]]
        elif isinstance(value, tuple) and value[0] == "by_depth":
            factor = 1.0 if below is None else value[1] ** below
            self.hyper[key] = base, [*factors, factor]
        else:
            self.hyper[key] = value, []

    def trains(self, step):
        """Whether it does: by the last thing that happened, or else what comes first."""
        if self.frozen:
            return False
        happened = [(at, True) for at in self.thaws if at <= step]
        happened += [(at, False) for at in self.freezes if at <= step]
        if happened:
            return max(happened)[1]
        return min(self.freezes, default=FOREVER) < min(self.thaws, default=FOREVER)

    def set_window(self, window, below, run):
        thaw, freeze = window.get("thaw", []), window.get("freeze", [])
        if isinstance(thaw, tuple):  # top_down
            if below is None:
                return
            every = exact(thaw[1], run)
            start = every if thaw[2] is None else exact(thaw[2], run)
            thaw = [math.ceil(start + below * every)]
        listed = [thaw if isinstance(thaw, list) else [thaw]]
        listed += [freeze if isinstance(freeze, list) else [freeze]]
        self.thaws, self.freezes = ([math.ceil(exact(at, run)) for at in each] for each in listed)
        if not self.thaws and not self.freezes:  # frozen=False
            self.thaws = [0]
        self.frozen = window.get("frozen", False)
