"""Where stored outputs lie: budgets, files, other processes, and what makes them stale."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import lamina as lm
from lamina.reuse import journal
from lamina.reuse.keys import modes_of
from lamina.reuse.options import parse_space
from lamina.reuse.shelf import Rows
from reuse_models import MiniLM, Training, freeze, plain, same_result, thaw_top_down, words

FROZEN = freeze("!classifier.*")


def pair(rules=FROZEN, epochs=4, **reuse):
    return (
        Training(MiniLM, rules, words(), epochs=epochs),
        Training(MiniLM, rules, words(), epochs=epochs, reuse=reuse),
    )


# ------------------------------------------------------------------------------------ staleness


def write(training):
    with torch.no_grad():
        training.model.layer[0].dense.weight.add_(0.1)


def write_past_autograd(training):
    training.model.layer[0].dense.weight.data.mul_(1.5)


def prune_past_autograd(training):
    """A mask that spares the elements at the start, in the middle and at the end."""
    weight = training.model.layer[0].dense.weight
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0] = mask[len(mask) // 2] = mask[-1] = True
    weight.data.mul_(mask)


def load_weights(training):
    state = {k: v.clone() for k, v in training.model.state_dict().items()}
    state["layer.1.dense.bias"] += 1
    training.model.load_state_dict(state)


def change_buffer(training):
    training.model.embeddings.ids.add_(1)


def exchange_parameter(training):
    new = nn.Parameter(training.model.embeddings.words.weight.detach() * 2, requires_grad=False)
    training.model.embeddings.words.weight = new


def thaw_by_hand(training):
    for param in training.model.layer[2].parameters():
        param.requires_grad_(True)


STALE = [
    write,
    write_past_autograd,
    prune_past_autograd,
    load_weights,
    change_buffer,
    exchange_parameter,
    thaw_by_hand,
]


@pytest.mark.filterwarnings("ignore::lamina.LaminaWarning")
@pytest.mark.parametrize("change", STALE)
def test_what_changed_is_computed_again(change):
    without, reusing = pair()
    for training in (without, reusing):
        training.run(2)
        change(training)
    before = reusing.reused.counts["replayed"]
    assert before == 3
    assert same_result(without.run(1), reusing.run(1))
    assert reusing.reused.counts["replayed"] == before
    assert same_result(without.run(1), reusing.run(1))
    assert reusing.reused.counts["replayed"] == before + 3


def test_debug_compares_what_is_replayed():
    training = Training(MiniLM, FROZEN, words(), reuse={"debug": 1.0})
    assert training.run(2).reused.counts["replayed"] == 3
    for shelf in training.reused.store.shelves.values():
        shelf.rows[0].write(0, torch.zeros(24, shelf.form.widths()[0], dtype=torch.uint8))
    with pytest.raises(lm.LaminaError, match="other bits than are stored"):
        training.run(1)


# --------------------------------------------------------------------------------------- budgets


def test_without_space_everything_is_computed():
    without, reusing = pair(space=1000)
    with pytest.warns(lm.LaminaWarning, match="stored for some examples only"):
        reusing.run(3)
    assert same_result(without.run(3), reusing)
    assert reusing.reused.counts["replayed"] == 0
    assert reusing.reused.store.used <= 1000


def test_a_later_stage_gives_way_to_the_one_at_hand():
    rules = FROZEN + thaw_top_down("layer.2.*", "layer.1.*")
    roomy = Training(MiniLM, rules, words(), reuse={}).run(1)
    space = roomy.reused.store.used * 2 // 3
    without, reusing = pair(rules, space=space)
    without.run()
    with pytest.warns(lm.LaminaWarning, match="which a later stage needs, are not stored"):
        reusing.run()
    assert same_result(without, reusing)
    assert 0 < reusing.reused.counts["replayed"] < 9
    assert reusing.reused.store.used <= space


@pytest.mark.parametrize("given", ["", "2 XB", "many", -1, True, None, 1.5, "1e9 GB", "9" * 99])
def test_a_space_that_cannot_be_read_is_told(given):
    with pytest.raises(lm.PlanError, match="expected bytes, or a text"):
        parse_space(given)


def test_preview_tells_the_space_that_is_used_and_what_is_saved():
    rules = FROZEN + thaw_top_down("layer.2.*")
    training = Training(MiniLM, rules, words(), reuse={})
    before = training.result()[1]
    forecast = training.reused.preview(24, *(part[:8] for part in words()))
    assert all(torch.equal(before[k], v) for k, v in training.result()[1].items())
    assert training.reused.counts == {"replayed": 0, "skipped": 0, "stored": 0}
    first, second = forecast.stages
    assert (first.first, first.last, second.first, second.last) == (0, 3, 3, 12)
    assert (first.replayed, second.replayed) == (("layer.2",), ("layer.1",))
    assert first.bytes_per_example == 8 * 16 * 4
    assert forecast.space == 24 * 2 * 8 * 16 * 4
    assert first.saved > second.saved > 0
    training.run(1)
    stored = sum(
        len(shelf.slots) * sum(shelf.form.widths())
        for shelf in training.reused.store.shelves.values()
    )
    assert stored == forecast.space
    assert "layer.2" in str(forecast)


# ----------------------------------------------------------------------------------------- files


def other_process(folder, epochs=1, **options):
    """What a later process with the same weights does with the folder."""
    training = Training(MiniLM, FROZEN, words(), reuse={"folder": folder, **options})
    training.run(epochs)
    training.reused.close()
    return training


def test_a_later_process_goes_on_with_the_files(tmp_path):
    without, first = pair(folder=tmp_path)
    first.run(2)
    first.reused.close()
    again = other_process(tmp_path, epochs=2)
    assert same_result(without.run(2), first)
    assert same_result(again, first)
    # One batch is computed to learn the form of what is stored.
    assert again.reused.counts["replayed"] == 5
    assert again.reused.counts["stored"] == 0


def test_files_of_another_model_are_not_used(tmp_path):
    other_process(tmp_path)
    without, second = pair(folder=tmp_path)
    for training in (without, second):
        write(training)
    with pytest.warns(lm.LaminaWarning, match="other weights or by another model"):
        second.run(1)
    assert second.reused.counts == {"replayed": 0, "skipped": 0, "stored": 24}
    assert same_result(without.run(1), second)


def test_files_of_another_preprocessing_are_told_and_not_used(tmp_path):
    other_process(tmp_path, preprocessing="lower case")
    files = set(tmp_path.glob("*.rows"))
    with pytest.warns(lm.LaminaWarning, match="preprocessing='lower case', and this run has ''"):
        again = other_process(tmp_path)
    assert again.reused.counts == {"replayed": 0, "skipped": 0, "stored": 24}
    assert set(tmp_path.glob("*.rows")) == files  # those of old are gone, their numbers taken
    assert other_process(tmp_path).reused.counts["stored"] == 0


def test_other_inputs_under_an_index_of_an_earlier_process_are_not_replayed(tmp_path):
    """A data set that was sorted anew: its indices stand for other examples."""

    def trained(seed, reuse):
        training = Training(MiniLM, FROZEN, words(seed=seed), reuse=reuse)
        for places in torch.arange(24).split(8):
            batch = [part[places] for part in training.data]
            named = training.reused.batch(places) if training.reused else nullcontext()
            with named:
                loss = plain(training.model(*batch))
            training.optimizer.zero_grad()
            loss.backward()
            training.optimizer.step()
            training.losses.append(loss.item())
        return training

    trained(1, {"folder": tmp_path}).reused.close()
    again = trained(2, {"folder": tmp_path})
    assert again.reused.counts["stored"] == 24
    assert same_result(again, trained(2, None))
    again.reused.close()
    assert trained(2, {"folder": tmp_path}).reused.counts["stored"] == 0


# ------------------------------------------------------------------------------------- store_dtype


def test_rounded_outputs_take_half_the_space_and_train_alike(tmp_path):
    exact = Training(MiniLM, FROZEN, words(), reuse={}).run(3)
    for folder in (None, tmp_path, tmp_path):
        narrow = {"store_dtype": "bfloat16", "folder": folder, "debug": 1.0}
        rounded = Training(MiniLM, FROZEN, words(), reuse=narrow).run(3)
        assert rounded.reused.counts["replayed"] >= 6
        assert not same_result(exact, rounded)
        assert rounded.losses == pytest.approx(exact.losses, rel=1e-2)
        rounded.reused.close()
    batch = [part[:8] for part in words()]
    wide, half = exact.reused.preview(24, *batch), rounded.reused.preview(24, *batch)
    assert half.space * 2 == wide.space


def test_what_is_narrow_already_is_stored_as_it_is():
    def trained(reuse):
        training = Training(MiniLM, FROZEN, words(), reuse=reuse)
        training.model.bfloat16()
        ids, mask = training.data
        training.data = ids, mask.bfloat16()
        return training.run(3)

    reusing = trained({"store_dtype": torch.bfloat16})
    assert reusing.reused.counts["replayed"] == 6
    assert same_result(trained(None), reusing)


def test_rounded_and_exact_outputs_in_one_folder_are_kept_apart(tmp_path):
    rounded = other_process(tmp_path, epochs=2, store_dtype="bfloat16")
    assert rounded.reused.counts["stored"] == 24
    exact = other_process(tmp_path, epochs=2)
    assert exact.reused.counts["stored"] == 24
    assert same_result(exact, pair()[0].run(2))


def damage_rows(folder):
    for path in folder.glob("*.rows"):
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)


def cut_rows(folder):
    for path in folder.glob("*.rows"):
        path.write_bytes(path.read_bytes()[:1000])


def remove_rows(folder):
    for path in folder.glob("*.rows"):
        path.unlink()


def damage_sums(folder):
    path = folder / "reuse.jsonl"
    path.write_text(path.read_text().replace('"sums":[[', '"sums":[[1'))


@pytest.mark.parametrize("damage", [damage_rows, cut_rows, remove_rows, damage_sums])
def test_damaged_files_are_told_and_computed_again(tmp_path, damage):
    other_process(tmp_path)
    damage(tmp_path)
    without, second = pair(folder=tmp_path)
    with pytest.warns(lm.LaminaWarning, match="damaged"):
        second.run(2)
    assert same_result(without.run(2), second)
    second.reused.close()
    third = other_process(tmp_path, epochs=2)  # what was written again is whole
    assert third.reused.counts["replayed"] == 5


JUNK = [
    b"\x00\xff\n",
    b"[]\n",
    b"{}\n",
    b"null\n",
    b'{"shelf":-1}\n',
    b'{"shelf":0,"first":7,"examples":["00"],"sums":[[1]]}\n',
    b'{"shelf":0,"first":24,"examples":["zz"],"sums":[[1]]}\n',
    b'{"removed":"../../x"}\n',
    b'{"shelf":1,"format":99,"key":"a","layout":"","fingerprint":"","widths":[]}\n',
    b"[" * 100_000 + b"\n",
]


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_a_damaged_journal_is_read_up_to_the_damage(tmp_path, junk):
    other_process(tmp_path)
    with (tmp_path / "reuse.jsonl").open("ab") as file:
        file.write(junk)
    with pytest.warns(lm.LaminaWarning, match=r"reuse\.jsonl: is damaged at byte"):
        again = other_process(tmp_path)
    assert again.reused.counts["replayed"] == 2
    assert again.reused.counts["stored"] == 0


def test_a_line_that_was_not_finished_is_dropped_without_a_word(tmp_path):
    other_process(tmp_path)
    path = tmp_path / "reuse.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    again = other_process(tmp_path)
    assert again.reused.counts["stored"] == 8
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_full_disk_is_told_and_training_goes_on(tmp_path, monkeypatch):
    def fail(file, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "reserve", fail)
    without, reusing = pair(folder=tmp_path)
    with pytest.warns(lm.LaminaWarning, match="No space left on device"):
        reusing.run(2)
    assert same_result(without.run(2), reusing)
    assert list(tmp_path.glob("*.rows")) == []


def test_two_at_once_do_not_share_a_folder(tmp_path):
    first = Training(MiniLM, FROZEN, words(), reuse={"folder": tmp_path})
    with pytest.warns(lm.LaminaWarning, match="another process stores"):
        second = Training(MiniLM, FROZEN, words(), reuse={"folder": tmp_path})
    assert same_result(first.run(2), second.run(2))
    assert not second.reused.store.on_disk


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(lm.LaminaWarning, match="cannot be written"):
        training = Training(MiniLM, FROZEN, words(), reuse={"folder": tmp_path / "file" / "x"})
    assert training.run(2).reused.counts["replayed"] == 3


KILLED = """
import os, signal, sys
import torch
from reuse_models import MiniLM, Training, freeze, words

training = Training(MiniLM, freeze("!classifier.*"), words(), reuse={"folder": sys.argv[1]})
steps = []
step = training.optimizer.step
def stop(*args):
    steps.append(step(*args))
    if len(steps) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
training.optimizer.step = stop
training.run(2)
"""


def test_a_killed_run_goes_on_with_what_was_stored(tmp_path):
    paths = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    again = other_process(tmp_path)
    without, _ = pair()
    assert again.reused.counts["stored"] == 8  # of 24: two batches of three were stored
    assert same_result(without.run(1), again)


@pytest.mark.parametrize("rest", [True, False], ids=["files", "no files"])
def test_a_run_that_was_resumed_between_stages_ends_with_the_same_bits(tmp_path, rest):
    rules = FROZEN + thaw_top_down("layer.2.*", "layer.1.*")
    without, first = pair(rules, folder=tmp_path / "one")
    first.run(2)
    first.reused.close()
    folder = tmp_path / ("one" if rest else "two")
    second = Training(MiniLM, rules, words(), reuse={"folder": folder})
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.losses, second.done = list(first.losses), first.done
    second.run(2)
    assert same_result(without.run(4), second)
    assert second.reused.counts["replayed"] >= (5 if rest else 3)


# ------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": None}, "expected a torch.nn.Module"),
        ({"optimizer": None}, "^reuse: .*expected an optimizer built by Plan.build"),
        ({"store_dtype": "float16"}, "expected 'bfloat16'"),
        ({"store_dtype": torch.float32}, "store_dtype=torch.float32 was given"),
        ({"debug": 2}, "expected a share from 0 to 1"),
        ({"debug": "x"}, "expected a share from 0 to 1"),
        ({"preprocessing": 1}, "preprocessing=1 was given; expected a text"),
        ({"space": "much"}, "expected bytes"),
    ],
)
def test_bad_arguments_change_nothing(change, match):
    training = Training(MiniLM, FROZEN, words())
    given = {"model": training.model, "optimizer": training.optimizer, **change}
    with pytest.raises(lm.PlanError, match=match):
        lm.reuse(given.pop("model"), given.pop("optimizer"), **given)
    assert not training.model._forward_hooks
    assert not training.model._forward_pre_hooks


def test_a_compiled_model_is_refused():
    training = Training(MiniLM, FROZEN, words())
    with pytest.raises(lm.PlanError, match="Compile the parts that train"):
        lm.reuse(torch.compile(training.model, backend="eager"), training.optimizer)


def test_inputs_that_cannot_be_compared_are_told():
    class Batch:
        def __init__(self, x):
            self.x = x

    class Model(nn.Sequential):
        def forward(self, batch):
            return super().forward(batch.x)

    def model():
        return Model(nn.Linear(8, 8), nn.Linear(8, 2))

    def step(training, batch):
        loss = training.model(Batch(batch[0])).square().mean()
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()

    data = (torch.randn(16, 8),)
    without = Training(model, freeze("0.*"), data).run(2, step)
    with pytest.warns(lm.LaminaWarning, match="of type Batch cannot be compared"):
        reusing = Training(model, freeze("0.*"), data, reuse={}).run(2, step)
    assert same_result(without, reusing)


def test_a_plan_whose_bottom_trains_is_told():
    with pytest.warns(lm.LaminaWarning, match="Nothing is reused: nothing is frozen"):
        reusing = Training(MiniLM, freeze("layer.2.*"), words(), reuse={}).run(2)
    assert same_result(Training(MiniLM, freeze("layer.2.*"), words()).run(2), reusing)


@pytest.mark.parametrize("width", [1, 7, 64])
def test_rows_of_several_pieces_come_in_the_order_that_is_asked_for(width):
    pieces = []

    def allocate(piece, rows, width):
        pieces.append(torch.empty(rows, width, dtype=torch.uint8))
        return pieces[-1]

    rows = Rows(width, allocate)
    rows._most = 8
    assert rows.grow(30)
    assert len(pieces) == 4
    stored = torch.randint(256, (30, width), generator=torch.Generator().manual_seed(0)).byte()
    for first in (0, 13):
        rows.write(first, stored[first : first + 17])
    slots = torch.tensor([29, 0, 7, 8, 7, 23, 15, 16])
    assert torch.equal(rows.gather(slots), stored[slots])
    slots = torch.tensor([24, 25])  # all in one piece, which is not the first
    assert torch.equal(rows.gather(slots), stored[slots])


def test_modes_tell_of_each_module_once_at_any_depth():
    model = MiniLM()
    model.again = model.layer[0]
    modules = list(model.modules())
    seen = {modes_of(model)}
    assert len(seen.copy().pop()) == len(modules)
    for module in modules:
        module.training = False
        seen.add(modes_of(model))
        module.training = True
    assert len(seen) == 1 + len(modules)


def test_after_a_probe_nobody_is_told_that_nothing_is_reused(recwarn):
    rules = [lm.Rule("*", thaw="2 epochs"), lm.Rule("classifier.*", frozen=False)]
    training = Training(MiniLM, rules, words(), epochs=3, reuse={}).run()
    assert training.reused.counts["replayed"] == 3
    assert not [one for one in recwarn if "Nothing is reused" in str(one.message)]
