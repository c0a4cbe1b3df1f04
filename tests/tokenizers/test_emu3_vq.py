"""Emu3's vision tokenizer: what is left out is equal, causality, ties, other factors of time, its stored case by parts."""

import pytest
import torch
from helpers.paths import GOLDEN
from safetensors.torch import load_file

from unimm.tokenizers.emu3_vq import Emu3VQConfig, Emu3VQModel, NearestCodeQuantizer

CASE = GOLDEN / "emu3" / "dev"


def small(**changes) -> Emu3VQModel:
    """A random tokenizer whose batch norms have statistics."""
    torch.manual_seed(0)
    numbers = dict(n_codes=40, width=32, channel_multipliers=(1, 2), n_res_blocks=1, attention_levels=(1,))
    model = Emu3VQModel(Emu3VQConfig(**{**numbers, **changes})).eval()
    for name, x in model.named_buffers():
        if name.endswith("running_mean"):
            x.normal_(std=0.1)
        elif name.endswith("running_var"):
            x.uniform_(0.5, 1.5)
    with torch.no_grad():
        # codes where the vectors are, so that images differ in them
        vectors = model.encode(torch.rand(2, 3, 16, 16) * 2 - 1).transpose(0, 1).flatten(1).T
        model.quantize.embedding.weight.copy_(vectors[:: len(vectors) // 40][:40])
    return model


@pytest.mark.parametrize("frames", [1, 2, 4, 8])
def test_an_image_is_a_video_of_equal_frames(frames):
    """Encoded once, decoded once: as the frames that a code stands for, all of them computed."""
    model = small(frames_per_latent=frames)
    image = torch.rand(2, 3, 8, 12) * 2 - 1
    with torch.inference_mode():
        ids = model.encode_ids(image)
        assert torch.equal(ids, model.encode_video_ids(image[:, None].repeat(1, frames, 1, 1, 1))[:, 0])
        first = model.decode_video(ids[:, None])[:, 0]
        assert (model.decode(ids) - first).abs().max() <= 1e-5 * first.abs().max()


def test_later_frames_change_nothing_before():
    model = small()
    video = torch.rand(1, 8, 3, 8, 8) * 2 - 1
    other = torch.cat((video[:, :4], -video[:, 4:]), 1)
    with torch.inference_mode():
        first, second = model.encode_video_ids(video), model.encode_video_ids(other)
        assert torch.equal(first[:, 0], second[:, 0]) and not torch.equal(first[:, 1], second[:, 1])
        a, b = model.decode_video(first), model.decode_video(second)
        assert (a[:, :4] - b[:, :4]).abs().max() <= 1e-5 * a.abs().max()


def test_the_lowest_of_equal_codes_and_any_number_of_rows(monkeypatch):
    quantize = NearestCodeQuantizer(6, 4)
    with torch.no_grad():
        quantize.embedding.weight[4] = quantize.embedding.weight[1]
    z = quantize.embedding.weight[[1, 4, 5, 0]].T[None, :, None].detach()
    assert quantize.nearest_ids(z).tolist() == [[1, 1, 5, 0]]
    many = torch.randn(2, 4, 9, 7)
    whole = quantize.nearest_ids(many)
    monkeypatch.setattr("unimm.tokenizers.emu3_vq.DISTANCE_ROWS", 10)
    assert torch.equal(quantize.nearest_ids(many), whole)


def test_lengths_count():
    """Unlike codes on a sphere: the nearest by direction is another for some of the stored vectors."""
    model = Emu3VQModel.from_pretrained(CASE / "vision_tokenizer")
    io = load_file(CASE / "io.safetensors")
    z = io["vq/quant_conv"][:, :, 0]
    codes = torch.nn.functional.normalize(model.quantize.embedding.weight, dim=1)
    directions = torch.einsum("b e h w, v e -> b h w v", torch.nn.functional.normalize(z, dim=1), codes).argmax(-1)
    assert torch.equal(model.encode_ids(io["vq/pixels"]), io["vq/codes"]) and not torch.equal(
        directions, io["vq/codes"]
    )


def test_gradients_pass_the_codebook_straight():
    model = small()
    z = torch.randn(1, 4, 2, 3, requires_grad=True)
    found = model.quantize(z)
    found.codes.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))
    assert float(found.codebook_loss.detach()) == pytest.approx(float(found.commitment_loss.detach()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(code_dim=8), "expected the same number"),
        (dict(frames_per_latent=6), "a power of 2"),
        (dict(attention_levels=(2,)), "expected levels, 0 to 1"),
        (dict(width=20), "a multiple of 32"),
        (dict(channel_multipliers=()), "one multiplier per level"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_bad_videos_are_refused():
    model = small()
    with pytest.raises(ValueError, match="5 frames: expected a multiple of 4"):
        model.encode_video_ids(torch.zeros(1, 5, 3, 8, 8))
    with pytest.raises(ValueError, match=r"expected \[B, T, 3, H, W\]"):
        model.encode_video_ids(torch.zeros(1, 3, 8, 8))
