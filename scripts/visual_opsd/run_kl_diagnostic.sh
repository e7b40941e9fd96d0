#!/usr/bin/env bash
# KL diagnostic: how far the VTs in context move the frozen base's next-token distributions (Eq. 4).
#   bash scripts/visual_opsd/run_kl_diagnostic.sh [MODEL_PATH [NUM_SAMPLES [OUTPUT_DIR]]] \
#        [--flag value ...]
# Environment: VISUAL_OPSD_DATA_ROOT (where the datasets lie), DRY_RUN.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
positionals "MODEL_PATH NUM_SAMPLES OUTPUT_DIR" "$@"
given --num_samples "$NUM_SAMPLES"
run python -m eval.kl_diagnostic --model_path "${MODEL_PATH:-models/ThinkMorph-7B}" \
  --output_dir "${OUTPUT_DIR:-results/visual_opsd_kl_diagnostic}" \
  ${GIVEN[@]+"${GIVEN[@]}"} ${FLAGS[@]+"${FLAGS[@]}"}
