#!/usr/bin/env bash
# Trains on Cloud TPU VMs: one process on each worker of a slice.
set -uo pipefail

usage() {
  cat <<'TEXT'
Trains on Cloud TPU VMs, on all workers of a slice, by gcloud.

Usage: launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- flags of llama_jax.train]

  create    asks Google for the slice: it costs money from then on, until you delete it
            (--type=v5p-128 --version=v2-alpha-tpuv5; --spot)
  install   copies this repository (what git tracks) to every worker, and installs it
  start     starts training on every worker, in the background; flags of train stand after --
  status    says on each worker whether it trains, and its last line
  logs      prints the log of worker 0 as it grows; with --output=DIR fetches those of all workers
  stop      has all workers save and end
  delete    gives the slice back

  --project=P    other than gcloud's own
  --restarts=N   restarts in a row after a failure, on each worker (default 10)
  --dry-run      print what would run

Workers find each other by the metadata of the slice. If one fails, JAX ends the others within two
minutes, all start again, and training resumes. It goes on when you disconnect.

Example:
  launch/tpu_vm.sh create --name=llama --zone=us-east5-a --type=v5p-128 --version=v2-alpha-tpuv5
  launch/tpu_vm.sh install --name=llama --zone=us-east5-a
  launch/tpu_vm.sh start --name=llama --zone=us-east5-a -- \
      --config=configs/7b.py --workdir=gs://BUCKET/7b
  launch/tpu_vm.sh logs --name=llama --zone=us-east5-a
  launch/tpu_vm.sh delete --name=llama --zone=us-east5-a
TEXT
}

fail() { echo "error: ${1//[[:cntrl:]]/ }; try --help" >&2 && exit 1; }

# Makes the number of flag $1 decimal: bash reads 08 as octal, and large numbers wrap around.
decimal() {
  local LC_ALL=C
  [[ ${!1} =~ ^0*([0-9]{1,9})$ ]] || fail "--$1=${!1} is no number of at most 9 digits"
  printf -v "$1" %d "$((10#${BASH_REMATCH[1]}))"
}

action=${1:-}
case $action in
  --help | -h) usage && exit 0 ;;
  create | install | start | status | logs | stop | delete) shift ;;
  *) fail "${action:-nothing} is no command: create, install, start, status, logs, stop, delete" ;;
esac
name='' zone='' project='' type='' version='' spot='' restarts=10 output='' dry_run=
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=--spot ;;
    --restarts=*) restarts=${1#*=} ;;
    --output=*) output=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "unexpected argument $1 (flags of train stand after --)" ;;
  esac
  shift
done
[[ $name && $zone ]] || fail "--name or --zone is missing"
[[ $name =~ ^[a-zA-Z0-9] ]] || fail "--name=$name is no name"
decimal restarts

# Runs a command, or prints it.
run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")
tpu=(gcloud compute tpus tpu-vm)

# Runs a shell command on worker $1, or on all.
on_worker() { run "${tpu[@]}" ssh "$name" "${where[@]}" --worker="$1" --command="$2"; }

folder=llama_jax # in the home folder of each worker
log=$folder/train.log
pidfile=$folder/train.pid

case $action in
  create)
    [[ $type && $version ]] || fail "create needs --type and --version"
    run "${tpu[@]}" create "$name" "${where[@]}" --accelerator-type="$type" \
      --version="$version" ${spot:+"$spot"}
    ;;
  delete) run "${tpu[@]}" delete "$name" "${where[@]}" ;;
  install)
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    archive=llama_jax.tar.gz
    temporary=$(mktemp -d)
    trap 'rm -rf "$temporary"' EXIT
    # The committed state: what you have changed since stays here.
    run git -C "$here" archive --format=tar.gz --output="$temporary/$archive" HEAD || exit
    run "${tpu[@]}" scp "$temporary/$archive" "$name:" "${where[@]}" --worker=all || exit
    on_worker all "set -e; mkdir -p $folder; tar -xzf $archive -C $folder; cd $folder; \
python3 -m venv .venv; .venv/bin/pip install --quiet -c constraints.txt -e '.[tpu]'"
    ;;
  start)
    (($#)) || fail "no flags of train after --"
    command=(launch/retry.sh --restarts="$restarts" -- .venv/bin/python -m llama_jax.train "$@")
    printf -v quoted '%q ' "${command[@]}"
    # A session of its own, so that it outlives the connection.
    on_worker all "cd $folder; if kill -0 \$(cat ~/$pidfile) 2>/dev/null; then \
echo 'error: it trains already; stop it first' >&2; exit 1; fi; \
setsid nohup ${quoted}>> ~/$log 2>&1 < /dev/null & echo \$! > ~/$pidfile"
    ;;
  status)
    on_worker all "kill -0 \$(cat $pidfile) 2>/dev/null && echo running || echo ended; \
tail -n 1 $log"
    ;;
  logs)
    if [[ $output ]]; then
      run mkdir -p -- "$output"
      # One log for each worker: scp names the file that it reads, not the worker.
      workers=$(run "${tpu[@]}" describe "$name" "${where[@]}" \
        --format='value(networkEndpoints.len())') || exit
      [[ ! $dry_run ]] || { echo "$workers" && workers=1; }
      for ((i = 0; i < workers; i++)); do
        run "${tpu[@]}" scp "$name:$log" "$output/worker-$i.log" "${where[@]}" --worker="$i"
      done
    else
      on_worker 0 "tail -n 100 -f $log"
    fi
    ;;
  stop) on_worker all "kill -TERM \$(cat $pidfile)" ;;
esac
