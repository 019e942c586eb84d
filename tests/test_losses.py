"""The loss from hidden states against cross entropy over whole logits in float64, and what it keeps in memory."""

import pytest
import torch
from torch.nn import functional as F

from mars_hf.training.losses import HeadLoss, neighbouring_codes


@pytest.fixture
def model(make_model):
    return make_model().double()


def rows(model, text_only=False):
    """Text, a picture with labels on its codes, text with labels; the first row ends in padding."""
    config, rng = model.config, torch.Generator().manual_seed(0)
    words = torch.randint(3, config.text_vocab_size, (2, 12), generator=rng)
    if text_only:
        return words, words.clone()
    codes = torch.randint(config.codebook_size, (2, 9), generator=rng) + config.image_token_offset
    start, end = (torch.full((2, 1), token) for token in (config.image_start_token_id, config.image_end_token_id))
    ids = torch.cat([words[:, :5], start, codes, end, words[:, 5:]], dim=1)
    labels = torch.cat([words[:, :5], start, codes, torch.full_like(end, -100), words[:, 5:]], dim=1)
    labels[0, -3:] = -100
    return ids, labels


def shifted(labels):
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def restricted(model, logits, labels):
    """Cross entropy among what the grammar admits: codes for codes, words and `<img>` for words and `<img>`."""
    config, total = model.config, 0
    for row_logits, row_labels in zip(logits.flatten(0, 1), labels.flatten(), strict=True):
        if row_labels == -100:
            continue
        is_code = config.image_token_offset <= row_labels < config.image_start_token_id
        codes = list(range(config.image_token_offset, config.image_start_token_id))
        admitted = codes if is_code else [*range(config.text_vocab_size), config.image_start_token_id]
        total += row_logits[admitted].logsumexp(0) - row_logits[row_labels]
    return total


@pytest.mark.parametrize("chunk_size", [3, 2048])
def test_the_joint_loss_is_cross_entropy_over_the_whole_vocabulary(model, chunk_size):
    ids, labels = rows(model)
    terms = model(ids, labels=labels, head_loss=HeadLoss("joint", chunk_size=chunk_size))
    logits = model(ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), shifted(labels).flatten(), reduction="sum")
    assert abs(terms.loss - expected) < 1e-9
    assert terms.num_codes == 18 and terms.num_codes + terms.num_words == (shifted(labels) != -100).sum()
    gradients = [torch.autograd.grad(loss, model.vision_head.weight)[0] for loss in (terms.loss, expected)]
    assert torch.allclose(*gradients, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [3, 2048])
def test_the_grammars_loss_is_cross_entropy_among_what_it_admits(model, chunk_size):
    ids, labels = rows(model)
    terms = model(ids, labels=labels, head_loss=HeadLoss("grammar", chunk_size=chunk_size))
    assert abs(terms.loss - restricted(model, model(ids).logits, shifted(labels))) < 1e-9
    joint = model(ids, labels=labels, head_loss=HeadLoss("joint"))
    assert terms.gate == 0 and torch.allclose(terms.code, joint.code) and torch.allclose(terms.text, joint.text)


@pytest.mark.parametrize("head", ["plain", "LoRA", "trained copy"])
def test_shared_labels_are_soft_cross_entropy_among_codes(model, head):
    ids, labels = rows(model)
    if head != "plain":
        from peft import LoraConfig, get_peft_model

        where = {"target_modules": ["vision_head"]} if head == "LoRA" else {"modules_to_save": ["vision_head"]}
        config = LoraConfig(r=2, **{"target_modules": r".*layers\.0\.visual_mlp\.up_proj", **where})
        model = get_peft_model(model, config).double().get_base_model()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
    shares = neighbouring_codes(model.vqgan.quantize.embedding.weight, 0.02, num_neighbours=5)
    terms = model(ids, labels=labels, head_loss=HeadLoss("grammar", shares))
    offset, targets = model.config.image_token_offset, shifted(labels)
    is_code = (targets >= offset) & (targets < offset + 40)
    logits = model(ids).logits[is_code][:, offset : offset + 40]
    expected = F.cross_entropy(logits, shares[targets[is_code] - offset].double(), reduction="sum")
    assert abs(terms.code - expected) < 1e-9


def test_positions_promised_to_be_codes_give_the_same_loss(model):
    ids, labels = rows(model)
    pictures = slice(5, 14)  # `<img>` and all codes but the last
    hidden = model.model(ids).last_hidden_state[:, pictures]
    targets = shifted(labels)[:, pictures]
    for scope in ("joint", "grammar"):
        promised = HeadLoss(scope, all_codes=True)(model, hidden, targets)
        found = HeadLoss(scope)(model, hidden, targets)
        assert torch.allclose(promised.loss, found.loss) and promised.num_codes == found.num_codes == 18


def test_shares_of_labels_follow_the_head_to_its_device_once(model):
    shares = neighbouring_codes(model.vqgan.quantize.embedding.weight, 0.5)
    loss, elsewhere = HeadLoss("joint", shares, all_codes=True), model.to("meta")
    hidden = torch.zeros(2, 4, model.config.text_config.hidden_size, dtype=torch.float64, device="meta")
    labels = torch.zeros(2, 4, dtype=torch.long, device="meta")
    loss(elsewhere, hidden, labels)
    moved = loss.neighbours
    loss(elsewhere, hidden, labels)
    assert moved.device.type == "meta" and loss.neighbours is moved


def test_rows_without_codes_have_a_loss_and_a_graph(model):
    ids, labels = rows(model, text_only=True)
    terms = model(ids, labels=labels, head_loss=HeadLoss("joint"))
    terms.loss.backward()
    assert terms.code == 0 and terms.num_codes == 0
    assert model.model.layers[0].visual_mlp.up_proj.weight.grad.abs().sum() == 0  # in the graph, and untouched


def test_no_more_logits_exist_at_once_than_a_chunk_has(model):
    ids, labels = rows(model)
    sizes = []
    for head in (model.text_head, model.vision_head):
        head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[0]))
    model(ids, labels=labels, head_loss=HeadLoss("joint", chunk_size=4)).loss.backward()
    assert max(sizes) == 4


@pytest.mark.parametrize("text_only", [False, True])
def test_as_many_chunks_as_another_rank_needs_change_nothing(model, text_only):
    ids, labels = rows(model, text_only)
    asked, calls = [], []

    def agree(count):
        asked.append(count)
        return 30  # more than there are labels: some chunks are empty

    for head in (model.text_head, model.vision_head):
        head.register_forward_hook(lambda module, inputs, output: calls.append(module))
    own = model(ids, labels=labels, head_loss=HeadLoss("joint", chunk_size=4))
    own_gradient = torch.autograd.grad(own.loss, model.vision_head.weight)[0]
    calls.clear()
    shared = model(ids, labels=labels, head_loss=HeadLoss("joint", chunk_size=4, agree=agree))
    assert len(calls) == 2 * 2 * 30 and len(asked) == 2  # codes and words by both heads
    gradient = torch.autograd.grad(shared.loss, model.vision_head.weight)[0]
    assert abs(own.loss - shared.loss) < 1e-9 and torch.allclose(gradient, own_gradient, atol=1e-12)


def test_an_unknown_scope_and_a_negative_spread_are_refused(model):
    with pytest.raises(ValueError, match="joint, grammar.*'codes'"):
        HeadLoss("codes")
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        neighbouring_codes(model.vqgan.quantize.embedding.weight, -1.0)
