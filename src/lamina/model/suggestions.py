"""What a mistaken pattern or setting most likely meant: proposals that were tried before."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import PatternError, did_you_mean
from .parameters import ParamInfo
from .patterns import LONG, PatternLike, compile_pattern, is_regular

#: within a pattern: what is not a glob over names, and a glob
_OTHER = re.compile(r"((?:ndim|numel)\s*[<>=!]=?\s*\d+|type:[^\s|&!()]+)")
_NAME = re.compile(r"[^\s|&!()]+")
_TYPE = re.compile(r"type:\s*([\w.*?\[\]{},]+)")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "base_model.")

#: settings under the names that other libraries use: how lamina writes them, around the value
ALIASES: Mapping[str, str] = {
    **dict.fromkeys(("learning_rate", "learningrate", "lrate", "base_lr", "eta"), "lr={}"),
    **dict.fromkeys(("wd", "decay", "weightdecay", "l2", "l2_reg"), "weight_decay={}"),
    **dict.fromkeys(("beta1", "beta_1", "b1"), "betas=({}, 0.999)"),
    **dict.fromkeys(("beta2", "beta_2", "b2"), "betas=(0.9, {})"),
    **dict.fromkeys(("beta", "betas1"), "betas={}"),
    **dict.fromkeys(("mom", "momentum_factor"), "momentum={}"),
    **dict.fromkeys(("epsilon", "adam_epsilon"), "eps={}"),
    **dict.fromkeys(("max_grad_norm", "max_norm", "grad_clip", "gradient_clip"), "clip_norm={}"),
    **dict.fromkeys(("gradient_clip_val", "grad_norm", "clip", "clipnorm"), "clip_norm={}"),
    **dict.fromkeys(("clip_grad", "clip_grad_norm"), "clip_norm={}"),
    **dict.fromkeys(("clip_value", "clipvalue"), "gradients=lamina.clip_value({})"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "sched", "lr_schedule"), "schedule={}"),
    **dict.fromkeys(("requires_grad", "trainable", "train"), "frozen={not}"),
    **dict.fromkeys(("freezed", "is_frozen"), "frozen={}"),
    **dict.fromkeys(("unfreeze", "unfreeze_at", "thaw_at", "unfrozen"), "thaw={}"),
    **dict.fromkeys(("freeze_at", "refreeze"), "freeze={}"),
    **dict.fromkeys(("lr_mult", "lr_scale", "lr_factor", "lr_multiplier"), "lr=lamina.times({})"),
    **dict.fromkeys(("layer_decay", "lr_decay", "llrd"), "lr=lamina.by_depth({})"),
    **dict.fromkeys(("warmup", "warmup_steps", "num_warmup_steps"), "schedule=lamina.warmup({})"),
    **dict.fromkeys(("plateau", "reduce_on_plateau"), "feedback={}"),
    **dict.fromkeys(("early_stop", "early_stopping"), "stop={}"),
    **dict.fromkeys(("rule", "groups", "param_groups"), "rules=[{}]"),
}
#: settings that only the plan itself has
_OF_THE_PLAN = ("rules", "stop", "nonfinite", "nonfinite_check")


def written_as(key: str, value: object, known: Iterable[str] = ()) -> str:
    """Return how a setting under another name is written, or an empty string.

    Args:
        key: the name that was given.
        value: what was given for it.
        known: the hyperparameters of the optimizer, if it is known.
    """
    known = tuple(known)
    if key in _OF_THE_PLAN:
        return f" It is an argument of lamina.Plan alone, not of a rule: Plan(..., {key}=...)."
    form = ALIASES.get(key.lower(), "")
    if key == "momentum" and "betas" in known:
        form = "betas=({}, 0.999)"
    elif key == "betas" and "momentum" in known and isinstance(value, (tuple, list)):
        form, value = "momentum={}", value[0]
    target = form.partition("=")[0]
    if not form or (known and target not in (*known, *_SETTINGS)):
        return ""
    if "{not}" in form:
        form, value = "frozen={}", not value
    if target == "rules" and isinstance(value, (list, tuple)):
        form, value = "rules={}", list(value)
    written = form.format(_plain(value))
    return f" Write {f'lamina.Plan(..., {written})' if target in _OF_THE_PLAN else written}."


_SETTINGS = (
    *("schedule", "feedback", "frozen", "thaw", "freeze", "rewarm", "clip_norm", "gradients"),
    *("hold", "frozen_state", "optimizer", *_OF_THE_PLAN),
)


def _plain(value: object) -> str:
    """Return a value as the user would write it."""
    from .._util.grammar import to_source

    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(_plain, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return re.sub(r"\b(?=[A-Za-z_]+\()", "lamina.", to_source(value))


def nothing_matched(pattern: PatternLike, infos: Sequence[ParamInfo]) -> str:
    """Return what to say of a pattern that matches no parameter: what would match, what is near.

    Args:
        pattern: the pattern as it was given.
        infos: all parameters of the model.
    """
    said = f"matches none of the {len(infos)} parameters."
    if not isinstance(pattern, str):
        return said
    better = better_pattern(pattern, infos)
    if better is not None:
        said += f" The pattern {better!r} matches: write that, if it is meant."
    names = [name for info in infos for name in info.names]
    typed = _TYPE.search(pattern)
    if typed and better is None:
        types = ", ".join(sorted(each for each in _types(infos) if not each.startswith("_")))
        return f"{said} The classes that own parameters are: {types}."
    return f"{said} The closest parameter names are: {', '.join(closest(pattern, names))}."


def better_pattern(pattern: str, infos: Sequence[ParamInfo]) -> str | None:
    """Return a pattern like a given one that matches some parameter, if there is an obvious one."""
    if len(pattern) > LONG:
        return None
    for candidate in dict.fromkeys(_candidates(pattern, infos)):
        try:
            compiled = compile_pattern(candidate)
        except PatternError:
            continue
        if candidate != pattern and any(compiled.matches(info) for info in infos):
            return candidate
    return None


def _candidates(pattern: str, infos: Sequence[ParamInfo]) -> Iterator[str]:
    names = [name for info in infos for name in info.names]
    if pattern.startswith("re:"):
        inside = pattern[3:].strip()
        if not re.search(r"\)[*+{]", inside):
            yield f"re:.*(?:{inside}).*"
        return
    regular = is_regular(pattern) and not re.search(r"\)[*+{]", pattern)  # which may run for ever
    if regular:
        yield f"re:{pattern}"
    yield re.sub(r"\b(ndim|numel)\s*=\s*(?=\d)", r"\1==", pattern)
    yield re.sub(r"\b(?:n?dims?|ndimension)\s*(<=|>=|==|!=|=|<|>)\s*(\d)", _compared, pattern)
    yield re.sub(r"^~", "!", pattern)
    types = _types(infos)
    yield _TYPE.sub(lambda found: "type:" + _nearest(found[1].split(".")[-1], types), pattern)
    if pattern in types:
        yield f"type:{pattern}"
    yield re.sub(r"\{(?!depth)\w+\}", "{depth}", pattern)
    yield _renamed(pattern, _below_any)
    yield _renamed(pattern, lambda name: f"*.{name}")
    yield _renamed(pattern, _without_prefix)
    yield _renamed(pattern, lambda name: _mended(name, names))
    yield _renamed(pattern, lambda name: _below_any(_mended(name, names)))
    if regular:
        yield f"re:.*(?:{pattern.strip('^$')}).*"
    yield _renamed(pattern, lambda name: f"*{name.strip('*')}*")


def _renamed(pattern: str, change: Callable[[str], str]) -> str:
    """Change the globs of a pattern; classes and comparisons stay."""
    parts = _OTHER.split(pattern)
    parts[::2] = [_NAME.sub(lambda found: change(found[0]), part) for part in parts[::2]]
    return "".join(parts)


def _below_any(name: str) -> str:
    """Return a glob for a name under any prefix; a module means everything below it."""
    return f"*.{name}" if re.search(r"[*?\[]", name) else f"*.{name}.*"


def _compared(found: re.Match[str]) -> str:
    return f"ndim{'==' if found[1] == '=' else found[1]}{found[2]}"


def _without_prefix(name: str) -> str:
    """Remove the prefix of a wrapper, or of a module around this one."""
    for prefix in _WRAPPERS:
        name = name.removeprefix(prefix)
    return name


def _mended(name: str, names: Sequence[str]) -> str:
    """Exchange each part of a glob for the nearest one that the model has."""
    parts = {part for each in names for part in each.split(".")}
    return ".".join(_nearest(part, parts) for part in name.split("."))


def _nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word most like a given one, or the given one if none is near."""
    if not word.isidentifier():
        return word
    by_lower: dict[str, str] = {}
    for each in sorted(known):
        by_lower.setdefault(each.lower(), each)
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.75)
    return by_lower[near[0]] if near else word


def _types(infos: Sequence[ParamInfo]) -> set[str]:
    return {name for info in infos for name in info.types} - {"object", "Module"}


def missing_name(name: str, known: Sequence[str]) -> str:
    """Return which parameters are closest to a name that no parameter has.

    Those of the module of this name, if there is one.
    """
    below = [each for each in known if each.startswith(f"{name}.") or each.endswith(f".{name}")]
    return ", ".join(below[:3] or closest(name, known))


def closest(pattern: str, names: Sequence[str], limit: int = 3) -> list[str]:
    """Return the names closest to the pattern, compared part by part between the dots."""
    wanted = [part for part in re.split(r"[.\s|&!()]+", pattern) if part.strip("*?")]
    best = sorted(names, key=lambda name: _likeness(wanted, name), reverse=True)
    of_shape: dict[str, str] = {}
    for name in best:  # one layer stands for all of its kind
        of_shape.setdefault(re.sub(r"\d+", "0", name), name)
    return list(of_shape.values())[:limit]


def _likeness(wanted: Sequence[str], name: str) -> float:
    parts = name.split(".")
    total = 0.0
    for word in wanted:
        if word == "{depth}":
            total += 0.5 * any(part.isdigit() for part in parts)
            continue
        word = word.removeprefix("type:").strip("*?")
        total += max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts)
    return total


def unknown_setting(key: str, value: Any, known: Sequence[str]) -> str:
    """Return what to write instead of a setting that the optimizer does not have."""
    return written_as(key, value, known) or did_you_mean(key, [*known, *_SETTINGS])
