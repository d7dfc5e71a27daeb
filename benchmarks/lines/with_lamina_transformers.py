"""The Trainer of Transformers, with a plan."""

from pathlib import Path

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from lamina.integrations.transformers import use_plan
from scenario import ACCUMULATE, BATCH, EPOCHS, eval_data, make_model

PLAN = Path(__file__).with_name("plan.toml")


def train(folder, data):
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATE,
        train_sampling_strategy="sequential",
        eval_strategy="epoch",
        save_strategy="steps",
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(make_model(), arguments, train_dataset=data, eval_dataset=eval_data())
    use_plan(trainer, PLAN)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    return trainer.model
