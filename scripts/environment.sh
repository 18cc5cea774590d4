# shellcheck shell=bash
# Sourced by demo.sh, test.sh and .ci/run: puts an environment that holds the tested set first on PATH.
#
# It takes the active virtual environment, else .venv in the repository, which it makes if there is none, and installs
# into it what is missing: on a fresh machine a few minutes, afterwards nothing. Sets `repository` and `environment` (two
# folders). Everything it says goes to stderr. Bash 3.2 (macOS) is enough.

repository="$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
environment="" # the folder of the virtual environment

say() { printf '%s\n' "$*" >&2; }

refuse() {
    say "$@"
    exit 2
}

is_tested_python() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

can_make_environments() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

# Prints the Python to make .venv with: $PYTHON, else the user's own python3 if the tested set covers it, else the newest
# tested one, else any that is new enough. Each is run, not just looked for: a version manager's shim may answer to a
# name that it has no Python for.
find_python() {
    local candidate without_venv=""
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if [ "$candidate" = "${PYTHON:-}" ]; then
            is_new_enough "$candidate" || refuse "PYTHON=$PYTHON is not a Python 3.11 or newer"
        else
            is_tested_python "$candidate" || continue
        fi
        if can_make_environments "$candidate"; then
            command -v "$candidate"
            return
        fi
        without_venv="$candidate"
    done
    for candidate in python3 python; do
        if is_new_enough "$candidate" && can_make_environments "$candidate"; then
            say "$candidate is newer than the tested versions (3.11 to 3.13); trying it"
            command -v "$candidate"
            return
        fi
    done
    if [ -n "$without_venv" ]; then
        refuse "$without_venv cannot make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv"
    fi
    refuse "no Python 3.11, 3.12 or 3.13 on PATH (tried python3, python3.13, python3.12, python3.11)" \
        $'\ninstall one from https://www.python.org/downloads/, or name one: PYTHON=/path/to/python bash scripts/demo.sh'
}

# Prints the folder of the active virtual environment: what `activate` set, or that of a `python` put on PATH by hand,
# or a conda environment other than base.
active_environment() {
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        if [ -x "$VIRTUAL_ENV/bin/python" ]; then
            printf '%s\n' "$VIRTUAL_ENV"
            return
        fi
        say "VIRTUAL_ENV names $VIRTUAL_ENV, which holds no Python; taking no notice of it"
    fi
    python -c 'import sys; print(sys.prefix) if sys.prefix != sys.base_prefix else sys.exit(1)' 2>/dev/null && return
    if [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ] && [ -x "$CONDA_PREFIX/bin/python" ]; then
        printf '%s\n' "$CONDA_PREFIX"
    fi
}

make_environment() {
    local python
    python="$(find_python)" || exit
    say "making $environment with $("$python" --version 2>&1) ($python)"
    "$python" -m venv "$environment" >&2 || refuse "could not make a virtual environment in $environment"
}

install_tested_set() {
    if ! python -m pip --version >/dev/null 2>&1; then # environments made by uv have no pip
        python -m ensurepip >&2 || refuse "$environment has no pip, and ensurepip could not install it"
    fi
    say "installing the tested set into $environment: a few minutes, and 2 GB or more the first time"
    if [ "$(uname -s)" = Linux ] && [ ! -e /dev/nvidiactl ] && [ -z "${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}" ]; then
        say "(no NVIDIA GPU here: a CPU build of the pinned torch, installed beforehand, saves several gigabytes)"
    fi
    (cd "$repository" && python -m pip install --disable-pip-version-check --no-input \
        -e ".[text2image,dev]" -c constraints.txt) >&2 || refuse \
        "the installation failed; the cause is above. Run the same command again once it is mended"
}

environment="$(active_environment)"
if [ -z "$environment" ]; then
    environment="$repository/.venv"
    [ -x "$environment/bin/python" ] || make_environment
fi
is_new_enough "$environment/bin/python" || refuse \
    "$environment has $("$environment/bin/python" --version 2>&1), and difftrain needs 3.11 or newer:" \
    "deactivate it, or make it anew with a newer Python"

export VIRTUAL_ENV="$environment"
export PATH="$environment/bin:$PATH"
unset PYTHONHOME
hash -r

python "$repository/scripts/environment_ready.py" || install_tested_set
