# The order of the notebooks: make reproduce [PROFILE=...] [DATA=...] runs what is missing or out of date.
#
# Data and CLIPs are made once, with all cores; then every run of the grid (ratlip/studies/grid.py) is 03_train
# executed with other parameters, one thread each, as many side by side as there are cores; then notebooks 04 to
# 08 read the run folders, and one page links everything. What a result depends on (its settings, and the text of
# its notebook) is written to outputs/<profile>/depends/, and where that changes it is made again, and nothing
# else. A changed function of ratlip/ starts nothing: SNAKEFLAGS=--forceall runs all once more.
import os
import shlex
import sys
from pathlib import Path

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

from ratlip.studies import workflow as ratlip_workflow
from ratlip.errors import RatlipError

PROFILE = config.get("profile") or "demo"
DATA = str(Path(config["data"]).expanduser().absolute()) if config.get("data") else ""
try:
    PLAN = ratlip_workflow.plan(PROFILE, DATA)
except RatlipError as error:
    print(f"ratlip: {error}", file=sys.stderr, flush=True)
    os._exit(2)  # nothing is open yet, and Snakemake would wrap the sentence in a traceback

REPORT = f"reports/{PLAN.settings.profile}"
PAGE = f"{REPORT}/index.html"
TARGETS = PLAN.targets(REPORT)
EXECUTED = {PLAN.executed(name): name for name in PLAN.runs}
PYTHON = shlex.quote(sys.executable)
# Threads that wait spin, and beside any other busy program that costs up to ten times the time: let them sleep.
RUN = f"OMP_NUM_THREADS={{threads}} OMP_WAIT_POLICY=PASSIVE {PYTHON} -m ratlip.report.notebooks run"
IN_REPORT = f"-p profile {shlex.quote(PROFILE)} -p report {REPORT}"


def depends(name):
    """What the rule of a notebook waits for: its own dependencies, and the runs that it reads."""
    return [PLAN.notebooks[name], *[PLAN.executed(run) for run in PLAN.groups.get(name, [])]]


rule all:
    input:
        PAGE,


rule prepare_data:
    params: notebook="notebooks/01_prepare_data.ipynb"
    input: depends("01_prepare_data")
    output: TARGETS["01_prepare_data"]
    threads: workflow.cores
    shell: RUN + f" {{params.notebook}} --out {{output}} {IN_REPORT} -p data {shlex.quote(DATA)}"


rule prepare_clip:
    params: notebook="notebooks/02_prepare_clip.ipynb"
    input: depends("02_prepare_clip"), TARGETS["01_prepare_data"]
    output: TARGETS["02_prepare_clip"]
    threads: workflow.cores
    shell: RUN + f" {{params.notebook}} --out {{output}} {IN_REPORT}"


rule train:
    params: notebook="notebooks/03_train.ipynb"
    input: depends("03_train"), TARGETS["02_prepare_clip"]
    output: TARGETS["03_train"]
    priority: 2  # the longest of the single-thread jobs, so that it does not end alone
    shell: RUN + f" {{params.notebook}} --out {{output}} {IN_REPORT}"


# One run of the grid. Its folder's name holds the hash of its settings, so what stands in it is never out of date.
rule run:
    params: notebook="notebooks/03_train.ipynb", given=lambda wildcards, output: PLAN.parameters[EXECUTED[str(output)]]
    input: lambda wildcards: PLAN.runs[wildcards.run], TARGETS["02_prepare_clip"]
    output: PLAN.executed("{run}")
    wildcard_constraints: run="|".join(PLAN.runs)
    priority: 1
    shell: RUN + " {params.notebook} --out {output} {params.given}"


rule ablation:
    input: depends("04_ablation")
    output: TARGETS["04_ablation"]
    shell: RUN + f" notebooks/04_ablation.ipynb --out {{output}} {IN_REPORT}"


rule hidden_size_sweep:
    input: depends("05_hidden_size_sweep")
    output: TARGETS["05_hidden_size_sweep"]
    shell: RUN + f" notebooks/05_hidden_size_sweep.ipynb --out {{output}} {IN_REPORT}"


rule grad_cam:
    input: depends("06_grad_cam")
    output: TARGETS["06_grad_cam"]
    shell: RUN + f" notebooks/06_grad_cam.ipynb --out {{output}} {IN_REPORT}"


rule paper_versus_code:
    input: depends("07_paper_versus_code")
    output: TARGETS["07_paper_versus_code"]
    shell: RUN + f" notebooks/07_paper_versus_code.ipynb --out {{output}} {IN_REPORT}"


rule figures_and_tables:
    input: depends("08_figures_and_tables"), TARGETS["03_train"]
    output: TARGETS["08_figures_and_tables"]
    priority: 1
    shell: RUN + f" notebooks/08_figures_and_tables.ipynb --out {{output}} {IN_REPORT}"


rule report:
    input: list(TARGETS.values())
    output: PAGE
    shell: f"{PYTHON} -m ratlip.report.page --profile {shlex.quote(PROFILE)}"


onsuccess:
    print("Done.", ratlip_workflow.closing(ROOT / REPORT), sep="\n")


# With nothing to do, Snakemake says nothing at all.
if getattr(workflow, "is_main_process", True) and ratlip_workflow.up_to_date(
    {**TARGETS, "page": PAGE, **{name: PLAN.executed(name) for name in PLAN.runs}},
    {**PLAN.notebooks, "page": PLAN.notebooks["08_figures_and_tables"], **PLAN.runs},
):
    print(f"{REPORT} is up to date.", ratlip_workflow.closing(ROOT / REPORT), sep="\n")
