#!/usr/bin/env bash
# One run of a W&B sweep, as `wandb agent` starts it (launch/cluster/sweep/smollm2-roles.yaml says how).
#
#   launch/cluster/sweep/train.sh CONFIG [key=value ...]
#
# The run's folder is runs/sweep-SWEEP/RUN, so runs do not meet, and one that W&B starts again goes on where it was.
set -euo pipefail

[ $# -gt 0 ] || { echo "train.sh: name a config, as in: launch/cluster/sweep/train.sh smollm2-roles" >&2; exit 2; }
[ -n "${WANDB_SWEEP_ID:-}" ] && [ -n "${WANDB_RUN_ID:-}" ] || {
  echo "train.sh: is started by wandb agent, which sets WANDB_SWEEP_ID and WANDB_RUN_ID" >&2
  exit 2
}
# The name is in quotes of its own: an id such as 1e234567 would be read as a number.
exec dso train "$@" run.report_to=wandb "run.output_dir=runs/sweep-$WANDB_SWEEP_ID" "run.run_name=\"$WANDB_RUN_ID\"" --resume auto
