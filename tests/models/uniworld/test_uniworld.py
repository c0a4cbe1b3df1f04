"""UniWorld: files and manifests, one forward a request, batches, guidance, references, routing, bad input."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.cases import manifest
from helpers.qwen_manifests import expanded
from helpers.uniworld_toys import CASE, uniworld
from PIL import Image
from safetensors.torch import load_file, save_file

import unimm
from unimm import TextSampling, UniWorld, UniWorldConfig
from unimm.checkpoint import hub
from unimm.checkpoint.load import CheckpointError, check_keys
from unimm.denoisers.mmdit import patchify_latents
from unimm.generation.flow import flow_timesteps
from unimm.models.base import Generation
from unimm.models.uniworld.auxiliary_encoders import FLUX_HUB_ID, SIGLIP_HUB_ID
from unimm.models.uniworld.weights import uniworld_key_map
from unimm.sequence.packing import pack_sequences
from unimm.vlms.qwen2_5_vl.processor import IMAGE_PAD

FILES = json.loads((CASE / "config.json").read_text())
PROJECTORS = {"denoise": (3584, 12288, 4096), "siglip": (1152, 12288, 4096), "vae": (64, 3072, 4096)}


@pytest.fixture(scope="module")
def model():
    return uniworld()


def random_image(seed: int, width: int = 60, height: int = 50) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def apart(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two images, of 255."""
    assert a.size == b.size
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


# ---- files


def released() -> UniWorldConfig:
    """The config that the release has, with its widths."""
    text = dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
                intermediate_size=18944, rope_scaling={"type": "default", "mrope_section": [16, 24, 24]})  # fmt: skip
    denoiser = {"in_channels": 64, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19,
               "num_single_layers": 38, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
               "out_channels": None, "patch_size": 1}  # fmt: skip
    tower = {"denoiser_type": "flux", "denoiser_config": denoiser, "input_hidden_size": 3584, "output_hidden_size": 4096,
             "vae_input_hidden_size": 64, "denoise_projector_type": "mlp2x_gelu"}  # fmt: skip
    vision = {"hidden_size": 1280, "out_hidden_size": 3584}
    files = {"model_type": "univa_qwen2p5vl", **text, "vision_config": vision, "denoise_tower": tower,
             "shortcut_image_embeds": False, "shortcut_image_embeds_scale": 0.5}  # fmt: skip
    return UniWorldConfig.from_json(files, {}, task_head_shapes={"0.bias": (10240,)})


def test_manifest_fits_the_released_model():
    """Every released key meets a parameter of the same shape, every parameter a key; the head's file, too."""
    theirs = expanded("qwen2.5-vl-7b")
    theirs |= {
        f"denoise_tower.denoiser.{key}": shape for key, shape in manifest("flux1_dev_transformer_diffusers").items()
    }
    for name, (into, hidden, out) in PROJECTORS.items():
        for i, (rows, columns) in {0: (hidden, into), 2: (out, hidden)}.items():
            theirs |= {f"denoise_tower.{name}_projector.{i}.weight": (rows, columns),
                       f"denoise_tower.{name}_projector.{i}.bias": (rows,)}  # fmt: skip
    cfg = released()
    with torch.device("meta"):
        model = UniWorld(cfg)
    assert len(theirs) == 1901
    state = model.state_dict()
    ours = {name: x for name, x in state.items() if not name.startswith("task_head.")}
    assert sum(x.numel() for x in ours.values()) == 20_365_253_696
    found = check_keys(theirs, uniworld_key_map(cfg), ours, "here")
    assert {name for transform in found.values() for name in transform.our_names} == set(ours)
    head = {"0.weight": (10240, 3584), "0.bias": (10240,), "3.weight": (2, 10240), "3.bias": (2,)}
    (table,) = [table for names, table in model.key_maps().items() if names[0].startswith("task_head")]
    assert len(check_keys(head, table, {name: x for name, x in state.items() if name not in ours}, "here")) == 4
    assert cfg.mllm.image_processor.min_pixels == cfg.mllm.image_processor.max_pixels == 448 * 448
    assert UniWorldConfig.from_json(*cfg.to_json().values(), task_head_shapes={"0.bias": (10240,)}) == cfg
    del theirs["denoise_tower.vae_projector.2.bias"]
    with pytest.raises(CheckpointError, match=r"missing keys: denoise_tower\.vae_projector\.2\.bias"):
        check_keys(theirs, uniworld_key_map(cfg), ours, "here")


def test_round_trip(tmp_path, model):
    """Every part, its config and its tokenizer; what stays in float32 does."""
    model.save_pretrained(tmp_path / "whole")
    again = unimm.load(tmp_path / "whole")
    assert isinstance(again, UniWorld) and again.config == model.config
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(x, state[name]) for name, x in again.state_dict().items())
    request = ("draw a cat", [random_image(0)])
    assert (
        apart(model.generate(request[0], images=request[1]).image, again.generate(request[0], images=request[1]).image)
        == 0
    )
    model.save_pretrained(tmp_path / "half", dtype="bfloat16")
    half = UniWorld.from_pretrained(tmp_path / "half", dtype="bfloat16")
    kinds = {name: x.dtype for name, x in half.state_dict().items()}
    wide = {name for name, kind in kinds.items() if kind == torch.float32}
    assert wide == {name for name in kinds if name.startswith(("auxiliary.vae.", "task_head."))}
    assert half.generate("draw a cat", images=random_image(0), size=(64, 96)).image.size == (96, 64)
    assert UniWorld.from_pretrained(tmp_path / "whole", components={"t5": None}).auxiliary.t5 is None


def test_the_head_of_a_pickle(tmp_path, model):
    shutil.copytree(CASE, tmp_path / "case")
    (tmp_path / "case" / "task_head_final.safetensors").unlink()
    again = UniWorld.from_pretrained(tmp_path / "case")
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())
    (tmp_path / "case" / "task_head_final.pt").unlink()
    with pytest.raises(ValueError, match=r"without its task head: give from_pretrained a folder with task_head"):
        replaced(UniWorld.from_pretrained(tmp_path / "case"), model).respond("a cat")


def replaced(one: UniWorld, other: UniWorld) -> UniWorld:
    """A model with another's parts."""
    one.auxiliary = other.auxiliary
    return one


def test_parts_of_their_own(tmp_path, model, monkeypatch):
    """A hub id's parts come from the repositories that the original names, and of FLUX only the folders that are
    read."""
    downloads = []
    model.save_pretrained(tmp_path / "flux")
    shutil.copytree(CASE, tmp_path / "core", ignore=shutil.ignore_patterns("siglip"))
    homes = {
        "owner/uniworld": tmp_path / "core",
        SIGLIP_HUB_ID: tmp_path / "flux" / "siglip",
        FLUX_HUB_ID: tmp_path / "flux",
    }

    def download(name, revision, patterns, *, weights, subfolders, offline):
        downloads.append((name, subfolders))
        return homes[name]

    monkeypatch.setattr(hub, "_download", download)
    whole = UniWorld.from_pretrained("owner/uniworld", components={"t5": None})
    assert (FLUX_HUB_ID, ("vae", "text_encoder", "tokenizer")) in downloads and (SIGLIP_HUB_ID, ()) in downloads
    assert whole.auxiliary.siglip and whole.auxiliary.vae and whole.auxiliary.clip and not whole.auxiliary.t5
    downloads.clear()
    lone = UniWorld.from_pretrained(tmp_path / "core")
    assert not downloads and lone.auxiliary.siglip is None and lone.auxiliary.vae is None, (
        "a folder's components are below it, or given"
    )
    assert UniWorld.from_pretrained(tmp_path / "core", components={"flux": tmp_path / "flux"}).auxiliary.t5 is not None


def test_a_folder_without_the_part(tmp_path, model, monkeypatch):
    """One level too high, and single files as other tools keep them."""
    monkeypatch.setattr(hub, "_download", lambda *args, **options: pytest.fail("asked the hub"))
    model.save_pretrained(tmp_path / "whole")
    folder = tmp_path / "diffusion"
    (folder / "FLUX.1-dev" / "vae").mkdir(parents=True)
    for name in ("ae.safetensors", "clip_l.safetensors", "t5xxl_fp16.safetensors", "model.safetensors"):
        (folder / name).touch()
    for name, lacks in (("flux", "lacks vae, text_encoder, text_encoder_2"), ("siglip", "lacks config.json")):
        with pytest.raises(ValueError, match=f"{name} {folder}, which {lacks}"):
            UniWorld.from_pretrained(tmp_path / "whole", components={name: folder})
        with pytest.raises(ValueError, match=f"no folder {folder}x"):
            UniWorld.from_pretrained(tmp_path / "whole", components={name: folder.with_name("diffusionx")})
    shutil.rmtree(tmp_path / "whole" / "text_encoder_2")
    with pytest.raises(ValueError, match="which lacks text_encoder_2: "):
        UniWorld.from_pretrained(tmp_path / "whole", components={"flux": tmp_path / "whole"})
    shutil.rmtree(tmp_path / "whole" / "tokenizer_2")
    given = UniWorld.from_pretrained(tmp_path / "whole", components={"flux": tmp_path / "whole", "t5": None})
    assert given.auxiliary.vae is not None


def test_a_part_may_be_another_model_s(tmp_path, model):
    """As the bundled model's VAE is bagel-nano's, whose config is a section of a BAGEL's."""
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "vae").rename(tmp_path / "other")
    section = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bagel", "vae_config": section}))
    assert UniWorld.from_pretrained(tmp_path / "whole").auxiliary.vae is None
    path = tmp_path / "whole" / "config.json"
    files = json.loads(path.read_text())
    files["generation"]["parts"] = {"vae": str(tmp_path / "other")}
    path.write_text(json.dumps(files))
    again = UniWorld.from_pretrained(tmp_path / "whole")
    assert apart(again.generate("a cat").image, model.generate("a cat").image) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation": {"parts": {"sight": "here"}}}, "got parts sight: expected some of siglip, vae"),
        ({"model_type": "qwen2_5_vl"}, "describes no UniWorld"),
        ({"shortcut_image_embeds": True}, "got shortcut_image_embeds True"),
        ({"denoise_tower": FILES["denoise_tower"] | {"denoiser_type": "sd3"}}, "got denoise_tower.denoiser_type 'sd3'"),
        (
            {"denoise_tower": FILES["denoise_tower"] | {"input_hidden_size": 63}},
            "got denoise_tower.input_hidden_size 63",
        ),
        ({"generation": {"ratios": 12}}, "at most 11 ratios"),
        ({"generation": {"steps": 0}}, "got generation.steps 0 "),
    ],
)
def test_wrong_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        UniWorldConfig.from_json(FILES | changes, {})


def test_parts_of_other_widths_are_refused(tmp_path):
    shutil.copytree(CASE, tmp_path / "case")
    path = tmp_path / "case" / "model.safetensors"
    state = load_file(path)
    name = "denoise_tower.siglip_projector.0.weight"
    save_file(state | {name: torch.zeros(len(state[name]), 31)}, path)
    with pytest.raises(ValueError, match="got SigLIP2 of width 32, expected 31"):
        UniWorld.from_pretrained(tmp_path / "case")


# ---- conditions


def test_the_condition_has_the_features_before_the_end_of_their_image(model):
    images = [random_image(0), random_image(1, 40, 90)]
    items = model.processor.prompt_parts("the two", images)
    (output,) = model.encode_prompts([items])
    features = model.auxiliary.encode_siglip(images)
    (condition,) = model.condition([items], [output.hidden_states], features)
    ids = torch.cat(
        [torch.cat((one.ids, torch.full((one.n_tokens,), model.config.mllm.special_tokens.image_pad))) for one in items]
    )
    rows, projected, at = model.mllm_projector(output.hidden_states), model.siglip_projector(features), 0
    expected = []
    for i, one in enumerate(ids.tolist()):
        if one == model.config.mllm.special_tokens.vision_end:
            expected.append(projected[at])
            at += 1
        expected.append(rows[i : i + 1])
    assert at == 2 and torch.allclose(condition, torch.cat(expected), atol=1e-6)


def test_a_special_token_typed_by_a_user_is_text(model):
    plain, typed = (model.processor.prompt_parts(f"see {one}", [random_image(0)]) for one in ("this", "<|vision_end|>"))
    assert [one.kind for one in plain] == [one.kind for one in typed] == ["text", "und_image", "text"]
    assert model.config.mllm.special_tokens.vision_end not in typed[0].ids


def test_images_stand_behind_the_text_unless_it_has_placeholders(model):
    def places(prompt, prompts=model.processor):
        return [one.kind for one in prompts.prompt_parts(prompt, [random_image(0)])], prompts.prompt_parts(
            prompt, [random_image(0)]
        )

    kinds, behind = places("see this")
    placed = places(f"{IMAGE_PAD}see this")[1]
    assert kinds == ["text", "und_image", "text"] and len(behind[0].ids) > len(placed[0].ids)
    in_front = places("see this", replace(model.processor, images_first=True))[1]
    assert [one.ids.tolist() for one in in_front] == [one.ids.tolist() for one in placed]
    system = replace(model.processor, system_prompt="draw.").prompt_parts("a cat")
    assert len(system[0].ids) > len(model.processor.prompt_parts("a cat")[0].ids)


def test_one_pass_and_one_modulation(model, monkeypatch):
    """A request reads its prompt once, and what depends on the time alone is computed before the first step."""
    calls, modulated = [], []
    inner = model.mllm.decoder.forward
    monkeypatch.setattr(model.mllm.decoder, "forward", lambda x, *rest: calls.append(len(x)) or inner(x, *rest))
    block = model.denoiser.mmdit.double_blocks[0].image.modulation
    hook = block.register_forward_hook(lambda *_: modulated.append(1))
    model.generate("a small bird", images=random_image(0), steps=3, n=2)
    hook.remove()
    items = model.processor.prompt_parts("a small bird", [random_image(0)])
    assert calls == [sum(one.segment.length for one in items)] and modulated == [1]
    calls.clear()
    answer = routing(model, generates=False).respond("a small bird", text_sampling=TextSampling(max_tokens=3))
    routing(model, generates=True)
    read = sum(one.segment.length for one in model.processor.prompt_parts("a small bird"))
    assert isinstance(answer, str) and calls[0] == read and calls[1:] == [1] * len(calls[1:])


def routing(model: UniWorld, *, generates: bool) -> UniWorld:
    """The model with a task head that always decides the same."""
    torch.nn.init.zeros_(model.task_head.fc2.weight)
    model.task_head.fc2.bias.copy_(torch.tensor([0.0, 1.0] if generates else [1.0, 0.0]))
    return model


def test_the_task_head_routes(model):
    generated = routing(model, generates=True).respond("a bird", images=random_image(0), seed=3)
    assert (
        isinstance(generated, Generation)
        and apart(generated.image, model.generate("a bird", images=random_image(0), seed=3).image) == 0
    )
    sampling = TextSampling(max_tokens=5)
    answer = routing(model, generates=False).respond("a bird", images=random_image(0), text_sampling=sampling)
    message = {
        "role": "user",
        "content": "a bird" + IMAGE_PAD,
        "images": [model.config.mllm.image_processor(random_image(0))],
    }
    assert answer == model.chat([message], system="", text_sampling=sampling)
    torch.nn.init.zeros_(model.task_head.fc2.bias)
    assert isinstance(model.respond("a bird", text_sampling=sampling), str), "equal logits: it answers"


def test_the_shortcut_is_the_vision_encoder_s_output(model):
    items = model.processor.prompt_parts("see", [random_image(0)])
    (plain,), (half,), (whole,) = (model.encode_prompts([items], image_embeds_shortcut=f) for f in (0.0, 0.5, 1.0))
    first = items[0].segment.length + 1
    cells = slice(first, first + items[1].n_tokens)
    others = [i for i in range(len(plain.hidden_states)) if not cells.start <= i < cells.stop]
    assert torch.equal(plain.hidden_states[others], whole.hidden_states[others])
    batch = pack_sequences([items])
    assert torch.allclose(whole.hidden_states[cells], model.mllm.image_features(batch.und_images), atol=1e-6)
    assert torch.allclose(half.hidden_states, (plain.hidden_states + whole.hidden_states) / 2, atol=1e-6)


# ---- generation


def test_an_image_does_not_depend_on_its_batch(model):
    prompts = ["a cat", "make the much longer cube red, and then some", "both"]
    images = [None, random_image(0), [random_image(1, 40, 40), random_image(2, 90, 90)]]
    scales, free = [3.5, 1.0, 2.0], [1.0, 2.0, 1.0]
    together = model.generate(
        prompts, images=images, seed=[5, 7, 9], guidance=scales, true_cfg_scale=free, size=(64, 96)
    )
    for i, prompt in enumerate(prompts):
        alone = model.generate(
            prompt, images=images[i], seed=[5, 7, 9][i], guidance=scales[i], true_cfg_scale=free[i], size=(64, 96)
        )
        assert apart(together.images[i], alone.image) <= 1
    assert apart(together.images[0], together.images[1]) > 1


def test_several_images_a_prompt(model):
    four = model.generate(["a cat", "a dog"], n=2, seed=3).images
    for i, (prompt, seed) in enumerate((("a cat", 3), ("a cat", 4), ("a dog", 5), ("a dog", 6))):
        assert apart(four[i], model.generate(prompt, seed=seed).image) <= 1


@torch.inference_mode()
def test_true_cfg_leads_away_from_an_empty_condition(model):
    condition = [torch.randn(9, 40)]
    noise, pooled, times = torch.randn(1, 4, 8, 8), torch.zeros(1, 24), torch.tensor([1.0, 0.0])
    plain, empty, twice, none = (
        model.denoise(
            model.latent_denoiser(some, (8, 8), pooled=pooled, guidance=3.5, true_cfg_scale=scale), noise, times
        )
        for some, scale in (
            (condition, None),
            ([condition[0][:0]], None),
            (condition, torch.tensor([2.0])),
            (condition, torch.tensor([0.0])),
        )
    )
    assert torch.allclose(twice, 2 * plain - empty, atol=1e-4) and torch.allclose(none, empty, atol=1e-5)
    assert not torch.allclose(plain, empty, atol=1e-3)


@torch.inference_mode()
def test_images_of_different_progress_share_one_forward(model):
    """Each on a schedule of its own, and the second two steps later than the first: as each is alone."""
    generator = torch.Generator().manual_seed(0)
    noise, pooled = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, generator=generator)
    conditions = [torch.randn(n, 40, generator=generator) for n in (9, 5)]
    schedules = [flow_timesteps(4, 3.0), flow_timesteps(2, 1.0)]
    scales, free = torch.tensor([3.5, 2.0]), torch.tensor([1.0, 2.0])
    options = [
        dict(pooled=pooled[i : i + 1], guidance=scales[i : i + 1], true_cfg_scale=free[i : i + 1]) for i in (0, 1)
    ]
    alone = []
    for i, schedule in enumerate(schedules):
        denoiser = model.latent_denoiser(conditions[i : i + 1], (8, 8), schedule=schedule[:-1], **options[i])
        alone.append(patchify_latents(model.denoise(denoiser, noise[i : i + 1], schedule)))
    x = patchify_latents(noise)
    first = model.latent_denoiser(conditions[:1], (8, 8), **options[0])
    for t, t_next in pairwise(schedules[0][:3]):
        x[:1] = model.denoise_step(first, x[:1], t[None], t_next[None])
    both = model.latent_denoiser(conditions, (8, 8), pooled=pooled, guidance=scales, true_cfg_scale=free)
    for t, t_next in pairwise(torch.stack((schedules[0][2:], schedules[1]), 1)):
        x = model.denoise_step(both, x, t, t_next)
    torch.testing.assert_close(x, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_sizes(model):
    assert model.generate("a cat").image.size == (64, 64)
    assert model.generate("as wide", images=random_image(0, 60, 50)).image.size == (160, 128), (
        "5:4, in whole units of 32"
    )
    cfg = replace(model.config, image_pixels=1024 * 1024)
    model.config, kept = cfg, model.config
    assert model.output_size([random_image(0, 192, 108)]) == (864, 1536)
    assert (
        model.output_size([random_image(0, 100, 60), random_image(0, 60, 100)]) == model.output_size([]) == (1024, 1024)
    )
    model.config = kept


def test_references(model):
    images = [random_image(0, 64, 64)]
    plain, tokens, condition = (
        model.generate("a cat", images=images, reference_latents=how).image for how in (None, "tokens", "condition")
    )
    assert min(apart(plain, tokens), apart(plain, condition), apart(tokens, condition)) > 0
    both = model.generate(["a cat", "none"], images=[images, None], reference_latents="tokens", seed=[0, 1])
    assert apart(both.images[0], tokens) <= 1
    assert apart(both.images[1], model.generate("none", seed=1).image) <= 1, "without an image there is no reference"


@torch.inference_mode()
def test_reference_latents_in_the_condition_are_half_as_fine(model):
    latents = torch.randn(2, 4, 8, 12)
    condition = model.reference_condition(latents)
    assert condition.shape == (2 * 2 * 3, 40)
    # the second image's token at row 1, column 2: means of four latents each, channel by channel
    corners = [(c, 4 + 2 * y, 8 + 2 * x) for c in range(4) for y in (0, 1) for x in (0, 1)]
    means = torch.stack([latents[1, c, y : y + 2, x : x + 2].mean() for c, y, x in corners])
    assert torch.allclose(condition[-1], model.vae_projector(means), atol=1e-5)


def test_captions(model):
    whole, without = model.generate("a cat").image, model.generate("a cat", t5=False).image
    assert apart(whole, without) > 0
    wordless = uniworld(t5=False)
    assert apart(wordless.generate("a cat").image, without) == 0, "T5 is joined where it is"
    assert apart(model.generate("a cat", clip=False).image, whole) > 0


# ---- bad input


def test_parts_that_are_asked_for_and_absent():
    bare = uniworld(vae=False, clip=False, t5=False)
    remedy = r'give from_pretrained components=\{"flux": "black-forest-labs/FLUX\.1-dev"\}'
    with pytest.raises(ValueError, match=f"without its VAE: {remedy}"):
        bare.generate("a cat")
    bare.auxiliary.vae = uniworld().auxiliary.vae
    with pytest.raises(ValueError, match=r"without its text encoder \(CLIP\).*or generate with clip=False"):
        bare.generate("a cat")
    with pytest.raises(ValueError, match=r"without its second text encoder \(T5\)"):
        bare.generate("a cat", t5=True)
    assert bare.generate("a cat", clip=False).image.size == (64, 64)
    bare.auxiliary.siglip = None
    with pytest.raises(ValueError, match=r'without its SigLIP2: give from_pretrained components=\{"siglip": '):
        bare.generate("a cat", images=random_image(0), clip=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(prompt=" "), "got an empty prompt"),
        (dict(prompt=[]), "got no prompts"),
        (dict(prompt="a", size=(60, 64)), r"the nearest is \(64, 64\)"),
        (dict(prompt="a", steps=0), "got steps 0"),
        (dict(prompt="a", n=0), "got n 0"),
        (dict(prompt="a", guidance=-1.0), "scales of 0 or more"),
        (dict(prompt=["a", "b"], true_cfg_scale=[1.0]), "got 1 true CFG scales for 2 prompts"),
        (dict(prompt="a", reference_latents="latents"), "got reference_latents 'latents'"),
        (dict(prompt="a", image_embeds_shortcut=2.0), "got image_embeds_shortcut 2.0"),
        (dict(prompt="a", seed=-1), "got seed -1"),
        (dict(prompt=f"{IMAGE_PAD} here"), "for 0 images"),
        (dict(prompt="a", images="nowhere.png"), "no image at nowhere.png"),
    ],
)
def test_wrong_calls(model, call, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**call)


def test_what_the_family_lacks(model):
    assert not model.supports_thinking and not hasattr(model, "interleave")
    with pytest.raises(NotImplementedError, match="UniWorld has no think"):
        model.supported_options(think=True)
