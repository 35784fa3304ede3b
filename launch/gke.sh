#!/usr/bin/env bash
# Trains on one or more TPU slices in GKE, as a JobSet.
set -uo pipefail

usage() {
  cat <<'TEXT'
Trains on one or more TPU slices in GKE, as a JobSet.

Usage: launch/gke.sh COMMAND --name=NAME [OPTIONS] [-- flags of llama_jax.train]

  render    prints the JobSet (launch/gke_jobset.yaml with its values filled in)
  start     passes the JobSet to kubectl; put flags of train after --
  status    prints the JobSet and its pods
  logs      prints and follows the log of the first pod
  stop      deletes the JobSet: all pods save and end

  --image=IMAGE        container image with llama_jax installed ('.[tpu]') and its configs
  --accelerator=KIND   such as tpu-v5p-slice, tpu-v5-lite-podslice, tpu-v6e-slice
  --topology=SHAPE     shape of one slice, such as 4x4x4
  --chips=N            chips of one host (default 4)
  --slices=N           number of slices (default 1)
  --restarts=N         maximum number of restarts of the whole set after failures (default 10)
  --grace=SECONDS      time to save when a pod is evicted or the set is deleted (default 300)
  --namespace=NS       Kubernetes namespace (default: kubectl's)
  --dry-run            print what would run

It needs kubectl with access to the cluster, and JobSet in the cluster; see launch/README.md.

Example, 2 slices of v5p-128:
  launch/gke.sh start --name=llama --image=REGION-docker.pkg.dev/PROJECT/REPO/llama_jax \
      --accelerator=tpu-v5p-slice --topology=4x4x4 --slices=2 -- \
      --config=configs/7b.py --workdir=gs://BUCKET/7b --config.dcn.data=2
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
  render | start | status | logs | stop) shift ;;
  *) fail "unknown command '$action'; use render, start, status, logs or stop" ;;
esac
name='' image='' accelerator='' topology='' chips=4 slices=1 restarts=10 grace=300
namespace=() dry_run=
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips=*) chips=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --namespace=*) namespace=(--namespace="${1#*=}") ;;
    --dry-run) dry_run=1 ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "unexpected argument $1 (put flags of train after --)" ;;
  esac
  shift
done

# Succeeds if the value of flag $1 matches the pattern $2, in ASCII.
matches() {
  local LC_ALL=C
  [[ ${!1} =~ $2 ]]
}
matches name '^[a-z]([-a-z0-9]*[a-z0-9])?$' || fail "--name=$name is not a valid Kubernetes name"

# Sets `string` to $1 as a YAML string that the container receives unchanged, byte by byte.
quote() {
  local dump bytes codes=() i code next
  dump=$(printf %s "$1" | iconv -f UTF-8 -t UTF-32BE 2>/dev/null | od -An -v -tx1) ||
    fail "not text in UTF-8: $(printf %q "$1")"
  read -ra bytes <<<"${dump//$'\n'/ }"
  for ((i = 0; i < ${#bytes[@]}; i += 4)); do
    codes+=("$((16#${bytes[i]}${bytes[i + 1]}${bytes[i + 2]}${bytes[i + 3]}))")
  done
  string=
  for ((i = 0; i < ${#codes[@]}; i++)); do
    code=${codes[i]} next=${codes[i + 1]:-0}
    # Kubernetes expands $(NAME) as a variable, and $$ to one $.
    ((code == 36 && (next == 36 || next == 40 || (i && codes[i - 1] == 36)))) && string+='$'
    # YAML has more line breaks than ASCII, and does not allow some characters.
    if ((code < 32 || code == 34 || code == 92 || code > 126)); then
      printf -v code '\\U%08x' "$code"
    else
      printf -v code '\\x%02x' "$code" && printf -v code %b "$code"
    fi
    string+=$code
  done
  string=\"$string\"
}

# Prints the JobSet on standard output; the arguments are the flags of train.
render() {
  [[ $image && $accelerator ]] || fail "--image or --accelerator is missing"
  matches image '^[a-zA-Z0-9][-a-zA-Z0-9._/:@]*$' || fail "--image=$image is not a valid image name"
  matches accelerator '^[a-zA-Z0-9][-a-zA-Z0-9._]*$' || fail "--accelerator=$accelerator is not a kind of accelerator"
  matches topology '^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$' || fail "--topology=$topology is not a shape such as 4x4x4"
  local flag
  for flag in chips slices restarts grace; do decimal "$flag"; done
  ((slices)) || fail "--slices=0 is less than 1"
  (($#)) || fail "no flags of train after --"
  local total=$((${topology//x/*}))
  ((chips && total % chips == 0)) || fail "--topology=$topology has $total chips, which is not a multiple of --chips=$chips"
  local command='' word text string
  # After SIGTERM the exit status is 75, so that an evicted pod counts as failed and the set starts
  # again. A run that finished but skipped a damaged checkpoint must not start again, so its status
  # is 0; its log reports the damage.
  for word in python -m llama_jax.train --stopped_status=75 --damaged_status=0 "$@"; do
    quote "$word"
    command+="                    - $string"$'\n'
  done
  text=$(<"$(dirname "${BASH_SOURCE[0]}")/gke_jobset.yaml")
  text=${text//'{NAME}'/"$name"}
  text=${text//'{IMAGE}'/"$image"}
  text=${text//'{ACCELERATOR}'/"$accelerator"}
  text=${text//'{TOPOLOGY}'/"$topology"}
  text=${text//'{CHIPS}'/"$chips"}
  text=${text//'{HOSTS}'/"$((total / chips))"}
  text=${text//'{SLICES}'/"$slices"}
  text=${text//'{RESTARTS}'/"$restarts"}
  text=${text//'{GRACE}'/"$grace"}
  text=${text//'{COMMAND}'/"${command%$'\n'}"}
  printf '%s\n' "$text"
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

kubectl=(kubectl "${namespace[@]+"${namespace[@]}"}")
labels=jobset.sigs.k8s.io/jobset-name=$name
case $action in
  render) render "$@" ;;
  start)
    jobset=$(render "$@") || exit
    run "${kubectl[@]}" apply --filename=- <<<"$jobset"
    [[ ! $dry_run ]] || printf '%s\n' "$jobset"
    ;;
  status)
    run "${kubectl[@]}" get jobset "$name"
    run "${kubectl[@]}" get pods --selector="$labels"
    ;;
  logs) run "${kubectl[@]}" logs --follow --selector="$labels,batch.kubernetes.io/job-completion-index=0,jobset.sigs.k8s.io/job-index=0" ;;
  stop) run "${kubectl[@]}" delete jobset "$name" ;;
esac
