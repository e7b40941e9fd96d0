#!/usr/bin/env bash
# Interleaved fine-tuning, how a ThinkMorph is made: text, a drawn visual thought, text, on both
# experts of a BAGEL checkpoint (cross-entropy and the error of the velocity that draws).
#   bash scripts/visual_opsd/run_interleaved_sft.sh [MODEL_PATH [TOTAL_STEPS [OUTPUT_NAME]]] \
#        [--flag value ...]
# Environment: NPROC_PER_NODE, DRY_RUN. What is not given is left to the trainer: paper or --preset.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
positionals "MODEL_PATH TOTAL_STEPS OUTPUT_NAME" "$@"
given --model_path "$MODEL_PATH" --total_steps "$TOTAL_STEPS"
# a preset names its own mixture
if [[ " ${FLAGS[*]-} " != *" --preset "* ]]; then
  given --dataset_config_file data/configs/interleaved_reasoning.yaml
fi
name=${OUTPUT_NAME:-interleaved-sft}
launch train.sft --visual_gen True \
  --results_dir "results/$name" --checkpoint_dir "checkpoints/$name"
