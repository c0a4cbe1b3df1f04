"""Emu3 beside transformers' port of it, where the port is right: the same weights, through the files that we write."""

import pytest
import torch
from helpers.emu3_toys import emu3
from helpers.toys import picture, user
from transformers import Emu3ForConditionalGeneration

from unimm import Emu3, ImageTokenSampling
from unimm.kernels import attention
from unimm.sequence.packing import pack_sequences

PORTS = {
    "grouped heads": {},
    "all heads, theta, eps; three levels": dict(
        language=dict(num_key_value_heads=4, rope_theta=300.0, rms_norm_eps=1e-3),
        vision=dict(ch_mult=[2, 1, 2], attn_resolutions=[0, 2], num_res_blocks=2),
    ),
}


@pytest.fixture(scope="module", params=PORTS)
def both(request, tmp_path_factory) -> tuple[Emu3, Emu3ForConditionalGeneration]:
    """One set of weights here, and in transformers' port."""
    folder = tmp_path_factory.mktemp("port")
    toy = emu3(folder / "toy", 4, **PORTS[request.param])
    model = Emu3.from_pretrained(toy)
    model.save_pretrained(folder / "port", layout="transformers")
    port, how = Emu3ForConditionalGeneration.from_pretrained(folder / "port", output_loading_info=True)
    assert not any(how.values()), how
    return model, port.eval()


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    """The project's tolerance in float32: 1e-4 of the largest value."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.inference_mode()
def test_the_port_encodes_and_decodes_the_same(both):
    model, port = both
    stride = model.vision_tokenizer.config.stride
    image = torch.randn(2, 3, 4 * stride, 3 * stride).clamp(-1, 1)
    ids = model.vision_tokenizer.encode_ids(image)
    theirs = port.model.vqmodel.encode(image, torch.tensor([image.shape[2:]] * 2)).image_tokens
    assert torch.equal(ids, torch.stack(list(theirs)))
    assert_equal(model.vision_tokenizer.decode(ids), port.model.vqmodel.decode(ids))


@torch.inference_mode()
def test_the_port_reads_the_same(both):
    """Logits of a prompt with two images, whose codes stand in it as ids."""
    model, port = both
    parts = model.processor.conversation_parts([user("what differs?", picture(8, 12), picture(10, 10, 1))])
    batch = pack_sequences([parts])
    (hidden,) = model.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask)).values()
    assert_equal(model.decoder.logits(hidden)[None], port(input_ids=parts[0].ids[None]).logits)


@torch.inference_mode()
def test_the_port_generates_the_same(both):
    """Guided and constrained, by the processors of transformers' own generate."""
    model, port = both
    grid = (3, 4)
    prompt = model.processor.generation_parts("a cat", grid)
    negative = model.processor.negative_parts("bad", grid)
    special = model.config.special_tokens

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        n = len(ids) - int((ids == special.img).nonzero()[-1])
        h, w = grid
        if n == (w + 1) * h + 1:
            return [special.eof]
        if n % (w + 1) == 0:
            return [special.eol]
        return list(range(special.code0, special.code0 + model.config.n_codes))

    ids = prompt[0].ids[None]
    n = grid[0] * (grid[1] + 1)
    found = port.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, guidance_scale=3.0, max_new_tokens=n,
        negative_prompt_ids=negative[0].ids[None], negative_prompt_attention_mask=torch.ones_like(negative[0].ids[None]),
        prefix_allowed_tokens_fn=allowed, eos_token_id=None, pad_token_id=special.pad,
    )  # fmt: skip
    (codes,) = model.generate_image_tokens(
        [prompt], [torch.Generator()], guidance=[3.0], negative_prompts=[negative], grids=[grid],
        image_sampling=ImageTokenSampling(temperature=0.0),
    )  # fmt: skip
    assert found[0, ids.shape[1] :].tolist() == model.processor.image_ids(codes)[:n]
