#!/usr/bin/env bash
# Trains on Cloud TPU VMs: one process on each worker of a slice.
set -uo pipefail

usage() {
  cat <<'TEXT'
Trains on all workers of a slice of Cloud TPU VMs, using gcloud.

Usage: launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- flags of llama_jax.train]

  create    creates the slice, which costs money until you delete it
            (--type=v5p-128 --version=v2-alpha-tpuv5; --spot)
  install   copies the last commit of this repository to every worker and installs it
  start     starts training on every worker, in the background; put flags of train after --
  status    prints for each worker whether it trains, and the last line of its log
  logs      prints and follows the log of worker 0; --output=DIR fetches the logs of all workers
  stop      makes all workers save and end
  delete    deletes the slice

  --project=P    Google Cloud project (default: gcloud's)
  --restarts=N   maximum number of restarts in a row after failures, on each worker (default 10)
  --dry-run      print what would run

Workers find each other through the metadata of the slice. If one fails, JAX ends the others within
two minutes, all start again, and training resumes. Training continues when you disconnect.

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

# Makes the value of flag $1 decimal: bash reads 08 as octal, and large numbers overflow.
decimal() {
  local LC_ALL=C
  [[ ${!1} =~ ^0*([0-9]{1,9})$ ]] || fail "--$1=${!1} is not a number of at most 9 digits"
  printf -v "$1" %d "$((10#${BASH_REMATCH[1]}))"
}

action=${1:-}
case $action in
  --help | -h) usage && exit 0 ;;
  create | install | start | status | logs | stop | delete) shift ;;
  *) fail "unknown command '$action'; use create, install, start, status, logs, stop or delete" ;;
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
    *) fail "unexpected argument $1 (put flags of train after --)" ;;
  esac
  shift
done
[[ $name && $zone ]] || fail "--name or --zone is missing"
[[ $name =~ ^[a-zA-Z0-9] ]] || fail "--name=$name is not a valid name"
decimal restarts

# Runs a command, or prints it in a dry run.
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

# Runs the shell command $2 on worker $1; `all` means every worker.
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
    # The archive contains the last commit; uncommitted changes are not copied.
    run git -C "$here" archive --format=tar.gz --output="$temporary/$archive" HEAD || exit
    run "${tpu[@]}" scp "$temporary/$archive" "$name:" "${where[@]}" --worker=all || exit
    on_worker all "set -e; mkdir -p $folder; tar -xzf $archive -C $folder; cd $folder; \
python3 -m venv .venv; .venv/bin/pip install --quiet -c constraints.txt -e '.[tpu]'"
    ;;
  start)
    (($#)) || fail "no flags of train after --"
    command=(launch/retry.sh --restarts="$restarts" -- .venv/bin/python -m llama_jax.train "$@")
    printf -v quoted '%q ' "${command[@]}"
    # A new session, so that training outlives the connection.
    on_worker all "cd $folder; if kill -0 \$(cat ~/$pidfile) 2>/dev/null; then \
echo 'error: training is already running; stop it first' >&2; exit 1; fi; \
setsid nohup ${quoted}>> ~/$log 2>&1 < /dev/null & echo \$! > ~/$pidfile"
    ;;
  status)
    on_worker all "kill -0 \$(cat $pidfile) 2>/dev/null && echo running || echo ended; \
tail -n 1 $log"
    ;;
  logs)
    if [[ $output ]]; then
      run mkdir -p -- "$output"
      # One scp for each worker: with one for all, every log would have the same name.
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
