"""GPT-2's tokenizer as the files that Hugging Face's transformers loads, from the table that ships with the program."""

import json

from llmc_cli.tokenizer.tokenizer import BYTE_OF_CHAR, END_OF_TEXT, Tokenizer

CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def spell(token: bytes) -> str:
    """A token as a byte-level vocabulary spells it, one printable character a byte."""
    return "".join(CHAR_OF_BYTE[byte] for byte in token)


def merges(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    """The pairs that BPE joins, in order of rank, for a tokenizer whose ids are the ranks (Sennrich et al. 2016,
    arXiv:1508.07909).

    The pair behind a token is what the earlier merges leave of its bytes.
    """
    ranks = {token: id for id, token in enumerate(tokenizer.tokens) if id not in tokenizer.special}
    pairs: list[tuple[bytes, bytes]] = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        pairs.append((parts[0], parts[1]))
    return pairs


def gpt2_files(tokenizer: Tokenizer, max_seq_len: int) -> dict[str, bytes]:
    """The content of ``tokenizer.json`` and ``tokenizer_config.json`` by name."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    vocab = {
        token.decode() if id in tokenizer.special else spell(token): id for id, token in enumerate(tokenizer.tokens)
    }
    pairs = [(spell(left), spell(right)) for left, right in merges(tokenizer)]
    rust = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.post_processor = processors.ByteLevel(trim_offsets=False)
    rust.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, normalized=True, special=True)])
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": max_seq_len,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    }
    return {
        "tokenizer.json": rust.to_str(pretty=False).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode() + b"\n",
    }
