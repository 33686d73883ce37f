#!/bin/bash
# Prune a model on four machines of a SLURM cluster, each with eight GPUs:
#     sbatch examples/ray/slurm.sh MODEL.onnx TEXTS OUT.onnx
# The model lies in a folder that all machines see at the same path, and so does the work folder:
# a job that was cut off goes on from there when it is submitted again.
#SBATCH --job-name=iobs-onnx
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --requeue
set -euo pipefail
model=$1 texts=$2 output=$3

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}'):6379

srun --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --port=6379 --num-cpus=64 --num-gpus=8 --block &
sleep 20
srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
    ray start --address="$address" --num-cpus=64 --num-gpus=8 --block &
sleep 20

# The driver runs on the head, beside its workers: --overlap shares what they hold.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    iobs-onnx prune "$model" --text "$texts" --sparsity 2:4 --output "$output" \
    --ray "$address" --work-dir "$output.work"
