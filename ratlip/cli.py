"""`ratlip`: a thin command line over `ratlip.workspace` and `ratlip.training.generation`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from ratlip.errors import RatlipError, SettingsError
from ratlip.settings import Settings, load_settings, profile_names, read_overrides

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The reproduction suite for RATLIP: prepare data, train, score, generate. "
    "The notebooks do the same with explanations (`make lab`).",
)
console = Console(highlight=False, emoji=False)

Profile = Annotated[str, typer.Option("--profile", "-p", help="a profile (`ratlip profiles`) or .yaml file")]
Data = Annotated[Optional[Path], typer.Option("--data", help="root of the dataset (not for demo, smoke)")]
Out = Annotated[Optional[Path], typer.Option("--out", help="where everything goes [outputs/<profile>]")]
Set = Annotated[
    Optional[list[str]],
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="override a setting, e.g. -s model.conditioning=cat -s seed=1; repeatable",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]


def say(*lines: str) -> None:
    """Print lines as they are: a path must not be broken where the terminal ends."""
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _workspace(profile: str, out: Path | None, pairs: list[str] | None, quiet: bool = False):
    from ratlip.workspace import Workspace  # takes seconds: `--help` and `profiles` should not wait

    return Workspace.of(load_settings(profile, read_overrides(pairs)), out, progress=not quiet)


@app.command()
def profiles(name: Annotated[Optional[str], typer.Argument(help="show all settings of it")] = None) -> None:
    """List the profiles, or show every setting of one."""
    if name:
        say(load_settings(name).to_yaml().rstrip())
        return
    table = Table("profile", "data", "px", "CLIP", "what it is")
    for each in profile_names():
        s: Settings = load_settings(each)
        source = "trained here" if s.clip.source == "train" else f"{s.clip.model} {s.clip.pretrained}"
        table.add_row(each, s.data.dataset, str(s.model.image_size), source, s.summary)
    console.print(table)


@app.command()
def download(
    dataset: Annotated[str, typer.Argument(help="birds, flowers or faces")],
    to: Annotated[Path, typer.Option("--to", help="dataset root to fill")],
    quiet: Quiet = False,
) -> None:
    """Fetch what has a stable public address (resuming, with checksums); say where the rest comes from."""
    from ratlip.data import download as fetcher

    missing = fetcher.download(dataset, to, progress=not quiet)
    if missing:
        say(f"Still missing in {to}:", *[f"  {item}" for item in missing], fetcher.instructions(dataset))
    else:
        say(f"{to}: complete. Next: ratlip prepare --profile ... --data {to}")


@app.command()
def prepare(
    profile: Profile = "demo", data: Data = None, out: Out = None, settings: Set = None, quiet: Quiet = False
) -> None:
    """Check a dataset root, resize its images once, write them with their captions as one Arrow dataset."""
    workspace = _workspace(profile, out, settings, quiet)
    before = (workspace.prepared_folder / "manifest.json").is_file()
    prepared = workspace.prepare(data)
    say(
        f"{prepared.folder}: {len(prepared.train)} training and {len(prepared.test)} test images"
        + (" (was already there; delete the folder to read the dataset again)" if before else "")
    )


@app.command()
def clip(profile: Profile = "demo", out: Out = None, settings: Set = None, quiet: Quiet = False) -> None:
    """Train or load the frozen CLIP, embed all captions, and report how well it finds the right caption."""
    from ratlip.clip.retrieval import retrieval

    workspace = _workspace(profile, out, settings, quiet)
    workspace.sentences()
    found = retrieval(workspace.clip, workspace.prepared.test, distractors=workspace.prepared.train)["image_to_text"]
    say(
        f"{workspace.clip.name}: R@1 {found['R@1']:.1%} (chance {found['chance_R@1']:.1%}), "
        f"R@10 {found['R@10']:.1%}, median rank {found['median_rank']:.0f} "
        f"on {len(workspace.prepared.test)} test images"
    )


@app.command()
def train(
    profile: Profile = "demo",
    out: Out = None,
    settings: Set = None,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    devices: Annotated[int, typer.Option(help="number of processes, one device each")] = 1,
    workers: Annotated[int, typer.Option(help="loader processes")] = 0,
    quiet: Quiet = False,
) -> None:
    """Train one run, or go on where it was stopped."""
    workspace = _workspace(profile, out, settings, quiet)
    folder = workspace.train(accelerator=accelerator, devices=devices, workers=workers)
    say(f"{folder}")


@app.command()
def evaluate(profile: Profile = "demo", out: Out = None, settings: Set = None, quiet: Quiet = False) -> None:
    """Score a complete run, next to real images; writes scores.json into the run folder."""
    scores = _workspace(profile, out, settings, quiet).evaluate()
    real, labels = scores["real"], scores["labels"]
    table = Table(
        "score",
        "generated",
        "real",
        title=f"{scores['run']}, {scores['images']} images (real: {real['images']}), {scores['protocol']} protocol",
    )
    for key in (
        "clip_similarity",
        "independent_similarity",
        "frechet_distance",
        "kernel_distance",
        "inception_score",
        "precision",
        "recall",
    ):
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
    run: Annotated[Path, typer.Option("--run", help="a run folder, e.g. outputs/demo/runs/...")],
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="images a caption")] = 8,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG, or a folder for single images")] = Path(
        "grid.png"
    ),
    names: Annotated[
        str, typer.Option(help="of single images: caption, or published (by batch: later ones overwrite)")
    ] = "caption",
    batch_size: Annotated[int, typer.Option(min=1, help="images drawn together")] = 64,
    clip_folder: Annotated[Optional[Path], typer.Option(help="where the run's CLIP is, if not beside the run")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
) -> None:
    """Draw your own captions with a trained run."""
    from ratlip.plots.pictures import caption_grid, save_images
    from ratlip.training.generation import Run, file_names

    files = file_names(len(captions), n, names, batch_size)
    if output.suffix not in ("", ".png", ".pdf", ".svg", ".jpg"):
        raise SettingsError(
            f"--output {output}: give a .png (or .pdf, .svg, .jpg) for one sheet, or a "
            "folder name without a dot for single images"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        images = Run(run, device=device, clip_folder=clip_folder).generate(captions, n, seed, batch_size)
    for warning in caught:
        if "no effect" in str(warning.message):
            Console(stderr=True).print(f"note: {warning.message}", markup=False)
    if output.suffix:
        caption_grid(images, captions, output)
    else:
        save_images(images.flatten(0, 1), output, files)
    say(f"{output}")


def main() -> None:
    """Entry point: a user's mistake is one message and exit status 2, not a traceback."""
    try:
        app()
    except RatlipError as error:
        stderr = Console(stderr=True, highlight=False, emoji=False)
        stderr.print(f"ratlip: {error}", markup=False, style="red", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
