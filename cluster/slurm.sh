#!/usr/bin/env bash
#SBATCH --job-name=roll_sft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Trains on the nodes of a SLURM job, as one Ray cluster that lives as long as the run:
#
#     sbatch cluster/slurm.sh --config-name qwen7b_sft model.path=... output_dir=/shared/run1 ...
#
# --exclusive, because `ray symmetric-run` ends with `ray stop`, which ends every Ray of the user on
# the node. --signal reaches this script alone, 180 s before the limit; the run then saves and ends
# with 75, and this script puts the job back into the queue. The next start goes on from there.
# --no-kill keeps the other nodes where one fails: see cluster.max_restarts and cluster.elastic.
#
# Variables: PYTHON (python), RAY_PORT (6379; the six after it are taken, too), HEAD_ADDRESS (the first
# node's address in the network of the nodes), RAY_START (more options of `ray start`).
set -euo pipefail

python="${PYTHON:-python}"
port="${RAY_PORT:-6379}"
# `ray symmetric-run` finds `ray` by PATH.
PATH="$(dirname "$(command -v "$python")"):$PATH"
export PATH
read -r -a more <<<"${RAY_START:-}"

# The batch script runs on the first node, where Ray's head and the run are, too. Ray refuses names
# that resolve to loopback, as a host's own name often does.
# Each reader reads to the end: a writer that is cut off would end this script.
name="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
head="${HEAD_ADDRESS:-$(getent ahostsv4 "$name" | awk '$1 !~ /^127\./ && !n++ { print $1 }' || true)}"
head="${head:-$(hostname -I | awk '{ print $1 }')}"

# A token for this cluster alone. It does not encrypt: the nodes need a private network.
RAY_AUTH_TOKEN="${RAY_AUTH_TOKEN:-$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n')}"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT="${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}"
ulimit -n "$(ulimit -Hn)"

# Ports below the range from which the kernel gives ports to connections (32768 and above): a port
# that is taken by chance keeps a node from joining.
ports=(
  --node-manager-port=$((port + 1))
  --object-manager-port=$((port + 2))
  --runtime-env-agent-port=$((port + 3))
  --dashboard-agent-listen-port=$((port + 4))
  --dashboard-agent-grpc-port=$((port + 5))
  --metrics-export-port=$((port + 6))
  --min-worker-port=20000
  --max-worker-port=29999
)

# Of this start: a job that was requeued keeps its number.
state="$(mktemp -d "${TMPDIR:-/tmp}/roll_sft.$SLURM_JOB_ID.XXXXXX")"
trap 'rm -rf "$state"' EXIT

# Signals go to the run alone, never to the step: Ray's processes would die of them first.
# shellcheck disable=SC2329 # the traps call it
ask_to_save() {
  echo "slurm.sh: $1: the run is asked to save and end"
  kill -USR1 "$(cat "$state/pid")" 2>/dev/null || echo "slurm.sh: the run has not begun"
}
trap 'ask_to_save "the time limit is near"' USR1
trap 'ask_to_save "the job is pre-empted"' TERM

# On every node: say when its Ray begins and ends.
# shellcheck disable=SC2016 # expanded on the nodes
on_each_node='
  name="${SLURMD_NODENAME:-$(hostname)}"
  echo "slurm.sh: $name: starting Ray"
  trap : TERM # Ray gets it, too: say when it has ended
  "$@"
  code=$?
  echo "slurm.sh: $name: Ray ended after $SECONDS s, with $code"
  exit "$code"
'
# On the head: leave the process ID of the run, and its exit code, for this script.
# shellcheck disable=SC2016
on_the_head='
  state="$1"
  shift
  "$@" &
  echo "$!" >"$state/pid"
  wait "$!"
  code=$?
  echo "$code" >"$state/code"
  exit "$code"
'
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
  --no-kill --kill-on-bad-exit=0 --wait=0 --label \
  bash -c "$on_each_node" node \
  ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --disable-usage-stats "${ports[@]}" "${more[@]}" -- \
  bash -c "$on_the_head" run "$state" \
  "$python" -m roll_sft.run cluster.grace_s=110 "cluster.address=$head:$port" "$@" &
step=$!

# A trap runs once `wait` returns, so wait for short times.
while kill -0 "$step" 2>/dev/null && [ ! -s "$state/code" ]; do
  sleep 1 &
  wait $! || true
done
# The other nodes would wait a minute for their head to come back.
for _ in $(seq 15); do
  kill -0 "$step" 2>/dev/null || break
  sleep 1
done
kill "$step" 2>/dev/null || true
for _ in $(seq 30); do
  kill -0 "$step" 2>/dev/null || break
  sleep 1
done
kill -KILL "$step" 2>/dev/null || true
step_code=0
wait "$step" || step_code=$?
# A step that ends with 0 and no run is a head of Ray that did not start.
code="$(cat "$state/code" 2>/dev/null || echo "$((step_code ? step_code : 1))")"

echo "slurm.sh: the run ended with exit code $code"
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
