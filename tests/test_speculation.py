"""Speculative Jacobi decoding: the distribution is that of plain drawing, greedy codes are equal, forwards fewer."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import BaseStreamer

from mars_hf import ImageStreamer, MarsConfig, speculation_mars
from mars_hf.speculation_mars import SpeculativeDrawing, copied_places, weigh_drafts


@pytest.fixture
def model(make_model):
    return make_model().double()


def prompts(model, rows=1):
    rng = torch.Generator().manual_seed(7)
    return torch.randint(3, model.config.text_vocab_size, (rows, 4), generator=rng)


def draw(model, ids, height=16, width=16, **kwargs):
    sizes = {} if "image_sizes" in kwargs else {"height": height, "width": width}
    return model.generate(ids, generation_mode="image", **{**sizes, "do_sample": False, **kwargs})


def count_forwards(model, run):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    result = run()
    handle.remove()
    return result, len(calls)


# ---- keeping and replacing drafts


def test_drafts_are_weighed_as_worked_by_hand():
    proposals = torch.tensor([[[0.2, 0.7, 0.1], [0.0, 1.0, 0.0], [0.5, 0.25, 0.25]]])
    chances = torch.tensor([[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.5, 0.25, 0.25]]])
    keep, replacements = weigh_drafts(torch.tensor([[1, 1, 0]]), proposals, chances)
    # 0.3 / 0.7, of 0.3 + 0.1 that are lacking; 0.3 / 1, and all but code 1 is lacking; equal ones are kept.
    assert torch.allclose(keep, torch.tensor([[3 / 7, 0.3, 1.0]]))
    expected = [[[0.75, 0.0, 0.25], [6 / 7, 0.0, 1 / 7], [0.5, 0.25, 0.25]]]
    assert torch.allclose(replacements, torch.tensor(expected))
    assert weigh_drafts(torch.tensor([[0]]), proposals[:, :1], chances[:, :1])[0].item() == 1  # 0.5 / 0.2


@pytest.mark.parametrize("kind", ["any", "certain", "equal", "apart"])
def test_what_stands_in_a_slot_follows_its_distribution_whatever_the_proposal(kind):
    size = 6
    chances = torch.rand(4, 3, size, dtype=torch.double).softmax(-1)
    proposals = {
        "any": torch.rand(4, 3, size, dtype=torch.double).mul(4).softmax(-1),
        "certain": F.one_hot(torch.randint(size, (4, 3)), size).double(),
        "equal": chances.clone(),
        "apart": torch.tensor([0.5, 0.5, 0, 0, 0, 0], dtype=torch.double).expand(4, 3, size),
    }[kind]
    if kind == "apart":
        chances = torch.tensor([0, 0, 0.1, 0.2, 0.3, 0.4], dtype=torch.double).expand(4, 3, size)
    law = torch.zeros_like(chances)
    for code in range(size):
        keep, replacements = weigh_drafts(torch.full((4, 3), code), proposals, chances)
        kept = F.one_hot(torch.tensor(code), size) * keep[..., None]
        law += proposals[..., code, None] * (kept + (1 - keep[..., None]) * replacements).nan_to_num()
    assert (law - chances).abs().max() < 1e-12


def test_drafts_copy_the_code_above_and_in_the_first_row_the_one_before():
    assert copied_places(3, 2, "raster").tolist() == [0, 0, 0, 1, 2, 3]
    # Squares of 2 x 2: places 0 1 4 5 in the first row, 2 3 6 7 in the second, 8 9 12 13 in the third.
    assert copied_places(4, 4, "block2x2").tolist()[:10] == [0, 0, 0, 1, 1, 4, 4, 5, 2, 3]


def codes_by_table(config, window, table):
    """Draw 3 codes by a table that gives the distribution after the codes before."""
    drawing = SpeculativeDrawing(config, [(1, 3)], window, 0, torch.device("cpu"))
    place = 0
    while place < 3:
        slots = drawing.draft(place)
        drafts = (drawing.picture[0, 1 : place + slots] - config.image_token_offset).tolist()
        scores = torch.stack([table[tuple(drafts[:n])] for n in range(place, place + slots)]).log()[None]
        place += drawing.settle(place, scores, do_sample=True)
    return tuple((drawing.picture[0, 1:4] - config.image_token_offset).tolist())


@pytest.mark.parametrize("window", [1, 2])
def test_over_all_that_chance_can_do_the_distribution_is_exactly_that_of_one_code_after_another(monkeypatch, window):
    """Every draft that is kept or not, and every replacement, is a branch; probabilities are summed, not sampled."""
    size, rng = 3, torch.Generator().manual_seed(3)
    config = MarsConfig(codebook_size=size, downsample_factor=4)
    prefixes = [p for n in range(3) for p in itertools.product(range(size), repeat=n)]
    table = {p: torch.rand(size, generator=rng, dtype=torch.double).mul(3).softmax(-1) for p in prefixes}
    branch, taken = [], []  # the number of the possibility that each choice takes; what is left and its probability

    def choose(possibilities):
        possibilities = [(value, chance) for value, chance in possibilities if chance > 1e-12]
        index = branch[len(taken)] if len(taken) < len(branch) else 0
        value, chance = possibilities[index]
        taken.append((index, len(possibilities) - index - 1, chance))
        return value

    def throw(shape, generator, keep):  # 0 keeps a draft, a number below 1 does not
        return torch.tensor([[choose([(0.0, chance), (1 - 1e-9, 1 - chance)]) for chance in keep[0].tolist()]])

    def draw_from(chances, generator):
        return torch.tensor([[choose(enumerate(slot)) for slot in chances[0].tolist()]])

    monkeypatch.setattr(speculation_mars, "throw", throw)
    monkeypatch.setattr(speculation_mars, "draw_from", draw_from)
    law = dict.fromkeys(itertools.product(range(size), repeat=3), 0.0)
    while True:
        taken.clear()
        codes = codes_by_table(config, window, table)
        law[codes] += math.prod(chance for *_, chance in taken)
        while taken and not taken[-1][1]:
            taken.pop()
        if not taken:
            break
        branch = [index for index, *_ in taken]
        branch[-1] += 1
    for codes, probability in law.items():
        expected = table[()][codes[0]] * table[codes[:1]][codes[1]] * table[codes[:2]][codes[2]]
        assert abs(probability - expected) < 1e-9, codes


# ---- sampled pictures, against the exact probabilities of all of them

COLUMNS, CODES = 3, 4


@pytest.fixture
def tiny(make_model):
    """A model of 4 codes that draws 3 of them: 64 pictures."""
    return make_model(vq=False, codebook_size=CODES).double()


def exact_probabilities(model, ids, negative, options):
    """Enumerate all pictures with plain forwards, without a cache."""
    config, pictures = model.config, torch.tensor(list(itertools.product(range(CODES), repeat=COLUMNS)))
    start = torch.full((len(pictures), 1), config.image_start_token_id)
    tail = torch.cat([start, pictures + config.image_token_offset], dim=1)

    def code_logits(prompt):
        logits = model(torch.cat([prompt.expand(len(pictures), -1), tail], dim=1)).logits
        return logits[:, prompt.shape[1] :, config.image_token_offset :][:, :COLUMNS, :CODES]

    logits = code_logits(ids)
    if negative is not None:
        without = code_logits(negative)
        logits = without + options["guidance_scale"] * (logits - without)
    logits = logits / options["temperature"]
    lowest = logits.topk(options["top_k"], dim=-1).values[..., -1:]
    chances = logits.masked_fill(logits < lowest, -torch.inf).softmax(-1)
    return chances.gather(-1, pictures[..., None]).prod(1).squeeze(-1)


def observer(model, ids, **options):
    """Give a function that counts how often calls of so many rows draw each picture."""

    def observe(rows, calls=1):
        size = (4, 4 * COLUMNS)
        drawn = [draw(model, ids, *size, do_sample=True, num_return_sequences=rows, **options) for _ in range(calls)]
        codes = torch.cat(drawn)[:, 5:8] - model.config.image_token_offset
        numbers = (codes * CODES ** torch.arange(COLUMNS).flip(0)).sum(1)
        return torch.bincount(numbers, minlength=CODES**COLUMNS).double()

    return observe


def p_value(observed, expected):
    """Pearson's chi-square test; pictures that come up too rarely for it stand together."""
    if observed[expected == 0].any():
        return 0.0
    rare = expected * observed.sum() < 5
    cells = [torch.cat([one[~rare], one[rare].sum()[None]]) for one in (observed, expected * observed.sum())]
    cells = [one[cells[1] > 0] for one in cells]
    statistic = ((cells[0] - cells[1]) ** 2 / cells[1]).sum()
    freedom = torch.tensor((len(cells[0]) - 1) / 2, dtype=torch.double)
    return torch.special.gammaincc(freedom, statistic / 2).item()


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("window", [None, 1, 2, 3])
def test_sampled_pictures_have_the_probabilities_of_plain_drawing(tiny, window, guidance_scale):
    """
    A row alone goes on by all that it is certain of; many rows wait for each other, and check drafts again and again.

    The first drafts are copies, whose proposals are certain of them. Plain drawing is tested alike, as a check of the
    test.
    """
    ids, negative = prompts(tiny), torch.tensor([[tiny.config.null_token_id, 7]])
    options = {"temperature": 0.8, "top_k": 3, "guidance_scale": guidance_scale}
    exact = exact_probabilities(tiny, ids, negative if guidance_scale != 1 else None, options)
    assert abs(exact.sum() - 1) < 1e-12 and (exact == 0).sum() > 0  # top_k forbids some
    options |= {"negative_input_ids": negative, "jacobi_window": window}
    observe = observer(tiny, ids, generator=torch.Generator().manual_seed(5), **options)
    assert p_value(observe(rows=5000), exact) > 0.01
    if window:
        assert p_value(observe(rows=3, calls=120), exact) > 0.01


@pytest.mark.parametrize("wrong", ["whole", "generous", "forgetful"])
def test_the_test_of_probabilities_notices_wrong_rules(tiny, monkeypatch, wrong):
    """Replacing from all of p; keeping drafts too often; taking proposals for those of the forward before."""

    def weigh(drafts, proposals, chances):
        if wrong == "forgetful":
            proposals = proposals.roll(1, dims=1)
        keep, replacements = weigh_drafts(drafts, proposals, chances)
        return {"generous": 0.1 + 0.9 * keep}.get(wrong, keep), {"whole": chances}.get(wrong, replacements)

    monkeypatch.setattr(speculation_mars, "weigh_drafts", weigh)
    ids, options = prompts(tiny), {"temperature": 0.8, "top_k": 3, "guidance_scale": 1.0}
    exact = exact_probabilities(tiny, ids, None, options)
    observe = observer(tiny, ids, jacobi_window=2, generator=torch.Generator().manual_seed(5), **options)
    assert p_value(observe(rows=8000), exact) < 1e-6


# ---- greedy pictures, against plain drawing


@pytest.mark.parametrize("window", [1, 3, 30])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_greedy_rows_of_different_prompts_and_sizes_draw_what_plain_steps_draw(model, window, guidance_scale):
    ids, mask = prompts(model, 3), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    options = {
        "attention_mask": mask,
        "image_sizes": torch.tensor([[[16, 16]], [[8, 24]], [[8, 4]]]),
        "negative_input_ids": torch.tensor([[model.config.null_token_id, 7, 8]] * 3),
        "guidance_scale": guidance_scale,
        "guidance_schedule": "linear",
        "guidance_interval": (0.1, 0.8),
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    plain, fast = draw(model, ids, **options), draw(model, ids, jacobi_window=window, **options)
    assert torch.equal(fast.sequences, plain.sequences)
    codes = slice(model.config.image_token_offset, model.config.image_token_offset + model.config.codebook_size)
    fast_scores, scores = (torch.stack(one.scores)[..., codes] for one in (fast, plain))
    inside = torch.arange(16)[:, None] < torch.tensor([16, 12, 2])
    assert (fast_scores - scores)[inside].abs().max() < 1e-9
    assert fast.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()


@pytest.mark.parametrize("order", ["raster", "block2x2"])
def test_cells_are_told_in_every_order(make_model, order):
    model = make_model(cell_embedding=True, max_grid_size=8, code_order=order, codes_per_step=1).double()
    torch.nn.init.normal_(model.model.visual_cell_embedding.row_out)
    ids = prompts(model, 2)
    assert torch.equal(draw(model, ids, 16, 24, jacobi_window=5), draw(model, ids, 16, 24))


def test_layers_with_a_sliding_window_get_their_past_back(make_model):
    text = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    model = make_model(text=text).double()
    ids = prompts(model, 2)
    assert "sliding_attention" in model.config.text_config.layer_types
    assert torch.equal(draw(model, ids, jacobi_window=4), draw(model, ids))


def test_pictures_go_on_from_beginnings_of_different_lengths(model):
    ids = prompts(model, 3)
    beginnings = [torch.tensor([1, 2, 3, 4, 5, 6, 7]), torch.tensor([3]), torch.arange(16)]
    options = {"initial_codes": beginnings}
    assert torch.equal(draw(model, ids, jacobi_window=4, **options), draw(model, ids, **options))
    sampled = draw(model, ids, jacobi_window=4, do_sample=True, **options)
    for row, codes in zip(sampled, beginnings, strict=True):
        assert torch.equal(row[5 : 5 + len(codes)] - model.config.image_token_offset, codes)


# ---- speed


@pytest.mark.parametrize("do_sample", [False, True])
def test_predictable_pictures_take_few_forwards(model, do_sample):
    """Codes that all look alike leave nothing to guess: what was drafted once is right."""
    with torch.no_grad():
        model.model.visual_embed_tokens.weight[: model.config.codebook_size] = 0.3
    options = {"do_sample": do_sample, "temperature": 1.0} if do_sample else {}
    slow = count_forwards(model, lambda: draw(model, prompts(model), **options))
    fast = count_forwards(model, lambda: draw(model, prompts(model), jacobi_window=7, **options))
    assert slow[1] == 17 and fast[1] <= 6  # each second forward at least takes all that the one before drafted
    if not do_sample:
        assert torch.equal(fast[0], slow[0])


def test_no_picture_takes_more_forwards_than_plain_steps(model):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        options = {"do_sample": True, "temperature": 3.0, "generator": generator, "jacobi_window": 3}
        assert count_forwards(model, lambda options=options: draw(model, prompts(model, 3), **options))[1] <= 17


# ---- whatever else `generate` does


def test_the_same_seeds_draw_the_same_pictures(model):
    def sampled(*seeds):
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        return draw(model, prompts(model, 2), do_sample=True, jacobi_window=4, generator=generator)

    first, again, other = sampled(1, 2), sampled(1, 2), sampled(1, 3)
    assert torch.equal(first, again) and not torch.equal(first[1], other[1])


class Listener(BaseStreamer):
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value)

    def end(self):
        self.heard.append(None)


def test_a_streamer_hears_every_certain_token_once(model):
    listener, ids, sizes = Listener(), prompts(model, 2), torch.tensor([[[16, 16]], [[8, 24]]])
    drawn = draw(model, ids, image_sizes=sizes, do_sample=True, jacobi_window=3, streamer=listener)
    *heard, last = listener.heard
    assert last is None and torch.equal(torch.cat([value.reshape(2, -1) for value in heard], dim=1), drawn)


def test_a_cancelled_picture_comes_back_without_drafts(model):
    ids = prompts(model)
    cancelled = draw(model, ids, jacobi_window=6, streamer=ImageStreamer(model.vqgan, lambda preview: False))
    whole, pad = draw(model, ids), model.generation_config.pad_token_id
    length = int((cancelled[0] != pad).sum())
    assert 5 + 4 <= length < whole.shape[1] - 1 and torch.equal(cancelled[0, :length], whole[0, :length])
    assert (cancelled[0, length:] == pad).all()


def test_a_generation_config_and_image_defaults_can_ask_for_it(model):
    with torch.no_grad():
        model.model.visual_embed_tokens.weight[: model.config.codebook_size] = 0.3
    config = GenerationConfig(jacobi_window=7, do_sample=False)
    options = {"generation_mode": "image", "height": 16, "width": 16}
    assert count_forwards(model, lambda: model.generate(prompts(model), config, **options))[1] <= 6
    model.generation_config.image_defaults = {"jacobi_window": 7}
    assert count_forwards(model, lambda: model.generate(prompts(model), **options))[1] <= 6
    assert count_forwards(model, lambda: model.generate(prompts(model), jacobi_window=0, **options))[1] == 17
    model.generate(prompts(model), max_new_tokens=2)  # text mode is not concerned


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), window=st.integers(1, 20), do_sample=st.booleans())
def test_no_logits_lead_out_of_the_codebook(model, seed, window, do_sample):
    """Logits are huge, infinite of either sign, equal or all forbidden: pictures are complete and of codes."""
    rng = torch.Generator().manual_seed(seed)

    def spoil(module, inputs, logits):
        noise, spikes = torch.randn((2, *logits.shape), generator=rng, dtype=logits.dtype)
        kinds = [noise * 1e30, noise.masked_fill(spikes > 1.5, torch.inf), noise.masked_fill(spikes < 1.5, -torch.inf)]
        kinds += [torch.zeros_like(noise), torch.full_like(noise, -torch.inf)]
        kind = torch.randint(0, 5, (*logits.shape[:-1], 1), generator=rng)
        return torch.stack(kinds).gather(0, kind.expand_as(noise)[None])[0]

    sizes = torch.tensor([[[16, 16]], [[8, 12]]])
    options = {"negative_input_ids": torch.tensor([[model.config.null_token_id]] * 2), "guidance_scale": 3.0}
    handle = model.vision_head.register_forward_hook(spoil)
    try:
        options |= {"do_sample": do_sample, "top_k": 20} if do_sample else {}
        drawn = draw(model, prompts(model, 2), image_sizes=sizes, jacobi_window=window, **options)
    finally:
        handle.remove()
    pictures = model.collect_image_codes(drawn, sizes)  # raises on anything but codes
    assert [[tuple(picture.shape) for picture in row] for row in pictures] == [[(4, 4)], [(2, 3)]]


@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_that_are_no_numbers_are_reported_with_their_row_and_code(model, do_sample):
    def spoil(module, inputs, logits):
        columns = inputs[0].shape[0] // 2 if logits.ndim == 2 else inputs[0].shape[1]
        logits = logits.view(2, columns, -1).clone()
        fed = model_inputs[-1]
        for column in range(columns):
            if fed - columns + column + 1 == 4 + 1 + 3:  # prompt, `<img>`, three codes
                logits[1, column] = torch.nan
        return logits.view(-1, logits.shape[-1]) if inputs[0].ndim == 2 else logits

    model_inputs = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: model_inputs.append(kwargs["attention_mask"].shape[1]), with_kwargs=True
    )
    model.vision_head.register_forward_hook(spoil)
    with pytest.raises(RuntimeError, match=r"row 1 .*NaN.* in step 3\."):
        draw(model, prompts(model, 2), jacobi_window=6, do_sample=do_sample)


class Curious(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"jacobi_window": -1}, "`jacobi_window` must be .*1 or more.*got -1"),
        ({"jacobi_window": 2.5}, "whole number.*got 2.5"),
        ({"codes_per_step": 4}, "`codes_per_step` is 4"),
        ({"cache_implementation": "static"}, "out of the cache.*'static'"),
        ({"cache_implementation": "quantized"}, "out of the cache.*'quantized'"),
        ({"num_beams": 2}, "beams"),
        ({"generation_mode": "interleaved"}, '`jacobi_window` belongs to `generation_mode="image"`'),
        ({"generation_mode": "text"}, '`jacobi_window` belongs to `generation_mode="image"`'),
        ({"logits_processor": [Curious()]}, "Curious may ask for.*TopKLogitsWarper"),
        ({"repetition_penalty": 1.5}, "RepetitionPenaltyLogitsProcessor may ask for"),
    ],
)
def test_what_cannot_be_guessed_ahead_is_refused_before_any_forward(model, kwargs, message):
    model.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        model.generate(prompts(model), **{"generation_mode": "image", "jacobi_window": 4, **kwargs})
