"""Documents of text and pictures: every row against a plain loop without cache, batch or padding."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mars_hf.generation_mars import code_warpers

SIZES = torch.tensor([[[16, 16], [12, 20]], [[8, 16], [16, 8]]])  # in pixels, two pictures a row; 4 pixels a code


@pytest.fixture
def model(make_model):
    """A model that begins pictures often and ends seldom."""
    model = make_model().double()
    with torch.no_grad():
        model.vision_head.weight[model.config.image_start_token_id - model.config.image_token_offset] *= 2.5
    return model


def prompts(model, lengths=(5, 2)):
    rng = torch.Generator().manual_seed(3)
    return [torch.randint(3, model.config.text_vocab_size, (n,), generator=rng).tolist() for n in lengths]


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def null_rows(model, rows, pictures):
    """A prefix of its own for each row and picture, as if it told the size."""
    ids = [[[model.config.null_token_id, 10 + 3 * row + n] for n in range(pictures)] for row in range(rows)]
    return torch.tensor(ids)


def plain_document(model, prompt, sizes, k, max_new_tokens, ends=(1,), negative=None, scale=1.0):
    """The definition: one forward over the whole row for every step."""
    config = model.config
    start, end, offset = config.image_start_token_id, config.image_end_token_id, config.image_token_offset
    row, number = list(prompt), 0
    while len(row) - len(prompt) < max_new_tokens:
        height, width = sizes[min(number, len(sizes) - 1)].tolist()
        count = (height // 4) * (width // 4)
        scores = model(torch.tensor([row]), codes_per_step=k).logits[0, -1]
        fits = len(row) - len(prompt) + k + count + 1 <= max_new_tokens
        allowed = [*range(offset), *([start] if fits else [])]
        token = max(allowed, key=lambda one: scores[one].item())
        if token != start:
            row.append(token)
            if token in ends:
                break
            continue
        row += [start] * k
        codes = []
        while len(codes) < count:
            logits = model(torch.tensor([row + codes]), codes_per_step=k).logits[0, -k:]
            # The last K tokens are a whole block: its start slots, or the K codes before.
            if negative is not None:
                alone = torch.tensor([negative[min(number, len(negative) - 1)].tolist() + [start] * k + codes])
                without = model(alone, codes_per_step=k).logits[0, -k:]
                logits = without + scale * (logits - without)
            picked = logits[:, offset : offset + config.codebook_size].argmax(-1) + offset
            codes += picked.tolist()[: count - len(codes)]
        row += [*codes, end]
        number += 1
    return row[len(prompt) :]


def write(model, rows, sizes, **kwargs):
    ids, mask = padded(rows)
    settings = {"generation_mode": "interleaved", "do_sample": False, **kwargs}
    return model.generate(ids, attention_mask=mask, image_sizes=sizes, **settings)[:, ids.shape[1] :]


@pytest.mark.parametrize("k", [1, 3, 4])
def test_each_row_of_a_batch_is_the_document_of_a_plain_loop(model, k):
    rows = prompts(model)
    written = write(model, rows, SIZES, codes_per_step=k, max_new_tokens=60)
    pictures = 0
    for row, (prompt, sizes) in enumerate(zip(rows, SIZES, strict=True)):
        expected = plain_document(model, prompt, sizes, k, 60)
        assert written[row, : len(expected)].tolist() == expected
        pictures += expected.count(model.config.image_end_token_id)
    assert pictures >= 2


@pytest.mark.parametrize("k", [1, 3])
def test_guidance_acts_inside_pictures_only_and_each_picture_has_its_own_prefix(model, k):
    rows, negative = prompts(model), null_rows(model, 2, 2)
    options = {"codes_per_step": k, "max_new_tokens": 60, "image_kwargs": {"guidance_scale": 3.0}}
    written = write(model, rows, SIZES, negative_input_ids=negative, **options)
    for row, (prompt, sizes) in enumerate(zip(rows, SIZES, strict=True)):
        expected = plain_document(model, prompt, sizes, k, 60, negative=negative[row], scale=3.0)
        assert written[row, : len(expected)].tolist() == expected
    unguided = write(model, rows, SIZES, codes_per_step=k, max_new_tokens=60)
    assert not torch.equal(unguided, written)


def test_a_row_ends_at_its_end_token_while_others_go_on(model):
    rows = prompts(model)
    free = [plain_document(model, prompt, sizes, 1, 60) for prompt, sizes in zip(rows, SIZES, strict=True)]
    words = [[token for token in row if token < model.config.image_token_offset] for row in free]
    end = next(token for token in words[0] if token not in words[1][:2])
    written = write(model, rows, SIZES, max_new_tokens=60, eos_token_id=end)
    for row, (prompt, sizes) in enumerate(zip(rows, SIZES, strict=True)):
        expected = plain_document(model, prompt, sizes, 1, 60, ends=(end,))
        assert written[row, : len(expected)].tolist() == expected


def test_a_picture_that_does_not_fit_is_not_begun(model):
    for limit in (5, 17, 18, 40):
        row = write(model, prompts(model)[:1], SIZES[:1], max_new_tokens=limit)[0].tolist()
        config = model.config
        assert len(row) <= limit and row.count(config.image_start_token_id) == row.count(config.image_end_token_id)


class AlwaysDraw(LogitsProcessor):
    def __init__(self, start):
        self.start = start

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([self.start]), 0.0)


def test_no_processor_begins_a_picture_where_there_is_no_room(model):
    start = model.config.image_start_token_id
    processors = LogitsProcessorList([AlwaysDraw(start)])
    rows = write(model, prompts(model), SIZES, max_new_tokens=30, logits_processor=processors)
    pictures = (rows == model.config.image_end_token_id).sum(1)
    assert ((rows == start).sum(1) == pictures).all() and bool((pictures >= 1).any())


def test_a_static_cache_writes_what_a_growing_one_writes(model):
    options = {"codes_per_step": 3, "max_new_tokens": 40}
    growing = write(model, prompts(model), SIZES, **options)
    assert torch.equal(write(model, prompts(model), SIZES, cache_implementation="static", **options), growing)


def test_cells_of_every_picture_are_those_of_the_forward(make_model):
    model = make_model(cell_embedding=True, code_order="region", codes_per_step=4, max_grid_size=8).double()
    with torch.no_grad():
        model.vision_head.weight[model.config.image_start_token_id - model.config.image_token_offset] *= 2.5
    prompt = prompts(model)[0]
    written = write(model, [prompt], SIZES[:1], max_new_tokens=70)
    spans = model.collect_image_codes(written, SIZES[:1])[0]
    assert len(spans) >= 2 and spans[0].shape == (4, 4) and spans[1].shape == (3, 5)
    sequence = torch.cat([torch.tensor([prompt]), written], dim=1)
    scores = model(sequence, image_sizes=SIZES[:1]).logits[0]
    offset, size = model.config.image_token_offset, model.config.codebook_size
    for place in range(len(prompt), sequence.shape[1]):
        token = int(sequence[0, place])
        if offset <= token < offset + size:
            assert token == int(scores[place - 4, offset : offset + size].argmax()) + offset


def test_image_defaults_of_a_checkpoint_hold_for_steps_and_guidance_until_told_otherwise(model):
    rows, negative = prompts(model), null_rows(model, 2, 2)
    options = {"max_new_tokens": 60, "negative_input_ids": negative}
    asked = {"codes_per_step": 4, "guidance_schedule": "cosine", "guidance_interval": (0.2, 1.0)}
    expected = write(model, rows, SIZES, **options, **asked, image_kwargs={"guidance_scale": 3.0})
    plain = write(model, rows, SIZES, **options)
    model.generation_config.image_defaults = {**asked, "guidance_scale": 3.0}
    assert torch.equal(write(model, rows, SIZES, **options), expected) and not torch.equal(expected, plain)
    told = {"codes_per_step": 1, "guidance_schedule": "constant", "guidance_interval": (0.0, 1.0)}
    assert torch.equal(write(model, rows, SIZES, **options, **told, image_kwargs={"guidance_scale": 1.0}), plain)


def test_pictures_that_are_sampled_take_the_librarys_top_k_unless_told_otherwise():
    def top_k(**told):
        return [one.top_k for one in code_warpers({"do_sample": True, **told}) if hasattr(one, "top_k")]

    default = GenerationConfig._get_default_generation_params()["top_k"]
    assert top_k() == [default] and top_k(top_k=7) == [7] and top_k(top_k=0) == top_k(top_k=None) == []


def test_documents_of_a_model_of_super_resolution_are_refused(make_model):
    model = make_model(super_resolution_factor=2)
    with pytest.raises(ValueError, match="draws from a small picture"):
        write(model, prompts(model), SIZES, max_new_tokens=30)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 2}, "no beams"),
        ({"output_scores": True}, "`output_scores` is not possible"),
        ({"negative_prompt_ids": torch.ones(2, 3)}, "`negative_prompt_ids` is not possible"),
        ({"image_kwargs": {"top_q": 3}}, "does not know `top_q`"),
        ({"image_kwargs": {"guidance_scale": -1.0}}, "0 or more"),
        ({"image_kwargs": {"guidance_scale": 2.0}}, "needs `negative_input_ids`"),
        ({"initial_codes": [[1]]}, 'image mode|generation_mode="image"'),
        ({"max_new_tokens": 0}, "0 new ones"),
        ({"height": 16, "width": 16}, "contradict"),
        ({"codes_per_step": 9}, "2x4 = 8.*got 9"),
    ],
)
def test_impossible_documents_are_refused_before_any_forward(model, monkeypatch, kwargs, message):
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match=message):
        write(model, prompts(model), SIZES, **{"max_new_tokens": 30, **kwargs})


def test_a_prompt_that_ends_inside_a_picture_is_refused(model):
    row = [*prompts(model)[0], model.config.image_start_token_id, model.config.image_token_offset]
    with pytest.raises(ValueError, match="ends inside a picture"):
        write(model, [row], SIZES[:1], max_new_tokens=30)


def test_words_and_codes_are_sampled_with_settings_of_their_own(model):
    greedy = write(model, prompts(model), SIZES, max_new_tokens=40)
    same = {"do_sample": True, "top_k": 1}
    words_only = write(model, prompts(model), SIZES, max_new_tokens=40, image_kwargs={"do_sample": False}, **same)
    assert torch.equal(words_only, greedy)
    options = {"max_new_tokens": 40, "image_kwargs": {"do_sample": True, "temperature": 5.0, "top_k": 0}, **same}
    drawn = [
        write(model, prompts(model), SIZES, generator=torch.Generator().manual_seed(n), **options) for n in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_length_and_guidance_of_a_document_are_read_from_a_generation_config(model):
    ids, mask = padded(prompts(model))
    call = {"attention_mask": mask, "generation_mode": "interleaved", "image_sizes": SIZES}
    call |= {"negative_input_ids": torch.tensor([[model.config.null_token_id, 10]] * 2), "do_sample": False}
    told = {"max_new_tokens": 30, "guidance_scale": 3.0}
    expected = model.generate(ids, **call, **told)
    assert torch.equal(expected, model.generate(ids, **call, generation_config=GenerationConfig(**told)))
    assert expected.shape[1] <= ids.shape[1] + 30
    longest = {"max_length": ids.shape[1] + 30, "guidance_scale": 3.0}
    assert torch.equal(expected, model.generate(ids, **call, generation_config=GenerationConfig(**longest)))


def test_processors_count_the_tokens_that_are_written(model):
    ends = list(range(0, model.config.text_vocab_size, 2))
    short = write(model, prompts(model), SIZES, max_new_tokens=60, eos_token_id=ends)
    long = write(model, prompts(model), SIZES, max_new_tokens=60, eos_token_id=ends, min_new_tokens=40)
    first_end = [next((n for n, token in enumerate(row) if token in ends), 60) for row in short.tolist()]
    later_end = [next((n for n, token in enumerate(row) if token in ends), 60) for row in long.tolist()]
    assert min(first_end) < 20 and min(later_end) >= 40

    seen = []

    class Counts(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.shape[1])
            return scores

    write(model, prompts(model), SIZES, max_new_tokens=20, logits_processor=LogitsProcessorList([Counts()]))
    assert seen[0] == 5 and seen == sorted(seen) and seen[-1] < 5 + 20  # of the longer prompt
