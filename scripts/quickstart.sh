#!/usr/bin/env bash
# The whole pipeline on the embedded miniature, on a laptop: install, draw data, KL diagnostic, OPSD
# and its noise control through the launchers, gap closing, accuracy, thinking in pictures against
# text alone, demo, one table. On the CPU, with or without GPUs.
#   bash scripts/quickstart.sh [--seed N] [--steps N] [--base CHECKPOINT] [--name NAME]
#   bash scripts/quickstart.sh --seeds N [--steps N]
# Writes results/NAME/summary.{json,md,png}, NAME being quickstart; less than ten minutes on two
# cores after the installation. --seeds runs seeds 0 to N - 1, each with a base of its own that is
# made where it is missing, and writes results/seeds/seeds.{json,md,png} with mean and spread; a
# seed that is finished is kept, so an interrupted run goes on where it was.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPO_ROOT"

usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
seed=0 steps="" seeds="" base=models/mini-base name=quickstart
while (($#)); do
  case $1 in
    --seed) seed=${2:?--seed needs a number} && shift 2 ;;
    --steps) steps=${2:?--steps needs a number} && shift 2 ;;
    --seeds) seeds=${2:?--seeds needs a number} && shift 2 ;;
    --base) base=${2:?--base needs a checkpoint folder} && shift 2 ;;
    --name) name=${2:?--name needs a name} && shift 2 ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && die "unrecognized argument: $1" ;;
  esac
done

[[ $seed =~ ^[0-9]+$ ]] || die "--seed $seed: give a whole number, 0 or more"
[[ -z $steps || $steps =~ ^[1-9][0-9]*$ ]] || die "--steps $steps: give a whole number, 1 or more"

[[ -z $seeds || $seeds =~ ^[2-9]$ ]] || die "--seeds $seeds: give a whole number from 2 to 9"

if [[ -n $seeds ]]; then
  ensure_environment requirements.txt
  results=()
  for ((seed = 0; seed < seeds; seed++)); do
    base=models/mini-base name=seeds/seed$seed
    if ((seed)); then base+=-seed$seed; fi
    results+=("results/$name")
    if [[ -f results/$name/summary.json ]]; then
      say "keeping results/$name; remove it to run the seed again"
      continue
    fi
    [[ -f $base/model.safetensors ]] || bash scripts/make_mini_base.sh --seed "$seed" "$base"
    options=(--seed "$seed" --base "$base" --name "$name")
    if [[ -n $steps ]]; then options+=(--steps "$steps"); fi
    bash scripts/quickstart.sh "${options[@]}"
  done
  exec python -m eval.seeds "${results[@]}"
fi

out=results/$name trained=checkpoints/$name
[[ -f $base/model.safetensors ]] ||
  die "$base/model.safetensors is missing. It comes with the repository; to make it again:" \
    "bash scripts/make_mini_base.sh"
ensure_environment requirements.txt

preset=(--preset data/configs/mini.yaml)
sources=(--dataset_config_file data/configs/mini_opsd.yaml)
export VISUAL_OPSD_DATA_ROOT=datasets/mini-seed$seed
export NPROC_PER_NODE=${NPROC_PER_NODE:-2} PYTHONUNBUFFERED=1
started=$SECONDS
step() {
  local elapsed=$((SECONDS - started))
  printf '\n== %s  (%d min %02d s)\n' "$*" $((elapsed / 60)) $((elapsed % 60))
}
launch() { bash "scripts/visual_opsd/$1" "$base" "${@:2}"; }

# the trainer refuses a folder that holds checkpoints
rm -rf "$out" "$trained"

step "1/9 data: four task families, parquet shards in the released schema"
# the last family that appears: an interrupted drawing leaves an empty folder
if [[ -d $VISUAL_OPSD_DATA_ROOT/Chart_Refocus ]]; then
  echo "keeping $VISUAL_OPSD_DATA_ROOT"
else
  python -m data.miniworld --output "$VISUAL_OPSD_DATA_ROOT" --seed "$seed"
fi

step "2/9 KL diagnostic: do the visual thoughts move the base's predictions (Eq. 4)?"
diagnostic=("${sources[@]}" --split test --batch_size 50 --seed "$seed" --device cpu)
launch run_kl_diagnostic.sh 400 "$out/kl_base" "${diagnostic[@]}"

training=("${preset[@]}" --global_seed "$seed" --data_seed "$seed")
if [[ -n $steps ]]; then training+=(--total_steps "$steps"); fi
# the preset's warm-up does not fit into a run this short
if ((${steps:-20} < 20)); then training+=(--warmup_steps $((steps / 2))); fi
for arm in opsd noise; do
  if [[ $arm == opsd ]]; then
    step "3/9 OPSD: the student learns from itself with visual thoughts in context"
    OUTPUT_NAME=$name/$arm launch run_visual_opsd.sh "${training[@]}"
  else
    step "4/9 control: the same with Gaussian noise for visual thoughts"
    OUTPUT_NAME=$name/$arm launch run_visual_opsd_noise.sh "${training[@]}"
  fi
done

step "5/9 gap closing: how much of the KL is left (Eq. 9)?"
students=(--student_path "opsd=$trained/opsd/latest" "noise=$trained/noise/latest")
launch run_kl_diagnostic.sh 400 "$out/gap_dataset" "${diagnostic[@]}" "${students[@]}"
launch run_kl_diagnostic.sh 400 "$out/gap_sample" "${diagnostic[@]}" "${students[@]}" \
  --completion sample --max_new_tokens 24

step "6/9 accuracy on test data"
python -m eval.run --benchmarks mini --protocol mini --split test --seed "$seed" --device cpu \
  --output_dir "$out/accuracy" --systems "base:thinkmorph-text=$base" "base_vt:teacher=$base" \
  "base_noise_vt:teacher-noise=$base" "opsd=$trained/opsd/latest" "noise=$trained/noise/latest"

step "7/9 thinking in pictures against text alone: accuracy and seconds"
python -m eval.interleaved --model_path "$base" --student_path "$trained/opsd/latest" \
  "${sources[@]}" --split test --limit_per_task 50 --latency_samples 2 --repeats 3 \
  --max_new_tokens 24 --batch_size 50 --seed "$seed" --device cpu --output_dir "$out/interleaved"

step "8/9 the student answers a question about an image"
python -m examples.inference_demo --model_path "$trained/opsd/latest" --device cpu \
  --example Visual_Search --save_image "$out/demo.png" --max_new_tokens 24

step "9/9 summary"
python -m eval.summary --results_dir "$out" --checkpoint_dir "$trained" --seed "$seed"
