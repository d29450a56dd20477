"""The formats: one line each, in the order in which they are tried."""

from saefast.formats.batchtopk import BatchTopKRepo
from saefast.formats.circuit_tracer import CircuitTracer
from saefast.formats.dictionary_learning import DictionaryLearning
from saefast.formats.format import Format
from saefast.formats.gemma_scope import GemmaScope
from saefast.formats.gemma_scope_2 import GemmaScope2
from saefast.formats.llama_scope import LlamaScope
from saefast.formats.llamascopium import Llamascopium
from saefast.formats.matryoshka_sae import MatryoshkaRepo
from saefast.formats.openai import OpenAI
from saefast.formats.own import Own
from saefast.formats.qwen_scope import QwenScope
from saefast.formats.saelens import SAELens
from saefast.formats.sparsify import Sparsify

formats: dict[str, Format] = {
    one.name: one
    for one in (
        Own(),
        SAELens(),
        Sparsify(),
        DictionaryLearning(),
        BatchTopKRepo(),
        MatryoshkaRepo(),
        CircuitTracer(),
        GemmaScope(),
        GemmaScope2(),
        OpenAI(),
        LlamaScope(),
        QwenScope(),
        Llamascopium(),
    )
}  # fmt: skip
