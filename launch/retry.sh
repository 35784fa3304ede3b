#!/usr/bin/env bash
# Runs a command again after it fails, so that training resumes from its last checkpoint.
set -uo pipefail

usage() {
  cat <<'TEXT'
Runs a command again after it fails, until it exits with 0.

Usage: launch/retry.sh [--restarts=N] [--backoff=SECONDS] [--dry-run] -- COMMAND...

  --restarts=N   maximum number of restarts in a row (default 10); a run of ten minutes or more
                 resets the count
  --backoff=S    seconds before the first restart, doubled for each further one in a row, at most
                 300 (default 10)
  --stop=COMMAND a shell command that makes the running command save and end (default: send it
                 SIGTERM)
  --dry-run      print the command only

After SIGTERM or Ctrl-C the command is stopped and not restarted. Two exit statuses of
llama_jax.train do not restart it either: 75 (--stopped_status=75: stopped and saved) and 74
(--damaged_status: training finished, but a damaged checkpoint was skipped). The exit status is
that of the last run.

Example: launch/retry.sh --restarts=3 -- python -m llama_jax.train --config=... --workdir=...
TEXT
}

fail() { echo "error: ${1//[[:cntrl:]]/ }; try --help" >&2 && exit 1; }

# Makes the value of flag $1 decimal: bash reads 08 as octal, and large numbers overflow.
decimal() {
  local LC_ALL=C
  [[ ${!1} =~ ^0*([0-9]{1,9})$ ]] || fail "--$1=${!1} is not a number of at most 9 digits"
  printf -v "$1" %d "$((10#${BASH_REMATCH[1]}))"
}

restarts=10 backoff=10 stop_command='' dry_run=
while (($#)); do
  case $1 in
    --restarts=*) restarts=${1#*=} ;;
    --backoff=*) backoff=${1#*=} ;;
    --stop=*) stop_command=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "unexpected argument $1 (put the command after --)" ;;
  esac
  shift
done
decimal restarts
decimal backoff
(($#)) || fail "no command after --"
if [[ $dry_run ]]; then
  printf '%q ' "$@" && echo "# at most $restarts restarts in a row"
  exit 0
fi

stopped='' interrupted='' child='' pausing=''
stop() {
  stopped=1 interrupted=1
  if [[ $stop_command && ! $pausing ]]; then
    bash -c "$stop_command"
  elif [[ $child ]]; then
    kill -TERM "$child" 2>/dev/null
  fi
}
trap stop TERM INT

failures=0
while :; do
  began=$SECONDS
  "$@" &
  child=$!
  # A signal ends `wait` early, with a status of its own. A second `wait` returns the status of the
  # child, even if the child has ended in the meantime.
  interrupted=1
  while [[ $interrupted ]]; do
    interrupted=
    wait "$child"
    status=$?
  done
  child=
  ((status && status != 74 && status != 75)) || exit "$status"
  [[ -z $stopped ]] || exit "$status"
  ((SECONDS - began < 600)) || failures=0
  if ((++failures > restarts)); then
    echo "retry: exit status $status; giving up after $restarts restart(s)" >&2
    exit "$status"
  fi
  pause=$((failures > 6 || backoff > 300 ? 300 : backoff << (failures - 1)))
  pause=$((pause > 300 ? 300 : pause))
  echo "retry: exit status $status; restart $failures of $restarts in $pause s" >&2
  pausing=1
  sleep "$pause" &
  child=$!
  wait "$child"
  [[ -z $stopped ]] || exit 75
  pausing=
done
