#!/usr/bin/env bash
# Runs a Slurm of one node on this machine, for the tests of launch/slurm.sbatch.
#
# Usage: tests/slurm_cluster.sh install        Debian's packages, as root
#        tests/slurm_cluster.sh start FOLDER   prints the export of SLURM_CONF
#        tests/slurm_cluster.sh stop FOLDER
#
# It needs root, but neither systemd nor cgroups, so it runs in a bare container. It writes only to
# FOLDER, and does not disturb another Slurm on this machine.
set -euo pipefail

install() {
  command -v slurmctld slurmd sbatch munged >/dev/null && return
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
    slurmctld slurmd slurm-client munge
}

free_ports() {
  python3 -c '
import socket
probes = [socket.socket() for _ in range(2)]
for probe in probes:
    probe.bind(("", 0))
print(*(probe.getsockname()[1] for probe in probes))'
}

start() {
  local folder=$1 host ctld_port slurmd_port
  mkdir -p "$folder"/{state,spool}
  chmod 755 "$folder"
  host=$(hostname -s)
  read -r ctld_port slurmd_port < <(free_ports)
  dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
  chmod 400 "$folder/munge.key"
  # --force: by default munged refuses to run as root or in a folder that others may write to.
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
    --seed-file="$folder/munge.seed" 2>"$folder/munged.err"
  cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$ctld_port
SlurmdPort=$slurmd_port
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
MinJobAge=3600
# Schedule every second; the defaults are 30 s (bf_interval) and 60 s (sched_interval).
SchedulerParameters=bf_interval=1,sched_interval=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  export SLURM_CONF=$folder/slurm.conf
  slurmctld
  slurmd
  for _ in $(seq 1000); do
    [[ $(sinfo --noheader --format=%T 2>/dev/null) == idle ]] && break
    sleep 0.3
  done
  [[ $(sinfo --noheader --format=%T) == idle ]] ||
    { echo "error: no node is idle; see $folder/*.log" >&2 && exit 1; }
  echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
  local folder=$1 name pid
  export SLURM_CONF=$folder/slurm.conf
  # End the jobs first: without slurmd, their daemons would stay.
  scancel --user=root 2>/dev/null || true
  scancel --user=root --signal=KILL --full 2>/dev/null || true
  for _ in $(seq 600); do
    [[ $(squeue --noheader 2>/dev/null) ]] || break
    sleep 0.5
  done
  for name in slurmd slurmctld munged; do
    [[ -f $folder/$name.pid ]] || continue
    pid=$(cat "$folder/$name.pid")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 500); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.2
    done
    kill -KILL "$pid" 2>/dev/null || true
  done
}

"$@"
