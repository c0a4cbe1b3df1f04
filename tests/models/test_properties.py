"""What must hold of every BAGEL, whatever its weights."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.toys import picture, toy

from unimm import Guidance, TextSampling
from unimm.generation.kv_cache import KVCache
from unimm.kernels import attention, use_kernels
from unimm.models.bagel.cfg_contexts import CFGContexts
from unimm.nn.decoder import Decoder, DecoderConfig
from unimm.sequence.packing import pack_sequences
from unimm.training.tasks.bagel_plans import ImageForms, plan_answer, plan_edit, plan_text_to_image

SIZES = [
    dict(),
    dict(llm=dict(hidden_size=40, num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5, hidden_act="gelu")),
    dict(
        vit=dict(patch_size=4, image_size=64),
        top=dict(vit_max_num_patch_per_side=16, latent_patch_size=1, max_latent_size=16),
    ),
]


@pytest.fixture(params=range(len(SIZES)), scope="module")
def model(request):
    numbers = dict(SIZES[request.param])
    if "top" in numbers:  # latent patches of 1 halve the stride of an image
        numbers["top"] = numbers["top"] | dict(vit_transform=dict(max_image_size=48, min_image_size=16, image_stride=4))
    return toy(request.param, **numbers)


def test_two_experts_with_equal_weights_are_one():
    torch.manual_seed(0)
    cfg = DecoderConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, mlp_dim=48, vocab_size=11, max_positions=64, rope_theta=1e4, norm_eps=1e-6,
        act="silu", qkv_bias=True, qk_norm=True, experts=("one",),
    )  # fmt: skip
    one, two = Decoder(cfg), Decoder(dataclasses.replace(cfg, experts=("und", "gen")))
    for ours, theirs in zip(two.blocks, one.blocks, strict=True):
        for stream in ours.experts.values():
            stream.load_state_dict(theirs.experts["one"].state_dict())
    x = torch.randn(11, 32, requires_grad=True)
    mask = torch.ones(11, 11, dtype=torch.bool).tril()

    def attend(layer, q, k, v):
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(0, 1) for t in (q, k, v)), mask
        ).transpose(0, 1)

    rows = {"und": torch.tensor([0, 1, 2, 7, 8]), "gen": torch.tensor([3, 4, 5, 6, 9, 10])}
    a = one(x, torch.arange(11), {"one": torch.arange(11)}, attend)["one"]
    parts = two(x, torch.arange(11), rows, attend)
    b = torch.zeros(11, 32).index_copy(0, rows["und"], parts["und"]).index_copy(0, rows["gen"], parts["gen"])
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (a, b)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    # and every weight's gradient is the sum of what its tokens give
    (a.square().sum()).backward()
    (b.square().sum()).backward()
    for ours, theirs in zip(two.blocks, one.blocks, strict=True):
        for name, weight in theirs.experts["one"].named_parameters():
            both = sum(stream.get_parameter(name).grad for stream in ours.experts.values())
            torch.testing.assert_close(both, weight.grad, rtol=1e-4, atol=1e-4)


def samples(model):
    """One sample of every released plan, of different sizes."""
    items = model.processor
    z, s = model.config.vae.latent_channels, model.config.latent_patch_size

    def image_forms(h, w, seed):
        g = torch.Generator().manual_seed(seed)
        latent, pixels = torch.randn(z, h * s, w * s, generator=g), torch.rand(3, 16, 24, generator=g) * 2 - 1
        noised = items.latent_part(latent, timestep=0.3 + 0.1 * seed, noised=True)
        return ImageForms(vae=items.latent_part(latent), vit=items.vit_part(pixels), noised=noised)

    a, b, c = image_forms(2, 3, 1), image_forms(1, 2, 2), image_forms(3, 2, 3)
    plans = [
        plan_text_to_image(items.text_part([5, 6, 7]), a.noised),
        plan_edit(b, [(items.text_part([8, 9]), c), (items.text_part([3]), a)]),
        plan_answer([a.vit, c.vit], [items.text_part([4, 4]), items.answer_part([1, 2, 3]), items.answer_part([6])]),
    ]
    return [[part.part for part in plan] for plan in plans]


def losses(model, plans, seed=0):
    packed = pack_sequences(plans)
    tokens = sum(len(item.tokens) for plan in plans for item in plan if item.kind == "gen_image")
    noise = torch.randn(tokens, model.config.latent_dim, generator=torch.Generator().manual_seed(seed))
    return model(packed, noise), noise


def test_packed_equals_one_by_one(model):
    plans = samples(model)
    packed, noise = losses(model, plans)
    ce, mse, at = [], [], 0
    for plan in plans:
        n = sum(len(item.tokens) for item in plan if item.kind == "gen_image")
        alone = model(pack_sequences([plan]), noise[at : at + n])
        at += n
        ce.append(alone.ce)
        mse.append(alone.mse)
    torch.testing.assert_close(packed.ce, torch.cat(ce), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.mse, torch.cat(mse), rtol=1e-4, atol=1e-4)


def test_every_backend_gives_the_same_losses_and_gradients(model):
    found = []
    for name in ("reference", "sdpa"):
        with use_kernels(name):
            got, _ = losses(model, samples(model))
        grads = torch.autograd.grad(got.ce.sum() + got.mse.sum(), [model.decoder.embed.weight, model.vae2llm.weight])
        found.append((got.ce, got.mse, *grads))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item())


def test_every_parameter_learns(model):
    got, _ = losses(model, samples(model))
    model.zero_grad()
    (got.ce.mean() + got.mse.mean()).backward()
    trained = {name: p for name, p in model.named_parameters() if not name.startswith("vae.")}
    without = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    model.zero_grad()
    assert without == []


def test_cached_equals_uncached(model):
    """Contexts extended turn by turn hold the keys and values of one forward over all turns."""
    plan = samples(model)[2]
    (whole,) = model.prefill([KVCache()], [plan])
    context = KVCache()
    for item in plan:
        (context,) = model.prefill([context], [[item]])
    assert whole.next_position == context.next_position and whole.length == context.length
    torch.testing.assert_close(torch.cat(context.chunks, 2), whole.chunks[0], rtol=1e-4, atol=1e-4)


def test_decoding_equals_teacher_forcing(model):
    context = model.prefill([KVCache()], [[model.processor.text_part([3, 1, 2])]])[0]
    ids = [one[0] for one in model.decode_after([context], TextSampling(max_tokens=6), [0])]
    assert len(ids) == 6
    batch = pack_sequences([[model.processor.text_part([3, 1, 2]), model.processor.text_part(ids)]])
    with use_kernels("reference"), torch.inference_mode():
        hidden = model.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask))
    predicted = model.decoder.logits(hidden["und"]).argmax(-1)
    assert predicted[5 : 5 + len(ids)].tolist() == ids


def test_a_batch_equals_the_single_runs(model):
    prompts = ["red circle", "a much longer prompt of many words", "blue", "square"]
    images = [None, picture(30, 22), [picture(22, 30, 1), picture(40, 20, 2)], None]
    seeds = [3, 1, 4, 1]
    guidance = [
        Guidance(),
        Guidance(text_scale=1.0),
        Guidance(image_scale=2.0, renorm="text_channel", interval=(0.0, 1.0)),
        Guidance(text_scale=2.5, image_scale=1.0, renorm="channel", renorm_min=0.3),
    ]
    options = dict(steps=4)
    batch = model.generate(prompts, images=images, seed=seeds, guidance=guidance, **options)
    assert len({image.size for image in batch.images}) > 1
    for i, image in enumerate(batch.images):
        alone = model.generate(prompts[i], images=images[i], seed=seeds[i], guidance=guidance[i], **options).image
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(alone).astype(int))
        assert difference.max() <= 1, f"sample {i} depends on its neighbours"


def test_a_batch_of_answers_equals_the_single_ones(model):
    questions = ["how many", "a longer question about two pictures", "no picture"]
    images = [picture(), [picture(20, 44, 1), picture(16, 16, 2)], None]
    sampling = TextSampling(temperature=0.8, top_p=0.9, max_tokens=7)
    answers = model.understand(images, questions, text_sampling=sampling, seed=[5, 6, 7])
    for i, one in enumerate(answers):
        assert model.understand(images[i], questions[i], text_sampling=sampling, seed=5 + i) == one


def test_thinking_in_a_batch_equals_the_single_runs(model):
    batch = model.generate(["one", "two three"], think=True, seed=[1, 2])
    alone = model.generate("two three", think=True, seed=2)
    assert batch.texts[1] == alone.text
    assert np.abs(np.asarray(batch.images[1]).astype(int) - np.asarray(alone.image).astype(int)).max() <= 1


def latents(model, guidance, seed=0, prompt=(3, 4, 5)):
    contexts = model.append_text([CFGContexts()], [model.processor.text_part(list(prompt))])
    noise = model.initial_noise((24, 32), torch.Generator().manual_seed(seed))
    return model.denoise(contexts, [noise], [(24, 32)], guidance=[guidance], steps=5, timestep_shift=2.0)[0]


def test_guidance_one_equals_none(model):
    plain = latents(model, Guidance(text_scale=1.0, image_scale=1.0))
    torch.testing.assert_close(latents(model, Guidance(text_scale=1.0, image_scale=3.0)), plain, rtol=0, atol=0)
    torch.testing.assert_close(latents(model, Guidance(text_scale=4.0, interval=(1.0, 1.0))), plain, rtol=0, atol=0)
    # and the limit from above is the same image
    nearly = latents(model, Guidance(text_scale=1.0 + 1e-6, image_scale=1.0, renorm_min=1.0))
    torch.testing.assert_close(nearly, plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents(model, Guidance()), plain, rtol=1e-2, atol=1e-2)


@torch.inference_mode()
def test_equal_contexts_share_one_velocity(model):
    """The app's text 4, image 1.5 on a prompt without images costs two forwards and acts as text 1 + 1.5 (4 - 1)."""
    contexts = model.append_text([CFGContexts()], [model.processor.text_part([1, 2])])
    stride = model.config.latent_downsample
    denoiser = model.latent_denoiser(contexts, [(2 * stride, 2 * stride)], guidance=[Guidance()])
    x, timesteps = torch.randn(4, model.config.latent_dim), torch.tensor([0.5], dtype=torch.float64)
    branches = denoiser.branches(timesteps)
    assert branches == [(0, "full"), (0, "no_text"), (0, "no_image")]
    ran = []

    def run(due):
        ran.append(due)
        return model.denoiser_states(denoiser, x, timesteps, due)

    states = denoiser.states(branches, x, run)
    assert ran == [[(0, "full"), (0, "no_text")]]
    assert states[branches[0]] is states[branches[2]]
    three_branches = latents(model, Guidance(text_scale=4.0, image_scale=1.5, renorm_min=1.0))
    torch.testing.assert_close(
        three_branches, latents(model, Guidance(text_scale=5.5, image_scale=1.0, renorm_min=1.0)), rtol=1e-4, atol=1e-4
    )


@torch.inference_mode()
def test_images_of_different_progress_share_one_forward(model):
    """Each with its own timestep, its own guidance and its own size: every one as if it were alone."""
    contexts = model.append_text([CFGContexts()] * 2, model.text_parts(["one", "two three"]))
    stride = model.config.latent_downsample
    sizes = [(2 * stride, 3 * stride), (3 * stride, 2 * stride)]
    guidance = [Guidance(interval=(0.4, 1.0)), Guidance(text_scale=2.0, interval=(0.0, 1.0))]
    noises = [model.initial_noise(size, torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]
    now, then = (torch.tensor(values, dtype=torch.float64) for values in ([0.9, 0.3], [0.7, 0.2]))
    together = model.latent_denoiser(contexts, sizes, guidance=guidance)
    found = model.denoise_step(together, torch.cat(noises), now, then).split(together.n_tokens)
    for i in range(2):
        alone = model.latent_denoiser(contexts[i : i + 1], sizes[i : i + 1], guidance=guidance[i : i + 1])
        expected = model.denoise_step(alone, noises[i], now[i : i + 1], then[i : i + 1])
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-4)


def test_several_images_of_a_prompt(model):
    """In the order of the prompts, each from its own seed: the images of as many calls."""
    images = model.generate(["one", "two three"], images=[None, picture()], n=2, seed=[3, 8]).images
    assert len(images) == 4
    for i, (prompt, image, seed) in enumerate(
        [("one", None, 3), ("one", None, 4), ("two three", picture(), 8), ("two three", picture(), 9)]
    ):
        alone = model.generate(prompt, images=image, seed=seed).image
        assert np.abs(np.asarray(images[i]).astype(int) - np.asarray(alone).astype(int)).max() <= 1
    with pytest.raises(ValueError, match="got n 0"):
        model.generate("one", n=0)


def test_fork_does_not_copy_the_prefix(model):
    context = model.prefill([KVCache()], [[model.processor.text_part([1, 2, 3])]])[0]
    fork = context.fork()
    a, b = model.prefill([context, fork], [[model.processor.text_part([4])], [model.processor.text_part([5, 6])]])
    assert a.chunks[0].data_ptr() == b.chunks[0].data_ptr() == context.chunks[0].data_ptr()
    assert (context.length, a.length, b.length) == (5, 8, 9) and len(context.chunks) == 1


def test_contexts_of_guidance_are_those_of_the_original(model):
    text = [model.processor.text_part([n]) for n in range(3)]
    items, size = model.image_parts(picture(), noise=None, latents=True)
    prompted = model.append_text(model.append_text([CFGContexts()], [text[0]], system=True), [text[1]])[0]
    assert (
        prompted.no_text.length == 3 and prompted.full is prompted.no_image
    )  # T2I: text = system prompt only, image = full
    with_image = model.append_images([CFGContexts()], [[(items, size)]])
    edited = model.append_text(with_image, [text[2]])[0]
    rows = sum(item.segment.length for item in items)
    assert (edited.full.length, edited.no_text.length, edited.no_image.length) == (rows + 3, rows, 3)
    assert (edited.full.next_position, edited.no_text.next_position, edited.no_image.next_position) == (5, 2, 3)


def test_the_same_seed_gives_the_same_image():
    """On one thread and on two, whatever the global generator holds; compared here, since tests may run in other
    processes."""
    model, before, found = toy(0), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.manual_seed(threads)
            torch.set_num_threads(threads)
            found += [np.asarray(model.generate("a picture", seed=seed).image).astype(int) for seed in (7, 8)]
    finally:
        torch.set_num_threads(before)
    seven, eight, seven_again, eight_again = found
    assert np.abs(seven - seven_again).max() <= 1 and np.abs(eight - eight_again).max() <= 1
    assert np.abs(seven - eight).max() > 1


def going_on(model, *outputs: str, items=("a prompt",), seed: int = 0) -> list:
    """The pieces that follow, texts as they are and images as arrays."""
    pieces = model.interleave(
        list(items), outputs=outputs, text_sampling=TextSampling(max_tokens=3), steps=3, seed=seed
    )
    return [piece if isinstance(piece, str) else np.asarray(piece) for piece in pieces]


def test_interleave_gives_the_outputs_asked_for_and_the_same_each_time():
    model, items = toy(0), ("a prompt", picture(), "an instruction")
    pieces = going_on(model, "text", "image", "text", "image", items=items)
    assert [isinstance(piece, str) for piece in pieces] == [True, False, True, False]
    again = going_on(model, "text", "image", "text", "image", items=items)
    assert all(np.array_equal(one, other) for one, other in zip(pieces, again, strict=True))


def test_interleave_goes_on_with_what_it_made():
    """A second piece is the one that its seed gives after the first, and another than where the first is missing."""
    model = toy(0)
    # a text, then one after it: as if the first had been given
    first, second = going_on(model, "text", "text")
    assert going_on(model, "text", items=("a prompt", first)) == [second]
    assert second != first, "greedy: it would be the first again, had it not entered"
    # image i has the seed seed + i, and greedy texts from none: the second piece's seed is 1
    with_text, alone = going_on(model, "text", "image")[1], going_on(model, "image", seed=1)[0]
    assert np.array_equal(with_text, going_on(model, "image", items=("a prompt", first), seed=1)[0])
    assert not np.array_equal(with_text, alone) and not np.array_equal(going_on(model, "image", "image")[1], alone)
    after_one, after_another = (going_on(model, "image", "text", seed=seed)[1] for seed in (0, 1))
    assert len({first, after_one, after_another}) == 3, "a text depends on the image before it"


def test_streamed_pieces_are_the_answer():
    model = toy(0)
    sampling = TextSampling(max_tokens=9)
    whole = model.understand(picture(), "what is it", text_sampling=sampling)
    pieces = list(model.understand(picture(), "what is it", text_sampling=sampling, stream=True))
    assert len(pieces) > 1 and "".join(pieces) == whole
    stop = whole.split()[3]
    cut = model.understand(picture(), "what is it", text_sampling=dataclasses.replace(sampling, stop=(stop,)))
    assert cut == whole[: whole.index(stop)]
    streamed = model.understand(
        picture(), "what is it", text_sampling=dataclasses.replace(sampling, stop=(stop,)), stream=True
    )
    assert "".join(streamed) == cut


def test_bfloat16_is_near_float32():
    wide = toy(0)
    narrow = toy(0).to(torch.bfloat16)
    narrow.vae.float()
    a, b = (latents(m, Guidance()) for m in (wide, narrow))
    assert b.dtype == torch.float32
    assert (a - b).norm() / a.norm() < 0.1
    assert narrow.generate("a", steps=2).image.size == (32, 24)
    assert isinstance(narrow.understand(picture(), "what"), str)
    packed, _ = losses(narrow, samples(narrow))
    assert packed.ce.dtype == torch.float32 and torch.isfinite(packed.mse).all()


def test_frozen_parts_do_not_move():
    model = toy(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("vae", "vision", "decoder.blocks.0.experts.und")))
    got, _ = losses(model, samples(model))
    (got.ce.mean() + got.mse.mean()).backward()
    assert model.vision.patch_embed.weight.grad is None and model.decoder.blocks[0].experts["und"].q.weight.grad is None
    assert model.decoder.blocks[0].experts["gen"].q.weight.grad.any() and model.connector.fc1.weight.grad.any()
