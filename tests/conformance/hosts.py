"""The hosts of the conformance suite: models that no one here wrote, tiny and randomly initialised.

Every host is a LightningModule that trains on a handful of fixed batches. Libraries are imported when a
host is built, because transformers and torch-geometric take seconds to import.

Legend: B samples, T tokens, V vocabulary, K classes, F features, N nodes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["HOSTS", "HostCase", "host", "host_names"]

B, T, V, K = 6, 8, 20, 5
NUM_BATCHES = 6
"""Batches of an epoch; every epoch has the same ones in the same order."""


@dataclass(frozen=True)
class HostCase:
    """One host of the table.

    Attributes:
        name: Short, unique; part of the test ids.
        library: Where the model's class comes from, as a reader would call it.
        model: What the model is, for readers.
        make: Builds the LightningModule; weights from the global random state.
        make_batch: From a generator to one batch, as ``training_step`` takes it.
        network: Name of the child that holds the network; empty where the module itself is it.
        inputs: From a batch to what the network's forward takes: a tensor, a tuple, or a dict of keywords.
        grows: What tests assert to fit the host: kind of site -> blueprints.
        fit: Site (in the network) and blueprint that the training runs grow.
        left_alone: Layers without a site -> a part of the reason that is given.
        also: Further sites and blueprints to grow, besides one site for each kind and blueprint.
        as_graph: Blueprints with which ``export`` gives a graph (of torch.fx or torch.export), and not the
            host's own class.
        generates: The network has transformers' ``generate``.
        mixes: The data's first dimension does not count samples, which see each other.
    """

    name: str
    library: str
    model: str
    make: Callable[[], L.LightningModule]
    make_batch: Callable[[torch.Generator], Any]
    network: str = "net"
    inputs: Callable[[Any], Any] = field(default=lambda batch: batch[0])
    grows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fit: tuple[str, str] = ("", "")
    left_alone: Mapping[str, str] = field(default_factory=dict)
    also: tuple[tuple[str, str], ...] = ()
    as_graph: tuple[str, ...] = ()
    generates: bool = False
    mixes: bool = False

    def build(self, seed: int = 0, *, dropout: bool = False) -> L.LightningModule:
        """A fresh module; equal seeds give equal weights.

        Args:
            seed: Of the global random state, which is left as it was.
            dropout: Keep the library's own dropout; otherwise there is none.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.make()
        if not dropout:
            without_dropout(module)
        return module

    def net(self, module: L.LightningModule) -> nn.Module:
        """The network inside ``module``."""
        return module.get_submodule(self.network)

    def batches(self, count: int = NUM_BATCHES, seed: int = 0) -> list[Any]:
        """Fixed batches of random data."""
        generator = torch.Generator().manual_seed(seed)
        return [self.make_batch(generator) for _ in range(count)]

    def loader(self, count: int = NUM_BATCHES, seed: int = 0) -> FixedBatches:
        """The batches in a loader that keeps their order, and its place in a checkpoint."""
        return FixedBatches(self.batches(count, seed))

    def example(self, seed: int = 0) -> Any:
        """Input of the network, as :func:`esper.attach` takes it."""
        return self.inputs(self.batches(1, seed)[0])


class FixedBatches:
    """The same batches in the same order every epoch; a checkpoint in the middle of one holds the place."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches
        self.position = 0
        self._start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        for index in range(start, len(self.batches)):
            self.position = index + 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch were given out."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration behind those that were given out; behind the last one, at the first."""
        self._start = state["position"] % len(self.batches)


class Wrapped(L.LightningModule):
    """Trains ``net`` by cross-entropy on (inputs..., labels); one prediction a row of logits."""

    def __init__(self, net: nn.Module, lr: float = 1e-2) -> None:
        super().__init__()
        self.net = net
        self.lr = lr

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the network's logits (..., K)."""
        return self.net(*inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean loss of the batch."""
        *inputs, labels = batch
        logits = self(*inputs)
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        self.log("train_loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean loss of the batch and log it."""
        *inputs, labels = batch
        loss = F.cross_entropy(self(*inputs).flatten(0, -2), labels.flatten())
        self.log("val_loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over everything."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class HuggingFace(L.LightningModule):
    """Trains a transformers model on dict batches, as their own examples do: the model returns its loss."""

    def __init__(self, net: nn.Module, lr: float = 1e-2) -> None:
        super().__init__()
        self.net = net
        self.lr = lr

    def forward(self, **batch: Tensor) -> Any:
        """Return the model's ``ModelOutput``."""
        return self.net(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss that the model computed."""
        loss: Tensor = self(**batch).loss
        self.log("train_loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss that the model computed and log it."""
        loss: Tensor = self(**batch).loss
        self.log("val_loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over everything."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def without_dropout(module: nn.Module) -> None:
    """Set every dropout probability to zero: of dropout layers, and what attention layers keep as a number."""
    for child in module.modules():
        if isinstance(child, nn.modules.dropout._DropoutNd):
            child.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if type(child.__dict__.get(name)) is float:
                setattr(child, name, 0.0)


def _tokens(generator: torch.Generator, *shape: int, high: int = V) -> Tensor:
    return torch.randint(0, high, shape, generator=generator)


def _boring() -> L.LightningModule:
    from lightning.pytorch.demos.boring_classes import BoringModel

    return BoringModel()


def _demo_transformer() -> L.LightningModule:
    from lightning.pytorch.demos import LightningTransformer

    class DemoTransformer(LightningTransformer):
        """The demo, without its download and with a validation step."""

        def prepare_data(self) -> None:
            """The data are ours."""

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            """Return the loss of the training step and log it."""
            loss = self.training_step(batch, batch_idx)
            self.log("val_loss", loss, batch_size=1)
            return loss

    DemoTransformer.train_dataloader = L.LightningModule.train_dataloader  # type: ignore[method-assign]
    return DemoTransformer(vocab_size=V)


def _bert() -> L.LightningModule:
    from transformers import BertConfig, BertForSequenceClassification

    return HuggingFace(
        BertForSequenceClassification(
            BertConfig(
                vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                max_position_embeddings=T, num_labels=K,
            )
        )
    )  # fmt: skip


def _gpt2() -> L.LightningModule:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=V, n_positions=4 * T, n_embd=16, n_layer=2, n_head=2, n_inner=24,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    return HuggingFace(GPT2LMHeadModel(config))


def _llama() -> L.LightningModule:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4 * T, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return HuggingFace(LlamaForCausalLM(config))


def _vit() -> L.LightningModule:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, num_labels=K,
    )  # fmt: skip
    return HuggingFace(ViTForImageClassification(config))


def _t5() -> L.LightningModule:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
        relative_attention_num_buckets=8, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return HuggingFace(T5ForConditionalGeneration(config))


class EncoderClassifier(nn.Module):
    """A torch ``nn.TransformerEncoder`` over tokens, its mean, and a linear head.

    Args:
        batch_first: As torch's layers take it; torch's default is False: (T, B, D).

    Shape:
        tokens: (B, T); logits: (B, K).
    """

    def __init__(self, *, batch_first: bool, norm_first: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(V, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first, norm_first=norm_first)
        fast = batch_first and not norm_first  # torch warns where its fused path cannot be taken
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=fast)
        self.head = nn.Linear(16, K)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to logits."""
        x = self.embedding(tokens)
        if self.batch_first:
            return self.head(self.encoder(x).mean(dim=1))
        return self.head(self.encoder(x.transpose(0, 1)).mean(dim=0))


class LSTMTagger(nn.Module):
    """An ``nn.LSTM`` tagger with torch's default layout (T, B, F), as its tutorial has it.

    Shape:
        tokens: (B, T); logits: (B, T, K).
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, 12)
        self.lstm = nn.LSTM(12, 16)
        self.hidden2tag = nn.Linear(16, K)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tag every token."""
        hidden, _ = self.lstm(self.embedding(tokens.transpose(0, 1)))
        return self.hidden2tag(hidden).transpose(0, 1)


def _gcn() -> L.LightningModule:
    with warnings.catch_warnings():
        # torch-geometric 2.8 scripts classes on import, which torch 2.13 deprecates
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        from torch_geometric.nn.models import GCN

    return Wrapped(GCN(in_channels=7, hidden_channels=16, num_layers=3, out_channels=K))


def _graph(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Node features (N, 7), edges (2, E) and node labels (N,); every graph has its own N and E."""
    nodes = int(torch.randint(9, 15, (), generator=generator))
    edges = torch.randint(0, nodes, (2, 3 * nodes), generator=generator)
    return torch.randn(nodes, 7, generator=generator), edges, _tokens(generator, nodes, high=K)


def _graph_classifier() -> L.LightningModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        from torch_geometric.nn import GINConv, global_mean_pool

    class GraphClassifier(nn.Module):
        """Two GIN layers over the nodes of several graphs, their mean, and a linear head; takes PyG's batches."""

        def __init__(self) -> None:
            super().__init__()
            widths = ((7, 16), (16, 16))
            self.convs = nn.ModuleList(
                GINConv(nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, b))) for a, b in widths
            )
            self.head = nn.Linear(16, K)

        def forward(self, data: Any) -> Tensor:
            """Map a batch of graphs to logits (graphs, K)."""
            x = data.x
            for conv in self.convs:
                x = conv(x, data.edge_index).relu()
            return self.head(global_mean_pool(x, data.batch))

    class GraphModule(Wrapped):
        """Trains on batches of graphs, as torch-geometric's loader gives them."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            """Return the mean loss of the graphs."""
            loss = F.cross_entropy(self.net(batch), batch.y)
            self.log("train_loss", loss, batch_size=1)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            """Return the mean loss of the graphs and log it."""
            loss = F.cross_entropy(self.net(batch), batch.y)
            self.log("val_loss", loss, batch_size=1)
            return loss

    return GraphModule(GraphClassifier())


def _graphs(generator: torch.Generator) -> Any:
    """A torch-geometric ``Batch`` of graphs of different sizes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        from torch_geometric.data import Batch, Data

    drawn = [_graph(generator) for _ in range(B)]
    return Batch.from_data_list([Data(x=x, edge_index=edges, y=labels[:1]) for x, edges, labels in drawn])


def _own(family: str) -> Callable[[], L.LightningModule]:
    def make() -> L.LightningModule:
        from esper.hosts import ClassifierModule, CNNConfig, GPTConfig, LanguageModule, MLPConfig, OptimConfig

        optim = OptimConfig(schedule="constant")
        if family == "mlp":
            return ClassifierModule(MLPConfig(in_features=12, hidden=(10, 4, 8), num_classes=K), optim)
        if family == "cnn":
            return ClassifierModule(CNNConfig(widths=(8, 4, 8), num_classes=K, norm="batch"), optim)
        return LanguageModule(
            GPTConfig(vocab_size=V, context=T, d_model=16, num_heads=2, mlp_ratio=1.5), optim
        )

    return make


def _pairs(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = _tokens(generator, B, T + 1)
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()


def _keywords(*leave_out: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    return lambda batch: {key: value for key, value in batch.items() if key not in leave_out}


def _padded(generator: torch.Generator) -> dict[str, Tensor]:
    """Tokens with a mask that hides the end of some sequences."""
    lengths = torch.randint(T // 2, T + 1, (B, 1), generator=generator)
    mask = (torch.arange(T) < lengths).long()
    return {"input_ids": _tokens(generator, B, T) * mask, "attention_mask": mask}


def _classes(generator: torch.Generator) -> Tensor:
    return _tokens(generator, B, high=K)


def _causal(generator: torch.Generator) -> dict[str, Tensor]:
    tokens = _tokens(generator, B, T)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


DENSE = ("bottleneck", "lowrank", "norm")
"""Parallel blueprints of a layer of vectors."""
TOKENS = ("attention", *DENSE)
"""Of a layer of sequences."""
IMAGES = ("attention", "bottleneck", "depthwise", "lowrank", "norm")
"""Of a host with convolutions and dense layers."""

HOSTS: tuple[HostCase, ...] = (
    HostCase(
        "boring", "Lightning", "demos `BoringModel`", _boring,
        lambda g: torch.randn(B, 32, generator=g), network="", inputs=lambda batch: batch,
        grows={"parallel": DENSE}, fit=("parallel:layer", "bottleneck"),
    ),
    HostCase(
        "demo_transformer", "Lightning", "demos `Transformer` language model", _demo_transformer, _pairs,
        network="model", inputs=lambda batch: batch,
        grows={"parallel": TOKENS, "bypass": ("widen",)},
        fit=("bypass:transformer.encoder.layers.0.linear1->transformer.encoder.layers.0.linear2", "widen"),
        left_alone={"embedding": "called 2 times in one forward pass"},
    ),
    HostCase(
        "bert", "transformers", "`BertForSequenceClassification`", _bert,
        lambda g: {**_padded(g), "labels": _classes(g)}, inputs=_keywords("labels"),
        grows={"parallel": TOKENS, "bypass": ("shortcut", "widen")},
        fit=("bypass:bert.encoder.layer.1.intermediate.dense->bert.encoder.layer.1.output.dense", "widen"),
        left_alone={"bert.embeddings.word_embeddings": "of type nn.Embedding"},
        as_graph=("shortcut",),
    ),
    HostCase(
        "gpt2", "transformers", "`GPT2LMHeadModel`", _gpt2, _causal, inputs=_keywords("labels"),
        grows={"parallel": TOKENS, "bypass": ("shortcut",), "stack": ("stack",)},
        fit=("stack:transformer.h.0", "stack"),
        left_alone={"transformer.wte": "of type nn.Embedding"}, as_graph=("shortcut",), generates=True,
        also=(  # transformers' Conv1D
            ("parallel:transformer.h.0.attn.c_attn", "lowrank"),
            ("parallel:transformer.h.0.mlp.c_fc", "bottleneck"),
        ),
    ),
    HostCase(
        "llama", "transformers", "`LlamaForCausalLM`", _llama, _causal, inputs=_keywords("labels"),
        grows={"parallel": TOKENS, "bypass": ("shortcut",), "stack": ("stack",)},
        fit=("stack:model.layers.1", "stack"),
        left_alone={"model.embed_tokens": "of type nn.Embedding"}, as_graph=("shortcut",), generates=True,
    ),
    HostCase(
        "vit", "transformers", "`ViTForImageClassification`", _vit,
        lambda g: {"pixel_values": torch.randn(B, 1, 8, 8, generator=g), "labels": _classes(g)},
        inputs=_keywords("labels"),
        grows={"parallel": IMAGES, "bypass": ("shortcut", "widen"), "stack": ("stack",)},
        fit=("bypass:vit.layers.0.mlp.fc1->vit.layers.0.mlp.fc2", "widen"),
        left_alone={"vit.layernorm": "of type nn.LayerNorm"},
        as_graph=("depthwise", "shortcut"),
    ),
    HostCase(
        "t5", "transformers", "`T5ForConditionalGeneration`", _t5,
        lambda g: {**_padded(g), "labels": _tokens(g, B, T)}, inputs=lambda batch: dict(batch),
        grows={"parallel": TOKENS, "bypass": ("widen",), "stack": ("stack",)},
        fit=("stack:decoder.block.1", "stack"),
        left_alone={
            "encoder.block.0": "it alone holds layer.0.SelfAttention.relative_attention_bias.weight",
            "decoder.block.1.layer.1": "one of several different layers in the list",
        },
        also=(("stack:decoder.block.1", "stack"),),
        generates=True,
    ),
    HostCase(
        "encoder", "torch", "`nn.TransformerEncoder` classifier, batch_first=True",
        lambda: Wrapped(EncoderClassifier(batch_first=True)),
        lambda g: (_tokens(g, B, T), _classes(g)),
        grows={"parallel": TOKENS, "bypass": ("widen",)},
        fit=("bypass:encoder.layers.0.linear1->encoder.layers.0.linear2", "widen"),
        left_alone={"embedding": "of type nn.Embedding"},
        as_graph=("attention",), also=(("parallel:encoder.layers.0.self_attn.out_proj", "lowrank"),),
    ),
    HostCase(
        "encoder_batch_second", "torch", "`nn.TransformerEncoder` classifier, batch in dimension 1",
        lambda: Wrapped(EncoderClassifier(batch_first=False)),
        lambda g: (_tokens(g, B, T), _classes(g)),
        grows={"parallel": TOKENS, "bypass": ("shortcut", "widen")},
        fit=("bypass:encoder.layers.0.self_attn->head", "shortcut"),
        left_alone={"embedding": "of type nn.Embedding"},
        as_graph=("shortcut",),
    ),
    HostCase(
        "encoder_norm_first", "torch", "`nn.TransformerEncoder` classifier, norm_first=True",
        lambda: Wrapped(EncoderClassifier(batch_first=True, norm_first=True)),
        lambda g: (_tokens(g, B, T), _classes(g)),
        grows={"parallel": TOKENS, "bypass": ("widen",), "stack": ("stack",)},
        fit=("stack:encoder.layers.0", "stack"),
        left_alone={"embedding": "of type nn.Embedding"},
        as_graph=("attention",),
    ),
    HostCase(
        "lstm", "torch", "`nn.LSTM` tagger, batch in dimension 1", lambda: Wrapped(LSTMTagger()),
        lambda g: (_tokens(g, B, T), _tokens(g, B, T, high=K)),
        grows={"parallel": TOKENS, "bypass": ("shortcut",)}, fit=("parallel:hidden2tag", "attention"),
        left_alone={"lstm": "of type nn.LSTM"}, as_graph=("shortcut",),
    ),
    HostCase(
        "gcn", "torch-geometric", "`GCN` node classifier", _gcn, _graph, inputs=lambda batch: batch[:-1],
        grows={"parallel": DENSE}, fit=("parallel:convs.1.lin", "bottleneck"), mixes=True,
    ),
    HostCase(
        "graphs", "torch-geometric", "`GINConv` graph classifier on `Batch` objects", _graph_classifier, _graphs,
        inputs=lambda batch: batch,
        grows={"parallel": DENSE, "bypass": ("widen",)},
        fit=("bypass:convs.1.nn.0->convs.1.nn.2", "widen"), mixes=True,
    ),
    HostCase(
        "mlp", "esper.hosts", "`MLP`", _own("mlp"),
        lambda g: (torch.randn(B, 12, generator=g), _classes(g)), network="host",
        grows={"parallel": DENSE, "bypass": ("shortcut", "widen")}, fit=("bypass:layers.0->layers.1", "widen"),
        as_graph=("bottleneck", "lowrank", "norm", "shortcut", "widen"),
    ),
    HostCase(
        "cnn", "esper.hosts", "`CNN` with BatchNorm", _own("cnn"),
        lambda g: (torch.randn(B, 1, 8, 8, generator=g), _classes(g)), network="host",
        grows={"parallel": IMAGES, "bypass": ("conv_widen", "shortcut")},
        fit=("bypass:layers.0->layers.1", "conv_widen"),
        left_alone={"norms.0": "of type nn.BatchNorm2d"}, as_graph=(*IMAGES, "conv_widen", "shortcut"),
    ),
    HostCase(
        "gpt", "esper.hosts", "`GPT`", _own("gpt"), _pairs, network="host",
        grows={"parallel": TOKENS, "bypass": ("shortcut", "widen"), "stack": ("stack",)},
        fit=("stack:blocks.0", "stack"),
        left_alone={"tokens": "of type nn.Embedding"}, as_graph=(*TOKENS, "shortcut", "widen", "stack"),
    ),
)  # fmt: skip
"""All hosts of the suite."""


def host_names() -> Sequence[str]:
    """Names of all hosts, for parametrised tests."""
    return [case.name for case in HOSTS]


def host(name: str) -> HostCase:
    """The host called ``name``.

    Raises:
        KeyError: There is none.
    """
    return {case.name: case for case in HOSTS}[name]
