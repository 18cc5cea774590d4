#!/usr/bin/env bash
# The same set-up as demo.sh, then the default test lane: no network, no GPU.
#
#     bash scripts/test.sh                                    everything that is not slow and needs no network
#     bash scripts/test.sh tests/test_rng.py -x               further arguments go to pytest, which runs in the repository
#     bash scripts/test.sh -n 0                               in one process (-n 0 --pdb: with a debugger)
#     bash scripts/test.sh --run-slow -m "slow and not alone and not nightly and not cuda and not integration"
#
# Two tests run at a time on two cores, four at most; each test process computes with one thread.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$repository"
exec python -m pytest -n logical --maxprocesses 4 --dist worksteal -m "not slow and not integration" "$@"
