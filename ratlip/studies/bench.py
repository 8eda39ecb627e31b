"""`python -m ratlip.studies.bench`: how fast ours is, against the plain form of the same step, on the machine at hand.

One process, the two forms in turn on the same networks, a fixed number of times. The plain form (`bench_plain`)
computes everything the published step computes. Peak memory is measured in a fresh process for each form. Times
belong to one machine: what is asserted in tests is that both forms compute the same (tests/unit/test_bench.py).

The images are generated shapes in the profile's sizes, so that no data set is needed; CLIP's weights are random,
which changes no time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from ratlip.clip.frozen import FrozenClip
from ratlip.clip.loading import build_small_clip
from ratlip.clip.small import ARCHITECTURE
from ratlip.clip.vocabulary import Vocabulary
from ratlip.data.batches import Batches
from ratlip.fast.memory import LARGEST, keep_freed_memory, return_freed_memory
from ratlip.files import read_json, write_json
from ratlip.progress import bar
from ratlip.provenance import describe
from ratlip.scores.evaluation import embed
from ratlip.settings import Settings, load_settings
from ratlip.studies.bench_parts import Parts, count_operations, matrix_rate, step_in_parts, synchronise
from ratlip.studies.bench_plain import Towers, plain_generate, plain_optimisers, plain_step
from ratlip.training import loop, session, step
from ratlip.training.loop import peak_memory_mib
from ratlip.training.session import Session
from ratlip.training.step import training_step
from ratlip.workspace import Workspace

FORMS = ("plain", "ours")


@dataclass
class World:
    """A training session on generated shapes, with what the plain form needs beside it."""

    run: Session
    batches: Batches
    captions: list[str]
    towers: Towers

    def inputs(self, count: int) -> tuple[Tensor, Tensor]:
        """Latents (count,Z) and sentences (count,E)."""
        latent = step.sample_latents(0, 0, count, self.run.settings.model.latent_size).to(self.run.device)
        rows = torch.arange(count, device=self.run.device) % len(self.run.sentences)
        return latent, self.run.sentences[rows]

    def become(self, form: str, drawing: bool = False) -> None:
        """Work as one of `FORMS`: CLIP's modules, and whether freed memory is kept (for drawing, all of it)."""
        self.towers.use(form == "plain")
        if self.run.device.type != "cpu":
            return
        if form == "plain":
            return_freed_memory()
        else:
            keep_freed_memory(LARGEST if drawing else session.kept_bytes(self.run.settings))

    def step(self, form: str) -> Callable[[], object]:
        """One training step in that form, as a function without arguments."""
        if form == "ours":
            return lambda: training_step(self.run, self.batches[self.run.step])
        optimisers = plain_optimisers(self.run)
        return lambda: plain_step(self.run, self.batches[self.run.step], optimisers, self.captions)


def world(
    profile: str, batch: int, folder: str | Path, overrides: dict | None = None, accelerator: str = "auto"
) -> World:
    """A session with the profile's sizes: random weights, `batch` images a step, generated shapes in `folder`."""
    images = max(64, 2 * batch)
    settings = load_settings(
        profile,
        {
            "data.dataset": "synthetic",
            "data.flip": False,
            "data.train_images": images,
            "data.test_images": 16,
            "training.batch_size": batch,
            **(overrides or {}),
        },
    )
    workspace = Workspace.of(settings, folder, progress=False)
    captions = list(workspace.prepared.train.all_captions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, tokenizer = _random_clip(settings, captions)
    towers = Towers(model)
    clip = FrozenClip(model, tokenizer, "random CLIP", settings.clip.normalisation)
    fabric = loop._launched(accelerator, 1, settings.training)
    clip.to(fabric.device)
    sentences = clip.embed_text(captions, batch_size=32)
    run = Session(fabric, settings, workspace.prepared, clip, sentences, Path(folder) / "run")
    crop, flip = settings.data.crop, settings.data.flip
    return World(
        run, Batches(workspace.prepared.train, crop=crop, flip=flip, batch_size=batch, seed=0), captions, towers
    )


def _random_clip(settings: Settings, captions: Sequence[str]):
    """The profile's CLIP with random weights, and its tokenizer."""
    clip = settings.clip
    if clip.source == "train":
        vocabulary = Vocabulary.build(captions, clip.context_length, min_count=1)
        sizes = {name: getattr(clip, name) for name in ARCHITECTURE}
        return build_small_clip(settings.model.image_size, **sizes, vocab_size=len(vocabulary)), vocabulary
    return (open_clip.create_model(clip.model, load_weights=False), open_clip.get_tokenizer(clip.model))


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
    here: World,
    works: dict[str, Callable[[], object]],
    iterations: int,
    name: str,
    progress: bool = True,
    drawing: bool = False,
) -> dict:
    """Both forms in turn, `iterations` times after one unmeasured round: seconds of each and their ratio."""
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for i in bar(range(iterations + 1), desc=name, unit="round", enabled=progress):
        for form in FORMS:
            here.become(form, drawing)
            spent = clock(works[form], here.run.device)
            if i:
                seconds[form].append(spent)
    ratios = [plain / ours for plain, ours in zip(*seconds.values(), strict=True)]
    return {
        **{form: spread(values) for form, values in seconds.items()},
        "ratio": spread(ratios),
        "iterations": iterations,
    }


def generation(here: World, batches: Sequence[int], iterations: int, progress: bool) -> list[dict]:
    """Drawing images, and drawing them and reading CLIP's scores off them, at several batch sizes."""
    generator, clip = here.run.networks["generator"].eval(), here.run.clip
    rows = []
    for batch in batches:
        latent, sentence = here.inputs(batch)
        said = [here.captions[i % len(here.captions)] for i in range(batch)]

        def draw(form: str, latent=latent, sentence=sentence) -> Tensor:
            with torch.no_grad(), here.run.fabric.autocast():
                way = generator if form == "ours" else (lambda *given: plain_generate(generator, *given))
                return way(latent, sentence).clamp(-1, 1)

        def score(form: str, draw=draw, said=said) -> None:
            clip.embed_text(said)
            embed(clip, draw(form).float())

        for kind, work in (("generation", draw), ("evaluation", score)):
            found = compare(
                here,
                {form: lambda form=form, work=work: work(form) for form in FORMS},
                iterations,
                f"{kind}, batch {batch}",
                progress,
                drawing=True,
            )
            rate = {form: batch / found[form]["median"] for form in FORMS}
            rows.append({"kind": kind, "batch": batch, "images_per_second": rate, **found})
    generator.train()
    return rows


def parts(here: World, iterations: int, progress: bool) -> dict:
    """Median seconds and the operations of each part of our step, and the machine's matrix rate."""
    here.become("ours")
    measured = []
    for i in bar(range(iterations + 1), desc="parts", unit="step", enabled=progress):
        part = Parts(here.run.device)
        step_in_parts(here.run, here.batches, part)
        measured += [part.totals] if i else []
    counted = Parts(here.run.device, count=True)
    step_in_parts(here.run, here.batches, counted)
    rows = [
        {"part": name, "seconds": statistics.median(each[name] for each in measured), "operations": operations}
        for name, operations in counted.totals.items()
    ]
    operations = {form: 0 for form in FORMS}
    for form in FORMS:
        here.become(form)
        operations[form] = count_operations(here.step(form))
    here.become("ours")
    return {"rows": rows, "matrix_rate": matrix_rate(here.run.device), "step_operations": operations}


def scaling(profile: str, folder: str | Path, iterations: int, progress: bool) -> list[dict]:
    """How our step's time grows with the batch, the image's side and the LSTM's size, one at a time."""
    settings = load_settings(profile)
    side, batch = settings.model.image_size, settings.training.batch_size
    cases = [("batch", size, {}) for size in (batch // 2, batch, 2 * batch)]
    if settings.clip.source == "train":  # another CLIP's grid is fixed
        cases += [
            ("image_size", size, {"model.image_size": size, "data.crop": size, "data.resize": size})
            for size in sorted({max(16, side // 2), side, 2 * side})
        ]
    cases += [("hidden_size", size, {"model.hidden_size": size}) for size in (0, 16, 64, 256)]
    rows = []
    for name, value, overrides in bar(cases, desc="scaling", unit="case", enabled=progress):
        size = value if name == "batch" else batch
        here = world(profile, size, Path(folder) / f"{name}-{value}", overrides)
        here.become("ours")
        step = here.step("ours")
        step()
        seconds = [clock(step, here.run.device) for _ in range(iterations)]
        generator = sum(p.numel() for p in here.run.networks["generator"].parameters())
        rows.append(
            {
                "changes": name,
                "value": value,
                "batch": size,
                "seconds": spread(seconds),
                "generator_parameters": generator,
            }
        )
    return rows


def waiting(here: World, steps: int, workers: int) -> dict:
    """Share of a training loop's time spent waiting for data, with loader processes as in training."""
    here.become("ours")
    loader = DataLoader(
        here.batches,
        batch_size=None,
        sampler=range(here.run.step, here.run.step + steps + 1),
        num_workers=workers,
        pin_memory=here.run.device.type == "cuda",
    )
    source, waited, total = iter(loader), 0.0, 0.0
    training_step(here.run, next(source))  # the processes start
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(source)
        waited += time.perf_counter() - start
        training_step(here.run, batch)
        synchronise(here.run.device)
        total += time.perf_counter() - start
    return {"workers": workers, "steps": steps, "share_waiting": waited / total}


def alone(form: str, here: World, iterations: int) -> dict:
    """This process does steps of one form only: their seconds, and the most memory it held (MiB)."""
    before = peak_memory_mib(here.run.device)
    here.become(form)
    step = here.step(form)
    step()
    seconds = [clock(step, here.run.device) for _ in range(iterations)]
    return {"seconds": spread(seconds), "peak_mib": peak_memory_mib(here.run.device), "peak_before_mib": before}


def memory(options: argparse.Namespace) -> dict:
    """`alone` in a fresh process for each form."""
    found = {}
    for form in bar(FORMS, desc="memory", unit="process", enabled=options.progress):
        command = [
            sys.executable,
            "-m",
            "ratlip.studies.bench",
            "--profile",
            options.profile,
            "--batch",
            str(options.batch),
            "--iterations",
            str(options.iterations),
            "--threads",
            str(torch.get_num_threads()),
            "--precision",
            options.precision,
            "--accelerator",
            options.accelerator,
            "--form",
            form,
            "--set",
            *options.settings,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        found[form] = json.loads(done.stdout.splitlines()[-1])
    return found | {"ratio": found["ours"]["peak_mib"] / found["plain"]["peak_mib"]}


def report(found: dict) -> str:
    """The measurements as tables to read."""

    def rate(row: dict) -> str:
        ratio = row["ratio"]
        return (
            f"{row['plain']['median']:9.3f} s {row['ours']['median']:9.3f} s   {ratio['median']:5.2f} x "
            f"({ratio['low']:.2f} to {ratio['high']:.2f})"
        )

    lines = [
        f"profile {' '.join([found['profile'], *found['settings']])}, {found['image_size']} px, "
        f"batch {found['batch']}, {found['precision']}, {found['device']}, "
        f"{found['environment']['threads']} threads",
        f"{'':26s}{'plain':>11s} {'ours':>11s}   ratio (range)",
        f"{'training step':26s}{rate(found['step'])}",
    ]
    lines += [f"{row['kind'] + ', batch ' + str(row['batch']):26s}{rate(row)}" for row in found["generation"]]
    if "memory" in found:
        m = found["memory"]
        lines.append(
            f"{'peak memory, own process':26s}{m['plain']['peak_mib']:7d} MiB {m['ours']['peak_mib']:7d} MiB"
            f"   {m['ratio']:5.2f} x"
        )
        lines.append(
            f"{'step, own process':26s}{m['plain']['seconds']['median']:9.3f} s {m['ours']['seconds']['median']:9.3f} s"
        )
    table, total = found["parts"], sum(row["seconds"] for row in found["parts"]["rows"])
    lines += [
        "",
        f"matrix rate {table['matrix_rate'] / 1e9:.0f} GFLOP/s; operations of a step: plain "
        f"{table['step_operations']['plain'] / 1e9:.4g}, "
        f"ours {table['step_operations']['ours'] / 1e9:.4g} GFLOP",
        f"{'part':38s}{'s':>8s}{'share':>8s}{'GFLOP':>9s}{'GFLOP/s':>9s}{'of rate':>9s}",
    ]
    for row in table["rows"]:
        pace = row["operations"] / row["seconds"]
        lines.append(
            f"{row['part']:38s}{row['seconds']:8.3f}{row['seconds'] / total:8.1%}"
            f"{row['operations'] / 1e9:9.1f}{pace / 1e9:9.1f}{pace / table['matrix_rate']:9.1%}"
        )
    lines.append(
        f"{'all parts':38s}{total:8.3f}   waiting for data: {found['waiting']['share_waiting']:.1%} of the "
        f"loop with {found['waiting']['workers']} loader processes"
    )
    for row in found.get("scaling", []):
        lines.append(
            f"{row['changes']} {row['value']}: {row['seconds']['median']:.3f} s a step "
            f"({row['seconds']['low']:.3f} to {row['seconds']['high']:.3f}), batch {row['batch']}"
        )
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ratlip.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="cub", help="whose sizes (default: the published ones)")
    parser.add_argument("--batch", type=int, default=4, help="images a training step (default: 4)")
    parser.add_argument("--iterations", type=int, default=5, help="measured rounds of each comparison (default: 5)")
    parser.add_argument("--weights", choices=["random"], default="random", help="of CLIP; no time depends on them")
    parser.add_argument("--generation", type=int, nargs="*", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed", "16-mixed"])
    parser.add_argument("--accelerator", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--set",
        dest="settings",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="other settings, e.g. training.compile=true (see `ratlip.fast.options`)",
    )
    parser.add_argument("--workers", type=int, default=0, help="loader processes where waiting is measured")
    parser.add_argument("--scaling", action="store_true", help="also: growth with batch, image size and h")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the two fresh processes")
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    parser.add_argument("--out", type=Path, help="JSON file to write (reports/performance/NAME.json)")
    parser.add_argument("--show", type=Path, metavar="JSON", help="only print again what was measured before")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)  # what `memory` starts
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was measured."""
    options = _options(arguments)
    if options.show:
        print(report(read_json(options.show)))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    overrides = {
        "training.precision": options.precision,
        **{key: yaml.safe_load(value) for key, value in (each.split("=", 1) for each in options.settings)},
    }
    with tempfile.TemporaryDirectory() as folder:
        if options.form:
            here = world(options.profile, options.batch, folder, overrides, options.accelerator)
            print(json.dumps(alone(options.form, here, options.iterations)))
            return
        found = {"memory": memory(options)} if options.memory else {}
        here = world(options.profile, options.batch, folder, overrides, options.accelerator)
        steps = {form: here.step(form) for form in FORMS}
        found |= {
            "profile": options.profile,
            "settings": options.settings,
            "batch": options.batch,
            "precision": options.precision,
            "image_size": here.run.settings.model.image_size,
            "device": here.run.device.type,
            "environment": describe(),
            "step": compare(here, steps, options.iterations, "training step", options.progress),
            "parts": parts(here, options.iterations, options.progress),
            "waiting": waiting(here, options.iterations, options.workers),
            "generation": generation(here, options.generation, options.iterations, options.progress),
        }
        if options.scaling:
            found["scaling"] = scaling(options.profile, folder, options.iterations, options.progress)
    print(report(found))
    if options.out:
        write_json(options.out, found)


if __name__ == "__main__":
    main()
