"""
Stage I, text-to-image alignment (the paper's section 3.4): text-to-image and captioning by next-token prediction.

A training row is one or two stretches of one modality: text then a picture, or a picture then text. Each stretch is a
dense call on the keys and values of the one before, which is the mixed call without its routing. Text in front of a
picture has no trainable part, so it runs without gradient; the picture's stretch has one shape for all batches and
can be compiled. Both are exact, as a test shows against the plain forward, but for the `<null>` of unconditional
prompts: it is read by the visual experts and gets no gradient of its own.

What this file leaves to others: later stages, streaming data, packing.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset as HfDataset
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler, SequentialSampler
from tqdm.auto import tqdm
from transformers import DynamicCache, Trainer, TrainingArguments

from ..data.text import caption_phrases, with_style
from ..drawing_mars import position_ids_of
from ..image_processing_mars import encode_pixels
from ..modeling_mars import MarsForConditionalGeneration, Vocabulary
from ..processing_mars import MarsProcessor, null_prompt_ids, prompt_ids, text_ids

TASKS = ("text-to-image", "captioning")
VOCABULARY_OF_SCOPE: dict[str, Vocabulary] = {"joint": "all", "grammar": "visual"}


@dataclass(frozen=True)
class CaptionStyle:
    """
    How often a caption takes which form. Shares are probabilities.

    Args:
        chinese (`float`): Chinese instead of English.
        named_style (`float`): The drawing style is named: "red apple, twemoji style", "红苹果，twemoji 风格".
        phrase (`float`): An article or "a picture of" in either language stands in front.
        null (`float`): The caption of a text-to-image row is replaced by `<null>`.
    """

    chinese: float = 0.5
    named_style: float = 0.75
    phrase: float = 0.2
    null: float = 0.1


def emoji_caption(record: dict[str, str], rng: random.Random, style: CaptionStyle = CaptionStyle()) -> str:  # noqa: B008
    """
    Write a caption of an emoji record in one of its forms.

    Args:
        record (`dict`): With `caption_en`, `caption_zh` and `style`.
        rng (`random.Random`): Decides the form.
        style ([`CaptionStyle`]): How often which form.

    Example:
        >>> emoji_caption({"caption_en": "red apple", "caption_zh": "红苹果", "style": "noto"}, random.Random(1))
        '红苹果'
    """
    chinese, named, phrased = (rng.random() < share for share in (style.chinese, style.named_style, style.phrase))
    language = "zh" if chinese else "en"
    label, *phrases = caption_phrases(record[f"caption_{language}"], language)  # the forms that the LM was taught
    caption = rng.choice(phrases) if phrased and phrases else label
    return with_style(caption, record["style"], language) if named else caption


def encode_pictures(
    model: MarsForConditionalGeneration, processor: MarsProcessor, data: HfDataset, batch_size: int = 64
) -> torch.LongTensor:
    """
    Turn the pictures of a data set, all of one size, into codes.

    Returns:
        `torch.LongTensor` of shape `(num, codes)`: Codebook indices in raster order.
    """
    codes = []
    for start in tqdm(range(0, len(data), batch_size), desc="Encoding pictures", unit="batch"):
        images = data[start : start + batch_size]["image"]
        pixels = processor.image_processor(images, do_resize=False, return_tensors="pt")["pixel_values"]
        codes += [grid.flatten().cpu() for grid in encode_pixels(model.vqgan, pixels.to(model.vqgan.device))]
    return torch.stack(codes)


SKIN_TONES = frozenset(("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"))


def subject_weights(hexcodes: Sequence[str], exponent: float = 0.5) -> torch.Tensor:
    """
    Weigh emoji so that subjects with many variants of skin tone do not crowd out those with one.

    Args:
        hexcodes (`Sequence[str]`): Code points of each record, joined by "-".
        exponent (`float`, defaults to 0.5): 0 weighs records alike, 1 subjects.

    Returns:
        `torch.Tensor` of shape `(num,)`: Sums to 1.

    Example:
        >>> subject_weights(["1F44B", "1F44B-1F3FB", "1F44B-1F3FC", "1F34E"], exponent=1.0)
        tensor([0.1667, 0.1667, 0.1667, 0.5000])
    """
    subjects = ["-".join(part for part in code.split("-") if part not in SKIN_TONES) for code in hexcodes]
    sizes = Counter(subjects)
    weights = torch.tensor([sizes[subject] ** -exponent for subject in subjects])
    return weights / weights.sum()


class AlignmentDataset(Dataset):
    """
    Rows of Stage I: index `i` is a record, a task and a caption's form, all decided by `i` and the seed.

    Every block of `batch_size` consecutive indices has one task. Each pass has an order of its own, in which every
    record comes once, or with `weights` as often as chance has it; a run that stops and resumes sees the same rows.

    Args:
        processor ([`MarsProcessor`]): Writes prompts and captions.
        records (`Sequence[dict]`): With `caption_en`, `caption_zh` and `style`.
        codes (`torch.LongTensor` of shape `(num, codes)`): The records' pictures.
        image_size (`tuple[int, int]`): Height and width of the pictures in pixels.
        batch_size (`int`): Rows of a batch.
        num_batches (`int`): Batches in all.
        captioning_share (`float`): Share of batches that caption.
        captions ([`CaptionStyle`]): Forms of captions.
        code_noise (`float`):
            Largest share of the codes fed in text-to-image rows that are replaced by random ones (labels are not);
            each row draws its own share. A picture of a small data set can be told by its first codes: without noise
            the model comes to lean on them instead of on the prompt, and goes astray on its own drawings.
        weights (`torch.Tensor` of shape `(num,)`, *optional*): How often each record comes, see [`subject_weights`].
        seed (`int`): Decides all else.
    """

    def __init__(
        self,
        processor: MarsProcessor,
        records: Sequence[dict[str, str]],
        codes: torch.LongTensor,
        image_size: tuple[int, int],
        batch_size: int,
        num_batches: int,
        captioning_share: float = 0.06,
        captions: CaptionStyle = CaptionStyle(),  # noqa: B008
        code_noise: float = 1.0,
        weights: torch.Tensor | None = None,
        seed: int = 0,
    ):
        if len(records) != len(codes):
            raise ValueError(
                f"Every record needs its codes, got {len(records)} records and {len(codes)} rows of codes."
            )
        self.tokenizer, self.records, self.codes = processor.tokenizer, records, codes
        self.offset = processor.image_token_offset
        self.image_size, self.batch_size, self.num_batches = image_size, batch_size, num_batches
        self.captioning_share, self.captions, self.seed = captioning_share, captions, seed
        self.code_noise, self.codebook_size = code_noise, processor.codebook_size
        self.weights = weights
        self._pass, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def task(self, index: int) -> str:
        """Name the task of a row; it is the same for all rows of a batch."""
        draw = hashlib.blake2b(f"{self.seed}/{index // self.batch_size}".encode(), digest_size=8).digest()
        return TASKS[int.from_bytes(draw) / 2**64 < self.captioning_share]

    def record_index(self, index: int) -> int:
        """Say which record a row shows."""
        number, place = divmod(index, len(self.records))
        if number != self._pass:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + number)
            count, weights = len(self.records), self.weights
            order = (
                torch.randperm(count, generator=generator)
                if weights is None
                else torch.multinomial(weights, count, replacement=True, generator=generator)
            )
            self._pass, self._order = number, order
        return int(self._order[place])

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng, chosen, task = random.Random(f"{self.seed}/{index}"), self.record_index(index), self.task(index)
        caption = emoji_caption(self.records[chosen], rng, self.captions)
        if task == "captioning":
            text = [*text_ids(self.tokenizer, "\n" + caption), self.tokenizer.convert_tokens_to_ids("<|endoftext|>")]
        elif rng.random() < self.captions.null:
            text = null_prompt_ids(self.tokenizer, *self.image_size)
        else:
            text = prompt_ids(self.tokenizer, caption, *self.image_size)
        picture = self.codes[chosen] + self.offset
        fed = self._with_noise(picture, rng) if task == "text-to-image" else picture
        return {"task": task, "text": text, "picture": picture, "fed": fed}

    def _with_noise(self, picture: torch.Tensor, rng: random.Random) -> torch.Tensor:
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        replaced = torch.rand(picture.shape, generator=generator) < self.code_noise * rng.random()
        return picture.where(
            ~replaced, torch.randint(self.codebook_size, picture.shape, generator=generator) + self.offset
        )


class AlignmentCollator:
    """
    Pad the rows of one task: prompts on the left, to a multiple of 24 (few shapes to compile), captions on the right.

    Args:
        image_start_token_id (`int`): Id of `<img>`.
        image_end_token_id (`int`): Id of `</img>`.
        pad_token_id (`int`): Fills text; masked.
    """

    def __init__(self, image_start_token_id: int, image_end_token_id: int, pad_token_id: int):
        self.start, self.end, self.pad = image_start_token_id, image_end_token_id, pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        (task,) = {row["task"] for row in rows}
        drawing = task == "text-to-image"
        longest = max(len(row["text"]) for row in rows)
        width = -(-longest // 24) * 24 if drawing else longest
        text = torch.full((len(rows), width), self.pad)
        mask = torch.zeros_like(text)
        for line, row in enumerate(rows):
            place = slice(width - len(row["text"]), None) if drawing else slice(0, len(row["text"]))
            text[line, place], mask[line, place] = torch.tensor(row["text"]), 1
        start, end = (torch.full((len(rows), 1), token) for token in (self.start, self.end))
        codes, fed = (torch.stack([row[key] for row in rows]) for key in ("picture", "fed"))
        # The last code and `</img>` predict nothing that is learnt in drawing: they are not fed.
        picture = torch.cat([start, fed[:, :-1]] if drawing else [start, fed, end], dim=1)
        labels = codes if drawing else text.masked_fill(mask == 0, -100)
        return {"task": task, "text": text, "text_mask": mask, "picture": picture, "labels": labels}


class AlignmentTrainer(Trainer):
    """
    `Trainer` that computes Stage I's loss stretch by stretch (see the top of this file).

    Args:
        compile_drawing (`bool`, defaults to `False`): Compile the picture's stretch of text-to-image rows.
        loss_scope (`str`, defaults to `"joint"`):
            What competes for a code: `"joint"`, text and visual ids as in the paper, or `"grammar"`, visual ids only,
            which is all that decoding lets through.
        label_spread (`float`, defaults to 0.0): Width of `neighbouring_codes`; 0 labels each code alone.

    Raises:
        ValueError: If the run is spread over devices, checkpoints gradients, evaluates, or has no visual experts: the
            stretches go past the wrappers and need a cache.
    """

    def __init__(
        self,
        *args: Any,
        compile_drawing: bool = False,
        loss_scope: str = "joint",
        label_spread: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if loss_scope not in VOCABULARY_OF_SCOPE:
            raise ValueError(f"`loss_scope` must be one of {', '.join(VOCABULARY_OF_SCOPE)}, got {loss_scope!r}.")
        self._refuse_what_stretches_cannot_do()
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch's labels
        self.loss_scope = loss_scope
        self.neighbours = neighbouring_codes(self.model.vqgan.quantize.embedding.weight, label_spread)
        self._drawing = torch.compile(drawing_loss) if compile_drawing else drawing_loss

    def _refuse_what_stretches_cannot_do(self) -> None:
        batch_size = getattr(self.train_dataset, "batch_size", self.args.train_batch_size)
        refused = {
            "more than one process or device": max(self.args.world_size, self.args.n_gpu) > 1,
            "gradient checkpointing": self.args.gradient_checkpointing or self.model.is_gradient_checkpointing,
            "`eval_strategy`": self.args.eval_strategy != "no",
            "`use_visual_expert=False`": not self.model.config.use_visual_expert,
            f"batches of {self.args.train_batch_size} from data in batches of {batch_size}": batch_size
            != self.args.train_batch_size,
        }
        if problems := [name for name, holds in refused.items() if holds]:
            raise ValueError(f"AlignmentTrainer computes its loss stretch by stretch and cannot do {problems[0]}.")

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # the data set shuffles itself

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if "embed_tokens" not in name]

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        inputs = dict(inputs)
        task = inputs.pop("task")
        with self.accelerator.autocast():  # accelerate wraps `forward` alone, the stretches go past it
            if task == "captioning":
                return captioning_loss(self.model, **inputs)
            mask = inputs["text_mask"]
            prefix = text_prefix(self.model, inputs["text"], mask)
            picture, labels = inputs["picture"], inputs["labels"]
            return self._drawing(self.model, prefix, mask, picture, labels, self.loss_scope, self.neighbours)


@torch.no_grad()
def text_prefix(model: MarsForConditionalGeneration, text: torch.Tensor, mask: torch.Tensor) -> list[tuple]:
    """
    Give each layer's keys and values of left-padded prompts. Nothing in them is trainable but `<null>`, which keeps
    the row it starts with, the language model's own document separator.
    """
    cache = DynamicCache(config=model.config)
    is_text = not bool((text >= model.config.image_token_offset).any())
    model.model(
        text,
        attention_mask=mask,
        position_ids=position_ids_of(mask),
        past_key_values=cache,
        modality="text" if is_text else None,
        use_cache=True,
    )
    return [(layer.keys, layer.values) for layer in cache.layers]


def drawing_loss(
    model: MarsForConditionalGeneration,
    prefix: list[tuple],
    text_mask: torch.Tensor,
    picture: torch.Tensor,
    labels: torch.Tensor,
    loss_scope: str = "joint",
    neighbours: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Compute the next-token loss of pictures `(batch, codes)` after prompts.

    Args:
        picture (`torch.LongTensor`): `<img>` and all codes but the last.
        labels (`torch.LongTensor`): All codes, as ids: the label of each fed token.
        loss_scope (`str`): See [`AlignmentTrainer`].
        neighbours (`torch.Tensor`, *optional*): From `neighbouring_codes`; without it each code is labelled alone.
    """
    cache = DynamicCache(prefix)
    mask = torch.cat([text_mask, torch.ones_like(picture)], dim=1)
    positions = position_ids_of(mask)[:, text_mask.shape[1] :]
    hidden = model.model(
        picture, attention_mask=mask, position_ids=positions, past_key_values=cache, modality="image", use_cache=True
    ).last_hidden_state
    hidden, labels, offset = hidden.flatten(0, 1), labels.flatten(), model.config.image_token_offset
    logits = model.compute_logits(hidden, VOCABULARY_OF_SCOPE[loss_scope]).float()
    if neighbours is None:
        return F.cross_entropy(logits, labels if loss_scope == "joint" else labels - offset)
    # The mean logit of a label's neighbours is the state times their mean head row: nothing is gathered from logits.
    head = model.vision_head.weight
    mean_rows = F.embedding(labels - offset, neighbours.to(head.dtype) @ head[: len(neighbours)])
    return (logits.logsumexp(-1) - (hidden.float() * mean_rows.float()).sum(-1)).mean()


def neighbouring_codes(codebook: torch.Tensor, spread: float, num_neighbours: int = 16) -> torch.Tensor | None:
    """
    Share the label of each code out among the codes nearest to it.

    Neighbouring codes draw almost the same pixels, and which of them the VQ-GAN took is close to chance: with a
    single label a small model spends itself on learning that chance by heart.

    Args:
        codebook (`torch.Tensor` of shape `(codes, channels)`): Rows of the VQ-GAN's codebook.
        spread (`float`): Standard deviation, in distances of the codebook, of the Gaussian that gives the shares.
        num_neighbours (`int`, defaults to 16): How many share, the code itself among them.

    Returns:
        `torch.Tensor` of shape `(codes, codes)`: Rows sum to 1. `None` if `spread` is 0.

    Raises:
        ValueError: If `spread` is negative.
    """
    if spread < 0:
        raise ValueError(f"`label_spread` is a distance and cannot be negative, got {spread}.")
    if spread == 0:
        return None
    codebook = codebook.detach().float()
    distances, nearest = torch.cdist(codebook, codebook).topk(min(num_neighbours, len(codebook)), largest=False)
    shares = torch.softmax(-(distances**2) / (2 * spread**2), dim=-1)
    return torch.zeros(len(codebook), len(codebook), device=codebook.device).scatter(1, nearest, shares)


def captioning_loss(
    model: MarsForConditionalGeneration,
    text: torch.Tensor,
    text_mask: torch.Tensor,
    picture: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Compute the joint next-token loss of captions `(batch, seq)`, right-padded, after `<img>` codes `</img>`."""
    cache = DynamicCache(config=model.config)
    seen = model.model(picture, past_key_values=cache, modality="image", use_cache=True).last_hidden_state
    mask = torch.cat([torch.ones_like(picture), text_mask], dim=1)
    read = model.model(
        text,
        attention_mask=mask,
        position_ids=position_ids_of(mask)[:, picture.shape[1] :],
        past_key_values=cache,
        modality="text",
        use_cache=True,
    ).last_hidden_state
    hidden = torch.cat([seen[:, -1:], read[:, :-1]], dim=1)  # `</img>` predicts the first token of the text
    logits = model.compute_logits(hidden, "all").float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def alignment_arguments(
    output_dir: str, max_steps: int, batch_size: int, bf16: bool, **changes: Any
) -> TrainingArguments:
    """
    Give Stage I's arguments: the paper's AdamW (beta2 0.95, weight decay 0.1, warm-up 1 %), a cosine schedule and a
    rate for a small model that are ours.
    """
    settings: dict[str, Any] = {
        "learning_rate": 1.5e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, max_steps // 100),
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "save_steps": 500,
        "save_total_limit": 2,
        "logging_steps": 50,
        "report_to": [],
        "use_cpu": not torch.accelerator.is_available(),  # bf16 on a CPU has to be asked for
        "remove_unused_columns": False,
        "seed": 0,
        **changes,
    }
    return TrainingArguments(
        output_dir=output_dir, max_steps=max_steps, per_device_train_batch_size=batch_size, bf16=bf16, **settings
    )
