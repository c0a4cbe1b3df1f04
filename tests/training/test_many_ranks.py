"""Two processes against one: losses, weights and averages of every family; checkpoints that one writes and the other
resumes; what goes wrong on one of them."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers.bagel_widths import PackTask, few_layers
from helpers.family_recipes import FAMILIES, save_parts, small_recipes, use_quick_tokenizers
from helpers.paths import RECIPES
from helpers.rank_jobs import matrices_job, run_job, steps_of
from helpers.ranks import run_processes
from helpers.trainer_toy import RECIPE, Toy
from PIL import Image
from safetensors.torch import load_file

from examples.data import make
from unimm import Bagel
from unimm.distributed.ranks import Ranks
from unimm.training.checkpoints import (
    check_undamaged,
    list_checkpoints,
    named_tensors,
    saved_shapes,
)
from unimm.training.config import DistributedConfig, read_recipe
from unimm.training.memory import plan_memory
from unimm.training.parallel import mesh_shape
from unimm.training.record_batches import build_batches
from unimm.training.tasks.base import build_task
from unimm.training.trainer import Trainer, train

# sums in another order: gradients differ in their last bits, and by Adam's epsilon a step does by little more
MATRICES = dataclasses.replace(RECIPE, muon=("muon",), optimizer="adamw8bit", lr_multipliers={"muon": 0.5})
EXACT = dict(rtol=1e-5, atol=1e-6)
# of the test of memory: blocks and root of some megabytes
PLANNED = dataclasses.replace(RECIPE, loss_weights={"ce": 1.0, "mse": 1.0})
PLANNED_LLM = dict(
    hidden_size=512, num_attention_heads=4, num_key_value_heads=2, intermediate_size=2048, num_hidden_layers=4
)


# those whose checkpoints two processes resume in every run of the tests; the others' by night
RESUMED = ("bagel", "uniworld")


@pytest.fixture(scope="module")
def quick_tokenizers():
    with pytest.MonkeyPatch.context() as patch:
        use_quick_tokenizers(patch.setattr)
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory, quick_tokenizers):
    """What one process gives for every family, with two batches a step, and where it wrote a checkpoint."""
    folder = tmp_path_factory.mktemp("alone")
    save_parts(folder / "parts")
    recipes = small_recipes(folder / "parts")
    two = {name: dataclasses.replace(one, gradient_accumulation=2) for name, one in recipes.items()}
    return folder, recipes, {name: steps_of(two[name], saved=folder / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """What two processes give for every family, and where they wrote checkpoints; and what they say of mistakes."""
    folder = tmp_path_factory.mktemp("together")
    of_one, recipes, _ = alone
    janus, flow = recipes["janus"], recipes["janusflow"]
    spoilt = dataclasses.replace(RECIPE, save_every=2)
    jobs = [(f"{name}, saved", "steps", dict(recipe=recipes[name], saved=folder / name)) for name in FAMILIES]
    jobs += [resumed_job(alone, name) for name in RESUMED]
    jobs += [
        ("whole", "steps", dict(recipe=distributed(janus, shard=1))),
        ("full", "steps", dict(recipe=distributed(janus, activation_checkpointing="full"))),
        ("sample", "sample", dict(recipe=janus, path=folder / "sample.png")),
        ("begun", "run", dict(recipe=dataclasses.replace(flow, steps=2), out=folder / "run")),
        ("gone on", "run", dict(recipe=flow, out=folder / "run", resume=True)),
        ("adapter", "run", dict(recipe=adapter_recipe(folder, of_one / "bagel/release"), out=folder / "adapter")),
        ("other model", "error of steps", dict(recipe=janus, resumed=newest(of_one / "bagel"))),
        ("other recipe", "other recipe", dict(recipe=RECIPE, out=folder / "other")),
        ("other command", "other command", dict(out=folder / "other")),
        (
            "other datasets",
            "other datasets",
            dict(recipe=RECIPE, datasets=other_datasets(folder), out=folder / "other"),
        ),
        ("spoilt", "spoilt", dict(recipe=spoilt, out=folder / "spoilt")),
        ("matrices", "matrices", dict(recipe=MATRICES, out=folder / "matrices")),
        ("full disk", "full disk", dict(recipe=dataclasses.replace(janus, steps=5), out=folder / "full")),
        ("async", "run", dict(recipe=in_background(janus, steps=3, save_every=2), out=folder / "async")),
        ("offloaded", "offloaded", {}),
        ("memory", "memory", dict(recipe=PLANNED, llm=PLANNED_LLM)),
        # the last one: the second process is killed in it
        ("lost", "lost", dict(recipe=spoilt, out=folder / "lost")),
    ]
    return folder, run_processes(folder, jobs, codes=(0, -9))


@pytest.fixture(scope="module")
def more_together(alone, tmp_path_factory):
    """What two processes give beyond that, by night."""
    janus = alone[1]["janus"]
    jobs = [resumed_job(alone, name) for name in FAMILIES if name not in RESUMED]
    jobs.append(("selective", "steps", dict(recipe=distributed(janus, activation_checkpointing="selective"))))
    return run_processes(tmp_path_factory.mktemp("more"), jobs)


def resumed_job(alone, name):
    return f"{name}, resumed", "steps", dict(recipe=alone[1][name], resumed=newest(alone[0] / name))


def distributed(recipe, **config):
    return dataclasses.replace(recipe, distributed=DistributedConfig(**config))


def in_background(recipe, **changes):
    return dataclasses.replace(recipe, async_checkpoints=True, **changes)


def adapter_recipe(folder: Path, base: Path):
    """Two steps of the adapter of a small BAGEL's release, on records."""
    images = make.make_imagefolder(folder / "images")
    settings = [
        f"data.groups={{images: {{paths: [{images}]}}}}",
        f"model={{from_pretrained: {base}}}",
        "data.lanes=1",
        "packing={expected_tokens: 60, max_tokens: 120, max_tokens_per_sample: 120, buffer_size: 2}",
        "lora={rank: 4, alpha: 8.0, targets: [gen]}",
        *("steps=2", "save_every=2", "log_every=1", "warmup_steps=0", "lr=1e-2", "eps=1e-4"),
    ]
    return read_recipe(RECIPES / "bagel-nano-finetune.yaml", settings=settings)


def other_datasets(folder: Path) -> list[Path]:
    """Two that differ in a row."""
    images = [make.make_imagefolder(folder / name) for name in ("first", "second")]
    lines = images[1] / "metadata.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:-1]))
    return images


def newest(out: Path) -> Path:
    return list_checkpoints(out)[-1]


def saved_pieces(folder: Path) -> dict[str, list[torch.Tensor]]:
    """The pieces of every tensor of a checkpoint in shards, by the ranks that wrote them."""
    pieces = {}
    for path in sorted((folder / "shards").iterdir()):
        for name, x in load_file(path).items():
            pieces.setdefault(name, []).append(x)
    return pieces


def assert_same_steps(found, expected):
    for line, other in zip(found[0], expected[0], strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    for tensors, others in zip(found[1:], expected[1:], strict=True):
        assert tensors.keys() == others.keys()
        for name, x in tensors.items():
            torch.testing.assert_close(x, others[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_are_one_with_two_batches_a_step(alone, together, name):
    expected = alone[2][name]
    start = dict(build_task(alone[1][name]).model.named_parameters())
    assert any(not torch.equal(x, start[key]) for key, x in expected[1].items()), "the steps change weights"
    for results in together[1]:
        assert_same_steps(results[f"{name}, saved"], expected)


@pytest.mark.parametrize("name", RESUMED)
def test_what_one_process_saved_two_go_on_with(alone, together, name):
    lines, *tensors = alone[2][name]
    for results in together[1]:
        assert_same_steps(results[f"{name}, resumed"], (lines[2:], *tensors))


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in RESUMED])
def test_what_one_process_saved_two_go_on_with_by_night(alone, more_together, name):
    lines, *tensors = alone[2][name]
    for results in more_together:
        assert_same_steps(results[f"{name}, resumed"], (lines[2:], *tensors))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_two_processes_saved_one_goes_on_with(alone, together, name):
    lines, *tensors = alone[2][name]
    recipe = dataclasses.replace(alone[1][name], gradient_accumulation=2)
    folder = newest(together[0] / name)
    check_undamaged(folder)
    assert len(list((folder / "shards").iterdir())) == 2 and not list(folder.glob("*.safetensors"))
    assert_same_steps(steps_of(recipe, resumed=folder), (lines[2:], *tensors))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_release_of_two_is_that_of_one(alone, together, name):
    ours, theirs = together[0] / name / "release", alone[0] / name / "release"
    files = {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()}
    assert files == {path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()}
    for path in (path for path in files if path.suffix == ".safetensors"):
        found, expected = load_file(ours / path), load_file(theirs / path)
        assert found.keys() == expected.keys()
        for key, x in found.items():
            # a last bit of bfloat16, where the averages differ in their last bits
            torch.testing.assert_close(x.float(), expected[key].float(), rtol=2**-7, atol=1e-6)


def test_weights_that_lie_whole_on_every_rank(alone, together):
    for results in together[1]:
        assert_same_steps(results["whole"], alone[2]["janus"])


def test_activations_computed_again_change_nothing(alone, together):
    for results in together[1]:
        assert_same_steps(results["full"], alone[2]["janus"])


@pytest.mark.nightly
def test_some_activations_computed_again_change_nothing(alone, more_together):
    for results in more_together:
        assert_same_steps(results["selective"], alone[2]["janus"])


@pytest.mark.nightly
def test_two_groups_of_two_shards(alone, tmp_path):
    """HSDP: four processes against one with four batches a step."""
    recipe = distributed(alone[1]["janus"], shard=2, replicate=2)
    jobs = [("steps", "steps", dict(recipe=recipe, saved=tmp_path / "run"))]
    expected = steps_of(dataclasses.replace(alone[1]["janus"], gradient_accumulation=4))
    for results in run_processes(tmp_path, jobs, n=4, codes=(0,) * 4):
        assert_same_steps(results["steps"], expected)
    two = dataclasses.replace(alone[1]["janus"], gradient_accumulation=4)
    lines, *tensors = expected
    assert_same_steps(steps_of(two, resumed=newest(tmp_path / "run")), (lines[2:], *tensors))


def test_an_adapter_on_records(alone, together):
    """Two processes train on batches of their own; one trains on both, and reads what they saved."""
    folder, results = together
    assert [one["adapter"] for one in results] == [2, 2]
    recipe = adapter_recipe(folder / "again", alone[0] / "bagel/release")
    trainer, resumed = (Trainer(build_task(recipe), recipe, torch.device("cpu")) for _ in range(2))
    start = {name: x.clone() for name, x in named_tensors(trainer.model).items()}
    sources = [build_batches(trainer.task, recipe, rank=rank, world_size=2) for rank in range(2)]
    lines = []
    for batches in zip(*(source.iterate(0, 2, workers=0) for source in sources), strict=True):
        trainer.update(*batches)
        lines.append(trainer.report())
    log = [json.loads(line) for line in (folder / "adapter/log.jsonl").read_text().splitlines()]
    for line, expected in zip(log, lines, strict=True):
        assert line["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert line["rows"] == sum(source.figures()["rows"] for source in sources) or line["step"] == 1
    resumed.resume(newest(folder / "adapter"))
    for ours, theirs in (
        (named_tensors(resumed.model), named_tensors(trainer.model)),
        (resumed.ema.weights, trainer.ema.weights),
    ):
        assert ours.keys() == theirs.keys() == start.keys()
        for name, x in ours.items():
            torch.testing.assert_close(x, theirs[name], **EXACT)
    assert not any(torch.equal(x, start[name]) for name, x in named_tensors(resumed.model).items())
    resumed.use_source(build_batches(resumed.task, recipe))
    assert resumed.source.counter.n_rows == log[-1]["rows"]
    model = Bagel.from_pretrained(alone[0] / "bagel/release")
    model.load_adapter(folder / "adapter/release")
    for name, update in model.adapters.updates("default").items():
        assert torch.equal(update.b, resumed.ema.weights[f"{name}.lora_B.default.weight"])


def test_the_memory_of_two_shards_is_what_is_planned(together):
    """Every rank's weights, averages and states by their sizes; and what a step allocates beside them."""
    task = PackTask(few_layers(values=False, llm=PLANNED_LLM))
    plan = plan_memory(task, PLANNED, [task.batch(0)], device_type="cpu", n_devices=2)
    for results in together[1]:
        sizes, peak = results["memory"]
        assert sizes == {name: pytest.approx(getattr(plan, name), rel=1e-3) for name in sizes}
        assert peak == pytest.approx(plan.gathered + plan.gradients + plan.activations, rel=0.1)


def test_a_run_of_two_goes_on(alone, together):
    folder, results = together
    recipe = dataclasses.replace(alone[1]["janusflow"], gradient_accumulation=2)
    run_job(Ranks(), recipe=recipe, out=alone[0] / "run")
    assert [(one["begun"], one["gone on"]) for one in results] == [(2, 3)] * 2
    steps = [path.name for path in list_checkpoints(folder / "run")]
    assert steps == [path.name for path in list_checkpoints(alone[0] / "run")] == ["00000002", "00000003"]
    assert len((folder / "run/log.jsonl").read_text().splitlines()) == 3, "one rank logs"
    pairs = (load_file(out / "run/release/model.safetensors") for out in (folder, alone[0]))
    found, expected = pairs
    for key, x in found.items():
        torch.testing.assert_close(x.float(), expected[key].float(), rtol=2**-7, atol=1e-6)


def test_the_first_rank_samples_with_whole_weights(alone, together):
    """And goes on with its shards."""
    folder, results = together
    trainer = Trainer(build_task(alone[1]["janus"]), alone[1]["janus"], torch.device("cpu"))
    trainer.update(trainer.task.batch(0), trainer.task.batch(1))
    trainer.sample(alone[0] / "sample.png")
    with Image.open(folder / "sample.png") as ours, Image.open(alone[0] / "sample.png") as theirs:
        assert ours.tobytes() == theirs.tobytes()
    trainer.update(trainer.task.batch(2), trainer.task.batch(3))
    assert [one["sample"] for one in results] == [pytest.approx(trainer.report()["loss"], rel=1e-4)] * 2


def test_optimisers_of_two_ranks(together, tmp_path):
    """Muon on whole matrices, Adam in 8 bits on blocks of whole rows; their state goes on in one process."""
    folder, results = together
    expected = matrices_job(Ranks(), recipe=MATRICES, out=tmp_path)
    gone_on = matrices_job(Ranks(), recipe=MATRICES, resumed=newest(folder / "matrices"))
    for found in (gone_on, *(one["matrices"] for one in results)):
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, **EXACT)
    shapes = saved_shapes(newest(folder / "matrices"), "optimizer")
    assert shapes == saved_shapes(newest(tmp_path), "optimizer")
    assert shapes["adam/exp_avg.codes"] == (65, 256) and shapes["adam/exp_avg.scale"] == (65, 1)


# what goes wrong


def test_a_checkpoint_of_another_model(together):
    for results in together[1]:
        kind, message = results["other model"]
        assert kind == "ValueError" and "does not fit this model" in message and "use the recipe" in message


def test_recipes_that_differ(together):
    folder, found = together
    for results in found:
        kind, message = results["other recipe"]
        assert kind == "ValueError" and "other settings in lr ({'lr': [0.01, 0.02]})" in message
    assert not (folder / "other").exists()


def test_other_settings_are_said_before_a_model_is_built(together):
    for results in together[1]:
        kind, message = results["other command"]
        assert kind == "ValueError" and "other settings in lr ({'lr': [1.0, 2.0]})" in message


def test_processes_that_see_other_datasets(together):
    folder, found = together
    for results in found:
        for (kind, message), where in zip(results["other datasets"], ("data", "validation.data"), strict=True):
            assert kind == "ValueError" and f"other datasets in {where}.groups.mine" in message
            assert "['6 rows in 6 pieces (checksum" in message and "'5 rows in 5 pieces (checksum" in message
    assert not (folder / "other").exists()


def test_a_loss_that_is_no_number_on_one_rank_ends_both(together):
    folder, found = together
    for results in found:
        kind, message = results["spoilt"]
        assert kind == "FloatingPointError" and "nan at step 5" in message and "resume the last checkpoint" in message
    assert [path.name for path in list_checkpoints(folder / "spoilt")] == ["00000002", "00000004"]
    check_undamaged(newest(folder / "spoilt"))


def test_a_disk_that_is_full_for_one_rank(together):
    folder, found = together
    for results in found:
        kind, message = results["full disk"]
        assert kind == "OSError" and "File too large (process 1)" in message and "00000004" in message
    assert [path.name for path in list_checkpoints(folder / "full")] == ["00000002"]
    check_undamaged(newest(folder / "full"))


def test_a_process_that_is_killed(together):
    folder, (first, second) = together
    kind, message = first["lost"]
    assert kind == "ConnectionError" and "process 0 of 2 lost another one" in message and "--resume" in message
    assert "lost" not in second
    assert [path.name for path in list_checkpoints(folder / "lost")] == ["00000002", "00000004"]
    check_undamaged(newest(folder / "lost"))


def test_checkpoints_that_a_thread_writes(together):
    """The same shards, bit for bit, as those that training waits for."""
    folder, results = together
    assert [one["async"] for one in results] == [3, 3]
    names = [path.name for path in list_checkpoints(folder / "async")]
    assert names == ["00000002", "00000003"]
    ours, theirs = (folder / name / "checkpoints/00000002" for name in ("async", "janus"))
    found, expected = saved_pieces(ours), saved_pieces(theirs)
    assert found.keys() == expected.keys()
    for name, pieces in found.items():
        assert len(pieces) == len(expected[name])
        assert all(torch.equal(*pair) for pair in zip(pieces, expected[name], strict=True)), name
    check_undamaged(ours)


def test_a_process_that_is_killed_while_its_thread_writes(tmp_path):
    """The checkpoint before is whole, and one process goes on from it."""
    recipe = in_background(RECIPE, save_every=3)
    jobs = [("killed", "killed saving", dict(recipe=recipe, out=tmp_path / "run"))]
    with pytest.raises(FileNotFoundError, match="results0"):
        run_processes(tmp_path, jobs, codes=(-9, 0))
    kind, message = pickle.loads((tmp_path / "results1.pickle").read_bytes())["killed"]  # noqa: S301
    assert kind == "ConnectionError" and "00000003 is whole: --resume goes on from it" in message
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["00000003"]
    check_undamaged(newest(tmp_path / "run"))
    alone = dataclasses.replace(RECIPE, gradient_accumulation=2, save_every=3)
    assert train(Toy(), alone, tmp_path / "run", workers=0, resume=True) == 8


def test_what_is_offloaded_stays_on_the_cpu(together):
    """A mesh of GPUs, whose shards lie in the CPU's memory: what is read into them is not read into a copy."""
    for results in together[1]:
        assert results["offloaded"] == ([True, False], (4, 3), True)


@pytest.mark.parametrize(
    ("config", "size", "can_shard", "expected"),
    [
        ({}, 1, True, (1, 1)),
        ({}, 8, True, (8, 1)),
        ({}, 8, False, (1, 8)),
        ({"replicate": 2}, 8, True, (4, 2)),
        ({"shard": 2}, 8, True, (2, 4)),
        ({"shard": 1}, 8, True, (1, 8)),
        ({"shard": 4, "replicate": 2}, 8, True, (4, 2)),
    ],
)
def test_the_mesh(config, size, can_shard, expected):
    assert mesh_shape(DistributedConfig(**config), Ranks(size=size), can_shard=can_shard) == expected


@pytest.mark.parametrize("config", [{"shard": 3}, {"shard": 4, "replicate": 4}, {"replicate": 3}, {"shard": 16}])
def test_a_mesh_that_does_not_fit(config):
    with pytest.raises(ValueError, match="expected a product of 8, the processes of the run"):
        mesh_shape(DistributedConfig(**config), Ranks(size=8), can_shard=True)


def test_weights_on_a_cpu_are_not_offloaded():
    with pytest.raises(ValueError, match="got cpu_offload on the device cpu"):
        mesh_shape(DistributedConfig(cpu_offload=True), Ranks(), can_shard=True)
