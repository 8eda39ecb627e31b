"""Training, from top to bottom: one loop, no hidden state.

A run folder holds `config.yaml`, `metrics.jsonl`, `visits.jsonl` (scores at the steps of `training.visits`),
`tensorboard/`, `samples/`, `checkpoint.pt` and, when the last step is done, `provenance.json`. One process at a time
writes into it, and stops at the first loss that is not finite. Everything random at a step is a function of (seed,
step), so that `checkpoint.pt` needs no random state, and a killed run goes on exactly as if it had never stopped (bit
for bit on a CPU), unless its settings ask for the published way of resuming (`training.resume`).
"""

from __future__ import annotations

import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ratlip import cache
from ratlip.clip.frozen import FrozenClip
from ratlip.data.batches import Batches
from ratlip.data.prepared import check_files
from ratlip.errors import RunError, SettingsError, Stopped
from ratlip.files import is_object, one_writer, stop_signals, sweep, write_json, write_text
from ratlip.plots import pictures
from ratlip.progress import bar
from ratlip.provenance import describe
from ratlip.settings import Settings, TrainingSettings, load_settings
from ratlip.training.log import Log, Losses, Visits, check_visits
from ratlip.training.processes import agreed, asked, largest, launched
from ratlip.training.session import Session
from ratlip.training.step import sample_latents, training_step

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from ratlip.data.prepared import Prepared, Split


def total_steps(settings: Settings, images: int) -> int:
    """The budget in steps, whichever way the settings give it."""
    t = settings.training
    return t.steps if t.steps is not None else (t.epochs or 0) * -(-images // t.batch_size)


def is_complete(folder: str | Path) -> bool:
    """Whether the run in `folder` has done its last step (an empty or damaged provenance.json does not say so)."""
    return is_object(Path(folder) / "provenance.json")


def _keep_settings(path: Path, settings: Settings) -> None:
    """Write the run's settings, or RunError where other ones, or none that can be read, are in the file."""
    if not path.is_file():
        write_text(path, settings.to_yaml())
        return
    try:
        found = load_settings(path).run_hash
    except SettingsError as error:
        raise RunError(f"{error}\n{path}: damaged; delete it, and the same command writes it again") from error
    if found != settings.run_hash:
        mend = "delete it, and the same command writes it again"
        raise RunError(f"{path}: holds other settings ({found}) than the run's ({settings.run_hash}); {mend}")


def train(
    settings: Settings,
    prepared: Prepared,
    clip: FrozenClip,
    sentences: Tensor,
    folder: str | Path,
    *,
    accelerator: str = "auto",
    devices: int | str = 1,
    workers: int = 0,
    progress: bool = True,
    end: float | None = None,
    visit: Callable[[Path], dict] | None = None,
) -> Path:
    """Train one run into `folder`, or go on with it, or return at once when it is complete.

    `prepared`: the prepared dataset; `sentences`: raw text embeddings (N,E) of all training captions, in the
    order of `prepared.train.all_captions`. `end`: a `time.monotonic()` at which the run saves a checkpoint and
    returns unfinished, for another sitting. `visit`: the scores, by their names, of the checkpoint in a folder; called
    at the steps of `training.visits`. Raises RunError where the folder belongs to other settings, where another process
    writes into it, and at the first loss that is not finite; Stopped where SIGTERM or Ctrl-C ended it after a step,
    which is saved.
    """
    folder, t = Path(folder), settings.training
    identity = {"run": settings.run_hash, "clip": clip.fingerprint, "data": prepared.manifest["content_sha256"]}
    identity["start"] = "weights by name"  # runs of before have the same hash, and began elsewhere
    cache.claim(folder, identity, what="a run", error=RunError, file="identity.json", sign="config.yaml")
    _keep_settings(folder / "config.yaml", settings)
    steps = total_steps(settings, len(prepared.train))
    if is_complete(folder):
        check_visits(folder, t.visits, until=steps)
        return folder
    fabric = processes(accelerator, devices, t)
    first = fabric.is_global_zero
    # The first process alone writes; it holds the folder before the launch starts the others.
    with one_writer(folder) if first else nullcontext(lambda: None) as still_ours, ExitStack() as stack:
        if first and is_complete(folder):  # by another process, in the meantime
            return folder
        if first:
            sweep(folder, "checkpoint.pt", "metrics.jsonl", "visits.jsonl", "provenance.json", "samples/*")
            check_files(prepared)
        stack.enter_context(launched(fabric, folder))
        run = Session(fabric, settings, prepared, clip, sentences, folder)
        d, share = settings.data, {"rank": fabric.global_rank, "world": fabric.world_size}
        data = Batches(prepared.train, crop=d.crop, flip=d.flip, batch_size=t.batch_size, seed=settings.seed, **share)
        numbers, pinned = range(run.draw, steps - run.begun), fabric.device.type == "cuda"
        loader = DataLoader(data, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=pinned)
        samples = SampleGrid(settings, prepared, run.clip, folder)
        visits = Visits(folder, run.step, t.visits, visit, enabled=first)
        if visits.due(run.step):  # it was killed between a checkpoint and its scores
            with run.paused():
                visits.make(run.step)
        with bar(total=steps, initial=run.step, unit="step", desc=folder.name, enabled=progress and first) as meter:
            if (scale := state_scale(run)) and progress and first:
                meter.write(f"{folder.name}: RAT's states are multiplied by {scale:.3f}, computed at the start")
            with stop_signals() as came:
                _sitting(run, loader, steps, samples, visits, meter, still_ours, end, came)
        peak = largest(fabric, peak_memory_mib(run.device))
        if first and run.step == steps:
            write_json(folder / "provenance.json", _provenance(run, prepared, peak))
        fabric.barrier()
    if came and first:
        said = f"{signal.Signals(came[0]).name}: stopped after step {run.step} of {steps}, which is saved"
        raise Stopped(came[0], f"{folder}: {said}; the same command goes on")
    return folder


def _sitting(
    run: Session,
    loader: DataLoader,
    steps: int,
    samples: SampleGrid,
    visits: Visits,
    meter: tqdm,
    still_ours: Callable[[], None],
    end: float | None,
    came: list[int],
) -> None:
    """All steps up to `steps`, those until the time `end` or until a signal `came`, with what is written at some."""
    t, first, losses = run.settings.training, run.fabric.is_global_zero, Losses(run.fabric, run.folder)
    with closing(Log(run.folder, run.step, enabled=first)) as log:
        for batch in loader:
            loss_d, loss_g = training_step(run, batch)
            losses.note(run.step, loss_d, loss_g)
            meter.update()
            last, visited = run.step == steps, visits.due(run.step)
            late = end is not None and agreed(run.fabric, time.monotonic() >= end)
            stopped = asked(run.fabric, run.step, came) or late
            every = (t.log_every, t.sample_every, t.checkpoint_every)
            logs, draws, saves = (last or run.step % number == 0 for number in every)
            if logs or draws or saves or visited or stopped:
                losses.check()  # before anything of this step is written
            if logs:
                row = losses.row()
                log.write(run.step, run.seconds, row)
                rate = (meter.format_dict["rate"] or 0) * t.batch_size
                meter.set_postfix_str(f"D {row['d_total']:.2f} G {row['g_total']:.2f} {rate:.0f} images/s")
            if first and draws:
                samples.save(run.best_generator(), run.step)
            if first and (saves or visited or stopped):
                still_ours()
                run.save()
            if visited:
                with run.paused():
                    visits.make(run.step)
            if stopped:
                break


def _provenance(run: Session, prepared: Prepared, peak: int) -> dict:
    """Where a finished run comes from, as plain JSON values. `peak`: memory of its largest process."""
    return {
        "run": run.folder.name,
        "seed": run.settings.seed,
        "steps": run.step,
        "training_seconds": round(run.seconds, 1),
        "devices": f"{run.fabric.world_size} x {run.device.type}",
        "peak_memory_mib": peak,
        "generator_parameters": sum(p.numel() for p in run.networks["generator"].parameters()),
        "discriminator_parameters": sum(p.numel() for p in run.networks["discriminator"].parameters()),
        **({"state_scale": scale} if (scale := state_scale(run)) else {}),
        "clip": run.clip.name,
        "clip_fingerprint": run.clip.fingerprint,
        "data": prepared.manifest["content_sha256"],
        **describe(),
    }


def state_scale(run: Session) -> float | None:
    """What RAT's states are multiplied by (`model.rat_input: scaled`); None: nothing."""
    scale = run.networks["generator"].state_scale
    return None if scale is None else float(scale)


def peak_memory_mib(device: torch.device) -> int:
    """The most memory held so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def processes(accelerator: str, devices: int | str, settings: TrainingSettings) -> Fabric:
    """Device, precision and processes, not yet launched. RunError where they are not here or do not fit the batch."""
    from lightning_fabric import Fabric  # here, because it takes 1.3 s, and who reads a run does without
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    try:
        with warnings.catch_warnings():  # where Slurm is installed it asks for `srun`, job or not
            warnings.filterwarnings("ignore", "The `srun` command is available")
            fabric = Fabric(accelerator=accelerator, devices=devices, precision=settings.precision)
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        raise RunError(f"accelerator={accelerator}, devices={devices}: not possible here ({error})") from error
    if settings.batch_size % fabric.world_size:
        mend = f"{fabric.world_size} processes; each needs the same number of images"
        raise RunError(f"devices={devices}: training.batch_size={settings.batch_size} cannot be shared by {mend}")
    return fabric


def grid_captions(settings: Settings, test: Split) -> list[str]:
    """The captions of sample grids: the first one of images that are evenly spaced over the test split."""
    chosen = np.linspace(0, len(test) - 1, min(settings.evaluation.grid_captions, len(test))).astype(int)
    return [test.captions[int(i)][0] for i in chosen]


class SampleGrid:
    """The same captions and latents at every visit, so that one sees them become pictures."""

    def __init__(self, settings: Settings, prepared: Prepared, clip: FrozenClip, folder: Path):
        e, self.captions = settings.evaluation, grid_captions(settings, prepared.test)
        self.sentence = clip.embed_text(self.captions).repeat_interleave(e.grid_images, dim=0)
        latent = sample_latents(settings.seed, 0, len(self.sentence), settings.model.latent_size, rank=10**6)
        self.latent = latent.to(self.sentence.device)
        self.folder, self.columns = folder / "samples", e.grid_images

    @torch.no_grad()
    def save(self, generator: nn.Module, step: int) -> None:
        """Draw and write `samples/step-NNNNNN.png`; the generator's mode stays."""
        training = generator.training
        images = generator.eval()(self.latent, self.sentence).clamp(-1, 1).float().cpu()
        generator.train(training)
        path = self.folder / f"step-{step:06d}.png"
        pictures.caption_grid(images.unflatten(0, (-1, self.columns)), self.captions, path=path, title=f"step {step}")
