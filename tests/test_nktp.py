"""Next-K-token prediction: orders, what each token sees and predicts, and decoding against loops without a cache."""

import pytest
import torch
from torch.nn import functional as F

from mars_hf import MarsForConditionalGeneration
from mars_hf.code_order_mars import PictureLayout, check_code_order, emission_order, find_cells


@pytest.fixture
def model(make_model):
    return make_model().double()


def with_cells(make_model, **changes):
    model = make_model(cell_embedding=True, max_grid_size=8, **changes).double()
    return model


# ---- orders


@pytest.mark.filterwarnings("ignore:In .* steps")
@pytest.mark.parametrize("order", ["raster", "region", "block2x2"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 16])
def test_an_order_is_a_permutation_of_all_cells(order, k):
    for height in range(1, 10):
        for width in range(1, 10):
            impossible = k > height * width or (order == "block2x2" and (height % 2 or width % 2 or k == 3))
            if impossible:
                with pytest.raises(ValueError):
                    check_code_order(height, width, k, order)
                continue
            cells = emission_order(height, width, k, order)
            assert sorted(cells.tolist()) == list(range(height * width))
            if order == "raster" or (order == "region" and k == 1):
                assert cells.tolist() == list(range(height * width))


def test_regions_emit_one_code_each_and_never_two_neighbours():
    for height, width, k in ((8, 8, 4), (8, 8, 16), (16, 32, 8), (6, 9, 3)):
        steps = emission_order(height, width, k, "region").view(-1, k)
        for step in steps:
            y, x = step // width, step % width
            gaps = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs()) + 99 * torch.eye(k, dtype=torch.long)
            assert gaps.min() > 1
    # A slot goes on from cell to cell of its own region: 2 x 2 regions of 2 x 2 cells.
    assert emission_order(4, 4, 4, "region").tolist() == [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]


def test_blocks_are_squares_of_neighbours():
    assert emission_order(4, 4, 4, "block2x2").view(-1, 4).tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_a_grid_too_small_for_its_regions_gets_a_warning():
    with pytest.warns(UserWarning, match="neighbouring codes at once"):
        emission_order(11, 13, 16, "region")


@pytest.mark.parametrize(
    ("grid", "k", "order", "message"),
    [
        ((4, 4), 0, "raster", "codes_per_step.*got 0"),
        ((2, 2), 5, "region", "between 1 and.*4.*got 5"),
        ((3, 4), 4, "block2x2", "even number.*3x4"),
        ((4, 4), 6, "block2x2", "multiple of 4.*got 6"),
        ((4, 4), 4, "spiral", "raster, region, block2x2.*'spiral'"),
    ],
)
def test_impossible_orders_are_refused(grid, k, order, message):
    with pytest.raises(ValueError, match=message):
        check_code_order(*grid, k, order)


# ---- what each token sees and predicts


def test_a_layout_is_that_of_a_row_worked_by_hand():
    offset, start, end = 50, 58, 59  # codes 50..57
    #       text  <img>   <img>  codes ...................  </img> text <img> code code </img> text
    row = [7, start, start, 51, 52, 53, end, 8, start, 54, 55, end, 9]
    layout = PictureLayout.of(torch.tensor([row]), offset, start)
    assert layout.place[0].tolist() == [-1, 0, 1, 2, 3, 4, -1, -1, 0, 1, 2, -1, -1]
    assert layout.picture[0].tolist() == [-1, 0, 0, 0, 0, 0, -1, -1, 1, 1, 1, -1, -1]
    assert layout.codes_per_step[0, 1:6].tolist() == [2] * 5 and layout.codes_per_step[0, 8:11].tolist() == [1] * 3
    assert layout.num_codes[0, [1, 8]].tolist() == [3, 2]
    # Blocks: two start slots; codes 0 and 1; code 2 alone; then one token each.
    assert layout.block_ids[0].tolist() == [-1, 1, 1, 2, 2, 3, -1, -1, 8, 9, 10, -1, -1]
    # Start slot j predicts code j, code i code i + K, the last code `</img>`, all else its successor.
    assert layout.targets[0].tolist() == [1, 3, 4, 5, -1, 6, 7, 8, 9, 10, 11, 12, -1]
    assert layout.shift_labels(torch.tensor([row]))[0].tolist()[:6] == [start, 51, 52, 53, -100, end]


def rows_with_pictures(model, k, counts=(10, 7), seed=0):
    """Text, picture, text, picture, text; partial last blocks; K copies of `<img>`."""
    config, rng = model.config, torch.Generator().manual_seed(seed)

    def text(count):
        return torch.randint(3, config.text_vocab_size, (count,), generator=rng).tolist()

    row = text(4)
    for count in counts:
        codes = torch.randint(0, config.codebook_size, (count,), generator=rng) + config.image_token_offset
        row += [config.image_start_token_id] * k + codes.tolist() + [config.image_end_token_id] + text(2)
    return torch.tensor([row])


def blockwise_mask(ids, config, k):
    """`allowed(q, k)`: earlier, or of the same block; worked out with plain loops."""
    blocks, number, place = [], 0, None
    for token in ids.tolist():
        if token == config.image_start_token_id and place is None:
            place = 0
        if place is None or token == config.image_end_token_id:
            place = None
            blocks.append(None)
            number += 1
        else:
            blocks.append((number, place // k))
            place += 1
    size = len(blocks)
    allowed = [
        [j <= i or (blocks[i] is not None and blocks[i] == blocks[j]) for j in range(size)] for i in range(size)
    ]
    return torch.tensor(allowed)[None, None]


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_forward_sees_whole_blocks_and_no_more(model, k):
    ids = rows_with_pictures(model, k)
    mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=torch.double)
    mask = mask.masked_fill(~blockwise_mask(ids[0], model.config, k), torch.finfo(torch.double).min)
    expected = model(ids, attention_mask=mask).logits
    assert (model(ids, codes_per_step=k).logits - expected).abs().nan_to_num().max() < 1e-10
    assert (model(ids).logits - expected).abs().nan_to_num().max() > 1e-3  # not the causal one


def test_blocks_of_one_give_the_logits_of_next_token_prediction(model):
    ids = rows_with_pictures(model, 1)
    config = model.config
    blocks = PictureLayout.of(ids, config.image_token_offset, config.image_start_token_id).block_ids
    assert (model(ids, block_ids=blocks).logits - model(ids).logits).abs().nan_to_num().max() < 1e-10


@pytest.mark.parametrize("k", [1, 3])
def test_the_loss_is_the_mean_over_what_each_token_predicts(model, k):
    ids, config = rows_with_pictures(model, k), model.config
    logits = model(ids, codes_per_step=k).logits[0]
    losses, place = [], None
    row = ids[0].tolist()
    count = 0
    for i, token in enumerate(row):
        if token == config.image_start_token_id and place is None:
            place = 0
            rest = row[i:]
            count = rest.index(config.image_end_token_id) - k
        if token == config.image_end_token_id:
            place = None
        target = None
        if place is None:
            target = i + 1 if i + 1 < len(row) else None
        else:
            target = i + k if place < count else i + 1 if place == count + k - 1 else None
            place += 1
        if target is not None:
            losses.append(-logits[i].log_softmax(-1)[row[target]])
    loss = model(ids, labels=ids, codes_per_step=k).loss
    assert abs(loss - torch.stack(losses).mean()) < 1e-5  # the library computes losses in float32


# ---- decoding


def draw(model, ids, height=16, width=16, **kwargs):
    return model.generate(ids, generation_mode="image", height=height, width=width, **{"do_sample": False, **kwargs})


def decoder_logits(model, ids, k, **kwargs):
    out = draw(model, ids, codes_per_step=k, return_dict_in_generate=True, output_scores=True, **kwargs)
    offset, size = model.config.image_token_offset, model.config.codebook_size
    return out.sequences, torch.stack(out.scores, dim=1)[..., offset : offset + size]


@pytest.mark.parametrize("k", [1, 3, 4, 5, 16])
def test_one_forward_over_a_drawing_gives_the_logits_that_drew_it(model, k):
    prompt = torch.cat([rows_with_pictures(model, k, counts=(7,))])  # an earlier picture and text before the drawing
    sequences, scores = decoder_logits(model, prompt, k)
    logits = model(sequences, codes_per_step=k).logits
    first = prompt.shape[1]
    offset, size = model.config.image_token_offset, model.config.codebook_size
    parallel = logits[:, first : first + 16, offset : offset + size]
    assert (parallel - scores).abs().max() < 1e-10
    codes = sequences[0, first + k : first + k + 16] - offset
    assert torch.equal(codes, parallel[0].argmax(-1))
    assert sequences[0, first : first + k].eq(model.config.image_start_token_id).all()
    assert sequences[0, -1] == model.config.image_end_token_id and sequences.shape[1] == first + k + 17


def test_processors_that_know_rows_by_their_number_see_each_row_in_every_slot(model):
    config, ids = model.config, torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(2))
    even = list(range(config.image_token_offset, config.image_token_offset + config.codebook_size, 2))
    allowed = {0: even, 1: [code + 1 for code in even]}
    options = {"codes_per_step": 4, "prefix_allowed_tokens_fn": lambda row, seen: allowed[row]}
    drawn = model.collect_image_codes(draw(model, ids, **options))
    assert [set((picture[0] % 2).flatten().tolist()) for picture in drawn] == [{0}, {1}]


def test_a_penalty_on_padded_rows_spares_their_prompts_in_every_slot(model):
    ids = torch.randint(3, 90, (1, 3), generator=torch.Generator().manual_seed(2))
    options = {"codes_per_step": 4, "repetition_penalty": 1.3}
    alone = draw(model, ids, **options)[0, 3:]
    padded, mask = torch.cat([F.pad(ids, (2, 0)), ids.repeat(1, 2)[:, :5]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    both = draw(model, padded, attention_mask=mask, **options)
    assert torch.equal(both[0, 5:], alone)


def test_a_picture_of_blocks_in_the_prompt_is_read_as_one_whatever_is_drawn(make_model):
    model = make_model(codes_per_step=[1, 4]).double()
    prompt = rows_with_pictures(model, 4, counts=(8,))
    sequences, scores = decoder_logits(model, prompt, 1)
    offset, size = model.config.image_token_offset, model.config.codebook_size
    expected = model(sequences).logits[:, prompt.shape[1] :, offset : offset + size]
    assert (expected[:, : scores.shape[1]] - scores).abs().max() < 1e-10


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_left_padded_rows_of_different_sizes_draw_what_each_draws_alone(model, k, scale):
    config, rng = model.config, torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, config.text_vocab_size, (1, n), generator=rng) for n in (6, 2)]
    sizes = [(16, 16), (12, 20)]
    null = torch.tensor([[config.null_token_id, 7, 8]])
    guided = {"guidance_scale": scale} | ({"negative_input_ids": null} if scale != 1 else {})
    alone = [
        model.collect_image_codes(draw(model, ids, *size, codes_per_step=k, **guided), torch.tensor([[size]]))[0][0]
        for ids, size in zip(prompts, sizes, strict=True)
    ]
    ids = torch.cat([F.pad(prompt, (6 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.tensor([[1] * 6, [0] * 4 + [1] * 2])
    if scale != 1:
        guided["negative_input_ids"] = null.expand(2, -1)
    both = model.generate(
        ids,
        attention_mask=mask,
        image_sizes=torch.tensor([[size] for size in sizes]),
        generation_mode="image",
        codes_per_step=k,
        do_sample=False,
        **guided,
    )
    drawn = model.collect_image_codes(both, torch.tensor([[size] for size in sizes]))
    assert all(torch.equal(rows[0], single) for rows, single in zip(drawn, alone, strict=True))


@pytest.mark.parametrize(
    ("order", "k"), [("raster", 3), ("region", 4), ("region", 3), ("block2x2", 4), ("block2x2", 1)]
)
def test_cells_tell_the_decoder_what_they_tell_the_forward(make_model, order, k):
    model = with_cells(make_model, code_order=order, codes_per_step=k)
    prompt, size = torch.tensor([[5, 6, 7]]), torch.tensor([[[16, 24]]])
    sequences, scores = decoder_logits(model, prompt, k, height=16, width=24)
    logits = model(sequences, image_sizes=size).logits
    offset, codes = model.config.image_token_offset, model.config.codebook_size
    assert (logits[:, 3 : 3 + 24, offset : offset + codes] - scores).abs().max() < 1e-10
    grid = model.collect_image_codes(sequences, size)[0][0]
    emitted = sequences[0, 3 + k : 3 + k + 24] - offset
    assert torch.equal(grid.flatten()[emission_order(4, 6, k, order)], emitted)
    with pytest.raises(ValueError, match="image_sizes"):
        model(sequences)


def test_a_model_with_cells_captions_a_picture_as_whole_forwards_do(make_model):
    model = with_cells(make_model, code_order="raster")
    config = model.config
    codes = torch.arange(6) + config.image_token_offset
    ids = torch.tensor([[3, config.image_start_token_id, *codes.tolist(), config.image_end_token_id, 4]])
    sizes = torch.tensor([[[8, 12]]])
    written = model.generate(ids, image_sizes=sizes, max_new_tokens=5, do_sample=False, eos_token_id=None)
    for place in range(ids.shape[1], written.shape[1]):
        logits = model(written[:, :place], image_sizes=sizes).logits[0, -1, : config.text_vocab_size]
        assert written[0, place] == logits.argmax()


@pytest.mark.parametrize("order", ["raster", "region", "block2x2"])
def test_a_row_without_a_picture_has_no_cells(make_model, order):
    model = with_cells(make_model, code_order=order, codes_per_step=[4, 1])
    config = model.config
    start, end, offset = config.image_start_token_id, config.image_end_token_id, config.image_token_offset
    ids = torch.tensor([[3] * 7, [3, start, offset, offset + 1, offset + 2, offset + 3, end]])
    layout = PictureLayout.of(ids, offset, start)
    cells = find_cells(config, ids, layout, [[], [(8, 8)]])
    assert (cells[0] == -1).all() and (cells[1, 2:6] >= 0).any()
    with pytest.raises(ValueError, match="9 codes a side, but the cell embeddings know 8"):
        find_cells(config, ids, layout, [[], [(8, 36)]])


def test_cells_start_as_nothing(make_text_model, make_vqgan):
    parts = make_text_model(), make_vqgan()
    plain, model = (MarsForConditionalGeneration.from_text_and_vq(*parts, cell_embedding=on) for on in (False, True))
    model.vision_head.load_state_dict(plain.vision_head.state_dict())  # it starts with noise of its own
    ids = rows_with_pictures(plain, 1, counts=(16,))
    with_sizes = model(ids, image_sizes=torch.tensor([[[16, 16]]])).logits
    assert torch.equal(plain(ids).logits, with_sizes)
    assert all(parameter.requires_grad for parameter in model.model.visual_cell_embedding.parameters())


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("given", [0, 1, 5, 6, 16])
def test_a_picture_is_completed_as_if_its_beginning_had_been_drawn(model, k, given):
    prompt = torch.tensor([[5, 6, 7]])
    whole = draw(model, prompt, codes_per_step=k)
    codes = whole[0, 3 + k : -1] - model.config.image_token_offset
    completed = draw(model, prompt, codes_per_step=k, initial_codes=[codes[:given]])
    assert torch.equal(completed, whole)
    other = (codes + 1) % model.config.codebook_size
    kept = draw(model, prompt, codes_per_step=k, initial_codes=[other[:given]])[0, 3 + k : 3 + k + given]
    assert torch.equal(kept - model.config.image_token_offset, other[:given])


def test_beginnings_of_different_lengths_stand_in_one_batch(model):
    prompt = torch.tensor([[5, 6, 7], [9, 8, 7]])
    beginnings = [torch.tensor([1, 2, 3, 4, 5, 6, 7]), torch.tensor([3])]
    both = draw(model, prompt, codes_per_step=3, initial_codes=beginnings)
    for row, beginning in enumerate(beginnings):
        alone = draw(model, prompt[row : row + 1], codes_per_step=3, initial_codes=[beginning])
        assert torch.equal(alone[0], both[row])


def test_rows_with_generators_of_their_own_draw_what_each_draws_alone(model):
    prompt = torch.tensor([[5, 6, 7], [9, 8, 7]])

    def seeds():
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    both = draw(model, prompt, codes_per_step=3, do_sample=True, generator=seeds())
    for row, generator in enumerate(seeds()):
        alone = draw(model, prompt[row : row + 1], codes_per_step=3, do_sample=True, generator=[generator])
        assert torch.equal(alone[0], both[row])


def test_a_static_cache_draws_blocks_as_a_growing_one_does(model):
    prompt = torch.tensor([[5, 6, 7]])
    static = draw(model, prompt, codes_per_step=3, cache_implementation="static")
    assert torch.equal(static, draw(model, prompt, codes_per_step=3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"codes_per_step": 0}, "codes_per_step.*got 0"),
        ({"codes_per_step": 17}, "4x4 = 16.*got 17"),
        ({"code_order": "region"}, "trained to draw in 'raster'.*'region'"),
        ({"initial_codes": [torch.arange(17) % 7]}, "at most 16 codes"),
        ({"initial_codes": [torch.tensor([9999])]}, "got 9999"),
        ({"initial_codes": []}, "one row for each prompt"),
    ],
)
def test_impossible_steps_are_refused_before_any_forward(model, monkeypatch, kwargs, message):
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match=message):
        draw(model, torch.tensor([[5, 6, 7]]), **kwargs)


def test_an_order_without_cells_is_refused_by_the_configuration(make_model):
    with pytest.raises(ValueError, match="cell_embedding"):
        make_model(code_order="region")
    with pytest.raises(ValueError, match="codes_per_step"):
        make_model(codes_per_step=[4, 0])
