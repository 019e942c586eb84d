"""
Training of the small language model of mars-emoji: its tokenizer, packed rows of tokens, and a Qwen2 of 8 layers.

The model is trained once and then frozen for ever, so it is measured for each source of its corpus by itself.

What this file leaves to others: the corpus (`mars_hf.data.text`) and everything that is visual.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from mars_hf.data.text import PICTURE

logger = logging.get_logger(__name__)

INCOMPLETE = "checkpoint-is-incomplete.txt"  # transformers' mark while a checkpoint on SIGTERM is written
END_TOKEN = "<|endoftext|>"
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 6144
ROW_LENGTH = 256
CHAT_TEMPLATE = r"""
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for item in message['content'] if item['type'] == 'text' %}
{{- item['text'] }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()


def train_text_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Qwen2Tokenizer:
    """
    Train a byte-level BPE in the shape of Qwen2's tokenizer: its pre-tokenization, NFC, and its special tokens.

    The special tokens come after the trained ones, as in Qwen2, and `PICTURE` is never part of a token.

    Args:
        texts (`Iterable[str]`): The corpus.
        vocab_size (`int`, defaults to 6144): Size with the 256 bytes and the 3 special tokens.

    Returns:
        `Qwen2Tokenizer`: With `<|endoftext|>` for end and padding, and a chat template for text.

    Raises:
        ValueError: If the corpus is too small for so many tokens.
    """
    shape = Qwen2Tokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = shape.normalizer, shape.pre_tokenizer
    special = [END_TOKEN, *CHAT_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    cuts = re.compile("|".join(map(re.escape, [*special, PICTURE])))
    trained.train_from_iterator((piece for text in texts for piece in cuts.split(text)), trainer)
    bpe = json.loads(trained.to_str())["model"]
    if len(bpe["vocab"]) != vocab_size - len(special):
        raise ValueError(
            f"The texts hold enough for {len(bpe['vocab']) + len(special)} tokens only, but `vocab_size` is "
            f"{vocab_size}. Give more text or a smaller `vocab_size`."
        )
    return Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        extra_special_tokens=CHAT_TOKENS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> list[list[int]]:
    """
    Turn documents into ids. What stands before and after a left-out picture is tokenized apart, as it will be when
    picture tokens stand between.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        documents (`Iterable[str]`): Documents in which `PICTURE` marks the places of pictures.

    Returns:
        `list[list[int]]`: Ids of each document, without an end token.
    """
    pieces = [document.split(PICTURE) for document in documents]
    encoded = iter(tokenizer([text for texts in pieces for text in texts], add_special_tokens=False)["input_ids"])
    return [[token for _ in texts for token in next(encoded)] for texts in pieces]


def pack_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], row_length: int = ROW_LENGTH
) -> torch.Tensor:
    """
    Pack documents one after the other, each followed by the end token, into rows of one length.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        documents (`Iterable[str]`): The documents, in the order of packing.
        row_length (`int`, defaults to 256): Tokens in a row.

    Returns:
        `torch.IntTensor` of shape `(rows, row_length)`: Every token once; the last row is filled up with end tokens.
    """
    end = tokenizer.eos_token_id
    stream = [token for ids in encode_documents(tokenizer, documents) for token in (*ids, end)]
    stream += [end] * (-len(stream) % row_length)
    return torch.tensor(stream, dtype=torch.int32).view(-1, row_length)


class PackedRows(Dataset):
    """
    Packed rows for the Trainer; every token is labelled.

    Args:
        rows (`torch.Tensor` of shape `(rows, row_length)`): From `pack_documents`.
    """

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.rows[index].long()
        return {"input_ids": ids, "labels": ids}


def text_model_config(tokenizer: PreTrainedTokenizerBase, **overrides: Any) -> Qwen2Config:
    """
    Give the configuration of the language model of mars-emoji (7.9 M parameters, embeddings tied).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Gives the vocabulary's size and the end token.
        overrides: Fields that differ.
    """
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return Qwen2Config(**(fields | overrides))


def train_text_model(
    config: Qwen2Config,
    rows: torch.Tensor,
    output_dir: str | Path,
    max_steps: int,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    save_steps: int = 200,
    seed: int = 0,
    bf16: bool = False,
    compile_model: bool = False,
) -> Qwen2ForCausalLM:
    """
    Train a language model from random weights; run again after an interruption, it continues.

    Args:
        config (`Qwen2Config`): The model.
        rows (`torch.Tensor` of shape `(rows, row_length)`): From `pack_documents`, in any order: the Trainer shuffles.
        output_dir (`str` or `Path`): Where checkpoints are kept, the last two.
        max_steps (`int`): Optimizer steps.
        batch_size (`int`, defaults to 16): Rows in a step.
        learning_rate (`float`, defaults to 2e-3): Peak of AdamW's rate; warmed up over 4 % of the steps.
        save_steps (`int`, defaults to 200): Steps between checkpoints.
        seed (`int`, defaults to 0): Seed of weights and order.
        bf16 (`bool`, defaults to `False`): Compute under bfloat16 autocast. Pays where there are matrix units for it.
        compile_model (`bool`, defaults to `False`): Compile the model; on a CPU this takes a C++ compiler, and
            two runs then differ in the last bits.

    Returns:
        `Qwen2ForCausalLM`: The trained model.
    """
    set_seed(seed)
    # On a CPU, eager attention with heads of 64 takes less time than sdpa, whose backward is slow there.
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa" if torch.cuda.is_available() else "eager")
    args = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.04 * max_steps),
        weight_decay=0.1,
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        bf16=bf16,
        torch_compile=compile_model,
        use_cpu=not torch.cuda.is_available(),
        save_steps=save_steps,
        save_total_limit=2,
        logging_steps=50,
        report_to="none",
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    trainer = Trainer(model=model, args=args, train_dataset=PackedRows(rows))
    trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
    return model


def last_checkpoint(output_dir: str | Path) -> str | None:
    """
    Find the last checkpoint that was written to its end, or `None`.

    The Trainer's state is the last file of a checkpoint: where a run died before, it is missing, empty or cut off.
    """
    names = (folder.name.removeprefix("checkpoint-") for folder in Path(output_dir).glob("checkpoint-*"))
    for step in sorted((int(name) for name in names if name.isdigit()), reverse=True):
        folder = Path(output_dir) / f"checkpoint-{step}"
        if _is_complete(folder):
            return str(folder)
        logger.warning_once(f"{folder} was not written to its end and is passed over.")
    return None


def _is_complete(checkpoint: Path) -> bool:
    if (checkpoint / INCOMPLETE).exists():
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def _padded_batches(documents: list[list[int]], end: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield batches of documents of like length between end tokens, filled up with -1 on the right."""
    ordered = sorted(documents, key=len)
    for start in range(0, len(ordered), batch_size):
        batch = [torch.tensor([end, *ids, end]) for ids in ordered[start : start + batch_size]]
        yield torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-1)


@torch.no_grad()
def evaluate_perplexity(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents_by_source: dict[str, list[str]],
    batch_size: int = 32,
) -> dict[str, float]:
    """
    Measure the perplexity per token of each source, end tokens included, each document by itself.

    Args:
        model (`Qwen2ForCausalLM`): Computes in its own dtype.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        documents_by_source (`dict[str, list[str]]`): Held-out documents, such as under `"captions-zh"`.
        batch_size (`int`, defaults to 32): Documents in a batch.

    Returns:
        `dict[str, float]`: The perplexity of each source that has documents.
    """
    model.eval()
    longest = model.config.max_position_embeddings - 1
    perplexities = {}
    for source, documents in documents_by_source.items():
        if not documents:
            continue
        loss, count = 0.0, 0
        encoded = [ids[: longest - 1] for ids in encode_documents(tokenizer, documents)]
        for ids in _padded_batches(encoded, tokenizer.eos_token_id, batch_size):
            ids = ids.to(model.device)
            logits = model(input_ids=ids[:, :-1].clamp_min(0), use_cache=False).logits.float()
            targets = ids[:, 1:].flatten()
            loss += F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1, reduction="sum").item()
            count += int((targets >= 0).sum())
        perplexities[source] = math.exp(loss / count)
    return perplexities
