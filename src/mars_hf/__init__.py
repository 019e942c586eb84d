"""
MARS (https://huggingface.co/papers/2407.07614) for transformers: a language model that also draws.

Importing this package is cheap and does nothing: torch and transformers are loaded with the first name that needs
them, and the Auto classes learn of MARS only by [`register`].
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_mars import MarsConfig
    from .generation_mars import MarsGenerationMixin
    from .image_processing_mars import MarsImageProcessor, MarsImageProcessorPil
    from .modeling_mars import MarsForConditionalGeneration, MarsModel
    from .pipeline_mars import MarsAnyToAnyPipeline, MarsPipeline
    from .processing_mars import MarsProcessor
    from .streaming_mars import ImageIteratorStreamer, ImageStreamer

__version__ = "0.1.0"

DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "mars-emoji"

_HOME_OF = {
    "MarsConfig": "configuration_mars",
    "MarsModel": "modeling_mars",
    "MarsForConditionalGeneration": "modeling_mars",
    "MarsGenerationMixin": "generation_mars",
    "MarsImageProcessor": "image_processing_mars",
    "MarsImageProcessorPil": "image_processing_mars",
    "MarsProcessor": "processing_mars",
    "MarsAnyToAnyPipeline": "pipeline_mars",
    "MarsPipeline": "pipeline_mars",
    "ImageStreamer": "streaming_mars",
    "ImageIteratorStreamer": "streaming_mars",
}

__all__ = [
    "DEFAULT_CHECKPOINT",
    "ImageIteratorStreamer",
    "ImageStreamer",
    "MarsAnyToAnyPipeline",
    "MarsConfig",
    "MarsForConditionalGeneration",
    "MarsGenerationMixin",
    "MarsImageProcessor",
    "MarsImageProcessorPil",
    "MarsModel",
    "MarsPipeline",
    "MarsProcessor",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def register() -> None:
    """
    Make the Auto classes and `pipeline("text-to-image")` load MARS from this package, without `trust_remote_code`.

    From then on this package's classes take precedence over the code that a checkpoint carries. Calling it again
    changes nothing.

    Example:
        >>> import mars_hf
        >>> from transformers import AutoModel
        >>> mars_hf.register()
        >>> model = AutoModel.from_pretrained(mars_hf.DEFAULT_CHECKPOINT)
    """
    import transformers
    from transformers.pipelines import PIPELINE_REGISTRY

    from .configuration_mars import MarsConfig
    from .image_processing_mars import MarsImageProcessor, MarsImageProcessorPil
    from .modeling_mars import MarsForConditionalGeneration
    from .pipeline_mars import MarsPipeline
    from .processing_mars import MarsProcessor

    transformers.AutoConfig.register(MarsConfig.model_type, MarsConfig, exist_ok=True)
    for auto_class in (
        transformers.AutoModel,
        transformers.AutoModelForMultimodalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForCausalLM,
    ):
        auto_class.register(MarsConfig, MarsForConditionalGeneration, exist_ok=True)
    transformers.AutoProcessor.register(MarsConfig, MarsProcessor, exist_ok=True)
    backends = {"torchvision": MarsImageProcessor, "pil": MarsImageProcessorPil}
    transformers.AutoImageProcessor.register(MarsConfig, image_processor_classes=backends, exist_ok=True)
    transformers.AutoTokenizer.register(MarsConfig, transformers.Qwen2Tokenizer, exist_ok=True)
    if "text-to-image" not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            "text-to-image", MarsPipeline, transformers.AutoModelForMultimodalLM, type="multimodal"
        )
