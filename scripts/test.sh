#!/usr/bin/env bash
# The same set-up as demo.sh, then the default test lane: no network, no GPU.
#
#     bash scripts/test.sh                                    everything that is not slow and needs no network
#     bash scripts/test.sh tests/test_rng.py -x               further arguments go to pytest, which runs in the repository
#     bash scripts/test.sh --run-slow -m "slow and not cuda and not integration"
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$repository"
exec python -m pytest -m "not slow and not integration" "$@"
