#!/usr/bin/env bash
# Slurm, from a clone on a file system that all nodes share, where `make setup` has been run once:
#
#   export AEMIM_DATA=s3://bucket/imagenet/train AEMIM_RUNS=/shared/runs
#   sbatch yamls/cloud/slurm.sh [KEY=VALUE]...
#
# Arguments are further overrides of the recipe. AEMIM_RUNS must be a folder that all nodes share. Keys of a bucket
# come from the environment of sbatch or from the user's own configuration files: nothing secret stands here.
# A preempted job, or one whose time is up, is queued again and continues from its last checkpoint.
#SBATCH --job-name=aemim-vit-base
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=72  # for each GPU a process and the recipe's 8 loader workers
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

: "${AEMIM_DATA:?the training images: shards of \`aemim data\`, a folder or s3://bucket/folder}"
: "${AEMIM_RUNS:?a folder for checkpoints that all nodes share}"
cache="${AEMIM_CACHE:-/tmp/aemim-cache-$SLURM_JOB_ID}"  # on each node: where shards of a bucket are kept
clone="${AEMIM_CLONE:-$SLURM_SUBMIT_DIR}"

gpus="$SLURM_GPUS_ON_NODE"
world_size=$((SLURM_JOB_NUM_NODES * gpus))
first_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
port=$((20000 + SLURM_JOB_ID % 10000))  # another one for each job, as jobs may share a node
cd "$clone"
export PATH="$clone/.venv/bin:$PATH"

# Slurm itself queues a preempted job again; at the end of its time the job has to ask.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

# One launcher a node; only there is SLURM_NODEID known. If one node fails, all end: the others would wait for it.
launch='exec composer -n "$1" --world_size "$2" --node_rank "$SLURM_NODEID" \
  --master_addr "$3" --master_port "$4" -c aemim "${@:5}"'
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c "$launch" launch "$gpus" "$world_size" "$first_node" "$port" \
  pretrain yamls/pretrain/imagenet_vit_base_300ep_aemim.yaml \
  data.source="$AEMIM_DATA" data.cache="$cache" \
  save_folder="$AEMIM_RUNS/aemim-vit-base" save_interval=5ep \
  parallelism=null "$@" &
step=$!
status=0
wait "$step" || status=$?
if kill -0 "$step" 2>/dev/null; then  # the signal has ended the wait, not the step
  status=0
  wait "$step" || status=$?
fi
exit "$status"
