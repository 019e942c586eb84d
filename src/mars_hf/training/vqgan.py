"""
Training of the image tokenizer: a VQ-GAN in the shape of a diffusers `VQModel`.

The quantiser used in training is cosine: encoder output and codes are l2-normalised, codes follow the outputs that
chose them by an exponential moving average, and codes that fall out of use are planted anew where the error is
largest. The trained codebook is stored normalised, so that the plain nearest-code search of `VQModel` picks the very
same codes. The loss is reconstruction (L1, and the logarithm of each picture's squared error, which is its PSNR), an
L1 term on picture gradients in place of a discriminator, and commitment.

What this file leaves to others: the language model and the pictures' captions.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..image_processing_mars import decode_codes, encode_pixels


@dataclass(frozen=True)
class VqganTrainingArguments:
    """
    What one run of tokenizer training is made of.

    Args:
        max_steps (`int`): Optimizer steps.
        batch_size (`int`): Pictures of 64 x 64 pixels in a step; larger pictures come in proportionally fewer.
        learning_rate (`float`): Peak of Adam's rate; warmed up over `warmup_steps`, then a cosine down to 1 %.
        crop_share (`float`): Share of steps on random 64-pixel crops of 128-pixel pictures.
        large_share (`float`): Share of steps on whole 128-pixel pictures.
        gradient_weight (`float`): Weight of the L1 term on differences between neighbouring pixels.
        psnr_weight (`float`): Weight of the mean logarithm of each picture's squared error.
        commitment_weight (`float`): Weight that ties the encoder to its codes.
        codebook_decay (`float`): Decay of the codes' moving average, per step.
        weight_decay_ema (`float`): Decay of the moving average of weights that is evaluated and saved, per step.
        seed (`int`): Seed of initialisation and order.
    """

    max_steps: int = 12_000
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    crop_share: float = 0.3
    large_share: float = 0.2
    gradient_weight: float = 1.0
    psnr_weight: float = 0.25
    commitment_weight: float = 0.25
    codebook_decay: float = 0.99
    weight_decay_ema: float = 0.999
    eval_steps: int = 1000
    save_steps: int = 500
    seed: int = 0


class CosineCodebook(nn.Module):
    """
    A codebook on the unit sphere that follows its inputs (VQ-VAE's moving-average update, with l2-normalised codes).

    Args:
        num_codes (`int`): Number of codes.
        dim (`int`): Length of a code.
        decay (`float`): Decay of the moving averages, per step.
    """

    def __init__(self, num_codes: int, dim: int, decay: float):
        super().__init__()
        codes = F.normalize(torch.randn(num_codes, dim), dim=-1)
        self.decay = decay
        self.register_buffer("codes", codes)
        self.register_buffer("sums", codes.clone())
        self.register_buffer("counts", torch.ones(num_codes))

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Replace every latent by its nearest code; gradients pass straight through.

        Args:
            latents (`torch.Tensor` of shape `(batch, dim, height, width)`): The encoder's output.

        Returns:
            `tuple`: Quantised latents of the same shape, the commitment loss (scalar), and the codes' indices
            `(batch, height, width)`.
        """
        normalised = F.normalize(latents.float().permute(0, 2, 3, 1), dim=-1)  # (batch, height, width, dim)
        flat = normalised.flatten(0, 2)
        with torch.no_grad():
            similarity, indices = (flat @ self.codes.t()).max(dim=-1)
            if self.training:
                self._follow(flat.detach(), similarity, indices)
        chosen = self.codes[indices].view_as(normalised)
        commitment = (normalised - chosen).square().sum(-1).mean()
        quantised = normalised + (chosen - normalised).detach()
        return quantised.permute(0, 3, 1, 2), commitment, indices.view(normalised.shape[:-1])

    def _follow(self, flat: torch.Tensor, similarity: torch.Tensor, indices: torch.Tensor) -> None:
        keep = 1.0 - self.decay
        self.counts.mul_(self.decay).index_add_(0, indices, torch.full_like(similarity, keep))
        self.sums.mul_(self.decay).index_add_(0, indices, flat * keep)
        dead = self.counts < 0.03 * len(flat) / len(self.counts)  # 3 % of an equal share of the hits
        error = (1.0 - similarity).clamp_min(1e-6)
        planted = flat[torch.multinomial(error, len(self.counts), replacement=True)]
        self.sums.copy_(torch.where(dead[:, None], planted, self.sums))
        self.counts.copy_(torch.where(dead, torch.ones_like(self.counts), self.counts))
        self.codes.copy_(F.normalize(self.sums, dim=-1))


def reconstruction_loss(
    output: torch.Tensor, target: torch.Tensor, args: VqganTrainingArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compare pictures in [-1, 1].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The loss and the mean PSNR in dB (both scalars).
    """
    difference = output - target
    squared = difference.square().mean(dim=(1, 2, 3))
    edges = (difference[..., 1:] - difference[..., :-1]).abs().mean()
    edges = edges + (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    loss = difference.abs().mean() + args.gradient_weight * edges + args.psnr_weight * (squared + 1e-3).log().mean()
    return loss, 10 * torch.log10(4.0 / squared.detach()).mean()


def images_to_tensor(images: np.ndarray) -> torch.Tensor:
    """Turn uint8 pictures `(batch, height, width, 3)` into floats `(batch, 3, height, width)` in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return (pixels.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def evaluate_vqgan(vqgan: VQModel, images: np.ndarray, batch_size: int = 32) -> dict[str, float]:
    """
    Measure reconstructions: encode to codes, decode, round to 8 bits.

    Args:
        vqgan (`VQModel`): Computes in its own dtype, without autocast.
        images (`np.ndarray` of shape `(num, height, width, 3)`, uint8): Pictures of one size.

    Returns:
        `dict[str, float]`: `psnr` (mean over pictures, dB), `codes_used` (share of the codebook that occurs at least
        once) and `perplexity` (of the codes' frequencies).
    """
    psnr: list[torch.Tensor] = []
    counts = torch.zeros(vqgan.config.num_vq_embeddings)
    for start in range(0, len(images), batch_size):
        pixels = images_to_tensor(images[start : start + batch_size]).to(vqgan.device, vqgan.dtype)
        codes = encode_pixels(vqgan, pixels)
        counts += torch.bincount(torch.cat([grid.flatten() for grid in codes]).cpu(), minlength=len(counts))
        output = torch.stack(decode_codes(vqgan, codes)).clamp(-1, 1)
        squared = ((output - pixels).float() * 127.5).round().square().mean(dim=(1, 2, 3))
        psnr.append(10 * torch.log10(255.0**2 / squared.clamp_min(1e-3)))
    share = counts / counts.sum()
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    used = (counts > 0).float().mean()
    return {"psnr": torch.cat(psnr).mean().item(), "codes_used": used.item(), "perplexity": entropy.exp().item()}


class VqganTrainer:
    """
    Train a `VQModel` on pictures in memory, with checkpoints from which `train` continues.

    Args:
        vqgan (`VQModel`): Randomly initialised; its codebook is overwritten by the trained one.
        images (`dict[int, np.ndarray]`): Training pictures by side in pixels: uint8 `(num, side, side, 3)` for 64
            and, when `args` asks for crops or large pictures, 128.
        args (`VqganTrainingArguments`): The recipe.
        output_dir (`str` or `Path`): Where `checkpoint.pt` and, at the end, the `VQModel` are written.
        eval_images (`dict[int, np.ndarray]`, *optional*): Held-out pictures by side.
    """

    def __init__(
        self,
        vqgan: VQModel,
        images: dict[int, np.ndarray],
        args: VqganTrainingArguments,
        output_dir: str | Path,
        eval_images: dict[int, np.ndarray] | None = None,
    ):
        needed = {64} | ({128} if args.crop_share or args.large_share else set())
        if not needed <= set(images):
            raise ValueError(f"`images` must hold pictures of {sorted(needed)} pixels, got {sorted(images)}.")
        self.args, self.images, self.eval_images = args, images, eval_images or {}
        self.output_dir = Path(output_dir)
        self.vqgan = vqgan.to(memory_format=torch.channels_last)
        self.codebook = CosineCodebook(vqgan.config.num_vq_embeddings, vqgan.config.vq_embed_dim, args.codebook_decay)
        self.codebook.to(vqgan.device)
        self.trained = [p for name, p in vqgan.named_parameters() if not name.startswith("quantize.")]
        self.averaged = [p.detach().clone() for p in self.trained]
        self.optimizer = torch.optim.AdamW(self.trained, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.step = 0

    @property
    def checkpoint_file(self) -> Path:
        return self.output_dir / "checkpoint.pt"

    def _batch(self, rng: np.random.Generator) -> torch.Tensor:
        kind, size = rng.random(), self.args.batch_size
        if kind < self.args.large_share:
            chosen = self.images[128][rng.integers(0, len(self.images[128]), max(1, size // 4))]
        elif kind < self.args.large_share + self.args.crop_share:
            corners = rng.integers(0, 65, (size, 2))
            picks = rng.integers(0, len(self.images[128]), size)
            crops = [self.images[128][n, y : y + 64, x : x + 64] for n, (y, x) in zip(picks, corners, strict=True)]
            chosen = np.stack(crops)
        else:
            chosen = self.images[64][rng.integers(0, len(self.images[64]), size)]
        return images_to_tensor(chosen[:, :, ::-1] if rng.random() < 0.5 else chosen).to(self.vqgan.device)

    def _learning_rate(self) -> float:
        args = self.args
        warm = min(1.0, (self.step + 1) / args.warmup_steps)
        cosine = 0.5 * (1 + np.cos(np.pi * min(1.0, self.step / args.max_steps)))
        return float(args.learning_rate * warm * (0.01 + 0.99 * cosine))

    def _training_step(self, pixels: torch.Tensor, bf16: bool) -> dict[str, torch.Tensor]:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
            latents = self.vqgan.quant_conv(self.vqgan.encoder(pixels))
            with torch.autocast(pixels.device.type, enabled=False):  # a rounded search would pick other codes
                quantised, commitment, _ = self.codebook(latents)
            output = self.vqgan.decoder(self.vqgan.post_quant_conv(quantised))
        loss, psnr = reconstruction_loss(output.float(), pixels, self.args)
        (loss + self.args.commitment_weight * commitment).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.args.weight_decay_ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.averaged, [p.detach() for p in self.trained], 1 - decay)
        return {"loss": loss.detach(), "psnr": psnr, "commitment": commitment.detach()}

    def averaged_model(self) -> VQModel:
        """Copy the model with averaged weights and the normalised codebook: what is evaluated and saved."""
        model = copy.deepcopy(self.vqgan).eval()
        names = [name for name, _ in self.vqgan.named_parameters() if not name.startswith("quantize.")]
        state = dict(zip(names, self.averaged, strict=True))
        state["quantize.embedding.weight"] = self.codebook.codes
        model.load_state_dict(state, strict=True)
        return model

    def save_checkpoint(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "vqgan": self.vqgan.state_dict(),
            "codebook": self.codebook.state_dict(),
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "args": asdict(self.args),
        }
        scratch = self.checkpoint_file.with_suffix(".part")
        torch.save(state, scratch)
        os.replace(scratch, self.checkpoint_file)

    def load_checkpoint(self) -> None:
        state = torch.load(self.checkpoint_file, map_location=self.vqgan.device, weights_only=True)
        looks = ("eval_steps", "save_steps")
        now, then = ({k: v for k, v in args.items() if k not in looks} for args in (asdict(self.args), state["args"]))
        if changed := [name for name in now if now[name] != then.get(name)]:
            raise ValueError(
                f"{self.checkpoint_file} is of a run with `{changed[0]}` {then.get(changed[0])!r}, now it is "
                f"{now[changed[0]]!r}. Take another folder, or the same arguments."
            )
        self.vqgan.load_state_dict(state["vqgan"])
        self.codebook.load_state_dict(state["codebook"])
        self.optimizer.load_state_dict(state["optimizer"])
        for mine, theirs in zip(self.averaged, state["averaged"], strict=True):
            mine.copy_(theirs)
        self.step = state["step"]

    def train(self, bf16: bool, log: Callable[[str], None] = tqdm.write) -> VQModel:
        """
        Run to `max_steps`, from `checkpoint.pt` if there is one.

        Args:
            bf16 (`bool`): Compute under bfloat16 autocast. Pays where the processor has matrix units for it.
            log (`Callable`, *optional*): Receives a line at each evaluation.

        Returns:
            `VQModel`: The averaged model, also written to `output_dir`.
        """
        if self.checkpoint_file.exists():
            self.load_checkpoint()
            log(f"continuing from step {self.step}")
        self.vqgan.train(), self.codebook.train()
        with tqdm(total=self.args.max_steps, initial=self.step, desc="VQ-GAN", mininterval=10) as bar:
            while self.step < self.args.max_steps:
                # Seeded by the step, so that a resumed run sees the same pictures and plants the same codes.
                torch.manual_seed(self.args.seed * 1_000_003 + self.step)
                metrics = self._training_step(self._batch(np.random.default_rng((self.args.seed, self.step))), bf16)
                self.step += 1
                bar.update()
                if self.step % 50 == 0:
                    bar.set_postfix({name: f"{value.item():.3f}" for name, value in metrics.items()})
                if self.step % self.args.save_steps == 0:
                    self.save_checkpoint()
                if self.step % self.args.eval_steps == 0 or self.step == self.args.max_steps:
                    for side, images in self.eval_images.items():
                        scores = evaluate_vqgan(self.averaged_model(), images)
                        log(f"step {self.step}, {side} px: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        model = self.averaged_model()
        model.save_pretrained(self.output_dir)
        return model
