"""MarsTrainer against plain forwards of single rows; packing, accumulation, resumption, faults."""

import copy
import random
from dataclasses import replace
from itertools import islice

import pytest
import torch
import typer
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from mars_hf.cli.app import one_line_errors
from mars_hf.modeling_mars import is_visual_parameter
from mars_hf.training import trainer as trainer_module
from mars_hf.training.collation import AlignedCollator, PackedCollator, ShiftedRow, pack_rows
from mars_hf.training.mixture import MixtureDataset, MixtureStream, Pack, PackedStream, Source
from mars_hf.training.muon import muon_with_adamw
from mars_hf.training.text import last_checkpoint
from mars_hf.training.trainer import MarsTrainer, StopTogether

TEXT = {"vocab_size": 264, "eos_token_id": 256, "pad_token_id": 256, "max_position_embeddings": 128}


@pytest.fixture
def make_tiny(make_model):
    def make(**changes):
        return make_model(text=TEXT, **changes)

    return make


def records(count=8, height=12, width=8):
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 40, (count, height * width // 16), generator=rng).tolist()
    return [
        {"image_codes": row, "height": height, "width": width, "caption": "abcdefgh"[: n + 1]}
        for n, row in enumerate(codes)
    ]


def caption(record, rng):
    return record["caption"]


def sources():
    stories = [
        {"segments": ["one\n", record, "two\n", records(height=8)[n], "end"]} for n, record in enumerate(records())
    ]
    return [
        Source("text-to-image", 0.5, records(), caption, code_noise=0.5, drop_caption=0.0),
        Source("captioning", 0.25, records(height=8), caption),
        Source("documents", 0.25, stories),
    ]


def mixture(processor, batch_size=2, num_batches=8, **options):
    return MixtureDataset(processor, sources(), batch_size, num_batches, **options)


def arguments(folder, **changes):
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 3, "logging_steps": 1, "report_to": []}
    return TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, remove_unused_columns=False, **{**settings, **changes}
    )


def trainer_of(model, data, folder, collate=None, processor=None, **options):
    changes = options.pop("changes", {})
    collate = collate or AlignedCollator(model.config, pad_token_id=256, prompt_multiple=5)
    return MarsTrainer(
        model=model, args=arguments(folder, **changes), train_dataset=data, data_collator=collate, **options
    )


def plain_loss(model, rows, k):
    """Whole logits of one row after the other, labels shifted by hand: by K in pictures."""
    total, count, config = 0.0, 0, model.config
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = model(ids, codes_per_step=k, image_sizes=torch.tensor([row["image_sizes"]])).logits[0]
        run, drawn = 0, 0  # `<img>` and codes since the last `<img>` run began
        for place, token in enumerate(row["input_ids"]):
            run = run + 1 if token == config.image_start_token_id else run
            is_code = config.image_token_offset <= token < config.image_start_token_id
            drawn = drawn + 1 if is_code else 0
            target = place + (k if is_code or token == config.image_start_token_id else 1)
            if target < len(row["labels"]) and row["labels"][target] != -100:
                inside = all(
                    config.image_token_offset <= one <= config.image_start_token_id
                    for one in row["input_ids"][place : target + 1]
                )
                if inside or target == place + 1:
                    total = total + F.cross_entropy(
                        logits[place], torch.tensor(row["labels"][target]), reduction="sum"
                    )
                    count += 1
    return total / count


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(mine, plain, tolerance=1e-9):
    for name in mine.keys() | plain.keys():
        empty = torch.zeros(())
        a, b = mine.get(name, empty), plain.get(name, empty)
        assert (a - b).abs().max() < tolerance, name


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("with_cells", [False, True])
@pytest.mark.parametrize("task", ["text-to-image", "captioning", "super-resolution", "documents"])
def test_the_loss_and_its_gradients_are_those_of_whole_rows(make_tiny, tiny_processor, tmp_path, k, with_cells, task):
    cells = {"cell_embedding": True, "max_grid_size": 8} if with_cells else {}
    factor = 2 if task == "super-resolution" else None
    model = make_tiny(codes_per_step=[1, 3], super_resolution_factor=factor, **cells).double()
    tiny_processor.super_resolution_factor = factor
    if with_cells:
        for table in model.model.visual_cell_embedding.parameters():
            torch.nn.init.normal_(table)
    enlarged = [{**record, "lowres_codes": record["image_codes"][:2]} for record in records(height=16)]
    every = [*sources(), Source("super-resolution", 0.25, enlarged, caption, code_noise=0.5)]
    (source,) = [source for source in every if source.task == task]
    data = MixtureDataset(tiny_processor, [source], batch_size=3, num_batches=1, codes_per_step=[k])
    rows = [data[index] for index in range(3)]
    trainer = trainer_of(model, data, tmp_path)
    batch = trainer.data_collator(rows)
    enlarged_codes = 8 if k == 1 else 0  # 3 does not divide them: a last block is fed whole
    assert batch["num_drawn"] == {"text-to-image": 6, "super-resolution": enlarged_codes}.get(task, 0)
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    mine = gradients(model)
    model.zero_grad()
    plain = plain_loss(model, rows, k)
    plain.backward()
    assert abs(loss - plain) < 1e-9
    assert_equal_gradients(mine, gradients(model))


@pytest.mark.parametrize("k", [1, 3])
def test_packed_rows_have_the_loss_of_rows_by_themselves(make_tiny, tiny_processor, tmp_path, k):
    model = make_tiny(codes_per_step=[1, 3]).double()
    data = mixture(tiny_processor, codes_per_step=[k])
    rows = [data[index] for index in range(16)]
    packs = [
        [rows[i] for i in pack] for pack in pack_rows([len(ShiftedRow.of(row, model.config)) for row in rows], 64)
    ]
    collate = PackedCollator(model.config, 256, 64)
    trainer = trainer_of(model, data, tmp_path, collate)
    loss = trainer.compute_loss(model, collate(packs))
    loss.backward()
    mine = gradients(model)
    model.zero_grad()
    plain = plain_loss(model, rows, k)
    plain.backward()
    assert len(packs) < 16 and abs(loss - plain) < 1e-9
    assert_equal_gradients(mine, gradients(model))


@pytest.mark.parametrize("shortest", [20, 60])  # of 120; a pack holds about 7 rows, or 5 to 6
def test_packs_hold_every_row_once_and_waste_little(shortest):
    rng = random.Random(0)
    lengths = [rng.randint(shortest, 120) for _ in range(1024)]
    packs = pack_rows(lengths, 512)
    assert sorted(row for pack in packs for row in pack) == list(range(1024))
    assert all(sum(lengths[row] for row in pack) <= 512 for pack in packs)
    assert sum(lengths) > 0.98 * 512 * len(packs)
    assert pack_rows([], 8) == []
    assert pack_rows([3, 3, 5, 4], 8) == [[2, 0], [3, 1]]
    with pytest.raises(ValueError, match="Row 1 has 9 tokens.*pack of 8"):
        pack_rows([3, 9], 8)


def test_a_packed_data_set_shows_every_row_of_a_mixture_once(make_tiny, tiny_processor):
    data = mixture(tiny_processor)
    stream = MixtureStream(tiny_processor, sources(), 2, 8)
    packed = PackedStream(stream, make_tiny().config, max_length=64, window=6)
    seen = [tuple(row["input_ids"]) for pack in packed for row in pack]
    assert sorted(seen) == sorted(tuple(data[index]["input_ids"]) for index in range(len(data)))
    assert packed.rows_of_a_pack() == 6 / len(
        pack_rows([len(ShiftedRow.of(data[n], make_tiny().config)) for n in range(6)], 64)
    )


def test_packs_behind_a_window_are_made_without_the_rows_before_it(make_tiny, tiny_processor, monkeypatch):
    both = [
        Source("text-to-image", 0.5, as_stream(records()), caption, code_noise=0.5),
        Source("captioning", 0.5, records(height=8), caption),
    ]
    stream = MixtureStream(tiny_processor, both, 5, 8, buffer_size=3)
    packed = PackedStream(stream, make_tiny().config, max_length=64, window=6)
    packs = list(packed)
    assert packs[0].window == (0, 0) and packs[-1].window[0] == 6  # of 40 rows
    written, write_row = [], stream.write_row
    monkeypatch.setattr(stream, "write_row", lambda index, record: written.append(index) or write_row(index, record))
    for begin in {pack.window for pack in packs}:
        packed.begin = begin
        number, before = begin
        again = list(packed)
        assert again[:before] == [[]] * before and again[before:] == packs[before:]
        assert written == list(range(6 * number, 40))
        written.clear()
    assert "input_ids" not in PackedCollator(make_tiny().config, 256, 64)([Pack()])


def test_packs_of_a_window_are_not_sorted_by_length_and_equal_rows_keep_their_order(make_tiny, tiny_processor):
    rng, write, config = random.Random(0), tiny_processor.training_example, make_tiny().config
    rows = [write("captioning", "a" * rng.randint(1, 50), [0] * 4, 8, 8) for _ in range(64)]
    longest = [max(len(row["input_ids"]) for row in pack) for pack in PackedStream(rows, config, max_length=64)]
    first, second = longest[: len(longest) // 2], longest[len(longest) // 2 :][: len(longest) // 2]
    assert abs(sum(first) - sum(second)) < 0.2 * sum(first)
    equal = [write("captioning", letter, [0] * 4, 8, 8) for letter in "abcdefg"]
    packs = list(PackedStream(equal, config, max_length=3 * len(ShiftedRow.of(equal[0], config))))
    assert packs == [equal[:3], equal[3:6], equal[6:]]


def test_rows_one_after_the_other_are_the_rows_by_number(tiny_processor):
    data, stream = mixture(tiny_processor), MixtureStream(tiny_processor, sources(), 2)
    assert list(islice(stream, 16)) == [data[index] for index in range(16)]  # the stream has no end


def test_accumulated_batches_step_as_one_batch(make_tiny, tiny_processor, tmp_path):
    """Eight batches of one row and one batch of eight: tasks of unequal label counts in both."""
    start, moved = make_tiny().double(), []
    for batch, accumulation in ((1, 8), (8, 1)):
        model = copy.deepcopy(start)
        data = mixture(tiny_processor, batch_size=1, num_batches=16)
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        trainer_of(
            model, data, tmp_path / str(batch), changes={**changes, "optim": "sgd", "learning_rate": 0.5}
        ).train()
        moved.append(dict(model.named_parameters()))
    for name, parameter in moved[0].items():
        assert (parameter - moved[1][name]).abs().max() < 1e-6, name
    assert any((p - start.get_parameter(n)).abs().max() > 1e-4 for n, p in moved[0].items())


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("with_muon", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one_and_moves_the_visual_part_only(
    make_tiny, tiny_processor, tmp_path, with_muon
):
    start, data = make_tiny(), mixture(tiny_processor, codes_per_step=[1, 2])
    muon = {"optimizer_cls_and_kwargs": (lambda: muon_with_adamw, {"muon_learning_rate": 6e-3, "learning_rate": 3e-3})}

    def train(folder, stop_after=99, resume=None):
        model = copy.deepcopy(start)
        options = {**(muon if with_muon else {}), "loss_scope": "grammar", "label_spread": 0.5}
        trainer = trainer_of(model, data, folder, callbacks=[StopAfter(stop_after)], **options)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(tmp_path / "a")
    train(tmp_path / "b", stop_after=3)
    resumed = train(tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-3"))
    before = dict(start.named_parameters())
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    moved = {name for name, a in whole.named_parameters() if not torch.equal(a, before[name])}
    assert moved == {name for name in before if is_visual_parameter(name)}


def test_logs_tell_the_loss_of_each_task_and_how_many_codes_are_in_use(make_tiny, tiny_processor, tmp_path):
    model, data = make_tiny(), mixture(tiny_processor, num_batches=16)
    trainer = trainer_of(model, data, tmp_path, changes={"logging_steps": 16, "max_steps": 16})
    trainer.train()
    logs = trainer.state.log_history[0]
    tasks = {data.source_of(2 * step).task for step in range(16)}
    assert {name.split("/")[0] for name in logs if name.endswith("/loss")} == tasks
    assert "documents/text" in logs and "text-to-image/text" not in logs and logs["text-to-image/gate"] > 0
    labels = torch.cat([trainer.data_collator([data[i], data[i + 1]])["labels"].flatten() for i in range(0, 32, 2)])
    codes = labels[labels >= model.config.image_token_offset]
    codes = codes[codes < model.config.image_start_token_id]
    assert abs(logs["codes/used"] - len(codes.unique()) / 40) < 1e-4


def test_what_is_named_in_report_to_is_told_the_losses_of_tasks(make_tiny, tiny_processor, tmp_path, monkeypatch):
    told = {}

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.update(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    changes = {"report_to": ["recorder"], "max_steps": 1}
    trainer_of(make_tiny(), mixture(tiny_processor), tmp_path, changes=changes).train()
    assert {"loss", "codes/used", f"{mixture(tiny_processor).source_of(0).task}/loss"} <= told.keys()


def losses_of(model, data, folder, **options):
    """Train a copy of a model on pictures for three steps."""
    trainer = trainer_of(copy.deepcopy(model), data, folder, loss_scope="grammar", label_spread=0.5, **options)
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def pictures(processor):
    return MixtureDataset(processor, sources()[:1], batch_size=2, num_batches=8)


def test_losses_in_bfloat16_are_near_those_in_float32(make_tiny, tiny_processor, tmp_path):
    model, data = make_tiny(), pictures(tiny_processor)
    plain = losses_of(model, data, tmp_path / "float32", changes={"max_steps": 3})
    rounded = losses_of(model, data, tmp_path / "bfloat16", changes={"max_steps": 3, "bf16": True})
    assert torch.allclose(plain, rounded, rtol=0.03) and not torch.equal(plain, rounded)


@pytest.mark.integration
def test_losses_of_compiled_pictures_are_those_of_plain_ones(make_tiny, tiny_processor, tmp_path):
    model, data = make_tiny(), pictures(tiny_processor)
    plain = losses_of(model, data, tmp_path / "plain", changes={"max_steps": 3})
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = losses_of(model, data, tmp_path / "compiled", changes={"max_steps": 3}, compile_pictures=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert torch.allclose(plain, compiled, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(make_tiny, tiny_processor, tmp_path):
    data, found = mixture(tiny_processor), []
    start = make_tiny().double()
    for checkpointing in (False, True):
        model = copy.deepcopy(start)
        trainer = trainer_of(model, data, tmp_path, changes={"gradient_checkpointing": checkpointing})
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        trainer.compute_loss(model, trainer.data_collator([data[0], data[1]])).backward()
        found.append(gradients(model))
    assert_equal_gradients(*found, tolerance=1e-9)


def test_a_batch_of_text_alone_trains_nothing_and_breaks_nothing(make_tiny, tmp_path):
    model = make_tiny()
    trainer = trainer_of(model, [], tmp_path)
    words = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "image_sizes": [], "task": "text"}
    loss = trainer.compute_loss(model, trainer.data_collator([words, words]))
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_batch(make_tiny, tiny_processor, tmp_path):
    model, data = make_tiny(), mixture(tiny_processor)
    calls = []

    def spoil(module, inputs, output):
        calls.append(1)
        return output * torch.nan if len(calls) > 5 else output

    model.model.norm.register_forward_hook(spoil)
    trainer = trainer_of(model, data, tmp_path, changes={"save_steps": 1})
    with pytest.raises(FloatingPointError, match="last checkpoint is untouched"):
        trainer.train()
    (kept,) = tmp_path.glob("bad-batch-*.safetensors")
    step = trainer.state.global_step
    expected = trainer.data_collator([data[2 * step], data[2 * step + 1]])
    assert torch.equal(load_file(kept)["input_ids"], expected["input_ids"])
    assert (tmp_path / f"checkpoint-{step}" / "trainer_state.json").exists()


def test_frozen_weights_hold_no_gradients_and_no_optimizer_state(make_tiny, tiny_processor, tmp_path):
    with_gradients = set()

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            with_gradients.update(name for name, weight in model.named_parameters() if weight.grad is not None)

    model = make_tiny()
    trainer = trainer_of(model, mixture(tiny_processor), tmp_path, callbacks=[Look()])
    trainer.train()
    visual = {name: weight for name, weight in model.named_parameters() if is_visual_parameter(name)}
    optimized = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    assert with_gradients == set(visual)
    assert set(map(id, optimized)) == set(map(id, trainer.optimizer.state)) == set(map(id, visual.values()))


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_no_number_stops_the_run_before_the_weights_change(
    make_tiny, tiny_processor, tmp_path, max_grad_norm
):
    model = make_tiny()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = trainer_of(model, mixture(tiny_processor), tmp_path, changes={"max_grad_norm": max_grad_norm})
    model.vision_head.weight.register_hook(lambda gradient: gradient * torch.inf)  # the loss is finite
    with pytest.raises(FloatingPointError, match="norm of the gradients is (inf|nan) in step 0"):
        trainer.train()
    assert len(list(tmp_path.glob("bad-batch-0-*.safetensors"))) == 1
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_loss_that_is_no_number_is_one_line_on_the_command_line(capsys):
    with pytest.raises(typer.Exit) as ended, one_line_errors(debug=False):
        raise FloatingPointError("The loss is nan\nin step 3.")
    assert ended.value.exit_code == 1 and capsys.readouterr().err == "mars-hf: The loss is nan in step 3.\n"


def test_a_stop_where_a_checkpoint_is_due_writes_it_once_and_keeps_transformers_from_writing_its_own(
    make_tiny, tiny_processor, tmp_path, monkeypatch
):
    written = []

    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            (stop,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, StopTogether)]
            stop.jit_manager.is_checkpoint_requested = state.global_step == 2  # what the signal's timer does

    def save(*args, **kwargs):
        written.append(trainer.state.global_step)
        return MarsTrainer._save_checkpoint(trainer, *args, **kwargs)

    changes = {"enable_jit_checkpoint": True}
    data = mixture(tiny_processor)
    trainer = trainer_of(make_tiny(), data, tmp_path, callbacks=[Terminate()], changes=changes)
    monkeypatch.setattr(trainer, "_save_checkpoint", save)
    trainer.train()
    assert written == [3] and trainer.state.global_step == 3
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("trainer_state.json", None),
        ("trainer_state.json", ""),
        ("trainer_state.json", '{"global_step": 1'),
        ("checkpoint-is-incomplete.txt", "Checkpoint started at step 12"),
    ],
)
def test_checkpoints_that_were_not_written_to_their_end_are_passed_over(tmp_path, file, content):
    for step in (9, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-12-by-hand").mkdir()  # a copy that a user made
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")
    broken = tmp_path / "checkpoint-12" / file
    broken.unlink() if content is None else broken.write_text(content)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) is None


def test_labels_are_not_shared_without_a_codebook(make_tiny, tmp_path):
    with pytest.raises(ValueError, match="`label_spread=0.5`.*no VQ-GAN.*set `label_spread` to 0"):
        trainer_of(make_tiny(vq=False), [], tmp_path, label_spread=0.5)


def test_a_frozen_weight_that_moves_is_found(make_tiny, tiny_processor, tmp_path):
    class Touch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.model.embed_tokens.weight.data[0] += 1

    trainer = trainer_of(make_tiny(), mixture(tiny_processor), tmp_path, callbacks=[Touch()])
    with pytest.raises(RuntimeError, match="frozen weights changed.*model.embed_tokens.weight"):
        trainer.train()


def test_a_frozen_weight_that_moved_in_a_checkpoint_is_found_when_the_run_goes_on(make_tiny, tiny_processor, tmp_path):
    model, data = make_tiny(), mixture(tiny_processor)
    trainer_of(copy.deepcopy(model), data, tmp_path, changes={"max_steps": 3}).train()
    file = tmp_path / "checkpoint-3" / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="model.embed_tokens.weight first: the checkpoint differs from the model"):
        trainer_of(model, data, tmp_path).train(resume_from_checkpoint=last_checkpoint(tmp_path))


def test_several_accelerators_without_a_launcher_are_not_shared_by_dataparallel(make_tiny, tiny_processor, tmp_path):
    class Several(TrainingArguments):
        """Of a process that sees two."""

        _n_gpu = 2

    args = Several(str(tmp_path), use_cpu=True, per_device_train_batch_size=2, max_steps=2, report_to=[])
    args._n_gpu = 2
    collate = AlignedCollator(make_tiny().config, pad_token_id=256)
    trainer = MarsTrainer(model=make_tiny(), args=args, train_dataset=mixture(tiny_processor), data_collator=collate)
    assert trainer.args.n_gpu == 1 and trainer._train_batch_size == 2


def test_compiling_what_does_not_run_is_told(make_tiny, tiny_processor, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(trainer_module.logger, "warning", said.append)
    options = {"compile_pictures": True, "changes": {"gradient_checkpointing": True}}
    trainer_of(make_tiny(), mixture(tiny_processor), tmp_path, **options)
    assert [text for text in said if "`compile_pictures` has no effect here" in text]


def test_evaluation_gives_the_loss_of_each_task(make_tiny, tiny_processor, tmp_path):
    model, data = make_tiny(), mixture(tiny_processor)
    trainer = trainer_of(model, data, tmp_path, eval_dataset=data, changes={"per_device_eval_batch_size": 2})
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0 and metrics.keys() >= {"eval_captioning/loss", "epoch"}
    assert "eval_captioning/loss" in trainer.state.log_history[-1]
    for prefix in ("eval_a", "test"):
        trainer._notes["captioning"] = torch.ones(6)  # of training, which an evaluation leaves alone
        trainer.predict(data)  # and what it notes is nobody else's
        again = trainer.evaluate(metric_key_prefix=prefix)
        assert again[f"{prefix}_captioning/loss"] == metrics["eval_captioning/loss"]
        assert trainer._notes.pop("captioning").tolist() == [1.0] * 6 and not trainer._notes


def test_arguments_that_would_have_no_effect_are_refused(make_tiny, tmp_path):
    for options in (
        {"compute_metrics": print},
        {"compute_loss_func": print},
        {"changes": {"label_smoothing_factor": 0.1}},
    ):
        with pytest.raises(ValueError, match="has no effect: the loss is computed without whole logits"):
            trainer_of(make_tiny(), [], tmp_path, **options)


def test_labels_that_are_never_predicted_are_refused(make_tiny, tiny_processor):
    row = tiny_processor.training_example("text-to-image", "a", range(16), 16, 16)
    ShiftedRow.of(row, make_tiny().config)
    with pytest.raises(ValueError, match="specials that are never predicted, such as `</img>`"):
        ShiftedRow.of({**row, "labels": row["input_ids"]}, make_tiny().config)


def test_muon_takes_the_matrices_of_layers_and_adamw_all_else_that_trains(make_model):
    model = make_model()
    chain = muon_with_adamw(model, muon_learning_rate=0.02, learning_rate=0.01, adam_beta2=0.9)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = ({name_of[id(p)] for group in one.param_groups for p in group["params"]} for one in chain.optimizers)
    assert muon | adamw == {name for name, p in model.named_parameters() if p.requires_grad} and not muon & adamw
    assert muon == {name for name in muon | adamw if ".layers." in name and name.endswith("weight")}
    assert {"vision_head.weight", "model.visual_embed_tokens.weight"} < adamw
    assert [group["lr"] for group in chain.param_groups] == [0.02, 0.01]
    assert chain.optimizers[1].param_groups[0]["betas"] == (0.9, 0.9)
    with pytest.raises(ValueError, match="0 chained optimizers, this run has 2"):
        chain.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())


# ---- mixtures


def test_shares_of_batches_are_those_asked_for_and_all_rows_of_a_batch_have_one_task(tiny_processor):
    data = mixture(tiny_processor, batch_size=4, num_batches=2000, codes_per_step=[1, 2, 3], batches_per_step=2)
    tasks = [data.source_of(4 * batch).task for batch in range(2000)]
    assert abs(tasks.count("text-to-image") / 2000 - 0.5) < 0.04
    assert all(data.source_of(4 * batch + 3).task == tasks[batch] for batch in range(2000))
    ks = [data.steps_codes(4 * batch) for batch in range(2000)]
    assert ks[::2] == ks[1::2] and abs(ks.count(3) / 2000 - 1 / 3) < 0.04


def test_every_pass_shows_every_record_once_in_an_order_of_its_own(tiny_processor):
    data = MixtureDataset(tiny_processor, [Source("captioning", 1.0, records(6), caption)], 3, num_batches=4)
    passes = [[data.record_of(index)["caption"] for index in range(start, start + 6)] for start in (0, 6)]
    assert (
        sorted(passes[0]) == sorted(passes[1]) == sorted(r["caption"] for r in records(6)) and passes[0] != passes[1]
    )
    assert [data.record_of(index)["caption"] for index in range(6)] == passes[0]


def test_noise_replaces_fed_codes_and_no_label(tiny_processor):
    source = Source("text-to-image", 1.0, records(4), caption, code_noise=0.5, drop_caption=0.5)
    data = MixtureDataset(tiny_processor, [source], 2, num_batches=60)
    shares, dropped = [], 0
    for index in range(len(data)):
        row = data[index]
        labels = torch.tensor(row["labels"])
        fed = torch.tensor(row["input_ids"])[labels != -100]
        assert row == data[index]
        assert (labels[labels != -100] - tiny_processor.image_token_offset).tolist() == data.record_of(index)[
            "image_codes"
        ]
        shares.append((fed != labels[labels != -100]).float().mean().item())
        dropped += row["input_ids"][0] >= tiny_processor.image_token_offset
    assert 0.18 < sum(shares) / len(shares) < 0.31  # shares are uniform between 0 and 0.5
    assert 40 < dropped < 80


def test_noise_reaches_every_picture_of_a_document_and_no_word(tiny_processor):
    (stories,) = [source for source in sources() if source.task == "documents"]
    plain, noisy = (
        MixtureDataset(tiny_processor, [replace(stories, code_noise=noise)], 2, num_batches=40) for noise in (0, 0.8)
    )
    offset, shares = tiny_processor.image_token_offset, []
    for clean, row in zip(plain, noisy, strict=True):
        assert row["labels"] == clean["labels"]
        pairs = list(zip(clean["input_ids"], row["input_ids"], strict=True))
        assert all(fed == true for true, fed in pairs if not offset <= true < offset + 40)
        assert all(offset <= fed < offset + 40 for true, fed in pairs if fed != true)
        of_codes = [fed != true for true, fed in pairs if offset <= true < offset + 40]
        shares.append((sum(of_codes[:6]) / 6, sum(of_codes[6:]) / 4))  # of two pictures
    assert all(0.28 < sum(of_picture) / len(shares) < 0.5 for of_picture in zip(*shares, strict=True))


def test_a_batch_keeps_all_its_captions_or_none_so_that_prompts_of_text_run_apart(make_tiny, tiny_processor):
    source = Source("text-to-image", 1.0, records(12), caption, drop_caption=0.25)
    data = MixtureDataset(tiny_processor, [source], 4, num_batches=200)
    config = make_tiny().config
    collate = AlignedCollator(config, pad_token_id=256)
    counts = []
    for start in range(0, len(data), 4):
        batch = collate([data[start + place] for place in range(4)])
        dropped = (batch["input_ids"] == config.null_token_id).any(1)
        assert bool(dropped.all()) == bool(dropped.any()) == (batch["num_drawn"] == 0)
        counts.append(int(dropped.any()))
    assert 30 < sum(counts) < 70


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "drawing"}, "text-to-image, captioning, super-resolution, documents.*'drawing'"),
        ({"share": 0}, "share of 'captioning'.*above 0"),
        ({"records": []}, "no records"),
        ({"code_noise": 1.5}, "`code_noise`.*between 0 and 1, got 1.5"),
    ],
)
def test_impossible_sources_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Source(**{"task": "captioning", "share": 1.0, "records": records(), "write_caption": caption, **change})


def test_lora_on_the_visual_experts_trains_alone_and_leaves_text_as_it_is(make_tiny, tiny_processor, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = make_tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    words = torch.tensor([[1, 2, 3, 4]])
    said = model(words).logits
    targets = r".*visual_(q_proj|k_proj|v_proj|mlp\.(gate|up|down)_proj)"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    trainer = trainer_of(adapted, mixture(tiny_processor), tmp_path, changes={"learning_rate": 1e-2})
    trainer.train()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name and "visual_" in name for name in trained)
    assert any(bool(p.abs().sum() > 0) for name, p in adapted.named_parameters() if "lora_B" in name)
    kept = {name.replace("base_layer.", ""): value for name, value in adapted.get_base_model().state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    text = adapted.get_base_model()(words).logits
    offset = model.config.image_token_offset
    assert torch.equal(text[..., :offset], said[..., :offset])
    trainer.save_model(tmp_path / "adapter")
    fresh = make_tiny()
    fresh.load_state_dict(before)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    ids = torch.tensor([mixture(tiny_processor)[0]["input_ids"]])
    assert torch.equal(loaded(ids).logits, adapted.eval()(ids).logits)


VISUAL_MODULES = [
    "visual_q_proj",
    "visual_k_proj",
    "visual_v_proj",
    "visual_mlp",
    "visual_embed_tokens",
    "vision_head",
]
LANGUAGE = r".*layers\.\d+\.(self_attn\.(q|k|v)_proj|mlp\.(gate|up|down)_proj)"


def test_lora_on_the_language_experts_trains_on_prompts_beside_the_visual_part_and_can_be_taken_off(
    make_tiny, tiny_processor, tmp_path
):
    from peft import LoraConfig, get_peft_model

    model = make_tiny()
    words = torch.tensor([[1, 2, 3, 4]])
    said = model(words).logits
    adapter = LoraConfig(r=4, target_modules=LANGUAGE, modules_to_save=VISUAL_MODULES)
    adapted = get_peft_model(model, adapter)
    start = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    data = pictures(tiny_processor)
    trainer = trainer_of(adapted, data, tmp_path, changes={"learning_rate": 1e-2})
    batch = trainer.data_collator([data[0], data[1]])
    assert batch["prompt_length"] > 0  # such prompts run without gradient where nothing in them trains
    trainer.compute_loss(adapted, batch).backward()
    found = gradients(adapted)
    for projection in ("q_proj", "k_proj", "v_proj"):
        (name,) = [name for name in found if f"layers.0.self_attn.{projection}.lora_B" in name]
        assert found[name].any(), name
    adapted.zero_grad()
    trainer.train()
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, start[name])}
    assert any("lora_B" in name for name in moved) and any("vision_head" in name for name in moved)
    assert all("lora_" in name or is_visual_parameter(name) for name in moved)
    assert not torch.equal(adapted.eval()(words).logits, said)
    with adapted.disable_adapter():
        assert torch.equal(adapted(words).logits, said)


def test_what_trains_beside_an_adapter_and_would_not_be_saved_is_refused(make_tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make_tiny(), LoraConfig(r=4, target_modules=LANGUAGE))
    adapted.get_base_model().vision_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="1 trainable parameters are no part.*vision_head.weight.*modules_to_save"):
        trainer_of(adapted, [], tmp_path)
    visual = r".*visual_[qkv]_proj"
    trainer_of(get_peft_model(make_tiny(), LoraConfig(r=4, target_modules=visual, bias="lora_only")), [], tmp_path)


def test_an_adapter_that_the_trainer_would_not_resume_is_refused(make_tiny, tmp_path):
    from peft import LoraConfig

    model = make_tiny()
    model.add_adapter(LoraConfig(r=4, target_modules=LANGUAGE))
    model.freeze_text()
    with pytest.raises(ValueError, match="adapter of `load_adapter` or `add_adapter`.*`PeftModel.from_pretrained"):
        trainer_of(model, [], tmp_path)


def as_stream(rows):
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=2)


def test_a_stream_trains_as_it_is_read_and_goes_on_where_it_stopped(make_tiny, tiny_processor, tmp_path):
    streams = [
        Source("text-to-image", 0.5, as_stream(records()), caption, code_noise=0.5),
        Source("captioning", 0.5, records(height=8), caption),
    ]
    data = MixtureStream(tiny_processor, streams, 2, 6, buffer_size=3)
    rows = list(data)
    assert len(rows) == 12 and rows == list(data)
    of_stream = [row["labels"] for row in rows if row["task"] == "text-to-image"]
    assert len({tuple(labels) for labels in of_stream[:8]}) == min(8, len(of_stream))  # each record once in a pass

    whole, torn = make_tiny(), make_tiny()
    torn.load_state_dict(whole.state_dict())
    trainer_of(whole, data, tmp_path / "whole").train()
    trainer_of(torn, data, tmp_path / "torn", callbacks=[StopAfter(3)]).train()
    again = make_tiny()  # with other visual weights, which the checkpoint replaces
    frozen = {name: value for name, value in whole.state_dict().items() if not is_visual_parameter(name)}
    again.load_state_dict(frozen, strict=False)
    trainer_of(again, data, tmp_path / "torn").train(resume_from_checkpoint=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_packed_stream_holds_the_rows_of_the_stream(make_tiny, tiny_processor):
    source = Source("text-to-image", 1.0, as_stream(records()), caption)
    data = MixtureStream(tiny_processor, [source], 2, 5)
    packs = list(PackedStream(data, make_tiny().config, max_length=64, window=4))
    packed = sorted(tuple(row["input_ids"]) for pack in packs for row in pack)
    assert packed == sorted(tuple(row["input_ids"]) for row in data) and len(packs) < 10


def test_a_stream_is_not_weighed():
    with pytest.raises(ValueError, match="cannot be weighed"):
        Source("captioning", 1.0, as_stream(records()), caption, weights=torch.ones(8))


def test_rows_in_a_row_are_read_by_one_of_two_workers_and_a_stream_is_refused_to_both(tiny_processor):
    data = MixtureStream(tiny_processor, [Source("captioning", 1.0, records(), caption)], 2, 4)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2)
    assert [row["input_ids"] for row in loader] == [row["input_ids"] for row in data]
    data = MixtureStream(tiny_processor, [Source("captioning", 1.0, as_stream(records()), caption)], 2, 2)
    with pytest.raises(ValueError, match="read by one worker, got 2"):
        list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=2))
