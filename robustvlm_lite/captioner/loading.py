"""A captioner by name: the two that ship with the package, or a published one by hub name or local folder.

transformers is imported when a captioner is built, not before: no other chapter pays for it.
"""

import json
from pathlib import Path

import torch

from ..runtime import UserError, asset, near_miss, resolve_device, sha256
from .blip2 import Blip2
from .contract import Captioner
from .vit_gpt2 import ViTGPT2
from .words import Bytes, Published, Words

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VIT_GPT2, BLIP2 = "nlpconnect/vit-gpt2-image-captioning", "Salesforce/blip2-opt-2.7b"
BUNDLED = ("tiny-vit-gpt2", "tiny-blip2")
# What transformers' own defaults do not say of BLIP-2 OPT 2.7b
OPT_2_7B = {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}


def load_captioner(name: str = "tiny-vit-gpt2", *, weights: str = "", seed: int = 0, device: str = "") -> Captioner:
    """A captioner in evaluation mode with frozen parameters.

    name: "tiny-vit-gpt2" or "tiny-blip2" (bundled), "nlpconnect/vit-gpt2-image-captioning" or "Salesforce/blip2-opt-2.7b".
    weights: empty for the bundled or the hub's; a local folder of the same form; "random" for seeded random ones in full size.
    """
    known = (*BUNDLED, VIT_GPT2, BLIP2)
    if name not in known:
        raise UserError(f"unknown captioner {name!r}; {near_miss(name, known)}")
    if name in BUNDLED:
        made = _bundled(name, weights, seed)
    elif weights == "random":
        made = _random_full(name, seed)
    else:
        made = _published(name, weights)
    return made.eval().requires_grad_(False).to(resolve_device(device))


def new_captioner(name: str, seed: int = 0) -> Captioner:
    """A bundled architecture with seeded random weights, all of them trainable.

    BLIP-2's class starts its queries at zero, where they all see the same and stay alike; here they start at N(0, 1).
    """
    facts = json.loads(config_file(name).read_text(encoding="utf-8"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "tiny-vit-gpt2":
            made = ViTGPT2(_vit_gpt2(**facts["config"]), Words(facts["words"]), 64, HALF, HALF, facts["max_tokens"], name)
        else:
            made = Blip2(_blip2(facts["config"]), Words(facts["words"]), 64, CLIP_MEAN, CLIP_STD, facts["max_tokens"], name)
    made.weights_sha256 = f"random-{seed}"
    return made


def config_file(name: str) -> Path:
    """Where the shapes and words of a bundled captioner stand; its weights lie beside it."""
    return asset("captioner", f"{name}.json")


def _bundled(name: str, weights: str, seed: int) -> Captioner:
    from safetensors.torch import load_file

    made = new_captioner(name, seed)
    if weights == "random":
        return made
    path = Path(weights) if weights else config_file(name).with_suffix(".safetensors")
    if not path.is_file():
        raise UserError(f"expected the weights of {name} at {path}, there is no such file; restore or train it (make captioners)")
    digest, wanted = sha256(path), json.loads(config_file(name).read_text(encoding="utf-8")).get("weights_sha256")
    if not weights and digest != wanted:
        raise UserError(f"expected {path.name} with SHA-256 {str(wanted)[:12]}…, got {digest[:12]}…; restore the file")
    state, own = {k: v.float() for k, v in load_file(path).items()}, made.model.state_dict()
    wanted = {k: v.shape for k, v in own.items() if not k.endswith("lm_head.weight")}  # which is the word embedding again
    stored = {k: v.shape for k, v in state.items()}
    if odd := sorted(dict(wanted.items() ^ stored.items())):
        raise UserError(f"expected the tensors of {name} in {path.name}, {odd[0]} is missing, unknown or of another shape; train it again")
    made.model.load_state_dict(state, strict=False)
    made.weights_sha256 = digest
    return made


def _vit_gpt2(encoder: dict, decoder: dict):
    from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel

    vit = ViTModel(ViTConfig(**encoder), add_pooling_layer=False)
    gpt2 = GPT2LMHeadModel(GPT2Config(**decoder, add_cross_attention=True, is_decoder=True))
    return VisionEncoderDecoderModel(encoder=vit, decoder=gpt2)


def _blip2(config: dict):
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration(Blip2Config(**config))
    torch.nn.init.normal_(model.query_tokens)
    return model


def _random_full(name: str, seed: int) -> Captioner:
    """The published shapes with random weights: every call works and nothing is known."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == VIT_GPT2:
            made = ViTGPT2(_vit_gpt2({}, {}), Bytes(50257), 224, HALF, HALF, 1024, name)
        else:
            made = Blip2(_blip2({"text_config": {"model_type": "opt", **OPT_2_7B}}), Bytes(50272), 224, CLIP_MEAN, CLIP_STD, 2048, name)
    made.weights_sha256 = f"random-{seed}"
    return made


def _published(name: str, folder: str) -> Captioner:
    from transformers import AutoTokenizer, Blip2ForConditionalGeneration, VisionEncoderDecoderModel

    if folder and not Path(folder).is_dir():
        raise UserError(f"expected a folder with the files of {name} at {folder}, there is none; fetch it from the hub, or weights=random")
    kind = VisionEncoderDecoderModel if name == VIT_GPT2 else Blip2ForConditionalGeneration
    try:
        model, tokenizer = kind.from_pretrained(folder or name), AutoTokenizer.from_pretrained(folder or name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:100]
        place = folder or "the hub"
        raise UserError(f"expected the files of {name} at {place} ({reason}); pass weights=FOLDER or weights=random") from None
    config = model.config
    if name == VIT_GPT2:
        end = tokenizer.eos_token_id  # GPT-2 has one special token: it starts, ends and fills up
        words = Published(tokenizer, start=end, eos=end)
        made = ViTGPT2(model, words, config.encoder.image_size, HALF, HALF, config.decoder.n_positions, name)
    else:
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]  # ends an answer in LAVIS
        words = Published(tokenizer, start=tokenizer.bos_token_id, eos=newline)
        side, positions = config.vision_config.image_size, config.text_config.max_position_embeddings
        made = Blip2(model, words, side, CLIP_MEAN, CLIP_STD, positions, name)
        made.asks = "Question: {} Answer:"
    files = sorted(Path(folder).glob("*.safetensors")) if folder else []
    made.weights_sha256 = sha256(files[0]) if files else "hub"
    return made
