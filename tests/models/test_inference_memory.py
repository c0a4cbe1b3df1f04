"""The memory of generating images: predicted against measured, and what is refused before it is allocated."""

import json

import pytest
import torch
from helpers.bagel_widths import LLM, VIT
from helpers.peak_memory import allocated_peak
from typer.testing import CliRunner

import unimm
from unimm import Bagel
from unimm.checkpoint import fitting
from unimm.checkpoint.hub import bundled_names
from unimm.checkpoint.valueless import without_values
from unimm.cli.main import app
from unimm.cli.plan import parse_memory
from unimm.models import memory
from unimm.models.bagel.config import BagelConfig
from unimm.models.memory import PROMPT, plan_inference, plan_model
from unimm.nn.quantized_linear import QuantizedLinear


def measured_peak(model, *, batch: int, size: tuple[int, int] | None, steps: int | None) -> int:
    """Bytes beside the weights that the CPU's allocator gave out at the peak of a call, by torch's profiler."""
    options = {} if steps is None else {"steps": steps}
    return allocated_peak(lambda: model.generate([PROMPT] * batch, size=size, **options))


@pytest.mark.parametrize("name", bundled_names())
def test_the_prediction_is_what_is_measured(name):
    """Within a tenth, as it is meant to be; the modulations of all of UniWorld's steps are made at once."""
    model = unimm.load(name)
    (plan,) = plan_inference(name, batch=2)
    assert plan.weights == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert plan.n_parameters == sum(p.numel() for p in model.parameters())
    steps = None if name.startswith("uniworld") or not model.supports_steps else 2
    measured = measured_peak(model, batch=2, size=None, steps=steps)
    assert plan.total - plan.weights == pytest.approx(measured, rel=0.1)
    assert plan.kv_cache > 0


def wide_bagel(*, values: bool) -> Bagel:
    """A BAGEL of the released widths, one layer and few words, with bagel-nano's tokenizer."""
    config = BagelConfig.from_json(
        LLM | dict(num_hidden_layers=1, vocab_size=1024), VIT | dict(num_hidden_layers=2), {}
    )
    with torch.device("meta"):
        model = Bagel(config)
    model.tokenizer = Bagel.from_pretrained("bagel-nano").tokenizer
    if values:
        model = model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_()
    return model.eval()


@pytest.mark.nightly
@pytest.mark.parametrize("size", [(256, 256), (512, 512)])
def test_the_prediction_at_released_widths_is_what_is_measured(size):
    with without_values():
        plan = plan_model(wide_bagel(values=False), name="wide", dtype="float32", device_type="cpu", size=size, batch=1)
    model = wide_bagel(values=True)
    assert plan.weights == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    measured = measured_peak(model, batch=1, size=size, steps=2)
    assert plan.total - plan.weights == pytest.approx(measured, rel=0.1)


def test_what_a_plan_depends_on():
    one, two = (plan_inference("bagel-nano", batch=n)[0] for n in (1, 2))
    assert one.weights == two.weights and two.kv_cache == 2 * one.kv_cache and two.step > 1.5 * one.step
    (half,) = plan_inference("bagel-nano", dtype="bfloat16")
    assert half.kv_cache == one.kv_cache / 2 and half.weights < one.weights
    # the autoencoder stays in float32
    assert half.weights > one.weights / 2
    (small,) = plan_inference("bagel-nano", size=(32, 48))
    assert small.size == (32, 48) and small.step < one.step and small.decode < one.decode
    assert json.loads(json.dumps(one.to_json()))["total"] == one.total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "got a batch of 0: expected at least 1"),
        ({"device_type": "tpu"}, "got the device 'tpu': expected cpu or cuda"),
        ({"dtype": "int3"}, "got dtype 'int3'"),
        ({"size": (63, 64)}, "63"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        plan_inference("bagel-nano", **options)


def test_weights_that_do_not_fit_together_are_refused_before_any_is_read(monkeypatch):
    asked = []
    monkeypatch.setattr(fitting, "check_memory", lambda needed, device: asked.append((needed, str(device))))
    model = Bagel.from_pretrained("bagel-nano")
    ae = sum(x.nbytes for x in model.vae.state_dict().values())
    rest = sum(x.nbytes for x in model.state_dict().values()) - ae
    Bagel.from_pretrained("bagel-nano", dtype="bfloat16")
    # both files of a model in float32; in bfloat16, which the larger one has, the autoencoder's float16 alone is changed
    assert asked == [(rest + ae, "cpu"), (ae, "cpu")]

    def refuse(needed, device):
        raise MemoryError(f"the weights need {needed}")

    monkeypatch.setattr(fitting, "check_memory", refuse)
    monkeypatch.setattr("unimm.models.base.load_weights", lambda *args, **options: pytest.fail("nothing is read"))
    with pytest.raises(MemoryError, match=f"the weights need {rest + ae}"):
        Bagel.from_pretrained("bagel-nano")


# ---- the command


def run(*args):
    return CliRunner().invoke(app, ["plan", *map(str, args)], env={"COLUMNS": "80"})


def test_the_command_says_what_fits_and_how():
    found = json.loads(run("bagel-nano", "--device", "cpu", "--memory", "33MB", "--json").stdout)
    full, half, *few = found["plans"]
    assert [plan["quantize"] for plan in few] == ["int8", "int4"]
    assert full["total"] > 33e6 > half["total"] and found["flags"] == "--dtype bfloat16 --device cpu"
    shown = run("bagel-nano", "--device", "cpu", "--memory", "33MB").stdout
    assert "It fits with --dtype bfloat16 --device cpu." in shown and "KV cache" in shown and " MiB" in shown
    few = f"{few[0]['total']}"
    assert (
        "--dtype bfloat16 --device cpu --quantize int8." in run("bagel-nano", "--device", "cpu", "--memory", few).stdout
    )
    assert "It does not fit" in run("bagel-nano", "--memory", "1MB", "--dtype", "bfloat16").stdout


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weights_in_few_bits_are_predicted(quantize):
    plans = {plan.quantize: plan for plan in plan_inference("uniworld-nano", ways=True)}
    model = unimm.load("uniworld-nano", quantize=quantize)
    parts = [part for part in model.modules() if isinstance(part, QuantizedLinear)]
    rounded = sum(part.format.BYTES_PER_WEIGHT * part.in_features * part.out_features for part in parts)
    kept = sum(x.nbytes for x in {id(x): x for x in (*model.parameters(), *model.buffers())}.values())
    # groups of 32, and scales of rows, take a little more than is counted
    assert plans[quantize].weights == pytest.approx(kept + rounded, rel=1e-3)
    assert plans[quantize].step == plans[None].step


def test_streamed_blocks_are_predicted():
    plans = plan_inference("bagel-nano", device_type="cuda", ways=True)
    whole, streamed = plans[0], next(plan for plan in plans if plan.offload)
    blocks = unimm.load("bagel-nano").decoder.blocks
    n_bytes = sum(p.nbytes for p in blocks.parameters())
    assert streamed.weights == whole.weights - n_bytes * (len(blocks) - 2) // len(blocks)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "got neither a model nor --train"),
        (("bagel-nano", "--train", "bagel-nano-finetune"), "got both a model and --train"),
        (("--train", "bagel-nano-finetune", "--memory", "1GB"), "the recipe says these"),
        (("bagel-nano", "--set", "a=1"), "got --set or --gpus for a model"),
        (("bagel-nano", "--memory", "much"), "got --memory 'much'"),
        (("bagle-nano",), "the nearest are bagel-nano"),
    ],
)
def test_what_the_command_refuses(args, message):
    result = run(*args)
    assert result.exit_code == 2 and message in result.stderr


def test_memory_in_words():
    assert [parse_memory(text) for text in ("24GB", "80 GiB", "1.5kb", "7")] == [24 * 10**9, 80 * 2**30, 1500, 7]


def test_a_repository_that_no_family_knows_is_planned_by_its_headers(monkeypatch, tmp_path):
    monkeypatch.setattr("unimm.checkpoint.hub._download", lambda *args, **options: tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    monkeypatch.setattr(memory, "hub_weights", lambda name: {"BF16": 1000, "F32": 24})
    found = json.loads(run("owner/name", "--json").stdout)
    assert [plan["total"] for plan in found["plans"]] == [4096, 2048]
    assert found["plans"][0]["files"] == {"BF16": 1000, "F32": 24}
    assert "what is computed beside the weights is not predicted" in " ".join(run("owner/name").stdout.split())
