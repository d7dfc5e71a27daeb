"""Training loops as people wrote them for torch: only the import changes, the weights do not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lamina import optim as lamina_optim
from reference.runner import assert_close


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = None
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x):
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet-18's parts and names, narrow."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 2 * width, 4 * width]
        for index in range(4):
            stride = 2 if widths[index] != widths[index + 1] else 1
            blocks = [Block(widths[index], widths[index + 1], stride)]
            blocks.append(Block(widths[index + 1], widths[index + 1], 1))
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(widths[-1], 5)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.fc(x.mean((2, 3)))


def resnet_with_seven_groups(optim):
    model = ResNet().double()
    optimizer = optim.SGD(
        [
            {"params": model.conv1.parameters(), "lr": 1e-4},
            {"params": model.bn1.parameters(), "lr": 1e-4},
            {"params": model.layer1.parameters(), "lr": 1e-4},
            {"params": model.layer2.parameters(), "lr": 3e-4},
            {"params": model.layer3.parameters(), "lr": 1e-3},
            {"params": model.layer4.parameters(), "lr": 3e-3},
            {"params": model.fc.parameters(), "lr": 1e-1},
        ],
        lr=1e-2,
        momentum=0.9,
        weight_decay=5e-4,
    )
    images = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    labels = torch.randint(0, 5, (16,))
    for _ in range(8):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    return model


def two_groups_with_momentum(optim):
    model = nn.ModuleDict({"base": nn.Linear(4, 6), "classifier": nn.Linear(6, 3)}).double()
    optimizer = optim.SGD(
        [
            {"params": model["base"].parameters()},
            {"params": model["classifier"].parameters(), "lr": 1e-3},
        ],
        lr=1e-2,
        momentum=0.9,
    )
    for _ in range(20):
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
        optimizer.zero_grad()
        functional.cross_entropy(model["classifier"](model["base"](x).tanh()), y).backward()
        optimizer.step()
    return model


def lambda_lr_with_a_list(optim):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).double()
    optimizer = optim.Adam(
        [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.1}], lr=0.01
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lr_lambda=[lambda epoch: epoch // 3, lambda epoch: 0.95**epoch]
    )
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(8, 4, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return model


def tied_encoder_and_decoder(optim):
    model = nn.ModuleDict({"encoder": nn.Embedding(9, 5), "decoder": nn.Linear(5, 9)}).double()
    model["decoder"].weight = model["encoder"].weight
    optimizer = optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(15):
        tokens = torch.randint(0, 9, (12,))
        optimizer.zero_grad()
        logits = model["decoder"](model["encoder"](tokens))
        functional.cross_entropy(logits, (tokens + 1) % 9).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def rmsprop(optim):
    model = nn.Linear(4, 2).double()
    optimizer = optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.9, momentum=0.5, centered=True)
    for _ in range(20):
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(8, 4, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    return model


def adam_with_amsgrad_and_a_checkpoint(optim):
    model = nn.Linear(4, 2).double()
    optimizer = optim.Adam(model.parameters(), lr=1e-2, betas=(0.8, 0.99), amsgrad=True)
    for step in range(20):
        if step == 10:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = optim.Adam(model.parameters(), lr=1.0)
            optimizer.load_state_dict(saved)
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
        optimizer.zero_grad()
        model(torch.randn(8, 4, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    return model


def lbfgs_with_a_closure(optim):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    optimizer = optim.LBFGS(model.parameters(), lr=0.8, history_size=5)
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    for _ in range(3):

        def closure():
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return model


def two_heads_used_in_turn(optim):
    """Each step trains one head: the other's moments and its bias correction must wait."""
    model = nn.ModuleDict(
        {"base": nn.Linear(4, 6), "first": nn.Linear(6, 1), "second": nn.Linear(6, 1)}
    ).double()
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    for step in range(15):
        head = model["second" if step % 3 == 2 else "first"]
        optimizer.zero_grad()
        x = torch.randn(8, 4, dtype=torch.float64)
        head(model["base"](x).tanh()).square().mean().backward()
        optimizer.step()
    counts = {float(entry["step"]) for entry in optimizer.state.values()}
    assert counts == {15.0, 10.0, 5.0}
    return model


def muon_and_adamw_side_by_side(optim):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    matrices = [param for param in model.parameters() if param.ndim == 2]
    others = [param for param in model.parameters() if param.ndim != 2]
    optimizers = [optim.Muon(matrices, lr=0.02), optim.AdamW(others, lr=3e-3)]
    for _ in range(10):
        model(torch.randn(8, 4, dtype=torch.float64)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model


def swa(optim):
    model = nn.Linear(4, 2).double()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(8, 4, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    return averaged.module


LOOPS = [
    two_groups_with_momentum,
    resnet_with_seven_groups,
    lambda_lr_with_a_list,
    tied_encoder_and_decoder,
    rmsprop,
    adam_with_amsgrad_and_a_checkpoint,
    lbfgs_with_a_closure,
    two_heads_used_in_turn,
    muon_and_adamw_side_by_side,
    swa,
]


if not hasattr(torch.optim, "Muon"):  # torch has it since 2.9
    LOOPS.remove(muon_and_adamw_side_by_side)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_only_the_import_changes(loop):
    trained = []
    for optim in (lamina_optim, torch.optim):
        torch.manual_seed(0)
        trained.append([param.detach() for param in loop(optim).parameters()])
    one, other = trained
    assert_close(one, other, 1e-12)
