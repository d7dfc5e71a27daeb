"""What a run has lived through goes with the parameters, whatever became of their groups."""

import logging

import pytest
from torch import nn

import lamina as lm
from test_state import through_a_file


def parts(*names):
    return nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in names})


def rates(table):
    return lambda info: table[info.name]


def two(a=0.1, b=0.2, names=("a", "b")):
    """One rule, two groups of one name: which comes first depends on the order of the model."""
    rate = rates({f"{names[0]}.weight": a, f"{names[1]}.weight": b})
    return lm.Plan("SGD", lr=0.5, rules=[lm.Rule(" | ".join(names), lr=rate)])


def state_of(plan, *names, rule=None, **hyper):
    optimizer = plan.build(parts(*names))
    optimizer.override(rule=rule, **hyper)
    return through_a_file(optimizer.state_dict())


def lr_of(optimizer):
    return {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}


def test_an_override_stays_with_its_parameters_in_another_order():
    state = state_of(two(), "a", "b", rule="a", lr=0.7)
    assert len(state["param_groups"]) == 2
    other = two().build(parts("b", "a"))
    other.load_state_dict(state, strict=True)
    assert lr_of(other) == {"b.weight": 0.2, "a.weight": 0.7}
    preview = two().preview(parts("b", "a"), resume=state)
    assert sorted(group["lr"] for group in preview.at(0).values()) == [0.2, 0.7]


def test_an_override_follows_a_renamed_parameter_and_a_renamed_rule():
    state = state_of(two(), "a", "b", rule="a", lr=0.7)
    other = two(names=("c", "d")).build(parts("c", "d"))
    other.load_state_dict(state, strict=True, renamed={"a": "d", "b": "c"})
    assert lr_of(other) == {"c.weight": 0.1, "d.weight": 0.7}


def test_an_override_of_a_group_that_was_split_goes_to_all_its_parts():
    one = lm.Plan("SGD", lr=0.5)
    other = two().build(parts("a", "b"))
    other.load_state_dict(state_of(one, "a", "b", lr=0.7), strict=True)
    assert lr_of(other) == {"a.weight": 0.7, "b.weight": 0.7}


def test_groups_that_were_joined_keep_an_override_only_if_they_agree(caplog):
    one = lm.Plan("SGD", lr=0.5)
    agreeing = state_of(two(), "a", "b", lr=0.7)  # of both groups
    other = one.build(parts("a", "b"))
    other.load_state_dict(agreeing, strict=True)
    assert lr_of(other) == {"a.weight": 0.7, "b.weight": 0.7}
    assert caplog.text == ""
    agreeing["param_groups"][1]["overrides"] = "[]"
    with pytest.raises(lm.StateError, match="override of"):
        other.load_state_dict(agreeing, strict=True)
    assert lr_of(other) == {"a.weight": 0.7, "b.weight": 0.7}
    other.load_state_dict(agreeing)
    assert lr_of(other) == {"a.weight": 0.5, "b.weight": 0.5}
    assert other.last_load.dropped == ("override of 'a | b'",)


def test_what_is_left_out_as_asked_takes_its_override_along(caplog):
    state = state_of(two(), "a", "b", rule="a", lr=0.7)
    other = lm.Plan("SGD", lr=0.5).build(parts("a", "b"))
    other.load_state_dict(state, strict=True, renamed={"a": None})
    assert lr_of(other) == {"a.weight": 0.5, "b.weight": 0.5}
    assert other.last_load.dropped == ("a.weight",)
    assert caplog.text == ""


@pytest.mark.filterwarnings("ignore:nothing-trains")  # which is meant here
def test_one_warning_names_all_that_is_lost(caplog):
    thaw = lm.on_plateau("val_loss", patience=1)
    optimizer = lm.Plan("SGD", lr=0.5, rules=[lm.Rule("a", thaw=thaw)]).build(parts("a", "b"))
    optimizer.override(rule="b", lr=0.7)
    for _ in range(3):
        optimizer.report(val_loss=1.0)
    state = through_a_file(optimizer.state_dict())
    with caplog.at_level(logging.WARNING, logger="lamina"):
        plan = lm.Plan("SGD", lr=0.5, rules=[lm.Rule("a.*", thaw=thaw)])
        with pytest.warns(lm.LaminaWarning, match="not in the model or the plan: b"):
            other = plan.build(parts("a"), resume=state)
    (record,) = caplog.records
    assert "override of 'default'" in record.getMessage()
    assert "thaw of 'a'" in record.getMessage()
    assert "override of 'default'" in other.last_load.dropped
