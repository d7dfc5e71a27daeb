"""The audit: whatever moves a frozen tensor is named, and nothing else is."""

import copy

import pytest
import torch
from torch import nn

import lamina as lm
from lamina.audit import checksums
from lamina.errors import FrozenMovedError
from models import backward, encoder, same, train, weights

RULES = [
    lm.Rule("embeddings", frozen=True),
    lm.Rule("encoder.layer.{depth}.*", thaw=lm.top_down(every=2)),
]


def audited(model, audit=True, **settings):
    plan = lm.Plan("SGD", lr=0.1, momentum=0.9, weight_decay=0.1, rules=RULES, **settings)
    return plan.build(model, audit=audit)


# ----------------------------------------------------------------------------------- the checksums


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_checksum_changes_with_any_element(dtype):
    torch.manual_seed(0)
    tensor = torch.randint(0, 2, (11, 3)).to(dtype)
    (before,) = checksums([tensor])
    assert checksums([tensor.clone()]) == [before]
    flipped = (1 - tensor.to(torch.complex128).real).to(dtype)
    for index in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1)[index] = flipped.view(-1)[index]
        assert checksums([changed]) != [before]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_changes_with_signs_order_and_the_last_bit(dtype):
    torch.manual_seed(0)
    tensor = torch.randn(64, 8).to(dtype)
    tensor[32:] = -tensor[:32]  # as many signs of each kind: plain sums and xor would not see -x
    others = [-tensor, tensor.flip(0), tensor.flip(1), tensor.roll(1, 0), 2 * tensor, 0 * tensor]
    if not dtype.is_complex:
        others.append(torch.nextafter(tensor, torch.full_like(tensor, 9)))
    totals = checksums([tensor, *others])
    assert len(set(totals)) == len(totals)


def test_a_checksum_covers_all_chunks_and_small_tensors():
    tensor = torch.zeros(600_000)
    (zero,) = checksums([tensor])
    seen = {zero}
    for index in (0, 262_143, 262_144, 599_999):
        changed = tensor.clone()
        changed[index] = 1.0
        seen.update(checksums([changed]))
    assert len(seen) == 5
    assert checksums([torch.tensor(1.0), torch.empty(0)])[1] == 0
    assert checksums([torch.eye(3).T, torch.eye(3)])[0] == checksums([torch.eye(3)])[0]
    assert checksums([]) == []


# --------------------------------------------------------------------------------------- training


def test_honest_training_passes_and_is_unchanged():
    plain, watched = encoder(), encoder()
    train(plain, audited(plain, audit=False), 9)
    train(watched, audited(watched), 9)
    assert same(weights(plain), weights(watched))


@pytest.mark.parametrize("change", ["add", "data", "copy", "swap rows"])
def test_what_moves_a_frozen_tensor_is_caught_before_the_next_step(change):
    model = encoder()
    optimizer = audited(model)
    train(model, optimizer, 1)
    weight = model.embeddings.weight
    with torch.no_grad():
        if change == "add":
            weight.add_(1e-12)
        elif change == "data":
            weight.data = weight.data + 1
        elif change == "copy":
            weight.copy_(torch.ones_like(weight))
        else:
            weight.copy_(weight.flip(0))
    before = weights(model)
    backward(model)
    with pytest.raises(FrozenMovedError, match=r"'embeddings.weight' should be.*before step 1"):
        optimizer.step()
    assert optimizer.clock == 1
    assert same(weights(model), before)


def test_many_names_are_counted():
    model = encoder()
    optimizer = audited(model)
    with torch.no_grad():
        for param in model.encoder.layer["0"].parameters():
            param.add_(1.0)
    with pytest.raises(FrozenMovedError, match=r"'encoder\.layer\.0.* and 1 more"):
        optimizer.step()


def test_what_thaws_may_move_and_what_freezes_again_may_not():
    model = encoder()
    optimizer = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("classifier", thaw=1, freeze=3)]).build(
        model, audit=True
    )
    train(model, optimizer, 3)
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    with pytest.raises(FrozenMovedError, match=r"classifier.bias.*before step 3"):
        train(model, optimizer, 1, first=3)


def test_another_optimizer_is_caught():
    model = encoder()
    optimizer = audited(model)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    model.embeddings.weight.grad = torch.ones_like(model.embeddings.weight)
    other.step()
    with pytest.raises(FrozenMovedError, match=r"another optimizer"):
        optimizer.step()


def test_a_kernel_that_moves_frozen_weights_is_caught_during_the_step(monkeypatch):
    from lamina import kernels

    model = encoder()
    optimizer = audited(model)
    backward(model)
    real = kernels.carry_out

    def wrong(work):
        real(work)
        model.embeddings.weight.add_(1.0)

    monkeypatch.setattr(kernels, "carry_out", wrong)
    with pytest.raises(FrozenMovedError, match="moved during step 0"):
        optimizer.step()


def test_statistics_of_held_modules_are_watched():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 2))
    rules = [lm.Rule("0.*", thaw=2)]
    optimizer = lm.Plan("SGD", lr=0.1, rules=rules).build(model.double(), audit=True)
    train(model, optimizer, 1)
    model.train()
    train(model, optimizer, 3)
    assert int(model[0][1].num_batches_tracked) == 2
    optimizer = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("0.*", frozen=True)]).build(model, audit=True)
    model[0][1].train()
    with pytest.raises(FrozenMovedError, match=r"0\.1\.running_mean"):
        train(model, optimizer, 1)


def test_loading_the_optimizer_takes_the_weights_as_they_are():
    model, resumed = encoder(), encoder(seed=1)
    optimizer = audited(model)
    train(model, optimizer, 3)
    again = audited(resumed)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    train(resumed, again, 3, first=3)
    train(model, optimizer, 3, first=3)
    assert same(weights(model), weights(resumed))


def test_copies_go_on_watching():
    model, optimizer = copy.deepcopy((encoder(), None))
    optimizer = audited(model)
    train(model, optimizer, 1)
    model, optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, 1)
    with torch.no_grad():
        model.embeddings.weight.add_(1.0)
    with pytest.raises(FrozenMovedError, match=r"embeddings\.weight"):
        train(model, optimizer, 1)
