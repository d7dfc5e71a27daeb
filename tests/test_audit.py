"""The audit: whatever moves a frozen tensor is named, and nothing else is."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lamina as lm
from lamina.errors import FrozenMovedError
from lamina.runtime.audit import checksums
from models import Tied, Wrapper, backward, encoder, same, train, weights

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


WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: small changes of neighbouring words that cancel in sums with evenly growing weights
PATTERNS = [(1, -1), (1, -2, 1), (1, -3, 3, -1), (1, -4, 6, -4, 1), (1, -1, -1, 1), (2, -3, 0, 1)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_a_checksum_changes_with_structured_changes(dtype):
    torch.manual_seed(0)
    tensor = torch.randint(-50, 50, (600,)).to(dtype)
    plain = torch.view_as_real(tensor).reshape(-1) if dtype.is_complex else tensor
    size = plain.element_size()
    changed = []
    for unit in {WORDS[size], *([torch.int32] if size == 8 else [])}:
        for pattern in PATTERNS:
            for stride in (1, 2, 4, 64):
                words = plain.clone().view(unit)
                for index, step in enumerate(pattern):
                    words[3 + index * stride] += step
                changed.append(words)
    for first, second in ((0, 1), (5, 9), (0, 511), (100, 357)):
        swapped = torch.arange(plain.numel(), dtype=WORDS[size])
        swapped[[first, second]] = swapped[[second, first]]
        changed.append(swapped)
    changed.append(torch.arange(plain.numel(), dtype=WORDS[size]))
    totals = checksums([plain, *changed])
    different = {words.view(torch.int8).numpy().tobytes() for words in changed}
    assert len(set(totals)) == len(different) + 1 == len(changed) + 1


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.int64, torch.float8_e5m2])
def test_a_checksum_changes_with_small_random_changes(dtype):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.zeros(50_000, dtype=dtype).view(torch.int8)
    changed, seen = [], set()
    for _ in range(300):
        other = tensor.clone()
        places = torch.randint(len(tensor), (4,), generator=generator)
        other[places] += torch.randint(-2, 3, (4,), generator=generator).to(torch.int8)
        changed.append(other.view(dtype))
        seen.add(other.numpy().tobytes())
    assert len(set(checksums(changed))) == len(seen) > 290


def test_weights_are_those_of_splitmix64():
    from lamina.runtime.audit import _weights

    def mixed(index):
        z = (index * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return (z ^ (z >> 31)) | 1

    got = _weights(torch.device("cpu"))
    assert [int(x) % 2**64 for x in got[:500]] == [mixed(i) for i in range(1, 501)]
    assert len(got.unique()) == len(got)


def test_conjugates_are_summed_as_what_they_are():
    tensor = torch.tensor([1 + 2j, 3 - 1j])
    one, other, plain = checksums([tensor.conj(), tensor.conj().resolve_conj(), tensor])
    assert one == other != plain


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


def normed():
    """A frozen part with BatchNorm under audit; one step is taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 2))
    rules = [lm.Rule("0.*", frozen=True)]
    optimizer = lm.Plan("SGD", lr=0.1, rules=rules).build(model.double(), audit=True)
    train(model, optimizer, 1)
    return model, optimizer


def other_weight(model):
    model[0][0].weight = nn.Parameter(torch.zeros_like(model[0][0].weight))


def other_shape(model):
    model[0][0].weight.data = torch.zeros(3, 4).double()


def other_dtype(model):
    model.float()
    model[1].double()


def other_module(model):
    model[0] = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()


def assigned(model):
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)


def other_buffer(model):
    model[0][1].running_mean = model[0][1].running_mean + 5


BUFFER = r"'0\.1\.running_mean' is a buffer of the module '0\.1'.*hold=False"
REPLACED = {
    other_weight: r"'0\.0\.weight' should be.*before step 1: '0\.0\.weight' was replaced",
    other_shape: r"has shape \(3, 4\) instead of \(3, 3\)",
    other_dtype: r"is torch.float32 instead of torch.float64.*converted on purpose",
    other_module: r"'0\.0\.weight', '0\.0\.bias' should be.*was replaced",
    assigned: rf"'0\.0\.weight', .* and 1 more should be.*was replaced.*{BUFFER}",
    other_buffer: rf"'0\.1\.running_mean' should rest, but moved before step 1: {BUFFER}",
}


@pytest.mark.parametrize("change", REPLACED)
def test_what_stands_in_the_place_of_a_frozen_tensor_is_compared(change):
    model, optimizer = normed()
    change(model)
    with pytest.raises(FrozenMovedError, match=REPLACED[change]):
        optimizer.step()
    assert optimizer.clock == 1


@pytest.mark.parametrize("place", ["encoder", "decoder"])
def test_each_place_of_a_tied_weight_is_watched(place):
    model = Tied()
    optimizer = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("encoder", frozen=True)]).build(
        model, audit=True
    )
    getattr(model, place).weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(FrozenMovedError, match=rf"'{place}\.weight' should be frozen"):
        optimizer.step()


def same_objects(model):
    for module in model.modules():
        for key, param in list(module._parameters.items()):
            if param is not None:
                module._parameters[key] = nn.Parameter(param.detach().clone(), param.requires_grad)
        for key, buffer in list(module._buffers.items()):
            module._buffers[key] = buffer.clone()


FAIR = {
    "the same numbers": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "assigned": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "to": lambda model: model.to("cpu", torch.float64),
    "other objects": same_objects,
    "compile": lambda model: model.__setitem__(0, torch.compile(model[0], backend="eager")),
    "a wrapped part": lambda model: model.__setitem__(0, Wrapper(model[0])),
    "eval": lambda model: model.eval(),
    "copied part": lambda model: model.__setitem__(0, copy.deepcopy(model[0])),
}


@pytest.mark.parametrize("change", FAIR)
def test_what_exchanges_tensors_for_equal_ones_is_no_move(change):
    model, optimizer = normed()
    frozen = {name: value.clone() for name, value in model[0].state_dict().items()}
    FAIR[change](model)
    for _ in range(3):
        for param in model[1].parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.clock == 4
    after = list(model[0].state_dict().values())
    assert all(torch.equal(one, two) for one, two in zip(after, frozen.values(), strict=True))


class Counting(nn.Module):
    """Counts its calls in a buffer, in eval mode too, and keeps a cache that is made anew."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(0), persistent=False)

    def forward(self, x):
        self.calls += not self.quiet
        self.cache = torch.ones(len(self.cache) + 1)  # type: ignore[has-type]
        return self.linear(x)

    quiet = False


@pytest.mark.parametrize(("quiet", "hold"), [(False, True), (False, False), (True, True)])
def test_buffers_that_a_forward_writes(quiet, hold):
    part = Counting()
    part.quiet = quiet
    model = nn.Sequential(part, nn.Linear(3, 2)).double()
    rules = [lm.Rule("0.*", frozen=True, hold=hold)]
    optimizer = lm.Plan("SGD", lr=0.1, rules=rules).build(model, audit=True)
    if hold and not quiet:
        with pytest.raises(
            FrozenMovedError, match=r"'0\.calls' is a buffer of.*hold=False"
        ) as told:
            train(model, optimizer, 1)
        assert "another optimizer" not in str(told.value)
    else:
        train(model, optimizer, 3)
        assert optimizer.clock == 3
        assert len(part.cache) == 3


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
    optimizer.release()
    optimizer = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("0.*", frozen=True)]).build(model, audit=True)
    model[0][1].training = True  # behind the back of `train`
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


def test_statistics_may_move_while_their_module_is_let_go_by_hand():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    optimizer = lm.Plan("SGD", lr=0.1).build(model, steps=9, audit=True)
    x = torch.randn(8, 3, dtype=torch.float64)

    def step():
        model(x).sum().backward()
        optimizer.step()

    lm.freeze(model, ["0", "1"])
    step()
    lm.thaw(model, ["0", "1"])
    model(x)  # the statistics are made anew on purpose
    lm.freeze(model, ["0", "1"])
    step()
    model[1].running_mean += 1
    with pytest.raises(FrozenMovedError, match=r"'1\.running_mean' should rest"):
        optimizer.step()


@pytest.mark.parametrize(
    "weight",
    [
        lambda: torch.ones(9, dtype=torch.float64)[::2],
        lambda: torch.ones(1, dtype=torch.float64).expand(4),
        lambda: torch.from_numpy(np.ones(0)),
        lambda: torch._neg_view(torch.ones(4)),
    ],
)
def test_weights_with_gaps_are_summed(weight):
    model = nn.Module()
    model.a, model.b = nn.Parameter(weight()), nn.Parameter(torch.ones(2))
    plan = lm.Plan(lm.SGD, lr=0.1, rules=[lm.Rule("a", frozen=True)])
    optimizer = plan.build(model, steps=3, audit=True)
    model.b.grad = torch.ones(2)
    optimizer.step()
    if model.a.numel():
        with torch.no_grad():
            model.a.data = model.a.data.clone() + 1
        model.b.grad = torch.ones(2)
        with pytest.raises(FrozenMovedError):
            optimizer.step()
