"""The transformers adapter: bytes of ids, threads, special tokens, and what a bad folder says."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from gptjet.service.engine.detokenizer import Detokenizer
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.tokenizer import TransformersTokenizer, load_tokenizer

END_OF_TEXT = "<|endoftext|>"
CORPUS = [
    "the quick brown fox jumps over the lazy dog.",
    "naïve café 你好世界 \N{GRINNING FACE}\N{ROCKET} e\N{COMBINING ACUTE ACCENT}",
    "def f(x):\n\treturn x  # tabs, newlines,  double spaces",
] * 5


def byte_level(*, add_prefix_space=False):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    # Text that a user added: plain, with a space, and with letters that are byte characters too.
    backend.add_tokens(["<plain>", "two words", "你好吗", AddedToken("zéro", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )


def metaspace():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def word_piece():
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", clean_up_tokenization_spaces=True
    )


@pytest.fixture(scope="module")
def hf_tokenizer():
    return byte_level()


@pytest.fixture(scope="module")
def tokenizer(hf_tokenizer):
    return TransformersTokenizer(hf_tokenizer)


# Bytes of ids


def test_the_bytes_of_the_ids_of_a_text_are_its_utf8(tokenizer):
    for text in CORPUS:
        token_ids = tokenizer.encode(text)
        assert b"".join(tokenizer.token_bytes(t) for t in token_ids) == text.encode()
        assert tokenizer.decode(token_ids) == text


def test_every_byte_has_an_id_of_its_own(tokenizer):
    single = {tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)}
    assert single >= {bytes((byte,)) for byte in range(256)}


def test_special_and_unknown_ids_have_no_bytes(tokenizer):
    assert tokenizer.eos_token_id == 0
    for token_id in (0, tokenizer.vocab_size, 50399, -1):
        assert tokenizer.token_bytes(token_id) == b""
    assert tokenizer.decode([0, 50399, 0]) == ""


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_joined_bytes_of_any_ids_decode_as_transformers_decodes_them(hf_tokenizer, tokenizer, data):
    """Added tokens are in the range, and ids the tokenizer does not have."""
    ids = st.integers(0, tokenizer.vocab_size + 3)
    token_ids = data.draw(st.lists(ids, max_size=40))
    expected = hf_tokenizer.decode(
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    joined = b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids)
    assert joined.decode(errors="replace") == expected
    assert tokenizer.decode(token_ids) == expected


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_detokenizers_deltas_add_up_to_decode(tokenizer, data):
    ids = st.integers(0, tokenizer.vocab_size - 1)
    token_ids = data.draw(st.lists(ids, max_size=40))
    detokenizer = Detokenizer(tokenizer)
    deltas = [*map(detokenizer.push, token_ids), detokenizer.flush()]
    assert "".join(deltas) == tokenizer.decode(token_ids)


def test_each_kind_of_added_token_has_the_bytes_that_decode_gives_it(hf_tokenizer, tokenizer):
    expected = {"<plain>": b"<plain>", "two words": b"two words", "你好吗": "你好吗".encode()}
    for text, raw in expected.items():
        assert tokenizer.token_bytes(hf_tokenizer.convert_tokens_to_ids(text)) == raw
    # All four letters are GPT-2 byte characters, and the decoder reads them as such.
    assert tokenizer.token_bytes(hf_tokenizer.convert_tokens_to_ids("zéro")) == b"z\xe9ro"


def test_vocab_size_counts_added_tokens(hf_tokenizer, tokenizer):
    assert tokenizer.vocab_size == len(hf_tokenizer)
    assert tokenizer.vocab_size == hf_tokenizer.backend_tokenizer.get_vocab_size(False) + 4


def test_a_prefix_space_is_part_of_the_text_that_comes_back():
    tokenizer = TransformersTokenizer(byte_level(add_prefix_space=True))
    token_ids = tokenizer.encode("the fox")
    assert tokenizer.decode(token_ids) == " the fox"
    assert b"".join(tokenizer.token_bytes(t) for t in token_ids) == b" the fox"


@pytest.mark.parametrize("make", [metaspace, word_piece])
def test_a_tokenizer_that_is_not_byte_level_says_so_and_still_streams(make):
    tokenizer = TransformersTokenizer(make())
    assert tokenizer.token_bytes(5) is None
    token_ids = tokenizer.encode(CORPUS[0])
    detokenizer = Detokenizer(tokenizer)
    deltas = [*map(detokenizer.push, token_ids), detokenizer.flush()]
    assert "".join(deltas) == tokenizer.decode(token_ids)
    assert len([delta for delta in deltas if delta]) > 5


def test_a_slow_tokenizer_is_served_too():
    """What has no Rust object behind it: any Python tokenizer of transformers."""
    fast = byte_level()

    class Slow:
        eos_token_id = 0
        encode = staticmethod(fast.encode)
        decode = staticmethod(fast.decode)
        get_vocab = staticmethod(fast.get_vocab)

    tokenizer = TransformersTokenizer(Slow())
    token_ids = tokenizer.encode("the fox .")
    assert token_ids == fast.encode("the fox .")
    assert tokenizer.decode([*token_ids, 0]) == "the fox ."
    assert tokenizer.token_bytes(5) is None


# Settings that a checkpoint may carry


def test_truncation_and_padding_of_the_checkpoint_are_off_and_its_own_object_untouched():
    original = byte_level()
    original.backend_tokenizer.enable_truncation(3)
    original.backend_tokenizer.enable_padding(length=64)
    tokenizer = TransformersTokenizer(original)
    text = CORPUS[0]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert original.backend_tokenizer.truncation["max_length"] == 3


def test_threads_encode_and_decode_at_once(tokenizer):
    """transformers' own objects raise "Already borrowed" when used like this."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(CORPUS[0] + CORPUS[1], k=200)) for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        back = list(pool.map(lambda text: tokenizer.decode(tokenizer.encode(text)), texts))
    assert back == texts


# Loading


def test_a_saved_folder_loads_and_means_the_same(hf_tokenizer, tokenizer, tmp_path):
    hf_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, local_files_only=True)
    assert loaded.eos_token_id == 0
    assert loaded.vocab_size == tokenizer.vocab_size
    for text in CORPUS:
        assert loaded.encode(text) == tokenizer.encode(text)
    ids = range(loaded.vocab_size)
    assert [loaded.token_bytes(t) for t in ids] == [tokenizer.token_bytes(t) for t in ids]


def test_gpt2s_two_files_load(hf_tokenizer, tokenizer, tmp_path):
    """vocab.json and merges.txt, as GPT-J's first checkpoints have them."""
    model = json.loads(hf_tokenizer.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gptj"}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": GPT2Tokenizer.__name__})
    )
    loaded = load_tokenizer(tmp_path)
    assert loaded.token_bytes(loaded.encode("the fox")[-1]) is not None
    assert loaded.decode(loaded.encode(CORPUS[1])) == CORPUS[1]
    assert loaded.eos_token_id == 0


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BackendLoadError, match=r"no tokenizer in .*tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["not json", "{}", '{"model": {"type": "None"}}'])
def test_a_broken_tokenizer_file_is_one_clear_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BackendLoadError, match="cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_name_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(BackendLoadError, match="cannot be loaded") as caught:
        load_tokenizer("gptjet-test/no-such-model", local_files_only=True)
    assert "\n" not in str(caught.value)
