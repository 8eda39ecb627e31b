"""What a model costs: parameters, and above all generating, the paper's case against diffusion.

Times belong to one machine and are never compared with published ones. Memory is counted in tensors, so that it is the
same number on every machine.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ratlip.report.tables import MINE, NONE, Table
from ratlip.studies import performance
from ratlip.training.generation import best_device
from ratlip.training.step import sample_latents

if TYPE_CHECKING:
    from ratlip.training.generation import Run
    from ratlip.workspace import Workspace

BATCHES = (1, 2, 4, 8, 16, 32, 64)


class _Live(TorchDispatchMode):
    """Bytes of live tensors that operations made (torch's MemTracker fails at networks that are partly frozen)."""

    def __init__(self, known: Sequence[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.known = known  # kept alive, lest another storage takes the address
        self.alive: dict[int, object] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]:
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:  # a view shares the storage of what it views
                self.now += size
                self.peak = max(self.peak, self.now)
                self.alive[key] = weakref.ref(storage, partial(self._gone, key, size))
        return result

    def _gone(self, key: int, size: int, _: object) -> None:
        self.now -= size
        self.alive.pop(key, None)


def peak_memory(work: Callable[[], object], *modules: nn.Module) -> int:
    """Most bytes of tensors alive at one time that `work()` makes, on any device; weights of `modules` aside.

    What an operation needs within itself (workspaces of a library) is not seen; on a GPU
    `torch.cuda.max_memory_allocated` sees that too.
    """
    with _Live([t for module in modules for t in (*module.parameters(), *module.buffers())]) as live:
        work()
    return live.peak


def weights(run: Run) -> dict[str, int]:
    """Parameters of a run: the generator's, CLIP's image tower's, its text tower's."""
    image = sum(p.numel() for p in run.clip.model.get_submodule("visual").parameters())
    return {
        "trained": sum(p.numel() for p in run.generator.parameters() if p.requires_grad),
        "frozen image tower": image,
        "frozen text tower": sum(p.numel() for p in run.clip.model.parameters()) - image,
    }


@torch.no_grad()
def generation(
    run: Run,
    captions: Sequence[str],
    batch_sizes: Sequence[int] = BATCHES,
    seconds: float = 1.0,
    device: str | torch.device | None = None,
) -> pd.DataFrame:
    """Time and memory from captions to images, one row a batch size: median over repeats within `seconds`.

    `captions` are repeated to the batch size. Columns: device, batch, repeats, text_ms (tokens and text tower),
    image_ms (generator with CLIP's bridge), ms (both, a batch), ms_low and ms_high (the quartiles), images_per_second,
    memory_mib (peak of tensors beside the weights).
    """
    device = torch.device(device or best_device())
    clip, generator, rows = run.clip.to(device), run.generator.to(device).eval(), []
    for batch in batch_sizes:
        words = [captions[i % len(captions)] for i in range(batch)]
        latent = sample_latents(0, 0, batch, run.settings.model.latent_size).to(device)

        def draw(words=words, latent=latent) -> tuple[float, float]:
            start = _now(device)
            sentence = clip.embed_text(words)
            middle = _now(device)
            generator(latent, sentence).clamp(-1, 1)
            return middle - start, _now(device) - middle

        memory = peak_memory(draw, clip, generator)  # and the pass that warms up
        measured, end = [draw()], time.perf_counter() + seconds
        while time.perf_counter() < end or len(measured) < 3:
            measured.append(draw())
        text, image = 1000 * np.array(measured).T
        low, middle, high = np.quantile(text + image, (0.25, 0.5, 0.75))
        row = {"device": device.type, "batch": batch, "repeats": len(measured), "text_ms": np.median(text)}
        row |= {"image_ms": np.median(image), "ms": middle, "ms_low": low, "ms_high": high}
        rows.append(row | {"images_per_second": 1000 * batch / middle, "memory_mib": memory / 2**20})
    return pd.DataFrame(rows)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a GPU works on while Python goes ahead
    return time.perf_counter()


def devices() -> list[str]:
    """Where generating is measured: the CPU, and the GPU where there is one."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def against_diffusion(path: str | Path | None = None) -> tuple[str, str, str]:
    """Verdict on "inference is much cheaper than a diffusion model's", its evidence in a clause, and all of it.

    From the stored measurement `path` (`reports/performance.json`). "supported": each walk that was measured costs more
    than twice as much as one pass of the published-size generator, by the image and by the pixel, at every batch size.
    """
    section = performance.stored("diffusion", path)
    if section is None:
        clause = "one pass a picture was timed (table of costs); no diffusion model was measured here"
        mend = f"`ratlip bench --report {performance.FILE} --section diffusion` does"
        return "not measured", clause, f"No diffusion model was measured here; {mend}."
    rows = [row for row in section["summary"]["rows"] if "seconds" in row]
    ours = {row["batch"]: row for row in rows if row["model"] == performance.OURS}
    times, told = [], []
    for row in [row for row in rows if "steps" in row]:
        mine = ours[row["batch"]]
        pixels = row["seconds_a_megapixel"] / mine["seconds_a_megapixel"]
        times.append(min(row["times"], pixels))
        if row["batch"] == min(ours):
            told.append(f"{row['model']}, {row['side']} px: {row['times']:,.0f} x an image, {pixels:,.0f} x a pixel")
    dearer, single = [each > 2 for each in times], ours[min(ours)]
    verdict = "supported" if all(dearer) else "undecided" if any(dearer) else "contradicted"
    least = 10 ** math.floor(math.log10(min(times)))  # an order of magnitude: the same when measured again
    model, where = "Stable Diffusion 1.5's networks", section["environment"]["processor"]
    clause = f"{model} need at least {least:g} x the time, 1 to 50 steps, by the image and by the pixel"
    whole = f"{single['seconds']:.2g} s an image of {single['side']} px, batch {single['batch']}, {where}"
    told_all = f"{model} beside the published-size generator ({whole}): {'; '.join(told)} ({performance.FILE})."
    return verdict, f"{clause} ({performance.FILE})", f"{told_all} The two do not draw the same: cost alone."


def table(
    workspace: Workspace, generated: pd.DataFrame, runs: pd.DataFrame, measurement: str | Path | None = None
) -> Table:
    """The table of costs: a row a model and device, from `generation` (with a column model).

    `runs`: rows of `grid.results`. Latency is that of one image, throughput that of the best batch size. What is known
    of diffusion comes from `measurement`: see `against_diffusion`.
    """
    rows, threads = [], torch.get_num_threads()
    sizes = runs.drop_duplicates("label").set_index("label")["generator_parameters"]
    for (model, device), part in generated.groupby(["model", "device"], sort=False):
        one, best = part[part.batch == part.batch.min()].iloc[0], part.loc[part.images_per_second.idxmax()]
        row = {"model": model, "whose": MINE, "device": device, "threads": threads, "trained_parameters": sizes[model]}
        row |= {"latency_ms": one.ms, "images_per_second": best.images_per_second}
        rows.append(row | {"at_batch": int(best.batch), "memory_mib": best.memory_mib})
    data = pd.DataFrame(rows)
    cores = f", {threads} thread{'s' * (threads != 1)}"
    view = data[["model", "whose"]].assign(
        device=[name.upper() + cores * (name == "cpu") for name in data["device"]],
        parameters=[NONE if pd.isna(n) else f"{n / 1e6:.3f} M" for n in data["trained_parameters"]],
    )
    view["one image"] = data["latency_ms"].map("{:.1f} ms".format)
    view["images a second"] = data["images_per_second"].map("{:.0f}".format)
    view["at batch"] = data["at_batch"].map(str)
    view["tensors"] = data["memory_mib"].map("{:.1f} MiB".format)
    notes = [
        "From the caption's words to the image. Tensors: the most alive at one time beside the weights, at that batch "
        "size. What a training step takes is measured alone, by `ratlip bench`: runs share the machine.",
        against_diffusion(measurement)[2],
    ]
    title = f"What training and generating cost, measured here at {workspace.settings.model.image_size} px"
    return Table("cost", title, data, view, notes)
