"""
What transformers' own generation tests ask of a model, whose mixin is not in the distribution: text mode against the
language model with the same weights, image mode against plain loops of forwards, compiled and exported against eager.
"""

from itertools import accumulate

import pytest
import torch
from transformers import CompileConfig, DynamicCache, QuantizedCache, StaticCache

from mars_hf import MarsForConditionalGeneration

QUANTISED = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}  # needs no further package
# The last one's second layer looks back over four tokens only.
FAMILIES = {
    "qwen2, tied": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3"},
    "sliding window": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}
TEXT_OPTIONS = {
    "greedy without a cache": {"use_cache": False},
    "greedy in a static cache": {"cache_implementation": "static"},
    "greedy in a quantised cache": QUANTISED,
    "greedy with the prompt in pieces": {"prefill_chunk_size": 2},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "rows that end at different times": {"eos_token_id": list(range(30)), "pad_token_id": 5},
    "samples": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "several samples of each row": {"do_sample": True, "num_return_sequences": 3},
    "samples in a static cache": {"do_sample": True, "num_return_sequences": 2, "cache_implementation": "static"},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
    "beams that end": {"num_beams": 3, "eos_token_id": list(range(30)), "pad_token_id": 5},
    "beams in a static cache": {"num_beams": 3, "cache_implementation": "static"},
    "beams in a quantised cache": {"num_beams": 3, **QUANTISED},
    "sampled beams": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
}


def vary_experts(model):
    """Make the visual experts differ from the text experts, so that a wrong turn shows."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("visual_" in name or "vision_head" in name):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def pair(request, make_text_model):
    """A MARS and the language model that it was made of; neither ends a text by itself."""
    source = make_text_model(**request.param)
    source.generation_config.eos_token_id = None
    model = MarsForConditionalGeneration.from_text_and_vq(source, codebook_size=40, downsample_factor=4)
    model.generation_config.eos_token_id = None
    return vary_experts(model), source


@pytest.fixture
def model(make_model):
    """A MARS in float64 that does not end a text by itself."""
    model = make_model().double()
    model.generation_config.eos_token_id = None
    return model


def words(model, rows=2, length=7, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.get_text_config().vocab_size, (rows, length), generator=rng)


def picture_and_words(model, rows=2, seed=0):
    """Rows of words, `<img>`, 6 codes, `</img>`, words."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    codes = torch.randint(config.codebook_size, (rows, 6), generator=rng) + config.image_token_offset
    start, end = (torch.full((rows, 1), i) for i in (config.image_start_token_id, config.image_end_token_id))
    return torch.cat([words(model, rows, 3, seed), start, codes, end, words(model, rows, 2, seed + 1)], dim=1)


def write(model, *args, seed=1, **kwargs):
    torch.manual_seed(seed)
    return model.generate(*args, **{"max_new_tokens": 8, "do_sample": False, **kwargs})


def draw(model, ids, height=16, width=16, **kwargs):
    options = {"generation_mode": "image", "height": height, "width": width, "do_sample": False}
    return model.generate(ids, **{**options, **kwargs})


def greedy_text_loop(model, ids, count):
    """Write text without a cache: the definition."""
    for _ in range(count):
        scores = model(ids).logits[:, -1, : model.config.text_vocab_size]
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    return ids


def code_scores(model, logits):
    return logits[:, -1, model.config.image_token_offset :][:, : model.config.codebook_size]


# Text mode is the language model


@pytest.mark.parametrize("options", TEXT_OPTIONS.values(), ids=TEXT_OPTIONS.keys())
def test_text_mode_writes_what_the_language_model_writes(pair, options):
    ids, layers = words(pair[0]), pair[0].config.text_config.layer_types
    if options.get("cache_implementation") == "quantized" and "sliding_attention" in layers:
        with pytest.raises(ValueError, match="only full attention layers"):  # the library has none for windows
            write(pair[0], ids, **options)
        return
    mine, theirs = (write(one, ids, **options) for one in pair)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_padded_rows_get_what_the_language_model_gives_them(pair, side, cache):
    ids = words(pair[0], rows=3)
    mask = torch.ones_like(ids)
    for row, width in enumerate((0, 2, 4)):
        hidden = slice(0, width) if side == "left" else slice(ids.shape[1] - width, None)
        ids[row, hidden], mask[row, hidden] = 1, 0
    mine, theirs = (write(one, ids, attention_mask=mask, **cache) for one in pair)
    assert torch.equal(mine, theirs)


def test_left_padding_changes_no_word(model):
    ids = picture_and_words(model, rows=3)
    padded = torch.nn.functional.pad(ids, (4, 0), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    assert torch.equal(write(model, padded, attention_mask=mask)[:, 4:], write(model, ids))


def test_scores_logits_and_hidden_states_are_the_language_models(pair):
    wanted = ("scores", "logits", "hidden_states")
    options = {f"output_{name}": True for name in wanted}
    mine, theirs = (write(one, words(one), return_dict_in_generate=True, **options) for one in pair)
    for name in wanted:
        steps = zip(getattr(mine, name), getattr(theirs, name), strict=True)
        for a, b in steps:
            layers = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
            assert all(torch.equal(x, y) for x, y in layers), name


# Captions and other words after pictures


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_words_after_a_picture_equal_a_loop_without_a_cache(model, cache):
    ids = picture_and_words(model)
    assert torch.equal(write(model, ids, **cache), greedy_text_loop(model, ids, 8))


def test_penalties_after_a_picture_reach_its_words_and_spare_its_codes(model):
    ids, width = picture_and_words(model, rows=1), model.config.text_vocab_size
    row = ids[0].tolist()
    for _ in range(8):
        scores = model(torch.tensor([row])).logits[0, -1, :width]
        said = torch.tensor(sorted({token for token in row if token < width}))
        scores[said] = torch.where(scores[said] > 0, scores[said] / 1.5, scores[said] * 1.5)
        banned = [after for before, after in zip(row, row[1:], strict=False) if before == row[-1] and after < width]
        scores[banned] = -torch.inf
        row.append(int(scores.argmax()))
    options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    assert write(model, ids, **options)[0].tolist() == row
    looked_up = write(model, ids, prompt_lookup_num_tokens=3, **options)
    assert looked_up[0].tolist() == row


@pytest.mark.parametrize("with_picture", [False, True])
def test_writing_goes_on_from_a_cache(model, with_picture):
    ids = picture_and_words(model) if with_picture else words(model)
    first = write(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    second = write(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=3)
    more = torch.cat([second, picture_and_words(model, seed=5)], dim=1)  # another picture, in the same cache
    third = write(model, more, past_key_values=first.past_key_values, max_new_tokens=4)
    assert torch.equal(second, greedy_text_loop(model, ids, 7))
    assert torch.equal(third, greedy_text_loop(model, more, 4))


EMBEDDING_OPTIONS = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "quantised cache": QUANTISED,
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("options", EMBEDDING_OPTIONS.values(), ids=EMBEDDING_OPTIONS.keys())
def test_embeddings_with_their_visual_mask_are_continued_like_ids(model, options):
    ids = picture_and_words(model)
    mask = ids >= model.config.image_token_offset
    embeds = model.model.embed(ids, mask, None)
    written = write(model, inputs_embeds=embeds, visual_mask=mask, **options)
    assert torch.equal(written, write(model, ids, **options)[:, ids.shape[1] :])


def test_embeddings_of_a_picture_without_their_mask_are_read_as_text(model):
    ids = picture_and_words(model)
    mask = ids >= model.config.image_token_offset
    embeds = model.model.embed(ids, mask, None)
    options = {"output_logits": True, "return_dict_in_generate": True}
    marked = write(model, inputs_embeds=embeds, visual_mask=mask, **options)
    unmarked = write(model, inputs_embeds=embeds, **options)
    assert (marked.logits[0] - unmarked.logits[0]).abs().max() > 1e-3


# Drafts that are verified


def counting(model):
    """Count the forwards of a model."""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def lengths_of_forwards(model):
    """Note how many tokens each forward of a model reads."""
    lengths = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


@pytest.mark.parametrize("assistant", ["a language model", "itself", "a MARS"])
def test_an_assistant_changes_no_word(pair, make_text_model, assistant):
    model, source = pair
    other = make_text_model()
    helper = {
        "a language model": other,
        "itself": source,
        "a MARS": MarsForConditionalGeneration.from_text_and_vq(other, codebook_size=40, downsample_factor=4),
    }[assistant]
    ids, asked, calls = words(model, rows=1), counting(helper), counting(model)
    # A fixed number of drafts: the default also stops at a draft's doubts.
    helper.generation_config.assistant_confidence_threshold = 0.0
    assisted = write(model, ids, assistant_model=helper, max_new_tokens=12)
    assert torch.equal(assisted, write(source, ids, max_new_tokens=12))
    assert asked
    if assistant == "itself":
        assert len(calls) < 12  # every draft was accepted


def test_an_assistant_changes_no_word_after_a_picture(model, make_model):
    ids = picture_and_words(model, rows=1)
    assisted = write(model, ids, assistant_model=make_model().double())
    assert torch.equal(assisted, greedy_text_loop(model, ids, 8))


def test_looking_words_up_in_the_prompt_changes_none(pair):
    model, source = pair
    written = write(source, words(model, rows=1), max_new_tokens=12)  # what it is about to say stands in the prompt
    prompt, lengths = torch.cat([written, written[:, :7]], dim=1), lengths_of_forwards(model)
    looked_up = write(model, prompt, prompt_lookup_num_tokens=4, max_new_tokens=12)
    assert torch.equal(looked_up, write(source, prompt, max_new_tokens=12))
    assert lengths[0] == prompt.shape[1] + 4  # what followed the same words


def test_looking_words_up_in_a_prompt_with_a_picture_never_finds_its_codes(model):
    ids = picture_and_words(model, rows=1)
    prompt, lengths = torch.cat([ids, ids[:, 1:3]], dim=1), lengths_of_forwards(model)  # a picture followed these
    looked_up = write(model, prompt, prompt_lookup_num_tokens=5)
    assert lengths[0] == prompt.shape[1]
    assert torch.equal(looked_up, greedy_text_loop(model, prompt, 8))


# Pictures


def test_a_sampled_drawing_equals_a_loop_that_samples(model):
    ids, rng = words(model, rows=1), torch.Generator().manual_seed(3)
    drawn = draw(model, ids, do_sample=True, temperature=0.7, top_k=9, generator=torch.Generator().manual_seed(3))
    row = torch.cat([ids, torch.tensor([[model.config.image_start_token_id]])], dim=1)
    for _ in range(16):
        scores = code_scores(model, model(row).logits) / 0.7
        scores = scores.masked_fill(scores < scores.topk(9).values[:, -1:], -torch.inf)
        point = torch.rand(1, generator=rng, dtype=torch.float64).item()
        code = sum(chance <= point for chance in accumulate(scores.softmax(-1)[0].tolist()))
        row = torch.cat([row, torch.tensor([[code + model.config.image_token_offset]])], dim=1)
    assert torch.equal(drawn[:, :-1], row)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_right_padding_changes_no_picture(model, scale):
    ids, negative = words(model, rows=3), words(model, rows=3, length=4, seed=9)
    padded = torch.nn.functional.pad(ids, (0, 3), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    guidance = {"guidance_scale": scale, "negative_input_ids": negative}
    drawn, alone = draw(model, padded, attention_mask=mask, **guidance), draw(model, ids, **guidance)
    assert torch.equal(drawn[:, padded.shape[1] :], alone[:, ids.shape[1] :])


def test_a_drawing_in_a_quantised_cache_equals_a_loop_over_one(model):
    ids, offset = words(model), model.config.image_token_offset
    cache = QuantizedCache("fp8", config=model.config.text_config)
    model(ids, past_key_values=cache, use_cache=True)
    picture = torch.full((2, 1), model.config.image_start_token_id)
    for _ in range(16):
        logits = model(picture[:, -1:], past_key_values=cache, use_cache=True).logits
        picture = torch.cat([picture, code_scores(model, logits).argmax(-1, keepdim=True) + offset], dim=1)
    drawn = draw(model, ids, **QUANTISED)
    assert torch.equal(drawn[:, ids.shape[1] : -1], picture)
    assert not torch.equal(drawn, draw(model, ids)), "this cache should have rounded something"


# Compiled and exported


class CountingBackend:
    """A backend of `torch.compile` that runs what it is given and counts the graphs."""

    graphs = 0

    def __call__(self, graph, inputs, **options):
        type(self).graphs += 1
        return graph.forward


@pytest.fixture
def backend():
    torch._dynamo.reset()
    CountingBackend.graphs = 0
    yield CountingBackend()
    torch._dynamo.reset()


def compiled_writing(backend):
    config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize("expert_impl", ["gather", "where"])
def test_writing_compiles_into_one_graph(make_model, backend, expert_impl):
    model = make_model(expert_impl=expert_impl)
    ids = picture_and_words(model)
    assert torch.equal(write(model, ids, **compiled_writing(backend)), write(model, ids))
    assert 1 <= CountingBackend.graphs <= 2


def test_drawing_compiles_into_one_graph(make_model, backend):
    model = make_model(expert_impl="where")
    ids, negative = picture_and_words(model), words(model, length=4)
    guidance = {"guidance_scale": 3.0, "negative_input_ids": negative, "cache_implementation": "static"}
    drawn = draw(model, ids, **guidance)
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    assert torch.equal(draw(model, ids, **guidance), drawn)
    assert CountingBackend.graphs


def test_a_forward_over_both_modalities_compiles_into_one_graph(make_model, backend):
    model = make_model(expert_impl="where").double()
    ids = picture_and_words(model)
    cache = StaticCache(config=model.config.text_config, max_cache_len=ids.shape[1] + 1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    logits = compiled(ids, past_key_values=cache, use_cache=True).logits
    assert CountingBackend.graphs == 1
    assert (logits - model(ids).logits).nan_to_num().abs().max() < 1e-12


@pytest.mark.integration
def test_compiled_code_writes_and_draws_the_same(make_model):
    torch._dynamo.reset()
    model = make_model(expert_impl="where")
    ids = picture_and_words(model)
    written, drawn = write(model, ids), draw(model, ids, cache_implementation="static")
    assert torch.equal(write(model, ids, **compiled_writing("inductor")), written)
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert torch.equal(draw(model, ids, cache_implementation="static"), drawn)
    torch._dynamo.reset()


def test_an_exported_program_reads_rows_of_any_number_and_length(make_model):
    model = make_model(expert_impl="where").double()
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = {"input_ids": picture_and_words(model), "attention_mask": torch.ones(2, 13, dtype=torch.long)}
    program = torch.export.export(
        model,
        (),
        {**example, "use_cache": False},
        dynamic_shapes={"input_ids": free, "attention_mask": free, "use_cache": None},
        strict=False,
    )
    ids = torch.cat([picture_and_words(model, rows=3, seed=4), words(model, rows=3)], dim=1)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    logits = program.module()(input_ids=ids, attention_mask=mask, use_cache=False).logits
    expected = model(ids, attention_mask=mask).logits
    assert (logits - expected).nan_to_num()[mask.bool()].abs().max() < 1e-12


def test_a_cache_of_ones_own_is_filled(model):
    ids, cache = words(model), DynamicCache(config=model.config)
    write(model, ids, past_key_values=cache)
    assert cache.get_seq_length() == ids.shape[1] + 7
