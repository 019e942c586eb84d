"""What all tests share: no network, a fixed seed, tiny models, and the switch `--slow`."""

import os
from collections.abc import Callable, Iterator

# Before anything imports a library of the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Every test starts from the same random state, and gives back the threads that it took: they decide last bits."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield 0
    torch.set_num_threads(threads)


@pytest.fixture
def make_text_model() -> Callable:
    """Make random language models of two layers, as transformers has them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    def make(family: str = "qwen2", tied: bool = False, vocab_size: int = 96, **changes):
        classes = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
        config_class, model_class = classes[family]
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2}
        sizes |= {"head_dim": 12} if family == "qwen3" else {}
        ids = {"eos_token_id": 1, "pad_token_id": 1}
        config = config_class(vocab_size=vocab_size, tie_word_embeddings=tied, **{**sizes, **ids, **changes})
        model = model_class(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # the library starts them at zero, which hides them from a test
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    return make


@pytest.fixture
def make_vqgan() -> Callable:
    """Make random VQ-GANs with a downsampling of 4."""
    from diffusers import VQModel

    def make(num_codes: int = 40):
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
        sizes = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 4, "vq_embed_dim": 4}
        model = VQModel(**blocks, **sizes, num_vq_embeddings=num_codes, mid_block_add_attention=False).eval()
        torch.nn.init.normal_(model.quantize.embedding.weight)
        return model

    return make


@pytest.fixture
def make_model(make_text_model, make_vqgan) -> Callable:
    """Make random MARS models whose visual experts differ from the text experts."""
    from mars_hf import MarsForConditionalGeneration

    def make(family: str = "qwen2", tied: bool = False, vq: bool = True, attn_implementation: str = "sdpa", **fields):
        text_model = make_text_model(family, tied, **fields.pop("text", {}))
        sizes = {} if vq else {"codebook_size": 40, "downsample_factor": 4}
        fields = {"default_image_size": 16, **sizes, **fields}
        model = MarsForConditionalGeneration.from_text_and_vq(text_model, make_vqgan() if vq else None, **fields)
        model.set_attn_implementation(attn_implementation)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("visual_" in name or "vision_head" in name):
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    return make


@pytest.fixture
def tiny_model(make_model):
    """A random MARS that any text fits: bytes as its vocabulary, pictures of 16 x 16 pixels in 16 codes."""
    return make_model(text={"vocab_size": 264, "eos_token_id": 256, "pad_token_id": 256})


@pytest.fixture
def tiny_processor(tiny_model):
    """The processor of `tiny_model`."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    from mars_hf import MarsProcessor

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": tokens[-2:]})
    return MarsProcessor.from_text_tokenizer(tokenizer, tiny_model.config)
