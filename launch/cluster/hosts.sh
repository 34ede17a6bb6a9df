#!/usr/bin/env bash
# Train on several machines, over ssh.
#
#   launch/cluster/hosts.sh HOSTFILE CONFIG [options] [key=value ...] [--resume auto | --overwrite | --quiet]
#
# HOSTFILE has a line a machine, its name and how many accelerators it has:
#
#   worker-1 slots=8
#   worker-2 slots=8
#
# Every machine needs this package at the same version, the data and the run folder at the same paths (a shared disk),
# ssh without a password, and pdsh here. Variables named in a file .deepspeed_env, one NAME=VALUE a line, are set there.
#
#   --deepspeed FILE  DeepSpeed's configuration (default: configs/deepspeed/zero2.json of this package)
#   --port N          that the processes meet at (default: 29500)
#   --dry-run         print the command and start nothing
#
# What else is given goes to dso train. A run that was killed, here or on a machine, goes on with --resume auto.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1-} in -h | --help) usage; exit 0 ;; esac
[ $# -gt 0 ] || die "name a hostfile and a config (--help says more)"
hostfile=$1
shift
[ -r "$hostfile" ] || die "$hostfile: cannot be read; it has a line a machine, as in: worker-1 slots=8"
parse "$@"
[ -z "$gpus" ] || die "--gpus is for one machine; here $hostfile says how many each has (slots=)"

line=0 machines=0 ranks=0 seen=' '
while read -r name slots more || [ -n "$name" ]; do
  line=$((line + 1))
  case $name in '' | '#'*) continue ;; esac
  [[ $slots =~ ^slots=[1-9][0-9]*$ && $more =~ ^(#.*)?$ ]] ||
    die "$hostfile:$line: expected 'name slots=N', found '$name${slots:+ $slots}${more:+ $more}'"
  case $seen in *" $name "*) die "$hostfile:$line: $name is there twice" ;; esac
  seen+="$name "
  machines=$((machines + 1)) ranks=$((ranks + ${slots#slots=}))
done <"$hostfile"
[ "$machines" -gt 0 ] || die "$hostfile: names no machine, as in: worker-1 slots=8"

printf '%d machines, %d processes\n' "$machines" "$ranks"
command=(deepspeed --hostfile "$hostfile" --force_multi --master_port "$port" --no_local_rank --module launch.train
  "$config" --deepspeed "$deepspeed" ${rest[@]+"${rest[@]}"})
show "${command[@]}"
[ -z "$dry_run" ] || exit 0
command -v deepspeed >/dev/null || die "deepspeed is not installed; install it with: pip install 'dso[train,distributed]'"
exec "${command[@]}"
