"""From nothing to a trained, evaluated, sampled GPT, on a laptop's CPU: about five minutes after installation.

python scripts/quickstart.py            run it again and it resumes where it stopped, or shows what there is
python scripts/quickstart.py --smoke    the same in about a minute, with a model that learns little
"""

# No newer Python than environment.py allows: it says which one is needed.
import sys

from environment import fail, main, run

SMOKE = "--max-steps 24 --eval-every 12 --checkpoint-every 12 --warmup-steps 4 --hellaswag-limit 8 --no-compile"
PROMPTS = ("Hello, I'm a language model,", "Return a list of")
MADE = """
Made in this folder:
  data/pydocs                tokenized text
  {run}/checkpoints      the trained model; transformers opens each of them
  {run}/report-loss.png  the loss curve, and report.html with all the rest

The same for GPT-2 124M on 8 GPUs and 10 billion tokens of FineWeb-Edu:
  python data/fineweb.py
  torchrun --standalone --nproc_per_node=8 train_gpt2.py"""


def step(title, *words):
    """One of the five, which the next ones need."""
    print(f"== {title}", flush=True)
    code = run(*words)
    if code:
        sys.exit(code)


def quickstart(smoke):
    """All five steps."""
    directory, examples, flags = "runs/quickstart", "100", []
    if smoke:
        directory, examples, flags = "runs/smoke", "20", ["--run-dir", "runs/smoke", *SMOKE.split()]
    step("1/5 data: the documentation in Python's own library, as GPT-2's tokens", "data/pydocs.py")
    step("2/5 training", "train_gpt2.py", "quickstart", *flags)
    print("== 3/5 HellaSwag (a model this small guesses: 25 %)", flush=True)
    if run("hellaswag.py", "-m", directory, "--limit", examples):
        print("HellaSwag is left out; training and sampling do not need it", flush=True)
    print("== 4/5 samples", flush=True)
    sampling = ["-n", "2", "--max-new-tokens", "48", "--temperature", "0.7", "--top-k", "50"]
    for prompt in PROMPTS:
        code = run("scripts/sample.py", "-m", directory, "--prompt", prompt, *sampling)
        if code:
            sys.exit(code)
    step("5/5 report", "scripts/report.py", directory, "--out", directory + "/report.html")
    print(MADE.format(run=directory), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--smoke"]):
        fail("unknown argument {}; the only one is --smoke".format(next(a for a in sys.argv[1:] if a != "--smoke")))
    main("full")
    quickstart(smoke="--smoke" in sys.argv)
