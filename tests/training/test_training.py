"""The trainer: exact resumption, the average's formula, strict recipes, files that are whole or absent."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
from helpers.flops import check_counts
from helpers.paths import RECIPES, TESTS
from helpers.trainer_toy import RECIPE, Draw, Toy, assert_same_files, log_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from unimm.checkpoint.contents import CheckpointError
from unimm.data.batching import image_to_uint8, uint8_to_image
from unimm.distributed.ranks import Ranks
from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig
from unimm.training import checkpoints as saving
from unimm.training import trainer as loop
from unimm.training.batches import iterate_batches
from unimm.training.config import TrainConfig, from_mapping, read_recipe
from unimm.training.ema import EMA
from unimm.training.logging import JsonlLog
from unimm.training.losses import LossSum, mean_losses
from unimm.training.optim import Optimizers
from unimm.training.tasks.base import TRAINING_TASKS, build_task
from unimm.training.trainer import Trainer, train

# resumption


@pytest.mark.parametrize("stopped_at", [4, 6])
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path, stopped_at):
    run(tmp_path / "whole")
    # stopped off the log's beat, too: the sums since the last line are part of the state
    recipe = dataclasses.replace(RECIPE, log_every=4)
    for name in ("whole4", "parts"):
        action = (lambda: os.kill(os.getpid(), signal.SIGTERM)) if name == "parts" else (lambda: None)
        _, step = run(tmp_path / name, recipe=recipe, toy=Toy(stopped_at - 1, action))
        assert step == (stopped_at if name == "parts" else 8)
    torch.manual_seed(99)
    _, step = run(tmp_path / "parts", recipe=recipe, resume=True)
    assert step == 8
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole4")
    for name in ("model", "average"):
        path = f"checkpoints/00000008/{name}.safetensors"
        assert_same_files(tmp_path / "parts" / path, tmp_path / "whole" / path)
    assert_same_files(tmp_path / "parts/release/model.safetensors", tmp_path / "whole/release/model.safetensors")


def test_a_resumed_run_takes_back_the_steps_after_its_checkpoint(tmp_path):
    run(tmp_path / "whole")

    def crash():
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        run(tmp_path / "crashed", toy=Toy(6, crash))
    assert [line["step"] for line in log_of(tmp_path / "crashed")] == [1, 2, 3, 4, 5, 6]
    run(tmp_path / "crashed", resume=True)
    assert log_of(tmp_path / "crashed") == log_of(tmp_path / "whole")


def test_batches_of_a_worker_equal_those_of_the_loop(tmp_path):
    state = torch.get_rng_state()
    made = list(iterate_batches(Draw(1), range(2, 7), workers=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(made) == 5
    assert all(torch.equal(x, Draw(1)(step)) for step, x in enumerate(made, start=2))


SPOILT = """
import sys
sys.path[:0] = [{tests!r}]
from helpers.trainer_toy import Toy, run

def spoil():
    raise ValueError("got no such task")

run({out!r}, toy=Toy(5, spoil), workers=1)
"""


def test_what_a_worker_raises_ends_the_run(tmp_path):
    """In its own words, and without a worker left behind that nobody can stop: in a process of its own, to its very
    end."""
    code = SPOILT.format(tests=str(TESTS), out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ValueError: got no such task"), done.stderr


def test_a_gradient_that_is_no_number_spoils_nothing(tmp_path):
    class Steep(Toy):
        def losses(self, batch):
            losses = super().losses(batch)
            # sqrt has no slope at 0
            near = losses["near"]
            total = (near.total * 0).sqrt() if self.spoilt else near.total
            return losses | {"near": LossSum(total, near.count)}

        spoilt = False

    toy = Steep()
    toy.batch = Draw(RECIPE.seed, 4, lambda: setattr(toy, "spoilt", True))
    with pytest.raises(FloatingPointError, match="norm is nan at step 4: lower lr or max_grad_norm and resume"):
        run(tmp_path, toy=toy)
    kept = load_file(tmp_path / "checkpoints/00000004/model.safetensors")
    assert all(x.isfinite().all() for x in (*kept.values(), *toy.model.parameters()))


def test_parts_that_no_parameter_has():
    for name in ("muon", "no_weight_decay"):
        with pytest.raises(ValueError, match=rf"got {name} \['decodr'\], expected prefixes of parameters"):
            Optimizers(Toy().model, dataclasses.replace(RECIPE, **{name: ("decodr",)}))


def test_what_is_not_decayed_is_not_decayed_by_muon_either():
    recipe = dataclasses.replace(RECIPE, muon=("3.",), no_weight_decay=("3.",), weight_decay=0.5)
    model = Toy().model
    before = model[3].weight.clone()
    for optimizer in Optimizers(model, recipe).optimizers.values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert torch.equal(model[3].weight, before)


def test_a_run_is_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        run(tmp_path, resume=True)
    run(tmp_path)
    with pytest.raises(ValueError, match=r"8 steps.*resume"):
        run(tmp_path)
    with pytest.raises(ValueError, match="both resume and init"):
        run(tmp_path, resume=True, init=tmp_path)


def test_a_finished_run_resumed_does_nothing(tmp_path):
    run(tmp_path)
    before = log_of(tmp_path)
    assert run(tmp_path, resume=True)[1] == 8
    assert log_of(tmp_path) == before


def test_another_recipe_is_said_aloud(tmp_path, caplog):
    run(tmp_path)
    run(tmp_path, recipe=dataclasses.replace(RECIPE, steps=9), resume=True)
    assert "differs" in caplog.text and "['steps']" in caplog.text


def test_time_is_up(tmp_path):
    assert run(tmp_path, hours=0.0)[1] == 1
    assert [path.name for path in saving.list_checkpoints(tmp_path)] == ["00000001"]


def test_ctrl_c_saves_and_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run(tmp_path, toy=Toy(2, lambda: os.kill(os.getpid(), signal.SIGINT)))[1] == 3
    assert (tmp_path / "checkpoints/00000003/state.pt").is_file()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_init_takes_the_average(tmp_path):
    run(tmp_path / "first")
    folder = tmp_path / "first/checkpoints/00000008"
    trainer = Trainer(Toy(), RECIPE, torch.device("cpu"))
    trainer.init_from(folder)
    average = load_file(folder / "average.safetensors")
    weights = dict(trainer.model.named_parameters())
    assert average.keys() < weights.keys()
    assert all(torch.equal(weights[name], x) for name, x in average.items())
    assert all(torch.equal(trainer.ema.weights[name], x) for name, x in average.items())
    assert (trainer.step, trainer.ema.n_updates) == (0, 0)
    with pytest.raises(ValueError, match=r"folder of a run.*model.safetensors and average.safetensors"):
        trainer.init_from(tmp_path)


def test_init_from_a_run_that_trained_other_parts(tmp_path):
    run(tmp_path / "first")
    toy = Toy()
    toy.model[0].requires_grad_(True)
    toy.model[2].requires_grad_(False)
    trainer = Trainer(toy, RECIPE, torch.device("cpu"))
    trainer.init_from(tmp_path / "first")
    held, average = (
        load_file(tmp_path / f"first/checkpoints/00000008/{name}.safetensors") for name in ("model", "average")
    )
    assert all(torch.equal(x, average.get(name, held[name])) for name, x in trainer.model.named_parameters())
    # what is frozen now was trained then
    assert "2.weight" in average and "2.weight" not in trainer.ema.weights and "0.weight" in trainer.ema.weights
    assert all(torch.equal(x, trainer.model.get_parameter(name)) for name, x in trainer.ema.weights.items())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run(tmp_path)
    folder = tmp_path / "checkpoints/00000008"
    with pytest.raises(ValueError, match=r"lacks \['9.weight'\].*recipe"):
        saving.load_into(folder, "model", {**saving.named_tensors(Toy().model), "9.weight": torch.zeros(1)})
    other = {name: torch.zeros(7) if name == "3.bias" else x for name, x in saving.named_tensors(Toy().model).items()}
    with pytest.raises(ValueError, match=r"3.bias.*\[3\], expected \[7\]"):
        saving.load_into(folder, "model", other)


def test_a_checkpoint_of_other_names_is_not_resumed(tmp_path):
    """As an earlier version of the library would have written it."""
    run(tmp_path, recipe=dataclasses.replace(RECIPE, steps=4))
    path = tmp_path / "checkpoints/00000004/model.safetensors"
    (path.parent / "checksums.json").unlink()  # earlier versions wrote none
    save_file({f"old.{name}": x for name, x in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"does not fit this model.*the version of unimm"):
        run(tmp_path, resume=True)


# files


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, recipe=dataclasses.replace(RECIPE, steps=4))
    old = (tmp_path / "checkpoints/00000004/state.pt").read_bytes()
    release = (tmp_path / "release/model.safetensors").read_bytes()

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(saving.torch, "save", full)
        with pytest.raises(OSError, match="space"):
            run(tmp_path, resume=True)
    assert [path.name for path in saving.list_checkpoints(tmp_path)] == ["00000004"]
    assert (tmp_path / "checkpoints/00000004/state.pt").read_bytes() == old
    assert (tmp_path / "release/model.safetensors").read_bytes() == release
    assert run(tmp_path, resume=True)[1] == 8
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000004", "00000008"]


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "release"
    for word in ("one", "two"):
        saving.save_release(folder, lambda fresh, word=word: (fresh / word).touch())
        assert [path.name for path in folder.iterdir()] == [word]
    with pytest.raises(ZeroDivisionError):
        saving.save_release(folder, lambda fresh: 1 / 0)
    assert [path.name for path in folder.iterdir()] == ["two"]


def test_a_run_killed_before_its_last_release_writes_it_when_resumed(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    saves = []

    def dies(folder, save):
        saves.append(folder)
        if len(saves) == 2:
            raise KeyboardInterrupt
        saving.save_release(folder, save)

    with monkeypatch.context() as patch:
        patch.setattr("unimm.training.trainer.save_release", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    run(tmp_path / "killed", resume=True)
    assert_same_files(*(tmp_path / name / "release/model.safetensors" for name in ("whole", "killed")))


def test_a_checkpoint_whose_files_were_not_all_moved_is_none(tmp_path):
    run(tmp_path)
    for name in (".unimm-writing-killed", ".unimm-moving-killed"):
        killed = tmp_path / "checkpoints/00000012" / name
        killed.mkdir(parents=True)
        (killed / "state.pt").touch()
        assert [path.name for path in saving.list_checkpoints(tmp_path)] == ["00000004", "00000008"]


def test_the_last_two_checkpoints_are_kept(tmp_path):
    run(tmp_path, recipe=dataclasses.replace(RECIPE, save_every=3))
    assert [path.name for path in saving.list_checkpoints(tmp_path)] == ["00000006", "00000008"]


FILES = ("state.pt", "model.safetensors", "average.safetensors", "optimizer.safetensors", "checksums.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    run(out)
    return out


def cut(whole, at):
    return whole[:at]


def zeros(whole, at):
    return whole[:at] + bytes(len(whole) - at)


def flipped(whole, at):
    return whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :] if at < len(whole) else b""


DAMAGES = [cut, zeros, flipped, lambda whole, at: None, lambda whole, at: b"{}", lambda whole, at: b"\x80\x02N."]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FILES), st.sampled_from(DAMAGES), st.floats(0, 1))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_offered(finished, name, damage, at):
    newest, before = (finished / "checkpoints" / step for step in ("00000008", "00000004"))
    whole = (newest / name).read_bytes()
    left = damage(whole, int(at * len(whole)))
    # a file of checksums without its last line break says the same
    if left == whole or (name == "checksums.json" and left in (None, b"{}", whole.rstrip())):
        return
    try:
        if left is None:
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(left)
        message = rf"{newest}/.+damaged: remove {newest} to go on from {before}$"
        with pytest.raises(CheckpointError, match=message) as found:
            run(finished, resume=True)
        assert "\n" not in str(found.value) and (name in str(found.value) or name == "checksums.json")
        if name not in ("state.pt", "checksums.json"):
            with pytest.raises(CheckpointError, match=rf"{name}.*start from the one before, init {before}$"):
                run(finished / "other", init=finished)
    finally:
        (newest / name).write_bytes(whole)


def test_a_run_goes_on_from_the_checkpoint_before(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/00000008")
    assert run(tmp_path / "run", resume=True)[1] == 8
    path = "checkpoints/00000008/model.safetensors"
    assert_same_files(tmp_path / "run" / path, finished / path)
    assert log_of(tmp_path / "run") == log_of(finished)


def test_a_damaged_checkpoint_without_one_before(tmp_path):
    run(tmp_path, recipe=dataclasses.replace(RECIPE, steps=4))
    (tmp_path / "checkpoints/00000004/state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"state\.pt.*there is none before it: start another run"):
        run(tmp_path, resume=True)


def test_a_line_of_the_log_that_was_cut_short_is_left_out(tmp_path):
    lines = [json.dumps({"step": n, "losses": {"near": 0.1}, "lr": 0.1}) for n in (4, 8)]
    for length in range(1, len(lines[1])):
        path = tmp_path / "log.jsonl"
        path.write_text(lines[0] + "\n" + lines[1][:length])
        JsonlLog(path, after=8)
        assert path.read_text() == lines[0] + "\n"


@pytest.mark.parametrize("limit", [1000, 60_000])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, limit):
    """Full at the weights, and at the optimisers' state."""
    weights = {"weight": torch.zeros(5000)}
    code = "\n".join((
        "import resource, sys, torch; from pathlib import Path; from unimm.training.checkpoints import save_checkpoint",
        "from unimm.distributed.ranks import Ranks",
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))",
        "tensors, state = {'model': {'weight': torch.zeros(50, 100)}}, {'held': torch.zeros(100_000)}",
        "try: save_checkpoint(Path(sys.argv[1]), 8, tensors, state=state, ranks=Ranks(), sharded=False)",
        "except OSError as error: print(error.filename, error.strerror)",
    ))  # fmt: skip
    tensors = {"model": {"weight": torch.zeros(1)}, "average": weights}
    folder = saving.save_checkpoint(tmp_path, 4, tensors, state={}, ranks=Ranks(), sharded=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    name = "model.safetensors" if limit == 1000 else "state.pt"
    assert done.stdout.split(maxsplit=1) == [str(tmp_path / "checkpoints/00000008" / name), "File too large\n"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000004"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_state_needs_no_pickle(tmp_path):
    run(tmp_path)
    state = saving.load_train_state(saving.list_checkpoints(tmp_path)[-1])
    assert (state["step"], state["updates"]) == (8, 8)


def test_log_and_samples(tmp_path):
    run(tmp_path, recipe=dataclasses.replace(RECIPE, log_every=2))
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    for line in lines:
        assert line["losses"].keys() == {"near", "small"}
        assert line["loss"] == pytest.approx(line["losses"]["near"] + 0.5 * line["losses"]["small"])
        assert line["lr"] == RECIPE.lr_at(line["step"] - 1)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["00000004.png", "00000008.png"]


def test_the_rate_counts_the_steps_of_this_process(tmp_path, monkeypatch):
    stop = Toy(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    recipe = dataclasses.replace(RECIPE, log_every=4)
    run(tmp_path, recipe=recipe, toy=stop)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    trainer = Trainer(Toy(), recipe, torch.device("cpu"))
    trainer.resume(saving.list_checkpoints(tmp_path)[-1])
    for step in (6, 7):
        trainer.update(trainer.task.batch(step))
    # two steps of four samples in ten seconds; the two before them were another process's
    assert trainer.report()["samples_per_s"] == 0.8


# one step


def test_frozen_parts_stay(tmp_path):
    toy, _ = run(tmp_path)
    start = Toy().model
    for name, p in toy.model.named_parameters():
        assert torch.equal(p, start.get_parameter(name)) == name.startswith("0."), name
    average = load_file(tmp_path / "checkpoints/00000008/average.safetensors")
    assert not any(name.startswith("0.") for name in average)


def test_nothing_to_train():
    toy = Toy()
    toy.model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        Trainer(toy, RECIPE, torch.device("cpu"))


def test_one_step_is_adamw_on_the_clipped_gradient():
    recipe = dataclasses.replace(RECIPE, max_grad_norm=1e-3, eps=1e-3)
    trainer, twin = Trainer(Toy(), recipe, torch.device("cpu")), Toy()
    batch = twin.batch(0)
    params = [p for p in twin.model.parameters() if p.requires_grad]
    torch.manual_seed(5)
    losses = mean_losses(twin.losses(batch))
    grads = torch.autograd.grad(losses["near"] + 0.5 * losses["small"], params)
    norm = torch.stack([g.norm() for g in grads]).norm()
    assert norm > recipe.max_grad_norm
    torch.manual_seed(5)
    trainer.update(batch)
    for p, g, got in zip(params, grads, trainer.params, strict=True):
        clipped = g * recipe.max_grad_norm / (norm + 1e-6)
        decay = recipe.weight_decay if p.ndim >= 2 else 0.0
        lr = recipe.lr / 2
        expected = p * (1 - lr * decay) - lr * clipped / (clipped.abs() + recipe.eps)
        torch.testing.assert_close(got, expected)
    assert trainer.report()["grad_norm"] == pytest.approx(norm.item())


def test_muon_trains_the_matrices_it_is_given(tmp_path):
    # a matrix of two dimensions by Muon, all else by AdamW; both continue from a checkpoint
    recipe = dataclasses.replace(RECIPE, muon=("3.",), weight_decay=0.0, warmup_steps=0)
    trainer = Trainer(Toy(), recipe, torch.device("cpu"))
    muon, adamw = (trainer.optimizers.optimizers[kind] for kind in ("muon", "adamw"))
    matrix, before = trainer.model[3].weight, trainer.model[3].weight.detach().clone()
    assert [p for group in muon.param_groups for p in group["params"]] == [matrix]
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(trainer.params) - 1
    trainer.update(trainer.task.batch(0))
    # an orthogonal step, scaled so that its root mean square is 0.2 lr (arXiv 2502.16982, equation 4); the five
    # iterations leave singular values between about 0.7 and 1.2
    values = torch.linalg.svdvals((matrix.detach() - before) / (recipe.lr * 0.2 * 5**0.5))
    assert values.min() > 0.6 and values.max() < 1.3
    run(tmp_path / "whole", recipe=recipe)
    run(tmp_path / "parts", recipe=recipe, toy=Toy(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    run(tmp_path / "parts", recipe=recipe, resume=True)
    path = "checkpoints/00000008/model.safetensors"
    assert_same_files(tmp_path / "parts" / path, tmp_path / "whole" / path)


def test_loss_names_and_weights_must_agree():
    with pytest.raises(ValueError, match=r"near.*small.*correct the recipe"):
        Trainer(Toy(), dataclasses.replace(RECIPE, loss_weights={"near": 1.0}), torch.device("cpu"))
    toy = Toy()
    toy.losses = lambda batch: {"far": LossSum.over(batch)}
    with pytest.raises(ValueError, match=r"far.*loss_names"):
        Trainer(toy, RECIPE, torch.device("cpu")).update(toy.batch(0))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    toy = Toy()
    toy.losses = lambda batch: {"near": LossSum.over(toy.model(batch) * float("nan"))}
    toy.loss_counts = lambda batch: {"near": batch.numel()}
    weights = {name: p.clone() for name, p in toy.model.named_parameters()}
    with pytest.raises(FloatingPointError, match=r"step 0.*near.*lower lr"):
        run(tmp_path, toy=toy)
    assert all(torch.equal(p, weights[name]) for name, p in toy.model.named_parameters())


def test_bfloat16_keeps_float32_weights(tmp_path):
    seen = []
    toy = Toy()
    toy.model[3].register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    run(tmp_path, recipe=dataclasses.replace(RECIPE, precision="bfloat16", steps=2), toy=toy)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in toy.model.parameters()} == {torch.float32}


# average


def test_average_formula():
    model = nn.Linear(2, 1, bias=False)
    average = EMA(model, 0.5)
    expected = model.weight.detach().double().clone()
    for n in range(20):
        with torch.no_grad():
            model.weight += n + 1
        average.update()
        decay = min(0.5, (1 + n) / (10 + n)) if n else 0.0
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(average.weights["weight"].double(), expected, rtol=1e-6, atol=0)
    assert average.n_updates == 20


def test_average_swaps_in_and_back():
    model = nn.Linear(2, 2).to(torch.bfloat16)
    average = EMA(model, 0.9)
    with torch.no_grad():
        model.weight += 1
    live = model.weight.detach().clone()

    def look():
        with average.swap_in():
            assert torch.equal(model.weight, average.weights["weight"].to(torch.bfloat16))
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert torch.equal(model.weight, live)
    assert average.weights["weight"].dtype == torch.float32


# recipes


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_recipes(path):
    assert path.read_text().startswith(f"# unimm train {path.stem} ")
    recipe = read_recipe(path)
    assert recipe.task in TRAINING_TASKS


def fields():
    return {name: value for name, value in dataclasses.asdict(RECIPE).items() if name not in ("options", "model")}


def test_numbers_as_yaml_writes_them(tmp_path):
    # 1e-3 without a point is a string in YAML 1.1
    given = {name: value for name, value in {**fields(), "lr": "1e-3"}.items() if value is not None}
    text = "\n".join(f"{k}: {list(v) if isinstance(v, tuple) else v}" for k, v in given.items())
    (tmp_path / "r.yaml").write_text(text)
    assert read_recipe(tmp_path / "r.yaml") == dataclasses.replace(RECIPE, lr=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"warm_up": 3}, "got 'warm_up' in here.*did you mean 'warmup_steps'"),
        ({"steps": 0}, "got 0 for steps in here, expected at least 1"),
        ({"steps": 2.5}, "got 2.5 for steps in here, expected int"),
        ({"steps": True}, "got True for steps in here, expected int"),
        ({"lr": "fast"}, "got 'fast' for lr in here, expected float"),
        ({"lr": float("nan")}, "got nan for lr in here, expected float"),
        ({"betas": [0.9]}, "for betas in here, expected tuple"),
        ({"betas": [0.9, 1.0]}, r"got 1.0 for betas\[1\] in here, expected less than 1"),
        ({"schedule": "linear"}, "got 'linear' for schedule in here, expected one of \\['constant', 'cosine'\\]"),
        ({"loss_weights": {"near": "much"}}, "got 'much' for loss_weights.near in here, expected float"),
        ({"loss_weights": [1]}, "for loss_weights in here, expected .*Mapping"),
        ({"ema_decay": 1.5}, "got 1.5 for ema_decay in here, expected at most 1"),
    ],
)
def test_wrong_recipes(change, words):
    with pytest.raises(ValueError, match=words):
        from_mapping(TrainConfig, {**fields(), **change}, where="here")


@pytest.mark.parametrize(
    ("key", "value", "renamed"),
    [
        ("objective", "toy", "task"),
        ("batch", 4, "batch_size"),
        ("warmup", 2, "warmup_steps"),
        ("final", 0.1, "min_lr_ratio"),
        ("clip", 1.0, "max_grad_norm"),
        ("average", 0.9, "ema_decay"),
        ("undecayed", [], "no_weight_decay"),
    ],
)
def test_keys_of_earlier_versions_name_their_new_ones(key, value, renamed):
    old = {name: one for name, one in fields().items() if name != renamed} | {key: value}
    with pytest.raises(ValueError, match=f"got {key!r} in here.*it is called {renamed!r} now"):
        from_mapping(TrainConfig, old, where="here")


def test_options_of_earlier_versions_name_their_new_ones():
    recipe = read_recipe(RECIPES / "bagel-nano-vit.yaml")
    options = {**recipe.options, "nameless_colours": 0.1}
    with pytest.raises(ValueError, match="'nameless_colours' in options.*it is called 'novel_colours' now"):
        build_task(dataclasses.replace(recipe, options=options))


def test_missing_names_are_named(tmp_path):
    short = {name: value for name, value in fields().items() if name not in ("lr", "max_grad_norm")}
    with pytest.raises(ValueError, match="here lacks lr, max_grad_norm"):
        from_mapping(TrainConfig, short, where="here")
    with pytest.raises(ValueError, match="expected a mapping"):
        from_mapping(TrainConfig, None, where="here")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="no YAML"):
        read_recipe(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match=r"bad.yaml"):
        read_recipe(tmp_path / "none.yaml")


def test_learning_rate():
    recipe = dataclasses.replace(RECIPE, steps=102, warmup_steps=2, lr=1.0, min_lr_ratio=0.1)
    assert [recipe.lr_at(step) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert recipe.lr_at(52) == pytest.approx(0.55)
    assert recipe.lr_at(102) == pytest.approx(0.1)
    assert dataclasses.replace(recipe, schedule="constant").lr_at(101) == 1.0


def test_unknown_objective():
    with pytest.raises(ValueError, match=r"'kl_vea'.*did you mean 'kl_vae'"):
        build_task(dataclasses.replace(RECIPE, task="kl_vea"))


def test_a_task_of_an_earlier_version_names_its_new_one():
    with pytest.raises(ValueError, match="got task 'shapes'.*it is called 'bagel' now"):
        build_task(dataclasses.replace(RECIPE, task="shapes"))


def test_a_task_of_another_package():
    toy = Toy()
    module = types.ModuleType("toy_package")
    module.ToyTask = types.SimpleNamespace(from_recipe=lambda recipe: toy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "toy_package", module)
        assert build_task(dataclasses.replace(RECIPE, task="toy_package:ToyTask")) is toy
        with pytest.raises(ValueError, match="'toy_package:Task'.*expected a module:Class that can be imported"):
            build_task(dataclasses.replace(RECIPE, task="toy_package:Task"))
    with pytest.raises(ValueError, match="'nowhere:Task'.*PYTHONPATH"):
        build_task(dataclasses.replace(RECIPE, task="nowhere:Task"))


# the autoencoder's objective


def tiny_vae():
    recipe = read_recipe(RECIPES / "bagel-nano-vae.yaml")
    model = {"width": 32, "multipliers": [1, 1], "n_blocks": 1, "latent_channels": 2}
    return dataclasses.replace(
        recipe,
        model=model,
        options={**recipe.options, "measured_scenes": 6},
        steps=2,
        batch_size=3,
        precision="float32",
    )


def test_vae_batches_depend_on_seed_and_step_only():
    one, other = build_task(tiny_vae()).batch, build_task(tiny_vae()).batch
    other(0)
    assert torch.equal(one(5).image, other(5).image) and torch.equal(one(5).noise, other(5).noise)
    assert not torch.equal(one(5).image, one(6).image) and not torch.equal(one(5).noise, one(6).noise)
    assert one(5).image.shape == (3, 3, 64, 64) and one(5).noise.shape == (3, 2, 32, 32)
    assert one(5).image.is_contiguous()
    assert one(5).image.min() >= -1 and one(5).image.max() <= 1


def test_vae_losses_are_means():
    objective = build_task(tiny_vae())
    batch = objective.batch(0)
    losses = mean_losses(objective.losses(batch))
    mean, logvar = objective.model.moments(batch.image)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(losses["kl"], kl)
    image = objective.model.decode(objective.model.encode(batch.image, noise=batch.noise))
    torch.testing.assert_close(losses["l1"], (image - batch.image).abs().mean())
    torch.testing.assert_close(losses["mse"], (image - batch.image).square().mean())


def test_a_trained_vae_has_standard_latents(tmp_path):
    objective = build_task(tiny_vae())
    train(objective, tiny_vae(), tmp_path, workers=0)
    with Image.open(tmp_path / "samples/00000002.png") as picture:
        assert picture.size == (512, 128)
    config = AutoencoderKLConfig.from_json(json.loads((tmp_path / "release/vae_config.json").read_text()))
    weights = load_file(tmp_path / "release/ae.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.float16}
    vae = AutoencoderKL(config)
    vae.load_state_dict(weights)
    batch = objective.batch(0), objective.batch(1)
    image, noise = torch.cat([b.image for b in batch]), torch.cat([b.noise for b in batch])
    with torch.no_grad():
        latent = vae.encode(image, noise=noise)
    assert abs(latent.mean()) < 0.03 and abs(latent.std() - 1) < 0.03


def test_pixels_survive_the_way_there_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3).numpy()
    assert (image_to_uint8(uint8_to_image(pixels)) == pixels).all()
    assert image_to_uint8(torch.tensor([-3.0, 3.0, 0.0]).reshape(1, 3, 1, 1)).tolist() == [[[[0, 255, 128]]]]


def test_flops_of_the_autoencoder_are_those_that_torch_counts():
    objective = build_task(tiny_vae())
    check_counts(objective, objective.batch(0), masked=False)


def test_flops_of_the_vit_are_those_that_torch_counts():
    objective = build_task(dataclasses.replace(read_recipe(RECIPES / "bagel-nano-vit.yaml"), batch_size=3))
    check_counts(objective, objective.batch(0))
