"""Text to token ids: the tokenizer of a pretrained T5, or one trained on the training split.

Ids follow T5: 0 is padding, 1 ends a text, 2 is unknown. A text is cut so that the end still fits.
"""

import hashlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedrevive_jax.data.errors import reading
from fedrevive_jax.errors import ConfigError, FileError, one_line

PADDING, END, UNKNOWN = 0, 1, 2
# In a tokenizer trained here, the token that a model puts in front of every text.
CLASSIFIER = 3
SPECIAL = ("<pad>", "</s>", "<unk>", "<classify>")
TOKENIZER, SENTENCEPIECE = "tokenizer.json", "spiece.model"


class Tokenizer(NamedTuple):
    """A way from texts to ids.

    Attributes:
      encode: texts -> their ids, without padding and end.
      size: ids are below it.
      serialised: the tokenizer as JSON, where it was trained here; else empty.
    """

    encode: Callable[[Sequence[str]], list[list[int]]]
    size: int
    serialised: str = ""


def encode(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> np.ndarray:
    """Token ids [len(texts), length] int32: cut, ended, padded."""
    rows = np.full((len(texts), length), PADDING, np.int32)
    for row, ids in zip(rows, tokenizer.encode(texts), strict=True):
        kept = [*ids[: length - 1], END]
        row[: len(kept)] = kept
    return rows


def train(texts: Sequence[str], size: int) -> Tokenizer:
    """A byte-pair tokenizer of at most `size` entries, the same for the same texts."""
    tokenizers = _package("tokenizers")
    bare = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=SPECIAL[UNKNOWN]))
    bare.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        limit_alphabet=max(size - len(SPECIAL), 1),  # or rare letters would go beyond `size`
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    bare.train_from_iterator(texts, trainer)
    return from_json(bare.to_str())


def from_json(serialised: str) -> Tokenizer:
    """A tokenizer trained here, from what `Tokenizer.serialised` told."""
    return _wrap(_package("tokenizers").Tokenizer.from_str(serialised), serialised)


def read(folder: str) -> Tokenizer:
    """The tokenizer beside a pretrained T5's weights: tokenizer.json, else spiece.model.

    Raises:
      ConfigError: there is neither, or it cannot be read.
    """
    path = Path(folder).expanduser()
    try:
        if (path / TOKENIZER).is_file():
            tokenizers = _package("tokenizers")
            return _wrap(tokenizers.Tokenizer.from_file(str(path / TOKENIZER)), "")
        if (path / SENTENCEPIECE).is_file():
            pieces = _package("sentencepiece").SentencePieceProcessor(
                model_file=str(path / SENTENCEPIECE)
            )
            return Tokenizer(lambda texts: pieces.encode(list(texts)), pieces.get_piece_size())
    except ConfigError:
        raise
    except Exception as error:  # both libraries raise plain exceptions of many kinds
        raise ConfigError(
            "t5_weights", folder, f"its tokenizer cannot be read ({one_line(error)})"
        ) from None
    raise ConfigError("t5_weights", folder, f"holds neither {TOKENIZER} nor {SENTENCEPIECE}")


def digest(folder: str) -> str:
    """SHA-256 of the file that `read` reads, in hexadecimal.

    Raises:
      ConfigError: there is none.
    """
    for name in (TOKENIZER, SENTENCEPIECE):
        path = Path(folder).expanduser() / name
        with reading(path):
            if path.is_file():
                return hashlib.sha256(path.read_bytes()).hexdigest()
    raise ConfigError("t5_weights", folder, f"holds neither {TOKENIZER} nor {SENTENCEPIECE}")


def _wrap(tokenizer, serialised: str) -> Tokenizer:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # "</s>" in a text is text

    def encode_all(texts):
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [row.ids for row in encoded]

    return Tokenizer(encode_all, tokenizer.get_vocab_size(), serialised)


def _package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise FileError("text", f"needs the package {name}; pip install -e '.[text]'") from None
