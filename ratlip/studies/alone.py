"""One measurement in a process of its own: nothing that ran before it warms it, nor keeps memory for it.

`fresh(case)` starts it, `measure(case)` is what it does. A case is a plain dictionary: `kind` (a key of `KINDS`),
`threads`, `accelerator`, and what its kind names below. What comes back is plain JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ratlip.errors import RunError
from ratlip.studies import bench, diffusion
from ratlip.studies.bench import World, clock, spread
from ratlip.training.loop import peak_memory_mib
from ratlip.training.session import build_networks

MOVED = 0.02  # standard deviation of what is added to fresh weights before losses and gradients are compared
OF_D, OF_G = ("real", "mismatch", "fake", "penalty", "total"), ("logit", "similarity", "total")


def fresh(case: dict[str, Any]) -> dict[str, Any]:
    """`measure(case)` in a fresh process; {"failed": why} where the system ended it, as it does without memory."""
    command = [sys.executable, "-m", "ratlip.studies.alone", json.dumps(case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode < 0:
        return {"failed": f"ended by the system (signal {-done.returncode}); most likely too little memory"}
    if done.returncode:
        raise RunError(f"{case}: the measurement stopped with status {done.returncode}; its message stands above")
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Do what `case["kind"]` names, in this process."""
    if case.get("threads"):
        torch.set_num_threads(case["threads"])
    with tempfile.TemporaryDirectory() as folder:
        return KINDS[case["kind"]](case, Path(folder))


def build(case: dict[str, Any], folder: Path) -> World:
    """The world that a case names: profile, batch, settings, form."""
    overrides = {"training.precision": case.get("precision", "32-true"), **case.get("settings", {})}
    return bench.world(case["profile"], case["batch"], folder, overrides, case["accelerator"], case["form"])


def steps(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`rounds` training steps after `warm` (1) unmeasured ones: seconds, and MiB held before and at most with them.

    `reference`: a file of `gradients`; then also the deviation from it.
    """
    here = build(case, folder)
    here.memory()
    device, before = here.run.device, held_mib(here.run.device)
    first = [clock(here.step, device) for _ in range(case.get("warm", 1))][0]
    seconds = [clock(here.step, device) for _ in range(case["rounds"])]
    found = {"seconds": spread(seconds), "first": first, "held_mib": before, "peak_mib": peak_memory_mib(device)}
    for name in ("generator", "discriminator"):
        found[f"{name}_parameters"] = sum(p.numel() for p in here.run.networks[name].parameters())
    if case.get("reference"):
        reference = torch.load(case["reference"], weights_only=True)
        found["deviation"] = deviation(losses_and_gradients(here), reference)
    return found


def drawing(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Generation from words and evaluation at each batch size of `counts`, `rounds` times after one unmeasured.

    The peak of memory is that of all so far: the batch sizes should grow.
    """
    here, rows = build(case, folder), []
    held = held_mib(here.run.device)
    works: dict[str, Callable] = {"generation": bench.draw, "words": words_and_draw, "evaluation": bench.score}
    for count in case["counts"]:
        for kind in case["kinds"]:
            here.memory(drawing=True)
            work = partial(works[kind], here, count)
            work()
            row = diffusion.timed(work, here.run.device, case["rounds"])
            rows.append({"work": kind, "batch": count, **row, "peak_mib": peak_memory_mib(here.run.device)})
    generator = sum(p.numel() for p in here.run.networks["generator"].parameters())
    towers = sum(p.numel() for p in here.run.clip.model.parameters())
    sizes = {"generator": generator, "frozen CLIP": towers}
    side = here.run.settings.model.image_size
    return {"rows": rows, "held_mib": held, "parameters": sizes, "side": side}


def words_and_draw(here: World, count: int) -> Tensor:
    """From captions to images (count,3,S,S): what a user waits for."""
    here.run.clip.embed_text([here.captions[i % len(here.captions)] for i in range(count)])
    return bench.draw(here, count)


def parts(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`bench.parts`: where a step's time goes, at which share of the matrix rate."""
    worlds = {form: build({**case, "form": form}, folder / form) for form in bench.FORMS}
    return bench.parts(worlds, case["rounds"])


def gradients(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write `losses_and_gradients` of a world to `case["save"]`: what others are compared with."""
    torch.save(losses_and_gradients(build(case, folder)), case["save"])
    return {}


def denoising(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`diffusion.measure` for `batch` images of `side` pixels."""
    device = bench.loop.processes(case["accelerator"], 1, bench.load_settings("smoke").training).device
    model = diffusion.Diffusion.build(device)
    return diffusion.measure(model, case["batch"], case["side"], case["rounds"], case["whole"])


KINDS = {"steps": steps, "drawing": drawing, "parts": parts, "gradients": gradients, "denoising": denoising}


def held_mib(device: torch.device) -> int:
    """Memory held now: by tensors on a GPU, by the whole process on a CPU (where the system tells, else the peak)."""
    if device.type == "cuda":
        return round(torch.cuda.memory_allocated(device) / 2**20)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("VmRSS")]
    return round(kib[0] / 2**10) if kib else peak_memory_mib(device)


def losses_and_gradients(here: World) -> dict[str, dict[str, Tensor]]:
    """One step's losses, and both networks' gradients, as the optimisers are given them.

    The weights are the fresh ones of the settings' seed, moved by `MOVED` times a fixed normal draw (fresh affines are
    the identity and fresh gates shut, which would hide half of the gradients); batch and latents are the first. Nothing
    is updated, so that G's gradient comes from the same D everywhere.
    """
    run = here.run
    found: dict[str, dict[str, Tensor]] = {}
    with torch.random.fork_rng(devices=[]):
        networks: dict[str, nn.Module] = dict(
            zip(("generator", "discriminator"), build_networks(run.settings, run.clip), strict=True)
        )
    noise = torch.Generator().manual_seed(1)
    optimisers: dict[str, Any] = here.plain_step.optimisers if here.plain_step else run.optimisers
    for name, network in networks.items():
        state = network.state_dict()
        for key, parameter in network.named_parameters():
            state[key] = parameter.detach() + MOVED * torch.randn(parameter.shape, generator=noise)
        own, optimiser = run.networks[name], getattr(optimisers[name], "optimizer", optimisers[name])
        own.load_state_dict(state)
        for group in optimiser.param_groups:
            group["lr"] = 0.0
        optimiser.register_step_pre_hook(partial(_keep, found.setdefault(name, {}), own))
    run.step = 0
    losses = zip((OF_D, OF_G), here.step(), strict=True)
    found["losses"] = {
        f"{side} {name}": getattr(loss, name).detach().float().cpu()
        for side, (names, loss) in zip("DG", losses, strict=True)
        for name in names
    }
    return found


def _keep(seen: dict[str, Tensor], network: nn.Module, *_) -> None:
    named = network.named_parameters()
    seen.update({key: p.grad.detach().float().cpu().clone() for key, p in named if p.grad is not None})


def deviation(mine: dict[str, dict[str, Tensor]], reference: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """How far losses and gradients lie from the reference's.

    losses: the largest |mine - reference| / max(1, |reference|) of all terms of both losses. generator, discriminator:
    `all`, the length of the difference of the whole gradients over the reference's length; `worst`, the same for
    single tensors, the largest of those that hold at least a thousandth of the reference's length, and its name.
    """
    losses = reference["losses"].items()
    terms = {name: ((mine["losses"][name] - each).abs() / each.abs().clamp(min=1)).item() for name, each in losses}
    term = _largest(terms)
    found: dict[str, Any] = {"losses": terms[term], "loss": term}
    for network in ("generator", "discriminator"):
        theirs = {name: grad.double() for name, grad in reference[network].items()}
        if theirs.keys() != mine[network].keys():
            raise RunError(f"{network}: other tensors have gradients than in the reference; they cannot be compared")
        apart = {name: (mine[network][name].double() - grad).norm().item() for name, grad in theirs.items()}
        length = {name: grad.norm().item() for name, grad in theirs.items()}
        total = sum(each**2 for each in length.values()) ** 0.5
        shares = {name: apart[name] / each for name, each in length.items() if each >= 1e-3 * total}
        whole = sum(each**2 for each in apart.values()) ** 0.5 / total
        worst = _largest(shares)
        found[network] = {"all": whole, "worst": shares[worst], "tensor": worst}
    return found


def _largest(values: dict[str, float]) -> str:
    """The name of the largest; one that is no number counts as such."""
    return list(values)[int(torch.tensor(list(values.values())).argmax())]


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
