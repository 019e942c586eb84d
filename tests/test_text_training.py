"""The text corpus, its tokenizer, packing and training: tiny, seeded and offline, on records made up here."""

import json
import random
import shutil

import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer

from mars_hf.data import text as corpus_text
from mars_hf.data.text import PICTURE, SLOT_KINDS, TALES, Subject
from mars_hf.training.text import (
    encode_documents,
    evaluate_perplexity,
    pack_documents,
    text_model_config,
    train_text_model,
    train_text_tokenizer,
)

APPLE = Subject(
    "1F34E",
    {"en": "red apple", "zh": "红苹果"},
    {"en": ("apple", "fruit", "red apple"), "zh": ("水果",)},
    "food-fruit",
    ("noto", "twemoji"),
)
HAND = Subject(
    "1F44B-1F3FD",
    {"en": "waving hand: medium skin tone", "zh": "挥手: 中等肤色"},
    {"en": (), "zh": ()},
    "",
    ("noto",),
)
SUBJECTS = [APPLE, HAND]


def all_kinds() -> dict[str, list[Subject]]:
    kinds = {kind for group in SLOT_KINDS.values() for kind in group}
    names = [(kind, number) for kind in sorted(kinds) for number in range(4)]
    subjects = [
        Subject(f"{kind}{n}", {"en": f"{kind} {n}", "zh": f"{kind}{n}"}, {"en": (), "zh": ()}, kind, ("noto",))
        for kind, n in names
    ]
    return {kind: [subject for subject in subjects if subject.kind == kind] for kind in kinds}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    rng = random.Random(0)
    made = [document for language in ("en", "zh") for document in corpus_text.turn_documents(SUBJECTS, language, rng)]
    for language in ("en", "zh"):
        made += corpus_text.caption_documents(SUBJECTS, language, rng)
        made += corpus_text.story_documents(
            [subject for subjects in all_kinds().values() for subject in subjects], language, rng, 40
        )
    return made


@pytest.fixture(scope="module")
def tokenizer(documents) -> Qwen2Tokenizer:
    return train_text_tokenizer(documents, 400)


def tiny_config(tokenizer):
    return text_model_config(
        tokenizer, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )


def test_tokenizer_gives_back_text_in_both_languages(tokenizer):
    for text in (
        "A red apple, 64x64.\n\n  Two spaces",
        "一张红苹果的图片，twemoji 风格 128x128\n",
        "never seen: 龘 🍎 ñ",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_single_ids_after_the_trained_ones(tokenizer):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert [tokenizer(token)["input_ids"] for token in special] == [[397], [398], [399]]
    assert len(tokenizer) == 400
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 397


def test_every_byte_has_a_token(tokenizer):
    assert sum(len(token) == 1 for token in tokenizer.get_vocab()) == 256


def test_saved_tokenizer_loads_as_qwen2_with_the_same_ids(tokenizer, documents, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, Qwen2Tokenizer)
    assert loaded(documents)["input_ids"] == tokenizer(documents)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template


def test_chat_template_takes_text_and_lists_and_agrees_with_the_corpus(tokenizer):
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "a red apple"},
    ]
    expected = corpus_text.chat([("user", "What is this?"), ("assistant", "a red apple")])
    assert tokenizer.apply_chat_template(turns, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"


def test_tokenizer_refuses_a_corpus_that_is_too_small():
    with pytest.raises(ValueError, match="smaller `vocab_size`"):
        train_text_tokenizer(["red apple"], 400)


def test_packing_loses_no_token_and_puts_ends_between_documents(tokenizer, documents):
    rows = pack_documents(tokenizer, documents, row_length=32)
    stream, end = rows.flatten().tolist(), tokenizer.eos_token_id
    expected = [token for ids in encode_documents(tokenizer, documents) for token in (*ids, end)]
    assert stream[: len(expected)] == expected
    assert len(stream) - len(expected) < 32
    assert set(stream[len(expected) :]) <= {end}


def test_text_around_a_picture_is_tokenized_apart(tokenizer):
    before, after = "Step 1: Wash a red apple.\n", "\nStep 2:"
    (ids,) = encode_documents(tokenizer, [before + PICTURE + after])
    assert ids == tokenizer(before)["input_ids"] + tokenizer(after)["input_ids"]


def test_captions_come_in_every_style_with_and_without_a_size():
    captions = list(corpus_text.caption_documents([APPLE], "en", random.Random(0)))
    bare = ["red apple", "a red apple", "a picture of a red apple"]
    expected = bare + [f"{phrase}, {style} style" for style in ("noto", "twemoji") for phrase in bare]
    assert captions[::2] == expected
    for caption, sized in zip(captions[::2], captions[1::2], strict=True):
        height, width = sized.removeprefix(f"{caption} ").split("x")
        assert int(height) % 8 == int(width) % 8 == 0 and max(int(height), int(width)) <= 256


def test_names_read_as_worked_by_hand():
    assert corpus_text.caption_phrases("红苹果", "zh") == ["红苹果", "一个红苹果", "一张红苹果的图片"]
    assert corpus_text.with_style("红苹果", "twemoji", "zh") == "红苹果，twemoji 风格"
    assert corpus_text.caption_phrases(HAND.names["en"], "en")[1] == "a waving hand with medium skin tone"
    assert corpus_text.caption_phrases(HAND.names["zh"], "zh")[1] == "一个中等肤色的挥手"
    assert corpus_text.caption_phrases("flag: Chad", "en")[2] == "a picture of the flag of Chad"
    assert corpus_text.caption_phrases("grapes", "en") == ["grapes", "a picture of grapes"]
    assert corpus_text.with_article("people with bunny ears") == "people with bunny ears"
    assert corpus_text.with_article("octopus") == "an octopus"
    sounds = {"an": ("umbrella", "hourglass done", "eagle"), "a": ("unicorn", "one-piece swimsuit", "ewe")}
    for article, names in sounds.items():
        assert [corpus_text.with_article(name) for name in names] == [f"{article} {name}" for name in names]


def test_replies_begin_with_a_line_end():
    replies = list(corpus_text.reply_documents([APPLE], "zh"))
    assert replies[0] == "\n红苹果"
    assert replies[-1] == "\n红苹果，twemoji 风格"


def test_translations_and_tags_read_as_worked_by_hand():
    lines = list(corpus_text.translation_documents([APPLE]))
    assert "red apple = 红苹果" in lines and "红苹果 is red apple in English" in lines
    assert list(corpus_text.tag_documents(SUBJECTS, "en")) == [
        "red apple: apple, fruit",
        "apple, fruit: red apple",
    ]


def test_stories_fill_every_slot_and_name_each_picture_before_it():
    for seed in range(200):
        for language in ("en", "zh"):
            story = corpus_text.tell_story(all_kinds(), language, random.Random(seed))
            text = story.text()
            assert "{" not in text and text.count(PICTURE) == len(story.steps) >= 3
            for line, subject in story.steps:
                assert subject.names[language].casefold() in line.casefold()
                assert f"{line}\n{PICTURE}\n" in text


def test_both_tellings_of_a_tale_show_the_same_number_of_pictures():
    assert all(len(tale["en"]) == len(tale["zh"]) for tale in TALES)


def test_plain_sources_are_parsed_as_worked_by_hand():
    lines = [
        "# CC-CEDICT",
        "蘋果 苹果 [ping2 guo3] /apple/CL:個|个[ge4],顆|颗[ke1]/",
        "蘋 苹 [ping2] /used in 蘋果|苹果[ping2 guo3]/",
        "北京 北京 [Bei3 jing1] /Beijing/",
        "試 试 [shi4] /to test (as 考試|考试[kao3 shi4])/",
    ]
    assert list(corpus_text._parse_dictionary(lines)) == [("苹果", ["apple"]), ("试", ["to test (as 考试)"])]
    noun = '07739125 13 n 02 red_apple 0 apple 1 001 @ 07705931 n 0000 | fruit with red skin; "an apple"  '
    assert list(corpus_text._parse_wordnet(["  1 licence", noun])) == [
        ("red apple, apple", 'fruit with red skin; "an apple"', True)
    ]
    fortunes = "床前明月光，\n疑是地上霜。\n\x1b[33m    -- 李白\x1b[m\n%\nfree software Debian 软件\n%\n"
    assert list(corpus_text._parse_fortunes(fortunes, "zh")) == ["床前明月光，\n疑是地上霜。\n-- 李白"]


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus_text, "WORDNET_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="apt-get install wordnet-base"):
        corpus_text.read_glosses()


def test_corpus_is_the_same_each_time_and_its_splits_share_no_text(monkeypatch):
    subjects = [*SUBJECTS, *(subject for subjects in all_kinds().values() for subject in subjects)]
    monkeypatch.setattr(corpus_text, "read_subjects", lambda cache_dir: subjects)
    corpus = corpus_text.build_text_corpus("unused", packages=(), limits=dict.fromkeys(corpus_text.LIMITS, 200))
    again = corpus_text.build_text_corpus("unused", packages=(), limits=dict.fromkeys(corpus_text.LIMITS, 200))
    assert json.dumps(corpus) == json.dumps(again)
    train = {document for splits in corpus.values() for document in splits["train"]}
    validation = {document for splits in corpus.values() for document in splits["validation"]}
    assert validation and not train & validation
    assert all(len(splits["train"]) <= 200 for splits in corpus.values())


def test_resumed_training_gives_the_weights_of_an_uninterrupted_one(tokenizer, documents, tmp_path):
    rows, config = pack_documents(tokenizer, documents, row_length=32), tiny_config(tokenizer)
    whole = train_text_model(config, rows, tmp_path, max_steps=2, batch_size=2, save_steps=1)
    shutil.rmtree(tmp_path / "checkpoint-2")
    resumed = train_text_model(config, rows, tmp_path, max_steps=2, batch_size=2, save_steps=1)
    for (name, expected), (_, weight) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(expected, weight), name


def test_half_written_checkpoint_is_passed_over(tokenizer, documents, tmp_path):
    rows, config = pack_documents(tokenizer, documents, row_length=32), tiny_config(tokenizer)
    train_text_model(config, rows, tmp_path, max_steps=2, batch_size=2, save_steps=1)
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    train_text_model(config, rows, tmp_path, max_steps=2, batch_size=2, save_steps=1)
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_perplexity_equals_that_of_each_document_alone(tokenizer):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(tiny_config(tokenizer)).eval()
    texts = ["red apple", "a picture of a red apple, noto style 64x64", "红苹果"]
    loss, count = 0.0, 0
    for ids in encode_documents(tokenizer, texts):
        row = torch.tensor([[397, *ids, 397]])
        loss += model(input_ids=row, labels=row).loss.item() * (row.numel() - 1)
        count += row.numel() - 1
    scores = evaluate_perplexity(model, tokenizer, {"captions": texts, "none": []}, batch_size=3)
    assert scores == {"captions": pytest.approx(torch.tensor(loss / count).exp().item(), rel=1e-4)}
