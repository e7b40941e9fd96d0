#!/usr/bin/env bash
# Every table and figure of the paper on the miniature, from runs to one page: base, SFT, noise
# control and OPSD with three seeds, sweeps, interventions, attention, latency, cases, ledger. 60 to
# 90 minutes on two cores, on the CPU. The same command goes on where it was interrupted.
#   bash scripts/reproduce_mini.sh [--only ARTEFACT ...] [--seeds N] [--name NAME] [--quick]
#                                  [--list] [--report_only]
# --only table5 runs what Table 5 needs, --quick a few updates of everything. Writes
# results/reproduction/report/report.html, with tables, figures and report.md beside it.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPO_ROOT"
for flag in "$@"; do
  if [[ $flag == -h || $flag == --help ]]; then sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 0; fi
done
[[ -f models/mini-base/model.safetensors ]] ||
  die "models/mini-base/model.safetensors is missing. It comes with the repository; to make it" \
    "again: bash scripts/make_mini_base.sh"
ensure_environment requirements.txt
export NPROC_PER_NODE=${NPROC_PER_NODE:-2} PYTHONUNBUFFERED=1
exec python -m eval.reproduce --scale mini "$@"
