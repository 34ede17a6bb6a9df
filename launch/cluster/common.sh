# What launch/cluster/node.sh and launch/cluster/hosts.sh share; sourced by them.

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

# The comment at the top of the script that sources this.
usage() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"
}

# The package's folder of DeepSpeed configurations: beside this folder, in a checkout as in an installation.
deepspeed_folder() {
  printf '%s/configs/deepspeed' "$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
}

# Options of both scripts, behind what each takes first. Sets config, deepspeed, port, dry_run, gpus and rest.
parse() {
  [ $# -gt 0 ] || die "name a config, as in: ${0##*/} qwen2.5-3b-synthbias (--help says more)"
  case $1 in -*) die "the config comes before the options, found $1" ;; esac
  config=$1
  shift
  deepspeed=$(deepspeed_folder)/zero2.json port=29500 dry_run= gpus= rest=()
  while [ $# -gt 0 ]; do
    case $1 in
      --deepspeed | --port | --gpus)
        [ $# -gt 1 ] || die "$1 needs a value"
        case $1 in --deepspeed) deepspeed=$2 ;; --port) port=$2 ;; --gpus) gpus=$2 ;; esac
        shift
        ;;
      --dry-run) dry_run=yes ;;
      *) rest+=("$1") ;;
    esac
    shift
  done
  [[ $port =~ ^[0-9]+$ ]] || die "--port is '$port', expected a number"
  [[ $gpus =~ ^([1-9][0-9]*)?$ ]] || die "--gpus is '$gpus', expected a number of at least 1"
}

# Python puts the working directory first for `-m`: a folder there named `launch` would stand for this package.
[ -f launch/cluster/node.sh ] || export PYTHONSAFEPATH=1

show() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
}
