"""Reuse changes no bit: models of many shapes, stages and ways to train."""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lamina as lm
from lamina.reuse import IndexedDataset
from lamina.reuse.keys import Inputs
from lamina.toy import toy_problem
from reuse_models import (
    GPT2,
    EfficientNet,
    Layer,
    MiniLM,
    ResNet,
    Training,
    TwoHeads,
    UNet,
    freeze,
    images,
    plain,
    points,
    same_result,
    thaw_top_down,
    words,
)

MODELS = {
    "MiniLM": (MiniLM, words(), "!classifier.*", ["layer.2.*", "layer.1.*", "layer.0.*"]),
    "GPT-2": (GPT2, words()[:1], "!score.*", ["ln_f.* | h.2.*", "h.1.*"]),
    "ResNet": (ResNet, images(), "!fc.*", ["layer2.*", "layer1.*"]),
    "EfficientNet": (EfficientNet, images(), "!classifier.*", ["head.*", "blocks.1.*"]),
    "U-Net": (UNet, images(), "down1.* | down2.*", ["down2.*"]),
    "two heads": (TwoHeads, points(), "body.* | shared.*", ["shared.*"]),
}


def both(model, rules, data, **options):
    """A training without and one with reuse."""
    reuse = options.pop("reuse", {})
    return (
        Training(model, rules, data, **options),
        Training(model, rules, data, reuse=reuse, **options),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_part_is_replayed_bit_for_bit(name):
    model, data, frozen, _ = MODELS[name]
    without, reusing = (each.run(3) for each in both(model, freeze(frozen), data))
    assert same_result(without, reusing)
    assert reusing.reused.counts["replayed"] >= 6  # of two later epochs of three steps


@pytest.mark.parametrize("name", MODELS)
def test_parts_that_thaw_one_after_the_other_are_replayed_bit_for_bit(name):
    model, data, frozen, stages = MODELS[name]
    rules = freeze(frozen) + thaw_top_down(*stages)
    without, reusing = (each.run() for each in both(model, rules, data, optimizer=lm.SGD))
    assert same_result(without, reusing)
    assert reusing.reused.counts["replayed"] >= 3
    assert not reusing.reused.refused


def test_each_example_passes_each_frozen_module_once(monkeypatch):
    rules = freeze("!classifier.*") + thaw_top_down("layer.2.*", "layer.1.*")
    _, reusing = both(MiniLM, rules, words())
    passed = {id(layer): 0 for layer in reusing.model.layer}
    forward = Layer.forward

    def counting(layer, hidden, **kwargs):
        if id(layer) in passed:
            passed[id(layer)] += len(hidden)
        return forward(layer, hidden, **kwargs)

    monkeypatch.setattr(Layer, "forward", counting)
    reusing.run()
    # Frozen for good; frozen for two epochs of four, then it trains; frozen for one.
    assert list(passed.values()) == [24, 24 + 2 * 24, 24 + 3 * 24]


def test_copies_and_files_of_the_model_are_free_of_reuse(tmp_path):
    _, reusing = both(MiniLM, freeze("!classifier.*"), words())
    reusing.run(2)
    twin = copy.deepcopy(reusing.model)
    torch.save(reusing.model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    before = dict(reusing.reused.counts)
    for each in (twin.eval(), loaded.eval()):
        assert torch.equal(each(*words())["logits"], twin(*words())["logits"])
    assert reusing.reused.counts == before
    assert all("forward" not in vars(module) for module in reusing.model.modules())


def test_after_close_the_run_goes_on_without_reuse():
    without, reusing = both(MiniLM, freeze("!classifier.*"), words())
    reusing.run(2)
    reusing.reused.close()
    before = dict(reusing.reused.counts)
    reusing.run(1)
    assert same_result(without.run(3), reusing)
    assert reusing.reused.counts == before


# ------------------------------------------------------------------------------ ways to train


def accumulate(training, batch):
    """Two halves of a batch add up to one step."""
    training.optimizer.zero_grad()
    for half in zip(*(part.split(4) for part in batch), strict=True):
        loss = plain(training.model(*half))
        loss.backward()
        training.losses.append(loss.item())
    training.optimizer.step()


def autocast(training, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = plain(training.model(*batch))
    training.optimizer.zero_grad()
    loss.backward()
    training.optimizer.step()
    training.losses.append(loss.item())


def evaluate(training, batch):
    """A step, and the metric of held-out data, which has entries of its own."""
    autocast(training, batch)
    training.model.eval()
    with torch.no_grad():
        training.losses.append(plain(training.model(*words(8, seed=5))).item())
    training.model.train()


def inspect(training, batch):
    """As Lightning validates: in inference mode."""
    training.model.eval()
    with torch.inference_mode():
        training.losses.append(plain(training.model(*batch)).item())
    training.model.train()
    loss = plain(training.model(*batch))
    training.optimizer.zero_grad()
    loss.backward()
    training.optimizer.step()


@pytest.mark.parametrize("step", [accumulate, autocast, evaluate, inspect])
def test_ways_to_train(step):
    rules = freeze("!classifier.*") + thaw_top_down("layer.2.*")
    without, reusing = (each.run(3, step) for each in both(MiniLM, rules, words()))
    assert same_result(without, reusing)
    assert reusing.reused.counts["replayed"] >= 6


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(MiniLM):
        def forward(self, ids, mask):
            hidden = self.embeddings(ids)
            for layer in self.layer:
                hidden, _ = checkpoint(layer, hidden, use_reentrant=reentrant)
            return self.classifier(hidden.mean(1))

    rules = freeze("embeddings.* | layer.0.* | layer.1.*")
    if reentrant:  # which gives a layer above a frozen input no gradient, with or without reuse
        rules = freeze("embeddings.* | layer.*")
    without, reusing = both(Checkpointed, rules, words())
    with pytest.warns(UserWarning, match="requires_grad") if reentrant else nothing():
        assert same_result(without.run(3), reusing.run(3))
    assert reusing.reused.counts["replayed"] >= 6


@pytest.mark.filterwarnings("ignore:updates-round-away")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    def model():
        return ResNet().to(dtype)

    data = (images()[0].to(dtype),)
    without, reusing = both(model, freeze("!fc.*"), data, optimizer=lm.SGD)
    assert same_result(without.run(3), reusing.run(3))
    assert reusing.reused.counts["replayed"] >= 6


def test_channels_last_keeps_its_order_in_memory():
    def model():
        return ResNet().to(memory_format=torch.channels_last)

    data = (images()[0].to(memory_format=torch.channels_last),)
    rules = freeze("!(layer2.* | fc.*)")
    without, reusing = (each.run(3) for each in both(model, rules, data))
    assert same_result(without, reusing)
    assert reusing.reused.counts["replayed"] >= 6


def test_a_part_that_trains_may_be_compiled():
    def model():
        made = MiniLM()
        made.classifier = torch.compile(made.classifier, backend="eager")
        return made

    without, reusing = (each.run(3) for each in both(model, freeze("!classifier.*"), words()))
    assert same_result(without, reusing)
    assert reusing.reused.counts["replayed"] >= 6


def test_a_part_that_freezes_later_is_replayed_from_then_on():
    rules = [lm.Rule("!classifier.*", freeze="1 epoch")]
    without, reusing = (each.run() for each in both(MiniLM, rules, words()))
    assert same_result(without, reusing)
    assert reusing.reused.counts["replayed"] == 6  # stored in the second epoch of four


def test_frozen_thawed_and_frozen_again():
    rules = [lm.Rule("!classifier.*", thaw="2 epochs", freeze="3 epochs")]
    without, reusing = (each.run(6) for each in both(MiniLM, rules, words(), epochs=6))
    assert same_result(without, reusing)
    assert reusing.reused.counts["replayed"] == 3 + 6


def test_padding_is_part_of_the_key():
    """The same examples in another length have other values in their padding."""

    def step(training, batch):
        ids, mask = batch
        length = 6 + training.done % 2
        autocast(training, (ids[:, :length], mask[:, :length]))

    without, reusing = (
        each.run(4, step) for each in both(MiniLM, freeze("!classifier.*"), words())
    )
    assert same_result(without, reusing)
    assert reusing.reused.counts["replayed"] == 6


def test_a_smaller_last_batch_is_exact():
    without, reusing = (
        each.run(4) for each in both(MiniLM, freeze("!classifier.*"), words(26), batch=8)
    )
    assert same_result(without, reusing)
    assert reusing.reused.counts["replayed"] >= 9


@contextmanager
def nothing():
    yield


# ---------------------------------------------------------------------------- which examples


def indexed(data):
    data = IndexedDataset(TensorDataset(*data))
    torch.manual_seed(4)
    return DataLoader(data, batch_size=8, shuffle=True, collate_fn=IndexedDataset.collate())


def test_indices_stand_for_examples(monkeypatch):
    without, reusing = both(MiniLM, freeze("!classifier.*"), words())
    hashed = []
    examples = Inputs.examples
    monkeypatch.setattr(
        Inputs,
        "examples",
        lambda self, places=None: hashed.append(places) or examples(self, places),
    )
    for training in (without, reusing):
        loader = indexed(words())
        for _ in range(4):
            named = training.reused.batches(loader) if training.reused else map(unnamed, loader)
            for batch in named:
                autocast(training, batch)
    assert same_result(without, reusing)
    assert reusing.reused.counts["replayed"] == 9
    assert hashed.count(None) == 6  # all in the first two epochs, then one of a batch


def unnamed(indexed_batch):
    return indexed_batch.batch


def test_augmentation_under_an_index_is_found():
    def trained(reused):
        training = Training(MiniLM, freeze("!classifier.*"), words(), reuse=reused)
        for epoch in range(3):
            for place in range(3):
                chosen = slice(8 * place, 8 * place + 8)
                ids, mask = (part[chosen].clone() for part in words())
                ids[:, 1] = epoch  # another text under the same index
                torch.manual_seed(epoch)
                with training.reused.batch(range(24)[chosen]) if reused is not None else nothing():
                    autocast(training, (ids, mask))
        return training

    without = trained(None)
    with pytest.warns(lm.LaminaWarning, match="under the same index"):
        reusing = trained({})
    assert same_result(without, reusing)
    assert reusing.reused.counts["replayed"] == 0


@pytest.mark.parametrize("ids", [[0.5], [None], [(1, 2)]])
def test_ids_are_numbers_or_texts(ids):
    _, reusing = both(MiniLM, freeze("!classifier.*"), words())
    with pytest.raises(lm.LaminaError, match="a number or a text"), reusing.reused.batch(ids):
        pass


def test_a_loader_without_indices_is_told():
    _, reusing = both(MiniLM, freeze("!classifier.*"), words())
    with pytest.raises(lm.LaminaError, match="IndexedDataset"):
        next(reusing.reused.batches([words()]))


def test_a_setting_that_is_changed_in_the_middle_is_followed():
    def run(reused):
        torch.manual_seed(0)
        model, loader, loss = toy_problem()
        rules = [lm.Rule("!classifier.*", frozen=True)]
        optimizer = lm.Plan(lm.AdamW, lr=1e-2, rules=rules).build(
            model, epochs=4, steps_per_epoch=5
        )
        using = lm.reuse(model, optimizer) if reused else nullcontext()
        losses = []
        with using as reuse:
            for epoch in range(4):
                if epoch >= 2:  # twice, so that a second change is seen as well
                    model.embeddings.LayerNorm.eps = 0.5 * epoch
                for batch in loader:
                    value = loss(model, batch)
                    value.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(float(value))
        return losses, reuse and reuse.counts["replayed"]

    with_reuse, replayed = run(True)
    assert with_reuse == run(False)[0]
    assert replayed == 5  # the second epoch; each of the last two has another eps
