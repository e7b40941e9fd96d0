#!/usr/bin/env bash
# Remake models/mini-base, the checkpoint that ships with the code: random weights, then train.sft
# on 80,000 miniature rows. About ten minutes on two cores, on the CPU.
#   bash scripts/make_mini_base.sh [OUTPUT]
# Checkpoints of an earlier attempt, in checkpoints/mini-base, are replaced; OUTPUT is not.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPO_ROOT"

output=${1:-models/mini-base}
[[ ! -e $output ]] ||
  die "$output exists: move it away, or name another folder: bash scripts/make_mini_base.sh OUTPUT"
ensure_environment requirements.txt

export VISUAL_OPSD_DATA_ROOT=datasets/mini-pretrain NPROC_PER_NODE=${NPROC_PER_NODE:-2}

# the last family that appears: an interrupted drawing leaves an empty folder
if [[ ! -d $VISUAL_OPSD_DATA_ROOT/Chart_Refocus ]]; then
  python -m data.miniworld --output "$VISUAL_OPSD_DATA_ROOT" --seed 1000 \
    --train 20000 --validation 300 --test 300
fi
python -m data.miniworld.model --output checkpoints/mini-base/untrained --seed 0
OUTPUT_NAME=mini-base bash scripts/visual_opsd/run_sft_baseline.sh checkpoints/mini-base/untrained \
  --preset data/configs/mini_base.yaml --overwrite True
# Step 1600 of 2400: there it reads visual thoughts without a mistake on validation data, while
# looking things up without them has begun but is far from done. Later steps leave less to distil.
mkdir -p "$(dirname -- "$output")"
cp -r checkpoints/mini-base/0001600 "$output"
say "written $output"
