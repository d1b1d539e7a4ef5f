"""A tiny Llama, a tokenizer and texts for it, made here: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch

TEXT = "the scale of a learning rate is found while the model trains and then it stays"
WORDS = TEXT.split()
KNOWN = ["<pad>", "<eos>", "<unk>", *sorted(set(WORDS))]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(KNOWN)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(KNOWN), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def texts(count: int) -> list[str]:
    starts = torch.randint(len(WORDS), (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [" ".join((WORDS * 2)[start : start + 12]) for start in starts]
