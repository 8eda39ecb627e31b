"""What a model costs: parameters, training steps, and above all generating, the paper's case against
diffusion.

Times belong to one machine and are never compared with published ones. Memory is counted in tensors, so that
it is the same number on every machine.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ratlip.report.tables import MINE, NONE, Table
from ratlip.studies import grid
from ratlip.studies.bench import synchronise
from ratlip.training.generation import best_device
from ratlip.training.step import sample_latents

BATCHES = (1, 2, 4, 8, 16, 32, 64)


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that operations make and that are still alive, and their highest number."""

    def __init__(self, known: Sequence[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, tuple] = {t.untyped_storage()._cdata: () for t in known}
        self.known = known  # kept alive, lest another storage takes the address

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.sizes:  # a view shares the storage of what it views
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    self.sizes[key] = (weakref.ref(storage, lambda _, k=key, n=size: self._gone(k, n)),)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self.sizes.pop(key, None)


def peak_memory(work: Callable[[], object], *modules: nn.Module) -> int:
    """Most bytes of tensors alive at one time that `work()` makes, on any device; weights of `modules` aside.

    What an operation needs within itself (workspaces of a library) is not seen; on a GPU
    `torch.cuda.max_memory_allocated` sees that too.
    """
    known = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    with _Live(known) as live:
        work()
    return live.peak


def weights(run) -> dict[str, int]:
    """Parameters of a run (`generation.Run`): the generator's, CLIP's image tower's, its text tower's."""
    image = sum(p.numel() for p in run.clip.model.visual.parameters())
    return {
        "trained": sum(p.numel() for p in run.generator.parameters() if p.requires_grad),
        "frozen image tower": image,
        "frozen text tower": sum(p.numel() for p in run.clip.model.parameters()) - image,
    }


@torch.no_grad()
def generation(
    run,
    captions: Sequence[str],
    batch_sizes: Sequence[int] = BATCHES,
    seconds: float = 1.0,
    device: str | torch.device | None = None,
) -> pd.DataFrame:
    """Time and memory from captions to images, one row a batch size: median over repeats within `seconds`.

    `run`: a `generation.Run`; `captions` are repeated to the batch size. Columns: device, batch, repeats,
    text_ms (tokens and text tower), image_ms (generator with CLIP's bridge), ms (both, a batch), ms_low and
    ms_high (the quartiles), images_per_second, memory_mib (peak of tensors beside the weights).
    """
    device = torch.device(device or best_device())
    clip, generator, rows = run.clip.to(device), run.generator.to(device).eval(), []
    for batch in batch_sizes:
        words = [captions[i % len(captions)] for i in range(batch)]
        latent = sample_latents(0, 0, batch, run.settings.model.latent_size).to(device)

        def draw(words=words, latent=latent) -> tuple[float, float]:
            times = [_now(device)]
            sentence = clip.embed_text(words)
            times.append(_now(device))
            generator(latent, sentence).clamp(-1, 1)
            return times[1] - times[0], _now(device) - times[1]

        memory = peak_memory(draw, clip, generator)  # and the pass that warms up
        measured, end = [draw()], time.perf_counter() + seconds
        while time.perf_counter() < end or len(measured) < 3:
            measured.append(draw())
        text, image = 1000 * np.array(measured).T
        low, middle, high = np.quantile(text + image, (0.25, 0.5, 0.75))
        rows.append(
            {
                "device": device.type,
                "batch": batch,
                "repeats": len(measured),
                "text_ms": np.median(text),
                "image_ms": np.median(image),
                "ms": middle,
                "ms_low": low,
                "ms_high": high,
                "images_per_second": 1000 * batch / middle,
                "memory_mib": memory / 2**20,
            }
        )
    return pd.DataFrame(rows)


def _now(device: torch.device) -> float:
    synchronise(device)
    return time.perf_counter()


def devices() -> list[str]:
    """Where generating is measured: the CPU, and the GPU where there is one."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def step_times(workspace, frame: pd.DataFrame) -> pd.DataFrame:
    """Training time of each run of `frame` (rows of `experiments.results`): label, seed, steps, seconds a
    step.

    From the run's log: the median over its stretches between two rows, so that a start or a pause does not
    count; of a run with one row, the mean.
    """
    rows = []
    for run in frame.itertuples():
        log = grid.training_log(workspace, run).drop_duplicates("step", keep="last")
        stretches = (log.seconds.diff() / log.step.diff()).dropna()
        step = stretches[stretches > 0].median() if len(stretches) else log.seconds.iloc[-1] / log.step.iloc[-1]
        rows.append(
            {
                "label": run.label,
                "seed": run.seed,
                "steps": run.steps,
                "seconds_a_step": step,
                "seconds": run.training_seconds,
            }
        )
    return pd.DataFrame(rows)


def table(workspace, generated: pd.DataFrame, runs: pd.DataFrame) -> Table:
    """The table of costs: a row a model and device, from `generation` (with a column model) and `step_times`.

    `runs`: rows of `experiments.results`. Latency is that of one image, throughput that of the best batch
    size.
    """
    steps, rows = step_times(workspace, runs), []
    sizes = runs.drop_duplicates("label").set_index("label")["generator_parameters"]
    for (model, device), part in generated.groupby(["model", "device"], sort=False):
        one, best = part[part.batch == part.batch.min()].iloc[0], part.loc[part.images_per_second.idxmax()]
        step = steps[steps.label == model].seconds_a_step
        rows.append(
            {
                "model": model,
                "whose": MINE,
                "device": device,
                "threads": torch.get_num_threads(),
                "trained_parameters": sizes[model],
                "training_ms_a_step": 1000 * step.mean(),
                "training_runs": len(step),
                "latency_ms": one.ms,
                "images_per_second": best.images_per_second,
                "at_batch": int(best.batch),
                "memory_mib": best.memory_mib,
            }
        )
    data = pd.DataFrame(rows)
    view = pd.DataFrame(
        [
            {
                "model": row.model,
                "whose": row.whose,
                "device": row.device.upper()
                + (f", {row.threads} thread{'s' * (row.threads != 1)}" if row.device == "cpu" else ""),
                "parameters": NONE if pd.isna(row.trained_parameters) else f"{row.trained_parameters / 1e6:.3f} M",
                "training step": f"{row.training_ms_a_step:.0f} ms",
                "one image": f"{row.latency_ms:.1f} ms",
                "images a second": f"{row.images_per_second:.0f}",
                "at batch": str(row.at_batch),
                "tensors": f"{row.memory_mib:.1f} MiB",
            }
            for row in data.itertuples()
        ]
    )
    notes = [
        "From the caption's words to the image. Tensors: the most alive at one time beside the weights, at "
        "that batch size. Training steps were timed in the runs, on whatever device those had.",
        "No diffusion model was measured.",
    ]
    return Table(
        "cost",
        f"What training and generating cost, measured here at {workspace.settings.model.image_size} px",
        data,
        view,
        notes,
    )
