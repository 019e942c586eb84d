"""Language models in Qwen's shape: against transformers' classes, and Qwen v1 against its arithmetic, written out."""

import warnings

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
)

from mars_hf.conversion.text import (
    QKV,
    QWEN1_NAMES,
    ConversionWarning,
    convert_qwen1_state_dict,
    plan_text_model,
    read_text_model,
)

# Four heads of 8; epsilon and rotary base are not what either class has by default.
QWEN1 = {
    "model_type": "qwen",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": 16,
    "max_position_embeddings": 64,
    "layer_norm_epsilon": 1e-3,
    "rotary_emb_base": 1234,
    "no_bias": True,
    "rotary_pct": 1.0,
    "use_dynamic_ntk": False,
    "use_logn_attn": False,
    "tie_word_embeddings": False,
}


def random_qwen1(layers: int = 2, hidden: int = 32, vocab: int = 96) -> dict[str, torch.Tensor]:
    tensors = {"transformer.wte.weight": torch.randn(vocab, hidden), "lm_head.weight": torch.randn(vocab, hidden)}
    tensors["transformer.ln_f.weight"] = torch.rand(hidden) + 0.5
    for layer in (f"transformer.h.{number}" for number in range(layers)):
        tensors |= {f"{layer}.{norm}.weight": torch.rand(hidden) + 0.5 for norm in ("ln_1", "ln_2")}
        tensors[f"{layer}.attn.c_attn.weight"] = torch.randn(3 * hidden, hidden) / 4
        tensors[f"{layer}.attn.c_attn.bias"] = torch.randn(3 * hidden) / 4
        tensors[f"{layer}.attn.c_proj.weight"] = torch.randn(hidden, hidden) / 4
        tensors |= {f"{layer}.mlp.{name}.weight": torch.randn(48, hidden) / 4 for name in ("w1", "w2")}
        tensors[f"{layer}.mlp.c_proj.weight"] = torch.randn(hidden, 48) / 4
    return tensors


def qwen1_logits(tensors: dict[str, torch.Tensor], ids: torch.Tensor, heads: int = 4) -> torch.Tensor:
    """Qwen v1 within its training length, written out: fused projection, half rotation, w1 times the gate of w2."""

    def norm(states: torch.Tensor, name: str) -> torch.Tensor:
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-3) * tensors[name]

    def rotate(states: torch.Tensor) -> torch.Tensor:  # (batch, heads, seq, head_dim)
        dim = states.shape[-1]
        frequencies = 1.0 / (1234 ** (torch.arange(0, dim, 2).float() / dim))
        angles = torch.outer(torch.arange(states.shape[2]).float(), frequencies).repeat(1, 2)
        turned = torch.cat([-states[..., dim // 2 :], states[..., : dim // 2]], dim=-1)
        return states * angles.cos() + turned * angles.sin()

    states = tensors["transformer.wte.weight"][ids]
    for layer in ("transformer.h.0", "transformer.h.1"):
        normed = norm(states, f"{layer}.ln_1.weight")
        fused = F.linear(normed, tensors[f"{layer}.attn.c_attn.weight"], tensors[f"{layer}.attn.c_attn.bias"])
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in fused.split(states.shape[-1], dim=-1))
        attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        states = states + F.linear(attended.transpose(1, 2).flatten(2), tensors[f"{layer}.attn.c_proj.weight"])
        normed = norm(states, f"{layer}.ln_2.weight")
        gate = F.silu(F.linear(normed, tensors[f"{layer}.mlp.w2.weight"]))
        inner = F.linear(normed, tensors[f"{layer}.mlp.w1.weight"]) * gate
        states = states + F.linear(inner, tensors[f"{layer}.mlp.c_proj.weight"])
    return F.linear(norm(states, "transformer.ln_f.weight"), tensors["lm_head.weight"])


def converted_qwen1(tensors: dict[str, torch.Tensor], config: dict) -> Qwen2ForCausalLM:
    qwen2_config, state_dict = convert_qwen1_state_dict(tensors, config)
    model = Qwen2ForCausalLM(qwen2_config).to(next(iter(tensors.values())).dtype).eval()
    model.load_state_dict(state_dict, strict=True)
    return model


def target_logits(plan, ids: torch.Tensor) -> torch.Tensor:
    model = Qwen2ForCausalLM.from_pretrained(None, config=plan.config, state_dict=dict(plan), dtype=plan.dtype)
    return model.eval()(ids).logits


# Qwen v1


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 16, 40])
def test_qwen1_logits_equal_its_own_arithmetic_bit_for_bit(length: int) -> None:
    tensors, ids = random_qwen1(), torch.randint(96, (2, length))
    logits, expected = converted_qwen1(tensors, QWEN1)(ids).logits, qwen1_logits(tensors, ids)
    assert torch.equal(logits, expected), (logits - expected).abs().max()


@torch.no_grad()
def test_qwen1_feed_forward_branches_are_not_interchangeable() -> None:
    tensors, ids = random_qwen1(), torch.randint(96, (2, 12))
    swapped = {name.replace("w1", "w").replace("w2", "w1").replace("w.", "w2."): t for name, t in tensors.items()}
    difference = (converted_qwen1(swapped, QWEN1)(ids).logits - qwen1_logits(tensors, ids)).abs().max()
    assert difference > 0.1


def test_qwen1_names_and_the_fused_projection_can_be_read_backwards() -> None:
    tensors = random_qwen1()
    _, converted = convert_qwen1_state_dict(tensors, QWEN1)
    restored = {}
    for name, tensor in converted.items():
        projection = next((part for part in QKV if f".{part}." in name), None)
        original = QWEN1_NAMES.backward(name.replace(projection, "qkv_proj") if projection else name)
        restored.setdefault(original, []).append((QKV.index(projection) if projection else 0, tensor))
    assert restored.keys() == tensors.keys()
    for name, parts in restored.items():
        parts.sort(key=lambda part: part[0])
        assert torch.equal(torch.cat([tensor for _, tensor in parts]), tensors[name]), name
    for name in tensors:
        assert QWEN1_NAMES.backward(QWEN1_NAMES.forward(name)) == name


def test_qwen1_settings_of_the_first_revision_mean_the_same() -> None:
    renamed = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    renamed |= {"intermediate_size": "ffn_hidden_size", "vocab_size": "padded_vocab_size"}
    renamed |= {"max_position_embeddings": "n_positions"}
    old = {renamed.get(name, name): value for name, value in QWEN1.items()}
    old |= {"pos_emb": "rotary", "activation": "swiglu", "apply_residual_connection_post_layernorm": False}
    tensors = random_qwen1()
    config, expected = convert_qwen1_state_dict(tensors, old)[0], convert_qwen1_state_dict(tensors, QWEN1)[0]
    assert config.to_dict() == expected.to_dict()


def test_qwen1_beyond_its_training_length_warns_unless_the_arithmetic_stays_the_same() -> None:
    tensors = random_qwen1()
    with pytest.warns(ConversionWarning, match="training length of 16 tokens .dynamic NTK rotary base., and Qwen2"):
        config, _ = convert_qwen1_state_dict(tensors, {**QWEN1, "use_dynamic_ntk": True})
    assert config.max_position_embeddings == 16
    switches = ("use_dynamic_ntk", "use_logn_attn")
    unstated = {name: value for name, value in QWEN1.items() if name not in switches}
    with pytest.warns(ConversionWarning, match="dynamic NTK rotary base and log-n attention"):
        convert_qwen1_state_dict(tensors, unstated)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convert_qwen1_state_dict(tensors, QWEN1)[0].max_position_embeddings == 64


def test_qwen1_tensors_that_do_not_fit_are_all_named() -> None:
    tensors = random_qwen1()
    del tensors["transformer.h.1.mlp.w2.weight"], tensors["transformer.ln_f.weight"]
    tensors["transformer.visual.proj"] = torch.zeros(2)
    tensors["transformer.h.0.attn.c_attn.bias"] = torch.zeros(95)
    with pytest.raises(ValueError) as error:
        convert_qwen1_state_dict(tensors, QWEN1)
    message = str(error.value)
    assert "missing: transformer.h.1.mlp.w2.weight, transformer.ln_f.weight;" in message
    assert "unexpected: transformer.visual.proj;" in message
    assert "of the wrong shape: transformer.h.0.attn.c_attn.bias (95,) instead of (96,)." in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"no_bias": False}, "`no_bias` False"),
        ({"rotary_pct": 0.25}, "`rotary_pct` 0.25"),
        ({"kv_channels": 16}, "`kv_channels` 16"),
        ({"apply_residual_connection_post_layernorm": True}, "`apply_residual_connection_post_layernorm` True"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
    ],
)
def test_qwen1_settings_without_a_counterpart_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_qwen1_state_dict(random_qwen1(), QWEN1 | change)


def test_qwen1_settings_that_are_left_out_are_asked_for() -> None:
    config = {name: value for name, value in QWEN1.items() if name not in ("seq_length", "rotary_emb_base")}
    with pytest.raises(ValueError, match="must state seq_length, rotary_emb_base"):
        convert_qwen1_state_dict(random_qwen1(), config)


def test_qwen1_wrappers_and_known_buffers_are_taken_off() -> None:
    tensors = random_qwen1()
    buffers = {"transformer.rotary_emb.inv_freq": torch.zeros(4), "transformer.h.0.attn.masked_bias": torch.tensor(-1)}
    converted = convert_qwen1_state_dict({"state_dict": tensors | buffers}, QWEN1)[1]
    expected = convert_qwen1_state_dict(tensors, QWEN1)[1]
    assert converted.keys() == expected.keys()


# Llama


def make_llama(dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "rms_norm_eps": 1e-3}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "max_position_embeddings": 64, **changes})).to(dtype).eval()


SCALED_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
SCALED_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"rope_parameters": SCALED_ROPE}], ids=["plain", "tied", "rope"]
)
def test_llama_logits_stay_the_same_bit_for_bit(dtype: torch.dtype, changes: dict) -> None:
    llama, ids = make_llama(dtype, **changes), torch.randint(96, (2, 24))
    logits = target_logits(plan_text_model(llama.config.to_dict(), llama.state_dict()), ids)
    assert torch.equal(logits, llama(ids).logits)


@torch.no_grad()
def test_llama_logits_in_bfloat16_are_as_near_to_the_exact_ones_as_its_own() -> None:
    # A projection with a bias of zero goes through another kernel there, which rounds in another order.
    llama, ids = make_llama(torch.bfloat16), torch.randint(96, (8, 24))
    logits = target_logits(plan_text_model(llama.config.to_dict(), llama.state_dict()), ids).float()
    own = llama(ids).logits.float()
    exact = llama.float()(ids).logits
    assert (logits - exact).norm() < 1.1 * (own - exact).norm()


@pytest.mark.parametrize(
    "changes", [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 16}, {"rope_interleaved": True}], ids=str
)
def test_a_llama_that_qwen2_cannot_hold_is_refused(changes: dict) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"This Llama has `{name}`"):
        plan_text_model(make_llama().config.to_dict() | changes, make_llama().state_dict())


# Any


def test_tied_heads_may_be_stored_but_must_be_the_embedding(make_text_model) -> None:
    model = make_text_model(tied=True)
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "lm_head.weight" in state_dict
    assert "lm_head.weight" not in plan_text_model(model.config.to_dict(), state_dict)
    state_dict["lm_head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match="lm_head.weight and model.embed_tokens.weight differ"):
        plan_text_model(model.config.to_dict(), state_dict)


def test_tensors_of_several_dtypes_take_the_widest(make_text_model) -> None:
    model = make_text_model()
    state_dict = {n: t if "norm" in n else t.to(torch.bfloat16) for n, t in model.state_dict().items()}
    plan = plan_text_model(model.config.to_dict(), state_dict)
    assert plan.dtype == torch.float32 and {tensor.dtype for tensor in plan.values()} == {torch.float32}
    assert all(torch.equal(plan[name], state_dict[name].float()) for name in plan)


def test_quantised_weights_are_refused_by_their_names_and_dtypes(make_text_model) -> None:
    model = make_text_model()
    config, tensors = model.config.to_dict(), model.state_dict()
    packed = {"model.layers.0.mlp.up_proj.qweight": torch.zeros(2)}
    eighth = {"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.float8_e4m3fn)}
    for change in (packed, eighth):
        with pytest.raises(ValueError, match=f"quantised .tensor {next(iter(change))}"):
            plan_text_model(config, tensors | change)


def test_a_mixture_of_experts_is_refused_by_its_configuration_and_by_its_tensors(make_text_model) -> None:
    model = make_text_model()
    with pytest.raises(ValueError, match="mixture of experts .num_experts 60"):
        plan_text_model(Qwen2MoeConfig().to_dict(), {})
    expert = {"model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match="mixture of experts .tensor model.layers.0.mlp.experts"):
        plan_text_model(model.config.to_dict(), model.state_dict() | expert)


def test_another_family_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="of type 'mistral', but MARS takes dense Qwen"):
        plan_text_model({"model_type": "mistral"}, {})


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("form", ["safetensors", "pytorch"])
def test_a_sharded_folder_gives_the_tensors_of_its_model(tmp_path, make_text_model, family: str, form: str) -> None:
    model = make_text_model(family)
    model.save_pretrained(tmp_path, max_shard_size="15KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    if form == "pytorch":
        to_pytorch_shards(tmp_path)
    text = read_text_model(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert text.plan.keys() == expected.keys() and text.generation_config.eos_token_id == 1
    assert all(torch.equal(text.plan[name], expected[name]) for name in expected)


def to_pytorch_shards(folder) -> None:
    """Turn the safetensors of a folder into files of `torch.save`."""
    from safetensors.torch import load_file

    for shard in folder.glob("*.safetensors"):
        torch.save(load_file(shard), folder / f"{shard.stem.replace('model', 'pytorch_model')}.bin")
        shard.unlink()
    index = folder / "model.safetensors.index.json"
    content = index.read_text().replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
    (folder / "pytorch_model.bin.index.json").write_text(content)
    index.unlink()


def test_a_gguf_file_without_its_reader_says_what_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="packages that are missing here: gguf, accelerate"):
        read_text_model(tmp_path / "model.gguf")


def test_a_folder_without_a_configuration_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="has no config.json"):
        read_text_model(tmp_path)
