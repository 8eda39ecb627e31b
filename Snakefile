# The order of the notebooks: make reproduce [PROFILE=...] [DATA=...] runs what is missing or out of date.
#
# Data and CLIPs are made once, with all cores; then every run of the grid (ratlip/studies/grid.py) is 03_train
# executed with other parameters, one thread each, as many side by side as there are cores; then notebooks 04 to
# 08 read the run folders, and one page links everything.
#
# What a result depends on (its settings, and the text of its notebook) is digested in `params.depends`. Snakemake
# keeps the digest in .snakemake/ and makes again what has another one, and nothing else. `params.given` holds paths,
# hence it is a function of `output`, which Snakemake does not keep. A changed function of ratlip/ starts nothing:
# SNAKEFLAGS=--forceall runs all once more.
#
# Two cases need more than `params`. Snakemake takes a page that came with git for made, whatever lies behind it:
# rule all asks for every file, and for an empty one that says that data and CLIPs were made here. And a new word in
# notebook 01 or 02 should not start every run: a rule waits for that empty file only where it is not there yet.
# (`ancient` would not do: where a job runs, Snakemake does not look at the params of those after it.)
#
# Where the jobs run on this machine, those of one thread are forks of one server that has imported everything
# (ratlip/report/warm.py): eleven seconds less a run. On a cluster each job is a program of its own.
#
# On the terminal a job says that it started, once a minute how far it is, and that it is done; all else goes to its
# file in outputs/<profile>/logs/, whose end is shown where it fails.
#
# `snakemake --lint` asks for a conda environment or a container in each rule: `make env` is the environment.
import atexit
import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT))
# Jobs find this Python and this ratlip first.
for name, first in {"PYTHONPATH": ROOT, "PATH": Path(sys.executable).parent}.items():
    os.environ[name] = os.pathsep.join(filter(None, [str(first), os.environ.get(name)]))

from ratlip.errors import RatlipError
from ratlip.report import warm
from ratlip.studies.workflow import plan

# From `--config`, or as make hands them over: there, no program takes a path for YAML or for a command.
PROFILE = str(config.get("profile") or os.environ.get("RATLIP_PROFILE") or "demo")
DATA = str(config.get("data") or os.environ.get("RATLIP_DATA") or "")
DATA = DATA and str(Path(DATA).expanduser().absolute())
try:
    PLAN = plan(PROFILE, DATA)
except RatlipError as error:
    print(f"ratlip: {error}", file=sys.stderr, flush=True)
    os._exit(2)  # nothing is open yet, and Snakemake would wrap the sentence in a traceback

PAGE = f"{PLAN.report}/index.html"
LOG = f"{PLAN.outputs}/logs"
# Threads that wait spin, and beside any other busy program that costs up to ten times the time: let them sleep.
EXECUTE = """
    export OMP_NUM_THREADS={threads} OMP_WAIT_POLICY=PASSIVE
    python ratlip/report/warm.py notebook run notebooks/{params.notebook}.ipynb --out {output.executed} {params.given} \
        2> {log} || {{ tail -n 40 {log} >&2; exit 1; }}
"""
GIVEN = lambda wildcards, output: PLAN.parameters[output.executed]


WARM = ExitStack()
atexit.register(WARM.close)


onstart:
    if workflow.local_exec:
        WARM.enter_context(warm.server(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE"))


localrules:
    all,


rule all:
    input: PAGE, PLAN.made, list(PLAN.executed.values())


rule prepare_data:
    output: executed=PLAN.executed["01_prepare_data"], made=touch(PLAN.made[0])
    log: f"{LOG}/01_prepare_data.log"
    params: notebook="01_prepare_data", depends=PLAN.depends["01_prepare_data"], given=GIVEN
    threads: 64  # or as many as there are
    shell: EXECUTE


rule prepare_clip:
    input: PLAN.reads["02_prepare_clip"]
    output: executed=PLAN.executed["02_prepare_clip"], made=touch(PLAN.made[1])
    log: f"{LOG}/02_prepare_clip.log"
    params: notebook="02_prepare_clip", depends=PLAN.depends["02_prepare_clip"], given=GIVEN
    threads: 64
    shell: EXECUTE


rule train:
    input: PLAN.reads["03_train"]
    output: executed=PLAN.executed["03_train"]
    log: f"{LOG}/03_train.log"
    params: notebook="03_train", depends=PLAN.depends["03_train"], given=GIVEN
    priority: 2  # the longest of the single-thread jobs, so that it does not end alone
    shell: EXECUTE


# One run of the grid. Its folder's name holds the hash of its settings, so what stands in it is never out of date.
rule run:
    input: PLAN.reads["run"]
    output: executed=f"{PLAN.outputs}/runs/{{run}}/03_train.ipynb"
    log: f"{LOG}/{{run}}.log"
    params: notebook="03_train", depends=lambda wildcards: PLAN.depends[wildcards.run], given=GIVEN
    wildcard_constraints: run="|".join(PLAN.runs)
    priority: 1
    shell: EXECUTE


# The notebooks that read runs; which ones, their metadata say.
for name in PLAN.studies:

    rule:
        name: name[3:]
        input: PLAN.reads[name]
        output: executed=PLAN.executed[name]
        log: f"{LOG}/{name}.log"
        params: notebook=name, depends=PLAN.depends[name], given=GIVEN
        shell: EXECUTE


rule report:
    input: [path for name, path in PLAN.executed.items() if name not in PLAN.runs]
    output: PAGE
    log: f"{LOG}/report.log"
    params: given=lambda wildcards, output: shlex.quote(PROFILE)
    shell: "python -m ratlip.cli report --profile {params.given} > {log} 2>&1 || {{ tail -n 40 {log} >&2; exit 1; }}"
