"""The subcommands of scripts/benchmark.py, one module each."""
