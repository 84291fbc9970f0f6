#!/usr/bin/env bash
# From nothing to a trained, evaluated, sampled GPT, on a laptop's CPU: about five minutes after installation.
#   bash scripts/quickstart.sh            run it again and it goes on where it stopped, or shows what there is
#   bash scripts/quickstart.sh --smoke    the same in about a minute, with a model that learns little
set -euo pipefail
. "$(dirname "$0")/env.sh" full

run=runs/quickstart
examples=100
flags=()
if [ "${1:-}" = --smoke ]; then
    run=runs/smoke
    examples=20
    flags=(--run-dir "$run" --max-steps 24 --eval-every 12 --checkpoint-every 12 --warmup-steps 4 --hellaswag-limit 8
        --no-compile)
    shift
fi
[ $# = 0 ] || _fail "unknown argument $1; the only one is --smoke"

echo "== 1/5 data: the documentation in Python's own library, as GPT-2's tokens"
python data/pydocs.py

echo "== 2/5 training"
python train_gpt2.py quickstart ${flags[@]+"${flags[@]}"}

echo "== 3/5 HellaSwag (a model this small guesses: 25 %)"
python hellaswag.py -m "$run" --limit "$examples" || echo "HellaSwag is left out; training and sampling do not need it"

echo "== 4/5 samples"
for prompt in "Hello, I'm a language model," "Return a list of"; do
    python scripts/sample.py -m "$run" --prompt "$prompt" -n 2 --max-new-tokens 48 --temperature 0.7 --top-k 50
done

echo "== 5/5 report"
python scripts/report.py "$run" --out "$run/report.html"

cat <<END

Made in this folder:
  data/pydocs                tokenized text
  $run/checkpoints      the trained model; transformers opens each of them
  $run/report-loss.png  the loss curve, and report.html with all the rest

The same for GPT-2 124M on 8 GPUs and 10 billion tokens of FineWeb-Edu:
  python data/fineweb.py
  torchrun --standalone --nproc_per_node=8 train_gpt2.py
END
