#!/usr/bin/env bash
# Trains in GKE, as a JobSet of one or more TPU slices.
set -uo pipefail

usage() {
  cat <<'TEXT'
Trains on one or more TPU slices in GKE, as a JobSet.

Usage: launch/gke.sh COMMAND --name=NAME [OPTIONS] [-- flags of llama_jax.train]

  render    prints the JobSet (launch/gke_jobset.yaml, filled in)
  start     hands it to kubectl; flags of train stand after --
  status    the JobSet and its pods
  logs      the log of the first pod, as it grows
  stop      deletes the JobSet: all pods save and end

  --image=IMAGE        container image with llama_jax installed ('.[tpu]') and its configs
  --accelerator=KIND   such as tpu-v5p-slice, tpu-v5-lite-podslice, tpu-v6e-slice
  --topology=SHAPE     of one slice, such as 4x4x4
  --chips=N            of one host (default 4)
  --slices=N           (default 1)
  --restarts=N         of the whole set after a failure (default 10)
  --grace=SECONDS      to save in, when a pod is evicted or the set is deleted (default 300)
  --namespace=NS       other than kubectl's own
  --dry-run            print what would run

It needs kubectl for the cluster, and JobSet in the cluster; launch/README.md says how.

Example, 2 slices of v5p-128:
  launch/gke.sh start --name=llama --image=REGION-docker.pkg.dev/PROJECT/REPO/llama_jax \
      --accelerator=tpu-v5p-slice --topology=4x4x4 --slices=2 -- \
      --config=configs/7b.py --workdir=gs://BUCKET/7b --config.dcn.data=2
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
  render | start | status | logs | stop) shift ;;
  *) fail "${action:-nothing} is no command: render, start, status, logs, stop" ;;
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
    *) fail "unexpected argument $1 (flags of train stand after --)" ;;
  esac
  shift
done

# Whether the value of flag $1 is of this form, in ASCII.
matches() {
  local LC_ALL=C
  [[ ${!1} =~ $2 ]]
}
matches name '^[a-z]([-a-z0-9]*[a-z0-9])?$' || fail "--name=$name is no name for Kubernetes"

# Sets `string` to the word $1 as a string of YAML, so that the container gets it byte by byte.
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
    # Kubernetes takes $(NAME) for a variable, and $$ for one $.
    ((code == 36 && (next == 36 || next == 40 || (i && codes[i - 1] == 36)))) && string+='$'
    # YAML has more ends of lines than ASCII, and characters that it does not allow.
    if ((code < 32 || code == 34 || code == 92 || code > 126)); then
      printf -v code '\\U%08x' "$code"
    else
      printf -v code '\\x%02x' "$code" && printf -v code %b "$code"
    fi
    string+=$code
  done
  string=\"$string\"
}

# The JobSet, on standard output; the flags of train are the arguments.
render() {
  [[ $image && $accelerator ]] || fail "--image or --accelerator is missing"
  matches image '^[a-zA-Z0-9][-a-zA-Z0-9._/:@]*$' || fail "--image=$image is no image"
  matches accelerator '^[a-zA-Z0-9][-a-zA-Z0-9._]*$' || fail "--accelerator=$accelerator is no kind"
  matches topology '^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$' || fail "--topology=$topology is no shape"
  local flag
  for flag in chips slices restarts grace; do decimal "$flag"; done
  ((slices)) || fail "--slices=0 is too few"
  (($#)) || fail "no flags of train after --"
  local total=$((${topology//x/*}))
  ((chips && total % chips == 0)) || fail "$topology is not whole hosts of $chips chips"
  local command='' word text string
  # Exit status 75 after SIGTERM: an evicted pod has failed, and the set starts again.
  # A run that went to its end over a damaged checkpoint must not: its log tells.
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

# Runs a command, or prints it.
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
