# Sourced: the virtual environment .venv with the pinned packages, made on first use, and its programs found first.
#   . scripts/env.sh EXTRAS        EXTRAS of pyproject.toml, such as "full" or "full,test"
# PYTHON=python3.12 chooses the interpreter; pip's own variables (PIP_INDEX_URL, ...) choose the package registry.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || return 2
if ! command -v "${PYTHON:-python3}" >/dev/null; then
    echo "error: no ${PYTHON:-python3} here; install Python 3.10 or later, or set PYTHON" >&2
    return 2
fi
"${PYTHON:-python3}" scripts/environment.py "$1" || return 2
export PATH="$PWD/.venv/bin:$PATH"
