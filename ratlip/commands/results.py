"""Commands about many runs and what they say: grid, study, verify, report, bench, notebook."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ratlip.commands.shared import (
    Accelerator,
    Data,
    Out,
    Profile,
    Quiet,
    Set,
    Workers,
    app,
    notebook,
    say,
    workspace_of,
)
from ratlip.errors import SettingsError
from ratlip.files import read_json, shown
from ratlip.settings import read_overrides

UNFINISHED = 3  # exit status where the time was used before all runs were done


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
    probes: Annotated[bool, typer.Option("--probes", help="with --release: read off what each layer knows")] = False,
    out: Out = None,
    folder: Annotated[Path | None, typer.Option("--report", help="the report's folder [reports/<profile>]")] = None,
    settings: Set = None,
) -> None:
    """Tables, figures and answers of the study, from the raw results that are released with it; nothing is trained.

    `ratlip grid --profile study --runner library --jobs 2 --run` trains; `--release` copies the results to the report.
    """
    from ratlip.files import repository
    from ratlip.report import study as tables
    from ratlip.report import verify as checks

    home = repository() / (folder or f"reports/{Path(profile).stem}")
    if release:
        from ratlip.studies import released

        workspace = workspace_of(profile, out, settings)
        say(shown(released.release(workspace, home)))
        if probes:
            released.probe(workspace, home)
    say(shown(tables.write(home)))
    if release:
        say(shown(checks.seal(home)))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="released results")] = Path("reports/study"),
    profile: Profile = "study",
    rerun: Annotated[list[str] | None, typer.Option(metavar="LABEL:SEED", help="train it anew; repeatable")] = None,
    out: Out = None,
    settings: Set = None,
    quiet: Quiet = False,
) -> None:
    """Say PASS, FAIL or INCONCLUSIVE: are released results intact, do they follow from raw data, do they come again?

    Exit status 1 where a level fails. `--rerun "CAT + SA:0"` trains a released run anew, which takes minutes.
    """
    from ratlip.report import verify as checks

    found = checks.verify(folder, workspace_of(profile, out, settings, quiet), rerun or [])
    for each in found:
        say(f"{each.state:<13} {each.level}", *(f"    {line}" for line in each.found))
    if any(each.state == checks.FAIL for each in found):
        raise typer.Exit(1)


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
