"""scripts/export.py: what `transformers` makes of an exported folder, what is in it, and where it goes."""

from __future__ import annotations

import base64
import json
import os
import platform
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_runs import encode, lines

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")

from repository import ROOT, load_script  # noqa: E402

from gpt2.checkpoint.directory import Checkpoint, write_checkpoint  # noqa: E402
from gpt2.config import GPTConfig  # noqa: E402
from gpt2.errors import UserError  # noqa: E402
from gpt2.model.gpt import GPT  # noqa: E402
from gpt2.model.pretrained import resolve_model  # noqa: E402
from gpt2.tokens.fast_bpe import HARD_CASES  # noqa: E402
from gpt2.tokens.tokenizer import CharTokenizer, Tokenizer, gpt2_tokenizer  # noqa: E402

script = load_script("scripts/export.py")
llama_family = script.llama_family

TINY: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32, "vocab_size": 70}
MODERN = {**TINY, "position": "rope", "norm": "rmsnorm"}
CHARS = CharTokenizer("".join(map(chr, range(0x21, 0x21 + 70))))

EXPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", TINY),
    "gpt2 without bias": ("GPT2LMHeadModel", {**TINY, "bias": False}),
    "gpt2 over padding": ("GPT2LMHeadModel", {**TINY, "softmax_over_padding": True}),
    "gpt2, bf16 embedding": ("GPT2LMHeadModel", {**TINY, "tie_embeddings": False, "bf16_embedding": True}),
    "gpt2, wide window": ("GPT2LMHeadModel", {**TINY, "window": 99, "full_attention_every": 2}),
    "llama": ("LlamaForCausalLM", {**MODERN, "activation": "swiglu", "bias": False}),
    "llama, biases": ("LlamaForCausalLM", {**MODERN, "activation": "swiglu"}),
    "llama, grouped, untied": (
        "LlamaForCausalLM",
        {**MODERN, "activation": "swiglu", "n_kv_head": 2, "tie_embeddings": False, "rope_theta": 500.0},
    ),
    "llama, scale, clockwise": (
        "LlamaForCausalLM",
        {**MODERN, "activation": "swiglu", "attention_scale": 0.2, "rope_clockwise": True, "norm_eps": 0.1},
    ),
    "arcee": ("ArceeForCausalLM", {**MODERN, "activation": "relu2", "n_kv_head": 1, "norm_eps": None}),
    "arcee, gelu": ("ArceeForCausalLM", {**MODERN, "attention_scale": 0.5, "rope_clockwise": True}),
    "qwen3": ("Qwen3ForCausalLM", {**MODERN, "activation": "swiglu", "bias": False, "qk_norm": True, "n_kv_head": 2}),
    "qwen3, scale, clockwise": (
        "Qwen3ForCausalLM",
        {
            **{**MODERN, "activation": "swiglu", "bias": False, "qk_norm": True, "norm_eps": None},
            **{"attention_scale": 0.12, "rope_clockwise": True},
        },
    ),
    "code: no position": ("ReproGPT2ForCausalLM", {**TINY, "position": "none", "head_bias": True}),
    "code: rope, layernorm": ("ReproGPT2ForCausalLM", {**TINY, "position": "rope", "bias": False, "n_kv_head": 2}),
    "code: windows": ("ReproGPT2ForCausalLM", {**TINY, "window": 4, "full_attention_every": 2}),
    "code: post": ("ReproGPT2ForCausalLM", {**TINY, "norm_position": "post", "final_norm": True, "activation": "relu"}),
    "code: post without a last norm": ("ReproGPT2ForCausalLM", {**MODERN, "norm_position": "post"}),
    "code: swiglu": ("ReproGPT2ForCausalLM", {**TINY, "activation": "swiglu", "logit_softcap": 2.0}),
    "code: 3.28": (
        "ReproGPT2ForCausalLM",
        {
            **{**MODERN, "activation": "relu2", "norm_eps": None, "embedding_norm": True, "qk_norm": True},
            **{"attention_scale": 0.12, "rope_fraction": 0.5, "rope_clockwise": True, "tie_embeddings": False},
            **{"head_bias": True, "logit_softcap": 15.0, "logit_softcap_form": "algebraic"},
            **{"softmax_over_padding": True, "bf16_embedding": True, "init_embedding_std": 1.0},
        },
    ),
    "code: erf gelu": ("ReproGPT2ForCausalLM", {**TINY, "activation": "gelu", "qk_norm": True}),
}


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take a second each: only the tests that look for them draw them."""
    if "card" not in request.node.name:
        monkeypatch.setattr(script, "draw_curves", lambda run, folder: [])


def make_run(run: Path, config: GPTConfig, tokenizer: Tokenizer | None = None, step: int = 30, **training: Any) -> Path:
    """A run with one checkpoint, whose weights all count; its path is in its settings, its machine in its records."""
    torch.manual_seed(0)
    model = GPT(config).init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
        model.zero_padding_rows()
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    # fake_runs' machine is "node-0"; a secret place stands where a user's would.
    records = lines(model=config, dataset="pydocs", steps=40, log_every=5, eval_every=10)
    for record in records:
        if record["kind"] == "run_start":
            record["host"] = platform.node()
            record["config"]["data"]["data"] = record["config"]["run"]["run_dir"] = "/home/somebody/secret"
            record["config"]["run"]["init_from"] = "/home/somebody/secret"
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_bytes(encode(records))
    checkpoint = Checkpoint(state, {}, {"step": step, **training})
    return write_checkpoint(run / "checkpoints", checkpoint, config, tokenizer or CHARS)


def run_script(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    result: int = script.main()
    return result


def open_folder(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model.eval()


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_computes_the_same_logits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, values = EXPORTED[name]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    checkpoint = make_run(tmp_path / "run", GPTConfig(**values))
    assert script.export(checkpoint, tmp_path / "out", "mit") == architecture
    theirs, ours = open_folder(tmp_path / "out"), GPT.from_pretrained(checkpoint)
    assert type(theirs).__name__ == architecture
    tokens = torch.randint(70, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = ours(tokens)
        assert expected.std() > 0.1
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    # Every tensor of the file has a place in the model, and every parameter is in the file.
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "out" / "model.safetensors")
    tied = {"lm_head.weight"} if ours.config.tie_embeddings else set()
    assert {n for n, _ in theirs.named_parameters(remove_duplicate=False)} - tied == stored.keys()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["gpt2", "llama, grouped, untied", "code: windows", "code: 3.28"])
def test_generation_with_a_cache_and_padding(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    checkpoint = make_run(tmp_path / "run", GPTConfig(**EXPORTED[name][1]))
    script.export(checkpoint, tmp_path / "out", "mit")
    theirs, ours = open_folder(tmp_path / "out"), GPT.from_pretrained(checkpoint)
    prompts = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]])
    wanted = ours.generate(prompts, 10, temperature=0)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    ones = torch.ones_like(prompts)
    assert theirs.generate(prompts, attention_mask=ones, **options).tolist() == wanted.tolist()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompts], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), ones], dim=1)
    assert theirs.generate(padded, attention_mask=mask, **options)[:, 3:].tolist() == wanted.tolist()


def test_our_code_trains_by_the_mean_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    checkpoint = make_run(tmp_path / "run", GPTConfig(**EXPORTED["code: windows"][1]))
    script.export(checkpoint, tmp_path / "out", "mit")
    theirs, tokens = open_folder(tmp_path / "out"), torch.arange(20)[None]
    loss = theirs(tokens, labels=tokens).loss
    expected = GPT.from_pretrained(checkpoint)(tokens[:, :-1], tokens[:, 1:]) / 19
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in theirs.parameters())


def test_every_setting_of_a_model_is_computed_or_refused() -> None:
    known = script.IN_OUR_CODE | script.IN_TRAINING_ONLY
    assert known == {field for field in GPTConfig.__dataclass_fields__}
    code = load_script("scripts/exported/modeling_repro_gpt2.py")
    in_hf = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "tie_embeddings", "norm_eps"}
    assert set(code.GPT2) | in_hf == script.IN_OUR_CODE
    defaults = GPTConfig()
    assert all(getattr(defaults, name) == value for name, value in code.GPT2.items())


def test_a_setting_our_code_does_not_know_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "IN_OUR_CODE", script.IN_OUR_CODE - {"qk_norm"})
    checkpoint = make_run(tmp_path / "run", GPTConfig(**TINY, qk_norm=True))
    with pytest.raises(UserError, match="a model with qk_norm=True cannot be exported"):
        script.export(checkpoint, tmp_path / "out", "mit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_field_that_llama_lacks_keeps_a_model_from_being_one() -> None:
    base = GPTConfig(**MODERN, activation="swiglu")
    assert llama_family(base) == "llama"
    for change in ({"logit_softcap": 3.0}, {"head_bias": True}, {"window": 3}, {"rope_fraction": 0.5}):
        values = {**MODERN, "activation": "swiglu", **change}
        if values.get("head_bias"):
            values["tie_embeddings"] = False
        assert llama_family(GPTConfig(**values)) is None


def test_the_folder_of_card_and_weights_is_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", GPTConfig(**{**TINY, "vocab_size": 50257}), gpt2_tokenizer())
    folder = tmp_path / "mine"
    assert run_script(monkeypatch, tmp_path / "run", folder, "--license", "mit") == 0
    assert "step_00000030 as GPT2LMHeadModel" in capsys.readouterr().out
    names = {path.name for path in folder.iterdir()}
    pictures = {name for name in names if name.endswith(".png")}
    assert names - pictures == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    }
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        (folder / "config.json").stat().st_mode & 0o777
    }
    for path in folder.iterdir():
        content = path.read_bytes()
        assert b"/home/" not in content, path
        assert str(tmp_path).encode() not in content, path
        if len(platform.node()) > 3:
            assert platform.node().encode() not in content, path
    config = json.loads((folder / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 32
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == 50256


def test_the_card_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", GPTConfig(**TINY))
    run_script(monkeypatch, tmp_path / "run", tmp_path / "mine", "--license", "cc-by-4.0")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: transformers\n")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in records if r["kind"] == "val" and r["step"] <= 30][-1]
    score = [r for r in records if r["kind"] == "hellaswag" and r["step"] <= 30][-1]
    assert f"| 30 | {last['loss']:.4f} | {last['bits_per_byte']:.4f} |" in card
    assert "\n| 40 |" not in card  # the checkpoint is of step 30
    assert f"acc_norm {score['acc_norm']:.2%}" in card
    assert "for 30 steps on 15,728,640 tokens" in card
    assert "| --learning-rate | 0.0006 |" in card
    assert f"{GPT.from_pretrained(tmp_path / 'run').num_parameters():,} parameters" in card
    assert "the weights of another run" in card
    for picture in re.findall(r"!\[\w+\]\((.+)\)", card):
        assert (tmp_path / "mine" / picture).is_file()
    # The snippet of the card runs as it is, beside the folder.
    snippet = re.search(r"```python\n(.+?)```", card, re.DOTALL)
    assert snippet is not None
    monkeypatch.chdir(tmp_path)
    exec(snippet[1].replace('"The"', '"AB"'), {})


def test_gpt2s_tokenizer_json_is_tiktokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    make_run(tmp_path / "run", GPTConfig(**{**TINY, "vocab_size": 50257}), gpt2_tokenizer())
    script.export(resolve_model(tmp_path / "run"), tmp_path / "out", "mit")
    ours = gpt2_tokenizer()
    odd = [text for text in HARD_CASES if "<|endoftext|>" not in text]  # which that library takes for the token
    assert len(odd) > 15
    alone = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "out" / "tokenizer.json"))
    for theirs in (AutoTokenizer.from_pretrained(tmp_path / "out"), alone):
        for text in [*odd, "".join(map(chr, range(0x250)))]:
            ids = theirs(text)["input_ids"]
            assert ids == ours.encode(text), text
            assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
        assert theirs("a<|endoftext|>b")["input_ids"] == [64, 50256, 65]
        assert len(theirs) == 50257


def test_characters_are_exported_too(tmp_path: Path) -> None:
    make_run(tmp_path / "run", GPTConfig(**MODERN, activation="swiglu"))
    script.export(resolve_model(tmp_path / "run"), tmp_path / "out", "mit")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = CHARS.chars[::-1]
    assert theirs(text)["input_ids"] == CHARS.encode(text)


def test_foreign_tokens_get_no_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", GPTConfig(**TINY), gpt2_tokenizer())  # shards without a manifest, 70 ids
    checkpoint = resolve_model(tmp_path / "run")
    assert not {"vocab.json", "merges.txt", "tokenizer_config.json"} & {path.name for path in checkpoint.iterdir()}
    run_script(monkeypatch, tmp_path / "run", tmp_path / "out")
    assert not any(
        "token" in path.name or path.name in ("vocab.json", "merges.txt") for path in (tmp_path / "out").iterdir()
    )
    assert "no tokenizer is written" in capsys.readouterr().out
    assert "The tokenizer is not known" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] is None


def test_a_checkpoint_of_an_earlier_version_may_name_gpt2s_tokenizer_wrongly(tmp_path: Path) -> None:
    checkpoint = make_run(tmp_path / "run", GPTConfig(**TINY), CHARS)
    config = json.loads((checkpoint / "config.json").read_text())
    from gpt2.tokens.tokenizer import tokenizer_to_dict

    config["repro_gpt2"]["tokenizer"] = tokenizer_to_dict(gpt2_tokenizer())
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert script.tokenizer_of(checkpoint, GPTConfig(**TINY)) is None


def test_best_is_the_checkpoint_of_the_lowest_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    for step, loss in ((10, 3.0), (20, 2.5), (30, 2.75), (40, None)):
        make_run(run, GPTConfig(**TINY), step=step, val_loss=loss)
    assert resolve_model(f"{run}@best").name == "step_00000020"
    assert resolve_model(run).name == "step_00000040"
    run_script(monkeypatch, f"{run}@best", tmp_path / "out")
    assert "trained for 20 steps" in (tmp_path / "out" / "README.md").read_text()
    for odd in (tmp_path / "none", run / "checkpoints"):
        with pytest.raises(UserError, match="is not a run that holds a checkpoint with a validation loss"):
            resolve_model(f"{odd}@best")
    (tmp_path / "odd@best").mkdir()  # a directory of that name is that directory
    with pytest.raises(UserError, match="is not a model"):
        resolve_model(tmp_path / "odd@best")


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_run(tmp_path / "run", GPTConfig(**TINY))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    GPT(GPTConfig(**TINY)).save_pretrained(tmp_path / "plain")
    refused: list[tuple[list[object], str]] = [
        ([tmp_path / "run", taken], "is not an empty folder"),
        ([tmp_path / "nowhere", tmp_path / "out"], "nowhere is not there"),
        ([tmp_path / "plain", tmp_path / "out"], "is not a run of train_gpt2.py, nor one of its checkpoints"),
        ([tmp_path / "run", tmp_path / "out", "--push", "name"], "--push name is no name on the Hugging Face Hub"),
        ([tmp_path / "run", tmp_path / "out", "--license", "My own"], "--license My own is no licence's identifier"),
    ]
    for words, message in refused:
        with pytest.raises(UserError, match=re.escape(message)):
            run_script(monkeypatch, *words)
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="bytes"):
        run_script(monkeypatch, tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pushing_offline_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    make_run(tmp_path / "run", GPTConfig(**TINY))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        run_script(monkeypatch, tmp_path / "run", tmp_path / "out", "--push", "me/mine")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("me/mine could not be pushed to the Hugging Face Hub (OfflineModeIsEnabled: ")
    assert message.endswith(f"push it later with `hf upload me/mine {tmp_path / 'out'}`")
    assert (tmp_path / "out" / "model.safetensors").is_file()


class Hub(BaseHTTPRequestHandler):
    """The Hub's calls that an upload makes; what was asked and committed stays in the server."""

    server: Any

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b"".join(self.chunks())
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        base = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            self.answer({"url": f"{base}/me/mine", "name": "me/mine"})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.answer({"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif self.path.endswith("/commit/main"):
            oid = "0" * 40
            self.answer({"success": True, "commitOid": oid, "commitUrl": f"{base}/me/mine/commit/{oid}"})
        else:  # the check of the card's front matter
            self.answer({"errors": [], "warnings": []})

    def chunks(self) -> Any:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()

    def answer(self, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_pushing_uploads_the_folder_into_a_private_repository(tmp_path: Path) -> None:
    make_run(tmp_path / "run", GPTConfig(**TINY))
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    words = [ROOT / "scripts" / "export.py", tmp_path / "run", tmp_path / "out", "--push", "me/mine"]
    environment = {**os.environ, **hub, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HF_HOME": str(tmp_path)}
    try:
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=240)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"pushed to {hub['HF_ENDPOINT']}/me/mine" in done.stdout
    assert "hf_secret" not in done.stdout + done.stderr
    asked = {path: (token, body) for path, token, body in server.asked}
    token, body = asked["/api/repos/create"]
    created = json.loads(body)
    assert token == "Bearer hf_secret"
    assert created.get("private") is True or created.get("visibility") == "private"
    committed = [json.loads(line) for line in asked["/api/models/me/mine/commit/main"][1].splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in committed if line["key"] == "file"
    }
    assert sent == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("name", ["gpt2", "llama", "code: windows"])
def test_lora_by_peft(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/export.md has it: the adapter alone learns, and merging it gives the adapted model's logits."""
    peft = pytest.importorskip("peft", reason="peft is optional")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    checkpoint = make_run(tmp_path / "run", GPTConfig(**EXPORTED[name][1]))
    script.export(checkpoint, tmp_path / "out", "mit")
    target = ["q_proj", "v_proj"] if name == "llama" else ["c_attn"]
    lora = peft.LoraConfig(r=4, target_modules=target, fan_in_fan_out=name != "llama", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(open_folder(tmp_path / "out"), lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    tokens, losses = torch.arange(64).view(2, 32), []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert sum(p.numel() for p in trained) < 0.1 * GPT.from_pretrained(checkpoint).num_parameters()
    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=tokens).logits
        model.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(open_folder(tmp_path / "out"), tmp_path / "adapter").merge_and_unload()
        torch.testing.assert_close(again(input_ids=tokens).logits, adapted, atol=1e-4, rtol=1e-4)
