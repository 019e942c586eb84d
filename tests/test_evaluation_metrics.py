"""The numbers of an evaluation: against scipy, torchmetrics, formulas and planted answers."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from evaluators import COLOURS, WORDS, ColourClip, save_clip, save_vision
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance

from mars_hf.evaluation.encoders import ClipEncoder, InceptionEncoder, VisionEncoder
from mars_hf.evaluation.metrics import (
    best_of,
    clip_scores,
    frechet_distance,
    frechet_interval,
    mean_interval,
    retrieval_hits,
)


def features(num: int, dim: int = 6, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(num, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)).float()


def random_pictures(num: int, side: int = 16) -> list[Image.Image]:
    return [Image.fromarray(one) for one in np.random.default_rng(0).integers(0, 256, (num, side, side, 3), np.uint8)]


def test_the_frechet_distance_equals_the_formula_in_scipy() -> None:
    drawn, true = features(50, seed=1), features(80, seed=2)
    (a, b), (mean_a, mean_b) = (
        (np.cov(x.double().numpy().T) for x in (drawn, true)),
        (x.double().numpy().mean(0) for x in (drawn, true)),
    )
    expected = np.square(mean_a - mean_b).sum() + np.trace(a + b - 2 * np.real(scipy.linalg.sqrtm(a @ b)))
    assert frechet_distance(drawn, true) == pytest.approx(expected, rel=1e-8)


def test_the_frechet_distance_equals_torchmetrics_with_a_network_inside() -> None:
    class MeanColour(torch.nn.Module):
        num_features = 3

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.double().mean((2, 3))

    drawn, true = torch.randint(0, 200, (9, 3, 8, 8)).byte(), torch.randint(50, 255, (7, 3, 8, 8)).byte()
    metric, network = FrechetInceptionDistance(MeanColour()), MeanColour()
    metric.update(true, real=True)
    metric.update(drawn, real=False)
    assert frechet_distance(network(drawn), network(true)) == pytest.approx(metric.compute().item(), rel=1e-9)


def test_identical_sets_have_no_frechet_distance_and_noise_raises_it() -> None:
    true = features(60)
    noise = torch.randn_like(true)
    distances = [frechet_distance(true + strength * noise, true) for strength in (0.0, 0.5, 1.0, 2.0)]
    assert abs(distances[0]) < 1e-6 * true.var()
    assert distances[0] < distances[1] < distances[2] < distances[3]


def test_noise_on_pictures_raises_the_frechet_distance_of_their_features(tmp_path: Path) -> None:
    encoder, rng = ClipEncoder(save_clip(tmp_path)), np.random.default_rng(0)
    blobs = [Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8)).resize((16, 16), 3) for _ in range(64)]
    grain = rng.normal(size=(64, 16, 16, 3))
    true = encoder.images(blobs)
    distances = []
    for strength in (0, 20, 60, 120):
        noisy = [np.asarray(blob) + strength * one for blob, one in zip(blobs, grain, strict=True)]
        drawn = encoder.images([Image.fromarray(one.clip(0, 255).astype(np.uint8)) for one in noisy])
        distances.append(frechet_distance(drawn, true))
    assert abs(distances[0]) < 1e-6 * true.var()
    assert distances[0] < distances[1] < distances[2] < distances[3]


@pytest.mark.parametrize("drawn, true", [(1, 60), (6, 60), (60, 6)])
def test_too_few_pictures_for_a_covariance_are_refused(drawn: int, true: int) -> None:
    with pytest.raises(ValueError, match=f"more than 6 (drawn|true) pictures, got {min(drawn, true)}"):
        frechet_distance(features(drawn), features(true))


def test_features_that_are_not_finite_are_refused() -> None:
    broken = features(20)
    broken[3, 2] = torch.nan
    with pytest.raises(ValueError, match="drawn pictures are not finite"):
        frechet_distance(broken, features(20))


def test_clipscore_equals_its_formula_picture_by_picture() -> None:
    images, texts = torch.randn(5, 3, 8), torch.randn(5, 8)
    scores = clip_scores(images, texts)
    for i in range(5):
        for j in range(3):
            cosine = float(images[i, j] @ texts[i] / (images[i, j].norm() * texts[i].norm()))
            assert scores[i, j] == pytest.approx(100 * max(cosine, 0.0), abs=1e-4)
    assert (scores == 0).any() and (scores > 0).any()


def test_clip_features_equal_a_plain_forward_of_the_model(tmp_path: Path) -> None:
    encoder = ClipEncoder(save_clip(tmp_path))
    pictures, texts = random_pictures(3, side=24), ["a red apple", "a cup", "green"]
    inputs = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    pixels = encoder.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    output = encoder.model(**ids, pixel_values=pixels)
    with torch.no_grad():
        expected = output.logits_per_text / encoder.model.logit_scale.exp()  # cosines (texts, pictures)
    found = encoder.texts(texts)[0], encoder.images(pictures)
    cosines = torch.nn.functional.normalize(found[0], dim=-1) @ torch.nn.functional.normalize(found[1], dim=-1).t()
    torch.testing.assert_close(cosines, expected)
    assert clip_scores(found[1][:, None], found[0])[1, 0] == pytest.approx(
        100 * max(expected[1, 1].item(), 0), abs=1e-3
    )


def test_texts_that_clip_cannot_read_whole_are_cut_at_their_end_and_counted(tmp_path: Path) -> None:
    encoder = ClipEncoder(save_clip(tmp_path))
    long = " ".join(WORDS[5:9] * 5)
    both, cut = encoder.texts(["a cup", long])
    assert cut == 1
    torch.testing.assert_close(both[0], encoder.texts(["a cup"])[0][0])  # padding changes nothing
    torch.testing.assert_close(both[1], encoder.texts([" ".join(long.split()[:10])])[0][0])  # 12 with both ends


def test_a_tokenizer_that_ends_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ends no text with the end token 3"):
        ClipEncoder(save_clip(tmp_path, ends=False))


def test_a_model_of_another_kind_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="type 'vit'; a CLIP model is of clip"):
        ClipEncoder(save_vision(tmp_path))
    with pytest.raises(ValueError, match="neither a folder nor a repository"):
        ClipEncoder("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no config.json"):
        VisionEncoder(tmp_path / "empty")


def test_a_vision_model_gives_its_pooled_output(tmp_path: Path) -> None:
    encoder = VisionEncoder(save_vision(tmp_path))
    pictures = random_pictures(3)
    with torch.no_grad():
        expected = encoder.model(encoder.image_processor(pictures, return_tensors="pt")["pixel_values"]).pooler_output
    torch.testing.assert_close(encoder.images(pictures), expected)


def test_inception_is_torchmetrics_own_and_sees_bytes(tmp_path: Path, monkeypatch) -> None:
    class Network(torch.nn.Module):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str):
            super().__init__()
            self.made_of = (name, features_list, feature_extractor_weights_path)
            self.factor = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            assert pixels.dtype == torch.uint8
            return self.factor * pixels.float().mean((2, 3))

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Network)
    with pytest.raises(ValueError, match="pt_inception-2015-12-05"):
        InceptionEncoder(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes(b"weights")
    encoder = InceptionEncoder(tmp_path / "weights.pth")
    assert encoder.model.use_antialias is False and encoder.name.startswith("inception-tf1-")
    assert encoder.model.made_of == ("inception-v3-compat", ["2048"], str(tmp_path / "weights.pth"))
    assert encoder.images([Image.new("RGB", (4, 4), (1, 2, 3))]).tolist() == [[2.0, 4.0, 6.0]]


def test_swapped_captions_lower_clipscore_and_retrieval() -> None:
    judge, names = ColourClip(""), list(COLOURS)
    images = judge.images([Image.new("RGB", (4, 4), colour) for colour in COLOURS.values()])[:, None]
    for texts, score, found in ((names, 100, 1.0), (names[1:] + names[:1], 40, 0.0)):
        embedded, prompts = judge.texts([f"a {name} apple" for name in texts])[0], texts
        assert clip_scores(images, embedded).mean() <= score + 1e-3
        assert retrieval_hits(images, embedded, prompts).mean() == found
    assert clip_scores(images, judge.texts(names)[0]).min() == pytest.approx(100, abs=1e-3)


def test_retrieval_counts_ties_as_misses_and_the_same_text_as_no_rival() -> None:
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    images = torch.tensor([[[1.0, 0.1], [1.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]], [[0.1, 1.0], [0.2, 1.0]]])
    hits = retrieval_hits(images, texts, ["apple", "cup", "cup"])
    assert hits.tolist() == [[1, 0], [1, 0], [1, 1]]  # the second picture of the first prompt is as near to both
    with pytest.raises(ValueError, match="two or more different prompts"):
        retrieval_hits(images, texts, ["cup"] * 3)


def test_best_of_n_takes_the_highest_score_and_needs_a_choice() -> None:
    assert best_of(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 1.0], [0.0, 0.0, 9.0]])).tolist() == [[1], [0], [2]]
    with pytest.raises(ValueError, match="2 or more pictures of each prompt"):
        best_of(torch.ones(4, 1))


def test_intervals_of_a_mean_come_near_the_normal_ones() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)) + 7
    low, high = mean_interval(values, confidence=0.9)
    reach = 1.645 * values.std().item() / 500**0.5
    assert low == pytest.approx(values.mean().item() - reach, abs=0.1 * reach)
    assert high == pytest.approx(values.mean().item() + reach, abs=0.1 * reach)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(torch.full((5,), 2.0)) == (2.0, 2.0)
    assert mean_interval(torch.ones(1)) is None


def test_the_interval_of_a_frechet_distance_holds_its_value_and_narrows_with_more_pictures() -> None:
    true = features(400)
    width = {}
    for count in (50, 400):
        drawn = features(400)[:count] + 0.5 * torch.randn(count, 6)
        low, high = frechet_interval(drawn, true, resamples=30)
        value = frechet_distance(drawn, true)
        assert low == pytest.approx(max(0.0, 2 * value - high)) and value < high
        width[count] = high - value
    assert 0 < width[400] < width[50]
    assert frechet_interval(true + 1e-4 * torch.randn_like(true), true, resamples=30)[0] == 0.0
    assert frechet_interval(true, true, resamples=0) is None
