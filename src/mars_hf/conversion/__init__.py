"""Released language models and VQ-GANs become MARS, exactly."""

from .convert import Conversion, convert_to_mars
from .qwen1_tokenizer import convert_qwen1_tokenizer
from .text import ConversionWarning, convert_qwen1_state_dict
from .vqgan import convert_vqgan_state_dict

__all__ = [
    "Conversion",
    "ConversionWarning",
    "convert_qwen1_state_dict",
    "convert_qwen1_tokenizer",
    "convert_to_mars",
    "convert_vqgan_state_dict",
]
