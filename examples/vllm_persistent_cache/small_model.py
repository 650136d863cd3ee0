"""Makes a checkpoint folder where there is none: a small Llama with random weights and a tokenizer of words.

$ python small_model.py /tmp/model
"""

import argparse
import re
import sys
from pathlib import Path

from prompt import make_prompt

VOCABULARY = 2048
MAX_RULES = 300  # numbers below this are words


def make_model(folder: Path, num_layers: int = 6, hidden_size: int = 512) -> str:
    """Save the model and its tokenizer, unless they are there already.

    Returns:
        The folder.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        return str(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128,
        head_dim=64,
        max_position_embeddings=8192,
        initializer_range=0.2,  # with the usual 0.02 a wrong KV cache would not change the answer
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", make_prompt(MAX_RULES))))
    words = ["[UNK]", *words, *(f"word{number}" for number in range(VOCABULARY - len(words) - 1))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=512, help="a multiple of 128")
    options = parser.parse_args()
    print(make_model(options.folder, options.layers, options.hidden_size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
