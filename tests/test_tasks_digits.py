import gzip

import pytest
import torch
from torch import nn
from torch.nn import functional

import digits
import lamina as lm
from lamina.errors import TaskError
from lamina.training.example_tasks import example_tasks
from lamina.training.load import load_task
from task_helpers.lite0 import Block, Lite0, SameConv, load_pretrained, normalised

# ------------------------------------------------------------------------------------- the images


def write(path, rows):
    path.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode()))


def test_reading(tmp_path):
    path = tmp_path / "digits.csv.gz"
    write(path, [[*range(28), *[0] * (27 * 28), 7], [*[255] * 784, 0]])
    images, labels = digits.read_digits(path)
    assert images.shape == (2, 28, 28)
    assert images.dtype == torch.uint8
    assert images[0, 0].tolist() == list(range(28))
    assert images[1].min() == 255
    assert labels.tolist() == [7, 0]


@pytest.mark.parametrize(
    "rows", [[[0] * 784], [[256] * 784 + [1]], [[0] * 784 + [10]], [["x"] * 785], [[-1] * 785]]
)
def test_digits_that_cannot_be_read_are_told(tmp_path, rows):
    path = tmp_path / "digits.csv.gz"
    write(path, rows)
    with pytest.raises(TaskError, match=r"digits\.csv\.gz cannot be read.*to fetch them anew"):
        digits.read_digits(path)


def test_a_damaged_file_is_told(tmp_path):
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(b"half")
    with pytest.raises(TaskError, match="cannot be read"):
        digits.read_digits(path)


def test_the_split_is_fixed_balanced_and_shares_nothing():
    labels = torch.arange(300) % 10
    train, held_out = digits.split(labels, 100, 50, seed=1)
    assert torch.bincount(labels[train]).tolist() == [10] * 10
    assert torch.bincount(labels[held_out]).tolist() == [5] * 10
    assert not set(train.tolist()) & set(held_out.tolist())
    again = digits.split(labels, 100, 50, seed=1)
    assert torch.equal(train, again[0])
    assert not torch.equal(train, digits.split(labels, 100, 50, seed=2)[0])
    with pytest.raises(TaskError, match=r"25 training.* the digit 0.*only 30"):
        digits.split(labels, 250, 100, seed=1)


def test_a_batch_is_enlarged_grey_and_scaled():
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[10:12, 10:12] = 255
    batch = digits.collate([(image, torch.tensor(3)), (255 - image, torch.tensor(4))])
    images = batch["images"]
    assert images.shape == (2, 3, digits.PIXELS, digits.PIXELS)
    assert torch.equal(images[:, 0], images[:, 2])
    assert float(images[0, 0, 0, 0]) == -127 / 128
    assert float(images[0].max()) == 1.0
    assert batch["labels"].tolist() == [3, 4]


# ------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize("size", [7, 8, 9, 56])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2)])
def test_same_padding_has_its_sizes_and_values(size, kernel, stride):
    torch.manual_seed(0)
    conv = SameConv(2, 3, kernel, stride, bias=False).double()
    x = torch.randn(1, 2, size, size + 1, dtype=torch.float64)
    y = conv(x)
    assert y.shape[2:] == (-(-size // stride), -(-(size + 1) // stride))
    # Oracle: TensorFlow's definition, each output from the window that begins at
    # i * stride - floor(total / 2), with zeros outside.
    before = [max((-(-n // stride) - 1) * stride + kernel - n, 0) // 2 for n in (size, size + 1)]
    wide = functional.pad(x, (kernel,) * 4)
    for i, j in ((0, 0), (1, 2), (y.shape[2] - 1, y.shape[3] - 1)):
        top, left = (kernel + k * stride - b for k, b in zip((i, j), before, strict=True))
        window = wide[0, :, top : top + kernel, left : left + kernel]
        expected = torch.einsum("chw,ochw->o", window, conv.weight)
        torch.testing.assert_close(y[0, :, i, j], expected)


def test_the_network_has_the_published_shape():
    model = Lite0(1000)
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    names = dict(model.named_parameters())
    assert names["_blocks.3._depthwise_conv.weight"].shape == (144, 1, 5, 5)
    assert names["_blocks.15._project_conv.weight"].shape == (320, 1152, 1, 1)
    assert "_blocks.0._expand_conv.weight" not in names
    strides = [block._depthwise_conv.stride[0] for block in model._blocks]
    assert [i for i, stride in enumerate(strides) if stride == 2] == [1, 3, 5, 11]
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.01}


def test_a_block_is_a_shortcut_plus_its_path():
    torch.manual_seed(0)
    block = Block(4, 4, 3, 1, 6).eval()
    x = torch.randn(2, 4, 6, 6)
    nn.init.zeros_(block._bn2.weight)
    assert torch.equal(block(x), x)
    assert not Block(4, 4, 3, 2, 6).shortcut
    assert not Block(4, 8, 3, 1, 6).shortcut


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    model = Lite0(10)
    batch = {"images": torch.randn(2, 3, 32, 32), "labels": torch.tensor([1, 2])}
    digits.loss(model, batch).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_metrics_are_per_image_and_average_to_the_loss():
    torch.manual_seed(0)
    model = Lite0(10).eval()
    batch = {"images": torch.randn(3, 3, 32, 32), "labels": torch.tensor([1, 2, 3])}
    found = digits.metrics(model, batch)
    assert {name: value.shape for name, value in found.items()} == {
        "loss": (3,),
        "accuracy": (3,),
    }
    torch.testing.assert_close(found["loss"].mean(), digits.loss(model, batch))


def test_pretrained_weights_are_loaded_or_refused(tmp_path):
    path = tmp_path / "model.pth"
    saved = Lite0(1000)
    torch.save(saved.state_dict(), path)
    model = load_pretrained(path, 10)
    assert torch.equal(model._conv_stem.weight, saved._conv_stem.weight)
    assert model._fc.weight.shape == (10, 1280)
    assert torch.equal(load_pretrained(path)._fc.weight, saved._fc.weight)

    torch.save({"else": torch.zeros(1)}, path)
    with pytest.raises(TaskError, match=r"cannot be loaded.*fetch it anew"):
        load_pretrained(path, 10)
    torch.save({k: v for k, v in saved.state_dict().items() if "_fc" not in k}, path)
    with pytest.raises(TaskError, match=r"missing \['_fc\.weight', '_fc\.bias'\]"):
        load_pretrained(path)
    for damaged in (b"half", b""):
        path.write_bytes(damaged)
        with pytest.raises(TaskError, match=r"cannot be loaded.*fetch it anew"):
            load_pretrained(path, 10)
    with pytest.raises(TaskError, match="cannot be loaded"):
        load_pretrained(tmp_path / "absent.pth", 10)


# --------------------------------------------------------------------------------------- the plan


def test_the_plan_thaws_from_the_top_and_batch_norm_rests():
    model = Lite0(10)
    plan = lm.Plan.from_toml(digits.PLAN)
    optimizer = plan.build(model, epochs=digits.DEFAULTS["epochs"], steps_per_epoch=25)
    model.train()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"_fc.weight", "_fc.bias", "_conv_head.weight"}
    begins = {}
    for cell in optimizer.resolved.cells:
        for info in cell.parameters:
            begins[info.name] = cell.windows[0][0] if cell.windows else None
    order = [begins[f"_blocks.{depth}._project_conv.weight"] for depth in range(16)]
    assert order == sorted(order, reverse=True)
    assert len(set(order)) > 10
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 49
    assert not any(m.training for m in norms)
    assert [finding.code for finding in optimizer.findings] == []


def test_it_is_an_example_task():
    task = load_task("digits", example_tasks())
    assert task.module.__file__ == digits.__file__
    assert task.file is None  # a run names it without its file
    assert task.plan() == lm.Plan.from_toml(digits.PLAN)
    assert task.about.endswith("which digit was written by hand?")
    assert set(digits.DEFAULTS) == {"epochs", "batch_size", "seed"}


@pytest.mark.network
def test_the_real_network_knows_imagenet_and_learns_digits():
    from task_helpers.fetch import fetch

    network = load_pretrained(fetch(digits.NETWORK) / "model.pth").eval()
    with torch.no_grad():
        flat = network(normalised(torch.full((1, 3, 224, 224), 127.0)))
    assert flat.shape == (1, 1000)
    torch.manual_seed(0)
    model, parts = digits.model(), digits.data(batch_size=16)
    sizes = [len(parts[part].dataset) for part in ("train", "validation")]
    assert sizes == [digits.TRAIN_IMAGES, digits.HELD_OUT_IMAGES]
    batch = next(iter(parts["train"]))
    plan = lm.Plan.from_toml(digits.PLAN)
    optimizer = plan.build(model, steps=20, audit=True)
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    losses = []
    for _ in range(6):
        value = digits.loss(model.train(), batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())
