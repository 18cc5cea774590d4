#!/usr/bin/env bash
# On a fresh machine: sets up an environment, trains the built-in demo and prints the path of its pictures.
#
#     bash scripts/demo.sh           the demo
#     bash scripts/demo.sh --quick   a short one; further arguments go to `difftrain demo`
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec difftrain demo "$@"
