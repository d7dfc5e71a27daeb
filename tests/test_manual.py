"""Freezing and thawing by hand; the table of what trains."""

import copy

import pytest
import torch
from torch import nn

import lamina as lm
from lamina.errors import PatternError, PlanError
from lamina.model.freeze import freeze, thaw, trainable
from models import Tied, Wrapper, backward, encoder, mlp, same, train, weights
from processes import end_group


class Net(nn.Module):
    """Two blocks with BatchNorm and dropout, and a head."""

    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(*[self.block() for _ in range(2)])
        self.head = nn.Linear(3, 2)

    @staticmethod
    def block():
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

    def forward(self, x):
        return self.head(self.cnn(x))


def net():
    torch.manual_seed(0)
    return Net()


def on(model):
    return {name for name, param in model.named_parameters() if param.requires_grad}


# -------------------------------------------------------------------------------- freeze and thaw


def test_freeze_by_pattern_and_thaw_again():
    model = encoder()
    frozen = freeze(model, "embeddings | encoder.layer.{0,1}.*")
    assert set(frozen) == {n for n, _ in model.named_parameters()} - on(model)
    assert len(frozen) == 9
    assert freeze(model, "embeddings") == ()
    assert thaw(model, "encoder.layer.1.*") == tuple(n for n in frozen if ".1." in n)
    assert set(thaw(model)) == set(frozen) - {n for n in frozen if ".1." in n}
    assert len(on(model)) == len(list(model.parameters()))


def test_a_list_holds_exact_names_of_parameters_and_modules():
    model = encoder()
    assert freeze(model, ["classifier", "embeddings.weight"]) == (
        "embeddings.weight",
        "classifier.weight",
        "classifier.bias",
    )
    assert freeze(model, lambda info: info.ndim == 1 and "norm" in info.name)[0].endswith("weight")


@pytest.mark.parametrize(
    ("match", "message"),
    [
        ("clasifier.*", "closest parameter names are: classifier"),
        (["classifier", "clasifier.bias"], "'clasifier.bias'.*Did you mean 'classifier.bias'"),
        (["encoder.*"], "a list holds exact names; write a pattern as a plain string"),
        (lambda info: False, "matches none of the 15 parameters"),
    ],
)
def test_what_does_not_exist_is_refused_and_nothing_changed(match, message):
    model = encoder()
    for call in (freeze, thaw):
        with pytest.raises(PatternError, match=message):
            call(model, match)
    assert len(on(model)) == 15


@pytest.mark.parametrize(
    ("match", "message"),
    [
        (lambda m: m.cnn, r"given a Sequential; expected a pattern.*this one is 'cnn' in the"),
        (lambda m: m, r"given a Net; .*for the whole model, write '\*'"),
        (lambda m: nn.Linear(2, 2), r"given a Linear; expected .* of parameters or modules\.$"),
        (lambda m: [m.cnn[0]], r"given a list with a Sequential; .*'cnn\.0' in the model"),
        (lambda m: list(m.head.parameters()), r"given a list with a Parameter; .*'head\.weight'"),
        (lambda m: m.head.bias, r"given a Parameter; .*this one is 'head\.bias'"),
        (lambda m: nn.Linear, r"given <class .*Linear'>; expected a pattern"),
        (lambda m: ["cnn", 3], r"given a list with 3; expected"),
        (lambda m: 5, r"given 5; expected a pattern such as 'cnn\.\*', or a list of exact names"),
        (lambda m: None, "given None; expected"),
    ],
)
def test_what_is_no_selection_is_refused_and_named(match, message):
    model = net()
    for call in (freeze, thaw):
        with pytest.raises(PatternError, match=f"^{call.__name__} was {message}"):
            call(model, match(model))
    assert len(on(model)) == len(list(model.parameters()))


def test_names_may_come_in_any_collection():
    for match in (["cnn"], ("cnn",), {"cnn"}, (name for name in ["cnn"]), {"cnn": 1}):
        assert len(freeze(net(), match)) == 8


def test_a_left_over_gradient_does_not_move_what_was_frozen():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    backward(model)
    freeze(model, "body")
    before = weights(model)
    optimizer.step()
    after = weights(model)
    assert torch.equal(before["body.weight"], after["body.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_frozen_batch_norm_and_dropout_rest_through_train():
    model = net()
    freeze(model, "cnn.0.*")
    model.train()
    x = torch.randn(8, 3)
    before = copy.deepcopy(dict(model.named_buffers()))
    assert torch.equal(model.cnn[0](x), model.cnn[0](x))
    model(x)
    changed = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert {n.rsplit(".", 1)[0] for n in changed} == {"cnn.1.1"}
    assert model.cnn[1].training


def test_hold_can_be_switched_off():
    model = net()
    freeze(model, "cnn", hold=False)
    assert model.train().cnn[0][1].training


def test_thawing_a_part_lets_go_of_it_alone():
    model = net()
    freeze(model, "cnn")
    model.train()
    assert not model.cnn.training
    thaw(model, "cnn.1.*")
    assert model.cnn[1].training
    assert not any(part.training for part in model.cnn[0].modules())
    model.eval()
    thaw(model, "*")
    assert not any(part.training for part in model.modules())
    model.train()
    assert all(part.training for part in model.modules())


def test_freezing_the_rest_holds_the_whole_and_all_comes_back():
    model = net()
    freeze(model, "cnn.0.*")
    freeze(model)
    assert not any(part.training for part in model.train().modules())
    thaw(model)
    assert all(part.training for part in model.modules())


def test_a_wrapped_model_is_refused():
    class DistributedDataParallel(Wrapper):
        pass

    with pytest.raises(PlanError, match="freeze: the model is already wrapped in Distr"):
        freeze(DistributedDataParallel(mlp()), "body")


def test_a_plan_takes_what_was_frozen_by_hand_for_frozen():
    model = mlp()
    freeze(model, "body")
    with pytest.warns(lm.LaminaWarning, match="frozen-by-model"):
        optimizer = lm.Plan("SGD", lr=0.1).build(model)
    before = weights(model)
    train(model, optimizer, 2)
    assert torch.equal(before["body.weight"], weights(model)["body.weight"])
    assert [finding.code for finding in optimizer.findings] == ["frozen-by-model"]


@pytest.mark.parametrize("rule", [{"thaw": 2}, {"frozen": False}])
def test_what_was_frozen_by_hand_is_thawed_by_a_plan_before_ddp_wraps_it(rule, tmp_path):
    model = mlp()
    freeze(model, "body")
    meet = f"file://{tmp_path / 'meet'}"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    try:
        plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("body", **rule)])
        optimizer = plan.build(model, steps=9)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        before = weights(model)
        train(wrapped, optimizer, 2)
        assert torch.equal(before["body.weight"], model.body.weight) is ("thaw" in rule)
        train(wrapped, optimizer, 1, first=2)
        assert not torch.equal(before["body.weight"], model.body.weight)
    finally:
        end_group()


def test_by_hand_overrides_the_mark_of_a_plan():
    model = mlp()
    rules = [lm.Rule("body", frozen=True)]
    lm.Plan("SGD", lr=0.1, rules=rules).build(model)
    freeze(model, "body")
    with pytest.warns(lm.LaminaWarning, match="frozen-by-model"):
        lm.Plan("SGD", lr=0.1).build(model)
    thaw(model, "body")
    assert len(on(model)) == 4
    assert lm.Plan("SGD", lr=0.1).build(model).findings == ()


def test_freezing_survives_copies():
    model = net()
    freeze(model, "cnn")
    twin = copy.deepcopy(model).train()
    assert not twin.cnn.training
    assert on(twin) == on(model)
    assert same(weights(twin), weights(model))


# -------------------------------------------------------------------------------------- the table


def test_the_table_says_why():
    model = mlp()
    lm.Plan("SGD", lr=0.1, rules=[lm.Rule("head.bias", frozen=True)]).build(model)
    freeze(model, "body.weight")
    table = trainable(model)
    assert [(row.name, row.trainable, row.why) for row in table] == [
        ("body.weight", False, "frozen by hand"),
        ("body.bias", True, ""),
        ("head.weight", True, ""),
        ("head.bias", False, "frozen by a plan"),
    ]
    assert table.numel == (12, 26)
    assert str(table) == (
        "parameter    shape  trains  why\n"
        "body.weight  4 x 3  no      frozen by hand\n"
        "body.bias    4      yes\n"
        "head.weight  2 x 4  yes\n"
        "head.bias    2      no      frozen by a plan\n"
        "12 of 26 numbers train (46.2%)"
    )


def test_a_tied_parameter_is_one_row_with_all_names():
    table = trainable(Tied())
    assert len(table) == 3
    assert table.rows[0].names == ("encoder.weight", "decoder.weight")
    assert "encoder.weight (= decoder.weight)" in str(table)


def test_requires_grad_set_on_a_module_is_noted():
    model = mlp()
    model.body.requires_grad = False
    assert on(model) == {n for n, _ in model.named_parameters()}
    (note,) = trainable(model).notes
    assert "'body' has an attribute requires_grad=False, which does nothing" in note
    assert note in str(trainable(model))
    freeze(model, "body")
    assert trainable(model).notes == ()
    model.requires_grad = True
    assert "the model has an attribute requires_grad=True" in trainable(model).notes[0]
    assert "lamina.thaw(model, '*')" in trainable(model).notes[0]
