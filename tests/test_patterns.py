"""Patterns: what they select, what they capture, and how mistakes in them are told."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lamina as lm
from lamina.model.parameters import walk
from lamina.model.patterns import compile_pattern
from models import Tied, described, encoder
from oracle import select
from plans import PATTERNS


def selected(pattern, model=None):
    found = compile_pattern(pattern)
    return [item.info.name for item in walk(model or encoder((0, 1))) if found.matches(item.info)]


LAYER = [f"encoder.layer.{n}.{p}" for n in (0, 1) for p in ("dense", "norm")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("embeddings", ["embeddings.weight"]),
        ("embeddings.weight", ["embeddings.weight"]),
        ("embed", []),
        ("embed*", ["embeddings.weight"]),
        ("classifier.*", ["classifier.weight", "classifier.bias"]),
        ("classifier", ["classifier.weight", "classifier.bias"]),
        ("*.dense.bias", ["encoder.layer.0.dense.bias", "encoder.layer.1.dense.bias"]),
        ("encoder.layer.{depth}.dense.bias", [f"{LAYER[0]}.bias", f"{LAYER[2]}.bias"]),
        ("encoder.layer.[1-9].norm.bias", ["encoder.layer.1.norm.bias"]),
        ("encoder.layer.[!1].norm.bias", ["encoder.layer.0.norm.bias"]),
        ("encoder.layer.?.norm.bias & !*.1.*", ["encoder.layer.0.norm.bias"]),
        ("{embeddings, classifier}.weight", ["embeddings.weight", "classifier.weight"]),
        ("type:LayerNorm & *.0.*", [f"{LAYER[1]}.weight", f"{LAYER[1]}.bias"]),
        ("type:Linear & ndim<2 & !encoder", ["classifier.bias"]),
        ("type:Mod* & ndim == 2 & !encoder", ["embeddings.weight", "classifier.weight"]),
        ("numel>=9 & !encoder", ["embeddings.weight"]),
        (r"re:.*\.(weight|bias) ", None),
        (r"embeddings | re:cl.*|x", ["embeddings.weight", "classifier.weight", "classifier.bias"]),
        ("!(encoder | classifier)", ["embeddings.weight"]),
        ("!!embeddings", ["embeddings.weight"]),
        ("embeddings & classifier", []),
        (lambda info: info.ndim == 2 and "." in info.name[11:], [f"{LAYER[0]}.weight"]),
    ],
)
def test_what_patterns_select(pattern, expected):
    found = selected(pattern)
    if expected is None:
        assert len(found) == 11
    elif callable(pattern):
        assert set(expected) <= set(found)
    else:
        assert found == expected


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("layers", [(0, 1), (0, 2, 5), (3, 12)])
def test_patterns_mean_what_the_oracle_says(pattern, layers):
    model = encoder(layers)
    compiled = compile_pattern(pattern)
    for item, param in zip(walk(model), described(model), strict=True):
        hit, depth = select(pattern, param)
        assert compiled.matches(item.info) == hit
        if hit:
            assert compiled.depths(item.info) == (frozenset() if depth is None else {depth})


def test_an_atom_holds_if_any_name_of_a_tied_parameter_satisfies_it():
    model = Tied()
    assert selected("encoder", model) == selected("decoder", model) == ["encoder.weight"]
    assert selected("encoder & decoder", model) == ["encoder.weight"]
    assert selected("!decoder", model) == ["middle.weight", "middle.bias"]


def test_regular_expressions_may_capture_the_depth():
    compiled = compile_pattern(r"re:encoder\.layer\.(?P<depth>\d+)\..*")
    infos = [item.info for item in walk(encoder((0, 5))) if compiled.matches(item.info)]
    assert set().union(*map(compiled.depths, infos)) == {0, 5}
    assert compiled.captures == 1


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", ["character 1", "expected a name"]),
        ("a |", ["character 4", "'type:'"]),
        ("(a", ["character 3", "')'"]),
        ("a b", ["character 3", "'|'"]),
        ("a)", ["character 2"]),
        ("re:(", ["regular expression"]),
        ("a.[z-a]", ["the glob 'a.[z-a]'"]),
        ("{depth}.{depth}", ["{depth}", "once"]),
        ("a.{depth} | b.{depth}", ["{depth}", "once"]),
        ("(" * 500 + "a", ["nested too deeply"]),
        ("!" * 5000, ["expected a name"]),
        (3, ["3 is not a pattern", "ParamInfo"]),
        (None, ["None is not a pattern"]),
    ],
)
def test_patterns_that_cannot_be_read(pattern, words):
    with pytest.raises(lm.PatternError) as caught:
        compile_pattern(pattern)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@given(st.text(alphabet="abc.*?[]!{}depth|&():<>=0 ", max_size=30))
def test_any_text_is_a_pattern_or_a_pattern_error(text):
    message, answers = "cannot read the pattern", []
    try:
        compiled = compile_pattern(text)
        answers = [compiled.matches(item.info) for item in walk(encoder((0,)))]
    except lm.PatternError as error:
        message = str(error)
    assert message.startswith("cannot read the pattern")
    assert set(answers) <= {True, False}


def test_layer_numbers_compare_as_numbers():
    model = encoder((2, 10))
    plan = lm.Plan("SGD", lr=1.0, rules=[lm.Rule("encoder.layer.{depth}", lr=lm.by_depth(0.5))])
    values, resolved = plan.preview(model).at(0), plan.preview(model).resolved
    lrs = {name: values[resolved.cells[cell].name]["lr"] for name, cell in resolved.cell_of.items()}
    assert lrs["encoder.layer.10.dense.weight"] == 1.0
    assert lrs["encoder.layer.2.dense.weight"] == 0.5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.nn.Linear(2, 2), "a Linear is not a pattern"),
        (torch.nn.Parameter(torch.ones(2)), "a Parameter is not a pattern"),
        (torch.nn.Linear, "Linear'> is not a pattern"),
    ],
)
def test_a_module_or_a_tensor_is_not_a_pattern(wrong, said):
    with pytest.raises(lm.PatternError, match=said):
        lm.Plan("SGD", lr=0.1, rules=[lm.Rule(wrong, frozen=True)]).build(torch.nn.Linear(2, 2))
