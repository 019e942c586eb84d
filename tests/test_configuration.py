"""What a configuration derives, keeps and refuses."""

import json
import logging

import pytest
from transformers import Qwen2Config, Qwen3Config

from mars_hf import MarsConfig
from mars_hf.configuration_mars import MARS_FORMAT

TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VQ = {"block_out_channels": (8, 8, 8), "num_vq_embeddings": 50}


def test_bare_configuration_has_the_papers_vocabulary():
    config = MarsConfig()
    assert (config.text_vocab_size, config.codebook_size, config.vocab_size) == (151_936, 8_192, 160_136)
    assert config.image_token_offset == 151_936
    assert config.num_padding_tokens == 2


def test_six_specials_follow_the_codes():
    config = MarsConfig(text_config=TEXT, codebook_size=50, downsample_factor=4)
    ids = [config.image_start_token_id, config.image_end_token_id, config.lowres_start_token_id]
    ids += [config.lowres_end_token_id, config.null_token_id, config.image_pad_token_id]
    assert ids == [350, 351, 352, 353, 354, 355]
    assert config.vocab_size == 360 and config.num_visual_tokens == 60 and config.num_padding_tokens == 4


@pytest.mark.parametrize("text_config", [Qwen2Config(**TEXT), Qwen3Config(**TEXT), {"model_type": "qwen3", **TEXT}])
def test_saved_configuration_loads_the_same(tmp_path, text_config):
    config = MarsConfig(text_config=text_config, vq_config=VQ, expert_impl="where")
    config.save_pretrained(tmp_path)
    loaded = MarsConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert type(loaded.text_config) is type(config.text_config)


def test_sizes_follow_the_vqgan():
    config = MarsConfig(text_config=TEXT, vq_config=VQ)
    assert (config.codebook_size, config.downsample_factor) == (50, 4)


def test_tying_follows_the_text_model():
    assert MarsConfig(text_config={**TEXT, "tie_word_embeddings": True}).tie_word_embeddings is True
    assert MarsConfig(text_config=TEXT).tie_word_embeddings is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_config": {"model_type": "llama"}}, "'llama'.*qwen2, qwen3"),
        ({"codebook_size": 60, "vq_config": VQ}, "`codebook_size` is 60, but `vq_config` makes it 50"),
        ({"downsample_factor": 16, "vq_config": VQ}, "`downsample_factor` is 16, but `vq_config` makes it 4"),
        ({"codebook_size": 0}, "`codebook_size` must be 1 or more, got 0"),
        ({"pad_vocab_to_multiple_of": -8}, "`pad_vocab_to_multiple_of` must be 1 or more, got -8"),
        ({"default_image_size": 100}, "multiple of `downsample_factor` .16., got 100"),
        ({"expert_output_projection": True, "use_visual_expert": False}, "`use_visual_expert` is False"),
        ({"text_config": TEXT, "tie_word_embeddings": True}, "`tie_word_embeddings` is True, but .* False"),
        ({"text_config": {**TEXT, "num_key_value_heads": 3}}, "num_attention_heads` .4. must be a multiple"),
        ({"codebok_size": 50}, "`codebok_size`.*did you mean `codebook_size`"),
        ({"use_visual_experts": True}, "did you mean `use_visual_expert`"),
    ],
)
def test_impossible_values_are_refused_with_field_value_and_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        MarsConfig(**fields)


@pytest.mark.parametrize("fields", [{"expert_impl": "loop"}, {"codebook_size": "many"}, {"use_visual_expert": 3}])
def test_values_of_the_wrong_kind_are_refused(fields):
    with pytest.raises(Exception, match=next(iter(fields))):
        MarsConfig(**fields)


def test_an_unknown_key_is_kept_with_one_warning(caplog):
    logger = logging.getLogger("transformers")
    logger.propagate = True
    logging.getLogger("mars_hf").propagate = True
    with caplog.at_level(logging.WARNING):
        config = MarsConfig(text_config=TEXT, favourite_colour="red", zodiac="goat")
    assert config.favourite_colour == "red"
    warnings = [record for record in caplog.records if "favourite_colour" in record.getMessage()]
    assert len(warnings) == 1 and "zodiac" in warnings[0].getMessage()


def test_the_layout_of_a_checkpoint_is_numbered_in_its_file(tmp_path):
    MarsConfig(text_config=TEXT).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["mars_format"] == MARS_FORMAT
    del content["mars_format"]  # as before layouts had numbers
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert MarsConfig.from_pretrained(tmp_path).mars_format == 1


@pytest.mark.parametrize("version", [0, MARS_FORMAT + 1])
def test_a_layout_that_this_code_does_not_know_is_refused(version):
    with pytest.raises(ValueError, match=f"is {version}, but this code reads 1 to {MARS_FORMAT}.*Update mars_hf"):
        MarsConfig(text_config=TEXT, mars_format=version)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    Qwen2Config(**TEXT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'qwen2', but a MARS is of type 'mars'.*mars-hf convert"):
        MarsConfig.from_pretrained(tmp_path)
