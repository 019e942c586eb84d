"""
What `generation.py` compares: models of one shape with random weights that draw codes, each by a loop of its own.

All have the trunk of Qwen2.5-0.5B. Tensors that two models name alike are one tensor, so that a process with all of
them holds the trunk once, and a second time as our visual experts. Every system guides its codes and samples them
without top-k or top-p, from prompts of `PROMPT` tokens and unconditional prompts of `NEGATIVE`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isqrt

import torch
from accelerate import init_empty_weights
from torch.nn import functional as F
from transformers import (
    CompileConfig,
    DynamicCache,
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)

from mars_hf import MarsConfig, MarsForConditionalGeneration

PROMPT, NEGATIVE = 16, 8  # tokens
GUIDANCE_SCALE = 3.0
STEPS = (1, 4, 16)  # the K of ours
FACTOR = 16  # pixels a side for one code
# Ids that some system gives a meaning. Prompts hold none of them.
PAD, BEGIN, BEGIN_IMAGE, END_LINE, END_FRAME, END_IMAGE, END, PLACEHOLDER = SPECIALS = range(8)


@dataclass(frozen=True)
class Shape:
    """Sizes that all systems share: Qwen2.5-0.5B's, with the 8,192 codes of MARS."""

    hidden_size: int = 896
    intermediate_size: int = 4864
    num_layers: int = 24
    num_heads: int = 14
    num_key_value_heads: int = 2
    num_text_ids: int = 151_936
    num_codes: int = 8192

    @property
    def joint_vocabulary(self) -> int:
        """Number of ids of text and codes."""
        return self.num_text_ids + self.num_codes

    def smaller(self, num_layers: int, scale: int) -> "Shape":
        """Give a shape for trying things out, with fewer layers and all widths divided by `scale`."""
        names = ("hidden_size", "intermediate_size", "num_text_ids", "num_codes")
        return Shape(num_layers=num_layers, **{name: getattr(self, name) // scale for name in names})

    def trunk(self, vocab_size: int) -> dict:
        """Give the fields of a language model's configuration."""
        sizes = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size}
        heads = {"num_attention_heads": self.num_heads, "num_key_value_heads": self.num_key_value_heads}
        ids = {"pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": None}
        return {**sizes, **heads, **ids, "num_hidden_layers": self.num_layers, "vocab_size": vocab_size}

    def prompts(self, batch: int, length: int, seed: int = 0) -> torch.Tensor:
        """Give text ids `(batch, length)`."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(SPECIALS), self.num_text_ids, (batch, length), generator=generator)


class Weights:
    """
    Random tensors by name and size, made when they are first asked for.

    Args:
        shape ([`Shape`]): Of all models.
        dtype (`torch.dtype`): Of all tensors.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype):
        self.shape, self.dtype = shape, dtype
        self.tensors: dict[tuple, torch.Tensor] = {}

    def tensor(self, name: str, size: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """Give the tensor that models call `name`; embeddings and heads of ids are rows of one table, as if tied."""
        if name.split(".")[-2] in ("embed_tokens", "lm_head", "text_head"):
            return self._made("table", (self.shape.joint_vocabulary, self.shape.hidden_size))[: size[0]]
        own = name.split("layers.")[-1] if "layers." in name else ".".join(name.split(".")[-2:])
        return self._made(own, tuple(size))

    def _made(self, name: str, size: tuple[int, ...]) -> torch.Tensor:
        if (name, size) not in self.tensors:
            tensor = torch.empty(size, dtype=self.dtype)
            self.tensors[name, size] = tensor.fill_(1.0) if "norm" in name else tensor.normal_(std=0.02)
        return self.tensors[name, size]

    def build(self, model_class: type[PreTrainedModel], config) -> PreTrainedModel:
        """Make a model of these tensors."""
        with init_empty_weights(include_buffers=False):
            model = model_class(config)
        state = model.state_dict()
        model.load_state_dict({n: self.tensor(n, t.shape) if t.is_meta else t for n, t in state.items()}, assign=True)
        model.tie_weights()
        return model.eval()


def grid_of(num_codes: int) -> tuple[int, int]:
    """Give rows and columns of a picture, as square as its number of codes allows."""
    height = next(side for side in range(isqrt(num_codes), 0, -1) if num_codes % side == 0)
    return height, num_codes // height


class System:
    """
    A model and its way to draw.

    Args:
        weights ([`Weights`]): What the model is made of.
    """

    model: PreTrainedModel
    is_compiled = False

    def __init__(self, weights: Weights):
        self.shape = weights.shape

    @property
    def called(self) -> torch.nn.Module:
        """The module that the loop calls once a step."""
        return self.model

    def draw(self, batch: int, num_codes: int) -> torch.Tensor:
        """Draw pictures; give their codes `(batch, num_codes)`."""
        raise NotImplementedError

    def weight_bytes(self) -> int:
        """Add up what the tensors of the model take, tied ones once."""
        return sum({t.data_ptr(): t.nbytes for t in self.model.state_dict().values()}.values())

    def rows(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Give conditional over unconditional prompts `(2 * batch, PROMPT)`, left-padded, and their mask."""
        conditional = self.shape.prompts(batch, PROMPT)
        unconditional = F.pad(self.shape.prompts(1, NEGATIVE, seed=1), (PROMPT - NEGATIVE, 0)).expand(batch, -1)
        ids = torch.cat([conditional, unconditional])
        return ids, (ids != PAD).long()


class Floor(System):
    """The practical floor: a bare loop over the dense trunk and a head of codes; nothing checked, padded or masked."""

    def __init__(self, weights: Weights):
        super().__init__(weights)
        self.model = weights.build(Qwen2Model, Qwen2Config(**self.shape.trunk(self.shape.joint_vocabulary)))
        self.head = weights.tensor("vision_head.weight", (self.shape.num_codes, self.shape.hidden_size))

    @torch.no_grad()
    def draw(self, batch: int, num_codes: int) -> torch.Tensor:
        cache, drawn = DynamicCache(config=self.model.config), []
        tokens = self.shape.prompts(2 * batch, PROMPT)
        for _ in range(num_codes):
            states = self.model(tokens, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            conditional, unconditional = F.linear(states, self.head).float().chunk(2)
            chances = torch.lerp(unconditional, conditional, GUIDANCE_SCALE).softmax(-1)
            drawn.append(torch.multinomial(chances, 1))
            tokens = (drawn[-1] + self.shape.num_text_ids).repeat(2, 1)
        return torch.cat(drawn, dim=1)

    def weight_bytes(self) -> int:
        return super().weight_bytes() + self.head.nbytes


class GuidedCodes(LogitsProcessor):
    """
    Guidance over rows of which the second half is unconditional. A row and its unconditional one have to go on with
    the same code, so it is sampled here, and all others are forbidden.
    """

    def __init__(self, num_text_ids: int):
        self.num_text_ids = num_text_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = scores[:, self.num_text_ids :].chunk(2)
        chances = torch.lerp(unconditional, conditional, GUIDANCE_SCALE).softmax(-1)
        code = torch.multinomial(chances, 1).repeat(2, 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, code + self.num_text_ids, 0.0)


class OnlyCodes(LogitsProcessor):
    """Forbids text."""

    def __init__(self, num_text_ids: int):
        self.num_text_ids = num_text_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, : self.num_text_ids] = -torch.inf
        return scores


class Qwen2(System):
    """
    transformers' `Qwen2ForCausalLM.generate` over a joint vocabulary.

    Args:
        is_batched (`bool`, defaults to `True`):
            Guide by a processor over rows of both kinds in one batch. `False` is the library's own `guidance_scale`,
            which calls the model a second time for the unconditional rows.
    """

    def __init__(self, weights: Weights, is_batched: bool = True):
        super().__init__(weights)
        config = Qwen2Config(**self.shape.trunk(self.shape.joint_vocabulary), tie_word_embeddings=True)
        self.model, self.is_batched = weights.build(Qwen2ForCausalLM, config), is_batched

    def draw(self, batch: int, num_codes: int) -> torch.Tensor:
        ids, mask = self.rows(batch)
        if self.is_batched:
            processor = GuidedCodes(self.shape.num_text_ids)
            settings = {"input_ids": ids, "attention_mask": mask, "do_sample": False}
        else:
            processor = OnlyCodes(self.shape.num_text_ids)
            settings = {"input_ids": ids[:batch], "do_sample": True, "top_k": 0, "guidance_scale": GUIDANCE_SCALE}
            settings |= {"negative_prompt_ids": ids[batch:], "negative_prompt_attention_mask": mask[batch:]}
        drawn = self.model.generate(
            **settings, max_new_tokens=num_codes, logits_processor=LogitsProcessorList([processor])
        )
        return drawn[:batch, -num_codes:] - self.shape.num_text_ids


class Emu3(System):
    """
    transformers' `Emu3ForConditionalGeneration.generate` as its documentation draws with it: negative prompts, and a
    function that names the allowed tokens of each row and step. Its format ends every row of codes with a token and
    the picture with three more; they count as time, not as codes.
    """

    def __init__(self, weights: Weights):
        super().__init__(weights)
        text = {**self.shape.trunk(self.shape.joint_vocabulary), "eos_token_id": END, "tie_word_embeddings": True}
        first = self.shape.num_text_ids
        vocabulary = {f"<|visual token {code:06d}|>": first + code for code in range(self.shape.num_codes)}
        vocabulary |= {"<image>": PLACEHOLDER, "<|extra_200|>": END_LINE}
        # The smallest VQ-VAE: drawing codes does not need it.
        vq = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "attn_resolutions": []}
        vq |= {"codebook_size": self.shape.num_codes, "hidden_size": 32}
        config = Emu3Config(text_config=text, vq_config=vq, vocabulary_map=vocabulary, tie_word_embeddings=True)
        self.model = weights.build(Emu3ForConditionalGeneration, config)

    def draw(self, batch: int, num_codes: int) -> torch.Tensor:
        height, width = grid_of(num_codes)
        visual_tokens, length = self.model.vocabulary_mapping.image_tokens, (width + 1) * height
        ids, mask = self.rows(batch)
        ids[:batch, -1] = BEGIN_IMAGE

        def allowed(row: int, tokens: torch.Tensor) -> tuple[int, ...] | list[int]:
            place = len(tokens) - int((tokens == BEGIN_IMAGE).nonzero()[0])  # 1 for the first code
            if place > length:
                return ((END_FRAME, END_IMAGE, END)[place - length - 1],)
            return (END_LINE,) if place % (width + 1) == 0 else visual_tokens

        drawn = self.model.generate(
            ids[:batch],
            attention_mask=mask[:batch],
            negative_prompt_ids=ids[batch:],
            negative_prompt_attention_mask=mask[batch:],
            guidance_scale=GUIDANCE_SCALE,
            prefix_allowed_tokens_fn=allowed,
            max_new_tokens=length + 3,
            do_sample=True,
            top_k=0,
        )
        lines = drawn[:, PROMPT : PROMPT + length].unflatten(1, (height, width + 1))
        return lines[..., :-1].flatten(1) - self.shape.num_text_ids


class Janus(System):
    """transformers' `JanusForConditionalGeneration.generate` in its image mode, with a Llama of the same shape."""

    def __init__(self, weights: Weights):
        super().__init__(weights)
        text = {"model_type": "llama", **self.shape.trunk(self.shape.num_text_ids), "tie_word_embeddings": True}
        hidden = self.shape.hidden_size
        # What encodes and decodes pictures is as small as it gets; embeddings and head of codes are Janus-Pro's.
        vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 32}
        vision |= {"projection_dim": hidden}
        vq = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 32}
        vq |= {"num_embeddings": self.shape.num_codes, "projection_dim": hidden, "image_token_embed_dim": hidden}
        config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=PLACEHOLDER)
        self.model = weights.build(JanusForConditionalGeneration, config)
        self.model.generation_config.generation_kwargs = {"boi_token_id": BEGIN_IMAGE}

    @property
    def called(self) -> torch.nn.Module:
        return self.model.model.language_model

    def draw(self, batch: int, num_codes: int) -> torch.Tensor:
        self.model.model.vision_model.config.num_image_tokens = num_codes
        ids = self.shape.prompts(batch, PROMPT)
        ids[:, 0], ids[:, -1] = BEGIN, BEGIN_IMAGE
        settings = {"guidance_scale": GUIDANCE_SCALE, "do_sample": True, "top_k": 0}
        ids_of_config = {"bos_token_id": BEGIN, "pad_token_id": PAD}
        mask = torch.ones_like(ids)
        return self.model.generate(ids, attention_mask=mask, generation_mode="image", **settings, **ids_of_config)


class BeginPictures(LogitsProcessor):
    """Lets row `r` begin a picture at step 4 + 2r of every 32 and at no other: random weights would not begin one."""

    def __init__(self, image_start_token_id: int):
        self.image_start_token_id, self.step = image_start_token_id, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        begins = (self.step - 2 * torch.arange(len(scores))) % 32 == 4
        start = scores[:, self.image_start_token_id]
        scores[:, self.image_start_token_id] = torch.where(begins, start + 1e4, -torch.inf)  # -inf if it has no room
        self.step += 1
        return scores


class Ours(System):
    """
    MARS.

    Args:
        codes_per_step (`int`, defaults to 1): K.
        is_compiled (`bool`, defaults to `False`): A static cache and a compiled step.
    """

    def __init__(self, weights: Weights, codes_per_step: int = 1, is_compiled: bool = False):
        super().__init__(weights)
        self.k, self.is_compiled = codes_per_step, is_compiled
        text = Qwen2Config(**self.shape.trunk(self.shape.num_text_ids), tie_word_embeddings=True)
        codes = {"codebook_size": self.shape.num_codes, "downsample_factor": FACTOR, "codes_per_step": list(STEPS)}
        self.model = weights.build(MarsForConditionalGeneration, MarsConfig(text_config=text, **codes))
        self.model.freeze_text()  # as a checkpoint is loaded
        self.cache_settings = {}
        if is_compiled:
            compilation = CompileConfig(fullgraph=True, dynamic=False, mode="default")
            compilation._compile_all_devices = True  # by itself the library compiles on accelerators only
            self.cache_settings = {"cache_implementation": "static", "compile_config": compilation}

    def inputs(self, batch: int, num_codes: int) -> dict[str, torch.Tensor]:
        """Give what a processor would: the unconditional rows begin with `<null>`."""
        ids, mask = self.rows(batch)
        negative, negative_mask = ids[batch:, -NEGATIVE:].clone(), mask[batch:, -NEGATIVE:]
        negative[:, 0] = self.model.config.null_token_id
        size = torch.tensor(grid_of(num_codes)) * FACTOR
        rows = {"input_ids": ids[:batch], "attention_mask": mask[:batch], "image_sizes": size.expand(batch, 1, 2)}
        return {**rows, "negative_input_ids": negative, "negative_attention_mask": negative_mask}

    def settings(self) -> dict:
        """Give what image and interleaved mode are called with."""
        sampling = {"do_sample": True, "top_k": 0, "guidance_scale": GUIDANCE_SCALE}
        return {**sampling, **self.cache_settings, "codes_per_step": self.k}

    def draw(self, batch: int, num_codes: int) -> torch.Tensor:
        drawn = self.model.generate(
            **self.inputs(batch, num_codes), generation_mode="image", pad_token_id=PAD, **self.settings()
        )
        return drawn[:, PROMPT + self.k : -1] - self.model.config.image_token_offset

    def write(self, batch: int, num_codes: int) -> torch.Tensor:
        """Write documents of some words, a picture and some words; rows are at different places all the time."""
        begin = BeginPictures(self.model.config.image_start_token_id)
        return self.model.generate(
            **self.inputs(batch, num_codes),
            generation_mode="interleaved",
            max_new_tokens=num_codes + self.k + 24,
            logits_processor=LogitsProcessorList([begin]),
            pad_token_id=PAD,
            **self.settings(),
        )


# What a system is called on the command line: its title in tables, and how it is made of weights.
SYSTEMS: dict[str, tuple[str, Callable[[Weights], System]]] = {
    "floor": ("bare loop over the dense trunk (the floor)", Floor),
    "qwen2": ("transformers, `Qwen2ForCausalLM`", Qwen2),
    "qwen2-unbatched": ("the same, guided by `guidance_scale`", partial(Qwen2, is_batched=False)),
    "emu3": ("transformers, `Emu3ForConditionalGeneration`", Emu3),
    "janus": ("transformers, `JanusForConditionalGeneration`", Janus),
    **{f"ours-{k}": (f"ours, K = {k}", partial(Ours, codes_per_step=k)) for k in STEPS},
    **{
        f"ours-{k}-compiled": (f"ours, K = {k}, compiled", partial(Ours, codes_per_step=k, is_compiled=True))
        for k in STEPS
    },
}
