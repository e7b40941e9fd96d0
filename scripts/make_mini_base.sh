#!/usr/bin/env bash
# Remake models/mini-base, the checkpoint that ships with the code: random weights, then train.sft on 80,000
# miniature rows. About ten minutes on two cores.
#   bash scripts/make_mini_base.sh [OUTPUT]
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPO_ROOT"
ensure_environment requirements.txt

output=${1:-models/mini-base}
[[ ! -e $output ]] || die "$output exists: move it away first"
export VISUAL_OPSD_DATA_ROOT=datasets/mini-pretrain NPROC_PER_NODE=${NPROC_PER_NODE:-2}

if [[ ! -d $VISUAL_OPSD_DATA_ROOT ]]; then
  python -m data.miniworld --output "$VISUAL_OPSD_DATA_ROOT" --train 20000 --validation 300 --test 300 --seed 1000
fi
python -m data.miniworld.model --output checkpoints/mini-base/untrained --seed 0
OUTPUT_NAME=mini-base bash scripts/visual_opsd/run_sft_baseline.sh checkpoints/mini-base/untrained \
  --preset data/configs/mini_base.yaml
# Step 1600 of 2400: there it reads visual thoughts without a mistake on validation data, while looking things up
# without them has begun but is far from done. Later steps leave less to distil.
mkdir -p "$(dirname -- "$output")"
cp -r checkpoints/mini-base/0001600 "$output"
say "written $output"
