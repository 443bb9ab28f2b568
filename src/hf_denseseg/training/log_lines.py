"""One tidy line per log entry: step, loss, learning rate, time left; above the progress bar where there is one."""

import time
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

TIMING = ("runtime", "per_second", "_loss", "jit_compilation_time")  # parts of names of an evaluation's other entries


class _Clock:
    """Time since training began, and the step that it began with."""

    started, first_step = 0.0, 0

    def start(self, state: TrainerState) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step

    def line(self, logs: Mapping[str, Any], state: TrainerState) -> str:
        """The line of an entry."""
        done = state.global_step - self.first_step
        left = (time.monotonic() - self.started) / max(done, 1) * (state.max_steps - state.global_step)
        return log_line(logs, state.global_step, state.max_steps, left)


class LogPrinter(TrainerCallback):
    """Prints a line where transformers prints a dictionary."""

    def __init__(self) -> None:
        self.clock = _Clock()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock."""
        self.clock.start(state)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Print the line."""
        if state.is_local_process_zero and logs:
            print(self.clock.line(logs, state), flush=True)


class LogProgress(ProgressCallback):
    """As in transformers, with a line above the bar where transformers writes a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = _Clock()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock and the bar."""
        self.clock.start(state)
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Write the line."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(self.clock.line(logs, state))


def use_lines(trainer: Any) -> None:
    """Replace the callback with which transformers shows log entries."""
    for theirs, ours in ((PrinterCallback, LogPrinter), (ProgressCallback, LogProgress)):
        # Not a subclass of theirs, such as that of notebooks, which shows a table.
        if any(type(each) is theirs for each in trainer.callback_handler.callbacks):
            trainer.remove_callback(theirs)
            trainer.add_callback(ours)


def log_line(logs: Mapping[str, Any], step: int, total: int, seconds_left: float) -> str:
    """An entry of the log as text.

    Args:
        logs: as transformers logs them: of training, of an evaluation (`eval_...`), or of the end (`train_...`).
        step: number of steps done.
        total: number of steps of the run; 0 where a checkpoint is only evaluated.
        seconds_left: until the last step.
    """
    place = f"step {step:>{len(str(total))}}/{total}"
    if "train_runtime" in logs:
        return f"{place}  {duration(float(logs['train_runtime']))} of training"
    scores = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
    if scores:
        shown = (
            f"{name} {number(value)}" for name, value in scores.items() if not any(part in name for part in TIMING)
        )
        return (f"{place}  " if total else "") + "evaluation: " + ", ".join(shown)
    names = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad norm"}
    known = [f"{short} {number(logs[name])}" for name, short in names.items() if name in logs]
    others = [f"{name} {number(value)}" for name, value in logs.items() if name not in (*names, "epoch", "total_flos")]
    return "  ".join([place, *known, *others, f"{duration(seconds_left)} left"])


def number(value: Any) -> str:
    """A number with four digits; transformers logs some as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Seconds as "45 s", "12 min" or "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
