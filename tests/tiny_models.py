"""Language models and a tokenizer made on the spot: transformers' own classes, random weights, no network."""

from typing import Any

import torch

WORDS = [f"w{i}" for i in range(60)]


def tokenizer(special: bool = True) -> Any:
    """One token per word; [CLS] ... [SEP] around each text if `special`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*names, *WORDS, "a"])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 64}
    if special:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        options |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        options |= {"bos_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


def model(kind: str, head: bool = False) -> Any:
    """ "bert", "gpt2" or "llama" with 3 blocks of width 16, float32, in eval mode."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 66, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    if kind == "bert":
        config = transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=64)
        made = (transformers.BertForMaskedLM if head else transformers.BertModel)(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=66, n_embd=16, n_layer=3, n_head=2, n_positions=64)
        made = (transformers.GPT2LMHeadModel if head else transformers.GPT2Model)(config)
    else:
        config = transformers.LlamaConfig(**sizes, intermediate_size=32, max_position_embeddings=64)
        made = (transformers.LlamaForCausalLM if head else transformers.LlamaModel)(config)
    return made.eval()


def documents(n: int = 60, seed: int = 0, longest: int = 40) -> list[str]:
    """Distinct texts of 1 to `longest` words."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        words = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
        out.append(" ".join([WORDS[i % len(WORDS)], *(WORDS[w] for w in words)][:longest]))
    return out
