#!/usr/bin/env bash
# Text-only SFT: cross-entropy on the text reasoning traces, from BAGEL rather than ThinkMorph as in
# the paper.
#   bash scripts/visual_opsd/run_sft_baseline.sh [MODEL_PATH [TOTAL_STEPS [OUTPUT_NAME]]] \
#        [--flag value ...]
# Environment: NPROC_PER_NODE, DRY_RUN. What is not given is left to the trainer: paper or --preset.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
positionals "MODEL_PATH TOTAL_STEPS OUTPUT_NAME" "$@"
given --model_path "$MODEL_PATH" --total_steps "$TOTAL_STEPS"
name=${OUTPUT_NAME:-sft-baseline}
launch train.sft --results_dir "results/$name" --checkpoint_dir "checkpoints/$name"
