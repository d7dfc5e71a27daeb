"""The texts that a newcomer reads first: the help of each command, kept as they are."""

import re

import pytest
from typer.testing import CliRunner

from lamina.cli.app import app

COMMANDS = """
run       Preview the plan, train TASK with it, and print the results.
show      Preview a plan on the model of TASK, without training.
plot      Draw the learning rates of a plan, and when each group trains.
check     Look for mistakes in a plan, without training.
explain   Explain where each value of one parameter comes from.
diff      Show what changes between two plans: parameters, steps, values.
new-task  Write a small, complete task file to start from.
init      Write a commented starter plan for a model.
find-lr   Suggest a learning rate for TASK, by a range test on a copy.
tasks     List the example tasks of a clone of lamina.
report    Write the report of a run, finished or not, as one HTML file.
compare   Compare two runs: settings, plan, learning rates and metrics.
inspect   Describe a checkpoint or a run folder.
watch     Run a training script unchanged, and report its mistakes.
"""
NAMES = [line.split()[0] for line in COMMANDS.strip().splitlines()]

#: options and what is said of them, in every command that has them
OPTIONS = {
    "--task": "The task, instead of the TASK argument.",
    "--epochs": "Passes over the training data.",
    "--steps": "Length of the run in optimizer steps, instead of --epochs.",
    "--accumulate": "Batches per optimizer step (gradient accumulation).",
    "--mixed-precision": "Numeric precision: no, fp16 or bf16.",
    "--cpu": "Train on the CPU, even if there is an accelerator.",
    "--resume": "Folder of the run to resume.",
    "--seed": "Random seed for weights,",
    "--repeats": "Number of tests, each on other batches; at least 3.",
    "--full": "Show every group; fold none.",
    "--json": "Print JSON, for scripts.",
    "--ignore": "Code of a finding that is intended; repeatable.",
}


def help_of(*words):
    result = CliRunner().invoke(app, [*words, "--help"], prog_name="lamina")
    assert result.exit_code == 0
    return result.stdout


def test_the_commands_are_listed_by_purpose_in_whole_lines():
    listed = help_of().split("Commands:\n")[1].split("\n\n")[0]
    assert [line.strip() for line in listed.splitlines()] == COMMANDS.strip().splitlines()


@pytest.mark.parametrize("command", NAMES)
def test_options_are_explained_alike(command):
    text = help_of(command)
    flat = " ".join(text.split())
    found = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)
    assert set(found) >= {"--help"}
    for option in set(found) & set(OPTIONS):
        if (command, option) != ("find-lr", "--steps"):
            assert OPTIONS[option] in flat, (command, option)
    # a person is told what a value is, in a sentence
    assert "..." not in flat.split("Options:")[1]
