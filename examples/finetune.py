"""Fine-tune a pretrained encoder in a training loop of one's own: python examples/finetune.py"""

import sys
from pathlib import Path

import lamina as lm

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
import reviews

EPOCHS = 1

plan = lm.Plan(
    lm.AdamW,
    lr=1.5e-4,
    weight_decay=0.01,
    schedule=lm.warmup("6%") >> lm.cosine(to=0.01),
    clip_norm=1.0,
    rules=[
        lm.Rule("encoder.layer.{depth}.*", lr=lm.by_depth(0.9), thaw=lm.top_down("0.15 epochs")),
        lm.Rule("embeddings.*", frozen=True),
        lm.Rule("classifier.*", lr=1e-3, clip_norm=0.5),
        lm.Rule("*.bias | type:LayerNorm", weight_decay=0),
    ],
)

model, loaders = reviews.model(), reviews.data()
print(plan.preview(model, epochs=EPOCHS, steps_per_epoch=len(loaders["train"])))
optimizer = plan.build(model, epochs=EPOCHS, steps_per_epoch=len(loaders["train"]))
for _ in range(EPOCHS):
    for batch in loaders["train"]:
        loss = reviews.loss(model, batch)
        loss.backward()
        optimizer.step()  # clips, updates, moves every learning rate, thaws on time
        optimizer.zero_grad()
        if optimizer.clock % 8 == 0:
            print(f"step {optimizer.clock}  loss {loss.item():.3f}")
print(optimizer.explain("encoder.layer.3.output.dense.weight"))
