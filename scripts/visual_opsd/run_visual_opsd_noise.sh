#!/usr/bin/env bash
# The control: run_visual_opsd.sh with Gaussian noise in the place of the teacher's VTs. Same
# arguments and environment.
set -euo pipefail
export OUTPUT_PREFIX=${OUTPUT_PREFIX:-visual-opsd-noise}
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/run_visual_opsd.sh" "$@" --noise_vt True
