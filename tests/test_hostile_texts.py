"""Plans and patterns from files of others: each is read, or refused in one line, and soon."""

import itertools
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
from torch import nn

import lamina as lm
from lamina.model.parameters import ParamInfo
from lamina.model.patterns import _compile_glob, compile_pattern
from lamina.plan.toml import _LARGEST

LONG_NAME = ".".join(["encoder_layer", "0", "self_attention", "output_dense_projection"] * 3)


def info(*names):
    return ParamInfo(names[0], names, (2, 2), "float32", frozenset({"Linear"}), True)


SLOW = [
    "*" * 40 + "x",
    "*a*e*n*o*r*s*t*u*d*c*p*x",
    "*?*?*?*?*?*?*?*?*x",
    "*[a-z]*[a-z]*[a-z]*[a-z]*[a-z]*x",
    "*{en,n}*{ay,a}*{el,l}*{at,t}*{ten,e}*{io,n}*x",
    "*{depth}*{a,en}*{n,cod}*{o,tp}*x",
    "re:(.*)*!",
    r"re:(\w+\.?)+!",
    r"re:(\w+)+(\w+)+(\w+)+(\w+)+(\w+)+(\w+)+!",
    "type:*L*i*n*e*a*r*x",
]


def test_no_pattern_runs_for_long():
    code = """
import sys, time
import lamina as lm
from lamina.model.parameters import ParamInfo
from lamina.model.patterns import compile_pattern
name = sys.argv[1]
info = ParamInfo(name, (name,), (2, 2), "float32", frozenset({"Linear" * 9}), True)
for text in sys.argv[2:]:
    begin = time.process_time()
    try:
        said = compile_pattern(text).matches(info)
    except lm.PatternError as error:
        said = "refused" if "takes too long" in str(error) else error
    assert said in (False, "refused"), (text, said)
    assert time.process_time() - begin < 3, text
print("done")
"""
    limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (60, 61))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", code, LONG_NAME, *SLOW],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def as_plain_expression(glob):
    """The glob as a plain backtracking expression, written without looking at lamina's."""
    out = ""
    for part in re.findall(r"\{[^}]*\}|\[[^]]*\]|.", glob):
        if part == "{depth}":
            out += r"(?P<depth>\d+)"
        elif part[0] == "{":
            out += "(?:" + part[1:-1].replace(",", "|") + ")"
        else:
            out += {"*": ".*", "?": "."}.get(part, part if part[0] == "[" else re.escape(part))
    wild = set(glob) & set("*?[")
    return re.compile(out if wild else out + r"(?:\..*)?")


def test_globs_match_what_backtracking_matches():
    pieces = ["a", "*", "?", "[ab]", "{a,ab}", "{ab,ba}", "{depth}", "."]
    names = [
        "".join(letters) for n in range(1, 6) for letters in itertools.product("ab1.", repeat=n)
    ]
    seed = np.random.default_rng(0)
    globs = {"".join(seed.choice(pieces, size=seed.integers(1, 8))) for _ in range(400)}
    checked = 0
    for glob in sorted(globs):
        if glob.count("{depth}") > 1:
            continue
        mine, oracle = _compile_glob(glob), as_plain_expression(glob)
        for name in seed.choice(names, size=60):
            got, wanted = mine.fullmatch(name), oracle.fullmatch(name)
            assert (got is None) == (wanted is None), (glob, name)
            if wanted and "depth" in wanted.groupdict():
                assert got["depth"] == wanted["depth"], (glob, name)
            checked += wanted is not None
    assert checked > 500


@pytest.mark.parametrize(
    "expression",
    ["a{i}", "(a){e}", "a{1}", "a{1,}b", "a{,2}b", r"a\{i}", "[a{i}]+", "a{s<=1}b", "a{}"],
)
def test_expressions_mean_what_they_mean_in_python(expression):
    mine = compile_pattern(f"re:{expression}")
    for name in ("a", "b", "aa", "ab", "aab", "ac", "a{i}", "a{e}", "a{s<=1}b", "a{}", "i", "{"):
        assert mine.matches(info(name)) == bool(re.fullmatch(expression, name)), name


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        (r"re:(?P<depth>[a-z]+)\..*", ["'encoder'", r"(?P<depth>\d+)"]),
        (r"re:.*(?P<depth>\d*)", ["''"]),
    ],
)
def test_a_depth_that_is_no_number_is_named(expression, words):
    with pytest.raises(lm.PatternError) as caught:
        compile_pattern(expression).depths(info("encoder.3.weight"))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_depth_that_took_no_part_is_none():
    pattern = compile_pattern(r"re:(encoder\.(?P<depth>\d+)\.)?\w+")
    assert pattern.depths(info("head")) == frozenset()
    assert pattern.depths(info("encoder.3.weight")) == {3}


HEAD = 'optimizer = "AdamW"\nlr = 1e-3\n'
RULE = HEAD + "[[rule]]\nlr = 1e-4\nmatch = "
NESTED = "cosine()"
for _ in range(12):
    NESTED = f"({NESTED})" + " * cosine()" * 99


@pytest.mark.parametrize(
    "text",
    [
        RULE + '"re:a{99999999999}"',
        RULE + '"re:' + "(" * 3000 + ")" * 3000 + '"',
        RULE + '"re:(?u)(?a)x"',
        RULE + '"re:(?L)x"',
        RULE + f'"ndim<{"9" * 5000}"',
        RULE + f'"{"a" * 30_000}"',
        f'optimizer = "AdamW"\nlr = 0x{"f" * 5000}',
        f'optimizer = "AdamW"\nlr = 1{"0" * 5000}',
        HEAD + f"freeze = {'9' * 400}",
        HEAD + f"freeze = [1, {'9' * 400}]",
        HEAD + f"weight_decay = {'9' * 400}",
        HEAD + f"betas = [0.9, {'9' * 400}]",
        HEAD + "self = 1",
        HEAD + "rules = 1",
        HEAD + f'schedule = "{NESTED}"',
        HEAD + f'schedule = "constant({"9" * 5000})"',
        HEAD + ".".join(["a"] * 30_000) + " = 1",
        HEAD + "x = {" + " . ".join(["'a'"] * 30_000) + " = 1}",
        HEAD + "#" * _LARGEST,
        "[" * 5000,
    ],
)
def test_every_text_is_read_or_refused_in_a_short_message(text):
    model = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    with pytest.raises(lm.LaminaError) as caught:
        str(lm.Plan.from_toml(text).preview(model, steps=20))
    assert len(str(caught.value)) <= 2000


def test_a_long_pattern_is_refused_and_several_short_ones_are_taken():
    with pytest.raises(lm.PatternError, match=r"which begins 'aaa.*Write several rules"):
        compile_pattern("a" * 30_000)
    compile_pattern(" | ".join(["a" * 100] * 100))


def test_a_large_plan_file_is_not_read_whole(tmp_path):
    path = tmp_path / "plan.toml"
    with path.open("wb") as file:
        file.truncate(1 << 33)  # sparse: 8 GB that need no disk
    with pytest.raises(lm.PlanError, match="at most"):
        lm.Plan.from_toml(path)
