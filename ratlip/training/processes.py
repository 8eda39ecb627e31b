"""Several processes in one run: batch norm over the whole batch, one answer for all, and an end when one of them dies.

Two processes compute what one does: each takes its part of one global batch, of its latents and of its mismatched
sentences; gradients and losses are means over equal parts; batch norm's statistics are those of the whole batch
(`training.sync_batch_norm`). The first process alone writes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Function

from ratlip.errors import RunError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

GRACE = 5  # seconds for a process to end by itself, where a library tells it that another one is gone (NCCL does not)


class _Mean(Function):
    """Mean over all processes; the gradient of a mean is the mean of the gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x / distributed.get_world_size()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Mean.apply(grad)


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch norm of a batch that lies in equal parts in several processes. PyTorch's own works on GPUs alone."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # autocast brings 16 bits
        mean = _Mean.apply(wide.mean(dim=(0, 2, 3)))
        centred = wide - mean[:, None, None]
        variance = _Mean.apply(centred.square().mean(dim=(0, 2, 3)))
        with torch.no_grad():
            count, momentum = distributed.get_world_size() * x.numel() // x.shape[1], self.momentum or 0.0
            self.get_buffer("num_batches_tracked").add_(1)
            self.get_buffer("running_mean").lerp_(mean, momentum)
            self.get_buffer("running_var").lerp_(variance * (count / max(1, count - 1)), momentum)
        slope = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias[:, None, None], slope[:, None, None], centred).to(x.dtype)


def sync_batch_norms(network: nn.Module) -> None:
    """Make each batch norm of `network` one over all processes, in place; keys and shapes of tensors stay."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm


def agreed(fabric: Fabric, answer: bool) -> bool:
    """The first process's answer, in all of them: clocks differ, and who stops alone leaves the others waiting."""
    return bool(fabric.broadcast(answer)) if fabric.world_size > 1 else answer


def asked(fabric: Fabric, step: int, came: list[int]) -> bool:
    """Whether a signal `came` to one of the processes, which is then in all their lists, to stop after `step`.

    Several processes ask each other at every eighth step alone: a GPU waits for the answer.
    """
    if fabric.world_size == 1:
        return bool(came)
    if step % 8 == 0 and (number := largest(fabric, came[0] if came else 0)):
        came[:] = [number]
        return True
    return False


def largest(fabric: Fabric, value: int) -> int:
    """The largest `value` of all processes."""
    found: Any = fabric.all_reduce(torch.tensor(value, device=fabric.device), reduce_op="max")
    return int(found)


@contextmanager
def launched(fabric: Fabric, folder: Path) -> Iterator[None]:
    """Start the other processes of a run, and end with them: no process outlives a failure of another one.

    Raises RunError in the first process where another one has died; the others end without a word. A library that waits
    for ever for a dead process (NCCL) is not asked: after GRACE seconds the process says so itself and ends.
    """
    from lightning_fabric.strategies.launchers import subprocess_script

    children: list[subprocess.Popen] = []
    done = threading.Event()
    # Lightning's own observer kills the first process too, which could then not say why it ends.
    with patch.object(subprocess_script, "_launch_process_observer", children.extend):
        fabric.launch()
    if children:
        threading.Thread(target=_watch_children, args=(children, folder, done), daemon=True).start()
    elif fabric.global_rank and os.environ.get("LOCAL_RANK"):
        threading.Thread(target=_watch_parent, args=(os.getppid(), done), daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if fabric.world_size == 1 or not _of_connection(error):
            raise
        if not fabric.is_global_zero:
            raise SystemExit(1) from error  # the first process has the word
        raise RunError(_said(fabric.world_size, children, folder, wait=GRACE / 2)) from error
    finally:
        done.set()
        for child in children:
            _end(child)


def _of_connection(error: Exception) -> bool:
    words = ("connection", "socket", "peer", "gloo", "nccl", "timed out")
    return isinstance(error, distributed.DistError) or any(word in str(error).lower() for word in words)


def _end(child: subprocess.Popen) -> None:
    """Wait for a child that ends by itself, and end one that does not."""
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        child.kill()


def _said(world: int, children: list[subprocess.Popen], folder: Path, wait: float = 0.0) -> str:
    """The sentence about those of the `children` that have died; `wait` seconds for one that is about to."""
    end = time.monotonic() + wait
    while not (dead := [child for child in children if child.poll()]) and children and time.monotonic() < end:
        time.sleep(0.05)
    how = [f"process {c.pid} by {f'signal {-c.returncode}' if c.returncode < 0 else 'an error'}" for c in dead]
    kept = "checkpoint.pt is of before and good" if (folder / "checkpoint.pt").is_file() else "nothing is kept yet"
    ended = f"one of {world} processes ended ({', '.join(how) or 'its connection is closed'})"
    return f"{folder}: {ended}; {kept}; the same command goes on"


def _watch_children(children: list[subprocess.Popen], folder: Path, done: threading.Event) -> None:
    while not any(child.poll() for child in children):
        if done.wait(0.5):
            return
    if done.wait(GRACE):
        return
    print(f"ratlip: {_said(len(children) + 1, children, folder)}", file=sys.stderr, flush=True)
    for child in children:
        child.kill()
    os._exit(2)  # the main thread waits within a library


def _watch_parent(parent: int, done: threading.Event) -> None:
    while not done.wait(0.5):
        if os.getppid() != parent:
            os._exit(1)
