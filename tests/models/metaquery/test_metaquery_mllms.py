"""The MLLMs of MetaQuery: the released names of each, LLaVA-OneVision's prompts, and a whole model around one."""

import json
import re
from dataclasses import replace

import pytest
import torch
from helpers import dc_ae_toys, llava_toys, sana_toys
from helpers import metaquery_toys as toys
from helpers.cases import manifest
from helpers.paths import GOLDEN
from PIL import Image

from unimm import MetaQuery
from unimm.checkpoint.keymap import Rename
from unimm.checkpoint.load import CheckpointError, check_keys
from unimm.generation.text_sampling import TextSampling
from unimm.models.metaquery.config import MetaQueryConfig
from unimm.models.metaquery.mllms import MLLMS
from unimm.models.metaquery.processor import LlavaSquareComposer
from unimm.training.init import train_tokenizer
from unimm.training.tasks.metaquery import init_sana
from unimm.vlms.llava_onevision.config import LlavaConfig
from unimm.vlms.llava_onevision.model import LlavaOneVision
from unimm.vlms.qwen2_5_vl.config import QwenVLConfig

QWEN = json.loads((GOLDEN / "blocks" / "qwen2p5vl" / "manifests.json").read_text())
NAMES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
# name -> the MLLM's config, its own files' names, tensors and parameters of the whole (the original's classes say the
# same)
RELEASED = {
    "metaquery_qwen3b_sana": ((2048, 36, 16, 2, 11008, 151936, True), "qwen2.5-vl-3b", 1936, 7_292_855_107),
    "metaquery_qwen7b_sana": ((3584, 28, 28, 4, 18944, 152064, False), "qwen2.5-vl-7b", 1840, 14_611_483_459),
    "metaquery_llavaov0p5_sana": (None, "metaquery_llavaov0p5_backbone", 1828, 3_126_431_331),
}
HOMES = dict.fromkeys(MetaQueryConfig.PART_CONFIGS, "a part")


def mllm_config(numbers) -> QwenVLConfig | LlavaConfig:
    if numbers is None:
        return LlavaConfig.from_json(llava_toys.RELEASED, {})
    text = dict(zip((*NAMES, "tie_word_embeddings"), numbers, strict=True))
    return QwenVLConfig.from_json(text | {"vision_config": {"hidden_size": 1280, "out_hidden_size": numbers[0]}}, {})


def shapes_of(name: str, inside: str) -> dict[str, tuple[int, ...]]:
    """A whole file's names and shapes: the MLLM's, but for its head; the denoiser's, the autoencoder's, and MetaQuery's
    own."""
    mllm = manifest(inside) if inside not in QWEN else {}
    for key, shape in QWEN.get(inside, {}).items():
        n = re.search(r"\{(\d+)\}", key)
        mllm |= {key.replace(n[0], str(i)) if n else key: tuple(shape) for i in range(int(n[1]) if n else 1)}
    mllm.pop("lm_head.weight", None)
    whole = {f"model.mllm_backbone.{key}": shape for key, shape in mllm.items()}
    whole |= {f"model.transformer.{key}": shape for key, shape in manifest("sana_1600m_512_transformer").items()}
    whole |= {f"vae.{key}": shape for key, shape in manifest("dcae_f32c32_sana").items()}
    return whole | manifest(name)


@pytest.mark.parametrize("name", RELEASED)
def test_manifests_fit_the_released_models(name):
    numbers, inside, tensors, parameters = RELEASED[name]
    shapes, mllm = shapes_of(name, inside), mllm_config(numbers)
    files = {"num_metaqueries": 256, "max_input_text_tokens": 256, "system_prompt": "", "input_size": 16}
    solver = {"flow_shift": 3.0, "num_train_timesteps": 1000}
    cfg = MetaQueryConfig.from_json(files, mllm, sana_toys.RELEASED, dc_ae_toys.RELEASED, solver, part_ids=HOMES)
    with torch.device("meta"):
        model = MetaQuery(cfg)
    model.match_checkpoint(shapes)
    state = model.state_dict()
    assert len(shapes) == tensors and sum(x.numel() for x in state.values()) == parameters
    ((_, table),) = model.key_maps().items()
    found = check_keys(shapes, table, state, "here")
    assert len(found) == tensors and {ours for one in found.values() for ours in one.our_names} == set(state)
    del shapes["model.connector.4.weight"]
    with pytest.raises(CheckpointError, match=r"missing keys: model\.connector\.4\.weight"):
        check_keys(shapes, table, state, "here")
    with pytest.raises(CheckpointError, match="for 256 queries .* num_metaqueries 64"), torch.device("meta"):
        MetaQuery(replace(cfg, n_queries=64)).match_checkpoint(shapes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A toy around an untrained LLaVA-OneVision, saved and loaded."""
    tokenizer = train_tokenizer(400, lines=1000, special_tokens=("<|im_start|>", "<|im_end|>", "<image>", "<video>"))
    ids = {"image_token_index": tokenizer.special_ids["<image>"], "video_token_index": tokenizer.special_ids["<video>"]}
    text = llava_toys.TEXT | dict(hidden_size=64, vocab_size=tokenizer.backend.vocab_size())
    text |= {"eos_token_id": tokenizer.special_ids["<|im_end|>"]}
    files = llava_toys.TOP | ids | {"text_config": text, "vision_config": llava_toys.VISION}
    mllm = LlavaConfig.from_json(files | {"tie_word_embeddings": True}, {})
    denoiser = sana_toys.FILES | {"in_channels": 4, "out_channels": 4, "sample_size": 4}
    config = {"num_metaqueries": 3, "max_input_text_tokens": 20, "system_prompt": "draw.", "input_size": 4}
    config |= {"connector_num_hidden_layers": 1}
    solver = {"flow_shift": 3.0, "num_train_timesteps": 1000}
    homes = HOMES | {"mllm_id": "llava-toy"}
    torch.manual_seed(0)
    made = MetaQuery(MetaQueryConfig.from_json(config, mllm, denoiser, toys.WIDTHS, solver, part_ids=homes))
    init_sana(made.denoiser)
    torch.nn.init.normal_(made.denoiser.out_proj.weight)
    made.init_queries()
    made.mllm.tokenizer = tokenizer
    folder = tmp_path_factory.mktemp("llava") / "saved"
    made.save_pretrained(folder)
    found = MetaQuery.from_pretrained(folder)
    assert all(torch.equal(x, found.state_dict()[name]) for name, x in made.state_dict().items())
    return found


def test_an_mllm_of_the_other_kind_generates_and_answers(model):
    input_images = [Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 50), "blue")]
    whole = model.generate(["a cube", "both"], images=[None, input_images], seed=[3, 4], steps=2)
    for i, (prompt, images) in enumerate((("a cube", None), ("both", input_images))):
        alone = model.generate(prompt, images=images, seed=3 + i, steps=2).image
        assert max(abs(a - b) for a, b in zip(alone.tobytes(), whole.images[i].tobytes(), strict=True)) <= 1
    assert isinstance(model.mllm, LlavaOneVision)
    brief = TextSampling(max_tokens=3)
    assert model.understand(input_images, "what?", text_sampling=brief) == model.mllm.understand(
        input_images, "what?", text_sampling=brief
    )


def test_llavas_prompt(model):
    prompts, letters = model.processor, llava_toys.Letters()
    spelt = replace(prompts, composer=LlavaSquareComposer(replace(prompts.composer.composer, tokenizer=letters)))
    (item,) = spelt.prompt_parts("a cube")
    ids = item.ids.tolist()
    names = {at: token for token, at in letters.special_ids.items()}
    text = "".join(names.get(one) or chr(one) for one in ids[: -len(prompts.query_ids)])
    assert text == "<|im_start|>system \ndraw.<|im_end|><|im_start|>user \na cube<|im_end|><|im_start|>assistant\n\n"
    first = prompts.begin_image_id
    assert ids[-len(prompts.query_ids) :] == [first, first + 2, first + 3, first + 4, first + 1, prompts.end_of_turn_id]
    # squares, each whole and in tiles, though there are several
    items = prompts.prompt_parts("a", [Image.new("RGB", (90, 30)), Image.new("RGB", (20, 20))])
    side = llava_toys.SIDE
    assert [item.n_tokens for item in items if item.kind == "und_image"] == [side**2 + side * (side + 1)] * 2


def test_every_kind_names_its_table_and_head():
    assert {name: kind.embedding_key(mllm_config(RELEASED[at][0])) for (name, kind), at in zip(
        MLLMS.items(), ("metaquery_qwen3b_sana", "metaquery_llavaov0p5_sana"), strict=True
    )} == {
        "qwen2_5_vl": "model.mllm_backbone.model.embed_tokens.weight",
        "llava_onevision": "model.mllm_backbone.language_model.model.embed_tokens.weight",
    }  # fmt: skip
    qwen = mllm_config(RELEASED["metaquery_qwen7b_sana"][0])
    kind = MLLMS["qwen2_5_vl"]
    assert kind.head_prefix(qwen) == "model.mllm_backbone.lm_head."
    assert Rename("model.mllm_backbone.lm_head.{}", "mllm.decoder.head.{}") in kind.key_map(qwen, with_head=True)
