"""transformers' own tests of processors and image processors, on MARS."""

import unittest
from typing import Any

import numpy as np
import torch
from deviations import skip_listed
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer
from transformers.utils import is_torchvision_available
from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from transformers_tests.test_processing_common import ProcessorTesterMixin

from mars_hf import MarsConfig, MarsImageProcessor, MarsImageProcessorPil, MarsProcessor
from mars_hf.prompts_mars import extend_tokenizer

DOWNSAMPLE_FACTOR = 4


@skip_listed
class MarsProcessorSuite(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MarsProcessor

    @classmethod
    def _setup_image_processor(cls) -> MarsImageProcessor:
        return MarsImageProcessor(size={"height": 16, "width": 16}, downsample_factor=DOWNSAMPLE_FACTOR)

    @classmethod
    def _setup_tokenizer(cls) -> Qwen2Tokenizer:
        tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
        tokenizer.add_special_tokens({"additional_special_tokens": tokens[-2:]})
        text = {"model_type": "qwen2", "vocab_size": 264, "max_position_embeddings": 512}
        config = MarsConfig(text_config=text, codebook_size=40, downsample_factor=DOWNSAMPLE_FACTOR)
        return extend_tokenizer(tokenizer, config)

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {"max_image_size": 512}

    def test_model_input_names(self) -> None:
        processor = self.get_processor()
        text, picture = self.prepare_text_inputs(modalities="image"), self.prepare_images_inputs()
        reading, drawing = processor(text=text, images=picture), processor(text=text, height=8, width=8)
        self.assertSetEqual({*reading, *drawing}, set(processor.model_input_names))

    def test_subprocessor_defaults_1_images(self) -> None:
        processor, picture = self.get_processor(), self.prepare_images_inputs()
        mine, theirs = processor(images=picture), processor.image_processor(picture, return_tensors="pt")
        torch.testing.assert_close(mine["pixel_values"], theirs["pixel_values"])
        self.assertEqual(mine["image_sizes"].tolist(), [theirs["image_sizes"].tolist()])

    def test_call_arguments_not_in_processor_kwargs(self) -> None:
        named = self._get_explicit_arguments(MarsProcessor.__call__)
        self.assertSetEqual(named & self._get_valid_processor_kwargs_names(), {"height", "width"})


class MarsImageProcessingTester(ImageProcessingTester):
    """Pictures that are wider than high, in 4 x 6 codes."""

    def __init__(self, parent: unittest.TestCase, **kwargs: Any):
        kwargs = {"size": {"height": 16, "width": 24}, "downsample_factor": DOWNSAMPLE_FACTOR, **kwargs}
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self) -> dict[str, type]:
        # The suite looks them up in the library's own table, by the name of this folder.
        torchvision = {"torchvision": MarsImageProcessor} if is_torchvision_available() else {}
        return {**torchvision, "pil": MarsImageProcessorPil}


@skip_listed
class MarsImageProcessorSuite(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = MarsImageProcessingTester

    def test_call_numpy_4_channels(self) -> None:
        tester = self.image_processor_tester
        pictures = tester.prepare_image_inputs(num_channels=4, numpify=True)
        for picture in pictures:
            picture[..., 3] = 0
        for image_processing_class in self.image_processing_classes.values():
            encoded = image_processing_class(**self.image_processor_dict)(pictures, return_tensors="pt").pixel_values
            self.assertEqual(tuple(encoded.shape), (tester.batch_size, *tester.expected_output_image_shape(pictures)))
            np.testing.assert_allclose(encoded, 1.0, atol=1e-6)

    def test_new_models_require_torchvision_backend(self) -> None:
        self.assertEqual("torchvision" in self.image_processing_classes, is_torchvision_available())
