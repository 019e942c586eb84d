"""SemVIE against independent truths: Qwen2 and Qwen3 in transformers, and a plain loop over tokens."""

import copy

import pytest
import torch
from accelerate.utils import send_to_device
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from mars_hf import MarsConfig, MarsForConditionalGeneration, MarsModel
from mars_hf.image_processing_mars import decode_codes, encode_pixels
from mars_hf.modeling_mars import ModalityRouter, is_visual_parameter

FAMILIES = [("qwen2", True), ("qwen2", False), ("qwen3", False)]


def mixed_ids(model, batch=2, text=5, codes=6, after=3, seed=0):
    """Rows of text, `<img>`, codes, `</img>`, text."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    words = torch.randint(3, config.text_vocab_size, (batch, text + after), generator=rng)
    picture = torch.randint(0, config.codebook_size, (batch, codes), generator=rng) + config.image_token_offset
    start, end = (torch.full((batch, 1), i) for i in (config.image_start_token_id, config.image_end_token_id))
    return torch.cat([words[:, :text], start, picture, end, words[:, text:]], dim=1)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_text_logits_equal_the_language_model_bit_for_bit_before_and_after_training(make_text_model, family, tied):
    source = make_text_model(family, tied)
    model = MarsForConditionalGeneration.from_text_and_vq(source, codebook_size=40, downsample_factor=4)
    ids = torch.randint(0, source.config.vocab_size, (3, 11))

    def same() -> bool:
        model.eval()
        mine = model(ids).logits[..., : source.config.vocab_size]
        return torch.equal(mine, source(ids).logits)

    assert same()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    batch = mixed_ids(model)
    model.train()
    for _ in range(3):
        model(batch, labels=batch).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if is_visual_parameter(name)}
    assert same()


@pytest.mark.parametrize("expert_impl", ["gather", "where"])
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_equal_experts_compute_the_dense_model(make_text_model, family, tied, expert_impl):
    source = make_text_model(family, tied).double()
    model = MarsForConditionalGeneration.from_text_and_vq(
        source, codebook_size=40, downsample_factor=4, expert_impl=expert_impl
    )
    ids = mixed_ids(model)
    embeds = model.model.embed(ids, ids >= model.config.image_token_offset, None)
    dense = source.model(inputs_embeds=embeds).last_hidden_state
    assert (model.model(ids).last_hidden_state - dense).abs().max() < 1e-9


def semvie_by_a_plain_loop(model, ids):
    """The paper's equations, token by token and head by head, in the model's own weights. Returns the logits."""
    config, trunk = model.config, model.model
    text = config.text_config
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    offset = config.image_token_offset

    def norm(module, x):
        return module.weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + text.rms_norm_eps)

    def rope(x, position):
        half = dim // 2
        angle = position / text.rope_parameters["rope_theta"] ** (torch.arange(half) / half)
        cos, sin = angle.cos().double(), angle.sin().double()  # the library works these out in float32
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def expert(module, name, token):
        return (
            getattr(module, f"visual_{name}", None)
            if token >= offset and hasattr(module, f"visual_{name}")
            else getattr(module, name)
        )

    states = [
        trunk.visual_embed_tokens.weight[i - offset] if i >= offset else trunk.embed_tokens.weight[i] for i in ids
    ]
    for layer in trunk.layers:
        attention = layer.self_attn
        queries, keys, values = [], [], []
        for position, (token, state) in enumerate(zip(ids, states, strict=True)):
            x = norm(layer.input_layernorm, state)
            q = expert(attention, "q_proj", token)(x).view(heads, dim)
            k = expert(attention, "k_proj", token)(x).view(kv_heads, dim)
            if text.model_type == "qwen3":
                q, k = norm(attention.q_norm, q), norm(attention.k_norm, k)
            queries.append(rope(q, position)), keys.append(rope(k, position))
            values.append(expert(attention, "v_proj", token)(x).view(kv_heads, dim))
        for position, (token, state) in enumerate(zip(ids, states, strict=True)):
            heads_out = []
            for head in range(heads):
                kv = head * kv_heads // heads
                scores = torch.stack([queries[position][head] @ keys[past][kv] for past in range(position + 1)])
                weights = torch.softmax(scores / dim**0.5, dim=0)
                heads_out.append(sum(w * values[past][kv] for past, w in enumerate(weights)))
            state = state + expert(attention, "o_proj", token)(torch.cat(heads_out))
            x = norm(layer.post_attention_layernorm, state)
            mlp = expert(layer, "mlp", token)
            states[position] = state + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    hidden = torch.stack([norm(trunk.norm, state) for state in states])
    used = config.num_visual_tokens - config.num_padding_tokens
    return torch.cat([hidden @ model.text_head.weight.t(), hidden @ model.vision_head.weight[:used].t()], dim=-1)


@pytest.fixture
def norms_in_float64(monkeypatch):
    """The library rounds norms to float32 in any dtype; lift that, so that float64 means float64."""

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    monkeypatch.setattr(Qwen2RMSNorm, "forward", forward)


@pytest.mark.usefixtures("norms_in_float64")
@pytest.mark.parametrize("expert_output_projection", [False, True])
@pytest.mark.parametrize("expert_impl", ["gather", "where"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_perturbed_experts_compute_semvie(make_model, family, expert_impl, expert_output_projection):
    model = make_model(family, expert_impl=expert_impl, expert_output_projection=expert_output_projection).double()
    ids = mixed_ids(model)
    logits = model(ids).logits
    used = model.config.vocab_size - model.config.num_padding_tokens
    assert torch.isneginf(logits[..., used:]).all()
    for row, expected in zip(logits, [semvie_by_a_plain_loop(model, row.tolist()) for row in ids], strict=True):
        assert (row[:, :used] - expected).abs().max() < 1e-9


def test_gather_and_where_agree_in_value_and_gradient(make_model):
    gather = make_model(expert_impl="gather").double()
    where = copy.deepcopy(gather)
    where.config.expert_impl = "where"
    ids = mixed_ids(gather)
    losses = [model(ids, labels=ids).loss for model in (gather, where)]
    assert abs(losses[0] - losses[1]) < 1e-12
    for loss in losses:
        loss.backward()
    for (name, a), (_, b) in zip(gather.named_parameters(), where.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or (a.grad - b.grad).abs().max() < 1e-12, name


def test_a_promised_modality_changes_nothing(make_model):
    model = make_model().double()
    text, image = mixed_ids(model)[:, :5], mixed_ids(model)[:, 5:12]
    for ids, modality in ((text, "text"), (image, "image")):
        assert (model(ids).logits - model(ids, modality=modality).logits).nan_to_num().abs().max() < 1e-12


def test_an_expert_without_tokens_gets_a_zero_gradient(make_model):
    model = make_model()
    ids = mixed_ids(model)[:, :5]
    model(ids, labels=ids).loss.backward()
    gradient = model.model.layers[0].visual_mlp.up_proj.weight.grad
    assert gradient is not None and not gradient.any()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_equals_uncached_under_left_padding(make_model, attention):
    model = make_model(attn_implementation=attention).double()
    ids = mixed_ids(model, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    full = model(ids, attention_mask=mask, position_ids=positions).logits
    cache = DynamicCache(config=model.config)
    steps = [
        model(
            ids[:, a:b],
            attention_mask=mask[:, :b],
            position_ids=positions[:, a:b],
            past_key_values=cache,
            use_cache=True,
        ).logits
        for a, b in [(0, 7), *((i, i + 1) for i in range(7, ids.shape[1]))]
    ]
    difference = (torch.cat(steps, dim=1) - full).nan_to_num()[mask.bool()]
    # Eager attention rounds its softmax to float32 even in float64.
    assert difference.abs().max() < (1e-5 if attention == "eager" else 1e-10)


def test_sdpa_equals_eager(make_model):
    eager, ids = make_model(attn_implementation="eager"), None
    sdpa = make_model(attn_implementation="sdpa")
    sdpa.load_state_dict(eager.state_dict())
    ids = mixed_ids(eager)
    assert (eager(ids).logits - sdpa(ids).logits).nan_to_num().abs().max() < 1e-5


def test_attention_with_a_mask_takes_what_a_kernel_gives_in_another_memory_order(make_model, monkeypatch):
    model = make_model(attn_implementation="sdpa").double()
    config, ids = model.config.text_config, torch.randint(3, 90, (2, 5))
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    options = {"attention_mask": torch.tensor([[1] * 5, [0] * 2 + [1] * 3]), "generation_mode": "image"}
    drawn = model.generate(ids, do_sample=False, **options)
    attend = F.scaled_dot_product_attention

    def positions_outside(*args, **kwargs):  # as the memory-efficient kernel of GPUs
        return attend(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", positions_outside)
    assert torch.equal(model.generate(ids, do_sample=False, **options), drawn)


def test_gradient_checkpointing_changes_no_gradient(make_model):
    model = make_model().train()
    ids = mixed_ids(model)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.activation_checkpointing_enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all((plain[name] - checkpointed[name]).abs().max() < 1e-6 for name in plain)


def test_logits_to_keep_gives_the_last_logits(make_model):
    model = make_model()
    ids = mixed_ids(model)
    assert torch.allclose(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:], atol=1e-6)


def test_loss_divides_by_the_number_of_items_that_the_trainer_counts(make_model):
    model = make_model().double()
    ids = mixed_ids(model)
    labels = ids.masked_fill(ids < model.config.image_token_offset, -100)
    logits = model(ids).logits
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    count = (labels[:, 1:] != -100).sum()
    assert abs(model(ids, labels=labels).loss - total / count) < 1e-6
    assert abs(model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss - total / 100) < 1e-6


def test_embeddings_with_a_visual_mask_equal_ids(make_model):
    model = make_model().double()
    ids = mixed_ids(model)
    mask = ids >= model.config.image_token_offset
    embeds = model.model.embed(ids, mask, None)
    assert torch.equal(model(inputs_embeds=embeds, visual_mask=mask).logits, model(ids).logits)


def test_a_visual_mask_of_the_wrong_shape_is_refused(make_model):
    model = make_model()
    ids = mixed_ids(model)
    with pytest.raises(ValueError, match="one entry per token"):
        model(ids, visual_mask=torch.zeros(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("tied", [True, False])
def test_saved_equals_loaded_and_stays_frozen(make_model, tmp_path, tied):
    model = make_model(tied=tied)
    model.save_pretrained(tmp_path)
    loaded, info = MarsForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = mixed_ids(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, _ in loaded.named_parameters() if is_visual_parameter(n)
    }
    assert (loaded.text_head.weight is loaded.model.embed_tokens.weight) == tied


def test_a_trunk_loads_from_a_full_checkpoint(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    ids = mixed_ids(model)
    trunk = MarsModel.from_pretrained(tmp_path)
    assert torch.equal(trunk(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_a_checkpoint_that_does_not_fit_is_refused(make_model, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    make_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.visual_mlp.up_proj.weight"
    if damage == "missing":
        del state[name]
    elif damage == "extra":
        state["model.layers.9.visual_mlp.up_proj.weight"] = torch.zeros(2)
    else:
        state[name] = state[name][:-1].clone()
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="visual_mlp.up_proj"):
        MarsForConditionalGeneration.from_pretrained(tmp_path)


def test_a_checkpoint_in_a_subfolder_has_its_own_generation_config(make_model, tmp_path):
    for folder, scale in ((tmp_path, 2.0), (tmp_path / "checkpoint-9", 5.0)):
        model = make_model()
        model.generation_config.image_defaults = {"guidance_scale": scale}
        model.save_pretrained(folder)
    loaded = MarsForConditionalGeneration.from_pretrained(tmp_path, subfolder="checkpoint-9")
    assert loaded.generation_config.image_defaults == {"guidance_scale": 5.0}
    assert MarsForConditionalGeneration.from_pretrained(tmp_path).generation_config.image_defaults != {}
    (tmp_path / "checkpoint-9" / "generation_config.json").unlink()
    MarsForConditionalGeneration.from_pretrained(tmp_path, subfolder="checkpoint-9")


def test_without_experts_the_shared_weights_train(make_model):
    model = make_model(use_visual_expert=False)
    assert not any("visual_mlp" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="use_visual_expert"):
        model.freeze_text()
    ids = mixed_ids(model)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()


def test_new_visual_rows_start_where_the_paper_says(make_text_model):
    source = make_text_model("qwen2", False)
    model = MarsForConditionalGeneration.from_text_and_vq(source, codebook_size=40, downsample_factor=4)
    table, text = model.model.visual_embed_tokens.weight, source.model.embed_tokens.weight
    null = model.config.null_token_id - model.config.image_token_offset
    assert torch.allclose(table[0], text.mean(0)) and torch.equal(table[null], text[source.config.eos_token_id])
    assert model.vision_head.weight.std(0).min() > 0


def test_resizing_the_vocabulary_is_refused(make_model):
    with pytest.raises(ValueError, match="fixed ids"):
        make_model().resize_token_embeddings(500)


def test_pictures_take_the_places_kept_for_them(make_model):
    model = make_model()
    config = model.config
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = torch.stack(model.encode_image(pixels)).flatten(1)
    places = torch.full_like(codes, config.image_pad_token_id)
    words = torch.full((2, 3), 5)
    kept, true = torch.cat([words, places], 1), torch.cat([words, codes + config.image_token_offset], 1)
    assert torch.equal(model(kept, pixel_values=pixels).logits, model(true).logits)
    with pytest.raises(ValueError, match=r"\[16, 16\] codes.*\[16, 15\] places"):
        model(kept.flatten()[:-1][None], pixel_values=pixels)
    with pytest.raises(ValueError, match=r"\[16, 16\] codes.*\[16\] places"):
        model(kept[:1], pixel_values=pixels)


@pytest.mark.parametrize("move", [lambda model: model.bfloat16(), lambda model: model.to(torch.float16)])
def test_the_vqgan_stays_in_float32(make_model, move):
    model, pixels = make_model(), torch.rand(2, 3, 16, 16) * 2 - 1
    before = model.encode_image(pixels)
    moved = move(copy.deepcopy(model))
    assert {p.dtype for p in moved.vqgan.parameters()} == {torch.float32}
    assert moved.model.embed_tokens.weight.dtype != torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        after = moved.encode_image(pixels)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_vqgan_that_looks_codes_up_itself_decodes_the_same(make_model):
    model = make_model()
    codes = model.encode_image(torch.rand(1, 3, 16, 16) * 2 - 1)
    ids = [model.config.image_start_token_id, *(codes[0].flatten() + model.config.image_token_offset).tolist()]
    row = torch.tensor([[*ids, model.config.image_end_token_id]])
    before = model.decode_image_tokens(row)
    model.vqgan.register_to_config(lookup_from_codebook=True)
    assert torch.equal(model.decode_image_tokens(row)[0], before[0])


def test_end_tokens_come_from_the_language_models_generation_config(make_text_model):
    source = make_text_model()
    source.generation_config.eos_token_id = [1, 7]
    model = MarsForConditionalGeneration.from_text_and_vq(source, codebook_size=40, downsample_factor=4)
    null = model.config.null_token_id - model.config.image_token_offset
    assert model.generation_config.eos_token_id == [1, 7]
    assert torch.equal(model.model.visual_embed_tokens.weight[null], source.model.embed_tokens.weight[7])


def test_a_text_model_without_a_head_is_refused(make_text_model):
    with pytest.raises(ValueError, match="causal language model, got Qwen2Model"):
        MarsForConditionalGeneration.from_text_and_vq(make_text_model().model)


def test_codes_become_pixels_again(make_model):
    model = make_model()
    pixels = [torch.rand(3, 16, 24) * 2 - 1, torch.rand(3, 16, 16) * 2 - 1, torch.rand(3, 16, 24) * 2 - 1]
    codes = model.encode_image(pixels)
    assert [tuple(c.shape) for c in codes] == [(4, 6), (4, 4), (4, 6)]
    alone = [model.encode_image([picture])[0] for picture in pixels]
    assert all(torch.equal(a, b) for a, b in zip(codes, alone, strict=True))
    config, end = model.config, model.config.image_end_token_id
    rows = [[config.image_start_token_id, *(c.flatten() + config.image_token_offset).tolist(), end] for c in codes]
    rows[1] += [0] * (len(rows[0]) - len(rows[1]))
    decoded = model.decode_image_tokens(torch.tensor(rows), [[list(p.shape[1:])] for p in pixels])
    assert [tuple(d.shape) for d in decoded] == [tuple(p.shape) for p in pixels]


def test_a_model_without_vqgan_says_so(make_model):
    model = make_model(vq=False)
    with pytest.raises(ValueError, match="no VQ-GAN"):
        model.encode_image(torch.zeros(1, 3, 16, 16))


def test_bare_configuration_and_config_only_model_agree_on_sizes(make_model):
    config = make_model().config
    again = MarsForConditionalGeneration(MarsConfig(**config.to_dict()))
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in make_model().named_parameters()
    }


@pytest.mark.parametrize("impl", ["gather", "where"])
def test_the_router_follows_layers_to_another_device(impl):
    router = ModalityRouter(torch.tensor([[False, True, True]]), None, impl)
    other = router.to("meta", non_blocking=True)
    assert other.visual_mask.device.type == "meta" and router.visual_mask.device.type == "cpu"
    assert impl == "where" or (other.order.device.type == other.inverse.device.type == "meta")
    assert router.to("meta") is other and router.to("cpu") is router
    states = send_to_device({"router": router}, "meta")["router"].split(torch.empty(1, 3, 4, device="meta"))
    assert [part.device.type for part in states] == ["meta", "meta"]


def test_the_last_module_of_a_model_is_a_head(tiny_model):
    from transformers.quantizers.base import get_keys_to_not_convert

    assert "vision_head" in get_keys_to_not_convert(tiny_model)


def test_pictures_are_encoded_and_decoded_without_a_graph(make_vqgan):
    vqgan = make_vqgan().requires_grad_(True)
    (codes,) = encode_pixels(vqgan, torch.zeros(1, 3, 16, 16))
    (pixels,) = decode_codes(vqgan, [codes])
    assert not pixels.requires_grad


def test_a_vqgan_that_was_offloaded_is_told_with_the_way_out(make_vqgan):
    away = make_vqgan().to("meta")
    for call in (
        lambda: encode_pixels(away, torch.zeros(1, 3, 16, 16)),
        lambda: decode_codes(away, [torch.zeros(4, 4)]),
    ):
        with pytest.raises(ValueError, match="was offloaded.*`device_map`"):
            call()
