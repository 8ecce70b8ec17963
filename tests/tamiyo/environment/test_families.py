"""Families: hosts by number, splits that do not meet, sealed families, sizes, shifts, rates."""

from __future__ import annotations

import collections
import itertools
import math

import msgspec
import pytest
import torch
from short_hosts import short

from esper.errors import ConfigError, DataNotFoundError
from esper.tamiyo.environment.corpora import CORPORA, VOCABULARY, corpus_digest, corpus_text, corpus_tokens
from esper.tamiyo.environment.data import NOISE_VARIANCE, load_task
from esper.tamiyo.environment.families import FAMILIES, KNOWN, SEALED, sample_host, tokens_per_parameter
from esper.tamiyo.environment.nets import build_network
from esper.tamiyo.environment.plain import forward_flops, train_plain
from esper.tamiyo.environment.rates import learning_rate, load_rules
from esper.tamiyo.environment.shapes import count_parameters
from esper.tamiyo.environment.specs import DigitsTask, HostSpec, PictureTask, Shift, TeacherTask, TextTask
from esper.tamiyo.environment.stream import Stream, make_optimizer, rate_factors


@pytest.mark.parametrize("family", KNOWN)
def test_a_number_names_one_host_that_survives_the_wire(family: str) -> None:
    spec = sample_host(family, "train", 3)
    assert sample_host(family, "train", 3) == spec
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=HostSpec) == spec
    others = [sample_host(family, "train", 4), sample_host(family, "validation", 3)]
    assert len({msgspec.structs.replace(s, split="train", number=0) for s in (spec, *others)}) == 3
    assert len({s.seed for s in (spec, *others)}) == 3
    data = load_task(spec.task)
    model = build_network(spec, data.input_shape, data.num_outputs)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(spec.architecture, spec.task)


def test_half_of_the_hosts_are_random_a_quarter_narrow_a_quarter_sound() -> None:
    shapes = collections.Counter(sample_host("digits_mlp", "train", n).shape for n in range(400))
    assert shapes["random"] == pytest.approx(200, abs=40)
    assert shapes["bottleneck"] == pytest.approx(100, abs=35)
    assert shapes["sound"] == pytest.approx(100, abs=35)


def test_tokens_per_parameter_of_gpts_spread_over_the_crossing() -> None:
    ratios = sorted(tokens_per_parameter(sample_host("text_gpt", "train", n)) for n in range(200))
    assert ratios[0] > 20
    assert ratios[-1] < 700
    median = ratios[100]
    assert math.log(median) == pytest.approx((math.log(30) + math.log(600)) / 2, abs=0.35)


def test_sealed_families_are_refused_where_something_could_be_learned() -> None:
    for family in SEALED:
        for split in ("train", "validation", "test"):
            with pytest.raises(ConfigError, match="nothing may be trained or tuned on a sealed family"):
                sample_host(family, split, 0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has the split train, validation and test, not 'sealed'"):
        sample_host("digits_mlp", "sealed", 0)
    with pytest.raises(ConfigError, match="no host family named 'mnist'; families are digits_mlp"):
        sample_host("mnist", "train", 0)
    with pytest.raises(ConfigError, match="number must be at least 0"):
        sample_host("digits_mlp", "train", -1)


def test_sealed_data_say_where_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPER_DATA_DIR", raising=False)
    for family in ("fashion_mlp", "shakespeare_gpt"):
        with pytest.raises(DataNotFoundError, match="ESPER_DATA_DIR is not set"):
            load_task(sample_host(family, "sealed", 0).task)


@pytest.mark.parametrize("family", KNOWN)
def test_parts_of_the_data_do_not_overlap(family: str) -> None:
    data = load_task(sample_host(family, "train", 0).task)
    rows = []
    for part in (data.train, data.held_out, data.test):
        x = part.x[:: max(1, len(part) // 4000)].flatten(1)
        assert torch.isfinite(x.float()).all()
        rows.append({tuple(row) for row in x.tolist()})
    if data.positions == 1:
        assert not rows[1] & rows[2]
        assert not rows[0] & (rows[1] | rows[2])


def test_shifts_happen_where_they_should() -> None:
    task = DigitsTask(num_train=300)
    base = msgspec.structs.replace(short("shift_mlp"), task=task)
    for kind in ("labels", "inputs", "swap"):
        spec = msgspec.structs.replace(base, shift=Shift(kind=kind, at=(20, 40)))
        stream = Stream(spec)
        phases = [stream.phase(step) for step in (0, 19, 20, 39, 40, 59)]
        assert [a is b for a, b in itertools.pairwise(phases)] == [True, False, True, False, True]
        first, second, third = stream.phases
        for part in ("train", "held_out", "test"):
            a, b, c = (getattr(phase, part) for phase in (first, second, third))
            if kind == "inputs":
                assert torch.equal(a.y, b.y)
                assert not torch.equal(a.x, b.x)
                assert torch.equal(a.x.sort(1).values, b.x.sort(1).values)
                continue
            assert torch.equal(a.x, b.x)
            moved = (a.y != b.y).float().mean()
            assert moved == pytest.approx(0.2, abs=0.08) if kind == "swap" else moved > 0.5
            if kind == "swap":  # of the labels as they are by then
                assert (b.y != c.y).float().mean() == pytest.approx(0.2, abs=0.08)
        x, y = stream.batch(45)
        assert x.shape == (spec.batch_size, 64)
        assert y.shape == (spec.batch_size,)
    with pytest.raises(ConfigError, match="ascending steps below total_steps"):
        msgspec.structs.replace(base, shift=Shift(kind="swap", at=(60,)))
    with pytest.raises(ConfigError, match="only labels of classes can be permuted"):
        msgspec.structs.replace(short("teacher_mlp"), shift=Shift(kind="labels", at=(5,)))


def test_an_epoch_shows_every_sample_once_and_repeats_differ() -> None:
    spec = msgspec.structs.replace(
        short("digits_mlp"), task=DigitsTask(num_train=160), batch_size=16, total_steps=20
    )
    order = Stream(spec)._order
    assert sorted(order[:10].flatten().tolist()) == list(range(160))
    assert sorted(order[10:].flatten().tolist()) == list(range(160))
    assert not torch.equal(order, Stream(spec, repeat=1)._order)


def test_regression_is_measured_in_nats_at_a_resolution() -> None:
    task = TeacherTask(in_features=4, hidden=(8,), out_features=2, num_train=500, seed=1)
    data = load_task(task)
    targets = data.train.pick(slice(0, 500))[1]
    assert float(data.loss(targets, targets)) == 0.0
    assert float(data.loss(torch.zeros_like(targets), targets)) == pytest.approx(
        0.5 * math.log(1 + 1 / NOISE_VARIANCE), abs=0.1
    )
    assert float(data.accuracy(targets, targets)) == 1.0


def test_tasks_say_what_they_cannot_give() -> None:
    with pytest.raises(ConfigError, match="asks for 1079 training samples, but there are 1078"):
        load_task(DigitsTask(num_train=1079))
    with pytest.raises(ConfigError, match=r"a crop of china.jpg must lie within \(427, 640\)"):
        load_task(PictureTask(picture="china", top=400, left=0, side=32, num_octaves=1, seed=0))


def test_texts_are_long_enough_and_mostly_known() -> None:
    for corpus in CORPORA:
        tokens = corpus_tokens(corpus)
        assert len(tokens) == len(corpus_text(corpus)) > 20_000
        assert int(tokens.max()) == len(VOCABULARY)
        assert float((tokens == 0).float().mean()) < 0.05
        assert len(corpus_digest(corpus)) == 16
    data = load_task(TextTask(corpus="datasets", context=16))
    x, y = data.train.pick(torch.tensor([0, 7]))
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_rates_follow_a_rule_within_what_was_tried() -> None:
    rules = load_rules()["families"]
    assert set(rules) == set(FAMILIES)
    for family in FAMILIES:
        rule = rules[family]
        rates = [learning_rate(family, size) for size in (10, 1000, 5000, 10**6)]
        assert all(rule["rates"][0] <= rate <= rule["rates"][-1] for rate in rates)
        assert rates == sorted(rates, reverse=True)  # larger hosts have no larger rates
    for family in KNOWN:  # the rule is better than half of it and twice it, or level with them
        assert rules[family]["regret"] <= min(
            rules[family]["regret_of_half"], rules[family]["regret_of_twice"]
        )
    with pytest.raises(ConfigError, match="no learning rate is known for family 'mnist'"):
        learning_rate("mnist", 100)


def test_the_schedule_warms_up_and_anneals_unless_the_data_shift() -> None:
    cosine, constant = (rate_factors(short(name, steps=100)) for name in ("digits_mlp", "shift_mlp"))
    assert cosine[:2] == pytest.approx([1 / 6, 2 / 6])
    assert max(cosine) == 1.0
    assert cosine[-1] < 0.01
    assert constant[-1] == 1.0


def test_flops_are_those_of_the_layers() -> None:
    spec = msgspec.structs.replace(short("digits_mlp"), task=DigitsTask(num_train=200))
    data = load_task(spec.task)
    model = build_network(spec, data.input_shape, data.num_outputs)
    weights = [p for p in model.parameters() if p.ndim == 2]
    expected = sum(2 * weight.numel() for weight in weights)
    assert forward_flops(model, data) == expected
    groups = make_optimizer(model, spec).param_groups
    assert [p for p in groups[0]["params"]] == weights
    outcome = train_plain(spec, follow=0.25)
    assert outcome.training_flops == 3 * expected * spec.batch_size * spec.total_steps
    assert [point.step for point in outcome.course] == [1, 16, 31, 46, 60]
    assert outcome.course[-1].loss == outcome.held_out_loss
