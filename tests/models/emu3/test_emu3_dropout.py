"""Dropout inside Emu3's network: where the original has it, in training alone, and what config files say of it."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.emu3_toys import emu3
from helpers.files import change

from unimm import Emu3
from unimm.distributed.recompute import recompute_activations
from unimm.kernels import attention
from unimm.models.emu3 import network
from unimm.nn.fake_device import FakeDevice
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import text_part

RATE = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return emu3(tmp_path_factory.mktemp("dropout") / "toy", language={"attention_dropout": RATE})


@pytest.fixture
def model(folder) -> Emu3:
    return Emu3.from_pretrained(folder)


def batch():
    ids = [5, 9, 80, 33, 7]
    return pack_sequences([[text_part(ids, labels=[*ids[1:], -100])], [text_part([3, 4], labels=[4, -100])]])


def test_the_places(model, monkeypatch):
    """A factor in place of the draws: of embedded rows, and of what attention and feed-forward add, in every block."""
    rates, in_attention = [], []

    def doubled(x, p, training, inplace):
        assert training
        rates.append(p)
        return 2 * x

    def without_draws(q, k, v, mask, *, dropout):
        in_attention.append(dropout)
        return attention(q, k, v, mask)

    pack = batch()
    expected = losses_of_doubled(model, pack)
    model.train()
    monkeypatch.setattr(F, "dropout", doubled)
    monkeypatch.setattr(network, "attention", without_draws)
    losses = model(pack)
    n_layers = model.config.decoder.n_layers
    assert rates == [RATE] * (1 + 2 * n_layers) and in_attention == [RATE] * n_layers
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def losses_of_doubled(model, pack):
    """The losses where what is dropped from is doubled, by weights: embeddings, and the last linear of each branch."""
    doubled = Emu3(model.config).eval()
    doubled.load_state_dict(model.state_dict())
    with torch.no_grad():
        doubled.decoder.embed.weight *= 2
        for block in doubled.decoder.blocks:
            for weights in block.experts.values():
                weights.out_proj.weight *= 2
                weights.mlp.down.weight *= 2
    return doubled(pack)


def test_it_acts_in_training_alone(model):
    pack = batch()
    with torch.no_grad():
        still = model(pack)
        assert torch.equal(still, model(pack))
        model.train()
        torch.manual_seed(1)
        first, other = model(pack), model(pack)
        torch.manual_seed(1)
        again = model(pack)
        assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, still)
        model.eval()
        assert torch.equal(still, model(pack))


def test_blocks_that_are_computed_again_drop_the_same(model):
    """Activation checkpointing, both kinds: the gradients of the same draws."""
    pack = batch()
    model.train()
    grads = []
    for selective in (None, False, True):
        changed = Emu3(model.config)
        changed.load_state_dict(model.state_dict())
        changed.train()
        if selective is not None:
            recompute_activations(changed.decoder.blocks, selective=selective)
        torch.manual_seed(2)
        changed(pack).sum().backward()
        grads.append([p.grad for name, p in changed.named_parameters() if name.startswith("decoder")])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_memory_of_a_gpu_is_planned_without_all_probabilities(model, device_type):
    """There a fused call drops; a CPU holds them."""
    n = 3000
    ids = [5] * n
    pack = pack_sequences([[text_part(ids, labels=[*ids[1:], -100])]])
    model.train()
    device = FakeDevice(device_type)
    device.place(model)
    with device.run():
        model(pack).mean().backward()
    probabilities = 4 * n * n * 4  # heads, pairs of rows, bytes of a float32
    assert (device.peak.total > probabilities) == (device_type == "cpu")


def test_config_files(folder, model, tmp_path):
    """Kept in both layouts; a file without it means the original's 0.1."""
    assert model.config.decoder.dropout == RATE
    other = Emu3(replace(model.config, decoder=replace(model.config.decoder, dropout=0.25)))
    other.tokenizer = model.tokenizer
    other.load_state_dict(model.state_dict())
    for layout in Emu3.LAYOUTS:
        other.save_pretrained(tmp_path / layout, layout=layout)
        assert Emu3.from_pretrained(tmp_path / layout).config == other.config
    written = json.loads((tmp_path / "original/config.json").read_text())
    assert written["attention_dropout"] == 0.25
    del written["attention_dropout"]
    (tmp_path / "original/config.json").write_text(json.dumps(written))
    assert Emu3.from_pretrained(tmp_path / "original").config.decoder.dropout == 0.1
    for wrong, message in ((1.0, "a dropout of 1.0.*below 1"), ("much", "attention_dropout 'much'")):
        change(tmp_path / "original/config.json", attention_dropout=wrong)
        with pytest.raises(ValueError, match=message):
            Emu3.from_pretrained(tmp_path / "original")
