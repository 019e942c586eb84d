"""Logits that no model should give: the grammar holds, infinities are defined, NaN is reported."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mars_hf.drawing_mars import pick_codes


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("mode", ["image", "interleaved"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_no_logits_lead_out_of_the_codebook(model, k, mode, seed):
    """Logits are huge, equal, infinite of either sign, whole rows forbidden: pictures are codes all the same."""
    rng = torch.Generator().manual_seed(seed)

    def adversarial(module, inputs, logits):
        kinds = torch.randint(0, 5, (*logits.shape[:-1], 1), generator=rng)
        noise = torch.randn(logits.shape, generator=rng)
        spikes = noise.masked_fill(torch.rand(logits.shape, generator=rng) < 0.05, torch.inf)
        holes = noise.masked_fill(torch.rand(logits.shape, generator=rng) < 0.9, -torch.inf)
        forbidden = torch.full_like(noise, -torch.inf)
        return torch.stack([noise * 1e30, torch.zeros_like(noise), spikes, holes, forbidden]).gather(
            0, kinds.expand_as(noise)[None]
        )[0]

    handle = model.vision_head.register_forward_hook(adversarial)
    negative = torch.tensor([[model.config.null_token_id, 11]] * 2)
    sizes = torch.tensor([[[16, 16]], [[8, 12]]])
    try:
        drawn = model.generate(
            torch.tensor([[5, 6], [7, 8]]),
            generation_mode=mode,
            image_sizes=sizes,
            negative_input_ids=negative,
            guidance_scale=3.0,
            codes_per_step=k,
            do_sample=True,
            top_k=20,
            max_new_tokens={"image": None, "interleaved": 60}[mode],
        )
    finally:
        handle.remove()
    pictures = model.collect_image_codes(drawn, sizes)  # raises on anything but codes
    if mode == "image":
        assert [row[0].shape for row in pictures] == [(4, 4), (2, 3)]


def test_infinite_scores_share_their_chances_equally():
    inf = torch.inf
    scores = torch.tensor([[0.0, inf, 5.0, inf], [-inf] * 4, [1.0, -inf, 1.0, -inf]])
    drawn = pick_codes(scores.repeat(2000, 1)[:, None], True, torch.Generator().manual_seed(0)).view(2000, 3)
    shares = torch.stack([(drawn == code).float().mean(0) for code in range(4)], dim=1)
    expected = torch.tensor([[0, 0.5, 0, 0.5], [0.25] * 4, [0.5, 0, 0.5, 0]])
    assert (shares - expected).abs().max() < 0.04


@pytest.mark.parametrize("mode", ["image", "interleaved"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_that_are_no_numbers_are_reported_with_row_and_step(model, mode, do_sample):
    calls = []

    def spoil(module, inputs, logits):
        calls.append(1)
        if len(calls) == 4:
            logits = logits.clone()
            logits[1] = torch.nan
        return logits

    handle = model.vision_head.register_forward_hook(spoil)
    sizes = {"image_sizes": torch.tensor([[[8, 8]], [[8, 8]]]), "generation_mode": mode, "do_sample": do_sample}
    # In image mode the prompt's own call is the first, in interleaved mode its logits are those of step 0.
    step = {"image": 2, "interleaved": 3}[mode]
    try:
        with pytest.raises(RuntimeError, match=rf"row 1 .*NaN.* in step {step}\."):
            model.generate(torch.tensor([[5, 6], [7, 8]]), **sizes, max_new_tokens=8)
    finally:
        handle.remove()
