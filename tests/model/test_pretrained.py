"""gpt2/model/pretrained.py against `transformers` itself, both ways."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")

from gpt2.config import GPTConfig  # noqa: E402
from gpt2.errors import UserError  # noqa: E402
from gpt2.model.gpt import GPT, load_pretrained  # noqa: E402
from gpt2.model.hf_format import (  # noqa: E402
    not_in_transformers,
)
from gpt2.model.pretrained import resolve_model, save_pretrained  # noqa: E402
from gpt2.tokens.tokenizer import CharTokenizer, gpt2_tokenizer  # noqa: E402

# The four sizes' proportions (layers : heads, head width 64 shrunk to 8), an eighth as deep and wide.
SHAPES = {"gpt2": (2, 2), "gpt2-medium": (3, 2), "gpt2-large": (4, 3), "gpt2-xl": (6, 5)}
TINY: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 70}
EXPRESSIBLE: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "erf gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "relu2": {"activation": "relu2"},
    "untied": {"tie_embeddings": False},
    "no bias": {"bias": False},
    "dropout": {"dropout": 0.1},
    "epsilon": {"norm_eps": 0.2},
    "own init": {"init_embedding_std": 0.3, "init_fan_in_variance": 1.0},
    "zero init": {"zero_init_projections": True},
    "wide window": {"window": 16},
    "all heads": {"n_kv_head": 4},
    "all layers full": {"window": 3, "full_attention_every": 1},
}
INEXPRESSIBLE: dict[str, dict[str, Any]] = {
    "rope": {"position": "rope", "rope_theta": 500.0},
    "no position": {"position": "none"},
    "grouped": {"n_kv_head": 2},
    "window": {"window": 4, "full_attention_every": 2},
    "swiglu": {"activation": "swiglu"},
    "rmsnorm": {"norm": "rmsnorm"},
    "post": {"norm_position": "post"},
    "textbook": {"norm_position": "post", "final_norm": True},
    "qk_norm": {"qk_norm": True},
    "softcap": {"logit_softcap": 5.0, "activation": "gelu", "bias": False},
    "algebraic": {"logit_softcap": 5.0, "logit_softcap_form": "algebraic"},
    "embedding norm": {"embedding_norm": True},
    "head bias": {"tie_embeddings": False, "head_bias": True},
    "scale": {"attention_scale": 0.3},
    "half a rope": {"position": "rope", "rope_fraction": 0.5, "rope_clockwise": True},
    "padding": {"tie_embeddings": False, "softmax_over_padding": True},
    "bf16 table": {"tie_embeddings": False, "bf16_embedding": True},
    "own epsilon": {"norm": "rmsnorm", "norm_eps": None},
}
CHARS = CharTokenizer("".join(map(chr, range(48, 118))))  # 70 of them


def build(seed: int = 0, **changes: Any) -> GPT:
    model = GPT(GPTConfig(**{**TINY, **changes})).init_weights(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        model.zero_padding_rows()
    return model


def saved(path: Path, model: GPT, tokenizer: Any = CHARS) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_pretrained(path, model.state_dict(), model.config, tokenizer)
    return path


def theirs(path: Path, seed: int = 0, **changes: Any) -> Any:
    """A random GPT-2 of `transformers`, saved by it."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        **{"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 16, "vocab_size": 70, **changes},
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return model


def tokens_of(length: int = 16, vocab_size: int = 70) -> Tensor:
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


def equal_states(a: GPT, b: GPT) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("shape", SHAPES)
def test_import_gives_their_logits_and_export_their_file(shape: str, tmp_path: Path) -> None:
    n_layer, n_head = SHAPES[shape]
    hf = theirs(tmp_path / "hf", n_layer=n_layer, n_head=n_head, n_embd=8 * n_head, vocab_size=97)
    model = GPT.from_pretrained(str(tmp_path / "hf"))
    tokens = tokens_of(vocab_size=97)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf(tokens).logits, atol=1e-5, rtol=1e-5)
    assert not model.training
    assert model.lm_head.weight is model.wte.weight
    again = load_file(saved(tmp_path / "ours", model, None) / "model.safetensors")
    original = load_file(tmp_path / "hf" / "model.safetensors")
    assert again.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(again[name], tensor), name
    equal_states(GPT.from_pretrained(tmp_path / "ours"), model)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_export_opens_in_transformers_with_our_logits(name: str, tmp_path: Path) -> None:
    model = build(**EXPRESSIBLE[name])
    assert not not_in_transformers(model.config)
    saved(tmp_path, model)
    tokens = tokens_of()
    for cls in (transformers.GPT2LMHeadModel, transformers.AutoModelForCausalLM):
        hf, report = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert hf.dtype == torch.float32
        assert hf.config.tie_word_embeddings == model.config.tie_embeddings
        with torch.no_grad():
            torch.testing.assert_close(hf.eval()(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)
    back, tokenizer = load_pretrained(tmp_path)
    assert back.config == model.config
    assert tokenizer.n_vocab == 70
    equal_states(back, model)
    hf.save_pretrained(tmp_path / "again")  # transformers keeps what it does not know
    assert GPT.from_pretrained(tmp_path / "again").config == model.config


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_variants_are_refused_by_transformers_and_opened_here(name: str, tmp_path: Path) -> None:
    model = build(**INEXPRESSIBLE[name])
    saved(tmp_path, model)
    with pytest.raises(KeyError, match="not GPT-2 but a variant"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="repro_gpt2"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    back = GPT.from_pretrained(tmp_path)
    assert back.config == model.config
    equal_states(back, model)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "gelu_pytorch_tanh", "gelu_fast", "relu2"])
def test_import_honours_the_activation(activation: str, tmp_path: Path) -> None:
    hf = theirs(tmp_path, activation_function=activation)
    with torch.no_grad():
        tokens = tokens_of()
        torch.testing.assert_close(GPT.from_pretrained(tmp_path)(tokens), hf(tokens).logits, atol=1e-5, rtol=1e-5)


def test_tied_weights_are_stored_once_and_untied_ones_twice(tmp_path: Path) -> None:
    tied = load_file(saved(tmp_path / "tied", build()) / "model.safetensors")
    assert "lm_head.weight" not in tied
    assert tied["transformer.wte.weight"].shape == (70, 32)  # no padding on disk
    untied = load_file(saved(tmp_path / "untied", build(tie_embeddings=False)) / "model.safetensors")
    assert untied["lm_head.weight"].shape == (70, 32)
    assert sum(t.numel() for t in tied.values()) == build().num_parameters()


def test_shards_and_pickles_without_code_open_too(tmp_path: Path) -> None:
    hf = theirs(tmp_path / "one")
    hf.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    expected = GPT.from_pretrained(tmp_path / "one")
    equal_states(GPT.from_pretrained(tmp_path / "many"), expected)

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((tmp_path / "one/config.json").read_text())
    state = hf.transformer.state_dict()  # as OpenAI's old files: no prefix, no head, and the masks
    state["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril().bool()
    state["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, pickled / "pytorch_model.bin")
    equal_states(GPT.from_pretrained(pickled), expected)

    halves = list(state.items())
    (pickled / "pytorch_model.bin").unlink()
    weight_map = {}
    for i, part in enumerate((halves[:9], halves[9:])):
        torch.save(dict(part), pickled / f"pytorch_model-{i}.bin")
        weight_map.update({name: f"pytorch_model-{i}.bin" for name, _ in part})
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    equal_states(GPT.from_pretrained(pickled), expected)


class Boom:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("boom",)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    theirs(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    torch.save({"wte.weight": Boom()}, tmp_path / "model/pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read"):
        GPT.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    hf = theirs(tmp_path).to(dtype)
    hf.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.wte.weight[:70], hf.transformer.wte.weight.float())


# Tokenizers


TEXTS = ["Hello world", "  two  spaces\n\nand lines ", "naïve café 你好 👍🏽", "I'm 3.14, you're <|endoftext|>?", ""]


def test_their_tokenizer_opens_our_directory_and_agrees(tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer()
    saved(tmp_path, build(vocab_size=50257, n_embd=8, n_head=1), tokenizer)
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert hf.is_fast
    assert len(hf) == 50257
    assert hf.eos_token_id == hf.bos_token_id == 50256
    assert hf.model_max_length == 16
    for text in TEXTS:
        if "<|" not in text:  # special there, ordinary text here
            assert hf.encode(text) == tokenizer.encode(text), text
            assert hf.decode(hf.encode(text)) == text
    for name in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        assert getattr(transformers, name).from_pretrained(tmp_path).encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])
    _, ours = load_pretrained(tmp_path)
    assert ours.name == "gpt2"
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == 50256


def test_character_vocabularies_travel_with_the_model(tmp_path: Path) -> None:
    characters = CharTokenizer("\n !abcdé你👍")
    saved(tmp_path, build(vocab_size=characters.n_vocab), characters)
    _, tokenizer = load_pretrained(tmp_path)
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "a bad\ncab é!你👍 "
    assert tokenizer.encode(text) == characters.encode(text) == hf.encode(text)
    assert hf.decode(hf.encode(text)) == tokenizer.decode(tokenizer.encode(text)) == text
    assert transformers.AutoConfig.from_pretrained(tmp_path).eos_token_id is None


def test_a_model_of_unknown_vocabulary_needs_no_tokenizer_but_gets_no_wrong_one(tmp_path: Path) -> None:
    theirs(tmp_path)
    assert GPT.from_pretrained(tmp_path).config.vocab_size == 70
    with pytest.raises(UserError, match="70 tokens, its tokenizer 50257"):
        load_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(UserError, match="not GPT-2's vocabulary"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("files", ["vocab.json", "tokenizer.json"])
def test_gpt2s_own_tokenizer_files_are_recognised(files: str, tmp_path: Path) -> None:
    saved(tmp_path / "ours", build(vocab_size=50257, n_embd=8, n_head=1), gpt2_tokenizer())
    directory = tmp_path / "theirs"
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(directory)
    if files == "vocab.json":
        (directory / "tokenizer.json").unlink()
        (directory / "vocab.json").write_bytes((tmp_path / "ours/vocab.json").read_bytes())
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").save_pretrained(directory)
    raw = json.loads((directory / "config.json").read_text())
    del raw["repro_gpt2"]
    (directory / "config.json").write_text(json.dumps(raw))
    assert load_pretrained(directory)[1].name == "gpt2"


# Finding models


def test_a_run_means_its_newest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    newest = saved(run / "checkpoints/step_000020", build(1))
    older = saved(run / "checkpoints/step_000010", build(2))
    (run / "config.json").write_text('{"preset": "gpt2"}')
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        resolve_model(run)
    (run / "checkpoints/latest").write_text("step_000020\n")
    assert resolve_model(str(run)) == resolve_model(run / "checkpoints") == newest
    assert resolve_model(older) == older
    (run / "checkpoints/latest").write_text("step_000030")
    with pytest.raises(UserError, match="names step_000030, which is not there"):
        resolve_model(run)


def test_a_name_is_asked_from_the_hub_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()  # this library's own folder is no model
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    import huggingface_hub

    asked: list[str] = []

    def refuse(repository: str, **_: Any) -> str:
        asked.append(repository)
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for name, repository in (("gpt2", "openai-community/gpt2"), ("someone/model", "someone/model")):
        with pytest.raises(UserError, match="Hub did not give") as raised:
            GPT.from_pretrained(name)
        assert "\n" not in str(raised.value)
        assert asked[-1] == repository


def test_a_model_on_the_hub_opens_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the download replaced by a directory: pickles are only asked for where there are no safetensors."""
    import huggingface_hub

    hf = theirs(tmp_path / "hub")
    patterns: list[list[str]] = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        patterns.append(allow_patterns)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(GPT.from_pretrained("gpt2-xl").wte.weight[:70], hf.transformer.wte.weight)
    assert len(patterns) == 1
    assert not any("bin" in pattern for pattern in patterns[0])
    (tmp_path / "hub/model.safetensors").unlink()
    torch.save(hf.state_dict(), tmp_path / "hub/pytorch_model.bin")
    assert torch.equal(GPT.from_pretrained("gpt2").wte.weight[:70], hf.transformer.wte.weight)
    assert any("bin" in pattern for pattern in patterns[2])


# Bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "type 'llama'"),
        ({"model_type": None}, "type None"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"activation_function": "silu"}, "activation_function to 'silu'"),
        ({"n_inner": 100}, "n_inner"),
        ({"n_head": 5}, "n_embd 32 is not divisible by n_head 5"),
        ({"n_layer": "two"}, r"config\.json: n_layer is 'two'; it must be a valid integer"),
        ({"n_layer": 10**9}, r"config\.json: n_layer is 1000000000; it must be at least 1 and at most 2,000"),
        ({"n_layer": 1999}, r"config\.json: n_layer is 1999; the weights beside it are \d+ tensors"),
        ({"n_embd": 200_000}, r"has shape .*; config\.json asks for"),
        ({"n_embd": 2**62}, r"/config\.json: n_embd is 4611686018427387904; it must be at least 1 and at most 262,144"),
        ({"vocab_size": 10**9}, r"wte\.weight has shape .*; config\.json asks for"),
        ({"n_positions": -1}, r"config\.json: n_positions is -1"),
        ({"embd_pdrop": "0"}, r"config\.json: embd_pdrop is '0'; it must be a valid number"),
        ({"resid_pdrop": 2, "embd_pdrop": 2, "attn_pdrop": 2}, "dropout is 2"),
        ({"layer_norm_epsilon": None}, r"config\.json: layer_norm_epsilon is None"),
        ({"tie_word_embeddings": "yes"}, r"config\.json: tie_word_embeddings is 'yes'"),
        ({"repro_gpt2": []}, r"config\.json"),
        ({"repro_gpt2": {"window": "all"}}, "window is 'all'"),
        ({"n_layer": 3}, "missing: h.2.attn.c_attn.bias"),
        ({"n_layer": 1}, "not part of this model: h.1.attn.c_attn.bias"),
        ({"vocab_size": 71}, re.escape("wte.weight has shape (70, 32); config.json asks for (71, 32)")),
        ({"n_positions": 17}, re.escape("wpe.weight has shape (16, 32); config.json asks for (17, 32)")),
        ({"tie_word_embeddings": False}, "missing: lm_head.weight"),
        ({"repro_gpt2": {"n_kv_head": 2}}, r"c_attn.weight has shape \(32, 96\); config.json asks for \(32, 64\)"),
        ({"repro_gpt2": {"bias": False}}, "no biases, yet h.0.attn.c_attn.bias is not zero"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    theirs(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}.*{words}"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "gone", "config", "index"])
def test_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    theirs(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "text":
        weights.write_text("version https://git-lfs.github.com/spec/v1")  # a pointer that was never fetched
    elif damage == "gone":
        weights.unlink()
    elif damage == "config":
        (tmp_path / "config.json").write_text("{")
    else:
        weights.rename(tmp_path / "elsewhere.safetensors")
        index = {"weight_map": {"transformer.wte.weight": "../elsewhere.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        GPT.from_pretrained(tmp_path)


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model at"):
        resolve_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a model"):
        resolve_model(tmp_path)


def test_unequal_dropouts_are_reported(tmp_path: Path) -> None:
    theirs(tmp_path, resid_pdrop=0.3, attn_pdrop=0.0)
    with pytest.warns(UserWarning, match="dropout is"):
        assert GPT.from_pretrained(tmp_path).config.dropout == 0.3


def test_files_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        saved(tmp_path / name, build())
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    save_file({"x": torch.zeros(1)}, tmp_path / "a/model.safetensors")
    saved(tmp_path / "a", build())  # an old file is replaced
    assert load_file(tmp_path / "a/model.safetensors").keys() == load_file(tmp_path / "b/model.safetensors").keys()


def test_beside_a_damaged_checkpoint_an_earlier_one_is_named(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        theirs(tmp_path / f"step_{step:08d}")
    (tmp_path / "step_00000010/model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"step_00000010/model.* give an earlier checkpoint, such as .*step_00000002$"):
        GPT.from_pretrained(tmp_path / "step_00000010")
