"""Fine-tune MiniLM on film reviews with Transformers' Trainer: python examples/with_transformers.py

The same model, texts and plan as the example task `reviews` (tasks/reviews.toml).
"""

import sys
from pathlib import Path

import torch
import transformers

from lamina.integrations.transformers import use_plan

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
import reviews
from task_helpers.snippets import collate


class Trainer(transformers.Trainer):
    """The loss of the task, whose model returns logits."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        """Return the mean cross entropy, and the logits to measure."""
        logits = model(inputs["input_ids"], inputs["attention_mask"])
        loss = torch.nn.functional.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def accuracy(predicted):
    """Return the share of texts that were judged right."""
    return {"accuracy": float((predicted.predictions.argmax(1) == predicted.label_ids).mean())}


data = reviews.data()
transformers.set_seed(0)
trainer = Trainer(
    reviews.model(),
    transformers.TrainingArguments(
        "build/with_transformers",
        num_train_epochs=3,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=28,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    ),
    data_collator=collate,
    train_dataset=data["train"].dataset,
    eval_dataset=data["validation"].dataset,
    compute_metrics=accuracy,
)
use_plan(trainer, reviews.PLAN)
trainer.train()
measured = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
print(f"accuracy {measured[-1]['eval_accuracy']:.3f}")
