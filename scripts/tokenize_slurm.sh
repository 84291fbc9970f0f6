#!/bin/bash
# Tokenize FineWeb on many machines with Slurm: an array of independent parts, then one merge.
#
#   sbatch --array=1-16 scripts/tokenize_slurm.sh --size 100B --out /scratch/fineweb_edu_100B
#
# Each task makes its part of the row groups; parts share only the output directory, which all nodes must see. A task
# that dies is queued again and continues after its last finished shard. When a task finds all parts finished, it
# merges them. The array must be 1-N, without gaps, and N must stay the same for one output directory.
#
# Time: a core tokenizes some 4 M tokens per second, so 32 cores need about a minute for one of 16 parts of 100 B tokens.
# Fetching the part's 18 GB takes longer on most networks, and costs more than the cores.
#SBATCH --job-name=tokenize
#SBATCH --cpus-per-task=32
#SBATCH --mem=24G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=tokenize-%A-%a.log
set -euo pipefail

: "${SLURM_ARRAY_TASK_ID:?start this with sbatch --array=1-N, or set it and SLURM_ARRAY_TASK_COUNT by hand}"
: "${SLURM_ARRAY_TASK_COUNT:?start this with sbatch --array=1-N}"
if [[ "${SLURM_ARRAY_TASK_MIN:-1}" != 1 || "${SLURM_ARRAY_TASK_MAX:-$SLURM_ARRAY_TASK_COUNT}" != "$SLURM_ARRAY_TASK_COUNT" ]]; then
  echo "error: the array must be 1-N without gaps, as in --array=1-16" >&2
  exit 2
fi

out=
for ((i = 1; i <= $#; i++)); do
  [[ "${!i}" == --out ]] && { next=$((i + 1)); out="${!next:?--out needs a directory}"; }
  [[ "${!i}" == --out=* ]] && out="${!i#--out=}"
done
: "${out:?give --out DIR, a directory that all nodes see}"

# sbatch runs a copy of this file, so the project is found from where sbatch was called.
root="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}"
python="${PYTHON:-$root/.venv/bin/python}"
[[ -x "$python" ]] || python=python3

"$python" "$root/data/fineweb.py" "$@" \
  --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" --workers "${SLURM_CPUS_PER_TASK:-$(nproc)}"

# Whoever sees the last part finished merges. Two at a time do no harm: both write the same manifest, atomically.
finished=$(grep -l '^ "complete": true' "$out"/manifest.part-*-of-"$(printf %04d "$SLURM_ARRAY_TASK_COUNT")".json | wc -l)
if [[ "$finished" == "$SLURM_ARRAY_TASK_COUNT" ]]; then
  "$python" "$root/data/fineweb.py" merge "$out"
fi
