"""A small random BAGEL that trains on records, for recipes of the tests: `task: helpers.bagel_record_toys:ToyBagelTask`."""

from helpers.toys import toy
from unimm.training.config import from_mapping
from unimm.training.freezing import freeze
from unimm.training.tasks.bagel_records import BagelRecordConfig, BagelRecordTask
from unimm.training.tasks.bagel_samples import BagelSampleBuilder

NUMBERS = dict(
    task="helpers.bagel_record_toys:ToyBagelTask", seed=3, steps=6, batch_size=1, lr=1e-3, betas=[0.9, 0.95], eps=1e-8,
    weight_decay=0.0, muon=[], warmup_steps=0, schedule="constant", min_lr_ratio=1.0, max_grad_norm=1.0, ema_decay=0.9,
    precision="float32", loss_weights={"ce": 0.25, "mse": 1.0}, save_every=2, sample_every=100, log_every=1,
    packing={"expected_tokens": 180, "max_tokens": 190, "max_tokens_per_sample": 180, "buffer_size": 3},
    options=dict(
        timesteps_per_image=1, timestep_shift=1.0, think_prob=1.0, dropout={"text": 0.1, "vae": 0.3, "vit": 0.3},
        frozen=["vision."], compile=False,
    ),
)  # fmt: skip


class ToyBagelTask(BagelRecordTask):
    """BAGEL on records, from random weights."""

    @classmethod
    def from_recipe(cls, recipe):
        options = from_mapping(BagelRecordConfig, recipe.options, where="options")
        model = toy(**recipe.model)
        freeze(model, options.frozen, always=("vae.",))
        return cls(model, builder_of(model, options), options.sample_prompts)


def builder_of(model, options):
    """The sample builder of a model."""
    return BagelSampleBuilder(
        options=options, config=model.config, processor=model.processor, tokenizer=model.text_tokenizer
    )


def recipe_numbers(data, **changes):
    """A recipe on the example datasets of a folder (examples/data/make.py)."""
    groups = {
        "t2i": {"paths": [str(data["bagel-t2i"])], "mandatory": True},
        "edit": {"paths": [str(data["bagel-edit"])], "weight": 2.0},
        "vlm": {"paths": [str(data["bagel-vlm"])]},
    }
    return NUMBERS | {"data": {"groups": groups, "lanes": 2}} | changes
