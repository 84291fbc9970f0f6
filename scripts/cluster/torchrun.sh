#!/usr/bin/env bash
# torchrun for schedulers: a signal saves the run, and the exit code says whether that worked.
#
#   bash scripts/cluster/torchrun.sh --standalone --nproc_per_node=8 train_gpt2.py gpt2 --run-dir runs/gpt2
#
# torchrun by itself passes SIGTERM, SIGINT and SIGHUP on, but then exits with 1 whatever became of the run, does not
# wait for the other machines, and is killed by SIGUSR1. Here it ignores them, and its processes are told in its place:
# they save, they end, and torchrun ends with 0 behind them.
#
#   exit code 0    the run is finished; or it was stopped by SIGTERM, SIGUSR1 or SIGHUP, and the same words resume it
#             130  it was stopped by Ctrl-C, and the same words resume it; a second Ctrl-C kills
#             else of torchrun: 1, where a process failed
#
# PyTorch that lacks torchrun's --signals-to-handle still exits with 1 where a scheduler signals every process.
set -u
export PET_SIGNALS_TO_HANDLE=SIGQUIT # torchrun's option --signals-to-handle, whose default would replace the next line
trap '' TERM USR1 HUP INT            # inherited by torchrun and by its processes, until they are ready to heed them
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
"${PYTHON:-python}" -m torch.distributed.run "$@" &
agent=$!

stopping=
interrupts=0
trap 'stopping=1' TERM USR1 HUP # without effect on a HUP that was ignored on entry, as by nohup
trap 'stopping=1; interrupts=$((interrupts + 1))' INT

processes() { cat "/proc/$agent/task/"*/children 2>/dev/null || pgrep -P "$agent"; }

met=
alone=0
while kill -0 "$agent" 2>/dev/null; do
    wait "$agent"
    while [ -n "$stopping" ] && kill -0 "$agent" 2>/dev/null; do
        found=$(processes)
        if [ "$interrupts" -gt 1 ]; then
            # shellcheck disable=SC2086 -- process ids
            kill -KILL "$agent" $found 2>/dev/null
        elif [ -n "$found" ]; then
            met=1
            # Again and again: a process that is still starting does not heed it yet.
            # shellcheck disable=SC2086
            kill -TERM $found 2>/dev/null
        elif [ -z "$met" ] && [ $((alone += 1)) -gt 3 ]; then
            kill -KILL "$agent" # it waits for other machines, and there is nothing to save
            wait "$agent" 2>/dev/null
            exit 0
        fi
        sleep 1
    done
done
wait "$agent"
code=$?
if [ "$interrupts" -gt 0 ] && [ "$code" = 0 ]; then
    trap - INT
    kill -INT $$
fi
exit "$code"
