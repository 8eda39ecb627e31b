# The order of the notebooks: make reproduce [PROFILE=...] [DATA=...] runs what is missing or out of date.
#
# Each rule executes one notebook of notebooks/ into reports/<profile>/notebooks/. What its result depends on
# (its settings and its text) is written to outputs/<profile>/depends/, and where that changes it runs again, and
# so do the notebooks after it, which is short: what did not change is found in outputs/, in folders named by the
# settings. A changed function of ratlip/ starts nothing: SNAKEFLAGS=--forceall runs all once more.
import os
import shlex
import sys
from pathlib import Path

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

from ratlip import notebooks
from ratlip.errors import RatlipError

PROFILE = config.get("profile") or "demo"
DATA = str(Path(config["data"]).expanduser().absolute()) if config.get("data") else ""
try:
    SETTINGS, DEPENDS = notebooks.plan(PROFILE, DATA)
except RatlipError as error:
    print(f"ratlip: {error}", file=sys.stderr, flush=True)
    os._exit(2)  # nothing is open yet, and Snakemake would wrap the sentence in a traceback

REPORT = f"reports/{SETTINGS.profile}"
NOTEBOOK = REPORT + "/notebooks/{}.ipynb"
TARGETS = {name: NOTEBOOK.format(name) for name in DEPENDS}
RUN = (f"OMP_NUM_THREADS={{threads}} {shlex.quote(sys.executable)} -m ratlip.notebooks run"
       f" {{params.notebook}} --out {{output}} -p profile {shlex.quote(PROFILE)}")


rule all:
    input:
        list(TARGETS.values()),


rule prepare_data:
    params: notebook="notebooks/01_prepare_data.ipynb"
    input: DEPENDS["01_prepare_data"]
    output: TARGETS["01_prepare_data"]
    threads: workflow.cores
    shell: RUN + f" -p data {shlex.quote(DATA)} -p report {REPORT}"


rule prepare_clip:
    params: notebook="notebooks/02_prepare_clip.ipynb"
    input: DEPENDS["02_prepare_clip"], TARGETS["01_prepare_data"]
    output: TARGETS["02_prepare_clip"]
    threads: workflow.cores
    shell: RUN + f" -p report {REPORT}"


rule train:
    params: notebook="notebooks/03_train.ipynb"
    input: DEPENDS["03_train"], TARGETS["02_prepare_clip"]
    output: TARGETS["03_train"]
    threads: workflow.cores
    shell: RUN + f" -p report {REPORT}"


onsuccess:
    print("Done.", notebooks.closing(ROOT / REPORT), sep="\n")


# With nothing to do, Snakemake says nothing at all.
if getattr(workflow, "is_main_process", True) and notebooks.up_to_date(TARGETS, DEPENDS):
    print(f"{REPORT} is up to date.", notebooks.closing(ROOT / REPORT), sep="\n")
