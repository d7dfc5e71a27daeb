"""What comes apart after a plan was built, and what a model's own settings do to a plan."""

import copy
import functools

import pytest
import torch
from torch import nn

import lamina as lm
from lamina.model.freeze import freeze
from lamina.model.ties import tie, ties
from models import Tied, backward, encoder, mlp, train


def codes(findings):
    return [finding.code for finding in findings]


def plan(**settings):
    return lm.Plan("SGD", lr=0.1, **settings)


def test_an_intact_model_has_no_findings():
    model = encoder()
    optimizer = plan(rules=[lm.Rule("embeddings", frozen=True)]).build(model)
    train(model, optimizer, 3)
    assert optimizer.check(model, after=1) == ()


def test_a_replaced_parameter_is_named():
    model = mlp()
    optimizer = plan().build(model)
    train(model, optimizer, 2)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    (finding,) = optimizer.check(model)
    assert finding.code == "parameter-replaced"
    assert "head.weight was replaced after the optimizer was built" in finding.message
    assert "Build the optimizer from the plan again" in finding.fix


def test_loading_by_assignment_is_a_replacement():
    model = mlp()
    optimizer = plan().build(model)
    saved = copy.deepcopy(model.body.state_dict())
    model.body.load_state_dict(saved, assign=True)
    (finding,) = optimizer.check(model)
    assert finding.code == "parameter-replaced"
    assert "body.weight, body.bias" in finding.message


def test_removed_and_added_parameters_are_named():
    model = mlp()
    optimizer = plan().build(model)
    model.head.bias = None
    model.extra = nn.Linear(2, 2)
    found = {finding.code: finding.message for finding in optimizer.check(model)}
    assert set(found) == {"parameter-removed", "parameter-added"}
    assert "head.bias" in found["parameter-removed"]
    assert "extra.weight, extra.bias" in found["parameter-added"]


def test_another_model_is_said_once():
    model = mlp()
    optimizer = plan().build(model)
    assert codes(optimizer.check(copy.deepcopy(model))) == ["another-model"]


def test_moves_between_dtypes_keep_the_parameters():
    model = encoder()
    optimizer = plan().build(model)
    model.to(torch.float32).to(torch.float64).cpu()
    assert optimizer.check(model) == ()


def test_a_broken_tie_is_named_with_the_call_that_ties_again():
    model = Tied()
    optimizer = plan().build(model)
    model.decoder = copy.deepcopy(model.decoder)
    (finding,) = optimizer.check(model)
    assert finding.code == "tie-broken"
    assert "encoder.weight and decoder.weight" in finding.message
    assert "lamina.tie(model, {'decoder.weight': 'encoder.weight'})" in finding.fix
    tie(model, {"decoder.weight": "encoder.weight"})
    assert optimizer.check(model) == ()


def test_a_tie_broken_by_assigning_a_saved_state():
    model = Tied()
    optimizer = plan().build(model)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(saved, assign=True)
    assert codes(optimizer.check(model)) == ["another-model"]
    assert ties(model) == ()


def test_a_tie_made_after_the_optimizer_is_told():
    model = encoder()
    optimizer = plan().build(model)
    tie(model, {"encoder.layer.1.dense.weight": "encoder.layer.0.dense.weight"})
    (finding,) = optimizer.check(model)
    assert finding.code == "tied-after-build"
    assert "encoder.layer.0.dense.weight = encoder.layer.1.dense.weight" in finding.message


def test_memory_shared_since_is_told():
    model = mlp()
    optimizer = plan().build(model)
    model.body.weight.data = model.head.weight.data.new_zeros(4, 3)
    model.head.weight.data = model.body.weight.data.flatten()[:8].view(2, 4)
    (finding,) = optimizer.check(model)
    assert finding.code == "shared-memory"
    assert "'body.weight' and 'head.weight'" in finding.message


class Forgetful(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


#: torch's SGD has no state at all without momentum, its Adam none before the first gradient
GUESTS = [torch.optim.Adagrad, torch.optim.Adam, torch.optim.SGD]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", *GUESTS])
def test_a_parameter_without_gradient_is_named_after_some_steps(optimizer):
    model = Forgetful()
    optimizer = lm.Plan(optimizer, lr=0.1).build(model)
    train(model, optimizer, 4)
    assert optimizer.check(model, after=5) == ()
    train(model, optimizer, 1)
    (finding,) = optimizer.check(model, after=5)
    assert finding.code == "no-gradient"
    assert "unused.weight, unused.bias" in finding.message


def closure_steps(model, optimizer, steps):
    def closure():
        optimizer.zero_grad()
        return backward(model)

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("optimizer", ["LBFGS", torch.optim.SGD])
def test_who_gets_gradients_is_no_finding_whoever_counts(optimizer):
    model = mlp()
    optimizer = lm.Plan(optimizer, lr=0.1).build(model)
    closure_steps(model, optimizer, 3)
    assert optimizer.check(model, after=1) == ()


def test_lbfgs_tells_of_a_parameter_without_gradient():
    model = Forgetful()
    optimizer = lm.Plan("LBFGS", lr=0.1).build(model)
    closure_steps(model, optimizer, 3)
    (finding,) = optimizer.check(model, after=3)
    assert finding.message.startswith("unused.weight, unused.bias never received")


def test_after_a_load_a_guest_is_judged_by_what_was_seen_since():
    model = Forgetful()
    optimizer = lm.Plan(torch.optim.SGD, lr=0.1).build(model)
    train(model, optimizer, 4)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.check(model, after=1) == ()
    train(model, optimizer, 2)
    (finding,) = optimizer.check(model, after=2)
    assert "unused.weight, unused.bias" in finding.message


def test_a_count_that_was_dropped_is_no_missing_gradient():
    model = mlp()
    rules = [lm.Rule("body", freeze=[3, 6], thaw=4, frozen_state="drop")]
    optimizer = plan(rules=rules).build(model)
    for _ in range(8):
        train(model, optimizer, 1)
        assert optimizer.check(model, after=1) == ()
    silent = plan(rules=[lm.Rule("unused", freeze=3, thaw=5, frozen_state="drop")])
    forgetful = Forgetful()
    optimizer = silent.build(forgetful)
    train(forgetful, optimizer, 7)
    (finding,) = optimizer.check(forgetful, after=2)
    assert "unused.weight" in finding.message


def test_frozen_time_does_not_count_as_without_gradient():
    model = encoder()
    rules = [lm.Rule("embeddings", thaw=4), lm.Rule("classifier", freeze=2)]
    optimizer = plan(rules=rules).build(model)
    train(model, optimizer, 4)
    assert optimizer.check(model, after=3) == ()


def test_state_that_began_anew_at_a_load_is_excused():
    model, optimizer = Forgetful(), None
    optimizer = plan().build(model)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["clock"] = 50
    saved["state"] = {k: v for k, v in saved["state"].items() if k < 2}
    with pytest.warns(lm.LaminaWarning, match="not in the state: unused.weight, unused.bias"):
        optimizer.load_state_dict(saved)
    assert set(optimizer.last_load.new) == {"unused.weight", "unused.bias"}
    (finding,) = optimizer.check(model)
    assert "used.weight, used.bias" in finding.message
    assert "unused" not in finding.message


def test_frozen_by_hand_under_a_plan_is_told():
    model = mlp()
    optimizer = plan(rules=[lm.Rule("body", thaw=2)]).build(model)
    freeze(model, "*")
    (finding,) = optimizer.check(model)
    assert finding.code == "requires-grad-off"
    assert "head.weight, head.bias should train now" in finding.message


# ---------------------------------------------------------------- what the model's settings mean


STAGES = lm.Rule("encoder.layer.{depth}.*", thaw=lm.top_down(every=1))


def test_more_stages_than_dynamo_compiles_is_found_only_when_compiled():
    def found(model):
        resolved = lm.resolve_plan(plan(rules=[STAGES]), model)
        return [f for f in resolved.findings if f.code == "recompile-limit"]

    assert found(encoder(range(12))) == []
    compiled = torch.compile(encoder(range(12)), backend="eager")
    (finding,) = found(compiled)
    assert "13 stages" in finding.message
    assert "recompile_limit" in finding.fix
    assert found(torch.compile(encoder(range(7)), backend="eager")) == []
    part = encoder(range(12))
    part.encoder.layer["0"].compile(backend="eager")
    assert len(found(part)) == 1


def test_stages_of_a_model_compiled_later_are_checked_live():
    model = encoder(range(12))
    optimizer = plan(rules=[STAGES]).build(model)
    assert optimizer.check(model) == ()
    assert codes(optimizer.check(torch.compile(model, backend="eager"))) == ["recompile-limit"]


def checkpointed(reentrant):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        checkpoint_wrapper,
    )

    model = encoder()
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    for number, block in list(model.encoder.layer.items()):
        model.encoder.layer[number] = checkpoint_wrapper(block, checkpoint_impl=kind)
    return model


FROZEN = lm.Rule("embeddings", frozen=True)


def test_reentrant_checkpointing_behind_a_frozen_prefix_is_found_and_is_true():
    model = checkpointed(reentrant=True)
    resolved = lm.resolve_plan(plan(rules=[FROZEN]), model)
    (finding,) = resolved.findings
    assert finding.code == "reentrant-behind-frozen"
    assert "encoder.layer.0 is under reentrant" in finding.message
    freeze(model, "embeddings")
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        model(torch.randn(2, 3, dtype=torch.float64)).sum().backward()
    assert model.encoder.layer["0"]._checkpoint_wrapped_module.dense.weight.grad is None


@pytest.mark.parametrize(
    ("reentrant", "rules"),
    [(False, [FROZEN]), (True, []), (True, [lm.Rule("embeddings | encoder", frozen=True)])],
)
def test_checkpointing_that_is_fine_is_not_found(reentrant, rules):
    model = checkpointed(reentrant)
    assert lm.resolve_plan(plan(rules=rules), model).findings == ()


def test_reentrant_with_gradual_thawing_says_from_when():
    rules = [FROZEN, lm.Rule("encoder.layer.{depth}.*", thaw=lm.top_down(every=5))]
    (finding,) = lm.resolve_plan(plan(rules=rules), checkpointed(True)).findings
    assert "from step 5 on" in finding.message
    assert "encoder.layer.0, encoder.layer.1, encoder.layer.2" in finding.message


def test_reentrant_behind_what_freezes_later_is_found():
    rules = [lm.Rule("embeddings", freeze=5)]
    (finding,) = lm.resolve_plan(plan(rules=rules), checkpointed(True)).findings
    assert "encoder.layer.0 is under reentrant" in finding.message
    assert "from step 5 on" in finding.message


def test_reentrant_checkpointing_of_transformers_is_found():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    from torch.utils.checkpoint import checkpoint

    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=True)
    found = lm.resolve_plan(plan(rules=[FROZEN]), model).findings
    assert codes(found) == ["reentrant-behind-frozen"]
    assert "encoder.layer.0" in found[0].message
    model.enable_input_require_grads()
    assert lm.resolve_plan(plan(rules=[FROZEN]), model).findings == ()


def test_requires_grad_set_on_a_module_is_found():
    model = mlp()
    model.body.requires_grad = False
    (finding,) = lm.resolve_plan(plan(), model).findings
    assert finding.code == "module-requires-grad"
    assert "'body' has an attribute requires_grad=False" in finding.message
    assert "lamina.freeze(model, 'body')" in finding.fix
    freeze(model, "body")
    assert codes(lm.resolve_plan(plan(), model).findings) == ["frozen-by-model"]


@pytest.mark.parametrize(
    "name", ["require_grad", "requires_grads", "requires_gradient", "requires_grad_", "requireGrad"]
)
def test_a_misspelt_flag_is_found_on_parameters_and_modules(name):
    model = mlp()
    setattr(model.body, name, False)
    (finding,) = lm.resolve_plan(plan(), model).findings
    assert finding.code == "requires-grad-misspelt"
    assert f"body has an attribute {name!r}" in finding.message
    model = mlp()
    for param in model.body.parameters():
        setattr(param, name, False)
    (finding,) = lm.resolve_plan(plan(), model).findings
    assert "body.weight, body.bias have an attribute" in finding.message
    for param in model.body.parameters():
        setattr(param, name, True)  # as it is: no harm
    assert lm.resolve_plan(plan(), model).findings == ()


@pytest.mark.parametrize("name", ["requires_grad_sync", "grad", "_require_grads_hook", "required"])
def test_other_names_are_not_taken_for_the_flag(name):
    model = mlp()
    setattr(model, name, False)
    assert lm.resolve_plan(plan(), model).findings == ()


@pytest.mark.parametrize(
    "kept",
    [
        lambda layer: [layer],
        lambda layer: (layer,),
        lambda layer: {layer},
        lambda layer: {"first": [layer]},
        lambda layer: [layer.weight, layer.bias],
    ],
)
def test_layers_in_a_plain_container_are_found(kept):
    model, layer = mlp(), nn.Linear(2, 2)
    model.body.more = kept(layer)
    (finding,) = lm.resolve_plan(plan(), model).findings
    assert finding.code == "not-registered"
    assert "'body.more' holds 2 trainable parameters" in finding.message
    optimizer = torch.optim.SGD([*model.parameters(), *layer.parameters()], lr=0.1)
    assert "not-registered" not in codes(lm.check(model, optimizer))
    layer.requires_grad_(False)  # a teacher, say
    assert lm.resolve_plan(plan(), model).findings == ()


def test_containers_of_what_the_model_knows_are_not_found():
    model = mlp()
    model.order = [model.body, {"weight": model.body.weight}]
    model.words = [str(number) for number in range(5000)]
    model.itself = [model]
    assert lm.resolve_plan(plan(), model).findings == ()


def test_what_waits_for_a_metric_is_not_missing_gradients():
    model = encoder()
    rules = [lm.Rule("embeddings", thaw=lm.on_plateau("val_loss", patience=1))]
    optimizer = plan(rules=rules).build(model)
    train(model, optimizer, 3)
    assert optimizer.check(model, after=1) == ()
    for _ in range(3):
        optimizer.report(val_loss=1.0)
    train(model, optimizer, 3, first=3)
    assert float(optimizer.state[model.embeddings.weight]["step"]) > 0
    assert optimizer.check(model, after=1) == ()
