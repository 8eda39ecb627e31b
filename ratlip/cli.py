"""`ratlip`: the one command line; a thin layer over the library.

Commands import what they need when they are called: with torch, `ratlip --help` takes 1.3 s instead of 0.3 s.
"""

from __future__ import annotations

import errno
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ratlip.errors import RatlipError, SettingsError, Stopped
from ratlip.files import read_json, shown
from ratlip.settings import load_settings, profile_names, read_overrides

if TYPE_CHECKING:
    from ratlip.workspace import Workspace

REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE}
UNFINISHED = 3  # exit status where the time was used before all runs were done
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The reproduction suite for RATLIP: prepare data, train, score, generate, compare, report. "
    "The notebooks do the same with explanations (`make lab`).",
)
notebook = typer.Typer(no_args_is_help=True, help="Execute notebooks, and store what they show.")
app.add_typer(notebook, name="notebook")
console = Console(highlight=False, emoji=False)

Profile = Annotated[str, typer.Option("--profile", "-p", help="a profile (`ratlip profiles`) or .yaml file")]
Data = Annotated[Path | None, typer.Option("--data", help="root of the dataset (not for demo, smoke)")]
Out = Annotated[Path | None, typer.Option("--out", help="where everything goes [outputs/<profile>]")]
_override = "override a setting, e.g. -s model.conditioning=cat -s seed=1; repeatable"
Set = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help=_override)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]
Accelerator = Annotated[str, typer.Option(help="auto, cpu, cuda")]
Workers = Annotated[int, typer.Option(help="loader processes")]


def say(*lines: str) -> None:
    """Print lines as they are: a path must not be broken where the terminal ends."""
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _workspace(profile: str, out: Path | None, pairs: list[str] | None, quiet: bool = False) -> Workspace:
    from ratlip.workspace import Workspace

    return Workspace.of(load_settings(profile, read_overrides(pairs)), out, progress=not quiet)


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


@app.command()
def download(
    dataset: Annotated[str, typer.Argument(help="birds, flowers or faces")],
    to: Annotated[Path, typer.Option("--to", help="dataset root to fill")],
    quiet: Quiet = False,
) -> None:
    """Fetch what has a stable public address (resuming, with checksums); say where the rest comes from."""
    from ratlip.data import download as fetcher

    if missing := fetcher.download(dataset, to, progress=not quiet):
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
    there = " (was already there; delete the folder to read the dataset again)" if before else ""
    say(f"{prepared.folder}: {len(prepared.train)} training and {len(prepared.test)} test images{there}")


@app.command()
def clip(profile: Profile = "demo", out: Out = None, settings: Set = None, quiet: Quiet = False) -> None:
    """Train or load the frozen CLIP, embed all captions, and report how well it finds the right caption."""
    from ratlip.clip.retrieval import retrieval

    workspace = _workspace(profile, out, settings, quiet)
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
    workspace = _workspace(profile, out, settings, quiet)
    say(str(workspace.train(accelerator=accelerator, devices=devices, workers=workers)))


@app.command()
def evaluate(profile: Profile = "demo", out: Out = None, settings: Set = None, quiet: Quiet = False) -> None:
    """Score a complete run, next to real images; writes scores.json into the run folder."""
    scores = _workspace(profile, out, settings, quiet).evaluate()
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
    run: Annotated[Path, typer.Option("--run", help="a run folder, e.g. outputs/demo/runs/...")],
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="images a caption")] = 8,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG, or folder of images")] = Path("grid.png"),
    names: Annotated[str, typer.Option(help="of single images: caption, or published (by batch)")] = "caption",
    batch_size: Annotated[int, typer.Option(min=1, help="images drawn together")] = 64,
    clip_folder: Annotated[Path | None, typer.Option(help="where the run's CLIP is, if not beside the run")] = None,
    device: Accelerator = "auto",
) -> None:
    """Draw your own captions with a trained run."""
    from ratlip.plots.pictures import caption_grid, save_images
    from ratlip.training.generation import Run, file_names

    files = file_names(len(captions), n, names, batch_size)
    if output.suffix not in ("", ".png", ".pdf", ".svg", ".jpg"):
        mend = "give a .png (or .pdf, .svg, .jpg) for one sheet, or a folder name without a dot for single images"
        raise SettingsError(f"--output {output}: {mend}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        opened = Run(run, device=device, clip_folder=clip_folder)
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
def grid(
    campaign: Annotated[Path | None, typer.Argument(help="run this file's parts, e.g. env/gpu/birds.yaml")] = None,
    profile: Profile = "demo",
    group: Annotated[list[str] | None, typer.Option(help="ablation, sweep, versus or study; repeatable")] = None,
    run: Annotated[bool, typer.Option("--run", help="train and score what is missing")] = False,
    minutes: Annotated[float | None, typer.Option(help="stop cleanly after so many minutes")] = None,
    runner: Annotated[str, typer.Option(help="papermill (keeps each run's notebook) or library")] = "papermill",
    jobs: Annotated[int, typer.Option(min=1, help="runs side by side, one thread each (runner library)")] = 1,
    collect: Annotated[Path | None, typer.Option(help="campaign: copy scores, losses and sample grids there")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="campaign: collect the checkpoints too")] = False,
    data: Data = None,
    out: Out = None,
    settings: Set = None,
    quiet: Quiet = False,
) -> None:
    """List the runs behind notebooks 04 to 08 and their state, or make what is missing, going on where it stopped.

    Exit status 3: the time was used before all runs were done; the same command goes on.
    """
    from ratlip.studies import campaign as campaigns
    from ratlip.studies import grid
    from ratlip.workspace import open_workspace

    if campaign:
        if group or settings or run:
            raise SettingsError(f"{campaign}: a campaign names its groups and settings itself; leave them out")
        stages = campaigns.read_campaign(campaign)
        left = campaigns.carry_out(stages, out, data, minutes, not quiet, jobs)
        if collect:
            say(f"collected in {campaigns.collect(stages, collect, out, weights)}")
        total = sum(len(stage.runs()) for stage in stages)
    else:
        if collect or weights:
            raise SettingsError("--collect, --weights: belong to a campaign; give its file, e.g. env/gpu/birds.yaml")
        if unknown := set(group or ()) - set(grid.GROUPS):
            raise SettingsError(f"--group {', '.join(unknown)}: should be one of {', '.join(grid.GROUPS)}")
        if runner not in ("papermill", "library"):
            raise SettingsError(f"--runner {runner}: should be papermill or library")
        workspace = open_workspace(profile, out, settings=settings, progress=not quiet)
        if run:
            workspace.prepare(data)
            grid.complete(workspace, *(group or ()), runner=runner, minutes=minutes, jobs=jobs)
        runs = grid.unique(grid.plan(workspace.settings, *(group or ())))
        say(*[f"{r.state(workspace.root):<8} {r.label:<24} seed {r.seed}  {r.name}" for r in runs])
        left, total = [r for r in runs if not r.complete(workspace.root)], len(runs)
    say(f"{total - len(left)} of {total} runs done")
    if left and (run or campaign):
        say(f"next: {left[0].label}, seed {left[0].seed}; the same command goes on")
        raise typer.Exit(UNFINISHED)


@app.command()
def study(
    profile: Profile = "study",
    release: Annotated[bool, typer.Option("--release", help="first copy what finished runs found")] = False,
    out: Out = None,
    folder: Annotated[Path | None, typer.Option("--report", help="the report's folder [reports/<profile>]")] = None,
    group: Annotated[str, typer.Option(help="part of the grid that is released")] = "study",
    settings: Set = None,
) -> None:
    """Tables, figures and answers of the study, from the raw results that are released with it; nothing is trained.

    `ratlip grid --profile study --runner library --jobs 2 --run` trains; `--release` copies the results to the report.
    """
    from ratlip.files import repository
    from ratlip.report import study as tables

    home = repository() / (folder or f"reports/{Path(profile).stem}")
    if release:
        from ratlip.studies import released
        from ratlip.workspace import open_workspace

        say(shown(released.release(open_workspace(profile, out, settings=settings), home, group)))
    say(shown(tables.write(home)))


@app.command()
def report(
    profile: Profile = "demo",
    out: Out = None,
    folder: Annotated[Path | None, typer.Option("--report", help="the report's folder [reports/<profile>]")] = None,
) -> None:
    """Make the page of a profile's report (index.html) from its tables, figures, verdicts and notebooks."""
    from ratlip.report import page

    say(shown(page.build(profile, out, folder)))


@app.command()
def bench(
    profile: Profile = "cub",
    batch: Annotated[int, typer.Option(min=1, help="images a training step")] = 4,
    iterations: Annotated[int | None, typer.Option(min=1, help="measured rounds [5; of a report's process: 3]")] = None,
    generation: Annotated[list[int] | None, typer.Option(help="batch size drawn; repeatable [1, 8]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads [PyTorch's choice]")] = None,
    precision: Annotated[str, typer.Option(help="32-true, bf16-mixed, 16-mixed")] = "32-true",
    accelerator: Accelerator = "auto",
    workers: Workers = 0,
    write: Annotated[Path | None, typer.Option("--json", help="JSON file to write")] = None,
    show: Annotated[Path | None, typer.Option(help="only print again what was written to this JSON file")] = None,
    report: Annotated[Path | None, typer.Option(help="measure all into this .json, and the .md beside it")] = None,
    section: Annotated[list[str] | None, typer.Option(help="of the report; repeatable [all]")] = None,
    again: Annotated[bool, typer.Option("--again", help="report: measure anew what is there")] = False,
    settings: Set = None,
    quiet: Quiet = False,
) -> None:
    """Measure how fast a training step is here, against the plain form of the same step, and where its time goes.

    With --report, everything that reports/performance.md shows, each case in a process of its own; the same command
    goes on where it was stopped.
    """
    from ratlip.studies import bench

    if show:
        if not show.is_file():
            raise SettingsError(f"--show {show}: there is no such file; `ratlip bench --json FILE` writes one")
        say(bench.report(read_json(show)))
        return
    sizes = tuple(generation or (1, 8))
    if report:
        from ratlip.report import performance as tables
        from ratlip.studies import performance

        if settings or report.suffix != ".json":
            raise SettingsError(f"--report {report}: give a .json file, and no --set: sections set what they compare")
        plan = performance.Plan(profile, batch, sizes, threads, accelerator, iterations or 3)
        for name in performance.chosen(section or []):
            say(shown(tables.write(report, performance.run(report, plan, [name], again, not quiet))))
        return
    how: dict[str, Any] = dict(batch=batch, iterations=iterations or 5, threads=threads, precision=precision)
    how |= dict(accelerator=accelerator, overrides=read_overrides(settings), workers=workers, progress=not quiet)
    say(bench.report(bench.run(profile, generation=sizes, json_path=write, **how)))


@notebook.command("run")
def run_notebook(
    source: Annotated[Path, typer.Argument(help="e.g. notebooks/03_train.ipynb")],
    out: Annotated[Path, typer.Option(help="the executed notebook")],
    parameters: Annotated[list[str] | None, typer.Option("-p", metavar="NAME=VALUE", help="repeatable")] = None,
) -> None:
    """Execute one notebook with parameters; an empty value or None keeps what the notebook says."""
    from ratlip.report import notebooks

    given = [pair for pair in parameters or [] if pair.partition("=")[2] not in ("", "None") or "=" not in pair]
    notebooks.execute(source, out, read_overrides(given))


@notebook.command()
def refresh(profile: Profile = "demo") -> None:
    """Store the outputs of the executed notebooks of reports/<profile>/ in notebooks/."""
    from ratlip.report import notebooks

    say(*map(shown, notebooks.refresh(profile)))


@notebook.command()
def smoke() -> None:
    """Make the references of the tests: the story on the profile smoke, executed into tests/notebooks/smoke/."""
    from ratlip.studies import workflow

    say(*map(shown, workflow.smoke_references()))


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
