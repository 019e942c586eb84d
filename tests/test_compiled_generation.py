"""Decoding with `torch.compile`: one graph without breaks for all prompts, and the drawings of the eager loop."""

import pytest
import torch
from transformers import CompileConfig

SIZES = torch.tensor([[[16, 16], [8, 16]]])  # in pixels; 4 pixels a code


@pytest.fixture
def model(make_model):
    """A model that begins pictures often."""
    model = make_model().double()
    with torch.no_grad():
        model.vision_head.weight[model.config.image_start_token_id - model.config.image_token_offset] *= 4
    return model


def compile_config(backend):
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # the library leaves CPUs out otherwise
    return config


def generate(model, length, **kwargs):
    ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(length))
    negative = torch.tensor([[model.config.null_token_id, 9]])
    options = {"image_sizes": SIZES, "guidance_scale": 3.0, "negative_input_ids": negative, "do_sample": False}
    return model.generate(ids, **{**options, **kwargs})


@pytest.mark.parametrize(("mode", "k", "graphs"), [("image", 1, 1), ("image", 3, 1), ("interleaved", 3, 2)])
def test_one_graph_serves_all_prompts_of_a_size(model, mode, k, graphs):
    """In interleaved mode two: steps that may write need the text head, steps that only draw do not."""
    torch._dynamo.reset()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    options = {"generation_mode": mode, "codes_per_step": k}
    if mode == "interleaved":
        options["max_new_tokens"] = 60
    for length in (3, 11, 40):
        config = compile_config(backend)
        compiled = generate(model, length, cache_implementation="static", compile_config=config, **options)
        assert torch.equal(compiled, generate(model, length, **options))
    assert len(compilations) == graphs


@pytest.mark.integration
def test_inductor_draws_what_the_eager_loop_draws(model):
    torch._dynamo.reset()
    options = {"generation_mode": "image", "codes_per_step": 3}
    compiled = generate(model, 5, cache_implementation="static", compile_config=compile_config("inductor"), **options)
    assert torch.equal(compiled, generate(model, 5, **options))


def test_only_the_vision_head_is_computed_while_rows_only_draw(model):
    heads = []
    for name in ("text_head", "vision_head"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: heads.append(name))
    generate(model, 5, generation_mode="image")
    assert set(heads) == {"vision_head"}
    heads.clear()
    written = generate(model, 5, generation_mode="interleaved", max_new_tokens=40)[0, 5:]
    (pictures,) = model.collect_image_codes(written[None], SIZES)
    codes = sum(picture.numel() for picture in pictures)
    # One call for the prompt and one a token but the last; what a code or `</img>` follows leaves the text head out.
    assert heads.count("vision_head") == len(written)
    assert heads.count("vision_head") - heads.count("text_head") == codes + len(pictures) > 0
