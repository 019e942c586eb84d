"""
VQ-GANs become `VQModel`s with the same codes and pictures, in float64, against three independent truths: a plain
reference of the originals' arithmetic (below), transformers' ChameleonVQVAE and JanusVQVAE, and diffusers' VQModel.

In the reference, the place of every attention block is written out by hand for each case.
"""

import copy
import json
from dataclasses import dataclass, field

import pytest
import torch
from diffusers import VQModel
from torch.nn import functional as F

from mars_hf.conversion.convert import read_vqgan_config
from mars_hf.conversion.renames import RenameTable
from mars_hf.conversion.vqgan import (
    READERS,
    SOURCES,
    convert_vqgan_state_dict,
    detect_vqgan_source,
    vqgan_rename_table,
)
from mars_hf.image_processing_mars import decode_codes, encode_pixels

CHANNELS, LATENT, DIM, CODES = 32, 8, 6, 48


@dataclass
class Original:
    """A random VQ-GAN under its owner's names; levels are counted from the highest resolution."""

    source: str
    config: dict
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    down_attention: set[int] = field(default_factory=set)
    up_attention: set[int] = field(default_factory=set)
    mid_attention: bool = True
    search: str = "nearest"

    def __post_init__(self):
        self.llamagen = self.source in ("llamagen", "janus")
        self.mid = ("mid.0", "mid.1", "mid.2") if self.llamagen else ("mid.block_1", "mid.attn_1", "mid.block_2")
        self.tensors = {}
        for half, inputs, outputs in (("encoder", 3, LATENT), ("decoder", LATENT, 3)):
            self._add_half(half, inputs, outputs)
        self._add_convolution("quant_conv", LATENT, DIM, 1)
        self._add_convolution("post_quant_conv", DIM, LATENT, 1)
        self.tensors["quantize.embedding.weight"] = torch.randn(CODES, DIM, dtype=torch.float64)

    def level(self, half: str, level: int) -> str:
        if not self.llamagen:
            return f"encoder.down.{level}" if half == "encoder" else f"decoder.up.{level}"
        return f"{half}.conv_blocks.{level if half == 'encoder' else len(self.multipliers) - 1 - level}"

    def resnet(self, half: str, level: int, block: int) -> str:
        return f"{self.level(half, level)}.{'res' if self.llamagen else 'block'}.{block}"

    def _add_half(self, half: str, inputs: int, outputs: int) -> None:
        levels = list(range(len(self.multipliers)))
        down = half == "encoder"
        width = CHANNELS if down else CHANNELS * self.multipliers[-1]
        self._add_convolution(f"{half}.conv_in", inputs, width, 3)
        if not down:
            self._add_mid(half, width)
        for level in levels if down else levels[::-1]:
            for block in range(self.blocks if down else self.blocks + 1):
                new_width = CHANNELS * self.multipliers[level]
                self._add_resnet(self.resnet(half, level, block), width, new_width)
                width = new_width
                if level in (self.down_attention if down else self.up_attention):
                    self._add_attention(f"{self.level(half, level)}.attn.{block}", width)
            if level != (levels[-1] if down else 0):
                name = f"{self.level(half, level)}.{'downsample' if down else 'upsample'}.conv"
                self._add_convolution(name, width, width, 3)
        if down:
            self._add_mid(half, width)
        self._add_norm(f"{half}.norm_out", width)
        self._add_convolution(f"{half}.conv_out", width, outputs, 3)

    def _add_mid(self, half: str, width: int) -> None:
        self._add_resnet(f"{half}.{self.mid[0]}", width, width)
        if self.mid_attention:
            self._add_attention(f"{half}.{self.mid[1]}", width)
        self._add_resnet(f"{half}.{self.mid[2]}", width, width)

    def _add_resnet(self, name: str, width: int, new_width: int) -> None:
        self._add_norm(f"{name}.norm1", width)
        self._add_convolution(f"{name}.conv1", width, new_width, 3)
        self._add_norm(f"{name}.norm2", new_width)
        self._add_convolution(f"{name}.conv2", new_width, new_width, 3)
        if width != new_width:
            self._add_convolution(f"{name}.nin_shortcut", width, new_width, 1)

    def _add_attention(self, name: str, width: int) -> None:
        self._add_norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            self._add_convolution(f"{name}.{part}", width, width, 1)

    def _add_norm(self, name: str, width: int) -> None:
        self.tensors[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, dtype=torch.float64)
        self.tensors[f"{name}.bias"] = 0.3 * torch.randn(width, dtype=torch.float64)

    def _add_convolution(self, name: str, width: int, new_width: int, kernel: int) -> None:
        weight = torch.randn(new_width, width, kernel, kernel, dtype=torch.float64)
        self.tensors[f"{name}.weight"] = weight / (width * kernel**2) ** 0.5
        self.tensors[f"{name}.bias"] = 0.1 * torch.randn(new_width, dtype=torch.float64)

    # The arithmetic, from the owners' papers and code, as plainly as it goes.

    def convolve(self, name: str, x: torch.Tensor, **options) -> torch.Tensor:
        return F.conv2d(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], **options)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(1, (32, -1))
        mean = groups.mean((2, 3, 4), keepdim=True)
        variance = (groups - mean).square().mean((2, 3, 4), keepdim=True)
        x = ((groups - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
        return x * self.tensors[f"{name}.weight"].view(-1, 1, 1) + self.tensors[f"{name}.bias"].view(-1, 1, 1)

    def run_resnet(self, name: str, x: torch.Tensor) -> torch.Tensor:
        h = x
        for part in "12":
            h = self.norm(f"{name}.norm{part}", h)
            h = self.convolve(f"{name}.conv{part}", h * h.sigmoid(), padding=1)
        return h + (self.convolve(f"{name}.nin_shortcut", x) if h.shape[1] != x.shape[1] else x)

    def run_attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.convolve(f"{name}.{part}", h).flatten(2) for part in "qkv")  # (batch, channels, positions)
        scores = torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5
        h = torch.einsum("bij,bcj->bci", scores.softmax(-1), v).view_as(x)
        return x + self.convolve(f"{name}.proj_out", h)

    def run_mid(self, half: str, x: torch.Tensor) -> torch.Tensor:
        x = self.run_resnet(f"{half}.{self.mid[0]}", x)
        x = self.run_attention(f"{half}.{self.mid[1]}", x) if self.mid_attention else x
        return self.run_resnet(f"{half}.{self.mid[2]}", x)

    def run_end(self, half: str, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(f"{half}.norm_out", x)
        return self.convolve(f"{half}.conv_out", x * x.sigmoid(), padding=1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.convolve("encoder.conv_in", pixels, padding=1)
        for level in range(len(self.multipliers)):
            for block in range(self.blocks):
                x = self.run_resnet(self.resnet("encoder", level, block), x)
                if level in self.down_attention:
                    x = self.run_attention(f"{self.level('encoder', level)}.attn.{block}", x)
            if level < len(self.multipliers) - 1:
                x = self.convolve(f"{self.level('encoder', level)}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        return self.convolve("quant_conv", self.run_end("encoder", self.run_mid("encoder", x)))

    def quantise(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give codes `(batch, height, width)` and what the decoder gets for them."""
        z, codebook = latents.permute(0, 2, 3, 1), self.tensors["quantize.embedding.weight"]
        if self.search == "cosine":
            z, codebook = z / z.norm(dim=-1, keepdim=True), codebook / codebook.norm(dim=-1, keepdim=True)
        if self.search == "inner product":
            codes = (z @ codebook.T).argmax(-1)
        else:
            codes = (z[..., None, :] - codebook).square().sum(-1).argmin(-1)
        return codes, codebook[codes].permute(0, 3, 1, 2)

    def decode(self, quantised: torch.Tensor) -> torch.Tensor:
        x = self.convolve("decoder.conv_in", self.convolve("post_quant_conv", quantised), padding=1)
        x = self.run_mid("decoder", x)
        for level in reversed(range(len(self.multipliers))):
            for block in range(self.blocks + 1):
                x = self.run_resnet(self.resnet("decoder", level, block), x)
                if level in self.up_attention:
                    x = self.run_attention(f"{self.level('decoder', level)}.attn.{block}", x)
            if level:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.convolve(f"{self.level('decoder', level)}.upsample.conv", x, padding=1)
        return self.run_end("decoder", x)


def taming_config(resolution=16, attn_resolutions=(), ch_mult=(1, 2, 2), target=None, **params):
    dd = {"double_z": False, "z_channels": LATENT, "resolution": resolution, "in_channels": 3, "out_ch": 3}
    dd |= {"ch": CHANNELS, "ch_mult": list(ch_mult), "num_res_blocks": 2, "dropout": 0.1}
    dd |= {"attn_resolutions": None if attn_resolutions is None else list(attn_resolutions)}
    params = {"ddconfig": dd, "n_embed": CODES, "embed_dim": DIM, "lossconfig": {"target": "Loss"}} | params
    return {"target": target, "params": params} if target else {"params": params}


def muse_config(**fields):
    config = {"_class_name": "VQGANModel", "_version": "0.0.1", "resolution": 16, "hidden_channels": CHANNELS}
    config |= {"channel_mult": [1, 2, 2], "attn_resolutions": [], "z_channels": LATENT, "num_embeddings": CODES}
    return config | {"quantized_embed_dim": DIM, "commitment_cost": 0.25} | fields


def llamagen_config(**fields):
    config = {"encoder_ch_mult": [1, 2, 2], "decoder_ch_mult": [1, 2, 2], "z_channels": LATENT, "ch": CHANNELS}
    return config | {"codebook_size": CODES, "codebook_embed_dim": DIM} | fields


def make_original(case: str) -> Original:
    torch.manual_seed(0)
    ends = {"down_attention": {2}, "up_attention": {2}}
    match case:
        case "taming":  # 16, 8 and 4 codes wide
            config = taming_config(attn_resolutions=[8], target="taming.models.vqgan.VQModel")
            return Original("taming", config, down_attention={1}, up_attention={1})
        case "taming, odd resolution":  # down: 18, 9, 4; up: 4, 8, 16
            config = taming_config(18, [9, 16])
            return Original("taming", config, down_attention={1}, up_attention={0})
        case "muse":
            return Original("muse", muse_config(no_attn_mid_block=True), mid_attention=False)
        case "muse, attention":
            return Original("muse", muse_config(attn_resolutions=[4]), **ends)
        case "chameleon":
            return Original("chameleon", taming_config(512, None, ch_mult=[1, 2], attn_type="vanilla"), (1, 2))
        case "ibq":
            config = taming_config(attn_resolutions=[4], target="src.IBQ.models.ibqgan.IBQ", cosine_similarity=False)
            return Original("ibq", config, search="inner product", **ends)
        case "llamagen":
            return Original("llamagen", llamagen_config(), search="cosine", **ends)
        case "llamagen, two levels":
            config = llamagen_config(encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2))
            return Original("llamagen", config, (1, 2), down_attention={1}, up_attention={1}, search="cosine")
        case "janus":
            return Original("janus", llamagen_config(num_res_blocks=1), blocks=1, search="cosine", **ends)
        case "llamagen, no l2 norm":
            return Original("llamagen", llamagen_config(codebook_l2_norm=False), **ends)
    raise KeyError(case)


CASES = [
    "taming",
    "taming, odd resolution",
    "muse",
    "muse, attention",
    "chameleon",
    "ibq",
    "llamagen",
    "llamagen, two levels",
    "janus",
    "llamagen, no l2 norm",
]


def load(vq_config: dict, tensors: dict) -> VQModel:
    model = VQModel.from_config(vq_config).to(next(iter(tensors.values())).dtype).eval()
    model.load_state_dict(tensors, strict=True)
    return model


def make_pictures() -> list[torch.Tensor]:
    shapes = {"small": (2, 3, 16, 16), "large": (1, 3, 32, 32), "not square": (1, 3, 16, 24)}
    pictures = [torch.rand(shape, dtype=torch.float64) * 2 - 1 for shape in shapes.values()]
    low_contrast = 1e-3 * torch.randn(1, 3, 24, 16, dtype=torch.float64)  # here another epsilon would show
    return [*pictures, low_contrast]


@pytest.fixture(scope="module", params=CASES)
def converted(request):
    original = make_original(request.param)
    vq_config, tensors = convert_vqgan_state_dict(original.tensors, original.config, original.source)
    return original, vq_config, load(vq_config, tensors)


@torch.no_grad()
def test_codes_latents_and_pictures_equal_the_originals(converted):
    original, _, model = converted
    chosen = set()
    for pixels in make_pictures():
        latents = original.encode(pixels)
        codes, quantised = original.quantise(latents)
        chosen |= set(codes.flatten().tolist())
        assert (model.encode(pixels).latents[:, :DIM] - latents).abs().max() < 1e-9
        assert torch.equal(torch.stack(encode_pixels(model, pixels)), codes)
        pictures = original.decode(quantised)
        assert (torch.stack(decode_codes(model, codes)) - pictures).abs().max() < 1e-9
        assert (model(pixels).sample - pictures).abs().max() < 1e-9
    assert len(chosen) > 8  # a search that always finds the same proves nothing


def test_names_lead_there_and_back(converted):
    original, vq_config, model = converted
    table = vqgan_rename_table(original.source, vq_config)
    names = list(original.tensors)
    assert {table.forward(name) for name in names} == set(model.state_dict())
    assert [table.backward(table.forward(name)) for name in names] == names


def test_converting_leaves_tensors_and_configuration_alone(converted):
    original, vq_config, _ = converted
    tensors = {name: tensor.clone() for name, tensor in original.tensors.items()}
    config = copy.deepcopy(original.config)
    again, _ = convert_vqgan_state_dict(original.tensors, original.config, original.source)
    assert again == vq_config and original.config == config
    assert all(torch.equal(original.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("wrap", ["ema", "model", "state_dict"])
@pytest.mark.parametrize("case", ["taming", "muse", "llamagen", "ibq"])
def test_wrapped_checkpoints_are_unwrapped_and_their_format_is_found(case, wrap):
    original = make_original(case)
    inside = original.tensors | {"loss.discriminator.weight": torch.zeros(3), "colorize": torch.zeros(1)}
    if case == "llamagen":
        inside["quantize.codebook_used"] = torch.zeros(65536)
    checkpoint = {wrap: inside, "epoch": 3, "optimizer_states": [{}]}
    assert detect_vqgan_source(checkpoint, original.config) == original.source
    expected = convert_vqgan_state_dict(original.tensors, original.config, original.source)
    vq_config, tensors = convert_vqgan_state_dict(checkpoint, original.config)
    assert vq_config == expected[0] and tensors.keys() == expected[1].keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected[1].items())


def test_averages_come_before_trained_weights():
    original = make_original("llamagen")
    averages = {name: tensor + 1 for name, tensor in original.tensors.items()}
    _, tensors = convert_vqgan_state_dict({"model": original.tensors, "ema": averages}, original.config)
    assert torch.equal(tensors["encoder.conv_in.bias"], original.tensors["encoder.conv_in.bias"] + 1)


def test_averages_under_names_without_dots_are_chosen_by_the_configuration():
    original = make_original("ibq")
    averages = {f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in original.tensors.items()}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7)}
    checkpoint = {"state_dict": original.tensors | averages | counters}
    for use_ema in (True, False):
        config = copy.deepcopy(original.config)
        config["params"]["use_ema"] = use_ema
        _, tensors = convert_vqgan_state_dict(checkpoint, config)
        assert torch.equal(tensors["encoder.conv_in.bias"], original.tensors["encoder.conv_in.bias"] + use_ema)
    with pytest.raises(ValueError, match="two sets of weights.*`use_ema`"):
        convert_vqgan_state_dict(checkpoint, original.config)
    del checkpoint["state_dict"]["model_ema.encoderconv_inbias"]
    config["params"]["use_ema"] = True
    with pytest.raises(ValueError, match=r"missing \(1\): encoder.conv_in.bias"):
        convert_vqgan_state_dict(checkpoint, config)


def test_a_whole_janus_gives_its_vqgan():
    original = make_original("janus")
    whole = {f"gen_vision_model.{name}": tensor for name, tensor in original.tensors.items()}
    whole["language_model.lm_head.weight"] = torch.zeros(3)
    _, tensors = convert_vqgan_state_dict(whole, original.config)
    assert torch.equal(tensors["decoder.conv_in.weight"], original.tensors["decoder.conv_in.weight"])


def test_the_configuration_of_a_whole_janus_says_what_its_vqgan_is(tmp_path):
    params = {"image_token_size": 40, "n_embed": 6}  # in the form of the released config.json
    whole = {"architectures": ["MultiModalityCausalLM"], "aligner_config": {"cls": "MlpProjector"}}
    whole["gen_vision_config"] = {"cls": "VQ-16", "model_type": "gen_vision", "params": params}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    config = read_vqgan_config(tmp_path, None)
    assert config == {"codebook_size": 40, "codebook_embed_dim": 6}
    made = READERS["janus"](config)
    assert made["num_vq_embeddings"] == 40 and made["vq_embed_dim"] == 6


def test_every_shape_of_a_yaml_configuration_is_read():
    original = make_original("taming")
    params = original.config["params"]
    expected, _ = convert_vqgan_state_dict(original.tensors, original.config)
    lightning = {"class_path": "taming.models.vqgan.VQModel", "init_args": params}
    for config in (params, {"params": params}, {"model": original.config, "data": {}}, lightning):
        assert convert_vqgan_state_dict(original.tensors, config)[0] == expected
    assert expected["down_block_types"] == ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]
    assert expected["up_block_types"] == ["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"]


@torch.no_grad()
def test_transformers_chameleon_encodes_to_the_same_codes():
    from transformers import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    config = taming_config(16, [8])
    original = Original("chameleon", config, down_attention={1}, up_attention={1})
    sizes = {"embed_dim": DIM, "num_embeddings": CODES, "latent_channels": LATENT, "base_channels": CHANNELS}
    hf_config = ChameleonVQVAEConfig(**sizes, channel_multiplier=[1, 2, 2], resolution=16, attn_resolutions=[8])
    chameleon = ChameleonVQVAE(hf_config).double().eval()
    shared = {name: tensor for name, tensor in original.tensors.items() if not name.startswith("decoder.")}
    chameleon.load_state_dict(shared, strict=True)
    model = load(*convert_vqgan_state_dict(original.tensors, config, "chameleon"))
    for pixels in make_pictures():
        output = chameleon.encode(pixels)
        assert torch.equal(torch.stack(encode_pixels(model, pixels)).flatten(), output.image_tokens.flatten())
        features = chameleon.quant_conv(output.last_hidden_state)
        assert (model.encode(pixels).latents - features).abs().max() < 1e-9


@torch.no_grad()
def test_transformers_janus_decodes_the_same_pictures():
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    original = make_original("llamagen")
    sizes = {"embed_dim": DIM, "num_embeddings": CODES, "latent_channels": LATENT, "base_channels": CHANNELS}
    janus = JanusVQVAE(JanusVQVAEConfig(**sizes, channel_multiplier=[1, 2, 2], num_patches=6)).double().eval()
    changes = {"encoder.conv_blocks": "encoder.down", "decoder.conv_blocks": "decoder.up", ".res.": ".block."}
    changes |= {"mid.0": "mid.block_1", "mid.1": "mid.attn_1", "mid.2": "mid.block_2"}
    ported = dict(original.tensors)
    for old, new in changes.items():
        ported = {name.replace(old, new): tensor for name, tensor in ported.items()}
    janus.load_state_dict(ported, strict=True)
    model = load(*convert_vqgan_state_dict(original.tensors, original.config, "janus"))
    codes = torch.randint(CODES, (2, 6, 6))
    assert (torch.stack(decode_codes(model, codes)) - janus.decode(codes.flatten(1))).abs().max() < 1e-9
    for pixels in make_pictures():
        features = janus.quant_conv(janus.encoder(pixels))
        assert (model.encode(pixels).latents - features).abs().max() < 1e-9


def test_the_released_open_muse_is_the_released_amused():
    # Both configurations as published: valhalla/vqgan-finetune-512-2, and amused/amused-512 in the folder vqvae.
    muse = {"attn_resolutions": [], "channel_mult": [1, 2, 2, 4, 6], "commitment_cost": 0.25, "dropout": 0.0}
    muse |= {"hidden_channels": 128, "no_attn_mid_block": True, "num_channels": 3, "num_embeddings": 8192}
    muse |= {"num_res_blocks": 2, "quantized_embed_dim": 64, "resample_with_conv": True, "resolution": 256}
    muse |= {"z_channels": 64}
    amused = {"act_fn": "silu", "block_out_channels": [128, 256, 256, 512, 768], "latent_channels": 64}
    amused |= {"down_block_types": ["DownEncoderBlock2D"] * 5, "up_block_types": ["UpDecoderBlock2D"] * 5}
    amused |= {"in_channels": 3, "layers_per_block": 2, "mid_block_add_attention": False, "norm_num_groups": 32}
    amused |= {"norm_type": "group", "num_vq_embeddings": 8192, "out_channels": 3, "vq_embed_dim": None}
    with torch.device("meta"):
        shapes = VQModel(**amused).state_dict()
    tensors = {vqgan_rename_table("muse", amused).backward(name): tensor for name, tensor in shapes.items()}
    vq_config, converted = convert_vqgan_state_dict(tensors, muse)
    assert vq_config == amused | {"vq_embed_dim": 64} and converted.keys() == shapes.keys()


def make_diffusers(**fields) -> VQModel:
    down, up = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")
    sizes = {"block_out_channels": (32, 64), "latent_channels": 4, "num_vq_embeddings": 40}
    return VQModel(**{"down_block_types": down, "up_block_types": up, **sizes, **fields}).double().eval()


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"norm_type": "spatial", "vq_embed_dim": 4}, {"lookup_from_codebook": True}])
@pytest.mark.parametrize("old_names", [False, True])
def test_a_vqmodel_stays_what_it_is(fields, old_names):
    source = make_diffusers(**fields)
    config = {"_class_name": "VQModel", "_diffusers_version": "0.25.0.dev0", **dict(source.config)}
    tensors = dict(source.state_dict())
    if old_names:  # as released before attention was renamed, for example with CompVis/ldm-celebahq-256
        changes = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, old in changes.items():
            tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
        assert "encoder.mid_block.attentions.0.proj_attn.bias" in tensors
    assert detect_vqgan_source(tensors, config) == "diffusers"
    vq_config, converted = convert_vqgan_state_dict(tensors, config)
    model = load(vq_config, converted)
    assert {name: value for name, value in model.config.items() if not name.startswith("_")} == vq_config
    table = vqgan_rename_table("diffusers", vq_config, tensors)
    assert [table.backward(table.forward(name)) for name in tensors] == list(tensors)
    pixels = torch.rand(1, 3, 8, 12, dtype=torch.float64)
    assert torch.equal(model(pixels).sample, source(pixels).sample)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llamagen", "ibq", "taming"])
@pytest.mark.parametrize("length", [0.1, 1.0, 20.0])
def test_in_float32_only_ties_within_rounding_are_decided_otherwise(case, length):
    original = make_original(case)
    model = load(*convert_vqgan_state_dict(original.tensors, original.config, original.source)).float()
    latents = length * torch.randn(1, DIM, 64, 64, dtype=torch.float64)
    padded = F.pad(latents, (0, 0, 0, 0, 0, model.config.vq_embed_dim - DIM)).float()
    codes, _ = original.quantise(latents)
    other = model.quantize(padded)[2][2].view_as(codes) != codes
    z, codebook = latents.permute(0, 2, 3, 1), original.tensors["quantize.embedding.weight"]
    if case == "llamagen":
        z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    scores = z @ codebook.T - (0.5 * codebook.square().sum(-1) if case == "taming" else 0)
    best, second = scores.topk(2, dim=-1).values.unbind(-1)
    scale = max(1.0, length) * codebook.norm(dim=-1).max() ** 2
    assert other.sum() <= 4 and (best - second)[other].lt(1e-5 * scale).all()


def test_the_codebook_of_half_precision_is_computed_in_float32():
    for case in ("llamagen", "ibq"):
        original = make_original(case)
        half = {name: tensor.half() for name, tensor in original.tensors.items()}
        _, tensors = convert_vqgan_state_dict(half, original.config)
        codes = tensors["quantize.embedding.weight"]
        assert codes.dtype == torch.float32 and tensors["quant_conv.weight"].dtype == torch.float16
        lengths = codes.norm(dim=-1)
        assert (lengths - lengths[0]).abs().max() < 1e-6 * lengths[0]


def test_codes_without_direction_are_refused():
    original = make_original("llamagen")
    original.tensors["quantize.embedding.weight"][[3, 7]] = 0
    with pytest.raises(ValueError, match=r"codes \[3, 7\] have no direction"):
        convert_vqgan_state_dict(original.tensors, original.config)


@pytest.mark.parametrize("case", ["taming", "llamagen"])
def test_every_wrong_tensor_is_listed(case):
    original = make_original(case)
    tensors = dict(original.tensors)
    del tensors["quant_conv.bias"], tensors["decoder.norm_out.weight"]
    tensors["encoder.surplus.weight"] = torch.zeros(2)
    tensors["quantize.embedding.weight"] = torch.zeros(CODES + 1, DIM)
    tensors["post_quant_conv.bias"] = torch.zeros(LATENT, dtype=torch.int8)
    with pytest.raises(ValueError) as error:
        convert_vqgan_state_dict(tensors, original.config)
    lines = str(error.value).splitlines()[1:]
    assert lines[0].startswith("missing (2): ") and set(lines[0][13:].split(", ")) == {
        "quant_conv.bias",
        "decoder.norm_out.weight",
    }
    assert lines[1:] == [
        "unexpected (1): encoder.surplus.weight",
        f"of another shape (1): quantize.embedding.weight is ({CODES + 1}, {DIM}), expected ({CODES}, {DIM})",
        "not floating point (1): post_quant_conv.bias",
    ]


def test_attention_that_the_configuration_does_not_know_is_listed():
    original = make_original("taming")
    config = taming_config(attn_resolutions=[4])
    with pytest.raises(ValueError, match=r"\nmissing .*encoder.down.2.attn.0.*\nunexpected .*encoder.down.1.attn.0"):
        convert_vqgan_state_dict(original.tensors, config)


REFUSED_OPTIONS = [
    ("taming", {"double_z": True}, {}, "mean and variance"),
    ("taming", {"resamp_with_conv": False}, {}, "resamples without convolutions"),
    ("taming", {"tanh_out": True}, {}, "ends in a tanh"),
    ("taming", {"give_pre_end": True}, {}, "stops before the last"),
    ("taming", {"use_linear_attn": True}, {}, "attention is linear"),
    ("taming", {"attn_type": "linear"}, {}, "attention is linear"),
    ("taming", {"norm_type": "batch"}, {}, "other norms"),
    ("taming", {"activation": "gelu"}, {}, r"does not know: \['activation'\]"),
    ("taming", {"ch_mult": [2, 2, 4]}, {}, "gives 32 channels and its first level 64"),
    ("taming", {"num_res_blocks": [2, 2, 1]}, {}, "different numbers of residual blocks"),
    ("taming", {}, {"n_embed": None}, r"Missing: \['n_embed'\]"),
    ("taming", {}, {"remap": "used.npy"}, "remapped"),
    ("taming", {}, {"l2_normalize": True}, "normalises codes when it encodes"),
    ("taming", {}, {"kl_weight": 1e-8}, "Gumbel"),
    ("ibq", {}, {"cosine_similarity": True}, "searches by cosine"),
]


@pytest.mark.parametrize(("case", "ddconfig", "params", "message"), REFUSED_OPTIONS)
def test_what_a_vqmodel_does_not_compute_is_refused(case, ddconfig, params, message):
    original = make_original(case)
    config = copy.deepcopy(original.config)
    config["params"] |= params
    config["params"]["ddconfig"] |= ddconfig
    with pytest.raises(ValueError, match=message):
        convert_vqgan_state_dict(original.tensors, config, original.source)


REFUSED_FIELDS = [
    ("llamagen", {"norm_type": "batch"}, "other norms"),
    ("llamagen", {"decoder_ch_mult": [1, 1, 2]}, "`decoder_ch_mult`"),
    ("llamagen", {"activation": "gelu"}, r"does not know: \['activation'\]"),
    ("muse", {"decoder_res_blocks": 3}, "`decoder_res_blocks`"),
    ("muse", {"decoder_hidden_channels": 64}, "`decoder_hidden_channels`"),
    ("muse", {"decoder_channel_mult": [1, 1, 2]}, "`decoder_channel_mult`"),
    ("muse", {"extra_mid_res_blocks": 1}, "further residual blocks"),
    ("muse", {"resample_with_conv": False}, "resamples without convolutions"),
    ("muse", {"num_res_blocks": 1, "attn_resolutions": [4]}, "leaves out attention"),
    ("muse", {"_class_name": "MaskGitVQGAN"}, "MaskGIT"),
    ("muse", {"_class_name": "MOVQ"}, "spatial norm"),
]


@pytest.mark.parametrize(("case", "fields", "message"), REFUSED_FIELDS)
def test_what_a_vqmodel_does_not_compute_is_refused_in_flat_configurations(case, fields, message):
    original = make_original(case)
    with pytest.raises(ValueError, match=message):
        convert_vqgan_state_dict(original.tensors, original.config | fields, original.source)


def test_muse_blocks_that_equal_the_encoders_are_no_difference():
    original = make_original("muse")
    same = {"decoder_res_blocks": [2, 2, 2], "decoder_hidden_channels": 32, "decoder_channel_mult": (1, 2, 2)}
    expected, _ = convert_vqgan_state_dict(original.tensors, original.config)
    assert convert_vqgan_state_dict(original.tensors, original.config | same)[0] == expected


REFUSED_TENSORS = [
    ("encoder.time_res_stack.0.conv1.conv.weight", (4, 4), "3-D tokenizer"),
    ("encoder.conv_out.conv.weight", (4, 4, 3, 1, 1), "3-D tokenizer"),
    ("decoder.mid.block_1.norm1.conv_y.weight", (4, 4, 1, 1), "spatial norm"),
    ("decoder.up.0.block.0.norm1.norm_layer.weight", (4,), "spatial norm"),
    ("quantize.embed.weight", (4, 4), "Gumbel"),
    ("quantize.proj.weight", (4, 4, 1, 1), "Gumbel"),
    ("decoder.adaptive.0.gamma.weight", (4, 4), "lookup-free"),
    ("encoder.down.0.block.0.temb_proj.weight", (4, 4), "timestep"),
    ("encoder.down.0.block.0.conv_shortcut.weight", (4, 4, 3, 3), "3x3 convolutions"),
    ("encoder.norm_out.running_mean", (4,), "batch norms"),
    ("quantize.used", (4,), "remapped"),
    ("decoder.mid.extra_mid_res_blocks.0.conv1.weight", (4, 4), "further residual blocks"),
    ("decoder.up.1.upsample_conv.weight", (4, 4), "MaskGIT"),
    ("model.vqmodel.encoder.conv_in.weight", (4, 4), "transformers' own port"),
]


@pytest.mark.parametrize("source", ["taming", None])
@pytest.mark.parametrize(("name", "shape", "message"), REFUSED_TENSORS)
def test_tensors_that_a_vqmodel_has_no_place_for_are_refused(name, shape, message, source):
    original = make_original("taming")
    tensors = original.tensors | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"cannot become a diffusers `VQModel` exactly.*{message}"):
        convert_vqgan_state_dict(tensors, original.config, source)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target": "taming.models.vqgan.GumbelVQ"}, "Gumbel"),
        ({"class_path": "src.Open_MAGVIT2.models.lfqgan.VQModel"}, "lookup-free"),
        ({"target": "movqgan.models.vqgan.MOVQ"}, "spatial norm"),
        ({"model_type": "Emu3VisionVQ"}, "3-D tokenizer"),
        ({"model_type": "emu3_vqgan"}, "3-D tokenizer"),
        ({"model_type": "chameleon_vqgan"}, "transformers' own port"),
        ({"model_type": "janus_vqgan"}, "transformers' own port"),
    ],
)
def test_classes_that_a_vqmodel_cannot_hold_are_refused(config, message):
    original = make_original("taming")
    with pytest.raises(ValueError, match=message):
        convert_vqgan_state_dict(original.tensors, original.config | config)


def test_a_network_without_a_codebook_is_refused():
    original = make_original("taming")
    tensors = {name: tensor for name, tensor in original.tensors.items() if "quant" not in name}
    with pytest.raises(ValueError, match="lookup-free"):
        convert_vqgan_state_dict(tensors, original.config)


def test_another_class_of_diffusers_is_refused():
    source = make_diffusers()
    for change, message in (
        ({"_class_name": "CompressiveVQModel"}, "another class of diffusers"),
        ({"ch": 128}, r"does not know: \['ch'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_vqgan_state_dict(source.state_dict(), dict(source.config) | change)


def test_taming_and_ibq_are_never_confused():
    ibq = make_original("ibq")
    bare = {"ddconfig": ibq.config["params"]["ddconfig"], "n_embed": CODES, "embed_dim": DIM}
    assert detect_vqgan_source(ibq.tensors, bare | {"entropy_temperature": 0.01}) == "ibq"
    assert detect_vqgan_source(ibq.tensors, bare) == "taming"
    baseline = {"class_path": "src.IBQ.models.ibqgan.VQModel", "init_args": bare}
    assert detect_vqgan_source(ibq.tensors, baseline) == "taming"
    with pytest.raises(ValueError, match="the codes would differ"):
        convert_vqgan_state_dict(ibq.tensors, ibq.config, "taming")
    with pytest.raises(ValueError, match="the codes would differ"):
        convert_vqgan_state_dict(ibq.tensors, baseline, "ibq")
    four_blocks = ibq.tensors | {"encoder.down.0.block.3.conv1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match='Give `source="taming"` or `source="ibq"`'):
        detect_vqgan_source(four_blocks, bare)


@pytest.mark.parametrize(
    ("state_dict", "config", "source", "message"),
    [
        ({}, {}, None, "it is empty"),
        ([], {}, None, "must be a dict of tensors, got list"),
        ({"weight": torch.zeros(1)}, "config.yaml", None, "must be the original's own configuration"),
        ({"weight": torch.zeros(1), "epoch": 3}, {}, None, r"these entries are none: \['epoch'\]"),
        ({"weight": torch.zeros(1)}, {}, None, r"no VQ-GAN of a known format.*\['weight'\]"),
        ({"weight": torch.zeros(1)}, {}, "vqgan", "`source` must be one of"),
        ({"weight": torch.zeros(1)}, {"ddconfig": {}}, "taming", r"Missing: \['n_embed', 'embed_dim'"),
    ],
)
def test_nonsense_is_refused(state_dict, config, source, message):
    with pytest.raises(ValueError, match=message):
        convert_vqgan_state_dict(state_dict, config, source)


def test_the_first_rename_that_fits_decides():
    table = RenameTable([("up.0.{kind}", "blocks.1.{kind}"), ("up.{level}.{kind}", "other.{kind}.{level}")])
    assert table.forward("up.0.bias") == "blocks.1.bias" and table.backward("blocks.1.bias") == "up.0.bias"
    assert table.forward("up.3.bias") == "other.bias.3" and table.backward("other.bias.3") == "up.3.bias"
    assert table.forward("up.0") is None and table.forward("up.0.a.b") is None and table.backward("up.0.bias") is None
    assert table.forward("upx0.bias") is None  # a dot is a dot


@pytest.mark.parametrize("pair", [("a.{x}", "b"), ("a.{x}", "b.{y}"), ("a.{x}.{x}", "b.{x}.{x}")])
def test_renames_that_cannot_be_reversed_are_refused(pair):
    with pytest.raises(ValueError, match="the same fields, each once"):
        RenameTable([pair])


def test_every_source_is_tested():
    assert {make_original(case).source for case in CASES} | {"diffusers"} == set(SOURCES)
