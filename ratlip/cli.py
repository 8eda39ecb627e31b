"""`ratlip`: the one command line; a thin layer over the library.

Commands import what they need when they are called: with torch, `ratlip --help` takes 1.3 s instead of 0.3 s.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ratlip.commands.shared import (
    Accelerator,
    Data,
    Out,
    Profile,
    Quiet,
    Set,
    Workers,
    app,
    console,
    own,
    say,
    workspace_of,
)
from ratlip.errors import RatlipError, SettingsError, Stopped
from ratlip.settings import load_settings, profile_names

REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE}
_MODEL = "a run folder, an exported model, or hf://owner/name [the newest main run, or the model that came along]"


@app.command()
def profiles(name: Annotated[str | None, typer.Argument(help="show all settings of it")] = None) -> None:
    """List the profiles, or show every setting of one."""
    if name:
        say(load_settings(name).to_yaml().rstrip())
        return
    table = Table("profile", "data", "px", "CLIP", "what it is")
    for each in profile_names():
        s = load_settings(each)
        source = "trained here" if s.clip.source == "train" else f"{s.clip.model} {s.clip.pretrained}"
        table.add_row(each, s.data.dataset, str(s.model.image_size), source, s.summary)
    console.print(table)


@own.command("new")
def new_profile(
    data: Annotated[Path, typer.Option("--data", help="folder of pictures with captions")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the profile to write")] = Path("my.yaml"),
) -> None:
    """Look at a folder of pictures and write a commented profile of sensible sizes for it and for this machine."""
    from ratlip.report import fresh

    s = fresh.new(data, output)
    say(f"{output}: {s.summary}; {s.training.steps} steps. All variants and notebooks:")
    say(f"  make reproduce PROFILE={output} DATA={data}", "Pictures alone:")
    say(f"  ratlip prepare -p {output} --data {data} && ratlip train -p {output}")
    say('  ratlip generate "one caption" "another one"')


@app.command()
def download(
    dataset: Annotated[str, typer.Argument(help="birds, flowers or faces")],
    to: Annotated[Path, typer.Option("--to", help="dataset root to fill")],
    quiet: Quiet = False,
) -> None:
    """Say sizes and licence, fetch what has a public address (resuming, with checksums), say where the rest is."""
    from ratlip.data import download as fetcher

    say(*fetcher.announced(dataset, to))
    if missing := fetcher.download(dataset, to, progress=not quiet):
        say(f"Still missing in {to}:", *[f"  {item}" for item in missing], fetcher.instructions(dataset))
    else:
        say(f"{to}: complete. Next: ratlip prepare --profile ... --data {to}")


@app.command()
def prepare(
    profile: Profile = "demo", data: Data = None, out: Out = None, settings: Set = None, quiet: Quiet = False
) -> None:
    """Check a dataset root, resize its images once, write them with their captions as one Arrow dataset."""
    workspace = workspace_of(profile, out, settings, quiet)
    before = (workspace.prepared_folder / "manifest.json").is_file()
    prepared = workspace.prepare(data)
    there = " (was already there; delete the folder to read the dataset again)" if before else ""
    say(f"{prepared.folder}: {len(prepared.train)} training and {len(prepared.test)} test images{there}")


@app.command()
def clip(profile: Profile = "demo", out: Out = None, settings: Set = None, quiet: Quiet = False) -> None:
    """Train or load the frozen CLIP, embed all captions, and report how well it finds the right caption."""
    from ratlip.clip.retrieval import retrieval

    workspace = workspace_of(profile, out, settings, quiet)
    workspace.sentences()
    found = retrieval(workspace.clip, workspace.prepared.test, distractors=workspace.prepared.train)["image_to_text"]
    first = (
        f"{workspace.clip.name}: R@1 {found['R@1']:.1%} (chance {found['chance_R@1']:.1%}), R@10 {found['R@10']:.1%}"
    )
    say(f"{first}, median rank {found['median_rank']:.0f} on {len(workspace.prepared.test)} test images")
    if (s := workspace.settings).data.generated:
        from ratlip.studies.inspection import told_apart

        told = told_apart(workspace.clip, workspace.prepared, workspace.clip.image_size, s.data.crop)
        say(
            "closer to its caption than to it with one word changed: "
            + ", ".join(f"{k} {v:.1%}" for k, v in told.items())
        )


@app.command()
def train(
    profile: Profile = "demo",
    out: Out = None,
    settings: Set = None,
    accelerator: Accelerator = "auto",
    devices: Annotated[int, typer.Option(help="number of processes, one device each")] = 1,
    workers: Workers = 0,
    quiet: Quiet = False,
) -> None:
    """Train one run, or go on where it was stopped."""
    workspace = workspace_of(profile, out, settings, quiet)
    say(str(workspace.train(accelerator=accelerator, devices=devices, workers=workers)))


@app.command()
def evaluate(profile: Profile = "demo", out: Out = None, settings: Set = None, quiet: Quiet = False) -> None:
    """Score a complete run, next to real images; writes scores.json into the run folder."""
    scores = workspace_of(profile, out, settings, quiet).evaluate()
    real, labels = scores["real"], scores["labels"]
    title = f"{scores['run']}, {scores['images']} images (real: {real['images']}), {scores['protocol']} protocol"
    table = Table("score", "generated", "real", title=title)
    distances = ("frechet_distance", "kernel_distance", "inception_score", "precision", "recall")
    for key in ("clip_similarity", "independent_similarity", *distances):
        if scores[key] is not None:
            table.add_row(labels[key], f"{scores[key]:.4g}", f"{real[key]:.4g}")
    for name, share in scores.get("judge", {}).items():
        table.add_row(f"{name} right", f"{share:.1%}", f"{real['judge'][name]:.1%}")
    if "judge_all" in scores:
        table.add_row(labels["judge_all"], f"{scores['judge_all']:.1%}", f"{real['judge_all']:.1%}")
    console.print(table)


@app.command()
def generate(
    captions: Annotated[list[str], typer.Argument(help="one caption or more, each in quotes")],
    run: Annotated[str | None, typer.Option("--run", help=_MODEL)] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="images a caption")] = 8,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG, or folder of images")] = Path("grid.png"),
    names: Annotated[str, typer.Option(help="of single images: caption, or published (by batch)")] = "caption",
    batch_size: Annotated[int, typer.Option(min=1, help="images drawn together")] = 64,
    clip_folder: Annotated[Path | None, typer.Option(help="where the run's CLIP is, if not beside the run")] = None,
    device: Accelerator = "auto",
) -> None:
    """Draw your own captions with a trained model; which one, it says."""
    if wrong := next((caption for caption in captions if os.path.lexists(caption)), None):
        mend = "give the model with --run, and each caption in quotes"
        raise SettingsError(f"{wrong}: is a file or folder here, and no caption; {mend}")
    from ratlip.plots.pictures import caption_grid, save_images
    from ratlip.training.choice import default_model
    from ratlip.training.generation import Run, file_names

    files = file_names(len(captions), n, names, batch_size)
    if output.suffix not in ("", ".png", ".pdf", ".svg", ".jpg"):
        mend = "give a .png (or .pdf, .svg, .jpg) for one sheet, or a folder name without a dot for single images"
        raise SettingsError(f"--output {output}: {mend}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        opened = Run(run or default_model(), device=device, clip_folder=clip_folder)
        images = opened.generate(captions, n, seed, batch_size)
    stderr = Console(stderr=True, highlight=False, emoji=False)  # stdout holds the path alone, for other programs
    stderr.print(f"drawn by {opened}", markup=False, soft_wrap=True)
    for warning in caught:
        if "no effect" in str(warning.message):
            stderr.print(f"note: {warning.message}", markup=False)
    if output.suffix:
        caption_grid(images, captions, output)
    else:
        save_images(images.flatten(0, 1), output, files)
    say(str(output))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run folder, e.g. outputs/demo/runs/...")],
    to: Annotated[Path, typer.Option("--to", help="the folder to make")],
    caption: Annotated[
        list[str] | None, typer.Option(help="of the sample grid; repeatable [of the test split]")
    ] = None,
    clip_folder: Annotated[Path | None, typer.Option(help="where the run's CLIP is, if not beside the run")] = None,
) -> None:
    """Pack a run into one folder that needs nothing beside it: weights, settings, model card, sample grid."""
    from ratlip.report import card

    folder = card.export(run, to, caption or (), clip_folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(f'{folder}: {size / 1e6:.1f} MB; `ratlip generate --run {folder} "..."` draws with it')


from ratlip.commands import results  # noqa: E402, F401  # registers the other commands, after these


def main() -> None:
    """Entry point: a user's mistake is one message and exit status 2, no traceback; after a signal, 143 or 130."""
    try:
        app()
    except (RatlipError, Stopped) as error:
        stderr = Console(stderr=True, highlight=False, emoji=False)
        said, status = (error.message, error.code) if isinstance(error, Stopped) else (error, 2)
        stderr.print(f"ratlip: {said}", markup=False, style="red", soft_wrap=True)
        sys.exit(status)
    except OSError as error:  # what a disk, its rights or a limit refuse; others are mistakes of ours
        if error.errno not in REFUSED:
            raise
        mend = "free disk space, raise the limit, mend the rights, or choose another folder"
        print(f"ratlip: {error.filename or 'a file'}: {error.strerror}; {mend}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
