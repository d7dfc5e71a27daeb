"""`lamina run --reuse`: the results of a run without it, from fewer passes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler
from typer.testing import CliRunner

import lamina as lm
import reuse_task
from lamina import checkpoint
from lamina.cli.app import app
from lamina.reuse.keys import Inputs
from lamina.training import Task, fit, prepare_run
from lamina.training.named_examples import NamedBatch, named_loader
from lamina.training.run_reuse import STORED, ReuseReport
from lamina.training.settings import Settings
from processes import free_port, run_processes
from test_resume import assert_same

FILE = reuse_task.__file__
PLANS = {
    "head": reuse_task.HEAD,
    "top down": reuse_task.TOP_DOWN,
    "probe, then all": reuse_task.PROBE_THEN_ALL,
    "frozen later": reuse_task.FROZEN_LATER,
}


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def variant(**changes):
    """The task with some of its functions replaced."""
    module = types.ModuleType("variant")
    module.__dict__.update({**vars(reuse_task), **changes, "__name__": "variant"})
    return Task("variant", module)


def train(folder, task=reuse_task, plan=None, **settings):
    return fit(task, plan, out=folder, cpu=True, **settings)


def drawn(folder):
    """What every random source is at, at the end of a run."""
    content = checkpoint.newest(folder / "checkpoints").content
    states = [state[name] for state in content["random"] for name in ("start", "before", "after")]
    return [
        (state["python"], state["numpy"][1].tolist(), state["torch"].tolist())
        for state in states
        if state is not None
    ]


def generators(folder):
    """What the generators of the loaders are at, by place."""
    content = checkpoint.newest(folder / "checkpoints").content
    return [
        {place: tuple(state.tolist()) for place, state in random["after"]["generators"].items()}
        for random in content["random"]
    ]


def assert_same_run(one, other):
    """Two runs have the same losses, metrics, weights, state and random sources."""
    assert_same(one, other)
    assert drawn(one) == drawn(other)
    for before, after in zip(generators(one), generators(other), strict=True):
        assert before.items() <= after.items()


def both(tmp_path, task=reuse_task, plan=None, *, reuse=True, **settings):
    """A run without reuse and one with it, and what was reused."""
    train(tmp_path / "without", task, plan, **settings)
    result = train(tmp_path / "with", task, plan, reuse=reuse, **settings)
    assert_same_run(tmp_path / "without", tmp_path / "with")
    return result.reuse


# ------------------------------------------------------------------------------------ same results


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_run_with_reuse_ends_with_the_same_bits(tmp_path, plan):
    found = both(tmp_path, plan=plan)
    assert found.replayed > 0
    assert found.seconds > 0
    about = json.loads((tmp_path / "with" / "run.json").read_text())
    assert about["reuse"] is True
    assert about["reused"]["replayed"] == found.replayed
    assert not (tmp_path / "with" / STORED).exists()  # nobody goes on with it


@pytest.mark.parametrize(
    "settings",
    [{"accumulate": 3}, {"mixed_precision": "bf16"}, {"reuse": {"folder": False, "debug": 1.0}}],
    ids=["accumulate", "bf16", "debug"],
)
def test_other_settings(tmp_path, settings):
    assert both(tmp_path, plan=reuse_task.HEAD, **settings).replayed > 0


def test_held_out_examples_have_entries_of_their_own(tmp_path):
    """Their indices are those of training examples too."""
    found = both(tmp_path, plan=reuse_task.HEAD, epochs=3)
    assert found.replayed == 2 * (6 + 3)  # every batch in the epochs after the first


def test_without_reuse_a_run_is_what_it_was(out):
    with prepare_run(reuse_task, out=out, cpu=True) as session:
        assert session.forecast is None
        assert session.reuse.loader(session.data.train, "train") is session.data.train
        result = session.train()
        assert not session.model._forward_pre_hooks
    assert result.reuse is None
    assert "reused" not in json.loads((out / "run.json").read_text())


def test_indices_stand_for_examples(out, monkeypatch):
    hashed = []
    examples = Inputs.examples
    monkeypatch.setattr(
        Inputs,
        "examples",
        lambda self, places=None: hashed.append(places) or examples(self, places),
    )
    result = train(out, plan=reuse_task.HEAD, epochs=4, reuse=True)
    assert result.reuse.replayed > 20
    # In the first two epochs all of a batch, then one example of it.
    assert hashed.count(None) == 2 * (6 + 3)
    assert len(hashed) == 4 * (6 + 3)


def test_the_hooks_are_gone_after_the_run(out):
    with prepare_run(reuse_task, out=out, cpu=True, reuse=True) as session:
        session.train()
        assert not session.model._forward_pre_hooks
        assert not session.model._forward_hooks


# --------------------------------------------------------------------------------- kinds of loaders


class Counting(Sampler):
    """An order that moves on at each pass, as that of `reviews`."""

    def __init__(self):
        self.passes = 0

    def __len__(self):
        return 48

    def __iter__(self):
        self.passes += 1
        generator = torch.Generator().manual_seed(self.passes)
        return iter(torch.randperm(48, generator=generator).tolist())


class Fetching(torch.utils.data.Dataset):
    """Fetches whole batches, by names."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, name):
        torch.rand(1, generator=self.generator)  # belongs to the state of a run
        return self.dataset[int(str(name).removeprefix("point "))]

    def __getitems__(self, names):
        return [self[name] for name in names]


class Names(Sampler):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        return (f"point {index}" for index in torch.randperm(self.count).tolist())


class Paired(torch.utils.data.Dataset):
    """Its indices say more than which example it is."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        points, label = self.dataset[index[0]]
        return points * index[1], label


class Pairs(Sampler):
    def __len__(self):
        return 48

    def __iter__(self):
        return ((index, 1 + index % 2) for index in torch.randperm(48).tolist())


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return 48

    def __iter__(self):
        return (self.dataset[index] for index in range(48))


class Whole(torch.utils.data.Dataset):
    """Makes batches itself."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return tuple(part[8 * index : 8 * index + 8] for part in self.dataset.tensors)


LOADERS = {
    "workers": lambda data: DataLoader(data, 8, shuffle=True, num_workers=2),
    "generator": lambda data: DataLoader(
        data, 8, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "sampler": lambda data: DataLoader(data, 8, sampler=Counting()),
    "batch sampler": lambda data: DataLoader(
        data, batch_sampler=BatchSampler(Counting(), 8, drop_last=True)
    ),
    "names, fetched at once": lambda data: DataLoader(Fetching(data), 8, sampler=Names(48)),
    "indices that say more": lambda data: DataLoader(Paired(data), 8, sampler=Pairs()),
    "stream": lambda data: DataLoader(Stream(data), 8),
    "batches": lambda data: DataLoader(Whole(data), batch_size=None, shuffle=True),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:What reuse will save is not known")
@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_kinds_of_loaders(tmp_path, make):
    def data():
        train, held_out = reuse_task.points()
        return {"train": make(train), "validation": DataLoader(held_out, 8)}

    found = both(tmp_path, variant(data=data), reuse_task.HEAD, epochs=3)
    assert found.replayed >= 2 * (6 + 3) - 2


def test_a_named_loader_gives_the_batches_of_the_loader():
    data, _ = reuse_task.points()
    order = Counting()
    loader = DataLoader(data, 8, sampler=order)
    named = list(named_loader(loader, "train"))
    order.passes = 0
    for with_names, batch in zip(named, loader, strict=True):
        assert all(map(torch.equal, with_names.batch, batch))
        places = [int(name.removeprefix("train ")) for name in with_names.names]
        assert torch.equal(data.tensors[0][places], batch[0])
    assert loader.dataset is data
    moved = named[0].to("meta")
    assert isinstance(moved, NamedBatch)
    assert moved.names == named[0].names
    assert moved.batch[0].device.type == "meta"


def test_what_a_worker_sets_reaches_the_data_set_of_the_task():
    class Scaled(torch.utils.data.Dataset):
        scale = 1.0

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.tensor(index * self.scale)

    def double(_worker):
        torch.utils.data.get_worker_info().dataset.scale = 2.0

    loader = DataLoader(Scaled(), 4, num_workers=1, worker_init_fn=double)
    (named,) = named_loader(loader, "train")
    assert named.batch.tolist() == [0.0, 2.0, 4.0, 6.0]


# ------------------------------------------------------------------------------------------ resume


KILLED = """
import os, signal, sys
import torch
import reuse_task
from lamina.training import fit
from lamina.training.run_folder import RunFolder

torch.set_num_threads(int(sys.argv[3]))
RunFolder.picture = lambda *_: None

class Kill:
    def on_step(self, record):
        if record.step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    def on_event(self, event): ...
    def on_validation(self, result): ...

fit(reuse_task, out=sys.argv[1], cpu=True, save_every=5, reuse=True, listeners=[Kill()])
"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A whole run without reuse, and one with reuse that was killed after the step 16 of 24."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)
        train(folder / "whole", save_every=5)
    paths = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder / "killed"), "16", threads],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads},
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    return folder


def test_a_killed_run_goes_on_with_what_was_stored(begun, tmp_path):
    shutil.copytree(begun / "killed", tmp_path / "run")
    assert list((tmp_path / "run" / STORED).glob("*.rows"))
    with prepare_run(reuse_task, resume=tmp_path / "run", cpu=True) as session:
        assert session.settings.reuse is True
        result = session.train()
        assert session.reuse._reused.counts["stored"] == 0
    assert result.reuse.replayed > 0
    assert_same_run(begun / "whole", tmp_path / "run")
    assert not (tmp_path / "run" / STORED).exists()


def damage_rows(path):
    if path.suffix == ".rows":
        path.write_bytes(b"\1" * path.stat().st_size)


def damage_journal(path):
    if path.suffix != ".rows":
        path.write_bytes(b"junk\n" + path.read_bytes())


@pytest.mark.parametrize("damage", [damage_rows, damage_journal, Path.unlink])
def test_damaged_outputs_of_a_killed_run_are_computed_again(begun, tmp_path, damage, recwarn):
    shutil.copytree(begun / "killed", tmp_path / "run")
    for path in (tmp_path / "run" / STORED).iterdir():
        damage(path)
    fit(reuse_task, resume=tmp_path / "run", cpu=True)
    assert_same_run(begun / "whole", tmp_path / "run")
    told = [str(warning.message) for warning in recwarn if "damaged" in str(warning.message)]
    assert bool(told) == (damage is not Path.unlink)


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_reuse_may_begin_or_end_when_a_run_is_resumed(tmp_path, first):
    train(tmp_path / "whole", save_every=5)
    folder = tmp_path / "cut"
    interrupted(folder, 12, reuse=first, save_every=5)
    assert (folder / STORED).exists() == first
    result = fit(reuse_task, resume=folder, cpu=True, reuse=not first)
    assert (result.reuse is None) == first
    assert not (folder / STORED).exists()
    assert_same_run(tmp_path / "whole", folder)


class Interrupts:
    def __init__(self, step):
        self.step = step

    def on_step(self, record):
        if record.step == self.step:
            raise KeyboardInterrupt

    def on_event(self, event): ...

    def on_validation(self, result): ...


def interrupted(folder, step, **settings):
    result = train(folder, listeners=[Interrupts(step)], **settings)
    assert result.interrupted is not None
    return result


def train_one_of_two(rank, folder, port, settings):
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in variables.items()})
    torch.set_num_threads(1)
    train(Path(folder) / "run", plan=reuse_task.HEAD, epochs=3, **settings)


@pytest.mark.slow
def test_two_processes_store_what_each_sees(tmp_path):
    for name, settings in (("without", {}), ("with", {"reuse": True})):
        (tmp_path / name).mkdir()
        work = partial(train_one_of_two, port=free_port(), settings=settings)
        run_processes(work, tmp_path / name, limit=300)
    runs = [tmp_path / name / "run" for name in ("without", "with")]
    assert_same_run(*runs)
    about = json.loads((runs[1] / "run.json").read_text())
    assert about["processes"] == 2
    assert about["reused"]["replayed"] > 0


@pytest.mark.slow
def test_a_folder_of_ones_own_stays_for_other_runs(tmp_path):
    """Another learning rate of the head, with the same frozen weights."""
    reuse = {"folder": str(tmp_path / "kept")}
    plans = [reuse_task.HEAD, reuse_task.HEAD.replace("1e-2", "1e-3")]
    first, second = (
        both(tmp_path / str(number), plan=plan, reuse=reuse) for number, plan in enumerate(plans)
    )
    assert list((tmp_path / "kept").glob("*.rows"))
    assert not (tmp_path / "0" / "with" / STORED).exists()
    assert second.replayed > first.replayed


# ---------------------------------------------------------------------------------------- settings


def test_the_task_may_ask_for_it_and_a_run_without_a_word_goes_on_with_it(tmp_path):
    options = {"space": "1 MB", "folder": False}
    task = variant(DEFAULTS={"epochs": 2, "seed": 3, "reuse": options})
    assert Settings.of(task).reuse == options
    assert Settings.of(task, reuse=True).reuse == options
    assert Settings.of(task, reuse=False).reuse is False
    assert Settings.of(task, reuse={"space": 7}).reuse == {"space": 7}
    assert Settings.resumed({"reuse": options}).reuse == options
    assert Settings.resumed({}).reuse is False  # saved by an earlier version
    assert interrupted(tmp_path / "a", 9, task=task, epochs=4, save_every=4).reuse.replayed
    assert fit(task, resume=tmp_path / "a", cpu=True).reuse.replayed
    assert json.loads((tmp_path / "a" / "run.json").read_text())["reuse"] == options
    assert not (tmp_path / "a" / STORED).exists()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("yes", "expected True, False, or options"),
        (1, "expected True, False, or options"),
        ({"spaces": 1}, "unknown option 'spaces'.*Did you mean 'space'"),
        ({"space": "much"}, "expected bytes, or a text"),
        ({"debug": 2}, "expected a share from 0 to 1"),
        ({"preprocessing": None}, "preprocessing=None was given; expected a text"),
        ({"folder": 3}, "expected True for the folder of the run"),
        ({"folder": ""}, "expected True for the folder of the run"),
        ({"folder": 0}, "expected True for the folder of the run"),
        ({"store_dtype": "int4"}, "expected 'bfloat16'"),
        ({"store_dtype": torch.bfloat16}, "expected the name 'bfloat16'"),
    ],
)
def test_a_wrong_setting_leaves_nothing_behind(out, given, match):
    with pytest.raises(lm.LaminaError, match=match):
        train(out, reuse=given)
    assert not out.exists()


def test_a_setting_that_was_changed_by_hand_is_told(tmp_path):
    interrupted(tmp_path / "a", 9, reuse=True, save_every=4)
    path = tmp_path / "a" / "run.json"
    path.write_text(path.read_text().replace('"reuse": true', '"reuse": {"spce": 1}'))
    with pytest.raises(lm.StateError, match=r"run\.json: reuse has the unknown option 'spce'"):
        fit(reuse_task, resume=tmp_path / "a", cpu=True)


# ---------------------------------------------------------------------------- what cannot be reused


def test_a_model_that_is_called_in_parts_is_told(tmp_path):
    def loss(model, batch):
        hidden = model.layer[1](model.layer[0](model.stem(batch[0])))
        return nn.functional.cross_entropy(model.head(hidden), batch[1])

    task = variant(loss=loss, metrics=lambda model, batch: {"loss": loss(model, batch)[None]})
    with pytest.warns(lm.LaminaWarning, match=r"calls parts of the model.*Let it call model"):
        found = both(tmp_path, task)
    assert found.replayed == 0
    assert str(found) == "nothing was replayed"


@pytest.mark.slow
def test_a_compiled_model_is_trained_without(tmp_path):
    def model():
        made = reuse_task.Net()
        made.compile(backend="eager")
        return made

    with pytest.warns(lm.LaminaWarning, match="goes on without reuse: reuse: the whole model"):
        assert both(tmp_path, variant(model=model), epochs=1) is None


def test_a_plan_whose_bottom_trains_is_told(tmp_path):
    plan = 'optimizer = "SGD"\nlr = 0.1\n[[rule]]\nmatch = "head.*"\nfrozen = true\n'
    with pytest.warns(lm.LaminaWarning, match="Nothing is reused: nothing is frozen, now or later"):
        assert both(tmp_path, plan=plan, epochs=2).replayed == 0


def test_augmentation_is_found(tmp_path):
    class Moved(torch.utils.data.Dataset):
        def __init__(self, dataset):
            self.dataset = dataset

        def __len__(self):
            return len(self.dataset)

        def __getitem__(self, index):
            points, label = self.dataset[index]
            return points + torch.rand(4), label

    def data():
        train, held_out = reuse_task.points()
        return {
            "train": DataLoader(Moved(train), 8, shuffle=True),
            "validation": DataLoader(held_out, 8),
        }

    with pytest.warns(lm.LaminaWarning, match="random augmentation"):
        found = both(tmp_path, variant(data=data), reuse_task.HEAD, epochs=3)
    assert found.replayed == 3  # held-out batches, in the epoch after that was found


def test_a_full_budget_is_told_and_kept(tmp_path):
    with pytest.warns(lm.LaminaWarning, match="stored for some examples only"):
        found = both(tmp_path, plan=reuse_task.HEAD, reuse={"space": 1000})
    assert 0 < found.space <= 1000


# ---------------------------------------------------------------------------- what a user is shown


def test_the_forecast_tells_the_stages_and_moves_nothing(out):
    plan = "feedback = \"plateau('val_loss')\"\n" + reuse_task.TOP_DOWN  # measures a batch first
    with prepare_run(reuse_task, plan, out=out, cpu=True, reuse=True) as session:
        first, second, third = session.forecast.stages
        assert [stage.first for stage in session.forecast.stages] == [0, 6, 12]
        assert [stage.replayed for stage in (first, second, third)] == [
            ("layer.1",),
            ("layer.0",),
            ("stem",),
        ]
        assert first.saved > second.saved > third.saved >= 0
        assert session.forecast.examples == 70
        assert session.forecast.space == 70 * 3 * 8 * 4
        modes = [module.training for module in session.model.modules()]
        state = session.randomness.now()
    with prepare_run(reuse_task, plan, out=out, cpu=True) as session:
        assert modes == [module.training for module in session.model.modules()]
        assert torch.equal(state["torch"], session.randomness.now()["torch"])


def test_the_command_line(out):
    run = CliRunner().invoke(app, ["run", FILE, "--reuse", "--cpu", "--out", str(out)])
    assert run.exit_code == 0, run.output
    assert "What is frozen is computed once per example (--reuse):" in run.output
    assert "0 to 5" in run.output
    assert "layer.1" in run.output
    assert "of 1907 MiB" in run.output
    (row,) = [line for line in run.output.splitlines() if line.startswith("reuse ")]
    assert "calls replayed" in row
    assert "spared about" in row


def test_show_tells_the_forecast():
    plain = CliRunner().invoke(app, ["show", FILE])
    told = CliRunner().invoke(app, ["show", FILE, "--reuse-space", "1 MiB"])
    assert told.output.startswith(plain.output)
    assert "of 1 MiB" in told.output.removeprefix(plain.output)
    found = json.loads(CliRunner().invoke(app, ["show", FILE, "--reuse", "--json"]).output)
    assert [stage["replayed"] for stage in found["reuse"]["stages"]] == [
        ["layer.1"],
        ["layer.0"],
        ["stem"],
    ]
    assert "reuse" not in json.loads(CliRunner().invoke(app, ["show", FILE, "--json"]).output)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--no-reuse", "--reuse-space", "1 GB"], "contradict each other"),
        (["--reuse-space", "much"], "expected bytes, or a text"),
    ],
)
def test_wrong_options_are_told_in_one_paragraph(out, options, match):
    run = CliRunner().invoke(app, ["run", FILE, *options, "--out", str(out)])
    assert run.exit_code == 2
    assert match in run.output
    assert "Traceback" not in run.output
    assert not out.exists()


def test_a_report_says_what_was_spared():
    some, none = ReuseReport(1200, 5, 1, 2.345, 3 * 2**20), ReuseReport(0, 1, 0, 0.0, 0)
    assert str(some) == "1,200 of 1,205 calls replayed, 1 skipped; spared about 2.3 s with 3.0 MiB"
    assert str(none) == "0 of 1 call replayed; spared about 0.0 s with 0.0 MiB"
    assert str(ReuseReport(0, 0, 0, 0.0, 0)) == "nothing was replayed"


class Texts(torch.utils.data.Dataset):
    """Examples of their own lengths, up to a longest one."""

    def __init__(self, dataset, longest):
        self.dataset, self.longest = dataset, longest

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        points, label = self.dataset[index]
        return points.expand(min(self.longest, 1 + index % 23), 4), label


def pad(items):
    longest = max(len(points) for points, _ in items)
    padded = [nn.functional.pad(points, (0, 0, 0, longest - len(points))) for points, _ in items]
    return torch.stack(padded), torch.stack([label for _, label in items])


class OfTexts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.stem(x).mean(1))


@pytest.mark.parametrize("longest", [1, 23])
def test_padding_to_lengths_of_their_own_is_told_before_the_run(tmp_path, longest):
    def data():
        parts = [Texts(part, longest) for part in reuse_task.points()]
        order = torch.Generator().manual_seed(0)
        train, held_out = (DataLoader(p, 8, collate_fn=pad, generator=order) for p in parts)
        return {"train": train, "validation": held_out}

    task = variant(data=data, model=OfTexts)
    both(tmp_path, task, reuse_task.HEAD, epochs=2)
    with prepare_run(task, reuse_task.HEAD, out=tmp_path / "b", cpu=True, reuse=True) as session:
        assert ("Batches have different lengths" in str(session.forecast)) == (longest > 1)
