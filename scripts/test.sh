#!/usr/bin/env bash
# Install what the tests need (once), then run them. Arguments go to pytest:
#   bash scripts/test.sh -k losses
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPO_ROOT"
ensure_environment requirements-dev.txt
# One thread per process: the models are tiny, and distributed tests run several processes at once.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest "$@"
