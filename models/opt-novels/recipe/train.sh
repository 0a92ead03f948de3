#!/bin/sh
# Makes opt-novels anew, with the `opt` command of this repository: about 90 minutes on two cores. Stopped, it goes on
# where it was with the same call and --resume at its end.
#
#   recipe/train.sh TEXT_DIR WORK_DIR [--resume]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
text=$1 work=$2
shift 2
mkdir -p "$work"
[ -f "$work/train.jsonl" ] || python3 "$here/prepare.py" "$text" "$work"
opt tune full --from-scratch "$here/../config.json" --data "$work/train.jsonl" --eval-data "$work/held-out.jsonl" \
  --pack --seq-len 512 --batch-size 8 --max-steps 3800 --lr 1.5e-3 --schedule cosine_with_min_lr --warmup-steps 150 \
  --weight-decay 0.1 --betas 0.9,0.95 --eval-steps 760 --save-steps 380 --seed 0 --output "$work/run" "$@"
opt convert "$work/run" "$work/opt-novels" --dtype f16
