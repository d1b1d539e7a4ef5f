"""What transformers' Trainer, and those derived from it, need beyond the optimizer: one callback."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manic.integrations.deepspeed import whole_model_steps
from manic.unwrap import unwrap

__all__ = ["MechanicCallback"]


class MechanicCallback(TrainerCallback):
    """Logs S * lr as ``learning_rate``, the schedule's lr as ``base_learning_rate``, and S as ``scale``.

    With a scale per group ``scale/<i>`` are the groups', and ``learning_rate`` is the first group's. Each log is one
    host sync. Schedules are not touched.

    ``MechanicCallback.add_to(trainer)`` puts it before the reporters of ``report_to``, such as TensorBoard's, so that
    they get these values. In ``Trainer(callbacks=[...])`` it comes after them: ``log_history``, printed lines and
    progress bars have the values then, reporters do not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._trainer: Trainer | None = None

    @classmethod
    def add_to(cls, trainer: Trainer) -> MechanicCallback:
        """Add a new callback to ``trainer``, before all others.

        If the trainer uses DeepSpeed, the callback also calls
        :func:`~manic.integrations.deepspeed.whole_model_steps` once there is an engine: the Trainer makes two param
        groups, which ZeRO steps one by one.

        Returns:
            The callback.
        """
        callback = cls()
        callback._trainer = trainer
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let DeepSpeed's param groups share a step."""
        if self._trainer is not None and self._trainer.is_deepspeed_enabled:
            whole_model_steps(self._trainer.deepspeed)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Put the values into ``logs`` and into the state's ``log_history``."""
        if not logs or "learning_rate" not in logs:  # logs of an evaluation, or of the end
            return
        metrics = unwrap(optimizer).metrics(to_host=True)
        scales = {name: value for name, value in metrics.items() if name.partition("/")[0] == "scale"}
        lr = logs["learning_rate"]  # of the last step: the schedule has gone on since
        own = {"learning_rate": next(iter(scales.values())) * lr, "base_learning_rate": lr, **scales}
        logs.update(own)
        if state.log_history:
            state.log_history[-1].update(own)
