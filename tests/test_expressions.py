"""Expressions in plans: printed as Python, written as text, read back, and never evaluated."""

import builtins
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lamina as lm
from lamina._util.grammar import parse, to_source
from lamina.plan.validate import NAMES
from plans import schedules, to_schedule


def read(text):
    return parse(text, NAMES, "here")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("2e-5", 2e-5),
        (".5", 0.5),
        ("0.4 epochs", "0.4 epochs"),
        ("10%", "10%"),
        ("'a word'", "a word"),
        ("[1, 2.5,]", (1, 2.5)),
        ("[]", ()),
        ("true", True),
        ("none", None),
        ("x0.1", lm.times(0.1)),
        ("by_depth(0.9)", lm.by_depth(0.9)),
        ("by_depth( rate = 0.9 )", lm.by_depth(0.9)),
        ("top_down(every=0.4 epochs)", lm.top_down("0.4 epochs")),
        ("warmup(6%) >> cosine(to=0.01)", lm.warmup("6%") >> lm.cosine(to=0.01)),
        ("warmup(5)*constant(0.5)", lm.warmup(5) * lm.constant(0.5)),
        ("times(cosine(to=0.5))", lm.times(lm.cosine(to=0.5))),
        ("(warmup(5))", lm.warmup(5)),
    ],
)
def test_what_the_grammar_reads(text, value):
    assert read(text) == value
    assert type(read(text)) is type(value)


def test_product_binds_closer_than_sequence():
    one, two, three = lm.warmup(5), lm.constant(0.5, 5), lm.cosine(to=0.1)
    assert read("warmup(5) >> constant(0.5, 5) * cosine(to=0.1)") == one >> two * three
    assert read("(warmup(5) >> constant(0.5, 5)) * cosine(to=0.1)") == (one >> two) * three


@given(st.one_of(schedules(), schedules(value=True)))
def test_schedules_print_as_their_constructor_and_read_back(tree):
    schedule = to_schedule(tree)
    assert eval(repr(schedule), vars(lm).copy()) == schedule
    assert read(to_source(schedule, quote=False)) == schedule


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["character 1", "expected a number"]),
        ("cosine(to=0.1", ["'cosine(to=0.1'", "character 14", "')'"]),
        ("cosine(to=0.1))", ["character 15", "end of the expression"]),
        ("cosin(to=0.1)", ["'cosin' is unknown", "Did you mean 'cosine'?"]),
        ("cosine(too=0.1)", ["does not take these arguments", "'too'"]),
        ("cosine(to=1, to=2)", ["'to' is given twice"]),
        ("cosine(1, 1, 1, 1)", ["does not take these arguments"]),
        ("cosine", ["is not a value", "cosine()"]),
        ("warmup", ["is not a value", "warmup(...)"]),
        ("warmup(5) >> 3", ["'>>' joins two schedules"]),
        ("3 * warmup(5)", ["'*' joins two schedules"]),
        ("times(0.1) * times(0.2)", ["'*' joins two schedules"]),
        ("x'a'", ["not a value"]),
        ("5 days", ["character 2"]),
        ("[1, 2", ["']'"]),
        ("warmup(5) + 3", ["character 10"]),
    ],
)
def test_mistakes_name_the_place(text, words):
    with pytest.raises(lm.PlanError) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith("here: ")
    assert all(word in message for word in words), message


HOSTILE = [
    "__import__('os').system('touch here')",
    "().__class__.__base__.__subclasses__()",
    "lambda: 1",
    "eval('1')",
    "cosine.__init__(1)",
    "from_function(print)",
    "apply(print)",
    'exec("x = 1")',
    "{'a': 1}",
    "f'{1}'",
    "cosine(to=open('here'))",
    "warmup(5) if 1 else 2",
    "1 ** 99999999",
    "\\x00",
    "(" * 10_000,
    "[" * 10_000,
    "cosine(" * 10_000,
    "x" * 10_000 + "1",
    "x" + "9" * 5_000,
    "9" * 5_000,
    "9" * 5_000 + " epochs",
    " >> ".join(["warmup(1)"] * 10_000),
    " * ".join(["constant(0.5)"] * 10_000),
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:20])
def test_hostile_text_is_an_error_and_never_runs(text, monkeypatch):
    def refuse(*args, **kwargs):
        ran.append(args)

    ran, caught = [], None
    with monkeypatch.context() as patch:
        for name in ("eval", "exec", "open"):
            patch.setattr(builtins, name, refuse)
        patch.setattr(os, "system", refuse)
        try:
            read(text)
        except lm.PlanError as error:
            caught = error
    assert caught is not None
    assert len(str(caught)) < 500
    assert ran == []


@given(st.text(alphabet="x09.%[](),=>*'\" abcosinewrmup_", max_size=40))
def test_any_text_is_a_value_or_a_plan_error(text):
    message = "here: a value"
    try:
        read(text)
    except lm.PlanError as error:
        message = str(error)
    assert message.startswith("here: ")


@pytest.mark.parametrize(
    ("value", "quoted", "plain"),
    [
        ("10%", "'10%'", "10%"),
        ("a b", "'a b'", '"a b"'),
        (None, "None", "none"),
        (True, "True", "true"),
        (1e-5, "1e-05", "1e-05"),
        ((1, "2 epochs"), "[1, '2 epochs']", "[1, 2 epochs]"),
        (lm.warmup("6%", 0.1), "warmup('6%', 0.1)", "warmup(6%, 0.1)"),
        (lm.top_down(5, start=0), "top_down(5, 0)", "top_down(5, 0)"),
        (lm.cosine(to=0.5, length=3), "cosine(to=0.5, length=3)", "cosine(to=0.5, length=3)"),
    ],
)
def test_spelling(value, quoted, plain):
    assert to_source(value) == quoted
    assert to_source(value, quote=False) == plain
