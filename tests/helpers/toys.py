"""Small random models for the tests, a tokenizer of whole words, and one of bytes in the released format."""

import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from unimm.generation.text_sampling import TextSampling
from unimm.models.bagel.config import BagelConfig
from unimm.models.bagel.model import Bagel
from unimm.models.bagel.processor import BagelSpecialTokens
from unimm.models.common.deepseek_processor import IMAGE_PLACEHOLDER, ROLES
from unimm.models.common.deepseek_processor import JanusSpecialTokens as JanusMarkers
from unimm.models.janus.model import Janus
from unimm.processing.chat_templates import DEFAULT_SYSTEM_PROMPT

LLM = dict(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=80,
    vocab_size=96,
    max_position_embeddings=256,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    hidden_act="silu",
)
VIT = dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, patch_size=8, image_size=64
)
TOP = dict(
    latent_patch_size=2,
    max_latent_size=8,
    vit_max_num_patch_per_side=8,
    vae_config=dict(ch=32, ch_mult=[1, 1, 1], num_res_blocks=1, z_channels=3, scale_factor=0.7, shift_factor=0.1),
    vae_transform=dict(max_image_size=48, min_image_size=16, image_stride=8),
    vit_transform=dict(max_image_size=48, min_image_size=16, image_stride=8),
    generation=dict(
        steps=4,
        shift=2.0,
        size=[24, 32],
        think_tokens=6,
        think_draw="think then draw",
        think_answer="think",
    ),
)


class Words:
    """Every word has an id by its letters; special tokens have the last four."""

    def __init__(self, vocab: int):
        self.vocab = vocab

    def encode(self, text: str) -> list[int]:
        return [sum(map(ord, word)) % (self.vocab - 4) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {i}" for i in ids)

    def token_id(self, token: str) -> int | None:
        names = list(BagelSpecialTokens.TOKENS.values())
        return self.vocab - 4 + names.index(token) if token in names else None

    def save(self, folder) -> None:
        pass


def toy(seed: int = 0, *, llm: dict | None = None, vit: dict | None = None, top: dict | None = None) -> Bagel:
    """A random Bagel of two layers; the arguments change numbers of its released files."""
    torch.manual_seed(seed)
    model = Bagel(BagelConfig.from_json(LLM | (llm or {}), VIT | (vit or {}), copy.deepcopy(TOP) | (top or {})))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("decoder") and parameter.ndim == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)  # larger than usual, so that differences show
    model.tokenizer = Words(model.config.decoder.vocab_size)
    return model.eval()


def picture(width: int = 30, height: int = 22, seed: int = 0) -> Image.Image:
    """An image of noise."""
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# ---- Janus, in files of the original layout

JANUS: dict[str, dict] = {
    "language_config": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=352,
        max_position_embeddings=512,
    ),
    "vision_config": dict(image_size=24, model_name="siglip_toy", width=24, layers=2, heads=3, patch_size=8, mlp_ratio=2.0),
    "aligner_config": dict(projector_type="mlp_gelu", depth=2, input_dim=24, n_embed=32),
    "gen_vision_config": dict(image_token_size=64, n_embed=8, ch=32, ch_mult=[1, 1, 1], num_res_blocks=1, z_channels=16),
    "gen_aligner_config": dict(projector_type="mlp_gelu", depth=2, input_dim=8, n_embed=32),
    "gen_head_config": dict(image_token_embed=32, image_token_size=64, n_embed=32),
}  # fmt: skip


def janus_files(*, generation: dict | None = None, **changes: dict) -> dict:
    """The config.json of a small Janus: 9 patches of 8 pixels seen, 6 x 6 codes of 4 pixels drawn. changes: by
    section."""
    files = {
        name: numbers | changes.get(name, {})
        if name == "language_config"
        else {"params": numbers | changes.get(name, {})}
        for name, numbers in copy.deepcopy(JANUS).items()
    }
    files["gen_vision_config"]["cls"] = "VQ-16"
    return {"model_type": "multi_modality", **files, **({"generation": generation} if generation else {})}


def janus(
    folder: Path, seed: int = 0, *, roles: bool | None = True, generation: dict | None = None, **changes: dict
) -> Path:
    """A random Janus, saved into a folder in the original layout. roles: as in `byte_tokenizer`; None for no
    tokenizer."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(janus_files(generation=generation, **changes)))
    if roles is not None:
        byte_tokenizer(folder, roles=roles, seed=seed)
    model = Janus.from_folder(folder)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("pos_embed"):
                x.normal_()
            elif name.startswith(("decoder", "gen_head")) and x.ndim == 2:
                x.normal_(std=2 * x.shape[1] ** -0.5)  # larger than usual, so that differences show
    model.save_pretrained(folder)
    return folder


def byte_tokenizer(
    folder: Path, *, roles: bool = True, seed: int = 0, lacks: Sequence[str] = (), plain: Sequence[str] = ()
) -> None:
    """Write a tokenizer.json as DeepSeek's: bytes, some pairs of them merged, and the special tokens.

    roles: those of Janus-Pro are tokens. seed: the order of the special ids. lacks: special tokens that are left out;
    plain: those that the file does not call special.
    """
    inner = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"[\r\n]|\s?\p{L}+|\s?\p{P}+"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=letters, show_progress=False)
    inner.train_from_iterator([DEFAULT_SYSTEM_PROMPT], trainer)
    known = [*JanusMarkers.TOKENS.values(), IMAGE_PLACEHOLDER, *(ROLES if roles else ())]
    tokens = [token for token in known if token not in lacks]
    random.Random(seed).shuffle(tokens)
    inner.add_tokens([AddedToken(token, special=token not in plain, normalized=False) for token in tokens])
    inner.save(str(folder / "tokenizer.json"))


def user(content: str, *images) -> dict:
    """What a user says, with images."""
    return {"role": "user", "content": content, "images": list(images)}


# of the original's files alone: nothing reads it
UNREAD = ("vision.trunk.attn_pool.", "vq.quantize.codebook_used")


def differences(a: torch.nn.Module, b: torch.nn.Module) -> list[str]:
    """Names of what the two do not share, bit by bit."""
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    return [key for key in x if not torch.equal(x[key], y[key]) or x[key].dtype != y[key].dtype]


def made(model: Janus) -> tuple[list[str], list[bytes]]:
    """What a model says and draws."""
    sampling = TextSampling(max_tokens=5, temperature=1.0)
    texts = model.understand([picture(), None], ["what is it?", "who?"], text_sampling=sampling)
    return texts, [image.tobytes() for image in model.generate(["a cat", "b"], images=[picture(), None]).images]
