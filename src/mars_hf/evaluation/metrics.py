"""
The numbers: CLIPScore, best-of-N, retrieval, Fréchet distance, and intervals by bootstrap.

All of them work on features that were kept, so that they cost seconds. What this file leaves to others: the models
that make features, T2I-CompBench and GenEval.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def clip_scores(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """
    CLIPScore of pictures, `100 * max(cosine, 0)`, as text-to-image papers report it.

    Source: CLIPScore (https://huggingface.co/papers/2104.08718), whose own factor is 2.5 in place of 100.

    Args:
        images (`torch.Tensor` of shape `(prompts, pictures, dim)`): Features of pictures.
        texts (`torch.Tensor` of shape `(prompts, dim)`): Features of their prompts.

    Returns:
        `torch.Tensor` of shape `(prompts, pictures)`.
    """
    return 100 * F.cosine_similarity(images, texts[:, None], dim=-1).clamp_min(0)


def best_of(scores: torch.Tensor) -> torch.Tensor:
    """
    Choose each prompt's best picture; of equals, the first.

    Args:
        scores (`torch.Tensor` of shape `(prompts, pictures)`): CLIPScores.

    Returns:
        `torch.LongTensor` of shape `(prompts, 1)`: The chosen pictures.

    Raises:
        ValueError: If there is only one picture to choose from.
    """
    if scores.shape[1] < 2:
        raise ValueError("Best-of-N needs 2 or more pictures of each prompt (`pictures_per_prompt`), got 1.")
    return (scores == scores.amax(dim=1, keepdim=True)).int().argmax(dim=1, keepdim=True)


def retrieval_hits(images: torch.Tensor, texts: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """
    Tell which pictures find their own prompt: no other text of the group may be as near.

    Args:
        images (`torch.Tensor` of shape `(prompts, pictures, dim)`): Features of pictures.
        texts (`torch.Tensor` of shape `(prompts, dim)`): Features of their prompts.
        prompts (`Sequence[str]`): The prompts; the same text is no rival of itself.

    Returns:
        `torch.Tensor` of shape `(prompts, pictures)`: 1 where a picture found its prompt, 0 elsewhere.

    Raises:
        ValueError: If all prompts are one text.
    """
    if len(set(prompts)) < 2:
        raise ValueError("Retrieval needs two or more different prompts in a group.")
    names = np.unique(np.asarray(prompts, dtype=object).astype(str), return_inverse=True)[1]
    same = torch.from_numpy(names[:, None] == names[None])  # (prompts, prompts)
    texts = F.normalize(texts, dim=-1)
    hits = [
        (similarity[~rivals].max() > similarity[rivals].max())
        for row, rivals in zip(F.normalize(images, dim=-1), ~same, strict=True)
        for similarity in row @ texts.t()
    ]
    return torch.stack(hits).float().view(images.shape[:2])


class _Given(nn.Module):
    """Stands for a feature extractor whose features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(drawn: torch.Tensor, true: torch.Tensor) -> float:
    """
    The Fréchet distance between Gaussians fitted to two sets of features, by torchmetrics in float64.

    With the features of FID's Inception it is FID (https://huggingface.co/papers/1706.08500). Identical sets give 0 up
    to rounding (1e-6 of the features' variance, either sign).

    Args:
        drawn (`torch.Tensor` of shape `(num, dim)`): Features of drawn pictures.
        true (`torch.Tensor` of shape `(num, dim)`): Features of true pictures; not necessarily as many.

    Raises:
        ValueError: If a set has no more pictures than features, so that its covariance is singular, or features are
            not finite.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    for name, features in (("drawn", drawn), ("true", true)):
        count, dim = features.shape
        if count <= dim:
            raise ValueError(
                f"The Fréchet distance of {dim} features needs more than {dim} {name} pictures, got {count}: of fewer "
                "the covariance is singular. Take more prompts, or an extractor with fewer features."
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"Features of {name} pictures are not finite.")
    metric = FrechetInceptionDistance(_Given(drawn.shape[1]), sync_on_compute=False)  # one process has all features
    metric.update(true.double(), real=True)
    metric.update(drawn.double(), real=False)
    return float(metric.compute())


def mean_interval(
    values: torch.Tensor, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """
    Bootstrap interval of a mean (percentiles), by scipy.

    Args:
        values (`torch.Tensor` of shape `(prompts,)`): One value for each prompt: pictures of a prompt are not
            independent, prompts are.

    Returns:
        `tuple[float, float]`: Its ends, or `None` of fewer than two values.
    """
    return grouped_mean_interval([values], confidence, resamples, seed)


def grouped_mean_interval(
    groups: Sequence[torch.Tensor], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """
    Bootstrap interval of the mean of groups' means (percentiles), by scipy: each group is resampled by itself.

    Args:
        groups (`Sequence[torch.Tensor]`, each of shape `(prompts,)`): One value for each prompt.

    Returns:
        `tuple[float, float]`: Its ends, or `None` if a group has fewer than two values.
    """
    from scipy.stats import bootstrap

    if min(map(len, groups)) < 2:
        return None

    def mean_of_means(*resampled: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([values.mean(axis) for values in resampled], axis=0)

    options = {"confidence_level": confidence, "n_resamples": resamples, "method": "percentile", "batch": 100}
    values = [group.double().numpy() for group in groups]
    found = bootstrap(values, mean_of_means, rng=np.random.default_rng(seed), **options)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def frechet_interval(
    drawn: torch.Tensor, true: torch.Tensor, confidence: float = 0.95, resamples: int = 100, seed: int = 0
) -> tuple[float, float] | None:
    """
    Interval of a Fréchet distance: the value, give or take its bootstrap standard error times a normal quantile, and
    not below 0.

    The true pictures stand fixed, drawn ones are resampled. Percentiles would not do: a resample repeats pictures,
    which moves every resampled distance up.

    Returns:
        `tuple[float, float]`: Its ends, or `None` without resamples.
    """
    from scipy.stats import norm
    from tqdm.auto import tqdm

    if resamples < 2:
        return None
    rng = np.random.default_rng(seed)
    rows = (torch.from_numpy(rng.integers(0, len(drawn), len(drawn))) for _ in range(resamples))
    bars = tqdm(rows, total=resamples, desc="Resampling the Fréchet distance", leave=False, delay=10)
    reach = float(norm.ppf(0.5 + confidence / 2) * np.std([frechet_distance(drawn[r], true) for r in bars], ddof=1))
    value = frechet_distance(drawn, true)
    return max(0.0, value - reach), value + reach
