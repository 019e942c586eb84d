"""transformers' own tests of models and configurations, and of tensor parallelism on two ranks, on MARS."""

import copy
import tempfile
import unittest
from collections.abc import Callable
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from deviations import skip_listed
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers_tests import test_modeling_common, test_tensor_parallel_mixin
from transformers_tests.distributed_testing_utils import run_distributed
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin

from mars_hf import MarsConfig, MarsForConditionalGeneration, MarsModel
from mars_hf.modeling_mars import MarsPreTrainedModel

TEXT = {
    "model_type": "qwen2",
    "vocab_size": 99,  # not even, as the suite for tensor parallelism wants it
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VQGAN = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 8, 8],
    "norm_num_groups": 4,
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 39,
    "mid_block_add_attention": False,
}


class MarsModelTester:
    """What the suites ask for: a tiny configuration, and rows of text, a picture, text."""

    base_model_class = MarsModel
    conditional_generation_class = MarsForConditionalGeneration
    is_training = True
    num_hidden_layers = TEXT["num_hidden_layers"]
    num_attention_heads = TEXT["num_attention_heads"]
    hidden_size = TEXT["hidden_size"]
    batch_size = 3
    image_size = 8
    num_codes = 4
    seq_length = 12

    def __init__(self):
        self.with_pictures = True

    def get_config(self) -> MarsConfig:
        # All experts, so that every entry of the tensor-parallel plan has its module; no padding rows, whose logits of
        # -inf the suites take for a failure.
        fields = {"expert_output_projection": True, "pad_vocab_to_multiple_of": 1, "default_image_size": 8}
        return MarsConfig(text_config=copy.deepcopy(TEXT), vq_config=copy.deepcopy(VQGAN), **fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[MarsConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        ids = ids_tensor([self.batch_size, self.seq_length], config.text_vocab_size)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.with_pictures:
            ids[:, 4] = config.image_start_token_id
            ids[:, 5 : 5 + self.num_codes] = config.image_pad_token_id
            ids[:, 5 + self.num_codes] = config.image_end_token_id
            inputs["pixel_values"] = torch.rand(self.batch_size, 3, self.image_size, self.image_size) * 2 - 1
        return config, inputs


def on_text_only(test: Callable) -> Callable:
    @wraps(test)
    def run(self, *args: Any, **kwargs: Any) -> None:
        self.model_tester.with_pictures = False
        test(self, *args, **kwargs)

    return run


def loading_leniently(test: Callable) -> Callable:
    @wraps(test)
    def run(self, *args: Any, **kwargs: Any) -> None:
        with patch.object(MarsPreTrainedModel, "from_pretrained", vars(PreTrainedModel)["from_pretrained"]):
            test(self, *args, **kwargs)

    return run


@skip_listed
class MarsModelSuite(ModelTesterMixin, GenerationTesterMixin, TensorParallelTesterMixin, unittest.TestCase):
    all_model_classes = (MarsModel, MarsForConditionalGeneration)
    _is_composite = True
    test_resize_embeddings = False
    test_all_params_have_gradient = False
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        test_modeling_common.global_rng.seed(0)
        self.model_tester = MarsModelTester()
        # The library runs these for a few of its own models only.
        self.enterContext(patch.object(test_tensor_parallel_mixin, "TP_DISTRIBUTED_TEST_MODEL_TYPES", None))

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if model_class is MarsModel:
            inputs.pop("pixel_values", None)
        return inputs

    def test_config(self) -> None:
        fields = {"codebook_size": 39, "downsample_factor": 4, "pad_vocab_to_multiple_of": 4}
        ConfigTester(self, config_class=MarsConfig, **fields).run_common_tests()

    @loading_leniently
    def test_base_model_prefix_loads_base_weights(self) -> None:
        super().test_base_model_prefix_loads_base_weights()

    @loading_leniently
    def test_can_init_all_missing_weights(self) -> None:
        super().test_can_init_all_missing_weights()

    @loading_leniently
    def test_correct_missing_keys(self) -> None:
        super().test_correct_missing_keys()

    @loading_leniently
    def test_model_weights_reload_no_missing_tied_weights(self) -> None:
        super().test_model_weights_reload_no_missing_tied_weights()

    @on_text_only
    def test_inputs_embeds(self) -> None:
        super().test_inputs_embeds()

    @on_text_only
    def test_inputs_embeds_matches_input_ids(self) -> None:
        super().test_inputs_embeds_matches_input_ids()

    def test_keep_in_fp32_modules(self) -> None:
        with patch.object(MarsForConditionalGeneration, "_keep_in_fp32_modules", None):
            super().test_keep_in_fp32_modules()

    def test_two_ranks_draw_what_one_model_draws(self) -> None:
        """The suite's own tests of tensor parallelism write text; this one draws, with guidance."""
        torch.manual_seed(0)
        model = MarsForConditionalGeneration(self._get_tp_config())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            run_distributed(world_size=self.tensor_parallel_size)(_draw_on_a_rank)(folder)


def _draw_on_a_rank(rank: int, folder: str) -> None:
    parallel = DistributedConfig(tp_size=torch.distributed.get_world_size())
    sharded = MarsForConditionalGeneration.from_pretrained(folder, distributed_config=parallel)
    whole = MarsForConditionalGeneration.from_pretrained(folder)
    ids = torch.arange(10).view(2, 5) + 2
    options = {"generation_mode": "image", "do_sample": False, "guidance_scale": 2.0, "output_scores": True}
    options |= {"negative_input_ids": torch.tensor([[whole.config.null_token_id, 3]] * 2)}
    drawn, expected = (model.generate(ids, return_dict_in_generate=True, **options) for model in (sharded, whole))
    assert torch.equal(drawn.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(drawn.scores), torch.stack(expected.scores), atol=1e-5, rtol=1e-5)
    assert sharded.vision_head.weight.to_local().shape != whole.vision_head.weight.shape
