"""The dry run against what it foretells: parameters of real models, FLOPs and memory of real steps."""

import copy
import json
from itertools import accumulate

import pytest
import torch
import yaml
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, TrainingArguments
from typer.testing import CliRunner

from mars_hf import DEFAULT_CHECKPOINT, MarsConfig, MarsForConditionalGeneration
from mars_hf.cli import app
from mars_hf.modeling_mars import is_visual_parameter
from mars_hf.training.collation import AlignedCollator, PackedCollator
from mars_hf.training.estimate import (
    Method,
    StepShape,
    count_flops,
    count_parameters,
    estimate_cost,
    estimate_memory,
    paper_utilisation,
)
from mars_hf.training.recipe import AdapterPart, Recipe
from mars_hf.training.run import with_adapter
from mars_hf.training.trainer import MarsTrainer

TEXT = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}


class RealStep:
    """A step of [`MarsTrainer`] on four rows, as a run makes it, and what the dry run knows of it."""

    def __init__(
        self,
        folder,
        task="text-to-image",
        packed=False,
        attention="eager",
        training=None,
        loss=None,
        adapter=None,
        **fields,
    ):
        loss, training = {"scope": "joint", "chunk_size": 2048, **(loss or {})}, training or {}
        config = MarsConfig(text_config=Qwen2Config(**TEXT), codebook_size=500, downsample_factor=4, **fields)
        config._attn_implementation = attention
        model = MarsForConditionalGeneration(config)
        if config.use_visual_expert:
            model.freeze_text()
        if adapter is not None:
            model = with_adapter(model, adapter)
        rows = [self.row(config, task, words) for words in (20, 21, 22, 23)]
        args = TrainingArguments(
            str(folder), max_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False, **training
        )
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        settings = {"loss_scope": loss["scope"], "chunk_size": loss["chunk_size"]}
        self.trainer = MarsTrainer(model=model, args=args, train_dataset=rows, **settings)
        self.trainer.create_optimizer()
        self.model, self.optimizer = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        packs = PackedCollator(config, 0, max_length=200)
        self.batch = packs([rows[:2], rows[2:]]) if packed else AlignedCollator(config, 0)(rows)
        self.method = Method(
            **loss,
            is_spread=False,
            optimizer="adamw",
            checkpointing=args.gradient_checkpointing,
            bf16=args.bf16,
            gpus=1,
            **({} if adapter is None else {"adapter": adapter}),
        )
        self.config = config
        self.shape = StepShape.of(self.batch, rows, config, self.method.prompts_without_gradient)

    @staticmethod
    def row(config, task, words):
        codes = [config.image_token_offset + code for code in range(64)]
        prompt, picture = [5] * words, [config.image_start_token_id, *codes, config.image_end_token_id]
        if task == "captioning":
            ids, labels = [*picture, *prompt], [-100] * len(picture) + prompt
        else:
            ids, labels = [*prompt, *picture], [-100] * (words + 1) + codes + [-100]
        return {"input_ids": ids, "labels": labels, "image_sizes": [(32, 32)], "task": task}

    def run(self):
        return self.trainer.training_step(self.model, self.batch, (self.batch["labels"] != -100).sum())


CHECKPOINTING = {"training": {"gradient_checkpointing": True}}
STEPS = {
    "prompts without gradient": {},
    "captioning": {"task": "captioning"},
    "packed": {"packed": True},
    "codes compete with codes": {"packed": True, "loss": {"scope": "grammar"}},
    "in chunks": {"loss": {"chunk_size": 100}},
    "checkpointing": CHECKPOINTING,
    "checkpointing captions in chunks": {**CHECKPOINTING, "task": "captioning", "loss": {"chunk_size": 16}},
    "output experts": {"task": "captioning", "expert_output_projection": True},
    "both experts for all": {"task": "captioning", "expert_impl": "where"},
    "no visual experts": {"use_visual_expert": False},
    "adapter": {"adapter": AdapterPart(8)},
    "adapter on all experts": {"adapter": AdapterPart(8, experts="all")},
    "adapter on all experts, captioning": {"adapter": AdapterPart(8, experts="all"), "task": "captioning"},
    "adapter, checkpointing": {"adapter": AdapterPart(8, experts="all"), **CHECKPOINTING},
    "adapter on output experts": {"adapter": AdapterPart(8, experts="all"), "expert_output_projection": True},
}


@pytest.mark.parametrize("name", STEPS)
def test_the_flops_of_a_step_are_those_that_torch_counts(tmp_path, name):
    step = RealStep(tmp_path, **STEPS[name])
    with FlopCounterMode(display=False) as counter:
        step.run()
    estimated = count_flops(step.config, step.shape, step.method)
    assert abs((estimated.model + estimated.recomputed) / counter.get_total_flops() - 1) < 0.02
    assert (estimated.recomputed > 0) == (step.method.checkpointing or step.method.chunk_size < 2048)


MEASURED = ["prompts without gradient", "captioning", "packed", "in chunks", "checkpointing"]
MEASURED += [name for name in STEPS if name.startswith("adapter")]


def peak_growth(call):
    """Bytes that are allocated at once during a call, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("bf16", [False, True])
def test_the_memory_of_a_step_is_measured_within_15_percent(tmp_path, name, bf16):
    settings = copy.deepcopy(STEPS[name])
    settings["training"] = {**settings.get("training", {}), "bf16": bf16}
    step = RealStep(tmp_path, attention="sdpa", **settings)
    step.run()  # the gradients of an earlier batch of the same step
    step.optimizer.step()  # and states
    parameters = list(step.model.parameters())
    gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    states = sum(tensor.nbytes for state in step.optimizer.state.values() for tensor in state.values())
    before = {"weights, float32": sum(p.nbytes for p in parameters), "gradients": gradients, "optimizer": states}
    growth = peak_growth(step.run)
    estimated = estimate_memory(step.config, step.shape, step.method)
    for kind, measured in before.items():
        assert abs(estimated.pop(kind) / measured - 1) < 0.01
    assert abs(sum(estimated.values()) / growth - 1) < 0.15


@pytest.mark.parametrize(
    "fields", [{}, {"tied": True}, {"expert_output_projection": True}, {"use_visual_expert": False}]
)
def test_the_parameters_of_each_part_are_those_of_a_real_model(make_model, fields):
    model = make_model(**fields)
    parts = count_parameters(model.config)
    named = dict(model.named_parameters())
    assert sum(part.parameters for part in parts.values()) == sum(p.numel() for p in named.values())
    experts = model.config.use_visual_expert
    trained = [n for n in named if not n.startswith("vqgan.") and (is_visual_parameter(n) or not experts)]
    assert sum(part.trained for part in parts.values()) == sum(named[name].numel() for name in trained)
    assert parts["VQ-GAN"].parameters == sum(p.numel() for p in model.vqgan.parameters())
    assert parts["vision head"].parameters == model.vision_head.weight.numel()
    assert ("text head" in parts) == (not fields.get("tied", False))


@pytest.mark.parametrize("experts", ["visual", "all"])
def test_of_an_adapter_its_own_parameters_alone_train(recipe, tmp_path, experts):
    model = {"base": str(tmp_path / "base"), "adapter": {"r": 4, "experts": experts}}
    parts = estimate_cost(recipe(model=model)).parameters
    real = with_adapter(MarsForConditionalGeneration.from_pretrained(tmp_path / "base"), AdapterPart(4, None, experts))
    numbers = sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)
    assert {name: part.trained for name, part in parts.items() if part.trained} == {"adapter": numbers}
    assert parts.pop("adapter").parameters == numbers
    assert parts.keys() == count_parameters(real.config).keys()


def test_several_gpus_divide_what_they_own(tmp_path):
    step = RealStep(tmp_path)
    one = estimate_memory(step.config, step.shape, step.method)
    four = estimate_memory(step.config, step.shape, Method("joint", 2048, False, "adamw", False, False, gpus=4))
    for kind in ("weights, float32", "gradients", "optimizer"):
        assert 0 <= 4 * four[kind] - one[kind] < 4


# ---- recipes


def test_the_papers_shape_has_its_parameters_and_its_batches_need_no_folder():
    cost = estimate_cost(Recipe.load("paper/stage1"), gpus=64)
    assert (cost.model, cost.data) == ("assumed", "assumed")
    total = sum(part.parameters for name, part in cost.parameters.items() if name != "VQ-GAN")
    trained = sum(part.trained for part in cost.parameters.values())
    assert round(total / 1e9, 2) == 13.73 and round(trained / 1e9, 2) == 6.01  # the paper: 14B and 7B
    # By hand: 6 FLOPs a parameter and token of visual experts and head, 4 of the frozen projections and text head.
    layers, hidden, codes = 32, 4096, 256
    expert, output = 3 * hidden * hidden + 3 * hidden * 11008, hidden * hidden
    a_code = 6 * layers * expert + 4 * layers * output + 6 * hidden * 8200 + 4 * hidden * 151_936
    assert 1 < cost.flops / cost.rows / (codes * a_code) < 1.2  # and half a caption of text tokens, and attention


def test_the_papers_days_imply_a_utilisation_that_is_the_sum_of_its_stages():
    implied = paper_utilisation()
    operations = sum(stage.steps * stage.flops for stage in implied.stages.values())
    assert abs(implied.share - operations / (587 * 24 * 3600 * 312e12)) < 1e-9 and 0 < implied.share < 1
    pictures = [stage.steps * stage.rows for stage in implied.stages.values()]
    assert all(abs(a / b - 1) < 0.01 for a, b in zip(pictures, (200e6, 2 * 50e6, 10e6), strict=True))


@pytest.fixture
def recipe(tiny_model, tiny_processor, tmp_path):
    """A recipe whose model and data are here, and its file."""
    tiny_model.save_pretrained(tmp_path / "base")
    tiny_processor.save_pretrained(tmp_path / "base")
    codes = torch.randint(0, 40, (6, 16), generator=torch.manual_seed(0)).tolist()
    pairs = {"image_codes": codes, "height": [16] * 6, "width": [16] * 6, "caption_en": list("abcdef")}
    Dataset.from_dict(pairs).to_parquet(tmp_path / "pairs.parquet")
    values = {
        "stage": "alignment",
        "model": {"base": str(tmp_path / "base")},
        "data": [{"source": str(tmp_path / "pairs.parquet"), "task": "text-to-image"}],
        "training": {"num_train_epochs": 4, "per_device_train_batch_size": 2, "bf16": False},
    }

    def write(**changes):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, **changes}))
        return Recipe.load(tmp_path / "recipe.yaml")

    write()
    return write


def test_rows_that_are_here_are_read_and_not_assumed(recipe, tmp_path):
    cost = estimate_cost(recipe(assume={"rows": 10, "prompt_tokens": 3, "image_size": [8, 8]}))
    assert cost.model == str(tmp_path / "base") and cost.data == str(tmp_path / "pairs.parquet")
    assert cost.steps == 12 and cost.rows == 2
    prompt = len("a 16x16")  # a byte a token; 15 of 16 codes are fed
    assert 2 * 16 < cost.tokens <= 2 * (prompt + 16)


def test_rows_of_super_resolution_are_laid_out_as_its_model_has_them(recipe, tmp_path):
    pairs = Dataset.from_parquet(str(tmp_path / "pairs.parquet")).to_list()
    Dataset.from_list([{**pair, "lowres_codes": pair["image_codes"][:4]} for pair in pairs]).to_parquet(
        tmp_path / "pairs.parquet"
    )
    fields = {"super_resolution_factor": 2, "codes_per_step": [4], "code_order": "block2x2", "cell_embedding": True}
    changes = {"stage": "super-resolution", "model": {"base": str(tmp_path / "base"), "config": fields}}
    data = [{"source": str(tmp_path / "pairs.parquet"), "task": "super-resolution", "drop_caption": 0.0}]
    cost = estimate_cost(recipe(data=data, codes_per_step=[4], **changes))
    brackets, small = 4, 2 + 4  # `<img>` four times; four small codes between their marks
    assert cost.tokens == 2 * (len("a 16x16") + small + brackets + 12)  # the last four codes are not fed


@pytest.mark.parametrize("name", ["emoji/stage1", "emoji/stage2", "emoji/stage3", "emoji/documents"])
def test_the_recipes_of_mars_emoji_are_estimated_on_a_fresh_machine(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cost = estimate_cost(Recipe.load(name))
    assert cost.data == "assumed" and cost.steps == Recipe.load(name).training["max_steps"]
    stored = count_parameters(MarsConfig.from_pretrained(DEFAULT_CHECKPOINT))
    of_cells = {"visual embeddings"} if name == "emoji/stage3" else set()
    sizes, expected = ({part: one.parameters for part, one in table.items()} for table in (cost.parameters, stored))
    assert {part for part in stored if sizes[part] != expected[part]} == of_cells
    assert (cost.parameters == stored) == (name in ("emoji/stage1", "emoji/stage2"))  # in what trains, too


def test_an_assumed_document_costs_what_a_document_that_is_here_does(recipe, tmp_path):
    picture = {"text": None, "image_codes": [0] * 8, "height": 16, "width": 8}
    words = {"text": "abc", **dict.fromkeys(("image_codes", "height", "width"))}  # a byte a token
    Dataset.from_list([{"segments": [words, picture] * 2}] * 2).to_parquet(tmp_path / "stories.parquet")
    model = {"base": str(tmp_path / "base"), "config": {"codes_per_step": [2]}}
    sizes = {"rows": 2, "prompt_tokens": 3, "image_size": [16, 8], "pictures": 2}

    def cost(source, **assume):
        data = [{"source": str(source), "task": "documents"}]
        return estimate_cost(recipe(stage="documents", model=model, data=data, assume=assume, codes_per_step=[2]))

    here, assumed = cost(tmp_path / "stories.parquet"), cost("far", **sizes)
    assert here.data != assumed.data == "assumed" and here.tokens == 2 * 2 * (3 + 2 + 8 + 1)
    assert (here.tokens, here.flops, here.memory) == (assumed.tokens, assumed.flops, assumed.memory)
    with pytest.raises(ValueError, match="'documents' cannot be assumed without `assume.pictures`"):
        cost("far", **sizes | {"pictures": None})


def test_packed_rows_leave_less_padding_than_aligned_ones(recipe):
    assert estimate_cost(recipe(packing=72)).padding < estimate_cost(recipe()).padding


def test_what_is_neither_here_nor_assumed_is_refused_with_what_to_add(recipe, tmp_path):
    with pytest.raises(ValueError, match="nowhere.*cannot be read.*`assume.text_config`"):
        estimate_cost(recipe(model={"base": "nowhere"}))
    far = [{"source": "far", "task": "super-resolution"}]
    sizes = {"rows": 5, "prompt_tokens": 3, "image_size": [16, 16]}
    enlarges = {"super_resolution_factor": 2, "codes_per_step": [4, 16]}
    changes = {"stage": "super-resolution", "model": {"base": str(tmp_path / "base"), "config": enlarges}}
    with pytest.raises(ValueError, match="'super-resolution' cannot be assumed without `assume.lowres_size`"):
        estimate_cost(recipe(data=far, assume=sizes, **changes))
    with pytest.raises(ValueError, match="trains 4 codes a step, but"):
        estimate_cost(recipe(codes_per_step=[4]))
    with pytest.raises(ValueError, match="multiple of 4 pixels, got 17x16"):
        estimate_cost(recipe(data=[{**far[0], "task": "captioning"}], assume={**sizes, "image_size": [17, 16]}))
    with pytest.raises(ValueError, match="`assume.rows` must be 1 or more"):
        recipe(assume={"rows": 0})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--gpus", "0"], "`gpus` must be 1 or more, got 0"),
        (["--utilisation", "1.5"], "`utilisation` is a share"),
        (["--peak-tflops", "0"], "`peak_tflops` must be above 0"),
    ],
)
def test_the_command_line_refuses_impossible_numbers(option, message):
    done = CliRunner().invoke(app, ["train", "paper/stage1", "--dry-run", *option])
    assert done.exit_code == 2 and message in done.stderr


def test_a_run_has_at_least_one_step(recipe, tmp_path):
    file = Recipe.load(tmp_path / "recipe.yaml")
    assert estimate_cost(file, gpus=64).steps == 1


def test_the_command_line_prints_tables_or_json_and_writes_nothing(recipe, tmp_path):
    file, before = str(tmp_path / "recipe.yaml"), sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["train", file, "--dry-run", "--gpus", "2"])
    assert done.exit_code == 0, done.stderr
    for line in ("visual experts", "memory of one of 2 GPUs", "optimizer", "FLOPs", "GPU-days at 40 % of 312 TFLOPS"):
        assert line in done.stdout
    as_json = json.loads(CliRunner().invoke(app, ["train", file, "--dry-run", "--json"]).stdout)
    assert as_json["steps"] == 12 and as_json["paper"] is None and as_json["gpu_days"] > 0
    assert sorted(tmp_path.rglob("*")) == before
    refused = CliRunner().invoke(app, ["train", file])
    assert refused.exit_code == 2 and "`--out` is missing" in refused.stderr
