"""Decoding: the grammar, guidance and batches against loops without a cache; refusals before any work."""

import math

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, MaxTimeCriteria


@pytest.fixture
def model(make_model):
    return make_model().double()


def prompt(model, length=5, rows=1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.text_vocab_size, (rows, length), generator=rng)


def null_prompt(model, rows=1):
    return torch.tensor([[model.config.null_token_id, 7, 8]]).expand(rows, -1)


def draw(model, ids, height=16, width=16, **kwargs):
    kwargs = {"do_sample": False, **kwargs}
    return model.generate(ids, generation_mode="image", height=height, width=width, **kwargs)


def codes_of(model, sequences, image_sizes=None):
    return [picture.flatten().tolist() for row in model.collect_image_codes(sequences, image_sizes) for picture in row]


def greedy_loop(model, ids, num_codes, negative=None, scale=1.0):
    """Draw without cache, batch or padding: the definition."""
    offset, codes = model.config.image_token_offset, []
    start = [model.config.image_start_token_id]
    for _ in range(num_codes):
        tail = torch.tensor([start + codes])
        scores = model(torch.cat([ids, tail], 1)).logits[0, -1]
        if negative is not None:
            unconditional = model(torch.cat([negative, tail], 1)).logits[0, -1]
            scores = unconditional + scale * (scores - unconditional)
        codes.append(int(scores[offset : offset + model.config.codebook_size].argmax()) + offset)
    return [code - offset for code in codes]


def test_a_drawing_is_prompt_start_codes_end(model):
    ids = prompt(model)
    row = draw(model, ids)[0]
    config = model.config
    assert row[:5].tolist() == ids[0].tolist()
    assert row[5] == config.image_start_token_id and row[-1] == config.image_end_token_id
    assert len(row) == 5 + 1 + 16 + 1
    codes = row[6:-1] - config.image_token_offset
    assert (codes >= 0).all() and (codes < config.codebook_size).all()


def test_greedy_drawing_equals_a_loop_without_cache(model):
    ids = prompt(model)
    assert codes_of(model, draw(model, ids)) == [greedy_loop(model, ids, 16)]


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_guidance_equals_a_loop_without_cache(model, scale):
    ids, negative = prompt(model), null_prompt(model)
    drawn = draw(model, ids, guidance_scale=scale, negative_input_ids=negative)
    assert codes_of(model, drawn) == [greedy_loop(model, ids, 16, negative, scale)]


@pytest.mark.parametrize(
    ("schedule", "interval", "weight"),
    [
        ("linear", (0, 1), lambda p: p),
        ("cosine", (0, 1), lambda p: (1 - math.cos(math.pi * p)) / 2),
        ("constant", (0.25, 0.5), lambda p: float(0.25 <= p <= 0.5)),
    ],
)
def test_guidance_follows_its_schedule(model, schedule, interval, weight):
    ids, negative, offset = prompt(model), null_prompt(model), model.config.image_token_offset
    options = {"guidance_schedule": schedule, "guidance_interval": interval, "guidance_scale": 4.0}
    drawn = codes_of(model, draw(model, ids, negative_input_ids=negative, **options))[0]
    tail = [model.config.image_start_token_id]
    for place, code in enumerate(drawn):
        with_prompt, without = (
            model(torch.cat([row, torch.tensor([tail])], 1)).logits[0, -1] for row in (ids, negative)
        )
        scores = without + (1 + 3.0 * weight(place / 16)) * (with_prompt - without)
        assert code == int(scores[offset : offset + model.config.codebook_size].argmax())
        tail.append(code + offset)


def test_guidance_of_one_is_no_guidance(model):
    ids = prompt(model)
    guided = draw(model, ids, guidance_scale=1.0, negative_input_ids=null_prompt(model))
    assert torch.equal(guided, draw(model, ids))


def test_guidance_changes_the_picture(model):
    ids = prompt(model)
    assert codes_of(model, draw(model, ids)) != codes_of(
        model, draw(model, ids, guidance_scale=5.0, negative_input_ids=null_prompt(model))
    )


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_batch_of_different_prompts_draws_what_each_draws_alone(model, scale):
    prompts = [prompt(model, length, seed=length) for length in (3, 7, 5)]
    negatives = [null_prompt(model), prompt(model, 9, seed=9), null_prompt(model)]

    def padded(rows):
        width = max(row.shape[1] for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(rows):
            ids[line, width - row.shape[1] :], mask[line, width - row.shape[1] :] = row[0], 1
        return ids, mask

    ids, mask = padded(prompts)
    negative_ids, negative_mask = padded(negatives)
    together = draw(
        model,
        ids,
        attention_mask=mask,
        guidance_scale=scale,
        negative_input_ids=negative_ids,
        negative_attention_mask=negative_mask,
    )
    alone = [
        draw(model, one, guidance_scale=scale, negative_input_ids=negative)
        for one, negative in zip(prompts, negatives, strict=True)
    ]
    assert codes_of(model, together) == [codes_of(model, row)[0] for row in alone]


def test_rows_of_different_sizes_draw_what_each_draws_alone(model):
    ids = prompt(model, rows=2)
    sizes = torch.tensor([[[16, 16]], [[8, 24]]])
    together = model.generate(ids, generation_mode="image", image_sizes=sizes, do_sample=False)
    alone = [draw(model, ids[:1]), draw(model, ids[1:], 8, 24)]
    assert codes_of(model, together, sizes) == [
        codes_of(model, row, [[size]])[0] for row, size in zip(alone, [[16, 16], [8, 24]], strict=True)
    ]
    assert (together[1] == model.generation_config.pad_token_id).sum() == 4


@pytest.mark.parametrize("seed", range(3))
def test_exactly_as_many_codes_as_cells_whatever_the_sampler_does(model, seed):
    sampler = {"do_sample": True, "temperature": 5.0, "top_k": 3 + seed, "top_p": 0.9}
    row = draw(model, prompt(model), 8, 24, generator=torch.Generator().manual_seed(seed), **sampler)
    picture = model.collect_image_codes(row, [[[8, 24]]])[0][0]
    assert tuple(picture.shape) == (2, 6)


def test_same_seed_same_picture_other_seed_other_picture(model):
    def sampled(seed):
        return draw(model, prompt(model), do_sample=True, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sampled(1), sampled(1)) and not torch.equal(sampled(1), sampled(2))


def test_several_pictures_of_guided_prompts_of_several_sizes_are_those_of_each_alone(model):
    ids, negative = prompt(model, rows=2), torch.cat([null_prompt(model), prompt(model, 3, seed=5)])
    sizes = torch.tensor([[[16, 16]], [[8, 24]]])
    options = {"generation_mode": "image", "guidance_scale": 3.0, "do_sample": True, "top_k": 1}
    drawn = model.generate(ids, image_sizes=sizes, negative_input_ids=negative, num_return_sequences=2, **options)
    alone = [greedy_loop(model, ids[i : i + 1], n, negative[i : i + 1], 3.0) for i, n in ((0, 16), (1, 12))]
    assert codes_of(model, drawn, sizes) == [alone[0], alone[0], alone[1], alone[1]]


def test_several_pictures_of_a_prompt_stand_together(model):
    ids = prompt(model, rows=2)
    drawn = draw(
        model,
        ids,
        do_sample=True,
        num_return_sequences=3,
        guidance_scale=2.0,
        negative_input_ids=null_prompt(model, 2),
    )
    assert drawn.shape[0] == 6
    assert torch.equal(drawn[:3, :5], ids[:1].expand(3, -1)) and torch.equal(drawn[3:, :5], ids[1:].expand(3, -1))


class Forbid(LogitsProcessor):
    """Refuses one id; looks at the whole vocabulary and at what was drawn so far."""

    def __init__(self, token):
        self.token, self.lengths = token, []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores.index_fill(-1, torch.tensor([self.token]), -torch.inf)


def test_a_users_processor_sees_the_whole_vocabulary(model):
    ids = prompt(model)
    favourite = codes_of(model, draw(model, ids))[0][0]
    forbid = Forbid(favourite + model.config.image_token_offset)
    assert favourite not in codes_of(model, draw(model, ids, logits_processor=[forbid]))[0]
    assert forbid.lengths == list(range(6, 22))


def test_scores_are_those_of_the_whole_vocabulary(model):
    out = draw(model, prompt(model), return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 16 and out.scores[0].shape == (1, model.config.vocab_size)
    first = out.sequences[0, 6]
    assert out.scores[0].argmax() == first


@pytest.mark.parametrize("normalize_logits", [False, True])
def test_transition_scores_are_those_of_the_codes_that_were_chosen(model, normalize_logits):
    sizes = torch.tensor([[[16, 16]], [[8, 16]]])
    keep = {"return_dict_in_generate": True, "output_scores": True, "image_sizes": sizes}
    out = draw(model, prompt(model, rows=2), height=None, width=None, **keep)
    found = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=normalize_logits)
    best = torch.stack(out.scores, 1)
    best = (best.log_softmax(-1) if normalize_logits else best).max(-1).values
    assert torch.equal(found[0], best[0]) and torch.equal(found[1, :8], best[1, :8])
    assert (found[1, 8:] == 0).all()  # the smaller picture is complete
    text = model.generate(prompt(model), max_new_tokens=3, do_sample=False, **{**keep, "image_sizes": None})
    assert model.compute_transition_scores(text.sequences, text.scores).shape == (1, 3)


def test_a_streamer_hears_every_token(model):
    class Listener:
        heard, ended = [], False

        def put(self, value):
            self.heard.append(value)

        def end(self):
            self.ended = True

    listener = Listener()
    ids, sizes = prompt(model, rows=2), torch.tensor([[[16, 16]], [[8, 24]]])
    drawn = model.generate(ids, generation_mode="image", image_sizes=sizes, do_sample=False, streamer=listener)
    heard = torch.cat([value.reshape(2, -1) for value in listener.heard], dim=1)
    assert torch.equal(heard, drawn) and listener.ended


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_static_cache_draws_what_a_growing_one_draws(model, guidance_scale):
    options = {"guidance_scale": guidance_scale, "negative_input_ids": prompt(model, 9, seed=3)}
    drawn = draw(model, prompt(model), **options)
    assert torch.equal(drawn, draw(model, prompt(model), cache_implementation="static", **options))


def test_a_generation_config_of_the_users_own_is_followed(model):
    config = GenerationConfig(do_sample=False, guidance_scale=3.0, generation_mode="image")
    ids, negative = prompt(model), null_prompt(model)
    drawn = model.generate(ids, config, height=16, width=16, negative_input_ids=negative)
    assert codes_of(model, drawn) == [greedy_loop(model, ids, 16, negative, 3.0)]


def test_a_checkpoints_image_defaults_hold_in_image_mode_only_and_only_until_told_otherwise(model, tmp_path):
    model.generation_config.image_defaults = {"guidance_scale": 4.0, "do_sample": True, "top_k": 1}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    ids, negative = prompt(model), null_prompt(model)
    options = {"generation_mode": "image", "height": 16, "width": 16, "negative_input_ids": negative}
    by_default = loaded.generate(ids, **options)  # sampling the one best code is greedy
    assert torch.equal(by_default, draw(model, ids, guidance_scale=4.0, negative_input_ids=negative))
    told = loaded.generate(ids, **options, guidance_scale=1.0)
    assert torch.equal(told, draw(model, ids, guidance_scale=1.0))
    texts = [m.generate(ids, max_new_tokens=5) for m in (loaded, loaded)]
    assert torch.equal(*texts)


def test_a_checkpoints_guidance_is_of_pictures_and_leaves_text_alone(model):
    ids, negative = prompt(model), null_prompt(model)
    written = model.generate(ids, max_new_tokens=5, do_sample=False)
    guided = draw(model, ids, guidance_scale=3.0, negative_input_ids=negative)
    model.generation_config.guidance_scale = 3.0
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), written)
    assert torch.equal(draw(model, ids, negative_input_ids=negative), guided)
    with pytest.raises(ValueError, match="`guidance_scale` belongs to"):
        model.generate(ids, GenerationConfig(max_new_tokens=5, guidance_scale=2.0))


def test_default_size_is_the_configurations(model):
    drawn = model.generate(prompt(model), generation_mode="image", do_sample=False)
    side = model.config.default_image_size // model.config.downsample_factor
    assert len(codes_of(model, drawn)[0]) == side**2


def test_text_mode_equals_the_language_model(make_text_model, make_model):
    from mars_hf import MarsForConditionalGeneration

    source = make_text_model("qwen2", True)
    model = MarsForConditionalGeneration.from_text_and_vq(source, codebook_size=40, downsample_factor=4)
    ids = torch.randint(3, 90, (2, 6))
    for options in ({}, {"num_beams": 3}):
        mine, theirs = (m.generate(ids, max_new_tokens=12, do_sample=False, **options) for m in (model, source))
        assert torch.equal(mine, theirs)


def test_text_mode_never_gives_a_visual_id(model):
    model.vision_head.weight.data *= 100
    written = model.generate(prompt(model), max_new_tokens=20, do_sample=True)
    assert (written < model.config.image_token_offset).all()


def test_a_caption_of_pixels_equals_a_caption_of_codes(model):
    config, pixels = model.config, torch.rand(1, 3, 16, 16, dtype=torch.float32) * 2 - 1
    codes = model.encode_image(pixels)[0].flatten() + config.image_token_offset
    start, end = [config.image_start_token_id], [config.image_end_token_id]
    kept = torch.tensor([start + [config.image_pad_token_id] * 16 + end])
    true = torch.tensor([start + codes.tolist() + end])
    options = {"generation_mode": "text", "max_new_tokens": 6, "do_sample": False}
    seen = model.generate(kept, pixel_values=pixels, image_sizes=torch.tensor([[[16, 16]]]), **options)
    assert torch.equal(seen, model.generate(true, **options))
    assert torch.equal(seen[:, :18], true), "sequences hold true codes"
    uncached = model.generate(true, use_cache=False, **options)
    assert torch.equal(seen, uncached)


def test_the_second_picture_of_a_row_takes_the_second_size(model):
    config = model.config
    first = [
        config.image_start_token_id,
        *range(config.image_token_offset, config.image_token_offset + 4),
        config.image_end_token_id,
    ]
    ids = torch.cat([prompt(model), torch.tensor([first]), prompt(model)], dim=1)
    drawn = model.generate(ids, generation_mode="image", image_sizes=[[[8, 8], [8, 24]]], do_sample=False)
    assert [tuple(p.shape) for p in model.collect_image_codes(drawn, [[[8, 8], [8, 24]]])[0]] == [(2, 2), (2, 6)]


def test_pictures_come_back_as_pixels_for_every_sequence(make_model):
    model = make_model()
    drawn = draw(model, prompt(model), 8, 16, do_sample=True, num_return_sequences=2)
    pixels = model.decode_image_tokens(drawn, torch.tensor([[[8, 16]]]))
    assert [tuple(p.shape) for p in pixels] == [(3, 8, 16)] * 2
    with pytest.raises(ValueError, match="8 codes.*16x16"):
        model.decode_image_tokens(drawn, torch.tensor([[[16, 16]]]))
    with pytest.raises(ValueError, match="a square"):
        model.decode_image_tokens(drawn)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"height": 18, "width": 16}, "`height` must be a multiple of 4, got 18: use 16 or 20"),
        ({"height": 0, "width": 16}, "`height` must be a positive whole number of pixels, got 0"),
        ({"height": 16, "width": -16}, "`width` must be a positive whole number of pixels, got -16"),
        ({"height": 16.5, "width": 16}, "`height` must be a positive whole number of pixels, got 16.5"),
        ({"image_sizes": [[[18, 16], [16, 16]]], "height": None, "width": None}, "multiple of 4, got 18"),
        ({"image_sizes": [[[0, 0]]], "height": None, "width": None}, "got 0"),
        ({"guidance_scale": 2.0, "negative_input_ids": torch.tensor([[3], [4]])}, "got 2 for 1"),
        ({"guidance_scale": 2.0, "negative_input_ids": torch.tensor([[3000]])}, "got 3000"),
        ({"stopping_criteria": [MaxTimeCriteria(1.0)]}, "`stopping_criteria` is not possible"),
        ({"output_attentions": True}, "`output_attentions` is not possible"),
        ({"past_key_values": DynamicCache()}, "`past_key_values` is not possible"),  # empty, and asked for
        ({"visual_mask": torch.zeros(1, 4, dtype=torch.bool)}, "`visual_mask` is not possible"),
        ({"position_ids": torch.zeros(1, 4, dtype=torch.long)}, "`position_ids` is not possible"),
        ({"prompt_lookup_num_tokens": 3}, "assisted"),
        ({"height": 16, "width": None}, "together"),
        ({"height": 16, "width": 16, "image_sizes": [[[8, 8]]]}, "contradict"),
        ({"image_sizes": [[[8, 8]], [[8, 8]]], "height": None, "width": None}, "shape .1, pictures, 2"),
        ({"height": 400, "width": 400}, "10002.*context of 128"),
        ({"guidance_scale": -1.0}, "0 or more, got -1"),
        ({"guidance_schedule": "steep"}, "constant, linear, cosine, got 'steep'"),
        ({"guidance_interval": (0.5, 0.2)}, "two shares.*0.5, 0.2"),
        ({"guidance_scale": 3.0}, "negative_input_ids"),
        ({"num_beams": 2}, "beams"),
        ({"use_cache": False}, "cache"),
        ({"max_new_tokens": 5}, "needs 18 new tokens, but only 5"),
        ({"generation_mode": "video"}, "text, image, interleaved, got 'video'"),
    ],
)
def test_impossible_requests_are_refused_before_any_forward(model, monkeypatch, kwargs, message):
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        model.generate(prompt(model), **{"generation_mode": "image", "height": 16, "width": 16, **kwargs})


@pytest.mark.parametrize("name", ["generator", "guidance_scale"])
def test_text_mode_refuses_what_belongs_to_pictures(model, name):
    value = {"generator": torch.Generator(), "guidance_scale": 3.0}[name]
    with pytest.raises(ValueError, match=f"`{name}` belongs to"):
        model.generate(prompt(model), max_new_tokens=3, **{name: value})


def test_places_without_pictures_are_refused(model):
    ids = prompt(model)
    ids[0, 1:3] = model.config.image_pad_token_id
    with pytest.raises(ValueError, match="leave 2 places"):
        model.generate(ids, max_new_tokens=3)


@pytest.mark.parametrize("bad", [-1, 10_000])
@pytest.mark.parametrize("mode", ["text", "image"])
def test_ids_out_of_range_are_refused(model, bad, mode):
    ids = prompt(model)
    ids[0, 2] = bad
    with pytest.raises(ValueError, match=f"got .*{bad}"):
        model.generate(ids, generation_mode=mode, max_new_tokens=20)


@pytest.mark.parametrize("slice_size", [1, 2, 16])
def test_pictures_decoded_in_slices_are_those_decoded_at_once(make_model, slice_size):
    model = make_model()
    model.vqgan.double()
    sizes = torch.tensor([[[8, 16]], [[8, 8]]])
    drawn = model.generate(
        prompt(model, rows=2), generation_mode="image", image_sizes=sizes, num_return_sequences=3, do_sample=True
    )
    calls = []
    model.vqgan.decoder.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    whole = model.decode_image_tokens(drawn, sizes, slice_size=None)
    assert calls == [3, 3]
    calls.clear()
    sliced = model.decode_image_tokens(drawn, sizes, slice_size=slice_size)
    assert max(calls) <= slice_size and sum(calls) == 6
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(sliced, whole, strict=True))
    with pytest.raises(ValueError, match="slice_size.*got 0"):
        model.decode_image_tokens(drawn, sizes, slice_size=0)


def test_a_list_of_generators_has_one_for_each_returned_row(model):
    ids = prompt(model, rows=2)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    drawn = draw(model, ids, do_sample=True, generator=generators, num_return_sequences=2)
    assert len({tuple(codes) for codes in codes_of(model, drawn)}) == 4
    for few in (generators[:1], generators[:3]):
        with pytest.raises(ValueError, match=f"one for each returned row, 4 here, got {len(few)}"):
            draw(model, ids, do_sample=True, generator=few, num_return_sequences=2)


def test_guidance_is_read_from_a_generation_config_as_from_arguments(model):
    ids, negative = prompt(model), null_prompt(model)
    told = {"guidance_schedule": "linear", "guidance_interval": (0.2, 0.9), "guidance_scale": 3.0}
    expected = draw(model, ids, negative_input_ids=negative, **told)
    by_config = draw(model, ids, negative_input_ids=negative, generation_config=GenerationConfig(**told))
    assert torch.equal(expected, by_config)
    plain = draw(model, ids, negative_input_ids=negative, guidance_scale=3.0)
    assert not torch.equal(expected, plain)
    with pytest.raises(ValueError, match="constant, linear, cosine, got 'steep'"):
        draw(model, ids, generation_config=GenerationConfig(guidance_schedule="steep"))


def test_a_plain_forward_gives_the_cache_that_the_next_one_takes(model):
    ids = prompt(model, 6)
    first = model(ids[:, :4])
    second = model(ids[:, 4:], past_key_values=first.past_key_values)
    assert torch.allclose(second.logits, model(ids).logits[:, 4:], equal_nan=True)
    assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize("fields", [{"codes_per_step": [4, 1]}, {"cell_embedding": True, "max_grid_size": 8}])
def test_pictures_of_blocks_or_cells_are_read_in_one_piece_or_not_at_all(make_model, fields):
    model = make_model(**fields)
    config = model.config
    codes = torch.arange(4) + config.image_token_offset
    starts = [config.image_start_token_id] * (4 if "codes_per_step" in fields else 1)
    ids = torch.tensor([[5, *starts, *codes.tolist(), config.image_end_token_id, 7]])
    call = {"image_sizes": torch.tensor([[[8, 8]]]), "max_new_tokens": 3, "do_sample": False}
    model.generate(ids, **call)
    cache = model(ids[:, :1]).past_key_values
    for name, value in (("cache_implementation", "static"), ("past_key_values", cache), ("prefill_chunk_size", 2)):
        with pytest.raises(ValueError, match=f"`{name}` is not possible where this model reads a picture"):
            model.generate(ids, **call, **{name: value})
    model.generate(ids[:, :1], max_new_tokens=3, cache_implementation="static")  # words alone


def test_a_paged_cache_is_refused_for_text(model):
    with pytest.raises(ValueError, match="would write codes among words"):
        model.generate(prompt(model), cache_implementation="paged", max_new_tokens=3)
    with pytest.raises(ValueError, match="would write codes among words"):
        model.generate_batch(prompt(model).tolist(), max_new_tokens=3)
