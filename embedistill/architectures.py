"""Where the parts of a teacher are, by architecture: what else in the package knows a model class asks here."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from embedistill.errors import UsageError
from embedistill.files import read_json


@dataclass(frozen=True)
class Architecture:
    """Paths of modules in a model, and in one of its layers; the names of its sizes in its configuration.

    Attributes:
        stack: The list of layers.
        words: The table of word embeddings.
        depth: Name of the number of layers; width: of the hidden size; heads; inner: of the intermediate size.
        query, key, value, join: The attention's linear maps; None where they are one (ModernBERT).
        attention_norm, grow, shrink, output_norm: What follows them.
        shared_bias: Relative position biases that all layers share, a column a head (MPNet).
    """

    stack: str = "encoder.layer"
    words: str = "embeddings.word_embeddings"
    depth: str = "num_hidden_layers"
    width: str = "hidden_size"
    heads: str = "num_attention_heads"
    inner: str = "intermediate_size"
    query: str | None = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    join: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    grow: str = "intermediate.dense"
    shrink: str = "output.dense"
    output_norm: str = "output.LayerNorm"
    shared_bias: str | None = None

    @property
    def norm_first(self) -> bool:
        """Whether a layer normalises what it reads (ModernBERT), not what it writes (BERT)."""
        return self.query is None


_BERT = Architecture()
ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": _BERT,
    "mpnet": Architecture(
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        join="attention.attn.o",
        attention_norm="attention.LayerNorm",
        shared_bias="encoder.relative_attention_bias",
    ),
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "distilbert": Architecture(
        stack="transformer.layer",
        depth="n_layers",
        width="dim",
        heads="n_heads",
        inner="hidden_dim",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        join="attention.out_lin",
        attention_norm="sa_layer_norm",
        grow="ffn.lin1",
        shrink="ffn.lin2",
        output_norm="output_layer_norm",
    ),
    "modernbert": Architecture(
        stack="layers",
        words="embeddings.tok_embeddings",
        query=None,
        join="attn.Wo",
        attention_norm="attn_norm",
        grow="mlp.Wi",
        shrink="mlp.Wo",
        output_norm="mlp_norm",
    ),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a transformer that say what it costs."""

    layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    vocabulary_size: int


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model's configuration as its folder has it, without loading the model.

    Raises:
        UsageError: Its architecture is not supported, or it is not a transformer with a pooling behind it.
    """
    listed = folder / "modules.json"
    modules = [module["type"] for module in read_json(listed)] if listed.is_file() else []
    if modules and not (len(modules) > 1 and modules[1].endswith("Pooling")):
        found = f"modules {', '.join(modules)}"
        raise UsageError(f"teacher {folder}", found, "a transformer, a Pooling, and what may follow", "choose another")
    path = folder / "config.json"
    config: dict[str, Any] = read_json(path) if path.is_file() else {}
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        do = "choose a teacher of one of these, or start from another model of your choice: student.from"
        raise UsageError(f"teacher {folder}", f"architecture {architecture!r}", ", ".join(ARCHITECTURES), do)
    return config


def read_sizes(config: Mapping[str, Any]) -> Sizes:
    """Return the sizes that a configuration, as a mapping, stands for."""
    full = AutoConfig.for_model(**config)
    names = ARCHITECTURES[full.model_type]
    return Sizes(
        layers=getattr(full, names.depth),
        hidden_size=getattr(full, names.width),
        num_attention_heads=getattr(full, names.heads),
        intermediate_size=getattr(full, names.inner),
        vocabulary_size=full.vocab_size,
    )


def resize(config: Any, sizes: Sizes, layers: list[int]) -> Any:
    """Return a copy of a configuration with other sizes, whose layers are those of the teacher that are named."""
    names = ARCHITECTURES[config.model_type]
    resized = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        resized.layer_types = [config.layer_types[layer] for layer in layers]
    setattr(resized, names.depth, len(layers))
    setattr(resized, names.width, sizes.hidden_size)
    setattr(resized, names.heads, sizes.num_attention_heads)
    setattr(resized, names.inner, sizes.intermediate_size)
    resized.vocab_size = sizes.vocabulary_size
    return resized


def with_sizes(config: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Return a configuration, as a mapping, of a model of other sizes, made of whichever layers."""
    resized = resize(AutoConfig.for_model(**config), sizes, list(range(sizes.layers)))
    found: dict[str, Any] = resized.to_dict()
    return found


def count_parameters(config: Any) -> tuple[int, int]:
    """Return the parameters of a model of a configuration, in its table of words and in the rest; nothing is loaded."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    words = find_words(model).weight.numel()
    return words, sum(parameter.numel() for parameter in model.parameters()) - words


def architecture_of(model: Any) -> Architecture:
    """Return where the parts of a loaded model are."""
    return ARCHITECTURES[model.config.model_type]


def find_words(model: Any) -> nn.Embedding:
    """Return a model's table of word embeddings."""
    words: nn.Embedding = model.get_submodule(architecture_of(model).words)
    return words


def find_layers(model: Any) -> nn.ModuleList:
    """Return a model's layers."""
    layers: nn.ModuleList = model.get_submodule(architecture_of(model).stack)
    return layers


def set_layers(model: Any, layers: nn.ModuleList) -> None:
    """Put other layers into a model; its configuration stays as it is."""
    parent, _, name = architecture_of(model).stack.rpartition(".")
    setattr(model.get_submodule(parent), name, layers)


def keep_layers(model: Any, layers: list[int]) -> Any:
    """Return the model with some of its layers only, their configuration with them; biases they share stay."""
    names = architecture_of(model)
    stack = find_layers(model)
    if names.norm_first and layers[0] != 0:
        do = "keep layer 0"
        raise UsageError("student.layers", f"{layers}", "layer 0 among them: it alone reads without a norm", do)
    set_layers(model, nn.ModuleList(stack[layer] for layer in layers))
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[layer] for layer in layers]
    setattr(model.config, names.depth, len(layers))
    return model
