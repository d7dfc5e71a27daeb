"""Every ```python block of the README and the docs runs, and every link between them leads."""

import ast
import importlib
import re
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lamina as lm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: the optimizers that have an example as the optimizer of a plan or a rule
OWN = (lm.SGD, lm.RMSprop, lm.AdamW, lm.LBFGS, lm.Muon, lm.LARS, lm.LAMB, lm.LayerAdaptiveAdam)
TRAINERS = ("peft", "transformers", "lightning.pytorch", "lightning.fabric", "accelerate")
LONGEST = 5.0  # seconds of processor time for one block
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:\s]+)\)")


class Layer(nn.Module):
    """One layer, with the names that BERT's layers have in Transformers."""

    def __init__(self, width):
        super().__init__()
        self.output = nn.Module()
        self.output.dense = nn.Linear(width, width)
        self.output.LayerNorm = nn.LayerNorm(width)

    def forward(self, x):
        return self.output.LayerNorm(x + torch.tanh(self.output.dense(x)))


class Stand(nn.Module):
    """What the pages call `model`: embeddings, `encoder.layer.N`, a classifier."""

    def __init__(self, words=20, width=4, layers=4, classes=2):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(words, width)
        self.embeddings.LayerNorm = nn.LayerNorm(width)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer(width) for _ in range(layers))
        self.classifier = nn.Linear(width, classes)

    def forward(self, words):
        x = self.embeddings.LayerNorm(self.embeddings.word_embeddings(words))
        for layer in self.encoder.layer:
            x = layer(x)
        return self.classifier(x.mean(1))


def blocks(text):
    """The code of each block, and the line of the page on which it begins."""
    return [(match[1], text.count("\n", 0, match.start(1))) for match in BLOCK.finditer(text)]


def namespace():
    """The names that a page may use without defining them; new for each block."""
    torch.manual_seed(0)
    loader = [(torch.randint(20, (8, 5)), torch.randint(2, (8,))) for _ in range(5)]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return {
        "__name__": "a_page",
        "torch": torch,
        "nn": nn,
        "lm": lm,
        "model": Stand(),
        "loader": loader,
        "loss": loss,
    }


def run(code, page, line):
    """Run a block, and say how long it took; a traceback shows the line of the page."""
    tree = ast.increment_lineno(ast.parse(code), line)
    for trainer in TRAINERS:  # the first import of one takes seconds
        if f"import {trainer}" in code or f"from {trainer}" in code or f", {trainer}" in code:
            importlib.import_module(trainer)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"lightning\.")  # about workers, and of itself
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT's own
        exec(compile(tree, str(page), "exec"), namespace())
    return time.process_time() - began


@pytest.mark.parametrize(
    ("page", "code", "line"),
    [
        pytest.param(page, code, line, id=f"{page.relative_to(ROOT)}:{line}")
        for page in PAGES
        for code, line in blocks(page.read_text(encoding="utf-8"))
    ],
)
def test_block_runs(page, code, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block may write files
    assert run(code, page, line) < LONGEST


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_optimizer_has_a_page_and_every_page_its_picture():
    folder = ROOT / "docs" / "optimizers"
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.md"))
    missing = [each.__name__ for each in OWN if f"lm.{each.__name__}, lr=" not in text]
    assert missing == []
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == set(re.findall(r"\]\(([\w-]+\.png)\)", text))
    assert all((folder / name).stat().st_size < 60_000 for name in pictures)


def test_canary_a_block_with_an_error_is_reported():
    page = "# A page\n\n```python\nplan = lm.Plan(lm.AdamW, lr=1e-3)\nplan.biuld(model)\n```\n"
    [(code, line)] = blocks(page)
    with pytest.raises(AttributeError, match="biuld") as report:
        run(code, "page.md", line)
    last = report.traceback[-1]
    assert (str(last.path), last.lineno + 1) == ("page.md", 5)


def test_canary_a_warning_is_an_error():
    with pytest.raises(UserWarning, match="careful"):
        run("import warnings\nwarnings.warn('careful')\n", "page.md", 0)


def test_canary_a_slow_block_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "LONGEST", 0.0)
    with pytest.raises(AssertionError, match="run"):
        test_block_runs("page.md", "sum(range(1000))", 7, tmp_path, monkeypatch)


def test_canary_blocks_are_found():
    assert len(blocks((ROOT / "README.md").read_text(encoding="utf-8"))) >= 1
    assert blocks("```\nnot python\n```\n") == []
    assert blocks("a\n```python\nx = 1\n```\nb\n```python\ny = 2\n```\n") == [
        ("x = 1\n", 2),
        ("y = 2\n", 6),
    ]
