#!/usr/bin/env bash
# @name: @count runs, each on @nodes x @gpus GPUs, and their table at the end
#
#   bash FILE                    submit all: each when what it depends on has finished
#   sbatch --array=NUMBER FILE   one of them, by its number below
#
# Submitted again, finished runs are left as they are and interrupted ones go on. Two minutes before its time is up, or when it
# is preempted, a run saves and stops (code 3); its job then goes back into the queue and continues. Any other code ends it.

# ---- your site's: change these, and take away one # where a name is wanted
##SBATCH --partition=PARTITION
##SBATCH --account=ACCOUNT
#SBATCH --time=24:00:00
#SBATCH --cpus-per-task=8

# ---- the runs'
#SBATCH --job-name=@name
#SBATCH --nodes=@nodes
#SBATCH --ntasks-per-node=@gpus
#SBATCH --gpus-per-node=@gpus
#SBATCH --output=@name-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --signal=USR1@@120
#SBATCH --requeue

set -o pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    set -e
@submit
    exit
fi

if [ "${1:-}" = table ]; then
    exec @python -m launchers @table
fi

case "${SLURM_ARRAY_TASK_ID:?this is a task of an array: see the first lines of this file}" in
@cases
*)
    echo "There is no run $SLURM_ARRAY_TASK_ID in this file." >&2
    exit 2
    ;;
esac

# Rank 0 is the first task of the first node; jobs that share it listen on ports of their own.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

resume=
if [ -e "$run_dir/config.yaml" ]; then
    resume=--resume
fi

# One task a GPU, each of them a rank. After the first has ended, the others have two minutes: to save, or to find out that it is dead.
srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=@gpus
    exec "$@@"
' rank \
    @python @entry "${words[@@]}" $resume
code=$?

if [ "$code" -eq 3 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
