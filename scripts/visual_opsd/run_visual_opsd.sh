#!/usr/bin/env bash
# Visual-OPSD: on-policy self-distillation of the VT-conditioned teacher into the text-only student.
#   bash scripts/visual_opsd/run_visual_opsd.sh [MODEL_PATH [TEACHER_MODE [JSD_BETA [JSD_TEMP \
#        [JSD_WEIGHT [TOTAL_STEPS [OUTPUT_NAME]]]]]]] [--flag value ...]
# Environment: EMA_DECAY JSD_TOP_K JSD_TOKEN_CLIP CE_WEIGHT SAMPLE_MAX_NEW SAMPLE_TEMP
# MAX_FORWARD_TOKENS SAMPLE_MAX_IMAGE_SKIPS, NPROC_PER_NODE, DRY_RUN. What is not given is left to
# the trainer: paper or --preset.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
positionals "MODEL_PATH TEACHER_MODE JSD_BETA JSD_TEMP JSD_WEIGHT TOTAL_STEPS OUTPUT_NAME" "$@"

given --model_path "$MODEL_PATH" --teacher_mode "$TEACHER_MODE" --jsd_beta "$JSD_BETA" \
  --jsd_temperature "$JSD_TEMP" --jsd_weight "$JSD_WEIGHT" --total_steps "$TOTAL_STEPS"
given --ema_decay "${EMA_DECAY:-}" --jsd_top_k "${JSD_TOP_K:-}" \
  --jsd_token_clip "${JSD_TOKEN_CLIP:-}" --ce_weight "${CE_WEIGHT:-}" \
  --sample_max_new_tokens "${SAMPLE_MAX_NEW:-}" \
  --sample_temperature "${SAMPLE_TEMP:-}" --max_forward_tokens "${MAX_FORWARD_TOKENS:-}" \
  --sample_max_image_skips "${SAMPLE_MAX_IMAGE_SKIPS:-}"

name=${OUTPUT_NAME:-${OUTPUT_PREFIX:-visual-opsd}-${TEACHER_MODE:-ema}-beta${JSD_BETA:-0.5}}
launch train.opsd --results_dir "results/$name" --checkpoint_dir "checkpoints/$name"
