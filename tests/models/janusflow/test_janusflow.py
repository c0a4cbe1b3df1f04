"""JanusFlow: the released names, the flow over a cached prompt, the verbs, and files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.paths import GOLDEN as STORE
from helpers.tolerance import assert_close
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import mse_loss
from transformers import LlamaConfig, LlamaForCausalLM

import unimm
from unimm import Janus, JanusFlow, JanusFlowConfig, TextSampling
from unimm.checkpoint.load import CheckpointError, check_keys
from unimm.checkpoint.save import released_state_dict
from unimm.kernels import attention
from unimm.models.common.deepseek_processor import IMAGE_PLACEHOLDER, JanusSpecialTokens
from unimm.models.janusflow import model as janusflow
from unimm.models.janusflow.config import EXPERT, SDXL_VAE
from unimm.models.janusflow.network import rows_before_images
from unimm.models.janusflow.processor import bos_unconditional
from unimm.models.janusflow.weights import KEY_MAP
from unimm.models.registry import family_class
from unimm.nn.patches import patchify
from unimm.nn.timestep import timestep_embedding
from unimm.processing.images.io import tensor_to_pil
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import text_part
from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig

GOLDEN = STORE / "janus"
LLM = dict(
    model_type="llama", hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80,
    vocab_size=96, max_position_embeddings=160, rope_theta=5000.0, rms_norm_eps=1e-5,
)  # fmt: skip
TOWER = dict(model_name="tiny", image_size=24, width=32, layers=2, heads=4, patch_size=8, mlp_ratio=3.0)
UVIT = dict(block_out_channels=[16], hidden_size=48, layers_in_middle=1, norm_eps=1e-5)
ENCODER = UVIT | dict(input_channels=3, kernel_size=4, stride=4, padding=0)
PAINTER = UVIT | dict(in_channels=24, out_channels=3, upsamples=2)
OWN_VAE = dict(ch=32, ch_mult=[1, 1], num_res_blocks=1, z_channels=3, scale_factor=0.5, shift_factor=0.25)
SIZE = (24, 24)  # 3 * 3 tokens of 4 * 4 latents of 2 * 2 pixels


class Words:
    """Every word has an id by its letters; special tokens have the last ones."""

    def __init__(self, vocab: int):
        tokens = [*JanusSpecialTokens.TOKENS.values(), IMAGE_PLACEHOLDER]
        self.special_ids = {token: vocab - len(tokens) + i for i, token in enumerate(tokens)}
        self.words = vocab - len(tokens)

    def encode(self, text: str) -> list[int]:
        return [sum(map(ord, word)) % self.words for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {i}" for i in ids)

    def token_id(self, token: str) -> int | None:
        return self.special_ids.get(token)

    def save(self, folder) -> None:
        pass


def toy(seed: int = 0, *, vae: bool = True, **llm) -> JanusFlow:
    """A random JanusFlow of two layers; the arguments change numbers of its language model."""
    torch.manual_seed(seed)
    parts = {"vision_und_enc": TOWER, "vision_gen_enc": ENCODER, "vision_gen_dec": PAINTER}
    files = {f"{name}_config": {"params": params} for name, params in parts.items()} | {"language_config": LLM | llm}
    model = JanusFlow(JanusFlowConfig.from_json(files | {"generation": {"steps": 3}}, {}, OWN_VAE if vae else {}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("decoder") and parameter.ndim == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)  # larger than usual, so that differences show
            if (
                "channelwise_norm" in name or name == "und_start_embed" or "pos_embed" in name
            ):  # zeros, or not yet anything
                parameter.normal_()
    model.tokenizer = Words(model.config.decoder.vocab_size)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return toy()


def picture(seed: int = 0) -> Image.Image:
    return tensor_to_pil(torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(seed)) * 2 - 1)


def plain(batch):
    return lambda layer, q, k, v: attention(q, k, v, batch.layout.mask)


def apart(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two images, of 255; 1 is rounding, which follows the size of a batch."""
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())


# ---- the release


def test_manifest_fits_the_released_model():
    manifest = {key: tuple(shape) for key, shape in json.loads((GOLDEN / "janusflow_1_3b.json").read_text()).items()}
    llm = dict(
        hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16, intermediate_size=5632
    )
    parts = {
        "vision_und_enc": {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_layer": -1},
        "vision_gen_enc": {
            "input_channels": 4,
            "kernel_size": 2,
            "stride": 2,
            "padding": None,
            "block_out_channels": [768],
        },
        "vision_gen_dec": {"in_channels": 768, "out_channels": 4, "upsamples": 1, "layers_in_middle": 2},
    }
    files = {f"{name}_config": {"params": params} for name, params in parts.items()}
    config = JanusFlowConfig.from_json(files | {"language_config": llm | {"vocab_size": 102400}}, {}, {})
    assert (config.latent_size, config.image_size, config.steps, config.guidance) == ((48, 48), (384, 384), 30, 2.0)
    with torch.device("meta"):
        state = JanusFlow(config).state_dict()
    assert {name for one in check_keys(manifest, KEY_MAP, state, "here").values() for name in one.our_names} == set(
        state
    )
    assert len(manifest) == 587
    assert sum(x.numel() for x in state.values()) == JanusFlow.RELEASES["deepseek-ai/JanusFlow-1.3B"].parameters
    without = {key: shape for key, shape in manifest.items() if key != "beg_of_und_embed"}
    with pytest.raises(CheckpointError, match="missing keys: beg_of_und_embed"):
        check_keys(without, KEY_MAP, state, "here")


# ---- the flow


def original(model: JanusFlow, ids: list[int], noise: torch.Tensor, *, steps: int, guidance: float) -> torch.Tensor:
    """The original's loop over transformers' Llama: nothing cached, everything masked, time upwards."""
    config = LlamaConfig(**LLM)
    llama = LlamaForCausalLM(config).eval()
    prefix = "language_model."
    state = released_state_dict(model, KEY_MAP)
    llama.load_state_dict({key[len(prefix) :]: x for key, x in state.items() if key.startswith(prefix)})
    tokens = torch.tensor([ids, ids])
    tokens[1, 1:] = model.special_tokens.pad
    mask = torch.ones(2, len(ids) - 1 + 10)
    mask[1, 1 : len(ids) - 1] = 0
    z = noise[None]
    for step in range(steps):
        grid, time = model.gen_encoder(torch.cat((z, z)), torch.full((2,), step / steps * 1000))
        rows = model.gen_encoder_aligner(grid.flatten(2).transpose(1, 2))
        x = torch.cat((llama.model.embed_tokens(tokens[:, :-1]), time[:, None], rows), 1)
        positions = torch.arange(x.shape[1])[None].expand(2, -1)
        hidden = llama.model(inputs_embeds=x, attention_mask=mask, position_ids=positions).last_hidden_state[:, -9:]
        made = model.gen_decoder_aligner(model.gen_decoder_norm(hidden)).transpose(1, 2).unflatten(2, (3, 3))
        v = model.gen_decoder(made, grid, time)
        z = z + (guidance * v[:1] - (guidance - 1) * v[1:]) / steps
    return z[0]


@torch.inference_mode()
def test_generation_is_the_original_loop(model):
    ids, noise = [model.special_tokens.bos, 5, 6, 7, model.special_tokens.boi], torch.randn(3, 12, 12)
    prompt = [text_part(ids[:-1])]
    for guidance in (1.0, 2.0, 0.0):
        ours = model.denoise([prompt], noise[None], guidance=[guidance], steps=3)[0]
        assert_close(ours, original(model, ids, noise, steps=3, guidance=guidance))


@torch.inference_mode()
def test_a_cached_prompt_is_a_recomputed_one(model):
    prompt, x = [text_part([model.special_tokens.bos, 5, 6, 7])], torch.randn(1, 3, 12, 12)
    ours = model.denoise([prompt], x, guidance=[2.0], steps=2)
    for time in (1.0, 0.5):
        entered, found = model.encode_latents(x, torch.tensor([time])), []
        for before_it in (prompt, bos_unconditional(prompt)):
            batch = pack_sequences([[*before_it, model.latent_part(x[0], 0, timestep=time)]])
            hidden = model.backbone(batch, plain(batch), entered)[EXPERT]
            found.append(model.decode_velocity(hidden[batch.gen_images.rows][None], entered))
        x = x - 0.5 * (found[1] + 2.0 * (found[0] - found[1]))
    assert_close(ours, x)


def test_time_is_converted_in_the_network(model):
    x = torch.randn(2, 3, 12, 12)
    entered = model.encode_latents(x, torch.tensor([1.0, 0.25]))
    assert_close(entered.time_embed, model.gen_encoder.time_embed(timestep_embedding(torch.tensor([0.0, 750.0]), 16)))
    hidden = torch.randn(2, 9, 48)
    made = (
        model.gen_decoder_aligner(model.gen_decoder_norm(model.decoder.norms[EXPERT](hidden)))
        .transpose(1, 2)
        .unflatten(2, (3, 3))
    )
    assert_close(model.decode_velocity(hidden, entered), -model.gen_decoder(made, entered.skip, entered.time_embed))


def test_times_rounded_as_in_bfloat16(model):
    times = []
    hook = model.gen_encoder.register_forward_pre_hook(lambda _, given: times.append(float(given[1][0])))
    prompt, noise = [text_part([1, 2])], torch.randn(1, 3, 12, 12)
    rounded = model.denoise([prompt], noise, guidance=[1.0], steps=30, bf16_time=True)
    hook.remove()
    assert times[:3] == [0.0, 33.25, 66.5] and len(times) == 30  # 33.333 and 66.667 to 8 bits
    assert not torch.equal(rounded, model.denoise([prompt], noise, guidance=[1.0], steps=30))
    # one step is a bfloat16's: 1/3 -> 0.333984375
    one = model.denoise([prompt], noise, guidance=[1.0], steps=1)
    assert torch.equal(one, model.denoise([prompt], noise, guidance=[1.0], steps=1, bf16_time=True))


@torch.inference_mode()
def test_looking_starts_with_its_own_row(model):
    pixels = torch.randn(2, 3, 24, 24)
    pictures = [model.processor.und_image_part(one, (3, 4)) for one in pixels]
    batch = pack_sequences([[text_part([1, 2]), *pictures, text_part([5])]])
    assert rows_before_images(batch.und_images).tolist() == [2, 13]
    x = model.embed(batch)
    seen = model.aligner(model.vision(pixels))
    words = model.decoder.embed(torch.arange(6))
    start = model.und_start_embed[0]
    assert_close(x, torch.stack((*words[1:3], start, *seen[0], words[4], start, *seen[1], words[4], words[5])))


# ---- training


def training_pack(model, latent: torch.Tensor, *, time: float):
    markers, word = model.special_tokens, [text_part([1, 2, 3], labels=[2, 3, -100])]
    asked = [text_part([markers.bos, 5, 6])]
    return pack_sequences([
        [*asked, model.latent_part(latent[0], markers.boi, timestep=time)],
        [text_part([4]), model.processor.und_image_part(torch.randn(3, 24, 24), (markers.boi, markers.eoi)), *word],
        [*bos_unconditional(asked), model.latent_part(latent[1], markers.boi, timestep=1 - time)],
    ])  # fmt: skip


def test_losses(model):
    latent, noise = torch.randn(2, 3, 12, 12), torch.randn(2, 3, 12, 12)
    batch = training_pack(model, latent, time=0.25)
    with torch.no_grad():
        losses = model(batch, torch.cat([patchify(one, 4) for one in noise]))
    assert losses.text.shape == (2,) and losses.mse.shape == (18, 48)
    # a sample alone, through the sampler's own velocity: one step of length 1 from where the noised latent stands
    for i, (time, prompt) in enumerate(((0.25, [4, 5]), (0.75, None))):
        x = ((1 - time) * latent[i] + time * noise[i])[None]
        entered = model.encode_latents(x, torch.tensor([time]))
        asked = [text_part([model.special_tokens.bos, 5, 6])]
        single = pack_sequences(
            [[*(asked if prompt else bos_unconditional(asked)), model.latent_part(x[0], 0, timestep=0.0)]]
        )
        hidden = model.backbone(single, plain(single), entered)[EXPERT][single.gen_images.rows][None]
        expected = mse_loss(model.decode_velocity(hidden, entered)[0], noise[i] - latent[i])
        assert losses.mse[9 * i : 9 * i + 9].mean().item() == pytest.approx(expected.item(), rel=1e-4)
    # texts alone
    words = model(pack_sequences([[text_part([1, 2, 3], labels=[2, 3, -100])]]), noise.new_zeros(0, 48))
    assert words.text.shape == (2,) and words.mse.shape == (0, 48)


def test_gradients_reach_every_parameter():
    model = toy(vae=False)
    losses = model(training_pack(model, torch.randn(2, 3, 12, 12), time=0.4), torch.randn(18, 48))
    (losses.text.mean() + losses.mse.mean()).backward()
    missed = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missed == [name for name in missed if "attn_pool" in name]


# ---- the verbs


@pytest.mark.parametrize("kv_heads", [2, 6])
def test_batch_equals_singles(kv_heads):
    model = toy(num_key_value_heads=kv_heads)
    prompts, scales = ["a red circle", "two", "four green triangles left of it"], [2.0, 1.0, 5.0]
    both = model.generate(prompts, seed=[3, 4, 3], guidance=scales)
    for prompt, seed, w, image in zip(prompts, (3, 4, 3), scales, both.images, strict=True):
        assert image.size == (24, 24)
        alone = model.generate(prompt, seed=seed, guidance=w).image
        assert apart(image, alone) <= 1
    assert apart(both.images[0], both.images[2]) > 1


@torch.inference_mode()
def test_images_at_different_timesteps_share_a_step(model):
    """A step of a batch whose images are at timesteps of their own equals a step of each image alone."""
    prompts = [model.processor.generation_parts(text) for text in ("a red circle", "two", "four green triangles")]
    scales, generator = [2.0, 1.0, 5.0], torch.Generator().manual_seed(0)
    x = torch.stack([model.initial_noise(generator) for _ in prompts])
    now, after = torch.tensor([1.0, 0.5, 0.75]), torch.tensor([0.75, 0.25, 0.25])
    together = model.denoise_step(model.latent_denoiser(prompts, guidance=scales), x, now, after)
    for i, prompt in enumerate(prompts):
        one = slice(i, i + 1)
        denoiser = model.latent_denoiser([prompt], guidance=scales[one])
        alone = model.denoise_step(denoiser, x[one], now[one], after[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)
        # the timesteps matter
        other = model.denoise_step(denoiser, x[one], now[one] - 0.125, after[one])
        assert (other - alone).abs().max() > 1e-3


@torch.inference_mode()
def test_denoise_is_a_loop_over_steps(model):
    prompts = [model.processor.generation_parts(text) for text in ("a red circle", "two")]
    noise = torch.stack([model.initial_noise(torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    x, denoiser = noise, model.latent_denoiser(prompts, guidance=[2.0, 1.0])
    for now, after in ((1.0, 0.5), (0.5, 0.0)):
        x = model.denoise_step(denoiser, x, torch.full((2,), now), torch.full((2,), after))
    assert torch.equal(x, model.denoise(prompts, noise, guidance=[2.0, 1.0], steps=2))


def test_seeds(model):
    four = model.generate(["a circle", "a circle"], n=2, seed=7).images
    assert len(four) == 4 and apart(four[0], four[1]) > 1
    assert max(apart(image, model.generate("a circle", seed=7 + i).image) for i, image in enumerate(four)) <= 1
    pairs = model.generate(["a circle", "two"], n=2, seed=[7, 7]).images
    assert apart(pairs[1], four[1]) <= 1 and apart(pairs[0], pairs[2]) > 1
    assert apart(model.generate("a circle", seed=7, steps=1).image, four[0]) > 1
    assert apart(model.generate("a circle", seed=7, images=picture()).image, four[0]) > 1


def test_answers(model):
    text = TextSampling(max_tokens=5)
    said = model.understand(picture(), "what is it?", text_sampling=text)
    assert said and said == model.understand(picture(), "what is it?", text_sampling=text)
    assert "".join(model.understand(picture(), "what is it?", text_sampling=text, stream=True)) == said
    others = model.understand(
        [picture(), None, [picture(1), picture()]], ["what is it?", "who?", "which?"], text_sampling=text
    )
    assert others[0] == said and len(others) == 3
    assert others[2] == model.understand([picture(1), picture()], "which?", text_sampling=text)


def test_bfloat16():
    model = toy().to(torch.bfloat16)
    model.vae.float()
    image = model.generate("a red circle", bf16_time=True).image
    assert (
        image.size == (24, 24)
        and model.understand(image, "what?", text_sampling=TextSampling(max_tokens=3)) is not None
    )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"size": (32, 24)}, ValueError, r"\(32, 24\): this model was trained for \(24, 24\) alone"),
        ({"steps": 0}, ValueError, "got steps 0"),
        ({"n": 0}, ValueError, "got n 0"),
        ({"guidance": -1.0}, ValueError, "guidances -1.0: expected scales of 0 or more"),
        ({"guidance": [1.0, 2.0]}, ValueError, "got 2 guidances for 1 prompts"),
        ({"seed": -1}, ValueError, "got seed -1"),
        ({"prompt": " "}, ValueError, "got an empty "),
        ({"prompt": []}, ValueError, "got no prompts"),
        ({"prompt": "w " * 200}, ValueError, "the model knows 160"),
    ],
)
def test_bad_input(model, options, error, words):
    with pytest.raises(error, match=words):
        model.generate(**{"prompt": "a circle"} | options)


def test_what_it_does_not_do(model):
    assert model.generate("a circle", size=SIZE).image.size == (24, 24)
    assert not model.supports_thinking and not hasattr(model, "interleave")
    with pytest.raises(NotImplementedError, match="JanusFlow has no think"):
        model.supported_options(think=True)


# ---- files


def test_round_trip(tmp_path, model):
    model.save_pretrained(tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "config.json", "preprocessor_config.json", "vae_config.json", "model.safetensors", "ae.safetensors",
    }  # fmt: skip
    loaded = unimm.load(tmp_path / "a")
    assert isinstance(loaded, JanusFlow) and loaded.config == model.config
    loaded.tokenizer = model.tokenizer
    assert loaded.generate("a circle", seed=1).image.tobytes() == model.generate("a circle", seed=1).image.tobytes()
    half = JanusFlow.from_pretrained(tmp_path / "a", dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and {p.dtype for p in half.vae.parameters()} == {torch.float32}


def test_released_files_are_written_back(tmp_path):
    model = JanusFlow.from_pretrained(GOLDEN / "flow_dev")
    assert model.vae is None and model.config.latent_size == (12, 12)
    model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / "ae.safetensors").exists()
    again = JanusFlow.from_pretrained(tmp_path / "a")
    assert again.config == model.config
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


def write_vae(folder: Path, **numbers) -> Path:
    config = AutoencoderKLConfig.from_json(OWN_VAE | numbers)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    save_file(AutoencoderKL(config).state_dict(), folder / "ae.safetensors")
    return folder


def test_an_autoencoder_from_elsewhere(tmp_path, model, monkeypatch):
    toy(vae=False).save_pretrained(tmp_path / "a")
    asked = []

    def resolve(name):
        asked.append(name)
        raise ValueError(f"cannot get {name!r}")

    plain = JanusFlow.from_pretrained(tmp_path / "a")
    plain.tokenizer = model.tokenizer
    with monkeypatch.context() as patch:
        patch.setattr(janusflow.hub, "resolve", resolve)
        with pytest.raises(ValueError, match="cannot get"):
            plain.generate("a circle", size=plain.config.image_size)
    assert asked == [SDXL_VAE] and plain.config.image_size == (96, 96)
    given = JanusFlow.from_pretrained(tmp_path / "a", components={"vae": write_vae(tmp_path / "vae")})
    assert given.vae is None, "not before it is needed"
    given.tokenizer = model.tokenizer
    before = set(given.state_dict())
    assert given.generate("a circle").image.size == (24, 24)
    # no part of the model, and no tensors of the inference mode that it was first needed in
    assert set(given.state_dict()) == before and not any(p.is_inference() for p in given.autoencoder.parameters())
    given.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / "ae.safetensors").exists()
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "no weights in"), (tmp_path / "nowhere" / "vae", "no folder")):
        with pytest.raises(ValueError, match=message):
            JanusFlow.from_pretrained(tmp_path / "a", components={"vae": path})
    wrong = JanusFlow.from_pretrained(tmp_path / "a", components={"vae": write_vae(tmp_path / "wide", z_channels=4)})
    with pytest.raises(ValueError, match="4 channels .*expected 3"):
        wrong.decode_latents(torch.zeros(1, 3, 12, 12))
    # one that is given goes before the folder's own
    model.save_pretrained(tmp_path / "own")
    replaced = JanusFlow.from_pretrained(tmp_path / "own", components={"vae": tmp_path / "vae"})
    assert replaced.vae is None and replaced.config.vae is None


def test_siblings_are_told_apart(tmp_path):
    assert family_class(GOLDEN / "flow_dev") is JanusFlow
    with pytest.raises(ValueError, match=r"holds a JanusFlow.*unimm\.JanusFlow"):
        Janus.from_pretrained(GOLDEN / "flow_dev")
    sibling = {"model_type": "multi_modality", "gen_vision_config": {}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(sibling))
    assert family_class(tmp_path) is Janus
    with pytest.raises(ValueError, match=r"holds a Janus: .*unimm\.Janus,"):
        JanusFlow.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="describes no JanusFlow"):
        JanusFlow.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("vision_gen_enc", {"hidden_size": 64}, "hidden_size 64, 48 .*expected 48"),
        ("vision_gen_enc", {"block_out_channels": [32]}, "expected the same width"),
        ("vision_gen_dec", {"upsamples": 1}, "gives back the size"),
    ],
)
def test_ends_that_do_not_fit(model, part, change, words):
    files = model.config.to_json()["config.json"]
    files[f"{part}_config"]["params"] |= change
    with pytest.raises(ValueError, match=words):
        JanusFlowConfig.from_json(files, {}, {})
