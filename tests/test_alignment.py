"""Stage I's stretches against the plain mixed forward; its rows and their order."""

import math
import random

import pytest
import torch
from torch.nn import functional as F

from mars_hf.training.alignment import (
    AlignmentCollator,
    AlignmentDataset,
    AlignmentTrainer,
    CaptionStyle,
    alignment_arguments,
    captioning_loss,
    drawing_loss,
    emoji_caption,
    neighbouring_codes,
    text_prefix,
)
from mars_hf.training.muon import muon_with_adamw

RECORD = {"caption_en": "red apple", "caption_zh": "红苹果", "style": "noto"}


class Rows(torch.utils.data.Dataset):
    """Rows of a tiny model, two a batch, tasks in turn."""

    def __init__(self, config, length=12):
        self.config, self.length = config, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = torch.Generator().manual_seed(index)
        text = torch.randint(3, 90, (3 + index % 4,), generator=rng).tolist()
        picture = torch.randint(0, self.config.codebook_size, (6,), generator=rng) + self.config.image_token_offset
        return {
            "task": ["text-to-image", "captioning"][index // 2 % 2],
            "text": text,
            "picture": picture,
            "fed": picture,
        }


@pytest.fixture
def rows(make_model):
    config = make_model().config
    collate = AlignmentCollator(config.image_start_token_id, config.image_end_token_id, pad_token_id=1)
    data = Rows(config)
    return {"text-to-image": collate([data[0], data[1]]), "captioning": collate([data[2], data[3]])}, data, collate


def plain_loss(model, data, indices, drawing):
    """One mixed forward a row, without cache, padding or batch."""
    losses, config = [], model.config
    for index in indices:
        row = data[index]
        picture = [config.image_start_token_id, *row["picture"].tolist(), config.image_end_token_id]
        ids = torch.tensor([row["text"] + picture if drawing else picture + row["text"]])
        labels = ids.clone()
        if drawing:
            labels[0, : len(row["text"]) + 1], labels[0, -1] = -100, -100
        else:
            labels[0, : len(picture)] = -100
        logits = model(ids).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="none"))
    every = torch.cat(losses)
    return every.sum() / (every != 0).sum()


@pytest.mark.parametrize("task", ["text-to-image", "captioning"])
def test_stretches_give_the_loss_and_gradients_of_the_mixed_forward(make_model, rows, task):
    model, (batches, data, _) = make_model().double(), rows
    batch = dict(batches[task])
    del batch["task"]
    drawing = task == "text-to-image"
    if drawing:
        prefix = text_prefix(model, batch["text"], batch["text_mask"])
        loss = drawing_loss(model, prefix, batch["text_mask"], batch["picture"], batch["labels"])
    else:
        loss = captioning_loss(model, **batch)
    loss.backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = plain_loss(model, data, [0, 1] if drawing else [2, 3], drawing)
    plain.backward()
    assert abs(loss - plain) < 1e-6
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None and parameter.grad.any():
            assert (mine[name] - parameter.grad).abs().max() < 1e-6, name


@pytest.mark.parametrize("scope", ["joint", "grammar"])
def test_a_label_shared_among_neighbouring_codes_costs_their_weighted_cross_entropies(make_model, rows, scope):
    model, (batches, _, _) = make_model().double(), rows
    batch, offset = batches["text-to-image"], model.config.image_token_offset
    codebook = torch.randn(model.config.codebook_size, 3)
    shares = neighbouring_codes(codebook, 0.8, num_neighbours=3).double()
    arguments = (batch["text_mask"], batch["picture"], batch["labels"])
    prefix = text_prefix(model, batch["text"], batch["text_mask"])
    loss = drawing_loss(model, prefix, *arguments, scope, shares)

    plain = 0.0
    for row in range(len(batch["text"])):
        ids = torch.cat([batch["text"][row][batch["text_mask"][row].bool()], batch["picture"][row]])
        logits = model(ids[None]).logits[0, -batch["picture"].shape[1] :]
        logits = logits if scope == "joint" else logits[:, offset:]
        logs = logits.log_softmax(-1)[:, -model.config.num_visual_tokens :]
        for place, label in enumerate((batch["labels"][row] - offset).tolist()):
            gaps = [float((codebook[label] - other).square().sum()) for other in codebook]
            nearest = sorted(range(len(gaps)), key=gaps.__getitem__)[:3]
            weights = [math.exp(-gaps[code] / (2 * 0.8**2)) for code in nearest]
            plain -= sum(w * logs[place, code] for w, code in zip(weights, nearest, strict=True)) / sum(weights)
    assert abs(loss - plain / batch["labels"].numel()) < 1e-5  # the shares are float32


def test_a_spread_of_nothing_labels_each_code_alone_and_a_negative_one_is_refused():
    assert neighbouring_codes(torch.randn(5, 2), 0.0) is None
    with pytest.raises(ValueError, match="label_spread.*-0.1"):
        neighbouring_codes(torch.randn(5, 2), -0.1)


def test_muon_takes_the_matrices_of_layers_and_adamw_all_else_that_trains(make_model):
    model = make_model()
    chain = muon_with_adamw(model, muon_learning_rate=0.02, learning_rate=0.01)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = ({name_of[id(p)] for group in one.param_groups for p in group["params"]} for one in chain.optimizers)
    assert muon | adamw == {name for name, p in model.named_parameters() if p.requires_grad} and not muon & adamw
    assert muon == {name for name in muon | adamw if ".layers." in name and name.endswith("weight")}
    assert {"vision_head.weight", "model.visual_embed_tokens.weight"} < adamw
    assert [group["lr"] for group in chain.param_groups] == [0.02, 0.01]
    with pytest.raises(ValueError, match="0 chained optimizers, this run has 2"):
        chain.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())


@pytest.mark.parametrize("with_muon", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one_and_moves_the_visual_part_only(
    make_model, rows, tmp_path, with_muon
):
    from mars_hf.modeling_mars import is_visual_parameter

    _, data, collate = rows
    start = make_model()

    def train(folder, stop_after=None, resume=None):
        import copy

        model = copy.deepcopy(start)
        args = alignment_arguments(str(folder), 6, 2, bf16=False, save_steps=3, use_cpu=True, disable_tqdm=True)
        muon = (lambda: muon_with_adamw, {"muon_learning_rate": 6e-3, "learning_rate": 3e-3})
        options = {"optimizer_cls_and_kwargs": muon, "loss_scope": "grammar", "label_spread": 0.5} if with_muon else {}
        trainer = AlignmentTrainer(model=model, args=args, train_dataset=data, data_collator=collate, **options)
        if stop_after:
            trainer.add_callback(Stop(stop_after))
        trainer.train(resume_from_checkpoint=resume)
        return model

    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= self.step

    whole = train(tmp_path / "a")
    train(tmp_path / "b", stop_after=3)
    resumed = train(tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-3"))
    before = dict(start.named_parameters())
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    moved = {name for name, a in whole.named_parameters() if not torch.equal(a, before[name])}
    assert moved == {name for name in before if is_visual_parameter(name)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"gradient_checkpointing": True}, "gradient checkpointing"), ({"eval_strategy": "steps"}, "eval_strategy")],
)
def test_runs_that_stretches_cannot_do_are_refused(make_model, rows, tmp_path, arguments, message):
    _, data, collate = rows
    args = alignment_arguments(str(tmp_path), 2, 2, bf16=False, **arguments)
    with pytest.raises(ValueError, match=message):
        AlignmentTrainer(model=make_model(), args=args, train_dataset=data, data_collator=collate, eval_dataset=data)


@pytest.mark.parametrize(
    ("style", "caption"),
    [
        (CaptionStyle(chinese=0, named_style=0, phrase=0), "red apple"),
        (CaptionStyle(chinese=0, named_style=1, phrase=0), "red apple, noto style"),
        (CaptionStyle(chinese=1, named_style=0, phrase=0), "红苹果"),
        (CaptionStyle(chinese=1, named_style=1, phrase=0), "红苹果，noto 风格"),
    ],
)
def test_captions_take_the_forms_that_are_asked_for(style, caption):
    assert emoji_caption(RECORD, random.Random(0), style) == caption


def test_phrases_come_in_both_languages():
    forms = {emoji_caption(RECORD, random.Random(i), CaptionStyle(named_style=0, phrase=1)) for i in range(200)}
    assert forms == {
        "a red apple",
        "a picture of a red apple",
        "一张红苹果的图片",
        "一个红苹果",
    }


def test_noise_replaces_fed_codes_and_no_label(tiny_processor):
    codes = torch.zeros(4, 16, dtype=torch.long)
    options = {"image_size": (16, 16), "batch_size": 2, "num_batches": 40, "captioning_share": 0.3}
    noisy = AlignmentDataset(tiny_processor, [RECORD] * 4, codes, code_noise=0.5, **options)
    offset, shares = tiny_processor.image_token_offset, []
    for index in range(len(noisy)):
        row = noisy[index]
        assert (row["picture"] == offset).all() and torch.equal(row["fed"], noisy[index]["fed"])
        share = (row["fed"] != offset).float().mean().item()
        assert row["task"] == noisy.task(index) == noisy.task(index // 2 * 2)
        assert share == 0 or row["task"] == "text-to-image"
        shares += [share] if row["task"] == "text-to-image" else []
    # Shares are uniform between 0 and 0.5, and one replacement in 40 draws the code that stood there.
    assert 0.18 < sum(shares) / len(shares) < 0.31 and len(set(shares)) > 5
    clean = AlignmentDataset(tiny_processor, [RECORD] * 4, codes, code_noise=0.0, **options)
    assert all((clean[index]["fed"] == offset).all() for index in range(len(clean)))


def test_every_pass_shows_every_record_once_in_an_order_of_its_own(tiny_processor):
    codes = torch.arange(6)[:, None].expand(6, 16)
    options = {"image_size": (16, 16), "batch_size": 3, "num_batches": 4}
    data = AlignmentDataset(tiny_processor, [RECORD] * 6, codes, **options)
    passes = [[data.record_index(index) for index in range(start, start + 6)] for start in (0, 6)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(6)) and passes[0] != passes[1]
    assert [data.record_index(index) for index in range(6)] == passes[0]
