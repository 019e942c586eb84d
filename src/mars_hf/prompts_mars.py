"""
How prompts are written: MARS's tokens, its chat template, and the text of single prompts.

Rows of texts and pictures, and batches, are `processing_mars.py`'s.
"""

import copy
from collections.abc import Sequence
from typing import cast

from transformers import AddedToken, PreTrainedTokenizerBase

from .configuration_mars import SPECIAL_TOKENS, MarsConfig

END_OF_TEXT = "<|endoftext|>"

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('A role must be system, user or assistant, got ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type not in ['text', 'image'] %}
                {{- raise_exception('A part must be of type text or image, got ' + (part.type | string)) }}
            {%- endif %}
            {{- '<imgpad>' if part.type == 'image' else part.text }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise a user's text: nothing that it says becomes a special id, `<img>` is five characters."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, caption: str, height: int, width: int) -> list[int]:
    """
    Write the prompt of a picture: `"{caption} {height}x{width}"`, sizes in pixels, as in the paper (section 3.4).

    Example:
        >>> tokenizer.decode(prompt_ids(tokenizer, "a red apple", 64, 96))
        'a red apple 64x96'
    """
    return text_ids(tokenizer, f"{caption} {height}x{width}")


def null_prompt_ids(tokenizer: PreTrainedTokenizerBase, height: int, width: int) -> list[int]:
    """
    Write the unconditional prompt of guidance, for training and for decoding: `<null>` in place of the caption. The
    size stays, so that guidance works on the caption alone.
    """
    return [token_id(tokenizer, "<null>"), *text_ids(tokenizer, f" {height}x{width}")]


def lowres_ids(tokenizer: PreTrainedTokenizerBase, code_ids: Sequence[int]) -> list[int]:
    """Write what stands behind both prompts of super-resolution: a low-resolution picture, its codes row by row."""
    return [token_id(tokenizer, "<lowres>"), *code_ids, token_id(tokenizer, "</lowres>")]


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Give the id of a token, which must be there."""
    found = cast(int, tokenizer.convert_tokens_to_ids(token))
    if tokenizer.convert_ids_to_tokens(found) != token:  # an unknown token gets the id of `unk_token`
        raise ValueError(
            f"The tokenizer has no token {token!r}. Build the processor with "
            "`MarsProcessor.from_text_tokenizer(tokenizer, config)`, which adds what MARS needs."
        )
    return found


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, config: MarsConfig) -> PreTrainedTokenizerBase:
    """
    Copy a text tokenizer and name every id of MARS's vocabulary: fillers up to the language model's embedding size,
    the image codes, the six specials, padding. All are special, so that no text ever gives them.

    Args:
        tokenizer (`Qwen2Tokenizer`): The language model's own; not changed.
        config ([`MarsConfig`]): Says where the codes begin and how many there are.

    Returns:
        `Qwen2Tokenizer`: With ids and tokens inverse for every id in `[0, config.vocab_size)`.

    Raises:
        ValueError: If the tokenizer has more ids than the language model, or holds one of the names already.
    """
    first = len(tokenizer)
    if first > config.text_vocab_size:
        raise ValueError(
            f"The tokenizer has {first} tokens, but `config.text_config.vocab_size` is {config.text_vocab_size}: it "
            "belongs to another language model."
        )
    names = [f"<unused_{i}>" for i in range(first, config.text_vocab_size)]
    names += [f"<code_{i}>" for i in range(config.image_start_token_id - config.image_token_offset)]
    names += SPECIAL_TOKENS
    names += [f"<pad_{i}>" for i in range(config.vocab_size - first - len(names))]

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    if tokenizer.convert_tokens_to_ids(names) != list(range(first, config.vocab_size)):
        raise ValueError(
            f"The tokenizer's own tokens are in the way of {names[0]!r} to {names[-1]!r}: expected ids {first} to "
            f"{config.vocab_size - 1}. Start from the language model's own tokenizer."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = END_OF_TEXT
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    context = config.text_config.max_position_embeddings  # type: ignore[union-attr]
    tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    return tokenizer


__all__ = [
    "CHAT_TEMPLATE",
    "END_OF_TEXT",
    "extend_tokenizer",
    "lowres_ids",
    "null_prompt_ids",
    "prompt_ids",
    "text_ids",
    "token_id",
]
