"""A grown model of transformers, exported to its own kind, is a larger model of its class."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hosts import V, host
from torch import Tensor, nn

import esper
from esper.cli import main
from esper.errors import ExportError, MissingExtraError
from esper.kasmina.body import Body
from esper.kasmina.export import export_with_report
from esper.kasmina.seed import Seed
from esper.pretrained import save_pretrained

BERT = "bypass:bert.encoder.layer.{0}.intermediate.dense->bert.encoder.layer.{0}.output.dense"
VIT = "bypass:vit.layers.{0}.mlp.fc1->vit.layers.{0}.mlp.fc2"
T5 = "bypass:{0}.block.{1}.layer.{2}.DenseReluDense.wi->{0}.block.{1}.layer.{2}.DenseReluDense.wo"

STACKED_GPT2 = [f"stack:transformer.h.{block}" for block in (0, 1, 0, 1)]

CASES: dict[str, tuple[str, Sequence[str], dict[str, tuple[int, int]]]] = {
    "gpt2 deeper": ("gpt2", STACKED_GPT2, {"n_layer": (2, 6)}),
    "llama deeper": (
        "llama",
        ["stack:model.layers.0", "stack:model.layers.1"],
        {"num_hidden_layers": (2, 4)},
    ),
    "vit deeper": ("vit", ["stack:vit.layers.0"], {"num_hidden_layers": (2, 3)}),
    "vit wider": ("vit", [VIT.format(0), VIT.format(1)], {"intermediate_size": (24, 32)}),
    "bert wider": ("bert", [BERT.format(0), BERT.format(1)], {"intermediate_size": (24, 32)}),
    "t5 wider": (
        "t5",
        [T5.format("encoder", n, 1) for n in (0, 1)] + [T5.format("decoder", n, 2) for n in (0, 1)],
        {"d_ff": (24, 32)},
    ),
    "t5 deeper": (
        "t5",
        ["stack:encoder.block.1", "stack:decoder.block.1"],
        {"num_layers": (2, 3), "num_decoder_layers": (2, 3)},
    ),
}
"""Host, sites grown at, and what the config says before and after."""

READER = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "esper":
            raise ImportError("esper is not installed here")

sys.meta_path.insert(0, Absent())
import torch, transformers
for folder in sys.argv[1:]:
    case = json.load(open(folder + "/case.json"))
    given = torch.load(folder + "/given.pt", weights_only=True)
    model = getattr(transformers, case["kind"]).from_pretrained(folder + "/model", dtype="auto").eval()
    assert all(getattr(model.config, name) == size for name, size in case["sizes"].items()), model.config
    with torch.no_grad():
        logits = model(**given["example"]).logits
    torch.testing.assert_close(logits, given["logits"], rtol=1e-5, atol=1e-5)
    if "tokens" in given:
        assert torch.equal(generate := model.generate(given["prompt"], **case["generation"]), given["tokens"])
assert "esper" not in sys.modules
print("read", len(sys.argv) - 1)
"""


def perturb(seed: Seed, stage: str = "fossilized", alpha: float = 1.0) -> None:
    """Give a seed weights that matter, and a stage."""
    generator = torch.Generator().manual_seed(int(seed.seed_id[1:]))
    with torch.no_grad():
        for parameter in seed.branch.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    seed.enter(stage, alpha)  # type: ignore[arg-type]


def grown(name: str, sites: Sequence[str], dtype: torch.dtype = torch.float32) -> tuple[Any, Body]:
    """A host of the table, attached, with seeds that are part of it at ``sites``."""
    case = host(name)
    net: Any = case.net(case.build()).to(dtype)
    body = esper.attach(net, case.example() if dtype == torch.float32 else _cast(case.example(), dtype))
    for site in sites:
        perturb(
            body.germinate(site, "stack" if site.startswith("stack") else "widen", 8 if ">" in site else 1)
        )
    return net.eval(), body


def _cast(example: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: v.to(dtype) if v.is_floating_point() else v for name, v in example.items()}


def logits(net: Any, example: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return net.eval()(**example, **options).logits


GENERATION = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def generate(net: Any, **options: Any) -> Tensor:
    return net.generate(host("gpt2").example()["input_ids"][:2, :5], **GENERATION, **options)


@pytest.mark.parametrize("case", CASES)
def test_a_grown_model_is_a_larger_one_of_its_class(case: str) -> None:
    name, sites, changed = CASES[case]
    net, _ = grown(name, sites)
    example = host(name).example()
    made = esper.export_pretrained(net)
    assert type(made) is type(host(name).net(host(name).build()))
    assert {field: getattr(made.config, field) for field in changed} == {
        f: n for f, (_, n) in changed.items()
    }
    assert {field: getattr(net.config, field) for field in changed} == {f: n for f, (n, _) in changed.items()}
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in net.parameters())
    torch.testing.assert_close(logits(made, example), logits(net, example), rtol=1e-5, atol=1e-5)
    assert made.state_dict().keys() == type(made)(made.config).state_dict().keys()


def test_without_esper_it_loads_and_says_the_same(tmp_path: Path) -> None:
    folders = []
    for number, (name, sites, changed) in enumerate(CASES.values()):
        net, _ = grown(name, sites)
        folder = tmp_path / str(number)
        folder.mkdir()
        report = save_pretrained(net, folder / "model")
        assert report.changed == changed
        example = host(name).example()
        given: dict[str, Any] = {"example": example, "logits": logits(net, example)}
        if name in ("gpt2", "llama", "t5"):
            given["prompt"] = example["input_ids"][:2, :5]
            given["tokens"] = net.generate(given["prompt"], **GENERATION)
        sizes = {field: after for field, (_, after) in changed.items()}
        torch.save(given, folder / "given.pt")
        (folder / "case.json").write_text(
            json.dumps({"kind": report.kind, "sizes": sizes, "generation": GENERATION})
        )
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", READER, *folders], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"read {len(CASES)}"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_is_the_same_with_and_without_cache_and_after_export(name: str) -> None:
    blocks = "transformer.h" if name == "gpt2" else "model.layers"
    net, _ = grown(name, [f"stack:{blocks}.0", f"stack:{blocks}.1", f"stack:{blocks}.0"])
    made = esper.export_pretrained(net)
    tokens = generate(net, use_cache=False)
    for model in (net, made):
        for options in ({}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}):
            wanted = (
                tokens
                if not options or "cache_implementation" in options
                else generate(net, use_cache=False, num_beams=2)
            )
            assert torch.equal(generate(model, **options), wanted), options
    for position, block in enumerate(made.get_submodule(blocks)):
        numbers = {m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")}
        assert numbers == {position}


def test_a_list_with_an_entry_for_each_block_grows_with_them() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    net = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=4, use_sliding_window=True, max_position_embeddings=32,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
    )  # fmt: skip
    example = {"input_ids": torch.randint(V, (2, 12))}
    perturb(esper.attach(net, example).germinate("stack:model.layers.2", "stack"))
    made = esper.export_pretrained(net)
    assert made.config.layer_types == [
        "sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"
    ]  # fmt: skip
    assert net.config.num_hidden_layers == 4
    torch.testing.assert_close(logits(made, example), logits(net, example), rtol=1e-5, atol=1e-5)
    assert torch.equal(generate(made), generate(net, use_cache=False))


def test_what_the_class_cannot_generate_is_noted(tmp_path: Path) -> None:
    net, _ = grown("t5", ["stack:decoder.block.1"])  # transformers counts places in the cache by the encoder
    report = save_pretrained(net, tmp_path / "model")
    assert "generation with a cache fails in this version of transformers" in str(report)
    net, _ = grown("t5", ["stack:encoder.block.1"])
    assert save_pretrained(net, tmp_path / "other").notes == ()


def test_a_model_of_models_grows_in_one_of_them(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": V, "max_position_embeddings": 16, "eos_token_id": 1}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    net = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    example = {"input_ids": torch.randint(2, V, (2, 8)), "pixel_values": torch.randn(2, 3, 8, 8)}
    perturb(esper.attach(net, example).germinate("stack:vision_model.encoder.layers.1", "stack"))
    report = save_pretrained(net, tmp_path / "model")
    assert report.changed == {"vision_config.num_hidden_layers": (2, 3)}


def test_stages_of_blocks_are_counted_in_their_list(tmp_path: Path) -> None:
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    net = SwinForImageClassification(config)
    perturb(
        esper.attach(net, torch.randn(2, 3, 16, 16)).germinate(
            "stack:swin.encoder.layers.1.blocks.1", "stack"
        )
    )
    assert save_pretrained(net, tmp_path / "model").changed == {"depths": ([2, 2], [2, 3])}


def test_a_block_whose_number_counts_is_refused_with_that_reason() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    net = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V, n_positions=16, n_embd=16, n_layer=2, n_head=2, scale_attn_by_inverse_layer_idx=True
        )
    )
    perturb(esper.attach(net, torch.randint(V, (2, 6))).germinate("stack:transformer.h.0", "stack"))
    with pytest.raises(
        ExportError, match=r"(?s)outputs differ.*built with n_layer as grown.*number may enter"
    ):
        esper.export_pretrained(net)
    assert export_with_report(net)[1].folded == ("s1",)


def test_dtype_ties_flags_and_generation_config_are_kept() -> None:
    net, _ = grown("gpt2", ["stack:transformer.h.0"], torch.bfloat16)
    net.generation_config.max_new_tokens = 3
    net.transformer.wpe.weight.requires_grad_(False)
    made = esper.export_pretrained(net)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert made.lm_head.weight is made.transformer.wte.weight
    assert made.generation_config.max_new_tokens == 3
    assert [n for n, p in made.named_parameters() if not p.requires_grad] == ["transformer.wpe.weight"]
    assert not made.training
    assert net.config.n_layer == 2
    assert [block.attn.layer_idx for block in net.transformer.h] == [0, 1]  # the grown one is as it was


def test_the_exported_model_trains_on() -> None:
    net, _ = grown("gpt2", ["stack:transformer.h.1"])
    made = esper.export_pretrained(net).train()
    batch = host("gpt2").batches(1)[0]
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = made(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None and bool(p.grad.any()) for p in made.transformer.h.parameters())
    assert losses[-1] < losses[0] - 0.1


def test_a_lightning_module_exports_the_model_that_it_holds() -> None:
    case = host("vit")
    module = case.build()
    body = esper.attach(module, case.example())
    perturb(body.germinate("stack:net.vit.layers.0", "stack"))
    made = esper.export_pretrained(module)
    assert made.config.num_hidden_layers == 3
    torch.testing.assert_close(
        logits(made, case.example()), logits(module.net, case.example()), rtol=1e-5, atol=1e-5
    )


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = host("vit").net(host("vit").build())
        self.head = nn.Linear(5, 3)

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.head(self.body(**inputs).logits)


@pytest.mark.parametrize(
    ("name", "seeds", "message"),
    [
        (
            "bert",
            [(BERT.format(1), "widen", "fossilized", 1.0)],
            r"(?s)one intermediate_size for all: bert.encoder.layer.1.\S+ is \d+ x 16, but bert.encoder.layer.0.\S+ "
            r"is still 24 x 16. In the way: seed s1 \(widen at bypass:bert.*grow all blocks alike.*esper.export",
        ),
        (
            "gpt2",
            [
                ("stack:transformer.h.0", "stack", "fossilized", 1.0),
                ("parallel:lm_head", "bottleneck", "fossilized", 1.0),
                ("parallel:lm_head", "lowrank", "holding", 1.0),
            ],
            r"seed s2 \(bottleneck at parallel:lm_head\): a branch of its own, for which the class has no layer; "
            r"seed s3 \(lowrank at parallel:lm_head\): its layer's weight is tied.*cull these seeds; esper.export",
        ),
        (
            "gpt2",
            [("stack:transformer.h.0", "stack", "blending", 0.3)],
            r"s1 \(stack at stack:transformer.h.0, blending at 0.3\): only a block at full strength.*"
            r"let blending seeds finish",
        ),
        (
            "llama",
            [("bypass:model.layers.0.input_layernorm->lm_head", "shortcut", "fossilized", 1.0)],
            r"s1 \(shortcut at bypass:\S+\): a branch of its own",
        ),
    ],
)  # fmt: skip
def test_what_is_none_of_its_kind_is_refused_with_the_seeds_in_the_way(
    name: str, seeds: list[tuple[str, str, str, float]], message: str, tmp_path: Path
) -> None:
    net, body = grown(name, [])
    for site, blueprint, stage, alpha in seeds:
        perturb(body.germinate(site, blueprint), stage, alpha)
    before = net.config.to_dict()
    with pytest.raises(ExportError, match=message):
        save_pretrained(net, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    assert net.config.to_dict() == before


@pytest.mark.parametrize(
    ("name", "sites", "width"),
    [
        ("bert", [BERT.format(0)], ("intermediate_size", 32)),
        (
            "vit",
            ["stack:vit.layers.1", VIT.format(0), VIT.format(1), VIT.format(1)],
            ("intermediate_size", 40),
        ),
    ],
)
def test_blocks_widened_unequally_are_filled_up_when_asked(
    name: str, sites: list[str], width: tuple[str, int], tmp_path: Path
) -> None:
    net, _ = grown(name, sites)
    example = host(name).example()
    report = save_pretrained(net, tmp_path / "model", fill=True)
    assert report.changed[width[0]] == (24, width[1])
    more = report.num_parameters - sum(p.numel() for p in net.parameters())
    assert more > 0
    assert f"{more:,} parameters of silent units fill up" in str(report)
    made = esper.export_pretrained(net, fill=True)
    torch.testing.assert_close(logits(made, example), logits(net, example), rtol=1e-5, atol=1e-5)
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    for _ in range(2):  # in two steps: fan-out first, for it starts at zero
        loss = made.train()(**host(name).batches(1)[0]).loss
        made.zero_grad()
        loss.backward()
        torch.optim.SGD(made.parameters(), lr=1.0).step()
    changed = [
        (p - before[n]).abs().amax(dim=1 if "fc1" in n or "intermediate" in n else 0)
        for n, p in made.named_parameters()
        if p.dim() == 2 and width[1] in p.shape
    ]
    assert all(bool((units > 0).all()) for units in changed)


def test_seeds_that_do_not_act_yet_are_left_out() -> None:
    net, body = grown("gpt2", ["stack:transformer.h.0"])
    perturb(body.germinate("stack:transformer.h.1", "stack"), "training", 0.0)
    made = esper.export_pretrained(net)
    assert made.config.n_layer == 3
    example = host("gpt2").example()
    torch.testing.assert_close(logits(made, example), logits(net, example), rtol=1e-5, atol=1e-5)


def test_seeds_outside_the_model_of_transformers_are_named() -> None:
    model = WithHead()
    example = host("vit").example()
    perturb(esper.attach(model, example).germinate("parallel:head", "lowrank"))
    with pytest.raises(
        ExportError, match=r"holds its PreTrainedModel as 'body', but grew outside it too: s1 at"
    ):
        esper.export_pretrained(model)


def test_a_module_has_to_hold_one_model_of_transformers() -> None:
    with pytest.raises(ExportError, match=r"Linear holds 0; esper.export takes any module"):
        esper.export_pretrained(nn.Linear(2, 2))
    with pytest.raises(
        ExportError, match=r"Sequential holds 2 \('0.body', '1.body'\); export each by itself"
    ):
        esper.export_pretrained(nn.Sequential(WithHead(), WithHead()))


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'esper\[finetune\]'"):
        esper.export_pretrained(nn.Linear(2, 2))


def test_a_folder_that_holds_something_stays_as_it_is(tmp_path: Path) -> None:
    net, _ = grown("vit", [])
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="to be a new or an empty folder"):
        save_pretrained(net, tmp_path)
    with pytest.raises(ExportError, match="parent of the folder"):
        save_pretrained(net, tmp_path / "absent" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        ("bert", [(BERT.format(0), "widen"), ("parallel:bert.encoder.layer.1.attention.self.query", "lowrank")]),
        ("llama", [("parallel:model.layers.0.mlp.down_proj", "lowrank"), ("stack:model.layers.1", "stack")]),
    ],
)  # fmt: skip
def test_adapters_of_a_frozen_host_are_merged(name: str, seeds: list[tuple[str, str]]) -> None:
    case = host(name)
    net = case.net(case.build())
    net.requires_grad_(False)
    body = esper.attach(net, case.example())
    for site, blueprint in seeds:
        perturb(body.germinate(site, blueprint))
    plain, report = export_with_report(net)
    assert sorted(report.folded) == ["s1", "s2"]
    assert report.route == "modules"
    torch.testing.assert_close(
        logits(plain, case.example()), logits(net, case.example()), rtol=1e-5, atol=1e-5
    )


def test_the_general_export_of_a_deeper_model_generates_too() -> None:
    net, _ = grown("gpt2", ["stack:transformer.h.0"])
    plain, report = export_with_report(net)
    assert (report.folded, report.route) == (("s1",), "modules")
    assert plain.config.n_layer == 3
    assert all(block.attn.config is plain.config for block in plain.transformer.h)
    assert torch.equal(generate(plain), generate(net, use_cache=False))


def test_a_model_with_a_shortcut_becomes_a_program_without_its_cache() -> None:
    net, body = grown("llama", [])
    perturb(body.germinate("bypass:model.layers.0.input_layernorm->lm_head", "shortcut"))
    plain, report = export_with_report(net)
    assert report.route == "program"
    assert net.config.use_cache
    example = host("llama").example()
    torch.testing.assert_close(plain(**example)["logits"], logits(net, example), rtol=1e-5, atol=1e-5)


OWN_MODULE = """
import lightning as L
from transformers import GPT2Config, GPT2LMHeadModel


class Writer(L.LightningModule):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=num_layers, n_head=2))

    def forward(self, tokens):
        return self.net(tokens).logits
"""


def test_the_command_line_exports_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2LMHeadModel

    monkeypatch.chdir(tmp_path)
    Path("own_writer.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("own_writer").Writer(2)
    tokens = torch.randint(V, (2, 6))
    perturb(esper.attach(module, tokens).germinate("stack:net.transformer.h.0", "stack"))
    trainer = L.Trainer(logger=False, barebones=False, accelerator="cpu", enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint("grown.ckpt")
    command = ["export", "grown.ckpt", "out/larger", "--pretrained", "--model", "own_writer:Writer"]
    assert main(command) == 0
    assert "out/larger: GPT2LMHeadModel with n_layer 2 -> 3" in capsys.readouterr().out
    loaded = GPT2LMHeadModel.from_pretrained("out/larger").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, module.eval()(tokens), rtol=1e-5, atol=1e-5)
    assert main(command) == 2
    assert "to be a new or an empty folder" in capsys.readouterr().err


def test_the_page_on_export_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "esper/docs/export.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders and loggers is not about the page
        for snippet in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
            exec(compile(snippet, "esper/docs/export.md", "exec"), names)
    assert "6 blocks grew to 12" in capsys.readouterr().out
    assert names["again"].config.n_layer == 12
    assert names["callback"].summary()["seeds_germinated"] == 6
    tokens = torch.randint(16, (2, 8))
    expected = logits(names["module"].net, {"input_ids": tokens})
    torch.testing.assert_close(logits(names["again"], {"input_ids": tokens}), expected, rtol=1e-5, atol=1e-5)


def test_a_model_built_without_its_pooler_says_how_to_load_it(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    module = nn.ModuleDict({"bert": BertModel(config, add_pooling_layer=False), "head": nn.Linear(16, 3)})
    net = module["bert"]
    body = esper.attach(net, {"input_ids": torch.randint(V, (2, 6))})
    perturb(body.germinate("parallel:encoder.layer.0.attention.self.query", "lowrank"))
    report = save_pretrained(module, tmp_path / "model")
    assert report.options == {"add_pooling_layer": False}
    assert "load it by BertModel.from_pretrained(folder, add_pooling_layer=False)" in str(report)
    assert "51 parameters of ModuleDict outside its BertModel are not in the export (head.weight" in str(
        report
    )
    loaded = BertModel.from_pretrained(tmp_path / "model", **report.options).eval()
    tokens = torch.randint(V, (3, 7))
    with torch.no_grad():
        expected = net.eval()(tokens).last_hidden_state
        torch.testing.assert_close(loaded(tokens).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
