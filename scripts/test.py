"""Check and test everything: linter, formatter, types, tests. Sets itself up.

python scripts/test.py            the suite
python scripts/test.py --all      with the tests' long forms
python scripts/test.py ARGS       ARGS go to pytest (-k loader, tests/model/test_gpt.py, ...)
"""

# No newer Python than environment.py allows: it says which one is needed.
import os
import sys

from environment import main, run

CHECKS = {
    "ruff": (("ruff", "check", "."), ("ruff", "format", "--check", ".")),
    "mypy": (("mypy", "gpt2"),),
}


def test(arguments):
    """Run the checks, then the tests; returns the first exit code that is not 0."""
    for title, commands in CHECKS.items():
        print(f"== {title}", flush=True)
        for words in commands:
            code = run("-m", *words)
            if code:
                return code
    print("== pytest", flush=True)
    long = "not slow"
    if arguments[:1] == ["--all"]:
        long, arguments = "", arguments[1:]
    # One process per core: the tests are single-threaded, and some start processes of their own.
    processes = str(min(os.cpu_count() or 1, 8))
    words = ["-m", "pytest", "-n", processes, "--dist", "worksteal", "-m", long, *arguments]
    return run(*words, HF_HUB_OFFLINE="1", WANDB_MODE="disabled")


if __name__ == "__main__":
    main("full,test")
    sys.exit(test(sys.argv[1:]))
