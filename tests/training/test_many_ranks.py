"""Two processes against one: losses, weights and averages of every family; checkpoints that one writes and the other
resumes; what goes wrong on one of them."""

import dataclasses
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.family_recipes import FAMILIES, save_parts, small_recipes, use_quick_tokenizers
from helpers.paths import TESTS
from helpers.rank_jobs import matrices_job, run_job, steps_of
from helpers.trainer_toy import RECIPE
from PIL import Image
from safetensors.torch import load_file

from unimm.distributed.ranks import Ranks
from unimm.training.checkpoints import check_undamaged, list_checkpoints, saved_shapes
from unimm.training.config import DistributedConfig
from unimm.training.parallel import mesh_shape
from unimm.training.tasks.base import build_task
from unimm.training.trainer import Trainer

# sums in another order: gradients differ in their last bits, and by Adam's epsilon a step does by little more
MATRICES = dataclasses.replace(RECIPE, muon=("muon",), optimizer="adamw8bit", lr_multipliers={"muon": 0.5})
EXACT = dict(rtol=1e-5, atol=1e-6)


def start_processes(folder: Path, jobs: list) -> list[subprocess.Popen]:
    """Two processes that do some jobs, as torchrun would start them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.pickle").write_bytes(pickle.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    code = TESTS / "helpers" / "rank_jobs.py"
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", str(code), str(folder)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
        )
        for rank in range(2)
    ]


def results_of(folder: Path, processes: list[subprocess.Popen], codes=(0, 0)) -> list[list]:
    """What each of the processes made of its jobs."""
    try:
        assert tuple(process.wait(timeout=900) for process in processes) == codes
    finally:
        for process in processes:
            process.kill()
            process.wait()
    paths = [folder / f"results{rank}.pickle" for rank in range(2)]
    return [pickle.loads(path.read_bytes()) for path in paths if path.exists()]  # noqa: S301, of our own processes


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
    whole = DistributedConfig(shard=1)
    recomputed = [DistributedConfig(activation_checkpointing=kind) for kind in ("full", "selective")]
    jobs = [("steps", dict(recipe=recipes[name], saved=folder / name)) for name in FAMILIES]
    jobs += [("steps", dict(recipe=recipes[name], resumed=newest(of_one / name))) for name in FAMILIES]
    for config in (whole, *recomputed):
        jobs.append(("steps", dict(recipe=dataclasses.replace(recipes["janus"], distributed=config))))
    jobs.append(("sample", dict(recipe=recipes["janus"], path=folder / "sample.png")))
    jobs.append(("run", dict(recipe=dataclasses.replace(recipes["janusflow"], steps=2), out=folder / "run")))
    jobs.append(("run", dict(recipe=recipes["janusflow"], out=folder / "run", resume=True)))
    jobs.append(("error of steps", dict(recipe=recipes["janus"], resumed=newest(of_one / "bagel"))))
    jobs.append(("other recipe", dict(recipe=RECIPE, out=folder / "other")))
    jobs.append(("spoilt", dict(recipe=dataclasses.replace(RECIPE, save_every=2), out=folder / "spoilt")))
    jobs.append(("matrices", dict(recipe=MATRICES, out=folder / "matrices")))
    full = dataclasses.replace(recipes["janus"], steps=5)
    jobs.append(("full disk", dict(recipe=full, out=folder / "full")))
    names = [*(f"{name}, saved" for name in FAMILIES), *(f"{name}, resumed" for name in FAMILIES), "whole", "full"]
    names += [
        "selective",
        "sample",
        "begun",
        "gone on",
        "other model",
        "other recipe",
        "spoilt",
        "matrices",
        "full disk",
    ]
    found = results_of(folder, start_processes(folder, jobs))
    return folder, [dict(zip(names, results, strict=True)) for results in found]


def newest(out: Path) -> Path:
    return list_checkpoints(out)[-1]


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


@pytest.mark.parametrize("name", FAMILIES)
def test_what_one_process_saved_two_go_on_with(alone, together, name):
    lines, *tensors = alone[2][name]
    for results in together[1]:
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


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_activations_computed_again_change_nothing(alone, together, kind):
    for results in together[1]:
        assert_same_steps(results[kind], alone[2]["janus"])


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


def test_a_process_that_is_killed(tmp_path):
    recipe = dataclasses.replace(RECIPE, save_every=2)
    processes = start_processes(tmp_path, [("lost", dict(recipe=recipe, out=tmp_path / "run"))])
    ((result,),) = results_of(tmp_path, processes, codes=(0, -9))
    assert result[0] == "ConnectionError" and "process 0 of 2 lost another one" in result[1] and "--resume" in result[1]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["00000002", "00000004"]
    check_undamaged(newest(tmp_path / "run"))


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
