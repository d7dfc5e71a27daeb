"""The order of the data: a generator or sampler of the task is kept, also through a resume."""

import random
import types
from itertools import chain

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import training_task
from lamina._util.randomness import Randomness
from lamina.errors import LaminaWarning, StateError
from lamina.training import fit

POINTS = 24


class Backwards(RandomSampler):
    """A random sampler of one's own, which is not exchanged for another."""

    def __iter__(self):
        yield from reversed(list(super().__iter__()))


def drawn_by_python(data):
    class Shuffled(torch.utils.data.Sampler):
        def __len__(self):
            return len(data)

        def __iter__(self):
            return iter(random.sample(range(len(data)), len(data)))

    return DataLoader(data, 4, sampler=Shuffled())


def generator(seed=11):
    return torch.Generator().manual_seed(seed)


def batch_sampler(data):
    return BatchSampler(RandomSampler(data, generator=generator()), 4, drop_last=False)


LOADERS = {
    "shuffle": lambda data: DataLoader(data, 4, shuffle=True, generator=generator()),
    "sampler": lambda data: DataLoader(data, 4, sampler=RandomSampler(data, generator=generator())),
    "replacement": lambda data: DataLoader(
        data,
        4,
        sampler=RandomSampler(data, replacement=True, num_samples=POINTS, generator=generator()),
    ),
    "weighted": lambda data: DataLoader(
        data,
        4,
        sampler=torch.utils.data.WeightedRandomSampler(
            [1.0] * POINTS, POINTS, generator=generator()
        ),
    ),
    "subset": lambda data: DataLoader(
        data,
        4,
        sampler=torch.utils.data.SubsetRandomSampler(range(POINTS), generator=generator()),
    ),
    "batch_sampler": lambda data: DataLoader(data, batch_sampler=batch_sampler(data)),
    "subclass": lambda data: DataLoader(data, 4, sampler=Backwards(data, generator=generator())),
}


class Stop(Exception):
    """Stands for a kill: nothing more is saved."""


def task(loader, *, stop_at=None, **more):
    """A task over `loader(data)` that notes which points each batch had."""
    points = torch.randn(POINTS, 4, generator=generator(0))
    data = TensorDataset(points, (points[:, 0] > 0).long(), torch.arange(POINTS))
    module = types.ModuleType("noted")
    module.seen = []  # type: ignore[attr-defined]

    def loss(model, batch):
        if module.seen is not None and model.training:
            if len(module.seen) == stop_at:
                raise Stop
            module.seen.append(batch[2].tolist())
        return training_task.loss(model, batch)

    module.model, module.loss, module.PLAN = training_task.model, loss, training_task.PLAN  # type: ignore[attr-defined]
    module.data = lambda: {"train": loader(data), "validation": DataLoader(data, 8)}  # type: ignore[attr-defined]
    vars(module).update(more)
    return module


def own_loop(loader, epochs=2):
    """The batches of a loop of one's own over such a loader."""
    data = TensorDataset(torch.arange(POINTS))
    made = loader(data)
    return [batch[0].tolist() for _ in range(epochs) for batch in made]


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    monkeypatch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)


def train(made, out, **settings):
    return fit(made, out=out, cpu=True, **{"epochs": 2, "seed": 3, **settings})


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.filterwarnings("ignore:seed=3 was given")
def test_the_order_is_that_of_a_loop_of_ones_own(kind, tmp_path):
    made = task(LOADERS[kind])
    train(made, tmp_path / "run")
    assert made.seen == own_loop(LOADERS[kind])


@pytest.mark.parametrize("kind", ["shuffle", "replacement", "weighted", "subclass"])
@pytest.mark.parametrize("stop_at", [4, 8])
@pytest.mark.filterwarnings("ignore:seed=3 was given")
def test_a_resumed_run_goes_on_in_that_order(kind, stop_at, tmp_path):
    whole = task(LOADERS[kind])
    train(whole, tmp_path / "whole", save_every="1 steps")
    cut = task(LOADERS[kind], stop_at=stop_at)
    with pytest.raises(Stop):
        train(cut, tmp_path / "run", save_every="1 steps")
    rest = task(LOADERS[kind])
    result = fit(rest, resume=tmp_path / "run", cpu=True)
    assert cut.seen + rest.seen == whole.seen
    assert result.steps == 12


def test_without_a_generator_the_seed_decides(tmp_path):
    orders = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        made = task(lambda data: DataLoader(data, 4, shuffle=True))
        train(made, tmp_path / name, seed=seed)
        orders[name] = made.seen
    assert orders["a"] == orders["b"] != orders["c"]
    assert sorted(chain(*orders["a"][:6])) == list(range(POINTS))


def test_a_sampler_without_a_generator_draws_from_the_seeded_source(tmp_path):
    orders = []
    for name in "ab":
        made = task(drawn_by_python)
        train(made, tmp_path / name)
        orders.append(made.seen)
    assert orders[0] == orders[1]


def test_a_validation_loader_keeps_its_generator_too(tmp_path):
    shared, seen = generator(), []

    def data():
        points = TensorDataset(torch.randn(POINTS, 4), torch.zeros(POINTS).long())
        return {
            "train": DataLoader(points, 8, shuffle=True, generator=shared),
            "validation": DataLoader(points, 8, shuffle=True, generator=shared),
        }

    made = task(LOADERS["shuffle"])
    made.data, made.loss = data, training_task.loss
    state = shared.get_state()
    train(made, tmp_path / "run", seed=None)
    after = torch.randint(1000, (3,), generator=shared)
    shared.set_state(state)
    for _ in range(2):  # epochs
        for part in data().values():
            seen += list(part)
    assert torch.equal(torch.randint(1000, (3,), generator=shared), after)


def test_a_seed_that_cannot_reach_the_order_is_told_once(tmp_path):
    with pytest.warns(LaminaWarning, match="seed=9 was given, but the order") as told:
        train(task(LOADERS["shuffle"]), tmp_path / "a", seed=9)
    assert len(told) == 1


def test_nothing_is_told_where_nothing_was_asked_or_the_task_takes_the_seed(tmp_path):
    train(task(LOADERS["shuffle"]), tmp_path / "a", seed=None)
    seeds = []

    def data(seed):
        seeds.append(seed)
        return made.plain()

    made = task(LOADERS["shuffle"])
    made.plain, made.data = made.data, data
    train(made, tmp_path / "b", seed=9)
    assert seeds == [9]


@pytest.mark.parametrize("wrong", [torch.zeros(7, dtype=torch.uint8), "x", torch.zeros(5056)])
def test_a_random_state_is_refused_though_its_generator_is_not_made_yet(wrong):
    loader = DataLoader(list(range(4)), shuffle=True)
    sources = Randomness(torch.device("cpu"), loader)
    before = sources.now()
    own = torch.Generator().get_state()
    sources.check({**before, "generators": {"0.sampler": own}})
    with pytest.raises(StateError, match="a random state cannot be set"):
        sources.check({**before, "generators": {"0.sampler": wrong}})
    assert torch.equal(sources.now()["torch"], before["torch"])
