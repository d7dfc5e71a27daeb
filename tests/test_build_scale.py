"""Resolve, build and state grow with what rules match: work is counted, not timed."""

import itertools
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import lamina as lm
from lamina.model import patterns
from lamina.model.finding import moving_statistics
from lamina.model.name_index import ParameterIndex, TextIndex, needed_in_regex
from lamina.model.parameters import Observed, ParamInfo, walk
from lamina.model.patterns import Pattern, compile_pattern
from lamina.resolve.cascade import cascade
from lamina.resolve.findings import find, model_findings
from lamina.resolve.resolve import resolve_plan
from lamina.schedules.duration import Run

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import build  # noqa: E402
from benchmarks.scaling.local import exponent, make_model  # noqa: E402
from benchmarks.scaling.tables import skeleton  # noqa: E402

from test_scaling import calls_of  # noqa: E402

# ------------------------------------------------------------------ the index misses no parameter

NAMES = [
    *(f"layers.{i}.{part}.{kind}" for i in (0, 1, 11) for part in ("attn", "norm1", "up_proj")
      for kind in ("weight", "bias")),
    *("weight", "embed.weight", "layers.1", "a.b]c", "a.b{2}c", "x.aab", "x.b", "x.weights", "ß.é"),
]  # fmt: skip
GLOBS = [
    *("layers.1", "layers", "layers.1.*", "layers.{depth}.*", "layers.{depth}", "*", "*.bias"),
    *("*norm*", "*norm?.weight", "l*s.1*", "[lx]*.1.*", "{embed,layers}.*", "*.{bias,weight}"),
    *("*1.attn*", "?.aab", "layers.1?.*", "weigh", "weight", "*eight", "a.b*c", "ß.é", "[!l]*"),
    *("layers.[0-9].up_*", "*.1.*", "*..*", "lay**rs.1*t", "layers.{0,1}.*"),
]
EXPRESSIONS = [
    *(r"layers\.1\..*", r"layers\.\d+\.attn\.weight", r".*bias$", r"^layers\.1\.(attn|norm1)\..*"),
    *(r"embed.*|.*bias", r"x\.a*b", r"x\.a{2}b", r"x\.a+b?b", r"(?i)LAYERS.*", r"x\.c*a{1,2}b"),
    *(r"layers\.(?P<depth>\d+)\..*", r"(?:layers|embed)\..*weight", r"[a-z.]*weight", r".*\Bs"),
    *(r"[]x.a]*b", r"a\.b\]c", r"a\.b]c", r"(?=layers).*", r"(?!layers).*", r"(l)ayers\.1.*", r""),
    *(r"x\.[^\]]*", r"\w+", r"(?x) x \. b", r"layers\.1\b.*", r"\x78\.b", r"(?P<a>x)\.(?P=a)?b"),
    *(r"(?i:X)\.b", r"(?#note)x\.b", r"x\.b\Z", r"weight$|x\.b", r"(a\.|x\.)b.*", r"x\.a*?a*+b"),
    *(r"[[:alpha:]]*\.b", r"a\.b{2}c", r"a\.b\{2\}c", r"(x(\.)(?:a(a)))b", r"x\.(?>a*)b", r"^x.b$"),
]
TYPES = ["type:Linear", "type:L*", "type:*Norm", "type:Base", "type:[LB]a*", "type:Nothing"]
MIXED = [
    *("type:Linear & layers.1.*", "!layers.*", "!(layers.1.* | *.bias)", "ndim<2 & *.bias"),
    *("layers.1.* | ndim==2", "layers.1.* & !*.bias & type:L*", "embed.* | x.*", "numel>=4"),
    "*.bias & re:layers.1.*",
]


def info_of(name, place=0):
    types = frozenset([("Linear", "LayerNorm", "Batch")[place % 3], "Base", "Module"])
    names = (name, f"tied.{name}") if place % 5 == 0 else (name,)
    return ParamInfo(name, names, (2,) * (1 + place % 2), "float32", types, True)


INFOS = [info_of(name, place) for place, name in enumerate(NAMES)]


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@pytest.mark.parametrize("text", [*GLOBS, *(f"re:{e}" for e in EXPRESSIONS if e), *TYPES, *MIXED])
def test_the_index_finds_what_a_look_at_each_name_finds(text):
    pattern = compile_pattern(text)
    expected = [place for place, info in enumerate(INFOS) if pattern.matches(info)]
    assert pattern.places(ParameterIndex(INFOS)) == expected


PIECES = ["a", "b", *".*+?()|^$", r"\.", "{0}", "{1,}", "(?:", "[ab]"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_an_expression_needs_is_in_every_match():
    chosen, tried = random.Random(0), 0
    names = [
        "".join(each) for size in range(1, 5) for each in itertools.product("ab.", repeat=size)
    ]
    infos = [info_of(name, 1) for name in names]
    index = ParameterIndex(infos)
    while tried < 300:
        text = "".join(chosen.choices(PIECES, k=chosen.randint(1, 7)))
        try:
            re.compile(text)
            pattern = compile_pattern(f"re:{text}")
        except (re.error, lm.PatternError):
            continue
        tried += needed_in_regex(text) not in ([], [".", "."])
        expected = [place for place, info in enumerate(infos) if pattern.matches(info)]
        assert pattern.places(index) == expected, text


def test_canary_a_need_that_is_none_loses_a_match(monkeypatch):
    text = r"x\.a*b"
    monkeypatch.setattr(patterns, "needed_in_regex", lambda expression: [".x.aab."])
    pattern = patterns._of_names(text, True, 0)
    names = [INFOS[place].name for place in pattern.places(ParameterIndex(INFOS))]
    assert names == ["x.aab"]
    assert pattern.matches(INFOS[NAMES.index("x.b")])


def test_needs_are_found_where_an_expression_is_plain():
    assert needed_in_regex(r"^layers\.17\.(qkv|out)\..*bias$") == [".layers.17.", ".", "bias."]
    assert needed_in_regex(r"a.*b|c") == needed_in_regex(r"(?i)abc") == needed_in_regex("a]b") == []


def test_the_rarest_part_decides():
    index = TextIndex((f"layers.{i}.block{i}_a.weight", i) for i in range(50))
    assert list(index.holding([".layers.17.", "weight."])) == [17]
    assert set(index.holding(["block17"])) == {17}
    assert list(index.holding([".layers.99."])) == []
    assert index.holding(["."]) is None


def test_a_function_is_asked_once_for_each_parameter():
    seen = []
    plan = lm.Plan(lm.SGD, lr=0.1, rules=[lm.Rule(lambda info: not seen.append(info), lr=0.2)])
    resolve_plan(plan, make_model(60))
    assert len(seen) == 60


def test_a_slow_pattern_is_stopped_where_it_is_tried():
    slow = lm.Plan(lm.SGD, lr=0.1, rules=[lm.Rule(r"re:(?:a|aa|\w)+\.[w]eigh", lr=0.2)])
    model = nn.ModuleDict({"a" * 40: nn.Linear(1, 1)})
    with pytest.raises(lm.PatternError, match="takes too long"):
        resolve_plan(slow, model)


# -------------------------------------------------------------------------- matches, not products


def matches_of(kind, tensors, monkeypatch):
    """How often a pattern is tried on a name, with one rule for each block of tensors."""
    count = 0
    tried = patterns._matched

    def counted(*given):
        nonlocal count
        count += 1
        return tried(*given)

    infos = [item.info for item in walk(make_model(tensors))]
    with monkeypatch.context() as patched:
        patched.setattr(patterns, "_matched", counted)
        cascade(build.plan_of(kind, tensors // build.IN_BLOCK, tensors), infos, Run(100))
    return count


@pytest.mark.parametrize("kind", [*build.KINDS, "mixed"])
def test_patterns_are_tried_on_few_names(kind, monkeypatch):
    for tensors in (240, 960):
        assert matches_of(kind, tensors, monkeypatch) <= 8 * tensors


@pytest.mark.parametrize("kind", ["globs", "re:"])
def test_canary_patterns_tried_on_every_name_are_seen(kind, monkeypatch):
    monkeypatch.setattr(Pattern, "places", lambda self, index: [
        place for place, info in enumerate(index.infos) if self.matches(info)
    ])  # fmt: skip
    assert matches_of(kind, 960, monkeypatch) > 8 * 960


WORK = {
    "resolve": lambda plan, model: resolve_plan(plan, model, Run(1000)),
    "preview": lambda plan, model: str(plan.preview(model, steps=1000)),
    "build and state": lambda plan, model: build_and_load(plan, model),
}


def build_and_load(plan, model):
    optimizer = plan.build(model, steps=1000)
    for name, _ in model.named_parameters():
        str(optimizer.explain(name))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.check(model)
    optimizer.release()


@pytest.mark.filterwarnings("ignore::lamina.LaminaWarning")
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("kind", ["mixed", "one group"])
def test_calls_grow_as_tensors_and_rules(work, kind):
    sizes = (48, 96, 192)
    if kind == "one group":
        plans = [build.plan_of("names", 0, size) for size in sizes]
    else:
        plans = [build.plan_of(kind, size // build.IN_BLOCK, size) for size in sizes]
    for plan, size in zip(plans, sizes, strict=True):
        if size == sizes[0] or work == "resolve":
            WORK[work](plan, make_model(size))  # compiles patterns
        for rule in plan.rules:
            compile_pattern(rule.match)
    counts = [
        calls_of(partial(WORK[work], plan, make_model(size)))
        for plan, size in zip(plans, sizes, strict=True)
    ]
    assert exponent(sizes, counts) < 1.1


# --------------------------------------------------------------------------------------- findings


class Read(dict):
    """A dict that counts how often its values are read."""

    reads = 0

    def items(self):
        for item in super().items():
            type(self).reads += 1
            yield item


def test_statistics_of_many_modules_read_each_name_once():
    names = [f"blocks.{i}.bn.{part}" for i in range(60) for part in ("weight", "bias")]
    by_hand = Read(dict.fromkeys(names, True) | {"blocks.0.fc.weight": False, "head.weight": False})
    below = {f"blocks.{i}.bn": {f"blocks.{i}.bn.weight", f"blocks.{i}.bn.bias"} for i in range(60)}
    (found,) = moving_statistics(by_hand, Observed(statistics=tuple(below.items())))
    assert Read.reads <= 2 * len(by_hand)
    # The first block also trains: only its norm is frozen as a whole, of the others the block.
    expected = " | ".join(["blocks.0.bn", *(f"blocks.{i}" for i in range(1, 60))])
    assert repr(expected) in found.fix


def old_reentrant(windows, seen):
    """When each segment is cut off, by a look at every step and every parameter."""

    def trains(spans, step):
        return any(begin <= step and (end is None or step < end) for begin, end in spans)

    order, cut = list(windows), {}
    steps = {step for spans in windows.values() for span in spans for step in span}
    for path, below in seen.reentrant:
        first = min(order.index(name) for name in below)
        for step in sorted(steps - {None}):
            active = {name for name in order if trains(windows[name], step)}
            if active & below and not active.intersection(order[:first]):
                cut.setdefault(path, step)
    return cut


def test_segments_cut_off_are_those_of_the_definition():
    chosen, found_some = random.Random(1), 0
    for _ in range(60):
        names = [f"p{i}" for i in range(8)]
        spans = [(), ((0, None),), ((3, None),), ((0, 5),), ((2, 4), (6, None)), ((1, 2), (7, 9))]
        windows = {name: chosen.choice(spans) for name in names}
        segments = tuple((f"s{i}", frozenset(chosen.sample(names, 2))) for i in range(3))
        seen = Observed(reentrant=segments)
        expected = old_reentrant(windows, seen)
        found = model_findings(windows, Run(20), seen)
        assert bool(found) == bool(expected)
        if found:
            found_some += 1
            assert found[0].message.startswith(f"{', '.join(expected)} is under")
            assert f"from step {min(expected.values())} on" in found[0].message
    assert 10 < found_some < 60


def test_findings_on_many_rules_without_effect_are_linear():
    counts, sizes = [], (40, 80, 160)
    for size in sizes:
        rules = [lm.Rule(f"layers.{i}.*", weight_decay=0.1) for i in range(size)]
        plan = lm.Plan(lm.AdamW, lr=0.1, rules=[*rules, lm.Rule("layers.*", weight_decay=0.0)])
        infos = [item.info for item in walk(make_model(size * build.IN_BLOCK))]
        drafts = cascade(plan, infos, Run(10))
        reads = Counted.reset(drafts)
        found = find(plan, reads, [], Run(10), Observed(), [])
        assert [each.code for each in found].count("rule-without-effect") == size
        assert "set again by 'layers.*'" in found[0].message
        counts.append(Counted.seen)
    assert exponent(sizes, counts) < 1.05


class Counted(list):
    """A list that counts how often its items are read."""

    seen = 0

    @classmethod
    def reset(cls, items):
        cls.seen = 0
        return cls(items)

    def __iter__(self):
        for item in super().__iter__():
            Counted.seen += 1
            yield item


# ---------------------------------------------------------------------------- imports and the page

HEAVY = ("numba", "triton", "transformers", "lightning", "accelerate", "peft", "matplotlib", "PIL",
         "pandas", "scipy", "sklearn", "torchvision", "tensorboard", "torch._dynamo", "sympy",
         "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._inductor")  # fmt: skip


def test_the_import_brings_no_heavy_package():
    line = (
        "import sys, torch; known = set(sys.modules); import lamina; "
        f"print([name for name in {HEAVY!r} if name in sys.modules and name not in known])"
    )
    done = subprocess.run(
        [sys.executable, "-c", line], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "[]"


def test_the_page_has_the_tables_of_the_command():
    page = (ROOT / "docs" / "explanation" / "scaling.md").read_text(encoding="utf-8")
    numbers = dict.fromkeys((*build.TIMES, *build.TORCH, *build.PEAKS, "process", "tensors"), 1.0)
    for title, lines in build.tables_of(dict.fromkeys(build.CASES, numbers)).items():
        there = page.split(f"**{title}**\n\n")[1].split("\n\n")[0].splitlines()
        shown = [line.replace("-#", "#") for line in skeleton(there)]  # a power may be below 0
        assert shown == skeleton(lines)


def test_one_measurement_covers_every_column():
    found = build.measure("mixed", 24, 5, traced=False)
    assert found.keys() >= {*build.TIMES, *build.TORCH, "process"}
    traced = build.measure("mixed", 24, 5, traced=True)
    assert all(traced[name] > 0 for name in build.PEAKS)
    assert torch.get_num_threads() == 1
