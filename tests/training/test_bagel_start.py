"""A BAGEL put together of a language model, a ViT and a VAE: what each parameter begins as."""

import json
import random

import pytest
import torch
from helpers.bagel_record_toys import NUMBERS, builder_of
from helpers.toys import LLM, TOP, VIT, picture, toy
from safetensors.torch import save_file

from unimm.checkpoint.contents import CheckpointError
from unimm.checkpoint.save import released_state_dict
from unimm.data.records import Record, RecordImage, RecordText
from unimm.models.bagel.weights import DECODER_KEY_MAP, VIT_KEY_MAP
from unimm.training.config import from_mapping
from unimm.training.tasks.bagel_records import BagelRecordConfig, BagelRecordTask
from unimm.training.tasks.bagel_start import build_bagel, resize_positions

SPECIAL = dict(zip(("bos_token_id", "eos_token_id", "start_of_image", "end_of_image"), range(92, 96), strict=True))


@pytest.fixture
def parts(tmp_path):
    """The files of a small Qwen2, a small SigLIP of 32 pixels, convolution and all, and a small VAE."""
    source = toy(seed=5, llm={"qk_norm": False})
    decoder = released_state_dict(source, DECODER_KEY_MAP)
    vision = released_state_dict(source, VIT_KEY_MAP)
    llm = {key.removeprefix("language_model."): x for key, x in decoder.items() if "_moe_gen" not in key}
    vit = {key.removeprefix("vit_model."): x for key, x in vision.items() if key.startswith("vit_model.")}
    patch = "vision_model.embeddings.patch_embedding.weight"
    vit[patch] = vit[patch].unflatten(1, (8, 8, 3)).permute(0, 3, 1, 2).contiguous()
    table = "vision_model.embeddings.position_embedding.weight"
    vit[table] = torch.randn(16, 24)
    # the last block, which BAGEL leaves out, and the pooling head
    vit |= {key.replace("layers.1", "layers.2"): x.clone() for key, x in vit.items() if "layers.1." in key}
    vit["vision_model.head.probe"] = torch.zeros(1, 1, 24)
    for name, weights, config in (
        ("llm", llm, LLM | {"tie_word_embeddings": True}),
        ("vit", vit, {"vision_config": VIT | {"image_size": 32}, "model_type": "siglip"}),
    ):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "vae").mkdir()
    save_file(source.vae.state_dict(), tmp_path / "vae/ae.safetensors")
    (tmp_path / "vae/vae_config.json").write_text(json.dumps(TOP["vae_config"]))
    return source, vit[table], {name: str(tmp_path / name) for name in ("llm", "vit", "vae")}


def section(places):
    config = {key: value for key, value in TOP.items() if key != "vae_config"} | {"new_token_ids": SPECIAL}
    return {**places, "config": config, "qk_norm": True}


def test_every_parameter_begins_as_it_should(parts):
    source, table, places = parts
    model = build_bagel(section(places), seed=1)
    ours, theirs = model.state_dict(), source.state_dict()
    for name in theirs:
        if name.startswith(("decoder.", "vae.")):
            # both experts begin as the language model
            assert torch.equal(
                ours[name], theirs[name.replace("experts.gen", "experts.und").replace("norms.gen", "norms.und")]
            ), name
        elif (name.startswith("vision.") and "pos_embed" not in name) or name.endswith("_pos_embed"):
            assert torch.equal(ours[name], theirs[name]), name
    norms = [x for name, x in ours.items() if name.endswith(("q_norm.weight", "k_norm.weight"))]
    assert len(norms) == 8 and all((x == 1).all() for x in norms)
    assert not ours["llm2vae.weight"].any() and ours["vae2llm.weight"].isfinite().all() and ours["vae2llm.weight"].any()
    assert torch.equal(ours["vision.pos_embed.weight"], resize_positions(table, 8))
    again = build_bagel(section(places), seed=1).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in ours.items())


def test_the_first_stage_has_no_qk_norm_and_the_second_begins_with_its_connector(parts, tmp_path):
    source, _, places = parts
    first = build_bagel(section(places) | {"qk_norm": False}, seed=1)
    assert not any("q_norm" in name for name in first.state_dict())
    first.save_pretrained(tmp_path / "aligned")
    second = build_bagel(section(places) | {"connector": str(tmp_path / "aligned")}, seed=2)
    assert all(torch.equal(x, second.get_parameter(name)) for name, x in first.connector.named_parameters("connector"))
    assert not torch.equal(first.vae2llm.weight, second.vae2llm.weight)
    assert torch.equal(second.decoder.head.weight, source.decoder.head.weight)


def test_what_is_put_together_trains(parts):
    _, _, places = parts
    model = build_bagel(section(places), seed=1)
    model.tokenizer = toy().tokenizer
    options = from_mapping(BagelRecordConfig, NUMBERS["options"], where="options")
    task = BagelRecordTask(model, builder_of(model, options))
    record = Record(parts=(RecordText(wordings=("a",)), RecordImage(data=picture(), loss=True)), source="", row=0)
    batch = task.sample_builder.collate([task.sample_builder.prepare(record, random.Random(0))], random.Random(0))
    losses = task.losses(batch)
    # noise - data, where the velocity is 0
    assert 1 < losses["mse"].mean.item() < 20
    losses["mse"].total.backward()
    assert model.llm2vae.weight.grad.any()


def test_tied_embeddings_are_the_head(parts):
    source, _, places = parts
    rewrite(places["llm"], lambda weights: weights.pop("lm_head.weight"))
    model = build_bagel(section(places), seed=1)
    assert torch.equal(model.decoder.head.weight, source.decoder.embed.weight)
    assert model.decoder.head.weight is not model.decoder.embed.weight


def rewrite(folder, change):
    from safetensors.torch import load_file

    path = f"{folder}/model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_parts_that_do_not_fit(parts, tmp_path):
    _, _, places = parts
    with pytest.raises(ValueError, match="model of the recipe lacks vit, qk_norm"):
        build_bagel({"llm": places["llm"], "vae": places["vae"]}, seed=0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text(json.dumps(VIT))
    with pytest.raises(CheckpointError, match="no weights in"):
        build_bagel(section(places | {"vit": str(tmp_path / "empty")}), seed=0)
    rewrite(places["vit"], lambda weights: weights.pop("vision_model.post_layernorm.bias"))
    with pytest.raises(ValueError, match=r"have no weights for vision.norm.bias: expected Qwen2's, SigLIP's"):
        build_bagel(section(places), seed=0)
    rewrite(places["llm"], lambda weights: weights.update({"model.norm.weight": torch.ones(4)}))
    with pytest.raises(
        ValueError,
        match=r"model.norm.weight in .*llm/model.safetensors is \[4\], expected \[48\]: take parts of one size",
    ):
        build_bagel(section(places), seed=0)
