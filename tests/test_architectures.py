"""Every architecture that is supported: its layers, sizes, positions and biases come with what is kept of it."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CamembertConfig,
    CamembertModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from embedistill.architectures import (
    ARCHITECTURES,
    Sizes,
    count_parameters,
    find_words,
    keep_layers,
    read_config,
    read_sizes,
    resize,
)
from embedistill.encoding.packed import PackedBody, can_pack
from embedistill.errors import UsageError
from embedistill.student import depth
from embedistill.student.depth import search_layers
from embedistill.student.head import solve_ridge
from embedistill.student.planning import plan_transformer
from embedistill.student.selection import select_narrow
from embedistill.student.width import fit_narrow
from embedistill.training.packed import _Forward

VOCABULARY = 60
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"max_position_embeddings": 40}
DISTIL = {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40, "pad_token_id": 0}
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
MODERN = {"layer_types": KINDS, "local_attention": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODERN |= {"cls_token_id": 1, "sep_token_id": 2}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "bert": (BertModel, BertConfig, SIZES | {"pad_token_id": 0}, "encoder.layer"),
    "mpnet": (MPNetModel, MPNetConfig, SIZES | {"pad_token_id": 1}, "encoder.layer"),
    "roberta": (RobertaModel, RobertaConfig, SIZES | {"pad_token_id": 1}, "encoder.layer"),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig, SIZES | {"pad_token_id": 1}, "encoder.layer"),
    "camembert": (CamembertModel, CamembertConfig, SIZES | {"pad_token_id": 1}, "encoder.layer"),
    "distilbert": (DistilBertModel, DistilBertConfig, DISTIL, "transformer.layer"),
    "modernbert": (ModernBertModel, ModernBertConfig, SIZES | MODERN, "layers"),
}
NORM_LAST = [family for family in FAMILIES if family != "modernbert"]
WHOLE = Sizes(4, 32, 4, 64, VOCABULARY)
NARROW = Sizes(2, 24, 4, 40, VOCABULARY)


def make_model(family: str, **changes: Any) -> Any:
    """Return a random model all of whose weights matter."""
    model_class, config_class, sizes, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**({"vocab_size": VOCABULARY} | sizes | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10 if family == "modernbert" else 4)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_texts(count: int, seed: int = 1, shortest: int = 5, longest: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in lengths]


TEXTS = make_texts(6, shortest=3, longest=30)


@torch.no_grad()
def run(model: Any, texts: Sequence[Tensor] = TEXTS) -> list[Tensor]:
    """Return the last hidden states of each text's tokens, all texts in one padded batch."""
    padding = model.config.pad_token_id
    ids = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=padding)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return [states[: len(text)] for states, text in zip(hidden, texts, strict=True)]


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for one, other in zip(run(found), run(expected), strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def differ(one: Any, other: Any) -> float:
    pairs = zip(run(one), run(other), strict=True)
    return max((left - right).abs().max().item() for left, right in pairs)


def pool(model: Any, texts: Sequence[Tensor]) -> np.ndarray:
    return torch.stack([states.mean(0) for states in run(model, texts)]).numpy()


def reload(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return AutoModel.from_pretrained(folder).eval()


def remake(family: str, teacher: Any, layers: list[int]) -> Any:
    """Return a new model of some layers of a teacher, made of its class, its settings and its state alone."""
    model_class, config_class, sizes, stack = FAMILIES[family]
    depth_name = "n_layers" if family == "distilbert" else "num_hidden_layers"
    sizes = sizes | {"vocab_size": VOCABULARY, depth_name: len(layers)}
    if family == "modernbert":
        sizes["layer_types"] = [KINDS[layer] for layer in layers]
    state = {}
    for name, value in teacher.state_dict().items():
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if not name.startswith(f"{stack}."):
            state[name] = value
        elif int(number) in layers:
            state[f"{stack}.{layers.index(int(number))}.{rest}"] = value
    model = model_class(config_class(**sizes)).eval()
    model.load_state_dict(state)
    return model


def test_all_that_is_supported_is_tested() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_kept_whole_is_its_teacher(family: str) -> None:
    teacher = make_model(family)
    before = copy.deepcopy(teacher.state_dict())
    assert_same(keep_layers(copy.deepcopy(teacher), [0, 1, 2, 3]), teacher)
    for ids in ((), TEXTS):
        student = select_narrow(teacher, WHOLE, [0, 1, 2, 3], ids=ids)
        assert_same(student, teacher)
        assert {name: value.shape for name, value in student.state_dict().items()} == {
            name: value.shape for name, value in before.items()
        }
    torch.testing.assert_close(teacher.state_dict(), before, atol=0, rtol=0)
    assert teacher.config.to_dict() == make_model(family).config.to_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_some_layers_are_those_of_the_teacher(family: str, tmp_path: Path) -> None:
    layers = [0, 2, 3]
    teacher = make_model(family)
    expected = remake(family, teacher, layers)
    student = keep_layers(copy.deepcopy(teacher), layers)
    assert differ(student, teacher) > 0.1
    assert_same(student, expected)
    selected = select_narrow(teacher, Sizes(len(layers), 32, 4, 64, VOCABULARY), layers)
    assert_same(selected, student)
    again = reload(student, tmp_path)
    assert_same(again, expected, 1e-6)
    assert read_sizes(again.config.to_dict()) == Sizes(len(layers), 32, 4, 64, VOCABULARY)
    if family == "modernbert":
        assert again.config.layer_types == [KINDS[layer] for layer in layers]


@pytest.mark.parametrize("family", NORM_LAST)
def test_the_first_layer_can_be_left_out(family: str) -> None:
    teacher = make_model(family)
    assert_same(keep_layers(copy.deepcopy(teacher), [1, 3]), remake(family, teacher, [1, 3]))
    assert_same(select_narrow(teacher, Sizes(2, 32, 4, 64, VOCABULARY), [1, 3]), remake(family, teacher, [1, 3]))


def test_modernbert_needs_its_first_layer() -> None:
    teacher = make_model("modernbert")
    with pytest.raises(UsageError, match="layer 0 among them"):
        keep_layers(copy.deepcopy(teacher), [1, 2])
    with pytest.raises(UsageError, match="layer 0 among them"):
        plan_transformer(teacher.config.to_dict(), [1, 2])


def test_local_attention_matters_here() -> None:
    teacher = make_model("modernbert")
    assert differ(teacher, make_model("modernbert", local_attention=64)) > 0.1


@pytest.mark.parametrize("sizes", [NARROW, Sizes(3, 24, 2, 8, VOCABULARY)])
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_as_planned(family: str, sizes: Sizes, tmp_path: Path) -> None:
    teacher = make_model(family)
    layers = list(range(sizes.layers))
    student = select_narrow(teacher, sizes, layers, ids=TEXTS)
    words = find_words(student).weight.numel()
    rest = sum(parameter.numel() for parameter in student.parameters()) - words
    assert count_parameters(resize(teacher.config, sizes, layers)) == (words, rest)
    assert words == VOCABULARY * sizes.hidden_size
    assert read_sizes(student.config.to_dict()) == sizes
    assert all(states.shape[1] == sizes.hidden_size and states.isfinite().all() for states in run(student))
    assert_same(reload(student, tmp_path), student, 1e-6)
    again = select_narrow(teacher, sizes, layers, ids=TEXTS)
    torch.testing.assert_close(again.state_dict(), student.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_text_is_what_it_is_alone(family: str) -> None:
    teacher = make_model(family)
    kept = keep_layers(copy.deepcopy(teacher), [0, 2])
    for model in (kept, select_narrow(teacher, NARROW, [0, 2], ids=TEXTS)):
        for together, text in zip(run(model), TEXTS, strict=True):
            torch.testing.assert_close(together, run(model, [text])[0], atol=1e-5, rtol=0)
        offset = getattr(model.embeddings, "padding_idx", None)
        assert offset == getattr(teacher.embeddings, "padding_idx", None)
        assert (offset == 1) == (family not in {"bert", "distilbert", "modernbert"})


@torch.no_grad()
def silence(layer: Any, family: str, heads: Sequence[int], neurons: Sequence[int]) -> None:
    """Let some heads, of 8 dimensions each, and neurons of a layer write nothing."""
    names = ARCHITECTURES[family]
    for head in heads:
        layer.get_submodule(names.join).weight[:, 8 * head : 8 * head + 8] = 0
    layer.get_submodule(names.shrink).weight[:, list(neurons)] = 0


def layers_of(model: Any, family: str) -> Any:
    return model.get_submodule(FAMILIES[family][3])


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_neurons_that_write_nothing_are_left_out(family: str) -> None:
    """Half of the heads, of twice the size, the rest of it zeros, give the same."""
    teacher = make_model(family)
    same = family == "mpnet"  # whose biases are shared: all layers keep the same heads
    for number, layer in enumerate(layers_of(teacher, family)):
        silence(layer, family, [0, 2] if same else [number, (number + 2) % 4], range(number % 2, 64, 2))
    student = select_narrow(teacher, Sizes(4, 32, 2, 32, VOCABULARY), [0, 1, 2, 3], ids=TEXTS)
    assert differ(make_model(family), teacher) > 0.1
    assert_same(student, teacher)


def test_dimensions_that_vary_most_are_kept() -> None:
    teacher = make_model("bert")
    norms = [module for name, module in teacher.named_modules() if name.endswith("LayerNorm")]
    kept = torch.arange(1, 32, 2)
    with torch.no_grad():
        for norm in norms:
            norm.weight.fill_(0.5)[kept] = 2
    student = select_narrow(teacher, Sizes(1, 16, 4, 64, VOCABULARY), [2], ids=TEXTS)
    torch.testing.assert_close(find_words(student).weight, find_words(teacher).weight[:, kept])
    named = select_narrow(teacher, Sizes(1, 16, 4, 64, VOCABULARY), [2], dimensions=torch.arange(16))
    torch.testing.assert_close(find_words(named).weight, find_words(teacher).weight[:, :16])
    torch.testing.assert_close(named.pooler.dense.weight, teacher.pooler.dense.weight[:16, :16])
    torch.testing.assert_close(named.embeddings.LayerNorm.bias, teacher.embeddings.LayerNorm.bias[:16])
    neurons = named.encoder.layer[0].intermediate.dense.weight
    torch.testing.assert_close(neurons, teacher.encoder.layer[2].intermediate.dense.weight[:, :16])


def test_smaller_heads_keep_their_scores_and_values() -> None:
    teacher = make_model("bert")
    attention = teacher.encoder.layer[0].attention
    dead = torch.tensor([head * 8 + place for head in range(4) for place in (head, head + 4)])
    with torch.no_grad():
        for part in (attention.self.query, attention.self.value):
            part.weight[dead] = 0
            part.bias[dead] = 0
    student = select_narrow(teacher, Sizes(1, 24, 4, 64, VOCABULARY), [0], dimensions=torch.arange(24))
    narrow = student.encoder.layer[0].attention
    states = torch.randn(1, 7, 24)
    wide = torch.cat([states, torch.zeros(1, 7, 8)], 2)
    torch.testing.assert_close(narrow.self(states)[1], attention.self(wide)[1])
    mixed, expected = narrow.output.dense(narrow.self(states)[0]), attention.output.dense(attention.self(wide)[0])
    torch.testing.assert_close(mixed, expected[..., :24])


@pytest.mark.parametrize(("width", "pairs"), [(16, [0, 2]), (24, [0, 1, 3]), (8, [0])])
def test_smaller_heads_keep_rotary_pairs_of_near_frequencies(width: int, pairs: list[int]) -> None:
    """A head of 8 has pairs of frequency base^-(0, 1, 2, 3)/4, one of 4 base^-(0, 1)/2, of 6 base^-(0, 1, 2)/3."""
    teacher = make_model("modernbert")
    student = select_narrow(teacher, Sizes(2, width, 4, 64, VOCABULARY), [0, 2], dimensions=torch.arange(width))
    rows = [head * 8 + half + pair for head in range(4) for half in (0, 4) for pair in pairs]
    for own, layer in zip(student.layers, (teacher.layers[0], teacher.layers[2]), strict=True):
        for part in (0, 1):
            expected = layer.attn.Wqkv.weight.chunk(3)[part][rows, :width] * (len(pairs) / 4) ** 0.25
            torch.testing.assert_close(own.attn.Wqkv.weight.chunk(3)[part], expected)


def test_rotary_pairs_need_heads_of_an_even_size() -> None:
    with pytest.raises(UsageError, match="an even number"):
        select_narrow(make_model("modernbert"), Sizes(2, 20, 4, 64, VOCABULARY), [0, 1])


def test_a_pooler_that_the_teacher_has_not_is_zero() -> None:
    teacher = make_model("mpnet")
    teacher.pooler = None
    assert not select_narrow(teacher, NARROW, [0, 1]).pooler.dense.weight.any()


@pytest.mark.parametrize("sizes", [NARROW, Sizes(3, 32, 2, 24, VOCABULARY)])
@pytest.mark.parametrize("family", NORM_LAST)
def test_a_fitted_model_is_as_planned(family: str, sizes: Sizes, tmp_path: Path) -> None:
    teacher = make_model(family)
    before = copy.deepcopy(teacher.state_dict())
    texts = make_texts(80)
    layers = [0, 1, 3][-sizes.layers :]
    student = fit_narrow(teacher, sizes, layers, texts, pool(teacher, texts))
    words = find_words(student).weight.numel()
    rest = sum(parameter.numel() for parameter in student.parameters()) - words
    assert (words, rest) == count_parameters(resize(teacher.config, sizes, layers))
    assert read_sizes(student.config.to_dict()) == sizes
    assert all(states.shape[1] == sizes.hidden_size and states.isfinite().all() for states in run(student))
    assert_same(reload(student, tmp_path), student, 1e-6)
    again = fit_narrow(teacher, sizes, layers, texts, pool(teacher, texts))
    torch.testing.assert_close(again.state_dict(), student.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(teacher.state_dict(), before, atol=0, rtol=0)


def measure_error(teacher: Any, student: Any) -> float:
    """Return how far a student is from its teacher on held-out texts, where 1 is the variance of the teacher."""
    known, new = make_texts(150, seed=2), make_texts(150, seed=3)
    wanted = pool(teacher, known).mean(0)
    inputs, targets = pool(student, known), pool(teacher, known) - wanted
    mean = inputs.mean(0)
    found = (pool(student, new) - mean) @ solve_ridge(inputs - mean, targets)
    expected = pool(teacher, new) - wanted
    return float(np.square(found - expected).sum() / np.square(expected).sum())


@pytest.mark.parametrize("family", ["bert", "mpnet", "roberta"])
def test_a_fitted_model_is_nearer_than_a_selected_one(family: str) -> None:
    """Errors are 0.09 to 0.12 against 0.13 to 0.16."""
    teacher = make_model(family)
    texts = make_texts(150)
    fitted = fit_narrow(teacher, NARROW, [1, 3], texts, pool(teacher, texts))
    selected = select_narrow(teacher, NARROW, [1, 3], ids=texts)
    assert measure_error(teacher, fitted) < measure_error(teacher, selected)


Load = Callable[[str], SentenceTransformer]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Make a random teacher of an architecture."""

    def make(family: str) -> SentenceTransformer:
        tokenizer = make_tokenizer()
        make_model(family, vocab_size=len(tokenizer)).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        transformer = Transformer(str(tmp_path / family), max_seq_length=32)
        return SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")

    return make


@pytest.fixture
def texts(sentences: list[str]) -> list[str]:
    return sentences[:60]


@torch.no_grad()
def make_idle(layer: Any, family: str) -> None:
    """Let a layer pass on what it reads."""
    names = ARCHITECTURES[family]
    for name in (names.join, names.shrink):
        for parameter in layer.get_submodule(name).parameters():
            parameter.zero_()


def make_norms_plain(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.reset_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_layers_are_found_as_are_asked_for(family: str, load: Load, texts: list[str]) -> None:
    teacher = load(family)
    before, settings = copy.deepcopy(teacher.state_dict()), teacher[0].model.config.to_dict()
    vectors = teacher.encode(texts)
    layers = search_layers(teacher, 2, texts, vectors)
    assert len(layers) == 2
    assert layers == sorted(set(layers))
    assert set(layers) <= {0, 1, 2, 3}
    if family == "modernbert":
        assert layers[0] == 0
    torch.testing.assert_close(teacher.state_dict(), before, atol=0, rtol=0)
    assert teacher[0].model.config.to_dict() == settings
    np.testing.assert_array_equal(teacher.encode(texts), vectors)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("family", "idle"), [("bert", [0, 2]), ("mpnet", [1]), ("distilbert", [3]), ("roberta", [2])])
def test_layers_that_do_nothing_are_left_out(
    family: str, idle: list[int], packed: bool, load: Load, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr(depth, "can_pack", lambda model: False)
    teacher = load(family)
    make_norms_plain(teacher[0].model)
    for layer in idle:
        make_idle(layers_of(teacher[0].model, family)[layer], family)
    rest = [layer for layer in range(4) if layer not in idle]
    assert search_layers(teacher, len(rest), texts, teacher.encode(texts)) == rest


@pytest.mark.parametrize(("idle", "kept"), [([2], [0, 1, 3]), ([1, 3], [0, 2]), ([0, 2], [0, 1, 3])])
def test_idle_layers_of_modernbert_are_left_out_but_the_first(
    idle: list[int], kept: list[int], load: Load, texts: list[str]
) -> None:
    teacher = load("modernbert")
    for layer in idle:
        make_idle(teacher[0].model.layers[layer], "modernbert")
    assert search_layers(teacher, len(kept), texts, teacher.encode(texts)) == kept


def test_distilbert_without_padding_gives_what_the_model_gives() -> None:
    model = make_model("distilbert")
    assert can_pack(model)
    texts = sorted(make_texts(12, shortest=1, longest=5), key=len)
    rows = [row for hidden in PackedBody(model, torch.float32).forward(texts) for row in hidden]
    for row, text in zip(rows, texts, strict=True):
        torch.testing.assert_close(row, run(model, [text])[0], atol=1e-5, rtol=1e-5)


def test_distilbert_trains_though_its_tokenizer_tells_sentences_apart() -> None:
    model = make_model("distilbert")
    texts = torch.stack([text[:3] for text in TEXTS])
    mask = torch.ones_like(texts)
    expected = model(input_ids=texts, attention_mask=mask).last_hidden_state
    found = _Forward(model, torch.float32)(texts, mask, token_type_ids=torch.zeros_like(texts)).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_another_architecture_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 32}))
    with pytest.raises(UsageError, match="t5") as error:
        read_config(tmp_path)
    assert all(name in str(error.value) for name in FAMILIES)
    with pytest.raises(UsageError, match="None"):
        read_config(tmp_path / "nowhere")
