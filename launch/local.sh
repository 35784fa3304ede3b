#!/usr/bin/env bash
# Trains with several processes on this machine.
set -uo pipefail

usage() {
  cat <<'TEXT'
Trains with several processes on this machine, which find each other over loopback.

Usage: launch/local.sh [OPTIONS] -- --config=FILE --workdir=DIR [flags of llama_jax.train]

  --processes=N    number of processes (default 2)
  --gpus=K         GPUs of each process: the first takes 0 .. K-1, and so on (default: each takes
                   all that it sees, which is right on CPUs)
  --port=PORT      port of process 0 (default: a free one)
  --restarts=N     maximum number of restarts in a row after failures (default 0); training resumes
  --backoff=S      seconds before the first restart, doubled for each further one (default 10)
  --dry-run        print what would run

Each line of output begins with the number of its process. If one process fails, all are ended.
After Ctrl-C or SIGTERM all save and end; a second Ctrl-C ends them at once. The environment
variable PYTHON names the interpreter.

Example, 2 processes on the CPUs:
  launch/local.sh -- --config=configs/tiny.py --workdir=runs/tiny
Example, one process for each of 8 GPUs:
  launch/local.sh --processes=8 --gpus=1 --restarts=10 -- --config=configs/7b.py --workdir=runs/7b
TEXT
}

fail() { echo "error: ${1//[[:cntrl:]]/ }; try --help" >&2 && exit 1; }

# Makes the value of flag $1 decimal: bash reads 08 as octal, and large numbers overflow.
decimal() {
  local LC_ALL=C
  [[ ${!1} =~ ^0*([0-9]{1,9})$ ]] || fail "--$1=${!1} is not a number of at most 9 digits"
  printf -v "$1" %d "$((10#${BASH_REMATCH[1]}))"
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
processes=2 gpus='' port='' restarts=0 backoff=10 dry_run=
while (($#)); do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --backoff=*) backoff=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "unexpected argument $1 (put flags of train after --)" ;;
  esac
  shift
done
for flag in processes restarts backoff ${gpus:+gpus} ${port:+port}; do decimal "$flag"; done
((processes)) || fail "--processes=0 is less than 1"
[[ $gpus != 0 ]] || fail "--gpus=0 is less than 1"
[[ -z $port ]] || ((0 < port && port < 65536)) || fail "--port=$port is not a port (1 to 65535)"
(($#)) || fail "no flags of train after --"

python=${PYTHON:-$(command -v "$here/../.venv/bin/python" || echo python)}

if ((restarts)) && [[ ! $dry_run ]]; then
  # Each run is a new child process: it takes another port if the old one is still in use.
  again=(--processes="$processes" --gpus="$gpus" --port="$port")
  exec "$here/retry.sh" --restarts="$restarts" --backoff="$backoff" -- "$0" "${again[@]}" -- "$@"
fi

if [[ -z $port ]]; then
  port=PORT
  [[ $dry_run ]] || port=$("$python" -c '
import socket
with socket.socket() as probe:
    probe.bind(("localhost", 0))
    print(probe.getsockname()[1])') || fail "cannot run $python"
fi

# Sets `environ` to the environment of process $1, as NAME=VALUE words.
environment() {
  environ=(JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES="$processes")
  environ+=(JAX_COORDINATOR_BIND_ADDRESS="localhost:$port" JAX_PROCESS_ID="$1")
  if [[ $gpus ]]; then
    local ids
    ids=$(seq -s, $(($1 * gpus)) $(($1 * gpus + gpus - 1)))
    environ+=(JAX_LOCAL_DEVICE_IDS="$ids")
  fi
}

command=("$python" -m llama_jax.train "$@")
if [[ $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do
    environment "$i"
    printf '%q ' env "${environ[@]}" "${command[@]}" && echo "&"
  done
  ((restarts == 0)) || echo "# at most $restarts restarts in a row"
  exit 0
fi

pids=() signals=0 asked=0
# shellcheck disable=SC2317,SC2329  # the trap calls it
stop() {
  signals=$((signals + 1))
  local signal=TERM
  ((signals == 1)) || signal=KILL
  for pid in "${pids[@]}"; do kill -"$signal" "$pid" 2>/dev/null; done
  asked=${#pids[@]}
}
trap stop TERM INT

# Puts $1 before each line, without delay; some versions of awk and sed would buffer the lines.
prefix() {
  trap '' INT TERM
  while IFS= read -r line || [[ $line ]]; do printf '%s\n' "$1$line"; done
}

# Job control gives each process its own process group: Ctrl-C reaches only this script, and ending
# a group also ends the children of its process.
set -m
for ((i = 0; i < processes; i++)); do
  environment "$i"
  env "${environ[@]}" "${command[@]}" \
    > >(prefix "[$i] ") 2>&1 &
  pids+=($!)
  # If a signal came before this process was in `pids`, `stop` has not signalled it.
  ((signals == 0 || ${#pids[@]} == asked)) || kill -TERM "$!" 2>/dev/null
done

exec 3>&2 2>/dev/null # hides the shell's own message about each killed process
status=0
left=("${pids[@]}")
while ((${#left[@]})); do
  sleep 0.2
  running=()
  for pid in "${left[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
      continue
    fi
    seen=-1
    while ((seen != signals)); do # a signal ends `wait` early, with another status
      seen=$signals
      wait "$pid"
      code=$?
    done
    if ((code && !status)); then
      status=$code
      echo "local: process $pid ended with exit status $code; ending the others" >&3
      sleep 0.5 # for its last lines of output
      for other in "${pids[@]}"; do kill -KILL -- "-$other" 2>/dev/null; done
    fi
  done
  left=("${running[@]+"${running[@]}"}")
done
exit "$status"
