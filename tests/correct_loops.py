"""Correct training loops, after the tutorials of PyTorch and of trainers, small enough for a test.

Each function trains and returns what it trained. Their names are the tests' names.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lamina as lm

LOOPS = {}


def loop(function):
    LOOPS[function.__name__] = function
    return function


def data(batch_size=8, count=40, features=6, classes=3):
    torch.manual_seed(1)
    inputs, targets = torch.randn(count, features), torch.randint(classes, (count,))
    order = torch.Generator().manual_seed(2)
    return DataLoader(TensorDataset(inputs, targets), batch_size, shuffle=True, generator=order)


def network(features=6, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(features, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(16, classes),
    )


@loop
def quickstart():
    model, loader = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(3):
        model.train()
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            sum(F.cross_entropy(model(x), y) for x, y in loader)
    return model


@loop
def gradients_zeroed_by_hand():
    model, loader = network(), data()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    for epoch in range(4):
        for x, y in loader:
            for param in model.parameters():
                if param.grad is not None and epoch % 2:
                    param.grad.zero_()
                else:
                    param.grad = None
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


@loop
def zeroed_in_place():
    model, loader = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


@loop
def amp_with_accumulation():
    model, loader = network(), data(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=15)
    for _ in range(3):
        for number, (x, y) in enumerate(loader):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), y) / 2
            scaler.scale(loss).backward()
            if number % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 2.0)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                optimizer.zero_grad()
    return model


@loop
def amp_that_skips_at_first():
    model, loader = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    for number, (x, y) in enumerate([*loader] * 6):
        optimizer.zero_grad()
        overflow = float("inf") if number < 3 else 1.0
        scaler.scale(F.cross_entropy(model(x), y) * overflow).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    return model


@loop
def amp_disabled():
    model, loader = network(), data()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for x, y in [*loader] * 2:
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        scaler.step(optimizer)
        scaler.update()
    return model


@loop
def gan():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))
    critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    by_critic = torch.optim.Adam(critic.parameters(), lr=2e-4, betas=(0.5, 0.999))
    by_generator = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    loss = nn.BCEWithLogitsLoss()
    for real, _ in [*data()] * 3:
        critic.zero_grad()
        loss(critic(real), torch.ones(len(real), 1)).backward()
        fake = generator(torch.randn(len(real), 4))
        loss(critic(fake.detach()), torch.zeros(len(real), 1)).backward()
        by_critic.step()
        generator.zero_grad()
        loss(critic(fake), torch.ones(len(real), 1)).backward()
        by_generator.step()
    return nn.ModuleList([generator, critic])


@loop
def gan_that_freezes_in_turn():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6))
    critic = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    by_critic = torch.optim.RMSprop(critic.parameters(), lr=1e-4)
    by_generator = torch.optim.RMSprop(generator.parameters(), lr=1e-4)
    for number, (real, _) in enumerate([*data()] * 4):
        noise = torch.randn(len(real), 4)
        critic.requires_grad_(True)
        by_critic.zero_grad()
        (critic(generator(noise).detach()).mean() - critic(real).mean()).backward()
        by_critic.step()
        if number % 3 == 2:
            critic.requires_grad_(False)
            by_generator.zero_grad()
            (-critic(generator(noise)).mean()).backward()
            by_generator.step()
    return nn.ModuleList([generator, critic])


@loop
def transfer_learning():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU())
    for param in backbone.parameters():
        param.requires_grad = False
    model = nn.Sequential(backbone, nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=1e-3, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    loader = data()
    for _ in range(5):
        model.train()
        backbone.eval()
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        scheduler.step()
    return model


@loop
def timm_style():
    model, loader = network(), data()
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    plain = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    total, warm = 6 * len(loader), 5
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=warm),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warm, eta_min=1e-6),
    ]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[warm])
    for _ in range(6):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.5)
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                for mean, param in zip(averaged.parameters(), model.parameters(), strict=True):
                    mean.lerp_(param, 0.01)
    return nn.ModuleList([model, averaged])


@loop
def fastai_style():
    model, loader = network(), data()
    body, head = model[:2], model[4]
    body.requires_grad_(False).eval()
    groups = [{"params": body.parameters(), "lr": 1e-5}, {"params": head.parameters(), "lr": 1e-3}]
    optimizer = torch.optim.Adam(groups)
    for epochs, frozen in ((1, True), (3, False)):
        model.train()
        body.requires_grad_(not frozen).train(not frozen)
        peaks = [1e-5, 1e-3] if frozen else [1e-4, 1e-3]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peaks, epochs=epochs, steps_per_epoch=len(loader)
        )
        for _ in range(epochs):
            for x, y in loader:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return model


@loop
def lbfgs():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    ((x, y),) = data(40)
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(25):
        optimizer.step(closure)
    return model


@loop
def swa():
    model, loader = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    flat = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
    for epoch in range(9):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if epoch > 5:
            averaged.update_parameters(model)
            flat.step()
        else:
            cosine.step()
    torch.optim.swa_utils.update_bn(loader, averaged)
    return averaged


@loop
def gradient_checkpointing():
    from torch.utils.checkpoint import checkpoint

    model, loader = network(), data()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for x, y in [*loader] * 2:
        optimizer.zero_grad()
        hidden = checkpoint(model[:3], x, use_reentrant=False)
        F.cross_entropy(model[3:](hidden), y).backward()
        optimizer.step()
    return model


@loop
def language_model_with_tied_weights():
    torch.manual_seed(0)

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Embedding(20, 8)
            self.rnn = nn.LSTM(8, 8, batch_first=True)
            self.decoder = nn.Linear(8, 20)
            self.decoder.weight = self.encoder.weight

        def forward(self, words):
            return self.decoder(self.rnn(self.encoder(words))[0])

    model = Words()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    text = torch.randint(20, (4, 60))
    for at in range(0, 48, 4):
        model.zero_grad()
        out = model(text[:, at : at + 8])
        F.cross_entropy(out.flatten(0, 1), text[:, at + 1 : at + 9].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        if at % 16 == 12:
            for group in optimizer.param_groups:
                group["lr"] /= 4.0
    return model


@loop
def momentum_encoder():
    model, loader = network(), data()
    target = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    for x, _ in [*loader] * 3:
        with torch.no_grad():
            for mean, param in zip(target.parameters(), model.parameters(), strict=True):
                mean.mul_(0.99).add_(param, alpha=0.01)
            wanted = target(x)
        optimizer.zero_grad()
        F.mse_loss(model(x + 0.1), wanted).backward()
        optimizer.step()
    return nn.ModuleList([model, target])


@loop
def distillation():
    torch.manual_seed(5)
    teacher = nn.Sequential(
        nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)
    ).eval()
    student, loader = network(), data()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    for x, _ in [*loader] * 2:
        with torch.no_grad():
            soft = teacher(x).softmax(-1)
        optimizer.zero_grad()
        F.cross_entropy(student(x), soft).backward()
        optimizer.step()
    return student


@loop
def actor_and_critic():
    torch.manual_seed(0)
    actor, critic = nn.Linear(6, 2), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    target = copy.deepcopy(critic)
    by_actor = torch.optim.Adam(actor.parameters(), lr=1e-4)
    by_critic = torch.optim.Adam(critic.parameters(), lr=1e-3)
    for x, y in [*data()] * 3:
        with torch.no_grad():
            wanted = y[:, None].float() + 0.9 * target(torch.cat([x, actor(x)], 1))
        by_critic.zero_grad()
        F.mse_loss(critic(torch.cat([x, actor(x).detach()], 1)), wanted).backward()
        by_critic.step()
        by_actor.zero_grad()
        (-critic(torch.cat([x, actor(x)], 1)).mean()).backward()
        by_actor.step()
        with torch.no_grad():
            for old, new in zip(target.parameters(), critic.parameters(), strict=True):
                old.lerp_(new, 0.05)
    return nn.ModuleList([actor, critic, target])


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation around another optimizer, in two steps."""

    def __init__(self, params, base, **settings):
        super().__init__(params, settings)
        self.base = base(self.param_groups, **settings)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def climb(self):
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["climbed"] = 0.05 * param.grad
                param.add_(self.state[param]["climbed"])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(self.state[param]["climbed"])
        self.base.step()


@loop
def sharpness_aware():
    model, loader = network(), data()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.01, momentum=0.9)
    for x, y in [*loader] * 2:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.climb()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@loop
def two_phases():
    model, loader = network(), data()
    head = model[4]
    model[:2].requires_grad_(False).eval()
    for params, lr in ((head.parameters(), 1e-2), (model.parameters(), 1e-3)):
        optimizer = torch.optim.Adam(params, lr=lr)
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        model.requires_grad_(True).train()
    return model


@loop
def folds():
    models = []
    for fold in range(5):
        model, loader = network(), data()
        torch.manual_seed(fold)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for x, y in [*loader][:3]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        models.append(model)
    return nn.ModuleList(models)


@loop
def plateau():
    model, loader = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(6):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        scheduler.step(1.0)
    return model


@loop
def embeddings_with_sparse_gradients():
    torch.manual_seed(0)
    words, head = nn.Embedding(50, 8, sparse=True), nn.Linear(8, 2)
    by_words = torch.optim.SparseAdam(words.parameters(), lr=1e-2)
    by_head = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(12):
        by_words.zero_grad()
        by_head.zero_grad()
        F.cross_entropy(head(words(torch.randint(50, (8,)))), torch.randint(2, (8,))).backward()
        by_words.step()
        by_head.step()
    return nn.ModuleList([words, head])


@loop
def an_optimizer_for_each_parameter():
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(6, 6) for _ in range(110))
    optimizers = {param: torch.optim.SGD([param], lr=1e-3) for param in model.parameters()}

    def update(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(update)
    for x, _ in data():
        for layer in model:
            x = x + 0.1 * layer(x)
        x.square().mean().backward()
    for param in model.parameters():
        param._post_accumulate_grad_hooks.clear()
    return model


@loop
def warmup_by_epochs_and_restarts_by_hand():
    model, loader = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for epoch in range(6):
        for group in optimizer.param_groups:
            group["lr"] = [1e-6, 2e-3, 4e-3, 1e-5, 4e-3, 1e-5][epoch]
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


@loop
def a_long_schedule_that_is_cut_off():
    model, loader = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24)
    for _ in range(5):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        scheduler.step()
    return model


@loop
def frozen_group_with_lr_zero():
    model, loader = network(), data()
    model[0].requires_grad_(False)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[4].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    model[1].requires_grad_(False).eval()
    for x, y in [*loader] * 2:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@loop
def a_plan_of_lamina():
    model, loader = network(), data()
    rules = [
        lm.Rule("0.*", frozen=True),
        lm.Rule("1.*", lr=1e-4, thaw=10),
        lm.Rule("4.*", clip_norm=1.0),
    ]
    optimizer = lm.Plan(lm.AdamW, lr=1e-3, schedule=lm.warmup(3) >> lm.cosine(), rules=rules).build(
        model, steps=15
    )
    for x, y in [*loader] * 3:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@loop
def a_plan_with_a_guest():
    model, loader = network(), data()
    rules = [lm.Rule("4.*", optimizer=torch.optim.NAdam, lr=1e-3)]
    optimizer = lm.Plan(lm.SGD, lr=1e-2, momentum=0.9, rules=rules).build(model, steps=10)
    for x, y in [*loader] * 2:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@loop
def drop_ins_of_lamina():
    model, loader = network(), data()
    optimizer = lm.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = lm.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15)
    for x, y in [*loader] * 3:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    return model
