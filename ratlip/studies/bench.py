"""How fast training and generation are, in their plain and their fast form, on the machine at hand.

Plain: the networks as `ratlip.networks` has them, CLIP as open_clip has it, the order of work of `plain_step`. Fast, as
what runs: `ratlip.fast` and `training.step`. Both are timed in turn, on generated shapes and with random weights, which
change no time. Where a step's time goes is read off the labels of `training.step`; they cannot divide the generator's
backward pass, one call through D, CLIP, synthesis blocks and mapper.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, profiler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry

from ratlip.clip.frozen import FrozenClip
from ratlip.clip.loading import build_small_clip
from ratlip.clip.small import ARCHITECTURE
from ratlip.clip.vocabulary import Vocabulary
from ratlip.data.batches import Batches
from ratlip.fast import accelerate
from ratlip.fast.memory import LARGEST, keep_freed_memory, return_freed_memory
from ratlip.fast.tower import accelerate_tower, frozen_linear
from ratlip.files import write_json
from ratlip.networks.losses import DiscriminatorLoss, GeneratorLoss
from ratlip.progress import bar
from ratlip.provenance import describe
from ratlip.scores.evaluation import embed
from ratlip.settings import load_settings
from ratlip.studies.plain_step import PlainStep
from ratlip.training import loop, session, step
from ratlip.training.step import sample_latents, training_step
from ratlip.workspace import Workspace

FORMS = ("plain", "fast")
OPTIONS = ("checkpointing", "channels_last", "cached_features")  # of the fast form alone


@dataclass
class World:
    """A training session on generated shapes, all in one form."""

    run: session.Session
    batches: Batches
    captions: list[str]
    plain_step: PlainStep | None

    def inputs(self, count: int) -> tuple[Tensor, Tensor]:
        """Latents (count,Z) and sentences (count,E)."""
        latent = sample_latents(0, 0, count, self.run.settings.model.latent_size).to(self.run.device)
        return latent, self.run.sentences[torch.arange(count, device=self.run.device) % len(self.run.sentences)]

    def step(self) -> tuple[DiscriminatorLoss, GeneratorLoss]:
        """One training step on the next batch."""
        batch = self.batches[self.run.step]
        return self.plain_step(batch) if self.plain_step else training_step(self.run, batch)

    def memory(self, drawing: bool = False) -> None:
        """On a CPU, keep freed memory (for drawing, all of it) or, in the plain form, return it."""
        if self.run.device.type == "cpu" and self.plain_step:
            return_freed_memory()
        elif self.run.device.type == "cpu":
            keep_freed_memory(LARGEST if drawing else session.kept_bytes(self.run.settings))


def world(
    profile: str, batch: int, folder: str | Path, overrides: dict | None = None, accelerator="auto", form="fast"
) -> World:
    """A session with the profile's sizes: random weights, `batch` images a step, generated shapes in `folder`."""
    shapes = {"data.dataset": "synthetic", "data.flip": False, "data.test_images": 16}
    sizes = {"data.train_images": max(8, 2 * batch), "training.batch_size": batch}  # few: each caption is embedded
    plain = {f"training.{option}": False for option in OPTIONS} if form == "plain" else {}
    settings = load_settings(profile, {**shapes, **sizes, **(overrides or {}), **plain})
    prepared = Workspace.of(settings, folder, progress=False).prepared
    captions, c, d = list(prepared.train.all_captions), settings.clip, settings.data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if c.source == "train":
            tokenizer = Vocabulary.build(captions, c.context_length, min_count=1)
            architecture = {name: getattr(c, name) for name in ARCHITECTURE}
            model = build_small_clip(settings.model.image_size, **architecture, vocab_size=len(tokenizer))
        else:
            import open_clip  # here, because it takes 2 s and the small CLIP does without

            model = open_clip.create_model(c.model, load_weights=False, force_image_size=settings.model.image_size)
            tokenizer = open_clip.get_tokenizer(c.model)
    accelerate_tower(model.visual, on=form == "fast")
    fabric = loop.processes(accelerator, 1, settings.training)
    fabric.launch()
    clip = FrozenClip(model, tokenizer, "random CLIP", c.normalisation).to(fabric.device)
    sentences = clip.embed_text(captions, batch_size=32)
    run = session.Session(fabric, settings, prepared, clip, sentences, Path(folder) / "run")
    accelerate(*run.networks.values(), on=form == "fast")
    batches = Batches(prepared.train, crop=d.crop, flip=d.flip, batch_size=batch, seed=0)
    return World(run, batches, captions, PlainStep(run, captions) if form == "plain" else None)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work()` takes."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def compare(
    worlds: dict[str, World], work: Callable[[World], object], iterations: int, name: str, progress: bool, drawing=False
) -> dict:
    """Both forms in turn, `iterations` times after one unmeasured round: seconds of each and their ratio."""
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in bar(range(iterations + 1), desc=name, unit="round", enabled=progress):
        for form, here in worlds.items():
            here.memory(drawing)
            seconds[form].append(clock(partial(work, here), here.run.device))
    plain, fast = (values[1:] for values in seconds.values())
    ratio = [one / other for one, other in zip(plain, fast, strict=True)]
    return {"plain": spread(plain), "fast": spread(fast), "ratio": spread(ratio), "iterations": iterations}


def draw(here: World, count: int) -> Tensor:
    """Images (count,3,S,S) in [-1,1]."""
    generator = here.run.networks["generator"].eval()
    with torch.no_grad(), here.run.fabric.autocast():
        images = generator(*here.inputs(count)).clamp(-1, 1)
    generator.train()
    return images


def score(here: World, count: int) -> None:
    """Draw images and read CLIP's scores off them."""
    here.run.clip.embed_text([here.captions[i % len(here.captions)] for i in range(count)])
    embed(here.run.clip, draw(here, count).float())


OWN_FORMULAS = {  # by name: what PyTorch's counter does not know; attention: two products, five in the backward pass
    "_linear_pointwise": lambda x, weight, *_: 2 * x.shape[0] * x.shape[1] * weight.shape[0],
    "_scaled_dot_product_flash_attention_for_cpu": lambda q, k, *_: 4 * q.numel() * k.shape[2],
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda _, q, k, *__: 10 * q.numel() * k.shape[2],
}


class Operations(TorchDispatchMode):
    """Counts operations of products, convolutions and attention by the labels of `record_function`, in all at "".

    One multiplication and addition: 2, by PyTorch's formulas. PyTorch's own `FlopCounterMode` refuses a gradient taken
    within a step, as the penalty takes one, and the profiler's `with_flops` knows no backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts, self._labels = Counter[str](), [""]

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result, packet = operation(*args, **(kwargs or {})), operation._overloadpacket
        if packet.__name__ == "_record_function_enter_new":
            self._labels.append(args[0])
        elif packet.__name__ == "_record_function_exit":
            self._labels.pop()
        elif packet.__name__ in OWN_FORMULAS:
            self.counts.update(dict.fromkeys(self._labels, OWN_FORMULAS[packet.__name__](*args)))
        elif packet in flop_registry:
            operations = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
            self.counts.update(dict.fromkeys(self._labels, operations))
        return result


def count_operations(work: Callable[[], object]) -> Counter[str]:
    """Floating-point operations of `work()`: see `Operations`."""
    with Operations() as counter:
        work()
    return counter.counts


def matrix_rate(device: torch.device, size: int = 2048, repeats: int = 7) -> float:
    """Floating-point operations a second of a large float32 product, the best of the ways there are."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    ways = (partial(torch.matmul, a, b), partial(frozen_linear, a, b, None))
    return 2 * size**3 / min(clock(way, device) for way in ways for _ in range(repeats))


def parts(worlds: dict[str, World], iterations: int) -> dict:
    """Median seconds and the operations of each labelled part of the fast step, and the machine's matrix rate."""
    here, device, seconds = worlds["fast"], worlds["fast"].run.device, defaultdict(list)
    here.memory()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own remarks on stderr

    @contextmanager
    def label(name: str):
        synchronise(device)  # at both ends: a label then lasts until a GPU has done what it asks for
        with profiler.record_function(name):
            yield
            synchronise(device)

    with patch.object(step, "record_function", label):
        for i in range(iterations + 1):
            with profiler.profile(activities=[profiler.ProfilerActivity.CPU], acc_events=True) as found:
                here.step()
            for event in found.key_averages() if i else ():
                if event.is_user_annotation and not event.key.startswith("Optimizer."):
                    seconds[event.key].append(event.cpu_time_total / 1e6)
    counted = {form: count_operations(each.step) for form, each in worlds.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [{"part": name, "seconds": s, "operations": counted["fast"][name]} for name, s in medians.items()]
    operations = {form: counts[""] for form, counts in counted.items()}
    return {"rows": rows, "matrix_rate": matrix_rate(device), "step_operations": operations}


def waiting(here: World, count: int, workers: int) -> dict:
    """Share of a training loop's time spent waiting for data, with loader processes as in training."""
    here.memory()
    run, waited, total, pinned = here.run, 0.0, 0.0, here.run.device.type == "cuda"
    numbers = range(run.step, run.step + count + 1)
    source = iter(DataLoader(here.batches, None, sampler=numbers, num_workers=workers, pin_memory=pinned))
    training_step(run, next(source))  # the processes start
    for _ in range(count):
        start = time.perf_counter()
        batch = next(source)
        waited += time.perf_counter() - start
        total += time.perf_counter() - start + clock(partial(training_step, run, batch), run.device)
    return {"workers": workers, "steps": count, "share_waiting": waited / total}


def run(
    profile: str = "cub",
    *,
    batch: int = 4,
    iterations: int = 5,
    generation: Sequence[int] = (1, 8),
    threads: int | None = None,
    precision: str = "32-true",
    accelerator: str = "auto",
    workers: int = 0,
    progress: bool = True,
    overrides: dict | None = None,
    json_path: str | Path | None = None,
) -> dict:
    """Measure everything; -> what `report` prints, written to `json_path` where given.

    profile: whose sizes; batch: images a training step; iterations: measured rounds; generation: batch sizes of
    drawing; workers: loader processes where waiting is measured; overrides: other settings, e.g.
    {"training.checkpointing": True}. Both forms share a process; `studies.performance` gives each its own.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    settings, options = dict(overrides or {}), {"accelerator": accelerator}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        overlaid = {"training.precision": precision, **settings}
        worlds = {form: world(profile, batch, Path(folder) / form, overlaid, form=form, **options) for form in FORMS}
        fast = worlds["fast"].run
        changed = [f"{key}={value}" for key, value in settings.items()]
        found |= dict(profile=profile, settings=changed, batch=batch, precision=precision)
        found |= dict(image_size=fast.settings.model.image_size, device=fast.device.type, environment=describe())
        found["step"] = compare(worlds, World.step, iterations, "training step", progress)
        found["parts"] = parts(worlds, iterations)
        found["waiting"] = waiting(worlds["fast"], iterations, workers)
        found["generation"] = []
        for count, (kind, work) in itertools.product(generation, {"generation": draw, "evaluation": score}.items()):
            both = compare(worlds, partial(work, count=count), iterations, f"{kind}, batch {count}", progress, True)
            rate = {form: count / both[form]["median"] for form in FORMS}
            found["generation"].append({"kind": kind, "batch": count, "images_per_second": rate, **both})
    if json_path:
        write_json(json_path, found)
    return found


def report(found: dict) -> str:
    """The measurements as tables to read."""

    def line(name: str, row: dict) -> str:
        ratio, plain, fast = row["ratio"], row["plain"]["median"], row["fast"]["median"]
        spans = f"{ratio['median']:5.2f} x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        return f"{name:26s}{plain:9.3f} s {fast:9.3f} s   {spans}"

    machine = f"{found['precision']}, {found['device']}, {found['environment']['threads']} threads"
    profile = " ".join([found["profile"], *found["settings"]])
    lines = [
        f"profile {profile}, {found['image_size']} px, batch {found['batch']}, {machine}",
        f"{'':26s}{'plain':>11s} {'fast':>11s}   ratio (range)",
        line("training step", found["step"]),
        *(line(f"{row['kind']}, batch {row['batch']}", row) for row in found["generation"]),
    ]
    rows, peak, counts = (found["parts"][key] for key in ("rows", "matrix_rate", "step_operations"))
    total, wait = sum(row["seconds"] for row in rows), found["waiting"]
    counted = f"plain {counts['plain'] / 1e9:.4g}, fast {counts['fast'] / 1e9:.4g} GFLOP"
    lines += ["", f"matrix rate {peak / 1e9:.0f} GFLOP/s; operations of a step: {counted}"]
    lines.append(f"{'part':38s}{'s':>8s}{'share':>8s}{'GFLOP':>9s}{'GFLOP/s':>9s}{'of rate':>9s}")
    for row in rows:
        seconds, operations = row["seconds"], row["operations"] / 1e9
        pace, times = operations / seconds, f"{seconds:8.3f}{seconds / total:8.1%}"
        lines.append(f"{row['part']:38s}{times}{operations:9.1f}{pace:9.1f}{pace * 1e9 / peak:9.1%}")
    share = f"{wait['share_waiting']:.1%} of the loop with {wait['workers']} loader processes"
    lines.append(f"{'all parts':38s}{total:8.3f}   waiting for data: {share}")
    return "\n".join(lines)
