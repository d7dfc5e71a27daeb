"""Small models of many shapes for the tests of reuse, and a loop that trains them."""

import torch
from torch import nn
from torch.nn import functional as F

import lamina as lm


class Attention(nn.Module):
    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x, mask=None):
        size, length, width = x.shape
        parts = self.query_key_value(x).view(size, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(size, length, width))


class Layer(nn.Module):
    """A layer of BERT; returns a tuple, as in Transformers."""

    def __init__(self, width=16, dropout=0.1):
        super().__init__()
        self.attention = Attention(width, 2)
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)
        self.out_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden, *, mask=None):
        hidden = self.norm(hidden + self.dropout(self.attention(hidden, mask=mask)))
        return (self.out_norm(hidden + self.dropout(self.out(F.gelu(self.dense(hidden))))), None)


class Embeddings(nn.Module):
    def __init__(self, words=50, width=16):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = nn.Embedding(32, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("ids", torch.arange(32))

    def forward(self, words):
        places = self.ids[: words.shape[1]]
        return self.dropout(self.norm(self.words(words) + self.positions(places)))


class MiniLM(nn.Module):
    """Embeddings, numbered layers with a mask, mean pooling, a classifier; returns a dict."""

    def __init__(self, layers=3, width=16):
        super().__init__()
        self.embeddings = Embeddings(width=width)
        self.layer = nn.ModuleList(Layer(width) for _ in range(layers))
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(width, 2)

    def forward(self, words, mask):
        hidden = self.embeddings(words)
        seen = (mask[:, None, None, :] > 0).expand(-1, 1, mask.shape[1], -1)
        for layer in self.layer:
            hidden, _ = layer(hidden, mask=seen)
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {"logits": self.classifier(self.dropout(pooled))}


class GPT2(nn.Module):
    """Token and position embeddings added outside of modules, causal blocks, a tied head."""

    def __init__(self, words=40, width=16, layers=3):
        super().__init__()
        self.wte = nn.Embedding(words, width)
        self.wpe = nn.Embedding(16, width)
        self.h = nn.ModuleList(GPT2Block(width) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.score = nn.Linear(width, 2, bias=False)

    def forward(self, words):
        hidden = self.wte(words) + self.wpe(torch.arange(words.shape[1]))
        for block in self.h:
            hidden = block(hidden)
        return self.score(self.ln_f(hidden)[:, -1])


class GPT2Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, 2, causal=True)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class BasicBlock(nn.Module):
    """A residual block of ResNet-18, with ReLU in place."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.downsample = nn.Sequential(
            nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
        )

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1, self.layer2 = BasicBlock(8, 8, 1), BasicBlock(8, 16, 2)
        self.fc = nn.Linear(16, 2)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU6()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1, groups=2 * width, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU6(inplace=True),
        )
        self.project = nn.Sequential(
            nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x):
        return x + self.project(self.depthwise(self.expand(x)))


class EfficientNet(nn.Module):
    """Stem, inverted residuals, head, pooling, dropout and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.blocks = nn.Sequential(InvertedResidual(8), InvertedResidual(8))
        self.head = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU6())
        self.flatten = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(16, 2)

    def forward(self, x):
        return self.classifier(self.dropout(self.flatten(self.head(self.blocks(self.stem(x))))))


class UNet(nn.Module):
    """Two encoders whose outputs skip to the decoders."""

    def __init__(self):
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up2 = nn.Conv2d(16, 4, 3, padding=1)
        self.up1 = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x):
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        low = F.interpolate(self.middle(F.max_pool2d(two, 2)), scale_factor=2)
        high = F.interpolate(torch.relu(self.up2(torch.cat([low, two], 1))), scale_factor=2)
        return self.up1(torch.cat([high, one], 1)).mean((2, 3))


class TwoHeads(nn.Module):
    """A shared body with two heads; a module that is called twice; hidden states in a list."""

    def __init__(self, width=8):
        super().__init__()
        self.body = nn.ModuleDict({"a": nn.Linear(width, 8), "b": nn.Linear(8, 8)})
        self.shared = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.first, self.second = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x):
        states = [torch.tanh(self.body["a"](x))]
        states.append(self.shared(states[0]))
        states.append(self.shared(self.body["b"](states[-1])))
        return self.first(states[-1]), self.second(states[1] + states[-1])


def words(count=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(40, (count, 8), generator=generator)
    mask = (torch.rand(count, 8, generator=generator) < 0.8).float()
    mask[:, 0] = 1
    return ids, mask


def images(count=24, seed=1):
    return (torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)),)


def points(count=24, seed=1, width=8):
    return (torch.randn(count, width, generator=torch.Generator().manual_seed(seed)),)


def freeze(pattern):
    return [lm.Rule(pattern, frozen=True)]


def thaw_top_down(*patterns):
    """Thaw parts one epoch after the other, the first after one epoch."""
    return [lm.Rule(pattern, thaw=f"{n} epochs") for n, pattern in enumerate(patterns, start=1)]


def plain(output):
    """The sum over all heads of an output, as a loss."""
    if isinstance(output, dict):
        output = output["logits"]
    parts = output if isinstance(output, tuple) else (output,)
    return sum(part.square().mean() for part in parts)


class Training:
    """Trains a model on shuffled batches; all that is random follows from the seed."""

    def __init__(
        self, model, rules, data, *, optimizer=lm.AdamW, epochs=4, batch=8, reuse=None, lr=1e-2
    ):
        torch.manual_seed(0)
        self.model = model()
        self.data, self.batch, self.epochs = data, batch, epochs
        steps = -(-len(data[0]) // batch)
        plan = lm.Plan(optimizer, lr=lr, rules=rules)
        self.optimizer = plan.build(self.model, epochs=epochs, steps_per_epoch=steps)
        self.reused = None
        if reuse is not None:
            self.reused = lm.reuse(self.model, self.optimizer, **reuse)
        self.losses = []
        self.done = 0

    def epoch(self, step=None):
        torch.manual_seed(10 + self.done)
        self.done += 1
        places = torch.randperm(len(self.data[0]))
        for chosen in places.split(self.batch):
            batch = [part[chosen] for part in self.data]
            if step is not None:
                step(self, batch)
                continue
            loss = plain(self.model(*batch))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())

    def run(self, epochs=None, step=None):
        for _ in range(self.epochs if epochs is None else epochs):
            self.epoch(step)
        return self

    def result(self):
        """The losses, and all weights and buffers."""
        return self.losses, {name: t.clone() for name, t in self.model.state_dict().items()}


def same_result(one, other):
    """Whether two trainings ended with the same bits."""
    (losses, state), (other_losses, other_state) = one.result(), other.result()
    return losses == other_losses and all(torch.equal(state[k], other_state[k]) for k in state)
