"""Two machines: two agents of torchrun on loopback, which meet by c10d rendezvous and lose workers on either side."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT
from small_runs import Started, assert_same_bits, finish, flags, losses, records, saved, small

SCRIPT = ROOT / "tests/agents_train.py"


@pytest.fixture
def stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stalls the process whose id is written into it."""
    monkeypatch.setenv("STALL", str(tmp_path / "stall"))
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")  # seconds before a stalled process is killed
    return tmp_path / "stall"


def agent_words(nodes: str, restarts: int) -> tuple[str, ...]:
    """What torchrun is told on each machine."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    return (
        *("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test", "--local_addr=127.0.0.1"),
        *(f"--nnodes={nodes}", f"--max-restarts={restarts}", "--monitor-interval=0.1"),
        "--rdzv_conf=last_call_timeout=1,join_timeout=900,read_timeout=900,keep_alive_interval=1,keep_alive_max_attempt=120",
    )


@contextlib.contextmanager
def two_agents(words: list[str], restarts: int) -> Iterator[list[Started]]:
    torchrun = agent_words("2", restarts)
    with Started(SCRIPT, words, 1, torchrun) as first, Started(SCRIPT, words, 1, torchrun) as second:
        yield [first, second]


PATIENCE = 900.0  # seconds; a busy machine needs minutes to start processes


def steps_since(run: Path, start: int) -> int:
    """Steps logged since a start of the run, from 0."""
    return len(records(run, "train", start))


@pytest.mark.parametrize("hits", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_and_stalls_on_either_side_change_nothing(
    char_data: Path, tmp_path: Path, stall: Path, hits: int
) -> None:
    dice = random.Random(hits)
    settings = {"max_steps": 25 * hits, "dropout": 0.1, "micro_batch_size": 4, "eval_every": 20}
    run = tmp_path / "hit"
    words = flags(small(char_data, run, checkpoint_every=7, resume="never", **settings))
    kinds = ([("kill", 0), ("kill", 1), ("stall", 1), ("stall", 0)] * 5)[:hits]
    dice.shuffle(kinds)
    with two_agents(words, restarts=2 * hits) as agents:  # each hit costs each agent one, and a busy machine may stall
        for number, (kind, side) in enumerate(kinds):
            start = max(number, len(records(run, "run_start")) - 1)
            assert agents[0].until(lambda n=start: steps_since(run, n) > 3, PATIENCE), agents[1].output()
            (victim,) = agents[side].workers()
            if kind == "kill":
                os.kill(victim, signal.SIGKILL)
            else:
                stall.write_text(str(victim))
        ends = [agent.finish(PATIENCE) for agent in agents]
    assert [code for code, _ in ends] == [0, 0], ends
    assert len(records(run, "run_start")) > hits
    code, output = finish(ROOT / "train_gpt2.py", flags(small(char_data, tmp_path / "whole", **settings)), 2)
    assert code == 0, output
    assert_same_bits(saved(tmp_path / "whole", 25 * hits), saved(run, 25 * hits))
    assert losses(tmp_path / "whole") == losses(run)
    assert losses(tmp_path / "whole", "val") == losses(run, "val")


@pytest.mark.slow
def test_a_machine_joins_and_leaves(char_data: Path, tmp_path: Path, stall: Path) -> None:
    run = tmp_path / "run"
    settings = {"max_steps": 100_000, "micro_batch_size": 4, "schedule": "constant", "learning_rate": 1e-3}
    words = flags(small(char_data, run, checkpoint_every=5, **settings))
    torchrun = agent_words("1:2", restarts=3)
    with Started(SCRIPT, words, 1, torchrun) as first:
        assert first.until(lambda: steps_since(run, 0) > 5, PATIENCE)
        with Started(SCRIPT, words, 1, torchrun) as second:
            assert first.until(lambda: steps_since(run, 1) > 5, PATIENCE), second.output()
            (worker,) = second.workers()
        with contextlib.suppress(ProcessLookupError):  # it may have noticed that its agent is gone
            os.kill(worker, signal.SIGKILL)
        assert first.until(lambda: records(run, "run_start")[-1]["world_size"] == 1, PATIENCE)
        start = len(records(run, "run_start")) - 1
        assert first.until(lambda: steps_since(run, start) > 5, PATIENCE)
        os.kill(first.workers()[0], signal.SIGTERM)
        code, output = first.finish(PATIENCE)
    assert code == 0, output
    sizes = [line["world_size"] for line in records(run, "run_start")]
    assert sizes[:2] == [1, 2]
    assert sizes[-1] == 1
    steps = max(losses(run))
    config = small(char_data, tmp_path / "whole", **{**settings, "max_steps": steps})
    code, output = finish(ROOT / "train_gpt2.py", flags(config))
    assert code == 0, output
    assert losses(run).keys() == losses(tmp_path / "whole").keys() == set(range(1, steps + 1))
    assert list(losses(run).values()) == pytest.approx(list(losses(tmp_path / "whole").values()), abs=1e-3)
