"""
The tokenizer of Qwen v1, whose code is not part of transformers, as a `Qwen2Tokenizer`.

`qwen.tiktoken` lists byte sequences with their ranks. Byte-pair encoding by rank and by merges are the same if each
token's last merge is known, and it is: encoding the token's bytes with the lower ranks alone leaves its two halves.
"""

import base64
import binascii
import os
from pathlib import Path

from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Behind the ranks, in this order (https://huggingface.co/Qwen/Qwen-7B, tokenization_qwen.py). The very first release
# used other names for the last 205 and never made them from text.
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))


def convert_qwen1_tokenizer(path_to_qwen_tiktoken: str | os.PathLike) -> Qwen2Tokenizer:
    """
    Turn Qwen v1's vocabulary file into a transformers tokenizer with the same ids.

    Args:
        path_to_qwen_tiktoken (`str` or `os.PathLike`): The file `qwen.tiktoken` of a Qwen v1 checkpoint.

    Returns:
        `Qwen2Tokenizer`: With the original's ids for every text but one kind: a special token followed by U+0338, with
        which Unicode's form C fuses its `>`. The original normalises first and finds no special token there;
        transformers finds the token first.

    Raises:
        ValueError: If the file is no such list, its ranks have gaps, or one of the 256 bytes is missing.

    Example:
        >>> tokenizer = convert_qwen1_tokenizer("Qwen-7B/qwen.tiktoken")
        >>> tokenizer("<|im_start|>你好")["input_ids"]
        [151644, 108386]
    """
    ranks = read_ranks(Path(path_to_qwen_tiktoken))
    spelling = bytes_to_unicode()
    spelled = {token: "".join(spelling[byte] for byte in token) for token in ranks}
    halves = (split_token(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)
    end_of_text = SPECIALS[0]
    tokenizer = Qwen2Tokenizer(
        vocab={spelled[token]: rank for token, rank in ranks.items()},
        merges=[(spelled[left], spelled[right]) for left, right in halves],
        unk_token=end_of_text,
        eos_token=end_of_text,
        pad_token=end_of_text,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS[1:])})
    if tokenizer.convert_tokens_to_ids(list(SPECIALS)) != list(range(len(ranks), len(ranks) + len(SPECIALS))):
        raise ValueError(f"{path_to_qwen_tiktoken} holds one of the special tokens as a token of text.")
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """
    Read a vocabulary file: a token in base64 and its rank on each line.

    Raises:
        ValueError: If a line is something else, ranks are not 0, 1, 2, .., or one of the 256 bytes is missing.
    """
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            shown = line[:40].decode(errors="replace")
            raise ValueError(
                f"Line {number} of {path} must hold a token in base64 and its rank, got {shown!r}."
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"The ranks in {path} must be 0 to {len(ranks) - 1}, each once. Fetch the file again.")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{path} lacks {len(missing)} of the 256 single bytes: it is no byte-level vocabulary.")
    return ranks


def split_token(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """
    Give the two halves whose merge makes a token.

    Raises:
        ValueError: If the lower ranks do not lead to two halves, so that no merge makes the token.

    Example:
        >>> split_token(b"abc", {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"abc": 4})
        (b'a', b'bc')
    """
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, ranks[token]) for left, right in zip(parts, parts[1:], strict=False)]
        lowest = min(pairs)
        if lowest >= ranks[token]:
            raise ValueError(f"No merge of lower rank leads to token {token!r}: the vocabulary is damaged.")
        place = pairs.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]
