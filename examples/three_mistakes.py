"""An ordinary PyTorch script with three mistakes that raise no error.

    python examples/three_mistakes.py
    lamina watch examples/three_mistakes.py

It fine-tunes a small Transformer on made-up sentences: a sentence is of class 1 if one of the words
below 30 is in it. `docs/how-to/watch.md` shows what a watch says of it.
"""

import torch
from torch import nn
from torch.nn import functional

STEPS, BATCH, WORDS = 150, 16, 100


class Classifier(nn.Module):
    """Embeddings, two encoder layers, and a linear head over their mean."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.embeddings = nn.Embedding(WORDS, 32)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.classifier = nn.Linear(32, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch of sentences."""
        return self.classifier(self.encoder(self.embeddings(tokens)).mean(dim=1))


def main() -> None:
    """Train for some steps, and print the loss now and then."""
    torch.manual_seed(0)
    model = Classifier()
    model.embeddings.requires_grad = False  # 1: an attribute of the module, which freezes nothing
    groups = [
        {"params": model.embeddings.parameters(), "lr": 1e-5},
        {"params": model.encoder.parameters(), "lr": 1e-4},
        {"params": model.classifier.parameters(), "lr": 1e-3},
    ]
    optimizer = torch.optim.AdamW(groups)
    # 2: a floor for all groups, which is ten times the lr of the embeddings
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS, eta_min=1e-4)
    model.classifier = nn.Linear(32, 2)  # 3: a new head, which is in no optimizer
    for step in range(STEPS):
        tokens = torch.randint(WORDS, (BATCH, 8))
        loss = functional.cross_entropy(model(tokens), (tokens < 30).any(dim=1).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
