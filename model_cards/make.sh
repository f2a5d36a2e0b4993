#!/usr/bin/env bash
# Quantizes the example model with the defaults, evaluates it, and writes the checkpoint with its card to examples/tiny_vlm-sab:
# bash model_cards/make.sh [WORK FOLDER]
# sab_hf must be installed in the environment of `python`.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-$(mktemp -d)}
export PYTHONPATH=examples
python -m tiny_vlm.export "$work/calibration" --samples 512 --seed calibration
python -m tiny_vlm.export "$work/questions" --samples 330 --seed held-out
sab-hf quantize examples/tiny_vlm/checkpoint "$work/tiny_vlm-sab" --calibration "$work/calibration/data.jsonl" \
    --license apache-2.0
sab-hf eval "$work/tiny_vlm-sab" --original examples/tiny_vlm/checkpoint --data "$work/questions/data.jsonl" \
    --num-samples 330 --dtype float32 --examples 4 --output "$work/evaluation.json"
sab-hf card "$work/tiny_vlm-sab" --evaluation "$work/evaluation.json" --license apache-2.0
rm -rf examples/tiny_vlm-sab
cp -r "$work/tiny_vlm-sab" examples/tiny_vlm-sab
