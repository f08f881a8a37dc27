"""The detokenizer: deltas that add up to `decode`, whole characters, no part of a stop string."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptjet.service.engine.detokenizer import Detokenizer, StopMatcher
from gptjet.service.engine.tokenizer import ByteTokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "don't stop, naïve café; 12 + 30 = 42.",
    "привет мир, 你好世界, 안녕 \N{GRINNING FACE}",
] * 4


class WordTokenizer:
    """A tokenizer that is not byte-level: an id alone does not determine its text."""

    def __init__(self, backend):
        self.backend = backend
        self.vocab_size = backend.get_vocab_size()
        self.eos_token_id = None
        self.longest_decode = 0

    def encode(self, text):
        return self.backend.encode(text).ids

    def decode(self, token_ids):
        self.longest_decode = max(self.longest_decode, len(token_ids))
        return self.backend.decode(list(token_ids), skip_special_tokens=True)

    def token_bytes(self, token_id):
        return None


def metaspace():
    """Sentencepiece's scheme: a word starts with U+2581, the text's first loses its space."""
    backend = HfTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return WordTokenizer(backend)


def word_piece():
    backend = HfTokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return WordTokenizer(backend)


def byte_fallback():
    """Llama's: words as in sentencepiece, and a token <0x..> for each byte of what is unknown."""
    vocabulary = {"</s>": 0, "\u2581": 1, "\u2581hello": 2, "world": 3, "\u2581!": 4}
    vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    backend = HfTokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="</s>"))
    backend.add_special_tokens(["</s>"])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return WordTokenizer(backend)


def deltas_of(tokenizer, token_ids, stop=()):
    detokenizer = Detokenizer(tokenizer, stop)
    deltas = [detokenizer.push(token_id) for token_id in token_ids]
    return [*deltas, detokenizer.flush()], detokenizer.stop_match


def cut_before_stop(text, stop):
    """By definition: the first character that completes a stop string; of several the longest."""
    for end in range(1, len(text) + 1):
        for item in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(item):
                return text[: end - len(item)], item
    return text, None


def longest_held(text, stop):
    """Length of the longest suffix of text that is a proper prefix of a stop string."""
    return max(
        (n for item in stop for n in range(len(item)) if n and text.endswith(item[:n])), default=0
    )


# Characters

TRICKY = [
    "plain",
    "naïve café",
    "你好",
    "\N{GRINNING FACE}\N{ZERO WIDTH JOINER}\N{ROCKET}",
    "e\N{COMBINING ACUTE ACCENT}o\N{COMBINING DIAERESIS}",
    "\N{REPLACEMENT CHARACTER} itself",
    "\0\x7f\N{BYTE ORDER MARK}\u2028",
]


@pytest.mark.parametrize("text", TRICKY)
def test_each_character_comes_out_with_its_last_byte(text):
    deltas, _ = deltas_of(ByteTokenizer(), text.encode())
    assert [delta for delta in deltas if delta] == list(text)


def test_an_unfinished_character_is_held_back_and_flushed_as_one_replacement():
    detokenizer = Detokenizer(ByteTokenizer())
    assert [detokenizer.push(byte) for byte in "a你".encode()[:3]] == ["a", "", ""]
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"
    assert detokenizer.flush() == ""


def test_end_of_text_adds_nothing_and_does_not_break_a_character():
    deltas, _ = deltas_of(ByteTokenizer(), [0xE4, 256, 0xBD, 0xA0, 256])
    assert "".join(deltas) == "你"


@given(token_ids=st.lists(st.integers(0, 256), max_size=60))
@example(token_ids=[0xF0, 0x9F, 0x98, 0x41, 0xE4, 0xBD, 0xFF, 0xC0, 0x80, 0xED, 0xA0, 0x80])
def test_deltas_of_any_bytes_add_up_to_decode(token_ids):
    deltas, _ = deltas_of(ByteTokenizer(), token_ids)
    assert "".join(deltas) == ByteTokenizer().decode(token_ids)


@given(text=st.text(max_size=40))
def test_valid_text_never_shows_a_replacement_that_is_not_in_it(text):
    deltas, _ = deltas_of(ByteTokenizer(), text.encode("utf-8", errors="replace"))
    whole = text.encode("utf-8", errors="replace").decode()
    assert [delta for delta in deltas if delta] == list(whole)


def test_push_after_flush_is_refused():
    detokenizer = Detokenizer(ByteTokenizer())
    detokenizer.flush()
    with pytest.raises(ValueError, match="after flush"):
        detokenizer.push(65)


# Stop strings


def test_a_stop_string_over_several_tokens_is_never_shown():
    deltas, match = deltas_of(ByteTokenizer(), b"one STOP two", ("STOP",))
    assert deltas == ["o", "n", "e", " ", *[""] * 9]
    assert match == "STOP"


def test_a_false_start_is_given_out_as_soon_as_it_is_one():
    deltas, match = deltas_of(ByteTokenizer(), b"STOxSTO", ("STOP",))
    assert deltas == ["", "", "", "STOx", "", "", "", "STO"]
    assert match is None


def test_only_the_longest_possible_start_is_held_back():
    """After "aab" of "aabaac" one more "aab" may still grow from its own inside."""
    deltas, _ = deltas_of(ByteTokenizer(), b"aabaabaac!", ("aabaac",))
    assert deltas == ["", "", "", "", "", "aab", "", "", "", "", ""]


def test_the_match_that_ends_first_wins():
    deltas, match = deltas_of(ByteTokenizer(), b"xabcd", ("abcd", "bc"))
    assert ("".join(deltas), match) == ("xa", "bc")


def test_of_matches_that_end_together_the_longest_wins():
    for stop in [("cd", "abcd", "d"), ("d", "abcd", "cd")]:
        deltas, match = deltas_of(ByteTokenizer(), b"xabcd", stop)
        assert ("".join(deltas), match) == ("x", "abcd")


def test_nothing_comes_out_after_a_match():
    detokenizer = Detokenizer(ByteTokenizer(), ("\n",))
    assert [detokenizer.push(byte) for byte in b"a\nb\nc"] == ["a", "", "", "", ""]
    assert detokenizer.flush() == ""
    assert detokenizer.stop_match == "\n"


def test_text_after_a_stop_string_in_the_same_token_is_dropped():
    matcher = StopMatcher(("END",))
    assert matcher.push("before END after END") == "before "
    assert matcher.match == "END"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_a_stop_string_of_several_bytes_a_character_is_found():
    text = "ok \N{GRINNING FACE}\N{ROCKET} no"
    deltas, match = deltas_of(ByteTokenizer(), text.encode(), ("\N{GRINNING FACE}\N{ROCKET}",))
    assert ("".join(deltas), match) == ("ok ", "\N{GRINNING FACE}\N{ROCKET}")


def test_a_stop_string_completed_by_the_flush_counts():
    detokenizer = Detokenizer(ByteTokenizer(), ("b\N{REPLACEMENT CHARACTER}",))
    assert [detokenizer.push(byte) for byte in (0x61, 0x62, 0xE4)] == ["a", "", ""]
    assert detokenizer.flush() == ""
    assert detokenizer.stop_match == "b\N{REPLACEMENT CHARACTER}"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Detokenizer(ByteTokenizer(), ("a", ""))


SMALL = st.text(alphabet="abc", min_size=1, max_size=6)


@settings(max_examples=400)
@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=14),
    stop=st.lists(SMALL, min_size=1, max_size=4).map(tuple),
)
def test_a_matcher_gives_out_exactly_what_is_certain(pieces, stop):
    matcher = StopMatcher(stop)
    seen, given_out = "", ""
    for piece in pieces:
        seen += piece
        given_out += matcher.push(piece)
        text, match = cut_before_stop(seen, stop)
        assert matcher.match == match
        held = 0 if match else longest_held(text, stop)
        assert given_out == text[: len(text) - held]
    assert given_out + matcher.flush() == cut_before_stop(seen, stop)[0]


@given(
    text=st.text(alphabet="ab\N{GRINNING FACE}é", max_size=30),
    stop=st.lists(
        st.text(alphabet="ab\N{GRINNING FACE}é", min_size=1, max_size=4), min_size=1, max_size=3
    ).map(tuple),
)
def test_deltas_add_up_to_the_text_before_the_stop_string(text, stop):
    deltas, match = deltas_of(ByteTokenizer(), text.encode(), stop)
    assert ("".join(deltas), match) == cut_before_stop(text, stop)


def test_long_stop_strings_cost_nothing_until_they_match_and_little_then():
    """The bad case of a naive search: 16 stop strings of 100 000 equal characters. In seconds of
    this process: what else the machine does is no part of it."""
    stop = tuple("a" * (100_000 + i) + "b" for i in range(16))
    started = time.process_time()
    matcher = StopMatcher(stop)
    assert time.process_time() - started < 0.5
    started = time.process_time()
    text = "a" * 20_000 + "c"
    given_out = "".join(matcher.push(text[i : i + 4]) for i in range(0, len(text), 4))
    assert given_out == text
    assert time.process_time() - started < 5


# Tokenizers that are not byte-level


@pytest.fixture(scope="module", params=[metaspace, word_piece])
def word_tokenizer(request):
    return request.param()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_deltas_of_any_ids_add_up_to_decode_without_bytes(word_tokenizer, data):
    ids = st.integers(0, word_tokenizer.vocab_size - 1)
    token_ids = data.draw(st.lists(ids, max_size=40))
    deltas, _ = deltas_of(word_tokenizer, token_ids)
    assert "".join(deltas) == word_tokenizer.decode(token_ids)


def test_words_come_out_as_they_arrive(word_tokenizer):
    token_ids = word_tokenizer.encode(CORPUS[0])
    deltas, _ = deltas_of(word_tokenizer, token_ids)
    assert "".join(deltas) == CORPUS[0]
    assert sum(1 for delta in deltas if delta) == len(token_ids)


@given(
    words=st.lists(st.sampled_from(["hello", "world", "!", "你", "\N{ROCKET}", "é"]), max_size=12)
)
def test_byte_fallback_characters_come_out_whole(words):
    tokenizer = byte_fallback()
    known = {"hello": [2], "world": [3], "!": [4]}
    token_ids = []
    for word in words:
        token_ids += known.get(word, [5 + byte for byte in word.encode()])
    deltas, _ = deltas_of(tokenizer, token_ids)
    assert "".join(deltas) == tokenizer.decode(token_ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in delta for delta in deltas)


def test_unfinished_byte_fallback_becomes_replacements_at_the_end():
    tokenizer = byte_fallback()
    token_ids = [2, 5 + 0xE4, 5 + 0xBD]
    deltas, _ = deltas_of(tokenizer, token_ids)
    assert deltas == ["hello", "", "", "\N{REPLACEMENT CHARACTER}" * 2]
    assert "".join(deltas) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("token_id", [0, 2, 3, 5 + 0xFF, 5 + 0x41])
def test_the_decoded_window_stays_small_whatever_comes(token_id):
    tokenizer = byte_fallback()
    deltas, _ = deltas_of(tokenizer, [2, *[token_id] * 300, 3])
    longest = tokenizer.longest_decode
    assert longest <= 20
    assert "".join(deltas) == tokenizer.decode([2, *[token_id] * 300, 3])


def test_stop_strings_work_without_bytes(word_tokenizer):
    token_ids = word_tokenizer.encode(CORPUS[0])
    deltas, match = deltas_of(word_tokenizer, token_ids, ("jumps ov", "lazy"))
    assert ("".join(deltas), match) == ("the quick brown fox ", "jumps ov")
