#!/usr/bin/env bash
# Train on N nodes with Slurm: saved and queued again before the time limit, until the run is finished.
#
#   sbatch --account=MINE --partition=gpu --nodes=2 --gpus-per-node=8 \
#       scripts/cluster/train_slurm.sh gpt2 --data /shared/fineweb_edu_10B --run-dir /shared/runs/gpt2
#
# The words behind the script are train_gpt2.py's. The run's directory is one that all nodes see, or the run has a
# --mirror. Settings of the script, as variables in front of sbatch:
#
#   PROCESSES_PER_NODE=8     processes per node; otherwise the node's GPUs, or one
#   STAGE=/local/scratch     copy the data set to this directory of each node's own disk first
#   PYTHON=.venv/bin/python  of the environment to use; otherwise .venv's, or python
#
# 300 seconds before the time limit (--signal) the run is saved and the job queued again; the next start resumes. A node
# that fails, and preemption, queue it again, too. `scancel` saves and does not. The log is slurm-JOB.log, and that of
# each node slurm-JOB-NODE.log. Exit codes are those of torchrun.sh.
#SBATCH --job-name=gpt2
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the project}"
PYTHON="${PYTHON:-$PWD/.venv/bin/python}"
[[ -x "$PYTHON" ]] || PYTHON=python
export PYTHON
[[ -f scripts/cluster/torchrun.sh ]] || { echo "error: call sbatch in the project's directory, not in $PWD" >&2; exit 2; }

# What the words say of --run-dir, --data and --mirror.
words=("$@")
run=runs/gpt2
data=
mirror=
for ((i = 0; i < ${#words[@]}; i++)); do
    next=${words[i + 1]:-}
    case "${words[i]}" in
        --run-dir) run=$next ;;
        --run-dir=*) run=${words[i]#*=} ;;
        --data) data=$next ;;
        --data=*) data=${words[i]#*=} ;;
        --mirror | --mirror=*) mirror=1 ;;
    esac
done

# On a node's own disk a run is lost with the node.
mkdir -p "$run"
touch "$run/.seen-by-$SLURM_JOB_ID"
if [[ -z "$mirror" ]] && ! srun test -e "$run/.seen-by-$SLURM_JOB_ID"; then
    echo "error: $run is not the same directory on all nodes; give --run-dir one that they share, or --mirror URL" >&2
    exit 2
fi
rm -f "$run/.seen-by-$SLURM_JOB_ID"

if [[ -n "${STAGE:-}" && -n "$data" ]]; then
    srun bash -c 'mkdir -p "$2" && cp -ru "$1" "$2/"' stage "$data" "$STAGE"
    words+=(--data "$STAGE/$(basename "$data")")
fi

# Compiled kernels stay on each node's own disk.
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/torchinductor_$(id -un)}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
restart=${SLURM_RESTART_COUNT:-0}

again=
cancelled=
trap 'again=1; kill -USR1 "$step"' USR1
trap 'cancelled=1; kill -TERM "$step"' TERM
srun --kill-on-bad-exit=0 --open-mode=append --output="slurm-%j-%N.log" \
    bash scripts/cluster/torchrun.sh \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
    --rdzv_backend=c10d --rdzv_endpoint="$address:$((20000 + SLURM_JOB_ID % 20000))" \
    --rdzv_id="$SLURM_JOB_ID-$restart" --max-restarts=3 \
    train_gpt2.py "${words[@]}" &
step=$!
code=0
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
    code=0
    wait "$step" || code=$?
done
echo "start $restart ended with exit code $code${again:+, before the time limit}${cancelled:+, cancelled}"
if [[ -n "$again" && -z "$cancelled" && "$code" == 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
