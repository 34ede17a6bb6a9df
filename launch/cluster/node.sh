#!/usr/bin/env bash
# Train on the accelerators of this machine.
#
#   launch/cluster/node.sh CONFIG [options] [key=value ...] [--resume auto | --overwrite | --quiet]
#
#   --gpus N          processes, one an accelerator (default: all there are)
#   --deepspeed FILE  DeepSpeed's configuration (default: configs/deepspeed/zero2.json of this package)
#   --port N          that the processes meet at, where several runs share the machine (default: 29500)
#   --dry-run         print the command and start nothing; what the run takes says: dso train CONFIG --dry-run
#
# What else is given goes to dso train. The exit code is the run's: 0 done, 2 bad input, 75 stopped by SIGTERM or Ctrl-C
# with everything saved (start it again with --resume auto). A second Ctrl-C kills it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1-} in -h | --help) usage; exit 0 ;; esac
parse "$@"

command=(deepspeed ${gpus:+--num_gpus "$gpus"} --master_port "$port" --no_local_rank --module launch.train
  "$config" --deepspeed "$deepspeed" ${rest[@]+"${rest[@]}"})
show "${command[@]}"
[ -z "$dry_run" ] || exit 0
command -v deepspeed >/dev/null || die "deepspeed is not installed; install it with: pip install 'dso[train,distributed]'"

# deepspeed, when killed, leaves its processes behind, and the process that started them turns SIGTERM into exit code 1.
# So it gets a session of its own, out of the terminal's reach, and the training processes themselves are told; their
# exit code then comes back through both.
children() {
  cat /proc/"$1"/task/*/children 2>/dev/null || true
}

tell() { # the training processes; before there are any, the launcher
  local starter process found=
  for starter in $(children "$launcher"); do
    for process in $(children "$starter"); do
      kill "-$1" "$process" 2>/dev/null && found=yes
    done
  done
  [ -n "$found" ] || kill "-$1" "$launcher" 2>/dev/null || true
}

setsid "${command[@]}" &
launcher=$!
told=
trap 'again=yes told=yes; tell TERM' TERM
trap 'again=yes; if [ -n "$told" ]; then tell KILL; else told=yes; tell TERM; fi' INT
again=yes code=0
while [ -n "$again" ]; do # a wait that a signal ended is followed by another
  again= code=0
  wait "$launcher" || code=$?
done
exit "$code"
