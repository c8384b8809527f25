"""The byte pairs that the bundled CLIPs read: how they are learned, and that they suffice."""

import gzip
import json

import learn_bpe

from robustvlm_lite import scenes
from robustvlm_lite.runtime import asset


def tokenizer(path):
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(bpe_path=str(path))


def test_learned_merges_make_one_token_of_each_word(tmp_path, monkeypatch):
    """Of the rendered world's words, written and read back in CLIP's own format."""
    words = learn_bpe.WORD.findall(" ".join(scenes.caption_vocabulary()).lower())
    monkeypatch.setattr(learn_bpe, "words", lambda root: learn_bpe.collections.Counter(words))
    monkeypatch.setattr(learn_bpe, "asset", lambda *parts: tmp_path.joinpath(*parts))
    monkeypatch.setattr("sys.argv", ["learn_bpe.py", "--data-root", "unused"])
    learn_bpe.main()
    encode = tokenizer(tmp_path / "clip" / "bpe.txt.gz").encode
    assert {w: len(encode(w)) for w in words} == dict.fromkeys(words, 1)
    assert len(encode("hippopotamus")) > 1


def test_merges_are_greedy_and_ties_go_by_spelling():
    merges = learn_bpe.learn(learn_bpe.collections.Counter({"abab": 3, "abc": 2, "xy": 1}), 3)
    assert merges == [("a", "b"), ("a", "b</w>"), ("ab", "ab</w>")]


def test_the_bundled_vocabulary_covers_captions_and_prompts(data_root):
    encode = tokenizer(asset("clip", "bpe.txt.gz")).encode
    words = learn_bpe.words(data_root)
    several = [w for w in words if len(encode(w)) > 1]
    assert len(words) > 600 and not several, several


def test_the_bundled_vocabulary_fits_the_model():
    merges = gzip.decompress(asset("clip", "bpe.txt.gz").read_bytes()).decode().split("\n")[1:]
    config = json.loads(asset("clip", "nano.json").read_text())["text_cfg"]
    assert config["vocab_size"] == 512 + len(merges) + 2 == tokenizer(asset("clip", "bpe.txt.gz")).vocab_size
    assert config["context_length"] >= 16 + 2 + 10, "16 context tokens, start, end and a long class name"
