"""What a training writes down at some of its steps, and the first loss that is no number.

`metrics.jsonl` and `visits.jsonl` hold one JSON object a line, in the order of their steps. They never run ahead of the
checkpoint that a sitting begins with: what belongs to steps that will be done again is cut off first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ratlip.errors import RunError
from ratlip.files import named, write_text
from ratlip.networks.losses import DiscriminatorLoss, GeneratorLoss

if TYPE_CHECKING:
    from lightning_fabric import Fabric

VISITS = "visits.jsonl"


def read_rows(path: Path) -> list[dict]:
    """The rows of a file with one JSON object a line, each with its `step`; none where there is no file.

    A last line that a kill has cut short does not count. RunError names a line that is no row, or that runs backwards.
    """
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    found: list[dict] = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            ahead = type(row["step"]) is int and row["step"] > (found[-1]["step"] if found else 0)
        except (ValueError, TypeError, KeyError):
            ahead = False
        if not ahead:
            mend = "two processes wrote it, or it is damaged; delete the run's folder to train it anew"
            raise RunError(f"{path}: line {number} is no row, or of a step before the last one: {mend}")
        found.append(row)
    return found


def cut(path: Path, step: int) -> list[dict]:
    """The rows up to `step`, all others removed from the file."""
    kept = [row for row in read_rows(path) if row["step"] <= step]
    if path.is_file():
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def append(path: Path, row: dict) -> None:
    """Write one row at the end of the file. ValueError where a number is not finite."""
    line = json.dumps(row, allow_nan=False) + "\n"
    with named(path), path.open("a", encoding="utf-8") as file:
        file.write(line)


class Losses:
    """The terms of both losses at a step, and the first step at which one of them was not finite.

    Noting them does not wait for the device: whether all are finite is kept beside them and looked at where the loop
    waits anyway, before anything of that step is written. On a CPU there is nothing to wait for: each step is checked.
    """

    def __init__(self, fabric: Fabric, folder: Path):
        self.fabric, self.folder, self.names = fabric, folder, [""]
        self.values = self.wrong = torch.zeros((), device=fabric.device)
        self.first = torch.zeros((), dtype=torch.long, device=fabric.device)

    def note(self, step: int, loss_d: DiscriminatorLoss, loss_g: GeneratorLoss) -> None:
        """Take the losses of `step`: the mean over all processes, in which a NaN of one of them stays."""
        terms = [(f"d_{each.name}", getattr(loss_d, each.name)) for each in fields(loss_d)]
        terms += [(f"g_{each.name}", getattr(loss_g, each.name)) for each in fields(loss_g)]
        self.names = [name for name, _ in terms]
        own = torch.stack([value.detach().float() for _, value in terms])
        self.values = cast(Tensor, self.fabric.all_reduce(own, reduce_op="mean"))
        fresh = ~self.values.isfinite().all() & (self.first == 0)
        self.first = torch.where(fresh, step, self.first)
        self.wrong = torch.where(fresh, self.values, self.wrong)
        if self.values.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """RunError that names the step and the terms, where a loss was not finite so far."""
        if not (step := int(self.first)):
            return
        wrong = {n: v for n, v in zip(self.names, self.wrong.tolist(), strict=True) if not math.isfinite(v)}
        terms = {name: value for name, value in wrong.items() if not name.endswith("_total")} or wrong
        said = ", ".join(f"{name} is {value}" for name, value in terms.items())
        kept = "checkpoint.pt is of before and good" if (self.folder / "checkpoint.pt").is_file() else "nothing is kept"
        mend = "lower training.lr_g and training.lr_d, or look at the settings that were changed last"
        raise RunError(f"{self.folder}: stopped at step {step}, where {said}; {kept}; {mend}")

    def row(self) -> dict[str, float]:
        """The terms of the last step that was noted, by their names: d_real, ..., g_total."""
        return {name: round(value, 5) for name, value in zip(self.names, self.values.tolist(), strict=True)}


class Log:
    """Losses to `metrics.jsonl` and to TensorBoard. `step`: where this sitting begins."""

    def __init__(self, folder: Path, step: int, enabled: bool):
        self.path, self.enabled = folder / "metrics.jsonl", enabled
        if enabled:
            from torch.utils.tensorboard import SummaryWriter  # here: 0.3 s that who reads a run need not wait for

            cut(self.path, step)
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, step: int, seconds: float, losses: dict[str, float]) -> None:
        """Write the row of a step: step, seconds, each term."""
        if self.enabled:
            append(self.path, row := {"step": step, "seconds": round(seconds, 2), **losses})
            for name, value in row.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.enabled:
            self.board.close()


class Visits:
    """Scores of the averaged generator at some steps of a training, in `visits.jsonl`: one row a step.

    A visit is made from the checkpoint of exactly its step, which the loop saves first. What was killed between the
    checkpoint and the row is made up for when the run goes on. `score(folder)` -> numbers by name.
    """

    def __init__(
        self, folder: Path, step: int, steps: tuple[int, ...], score: Callable[[Path], dict] | None, enabled: bool
    ):
        if steps and score is None:
            raise ValueError("training.visits names steps, and there is no function that scores them: give visit=")
        self.folder, self.score, self.enabled = folder, score, enabled
        rows = cut(folder / VISITS, step) if enabled else read_rows(folder / VISITS)
        self.left = set(steps) - {row["step"] for row in rows}
        check_visits(folder, steps, until=step - 1)

    def due(self, step: int) -> bool:
        """Whether `step` is to be scored, and is not yet."""
        return step in self.left

    def make(self, step: int) -> None:
        """Score the checkpoint, which is of `step`, and write the row."""
        if self.enabled and self.score:
            append(self.folder / VISITS, {"step": step, **self.score(self.folder)})
        self.left.remove(step)


def check_visits(folder: Path, steps: tuple[int, ...], until: int) -> None:
    """RunError where a step of `steps` up to `until` has no row in the folder's visits.jsonl: it is past."""
    there = {row["step"] for row in read_rows(folder / VISITS)} if steps else set()
    if lost := [str(step) for step in steps if step <= until and step not in there]:
        mend = "delete the folder to train it anew, or leave them out of training.visits"
        raise RunError(f"{folder}: was not scored at the steps {', '.join(lost)}, which it has passed; {mend}")
