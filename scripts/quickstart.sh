#!/usr/bin/env bash
# From nothing to a trained, evaluated, sampled GPT: scripts/quickstart.py, which says what may be added.
# PYTHON=python3.12 chooses the interpreter; pip's own variables (PIP_INDEX_URL, ...) choose the package registry.
command -v "${PYTHON:-python3}" >/dev/null || {
    echo "error: no ${PYTHON:-python3} here; install Python 3.10 or later, or set PYTHON" >&2
    exit 2
}
exec "${PYTHON:-python3}" "$(dirname "$0")/quickstart.py" "$@"
