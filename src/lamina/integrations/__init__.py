"""Use a plan in other people's trainers: one module for each, imported by name.

    from lamina.integrations.transformers import use_plan
    from lamina.integrations.lightning import PlanCallback
    from lamina.integrations.accelerate import prepare

Each does the same four things where the trainer wants them done: it builds the optimizer with the
length that the trainer computes, keeps the trainer from clipping a second time, hands metrics to
`Optimizer.report` and ends the training when `Optimizer.should_stop` says so.
"""
