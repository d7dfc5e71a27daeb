"""Plans as TOML: the same plan both ways, and errors that name the file and the key."""

import numpy as np
import pytest
import torch

import lamina as lm
from test_plan import PLANS, README

TEXT = """
optimizer = "AdamW"
lr = 2e-5
weight_decay = 0.01
schedule = "warmup(6%) >> cosine(to=0.01)"
clip_norm = 1.0
[[rule]]
match = "encoder.layer.{depth}.*"
lr = "by_depth(0.9)"
thaw = "top_down(every=0.4 epochs)"
[[rule]]
match = "embeddings.*"
frozen = true
[[rule]]
match = "classifier.*"
lr = 1e-3
clip_norm = 0.5
[[rule]]
match = "*.bias | type:LayerNorm"
weight_decay = 0
"""


def test_the_plan_of_the_readme_is_the_same_in_both_forms():
    assert lm.Plan.from_toml(TEXT) == README
    assert lm.Plan.from_toml(README.to_toml()) == README
    assert lm.Plan.from_toml(TEXT).to_toml() == README.to_toml()


@pytest.mark.parametrize("plan", PLANS)
def test_round_trip(plan):
    assert lm.Plan.from_toml(plan.to_toml()) == plan


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_a_file_is_read_by_its_path(tmp_path, as_path):
    path = tmp_path / "plan.toml"
    path.write_text(README.to_toml(), encoding="utf-8")
    assert lm.Plan.from_toml(as_path(path)) == README


def test_none_exempts():
    text = 'optimizer = "SGD"\nlr = 1\n[[rule]]\nmatch = "a"\nschedule = "none"\nclip_norm = "none"'
    assert lm.Plan.from_toml(text).rules == (lm.Rule("a", schedule=None, clip_norm=None),)


def test_hard_patterns_and_numbers_survive():
    patterns = ['re:a\\.(b|"c")\'.*', "{a, ü}.* & ! type:Linear", "ndim<2"]
    rules = [lm.Rule(pattern, lr=0.1 + 0.2) for pattern in patterns]
    plan = lm.Plan("SGD", lr=5e-324, weight_decay=1.7e308, rules=rules)
    assert lm.Plan.from_toml(plan.to_toml()) == plan


def test_numpy_numbers_are_written_as_numbers():
    plan = lm.Plan("SGD", lr=np.float64(0.1), schedule=lm.cosine(to=np.float64(0.1)))
    assert lm.Plan.from_toml(plan.to_toml()) == plan
    assert "np." not in repr(plan) + plan.to_toml()


def python_only():
    yield lm.Plan("SGD", lr=lambda info: 1.0), ["plan, lr", "<lambda>"]
    yield lm.Plan("SGD", lr=1, schedule=lambda step: 1.0), ["plan, schedule", "function"]
    nested = lm.warmup(5) >> lm.from_function(lambda step: 1.0) * lm.constant(0.5)
    yield lm.Plan("SGD", lr=1, schedule=nested), ["plan, schedule", "function"]
    yield lm.Plan("SGD", lr=1, rules=[lm.Rule(lambda info: True, lr=2)]), ["pattern", "<lambda>"]
    yield lm.Plan("SGD", lr=1, rules=[lm.Rule("a", lr=lambda info: 1)]), ["rule 'a', lr"]
    yield lm.Plan("Adam", lr=1, betas=(lambda info: 1, 0.9)), ["betas[0]"]
    yield lm.Plan(type("Mine", (lm.SGD,), {}), lr=1), ["register_optimizer('Mine', Mine)"]
    yield lm.Plan(torch.optim.SGD, lr=1), ["register_optimizer('torch_SGD', SGD)"]


@pytest.mark.parametrize(("plan", "words"), list(python_only()))
def test_what_only_python_can_say(plan, words):
    with pytest.raises(lm.PlanError) as caught:
        plan.to_toml()
    assert all(word in str(caught.value) for word in words), str(caught.value)


HEAD = 'optimizer = "SGD"\nlr = 0.1\n'
BAD = [
    ("x: 1\n  y: 2", ["not TOML", "line 1", 'optimizer = "AdamW"']),
    (HEAD + "lr = 0.2", ["not TOML"]),
    (HEAD + "momentum = " + "9" * 5000, ["not TOML"]),
    (HEAD + "momentum = " + "[" * 5000, ["not TOML"]),
    ("lr = 0.1\n", ["'optimizer' is missing"]),
    ('optimiser = "SGD"\nlr = 0.1', ["'optimizer' is missing", "'optimiser'"]),
    ('optimizer = "SDG"\nlr = 0.1', ["'SDG'", "Did you mean 'SGD'?"]),
    ("optimizer = 3\nlr = 0.1", ["optimizer", "int"]),
    (HEAD + "rule = 3", ["'rule'", "[[rule]]"]),
    (HEAD + '[rule]\nmatch = "*"', ["'rule'", "[[rule]]"]),
    (HEAD + '[[rules]]\nmatch = "*"\nlr = 1', ["'rules' is unknown", "[[rule]]"]),
    (HEAD + "[encoder]\nlr = 1", ["[encoder] is a table"]),
    (HEAD + "[[rule]]\nlr = 1", ["rule 1", "'match' is missing"]),
    (HEAD + '[[rule]]\nmach = "*"\nlr = 1', ["rule 1", "'match'", "'mach'"]),
    (HEAD + "[[rule]]\nmatch = 3\nlr = 1", ["rule 1", "'match'"]),
    (HEAD + '[[rule]]\nmatch = "a"\nlr = 1\n[[rule]]\nmatch = "b"', ["rule 2", "sets nothing"]),
    (HEAD + '[[rule]]\nmatch = "a"\nlr = nan', ["rule 1", "lr=nan"]),
    (HEAD + '[[rule]]\nmatch = "a"\nthaw = -1', ["rule 1", "thaw", "-1"]),
    (HEAD + '[[rule]]\nmatch = "a"\nthaw = 0.5', ["rule 1", "thaw", "'50%'"]),
    (HEAD + 'schedule = "cosine(to=-1)"', ["schedule", "to=-1"]),
    (HEAD + "schedule = \"__import__('os')\"", ["schedule", "'__import__' is unknown"]),
    (HEAD + 'schedule = "from_function(1)"', ["schedule", "'from_function' is unknown"]),
    (HEAD + 'schedule = "' + "(" * 5000 + '"', ["schedule", "nested too deeply"]),
    (HEAD + 'momentum = "1e999999"', ["momentum=inf"]),
    (HEAD + "schedule = [1]", ["schedule"]),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_mistakes_name_the_file_and_the_key(text, words, tmp_path):
    path = tmp_path / "mistake.toml"
    path.write_text(text, encoding="utf-8")
    for source, name in [(path, str(path)), (text + "\n", "plan text")]:
        with pytest.raises(lm.PlanError) as caught:
            lm.Plan.from_toml(source)
        message = str(caught.value)
        assert message.startswith(name), message
        assert all(word in message for word in words), message
        assert "\n" not in message


@pytest.mark.parametrize("name", ["nowhere.toml", "", "."])
def test_a_file_that_is_not_there(name, tmp_path):
    with pytest.raises(lm.PlanError, match="plan file"):
        lm.Plan.from_toml(tmp_path / name)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(lm.PlanError, match=r"plan\.toml"):
        lm.Plan.from_toml(path)
