"""The image tokenizer's training: its codebook, its loss, its scores, and runs that stop and go on."""

import numpy as np
import pytest
import torch
from diffusers import VQModel

from mars_hf.training.vqgan import (
    CosineCodebook,
    VqganTrainer,
    VqganTrainingArguments,
    evaluate_vqgan,
    images_to_tensor,
    reconstruction_loss,
)

TINY = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 16,
    "mid_block_add_attention": False,
}


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return {side: rng.integers(0, 256, (6, side, side, 3), dtype=np.uint8) for side in (64, 128)}


def test_the_stored_codebook_picks_the_codes_that_training_picked():
    torch.manual_seed(0)
    codebook = CosineCodebook(16, 4, decay=0.9).eval()
    vqgan = VQModel(**TINY).eval()
    vqgan.quantize.embedding.weight.data.copy_(codebook.codes)
    latents = torch.randn(2, 4, 5, 3)
    _, _, indices = codebook(latents)
    assert torch.equal(vqgan.quantize(latents)[2][2].view(2, 5, 3), indices)
    by_hand = torch.einsum("bchw,kc->bhwk", latents, codebook.codes).argmax(-1)
    assert torch.equal(indices, by_hand)


def test_gradients_pass_straight_through_the_codes():
    codebook = CosineCodebook(16, 4, decay=0.9).eval()
    latents = torch.nn.functional.normalize(torch.randn(1, 4, 2, 2), dim=1).requires_grad_()
    quantised, _, _ = codebook(latents)
    direction = torch.randn(1, 4, 2, 2)
    (quantised * direction).sum().backward()
    tangent = direction - (direction * latents).sum(1, keepdim=True) * latents  # normalising projects on the sphere
    assert (latents.grad - tangent).abs().max() < 1e-5


def test_codes_follow_what_chooses_them_and_stay_on_the_sphere():
    codebook = CosineCodebook(16, 4, decay=0.5).train()
    centre = torch.nn.functional.normalize(torch.randn(4), dim=0)
    for _ in range(40):
        codebook(centre.view(1, 4, 1, 1).expand(1, 4, 4, 4) + 0.01 * torch.randn(1, 4, 4, 4))
    assert ((codebook.codes @ centre).max() > 0.999) and torch.allclose(codebook.codes.norm(dim=-1), torch.ones(16))


def test_codes_out_of_use_are_planted_anew():
    codebook = CosineCodebook(16, 4, decay=0.9).train()
    latents = torch.randn(8, 4, 8, 8)
    with torch.no_grad():
        codebook.codes[3:] = torch.nn.functional.normalize(-latents.mean((0, 2, 3)), dim=0)  # 13 codes in one place
        codebook.sums.copy_(codebook.codes)
    for _ in range(120):
        codebook(latents)
    _, _, indices = codebook.eval()(latents)
    assert len(indices.unique()) >= 14


def test_psnr_of_the_loss_is_the_one_of_the_textbook():
    target, output = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.2)
    _, psnr = reconstruction_loss(output, target, VqganTrainingArguments())
    assert abs(psnr - 10 * np.log10(255**2 / (0.2 * 127.5) ** 2)) < 1e-4


def test_scores_count_rounded_pixels_and_used_codes(images):
    vqgan = VQModel(**TINY).eval()
    scores = evaluate_vqgan(vqgan, images[64], batch_size=4)
    pixels = images_to_tensor(images[64])
    latents = vqgan.encode(pixels).latents
    output = vqgan.decode(latents).sample.clamp(-1, 1)
    as_bytes = [((x + 1) * 127.5).round().permute(0, 2, 3, 1).detach().numpy() for x in (output, pixels)]
    mse = np.square(as_bytes[0] - as_bytes[1]).mean(axis=(1, 2, 3))
    assert abs(scores["psnr"] - (10 * np.log10(255**2 / mse)).mean()) < 0.02
    codes = vqgan.quantize(latents)[2][2]
    assert scores["codes_used"] == len(codes.unique()) / 16


def test_training_lowers_the_error_and_saves_what_it_evaluates(images, tmp_path):
    args = VqganTrainingArguments(max_steps=12, batch_size=4, warmup_steps=1, eval_steps=100, save_steps=100)
    torch.manual_seed(0)
    trainer = VqganTrainer(VQModel(**TINY), images, args, tmp_path)
    pixels = images_to_tensor(images[64])

    def error():
        model = trainer.averaged_model()
        return (model.decode(model.encode(pixels).latents).sample - pixels).square().mean()

    before = error()
    model = trainer.train(bf16=False, log=lambda line: None)
    assert error() < before
    loaded = VQModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_resumed_run_equals_an_uninterrupted_one(images, tmp_path):
    def train(folder, max_steps):
        torch.manual_seed(0)
        args = VqganTrainingArguments(max_steps=6, batch_size=4, warmup_steps=1, eval_steps=100, save_steps=3)
        trainer = VqganTrainer(VQModel(**TINY), images, args, folder)
        if max_steps < 6:
            save = trainer.save_checkpoint

            def save_and_stop():
                save()
                raise KeyboardInterrupt

            trainer.save_checkpoint = save_and_stop
        return trainer.train(bf16=False, log=lambda line: None)

    whole = train(tmp_path / "a", 6)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", 3)
    resumed = train(tmp_path / "b", 6)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    other = VqganTrainingArguments(max_steps=6, batch_size=2, warmup_steps=1, eval_steps=9, save_steps=3)
    with pytest.raises(ValueError, match="of a run with `batch_size` 4, now it is 2"):
        VqganTrainer(VQModel(**TINY), images, other, tmp_path / "b").train(bf16=False)


def test_missing_sizes_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match=r"\[64, 128\] pixels, got \[64\]"):
        VqganTrainer(VQModel(**TINY), {64: images[64]}, VqganTrainingArguments(), tmp_path)
