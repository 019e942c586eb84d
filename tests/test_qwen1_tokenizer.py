"""The tokenizer of Qwen v1: a small made-up vocabulary, and the true one against tiktoken (slow)."""

import base64
import importlib.util
import re
import unicodedata
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mars_hf.conversion.qwen1_tokenizer import SPECIALS, convert_qwen1_tokenizer, split_token

PIECES = [b"ab", b"bc", b" a", b"abc", b"\xe4\xbd", b"\xe4\xbd\xa0", b" abc", b"aa", b"aaaa", b"he", b"ll", b"hell"]
PIECES += [b"hello"]


def rank_file(folder: Path, tokens: list[bytes] | None = None) -> Path:
    """Write a vocabulary of all bytes, in an order of their own, and the pieces above."""
    tokens = [bytes([255 - number]) for number in range(256)] + PIECES if tokens is None else tokens
    path = folder / "qwen.tiktoken"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    return path


FUSING = "\N{COMBINING LONG SOLIDUS OVERLAY}"


def is_corner(text: str) -> bool:
    """Whether normalisation takes a special token away, see `convert_qwen1_tokenizer`."""
    literals = re.compile("|".join(map(re.escape, SPECIALS)))
    return literals.findall(text) != literals.findall(unicodedata.normalize("NFC", text))


def encode_by_rank(word: bytes) -> list[int]:
    """Byte-pair encoding as tiktoken defines it: join the neighbours of lowest rank, the leftmost first."""
    ranks = {bytes([255 - number]): number for number in range(256)}
    ranks |= {piece: 256 + number for number, piece in enumerate(PIECES)}
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [
            (ranks[parts[i] + parts[i + 1]], i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in ranks
        ]
        if not pairs:
            return [ranks[part] for part in parts]
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


@pytest.mark.parametrize("word", ["abc", "aaaaa", "hello", "你", "你们", "abab", "\U0001f34e", "ahello"])
def test_a_word_gets_the_ids_of_encoding_by_rank(tmp_path, word: str) -> None:
    tokenizer = convert_qwen1_tokenizer(rank_file(tmp_path))
    assert tokenizer(word)["input_ids"] == encode_by_rank(word.encode())


def test_special_tokens_follow_the_ranks_in_the_order_of_the_original(tmp_path) -> None:
    tokenizer = convert_qwen1_tokenizer(rank_file(tmp_path))
    first = 256 + len(PIECES)
    assert len(tokenizer) == first + 208
    assert tokenizer.convert_ids_to_tokens([first, first + 1, first + 2]) == list(SPECIALS[:3])
    assert tokenizer.convert_tokens_to_ids("<|extra_204|>") == first + 207
    assert tokenizer("ab<|im_end|>")["input_ids"] == [256, first + 2]
    as_text = tokenizer("<|im_end|>", split_special_tokens=True)["input_ids"]
    assert as_text == [number for piece in ("<|", "im", "_end", "|>") for number in encode_by_rank(piece.encode())]


def test_the_one_corner_is_a_special_token_whose_last_character_fuses_with_what_follows(tmp_path) -> None:
    tokenizer = convert_qwen1_tokenizer(rank_file(tmp_path))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert is_corner("<|im_end|>" + FUSING) and not is_corner("<|im_end|>\N{COMBINING ACUTE ACCENT}")
    assert tokenizer("<|im_end|>" + FUSING)["input_ids"] == [end, *encode_by_rank(FUSING.encode())]
    assert end not in tokenizer(unicodedata.normalize("NFC", "<|im_end|>" + FUSING))["input_ids"]


def test_a_saved_tokenizer_comes_back_the_same(tmp_path) -> None:
    tokenizer = convert_qwen1_tokenizer(rank_file(tmp_path))
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    texts = ["abc hello 你们", "<|im_start|>ab<|im_end|>", "<|extra_7|>" + FUSING, "\n\n  a"]
    assert [loaded(text)["input_ids"] for text in texts] == [tokenizer(text)["input_ids"] for text in texts]
    assert loaded.decode(loaded(texts[0])["input_ids"]) == texts[0]


def test_a_token_is_split_into_the_halves_that_lower_ranks_leave() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    assert split_token(b"abc", ranks) == (b"a", b"bc")
    with pytest.raises(ValueError, match="No merge of lower rank leads to token b'abcb'"):
        split_token(b"abcb", {b"a": 0, b"b": 1, b"c": 2, b"abcb": 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0\nnonsense\n", "Line 2 of .* must hold a token in base64 and its rank, got 'nonsense'"),
        (b"YQ== 0\nYg== 2\n", "ranks in .* must be 0 to 1"),
        (b"YQ== 0\nYg== 1\n", "lacks 254 of the 256 single bytes"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path, content: bytes, message: str) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert_qwen1_tokenizer(tmp_path / "qwen.tiktoken")


@pytest.mark.slow
def test_the_true_vocabulary_gives_tiktokens_ids_on_generated_strings() -> None:
    """
    On 24,000 strings, with special tokens found in text and with special tokens left text.

    If it fails, hypothesis prints the shortest string that differs. Characters that came into Unicode after the tables
    of either library were made may be classified otherwise by it; list them here then, and in the docstring of
    `convert_qwen1_tokenizer`.
    """
    hypothesis = pytest.importorskip("hypothesis")
    tiktoken = pytest.importorskip("tiktoken")
    from hypothesis import strategies as st

    package = importlib.util.find_spec("dashscope")
    if package is None:
        pytest.skip("needs the package dashscope, which carries qwen.tiktoken")
    path = Path(package.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    tokenizer = convert_qwen1_tokenizer(path)
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in path.read_bytes().splitlines()}
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    specials = {token: len(ranks) + number for number, token in enumerate(SPECIALS)}
    truth = tiktoken.Encoding("Qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    assert tokenizer("<|im_start|>你好")["input_ids"] == [151644, 108386]
    assert len(tokenizer) == truth.n_vocab == 151851

    def planes(first: int, last: int) -> st.SearchStrategy:
        return st.text(characters(first << 16, (last << 16) + 0xFFFF))

    def characters(first: int, last: int) -> st.SearchStrategy:
        return st.characters(min_codepoint=first, max_codepoint=last, codec="utf-8")  # surrogates are no characters

    words = st.sampled_from(sorted(token.decode(errors="ignore") for token in ranks))
    code = st.sampled_from(
        ["def f(x):\n\treturn x", "for (int i = 0; i < n; ++i) {", "</div>", "0x1F", "a_b", "I'Ll'RE'd"]
    )
    spaces = st.text(st.sampled_from(" \t\n\r\v\f\x1c\x85\xa0\u1680\u180e\u2000\u200b\u2028\u2029\u202f\u3000\ufeff"))
    marks = st.sampled_from(["\u0338", "\u0301", "\u0308", "\u3099", "\u1161", "\u200d", "\ufe0f", "ſ", "K", "İ", "ẞ"])
    chinese, emoji = st.text(characters(0x3400, 0x9FFF)), st.text(characters(0x1F000, 0x1FAFF))
    any_special = st.sampled_from([*SPECIALS[:5], SPECIALS[-1], "<|extra_205|>", "<|im_", "|>", "<img>"])
    plane = st.one_of(
        planes(0, 0), planes(1, 1), planes(2, 3), planes(4, 13), planes(14, 14), planes(15, 16), st.text()
    )
    pieces = st.one_of(words, code, spaces, marks, chinese, emoji, any_special, plane)
    strings = st.lists(pieces, max_size=12).map("".join)
    count = 0

    @hypothesis.settings(max_examples=24_000, deadline=None, database=None, derandomize=True)
    @hypothesis.given(strings)
    def compare(text: str) -> None:
        nonlocal count
        count += 1
        normal = unicodedata.normalize("NFC", text)
        if not is_corner(text):
            assert tokenizer(text)["input_ids"] == truth.encode(normal, allowed_special="all")
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == truth.encode_ordinary(normal)

    compare()
    assert count >= 20_000
