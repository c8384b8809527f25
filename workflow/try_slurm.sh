#!/bin/bash
# The shipped SLURM profile against a real SLURM of one machine: workflow/try_slurm.sh [options of run.sh]
#
# Needs, on Debian: apt-get install slurm-wlm munge; and an environment with Snakemake, see book/grid.md. Everything that
# it starts belongs to the calling user, lives in a temporary folder and is stopped at the end. There is no accounting
# database: status comes from squeue.
set -eu
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin
for tool in munged slurmctld slurmd sbatch; do
  command -v $tool >/dev/null || { echo "try_slurm.sh: no $tool; on Debian: apt-get install slurm-wlm munge" >&2; exit 2; }
done

home=$(mktemp -d)
host=$(hostname -s)
mkdir -p "$home"/{state,spool,log}
chmod 700 "$home"
started=()
stop() {
  for ((i = ${#started[@]} - 1; i >= 0; i--)); do kill "${started[i]}" 2>/dev/null || true; done
  wait
  echo "SLURM is stopped; its logs are in $home/log"
}
trap stop EXIT

cat > "$home/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$home/munge.socket
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
MinJobAge=3600
NodeName=$host CPUs=$(nproc) RealMemory=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo) State=UNKNOWN
PartitionName=work Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$home/slurm.conf
# The plug-in takes SLURM_CONF away from its jobs, which would then look in /etc.
mkdir "$home/bin"
printf '#!/bin/bash\nSLURM_CONF=%q exec %q "$@"\n' "$SLURM_CONF" "$(command -v srun)" > "$home/bin/srun"
chmod +x "$home/bin/srun"
export PATH=$home/bin:$PATH

head -c 1024 /dev/urandom > "$home/munge.key"
chmod 600 "$home/munge.key"
munged --foreground --force --key-file="$home/munge.key" --socket="$home/munge.socket" --pid-file="$home/munge.pid" \
  --seed-file="$home/munge.seed" --log-file="$home/log/munge.log" > /dev/null 2>&1 &
started+=($!)
sleep 1
for daemon in slurmctld slurmd; do
  $daemon -D > /dev/null 2>&1 &  # both write their own log
  started+=($!)
done
for _ in $(seq 60); do
  [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ] && break
  sleep 1
done
sinfo

# The last line of defense: a head that never learns that its jobs have ended does not listen to a plain TERM either.
timeout --signal=KILL "${LIMIT:-3600}" workflow/run.sh --profile workflow/profiles/slurm --jobs "$(nproc)" --latency-wait 5 \
  --slurm-no-account --slurm-status-command squeue --slurm-init-seconds-before-status-checks 10 "$@"
squeue --states=all --format="%i %T %M %l %j"
