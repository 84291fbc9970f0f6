#!/usr/bin/env bash
# Check and test everything: linter, formatter, types, tests. Sets itself up.
#   bash scripts/test.sh            the suite
#   bash scripts/test.sh --all      with the tests' long forms
#   bash scripts/test.sh ARGS       ARGS go to pytest (-k loader, tests/model/test_gpt.py, ...)
set -euo pipefail
. "$(dirname "$0")/env.sh" full,test

export HF_HUB_OFFLINE=1 WANDB_MODE=disabled
long="not slow"
if [ "${1:-}" = --all ]; then
    long=""
    shift
fi

echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy gpt2
echo "== pytest"
# One process a core: the tests are single-threaded, and some start processes of their own.
exec pytest -n "$(python -c 'import os; print(min(os.cpu_count() or 1, 8))')" --dist worksteal -m "$long" "$@"
