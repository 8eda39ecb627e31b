#!/bin/sh
# Make .venv from a lock, or do nothing where it is up to date: sh env/venv.sh PYTHON LOCK (`make env` does).
#
# .venv/made-from is written last and holds all that .venv was made from. A .venv that lacks it (interrupted,
# or made by hand), that was made from something else or that was moved (its scripts name its place) is made
# anew.
set -eu
python=$1
lock=$2
venv=.venv
log=.venv.log
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

fail() {
    echo "make env: $*" >&2
    exit 1
}

progress() {
    if grep -q '^Installing collected' "$log"; then
        echo "unpacking"
    else
        echo "$(grep -cE '^(Collecting|Processing) ' "$log") packages found"
    fi
}

stop() {
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    fail "stopped before .venv was ready; the next make starts it afresh."
}

# What pip says goes to the log, for it says a lot; a line every half minute tells that it is alive.
# Its scratch files lie in .venv, so that they go with it: a stopped pip leaves them.
pip_install() {
    mkdir -p "$venv/tmp"
    TMPDIR="$PWD/$venv/tmp" "$venv/bin/python" -m pip install --progress-bar off "$@" >"$log" 2>&1 &
    pid=$!
    trap stop INT TERM HUP
    seconds=0
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        seconds=$((seconds + 1))
        [ $((seconds % 30)) -ne 0 ] || echo "  $seconds s: $(progress)"
    done
    wait "$pid" || {
        tail -n 12 "$log" >&2
        fail "pip failed (the end of $log is above). Check the network and the disk, then run make again."
    }
    trap - INT TERM HUP
    rm -rf "$venv/tmp"
}

name_one="name one: make PYTHON=/path/to/python3"
command -v "$python" >/dev/null || fail "there is no '$python'; install Python 3.11.4 or newer, or $name_one"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' ||
    fail "'$python' is $("$python" -V 2>&1), and ratlip needs Python 3.11.4 or newer; $name_one"
[ -f "$lock" ] || fail "REQUIREMENTS=$lock: there is no such file; env/ holds requirements-{cpu,gpu}.txt"

# In an activated .venv, `python3` is the one that is about to be removed: take the one it was made with.
python=$("$python" -c 'import sys; print(getattr(sys, "_base_executable", "") or sys.executable)')
wanted=$(
    pwd
    "$python" -c 'import sys; print(sys.executable, sys.version)'
    cat "$lock"
)

if [ "$wanted" != "$(cat "$venv/made-from" 2>/dev/null)" ]; then
    echo "Making .venv from $lock with $("$python" -V): once, some minutes, 2 GB (6 GB with CUDA)."
    rm -rf "$venv" "$log"
    "$python" -m venv "$venv" ||
        fail "'$python -m venv' failed; on Debian and Ubuntu, install the package python3-venv"
    pip_install -r "$lock"
    echo "$wanted" >"$venv/made-from"
fi
if ! cmp -s pyproject.toml "$venv/installed-pyproject.toml"; then
    pip_install --no-deps --no-build-isolation -e .
    cp pyproject.toml "$venv/installed-pyproject.toml"
    echo ".venv is ready."
fi
