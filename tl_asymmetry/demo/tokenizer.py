"""The word-level tokenizer of the demonstration pair.

Words and punctuation marks are tokens, in lower case; anything the stories do not use is `<unk>`. `<bos>` is put
in front of every text, as the models were trained. It is an ordinary fast tokenizer of `transformers`, read from
one file, and works as `tokenizer=` of HookedTransformer and TransformerBridge.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIALS = (PAD, BOS, EOS, UNK)
"""In order of their ids, 0 to 3."""


def read_tokenizer(path: Path, n_ctx: int) -> PreTrainedTokenizerFast:
    """The tokenizer in `path`, without network.

    Args:
        path: the tokenizer's JSON file.
        n_ctx: longest sequence of the model, in tokens.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        add_bos_token=True,
        model_max_length=n_ctx,
        padding_side="right",
    )
    # TransformerLens reads both keys to see whether BOS is added already, and without them looks for the
    # tokenizer's folder on the Hub. transformers sets them only for tokenizers loaded from a folder.
    tokenizer.init_kwargs["add_bos_token"] = True
    tokenizer.init_kwargs.setdefault("name_or_path", "")
    return tokenizer
