"""MetaQuery: batches equal single runs, guidance, seeds, sizes, the frozen MLLM, files, both MLLMs, and bad input."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import metaquery_toys as toys
from PIL import Image
from safetensors.torch import load_file, save_file

from unimm import MetaQuery, load
from unimm.checkpoint.load import CheckpointError
from unimm.generation.flow import dpm_timesteps
from unimm.generation.text_sampling import TextSampling
from unimm.models.metaquery.config import MetaQueryConfig
from unimm.models.metaquery.processor import ConditionBatch, black_image
from unimm.vlms.qwen2_5_vl.model import QwenVL

BRIEF = TextSampling(max_tokens=4)


@pytest.fixture(scope="module")
def model():
    found = MetaQuery.from_pretrained(toys.GOLDEN)
    found.config = replace(found.config, min_pixels=3136, max_pixels=23520)
    return found


@pytest.fixture(scope="module")
def input_images():
    dice = np.random.default_rng(0)
    return [Image.fromarray(dice.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((60, 60), (70, 95), (30, 56))]


def levels(generated) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in generated.images])


def assert_same(a, b):
    """Images are equal up to a rounding of their levels."""
    assert np.abs(levels(a) - levels(b)).max() <= 1


# ---- batches


def test_a_batch_with_images_and_copies_equals_its_single_runs(model, input_images):
    """The original fails with two prompts and images, and pairs copies with another prompt's images."""
    prompts = ["a red cube", "make it blue", "both", ""]
    images = [None, input_images[0], input_images[1:], [input_images[2]]]
    options = dict(steps=2, guidance=[3.0, 4.5, 1.0, 2.0], image_guidance=[1.5, 2.0, 1.0, 3.0])
    whole = model.generate(prompts, images=images, n=2, seed=[5, 9, 40, 7], **options)
    assert len(whole.images) == 8
    for i, (prompt, given, seed) in enumerate(zip(prompts, images, (5, 9, 40, 7), strict=True)):
        for copy in range(2):
            scales = {name: options[name][i] for name in ("guidance", "image_guidance")}
            alone = model.generate(prompt, images=given, seed=seed + copy, steps=2, **scales)
            assert np.abs(levels(alone)[0] - levels(whole)[2 * i + copy]).max() <= 1


def test_seeds_count_up_image_by_image(model):
    generated = model.generate(["a", "b"], n=2, seed=3, steps=1)
    again = model.generate(["a", "a", "b", "b"], seed=[3, 4, 5, 6], steps=1)
    assert_same(generated, again)
    assert np.abs(levels(generated)[0] - levels(generated)[1]).max() > 1


def test_sizes(model):
    generated = model.generate("a", size=(32, 96), steps=1)
    assert generated.image.size == (96, 32) and model.generate("a", steps=1).image.size == (128, 128)


# ---- guidance


def velocities(model, *, guidance: float, image_guidance: float, images=()):
    """The guided velocity, and those under each of the three conditions."""
    batch = ConditionBatch(model.processor)
    branches = [
        batch.guidance_branches(
            "a cube", images, negative_prompt="dark", guidance=guidance, image_guidance=image_guidance
        )
    ]
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        denoiser = model.latent_denoiser(model.condition(model.query_states(batch.samples)), branches)
        combined = model.guided_velocity(x, torch.tensor([0.5]), denoiser.branches)
        parts = [("dark", [black_image(one) for one in images]), ("dark", images), ("a cube", images)]
        apart = model.condition(model.query_states([model.processor.prompt_parts(*part) for part in parts]))
        u, i, c = model.denoiser(x.expand(3, -1, -1, -1), torch.full((3,), 0.5), apart).split(1)
    return combined, u, i, c, len(batch.samples)


def test_guidance_of_texts_and_images(model, input_images):
    v, u, i, c, n = velocities(model, guidance=4.5, image_guidance=1.5)
    assert n == 2 and torch.allclose(v, u + 4.5 * (c - u), atol=1e-4)
    v, u, i, c, n = velocities(model, guidance=4.5, image_guidance=1.5, images=input_images[:1])
    assert n == 3 and torch.allclose(v, u + 1.5 * (i - u) + 4.5 * (c - i), atol=1e-4)
    v, u, i, c, n = velocities(model, guidance=4.5, image_guidance=1.0, images=input_images[:1])
    assert n == 2 and torch.allclose(v, i + 4.5 * (c - i), atol=1e-4)
    v, u, i, c, n = velocities(model, guidance=1.0, image_guidance=1.0, images=input_images[:1])
    assert n == 1 and torch.allclose(v, c, atol=1e-5)


def test_equal_prompts_run_once(model, input_images):
    batch = ConditionBatch(model.processor)
    for caption, given in (("a", []), ("b", []), ("a", []), ("a", input_images[:1]), ("b", input_images[:1])):
        batch.guidance_branches(caption, given, negative_prompt="", guidance=3.0, image_guidance=2.0)
    # a, b, and no text; then a black image without text, the image without text, and with a and b
    assert len(batch.samples) == 3 + 4
    run_lengths = []
    hook = model.decoder.blocks[0].register_forward_hook(lambda block, args, out: run_lengths.append(len(out["all"])))
    model.generate(["a red cube", "a red cube", "two"], n=2, steps=2)
    hook.remove()
    n_system = len(model.processor.system_ids)
    rest = [
        sum(i.segment.length for i in model.processor.prompt_parts(text)) - n_system
        for text in ("", "a red cube", "two")
    ]
    assert run_lengths == [n_system, sum(rest)]  # the system turn once, then each prompt once, whatever the steps


def test_images_of_different_progress_share_one_forward(model, input_images):
    """Each on a schedule of its own, and the second three steps later than the first: as each is alone."""
    batch = ConditionBatch(model.processor)
    options = dict(negative_prompt="dark", guidance=3.0, image_guidance=1.5)
    branches = [batch.guidance_branches("a cube", given, **options) for given in ([], input_images[:1])]
    condition = model.condition(model.query_states(batch.samples))
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    schedules = [dpm_timesteps(6, shift=3.0), dpm_timesteps(3, shift=1.0)]
    alone = []
    for one, x, schedule in zip(branches, noise.split(1), schedules, strict=True):
        denoiser = model.latent_denoiser(condition, [one])
        for t, t_next in pairwise(schedule):
            x = model.denoise_step(denoiser, x, t[None], t_next[None])
        alone.append(x)
    first, x = model.latent_denoiser(condition, branches[:1]), noise[:1]
    for t, t_next in pairwise(schedules[0][:4]):
        x = model.denoise_step(first, x, t[None], t_next[None])
    both, x = model.latent_denoiser(condition, branches), torch.cat((x, noise[1:]))
    both.solver.last_data = torch.cat((first.solver.last_data, noise[1:]))
    both.solver.last_h = [*first.solver.last_h, float("inf")]
    for t, t_next in pairwise(torch.stack((schedules[0][3:], schedules[1]), 1)):
        x = model.denoise_step(both, x, t, t_next)
    torch.testing.assert_close(x, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_the_condition_is_computed_once_an_image(model):
    calls = []
    hooks = [
        part.register_forward_hook(lambda *_: calls.append(1))
        for part in (model.connector, model.denoiser.caption_proj)
    ]
    model.generate("a", steps=4)
    for hook in hooks:
        hook.remove()
    assert len(calls) == 2


def test_bfloat16(model, input_images):
    """Eight bits of each weight: a fifth as far from the exact image as another seed's is, at most."""
    half = MetaQuery.from_pretrained(toys.GOLDEN, dtype="bfloat16")
    half.config = model.config
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    named = {"images": input_images[0], "steps": 1}
    generated, exact = (one.generate("make it blue", seed=2, **named) for one in (half, model))
    other = model.generate("make it blue", seed=3, **named)
    assert np.abs(levels(generated) - levels(exact)).mean() < 0.2 * np.abs(levels(other) - levels(exact)).mean()


# ---- prompts


def test_a_caption_is_cut_and_its_markers_are_words(model):
    long = model.processor.prompt_parts("two small birds sit on a wire")
    assert torch.equal(long[0].ids, model.processor.prompt_parts("two small bi")[0].ids)
    begin = model.processor.begin_image_id
    typed = model.processor.prompt_parts("<|im_end|>")[0].ids.tolist()
    assert (
        typed.count(model.processor.end_of_turn_id) == 3
        and sum(one >= begin for one in typed) == model.config.n_queries + 2
    )


# ---- the MLLM


@pytest.fixture
def tied(tmp_path):
    """A toy around an MLLM with a tied head; and that MLLM."""
    from helpers.metaquery_training_toys import DENOISER

    from unimm.training.tasks.bagel import train_tokenizer
    from unimm.training.tasks.metaquery import MetaQueryTrainingConfig, init_metaquery

    words = train_tokenizer(400, lines=2000, special_tokens=toys.SPECIAL_TOKENS)
    mllm, dcae = toys.save_mllm(tmp_path / "mllm", words), toys.save_dcae(tmp_path / "dcae")
    config = dict(mllm_id="parts/Qwen2.5-VL-toy", diffusion_model_id="Sana-toy", num_metaqueries=3, max_input_text_tokens=20,
                  connector_num_hidden_layers=1, system_prompt="draw.", input_size=4)  # fmt: skip
    config["generation"] = dict(min_pixels=256, max_pixels=4096, steps=2)
    options = MetaQueryTrainingConfig(
        tasks={"draw.one": 1},
        timesteps_per_image=1,
        dropout=0.1,
        novel_colours=0,
        novel_shapes=0,
        mllm=str(mllm),
        dcae=str(dcae),
        denoiser="",
        mllm_dtype="float32",
        frozen=(),
        compile=False,
    )
    numbers = {"config": config, "denoiser": DENOISER, "scheduler": {"flow_shift": 3.0, "num_train_timesteps": 1000}}
    torch.manual_seed(0)
    found = init_metaquery(options, numbers).eval()
    torch.nn.init.normal_(found.denoiser.out_proj.weight)
    return found, QwenVL.from_pretrained(mllm)


def test_it_answers_exactly_as_the_frozen_mllm(tied, tmp_path, input_images):
    model, mllm = tied
    model.save_pretrained(tmp_path / "saved")
    ours = MetaQuery.from_pretrained(tmp_path / "saved")
    for name, x in mllm.state_dict().items():
        assert torch.equal(ours.mllm.state_dict()[name], x)
    for options in ({}, {"seed": 3, "text_sampling": TextSampling(temperature=1.0, max_tokens=6)}):
        arguments = {"text_sampling": BRIEF} | options
        assert ours.understand(input_images, "what?", **arguments) == mllm.understand(
            input_images, "what?", **arguments
        )
    assert "".join(ours.understand(input_images[0], "what?", stream=True, text_sampling=BRIEF)) == mllm.understand(
        input_images[0], "what?", text_sampling=BRIEF
    )
    talk = [{"role": "user", "content": "hello"}]
    assert ours.chat(talk, system="be brief", text_sampling=BRIEF) == mllm.chat(
        talk, system="be brief", text_sampling=BRIEF
    )


def test_a_missing_head_is_loaded_from_the_mllm_s_release(model, tmp_path, input_images):
    with pytest.raises(ValueError, match=r"hold no language head, and Qwen2.5-VL-tiny has none to give"):
        model.understand(None, "what?")
    with torch.device("meta"):
        shapes = QwenVL(model.config.mllm).state_dict()
    torch.manual_seed(2)
    mllm = QwenVL(model.config.mllm)
    mllm.tokenizer = model.mllm.tokenizer
    assert set(shapes) == set(mllm.state_dict())
    # its blocks and vision encoder are the checkpoint's, its embedding table decayed there since, by AdamW's weight
    # decay
    state = {name: x for name, x in model.mllm.state_dict().items() if "decoder.embed" not in name}
    mllm.load_state_dict(state, strict=False)
    mllm.save_pretrained(tmp_path / "mllm")
    ours = MetaQuery.from_pretrained(toys.GOLDEN, components={"mllm": tmp_path / "mllm"})
    assert ours.understand(input_images[:1], "what?", text_sampling=BRIEF) == mllm.understand(
        input_images[:1], "what?", text_sampling=BRIEF
    )
    assert_same(ours.generate("a", steps=1), model.generate("a", steps=1))


# ---- files


def test_saved_files_are_the_released_ones(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    was, now = (load_file(folder / "model.safetensors") for folder in (toys.GOLDEN, tmp_path / "saved"))
    assert was.keys() == now.keys() and all(torch.equal(was[key], now[key]) for key in was)
    for path in (tmp_path / "saved").rglob("*.json"):
        released = json.loads((toys.GOLDEN / path.relative_to(tmp_path / "saved")).read_text())
        written = json.loads(path.read_text())
        shared = written.keys() & released.keys() - {"modules_to_freeze", "vision_config", "rope_scaling"}
        assert {key: written[key] for key in shared} == {key: released[key] for key in shared}
    again = load(tmp_path / "saved")
    assert isinstance(again, MetaQuery) and replace(again.config, min_pixels=3136, max_pixels=23520) == model.config
    model.save_pretrained(tmp_path / "saved")  # over what is there
    assert_same(again.generate("a", steps=1), model.generate("a", steps=1))


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(toys.GOLDEN, tmp_path / "case")
    return tmp_path / "case"


def changed(folder: Path, name: str = "config.json", **changes) -> Path:
    files = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(files))
    return folder


def test_another_number_of_queries_fails_with_the_numbers(folder):
    """The original starts such queries anew without a word."""
    with pytest.raises(
        CheckpointError, match=r"has 296 rows, for 6 queries behind 288 ids.* num_metaqueries 5, 295 rows"
    ):
        MetaQuery.from_pretrained(changed(folder, num_metaqueries=5))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss_type": "diff"}, "variants on Stable Diffusion 1.5 are not built"),
        ({"diffusion_model_id": "stable-diffusion-v1-5/stable-diffusion-v1-5"}, "variants on Stable Diffusion 1.5"),
        ({"model_type": "other"}, "describes no MetaQuery: got model_type 'other'"),
        ({"mllm_id": "nowhere"}, "no model 'nowhere'"),
        ({"in_channels": 16}, "got in_channels 16, expected 4"),
        ({"connector_num_hidden_layers": 2}, "unexpected keys: model.connector.0.layers.2"),
        ({"num_metaqueries": 0}, "got num_metaqueries 0 .*a positive whole number"),
    ],
)
def test_configs_that_do_not_fit(folder, changes, match):
    with pytest.raises(ValueError, match=match):
        MetaQuery.from_pretrained(changed(folder, **changes))


def test_parts_that_do_not_fit(folder):
    with pytest.raises(ValueError, match="expected 'DPMSolverMultistepScheduler'"):
        MetaQuery.from_pretrained(changed(folder, "Sana-tiny/scheduler/scheduler_config.json", _class_name="Other"))
    shutil.copytree(toys.GOLDEN, folder, dirs_exist_ok=True)
    scheduler = folder / "Sana-tiny/scheduler/scheduler_config.json"
    released = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({key: value for key, value in released.items() if key != "prediction_type"}))
    with pytest.raises(ValueError, match="the scheduler's config lacks prediction_type"):
        MetaQuery.from_pretrained(folder)
    shutil.copytree(toys.GOLDEN, folder, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="MLLM of model_type 'llama': expected qwen2_5_vl or llava_onevision"):
        MetaQuery.from_pretrained(changed(folder, "Qwen2.5-VL-tiny/config.json", model_type="llama"))


def test_no_file_is_written_outside_the_folder(model, folder, tmp_path):
    shutil.copytree(folder / "Qwen2.5-VL-tiny", folder / "mllm")
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors")
    far = MetaQuery.from_pretrained(changed(folder, mllm_id="/elsewhere/../mllm"))
    far.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "mllm" / "config.json").exists()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["mllm_id"] == "mllm"


@pytest.mark.parametrize("key", MetaQueryConfig.PART_CONFIGS)
@pytest.mark.parametrize("name", ["..", ".", "", "/", "../..", "Sana-tiny/..", "/elsewhere/..", "./."])
def test_a_part_that_is_no_folder_of_its_own(model, folder, tmp_path, key, name):
    # the configs that a reader of such a path would find
    for part in ("Qwen2.5-VL-tiny", "Sana-tiny"):
        for place in (folder, tmp_path):
            shutil.copytree(toys.GOLDEN / part, place, dirs_exist_ok=True)
    shutil.copy(toys.GOLDEN / "config.json", folder)
    with pytest.raises(ValueError, match="got a part named .* in config.json: expected a folder below"):
        MetaQuery.from_pretrained(changed(folder, **{key: name}))
    # nor does a model that was built with such a name write above the folder it is told
    config = replace(model.config, part_ids={**model.config.part_ids, key: name})
    with pytest.raises(ValueError, match="got a part named .* in config.json: expected a folder below"):
        config.to_json()


# ---- bad input


@pytest.mark.parametrize(
    ("prompt", "options", "match"),
    [
        ("", {}, "empty prompt"),
        ([], {}, "no prompts"),
        (["a", " "], {}, "empty prompt"),
        ("a", {"n": 0}, "got n 0"),
        ("a", {"guidance": -1.0}, "scales of 0 or more"),
        ("a", {"guidance": [1.0, 2.0]}, "got 2 guidances for 1 prompts"),
        ("a", {"seed": -1}, "got seed -1"),
        ("a", {"steps": 0}, "got steps 0"),
        ("a", {"size": (33, 64)}, r"multiples of 32 up to 4096; the nearest is \(32, 64\)"),
        ("a", {"images": "/no/such.png"}, "no image at"),
        (["a", "b"], {"images": ["x"]}, "images for 2 prompts: expected a list of 2"),
    ],
)
def test_bad_input(model, prompt, options, match):
    with pytest.raises(ValueError, match=match):
        model.generate(prompt, **options)


def test_what_the_family_lacks(model):
    assert not model.supports_thinking and not hasattr(model, "interleave")
    with pytest.raises(NotImplementedError, match="MetaQuery has no think"):
        model.supported_options(think=True)
    assert model.supported_options(steps=3) == {"steps": 3}


def test_no_tokenizer(folder):
    for name in ("vocab.json", "merges.txt"):
        (folder / "Qwen2.5-VL-tiny" / name).unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        MetaQuery.from_pretrained(folder).generate("a")
