"""Train the captioners that ship with the package, from scratch, on rendered scenes of two objects.

    python data_scripts/train_captioners.py tiny-vit-gpt2 --work DIR    captions
    python data_scripts/train_captioners.py tiny-blip2 --work DIR       questions and captions; its tower starts from the first one's

One thread is enough (OMP_NUM_THREADS=1). A killed run goes on from its last state when the same command is given again:
every batch depends on (seed, step) alone. Ends with robustvlm_lite/assets/captioner/<model>.{safetensors,card.json} and the
checksum in <model>.json. Scenes of training, validation and test come from generators of different keys.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from muon import Muon
from safetensors.torch import save_file
from tqdm import tqdm

from robustvlm_lite.captioner import Captioner, cross_entropy, load_captioner, new_captioner
from robustvlm_lite.captioner.loading import BUNDLED, config_file
from robustvlm_lite.runtime import generator, sha256, versions
from robustvlm_lite.scenes.duo import KINDS, DuoScenes, ask, sample_duos, slots_right
from robustvlm_lite.stats import wilson

# ViT's names of the weights of one layer, by BLIP-2's names
BLOCK = {
    "self_attn.qkv": "attention.q_proj attention.k_proj attention.v_proj",
    "self_attn.projection": "attention.o_proj",
    "layer_norm1": "layernorm_before",
    "layer_norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
STEPS = {"tiny-vit-gpt2": 7000, "tiny-blip2": 3500}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    model: str = "tiny-vit-gpt2"
    steps: int = 0  # 0: what the model shipped with, 7000 for tiny-vit-gpt2 and 3500 for tiny-blip2
    batch: int = 64  # pictures
    seed: int = 0
    scenes: int = 60000  # drawn once; a step takes some of them
    lr_muon: float = 0.01  # matrices of the inner layers
    lr_adamw: float = 0.0015  # the rest
    warmup: int = 100
    clip_norm: float = 1.0
    validate_every: int = 500


class Run:
    """A captioner in training, its optimizers, and how far they have come."""

    def __init__(self, recipe: Recipe, work: Path):
        self.recipe, self.work = recipe, work
        self.captioner = new_captioner(recipe.model, recipe.seed)
        if recipe.model == "tiny-blip2":
            copy_tower(load_captioner("tiny-vit-gpt2"), self.captioner)
        named = list(self.captioner.model.named_parameters())
        inner = [(n, p) for n, p in named if p.ndim == 2 and "layer" in n and n.endswith("weight")]
        rest = [p for n, p in named if n not in {n for n, _ in inner}]
        self.params = [p for _, p in named]
        self.muon = Muon(inner, lr=recipe.lr_muon)
        self.adamw = torch.optim.AdamW(rest, lr=recipe.lr_adamw, betas=(0.9, 0.98))
        self.step, self.spent, self.began, self.curve = 0, 0.0, time.monotonic(), []
        if (work / "state.pt").exists():
            state = torch.load(work / "state.pt", weights_only=True)
            self.captioner.model.load_state_dict(state["model"])
            self.muon.load_state_dict(state["muon"])
            self.adamw.load_state_dict(state["adamw"])
            self.step, self.spent, self.curve = state["step"], state["seconds"], state["curve"]
        self.scenes = sample_duos(recipe.scenes, generator(recipe.seed, "train"))

    def save(self) -> None:
        state = {"model": self.captioner.model.state_dict(), "muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}
        state |= {"step": self.step, "seconds": self.spent + time.monotonic() - self.began, "curve": self.curve}
        torch.save(state, self.work / "state.part")
        os.replace(self.work / "state.part", self.work / "state.pt")

    def take_step(self) -> float:
        recipe, drawn = self.recipe, generator(self.recipe.seed, self.step)
        rate = min((self.step + 1) / recipe.warmup, 1 - self.step / recipe.steps)
        for optimizer, lr in ((self.muon, recipe.lr_muon), (self.adamw, recipe.lr_adamw)):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
        chosen = torch.randint(len(self.scenes), (recipe.batch,), generator=drawn)
        part = DuoScenes(self.scenes.images[chosen], tuple(self.scenes.duos[i] for i in chosen))
        loss = sum(losses(self.captioner, part, drawn))
        self.captioner.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, recipe.clip_norm)
        self.muon.step()
        self.adamw.step()
        self.step += 1
        return loss.item()


def losses(captioner: Captioner, scenes: DuoScenes, drawn: torch.Generator) -> Iterator[torch.Tensor]:
    """Cross-entropy of the captions and, for a model that answers, of four questions a picture."""
    if captioner.name == "tiny-vit-gpt2":
        yield captioner.token_loss(scenes.pixels(), scenes.captions())
        return
    seen = captioner.seen(scenes.pixels())
    yield cross_entropy(*captioner.logits_of(seen, scenes.captions()))
    asked = [qa for kind in KINDS for qa in ask(scenes.duos, [kind] * len(scenes), drawn)]
    questions, answers = zip(*asked, strict=True)
    yield cross_entropy(*captioner.logits_of(seen.repeat(len(KINDS), 1, 1), answers, questions))


@torch.no_grad()
def copy_tower(source: Captioner, target: Captioner) -> None:
    """The ViT of ViT-GPT2 as the tower of BLIP-2; transformers' two classes name the same weights otherwise."""
    old = source.model.encoder.state_dict()
    renamed = {
        "embeddings.class_embedding": old["embeddings.cls_token"],
        "embeddings.position_embedding": old["embeddings.position_embeddings"],
        "embeddings.patch_embedding.weight": old["embeddings.patch_embeddings.projection.weight"],
        "embeddings.patch_embedding.bias": old["embeddings.patch_embeddings.projection.bias"],
        "post_layernorm.weight": old["layernorm.weight"],
        "post_layernorm.bias": old["layernorm.bias"],
    }
    for layer in {name.split(".")[1] for name in old if name.startswith("layers.")}:
        for new_name, old_name in BLOCK.items():
            for kind in ("weight", "bias"):
                parts = [old[f"layers.{layer}.{part}.{kind}"] for part in old_name.split()]
                renamed[f"encoder.layers.{layer}.{new_name}.{kind}"] = torch.cat(parts)
    target.model.vision_model.load_state_dict(renamed)


def right(captioner: Captioner, key: str, n: int) -> dict[str, list[float]]:
    """Per fresh scene: is the caption right in every slot, and, for a model that answers, is the answer to one question."""
    scenes, drawn = sample_duos(n, generator(key)), generator(key, "questions")
    parts = torch.arange(n).split(100)
    said = [text for part in parts for text in captioner.generate(scenes.pixels()[part])]
    result = {"caption": slots_right(said, scenes.duos).all(1).float().tolist()}
    if captioner.name == "tiny-blip2":
        kinds = [KINDS[i % len(KINDS)] for i in range(n)]
        questions, answers = zip(*ask(scenes.duos, kinds, drawn), strict=True)
        said = [text for p in parts for text in captioner.generate(scenes.pixels()[p], [questions[i] for i in p], max_new_tokens=3)]
        result["answer"] = [float(a == b) for a, b in zip(said, answers, strict=True)]
    return result


def export(run: Run) -> None:
    """Half precision weights, their checksum, and a card of what made them and what they can."""
    name, path = run.recipe.model, config_file(run.recipe.model)
    weights = path.with_suffix(".safetensors")
    state = {k: v.half().contiguous() for k, v in run.captioner.model.state_dict().items() if not k.endswith("lm_head.weight")}
    save_file(state, weights)
    facts = json.loads(path.read_text()) | {"weights_sha256": sha256(weights)}
    path.write_text(json.dumps(facts, indent=1) + "\n")
    hits = right(load_captioner(name), "test", 2000)
    test = {task: {"n": len(v), "accuracy": sum(v) / len(v), "ci95": wilson(int(sum(v)), len(v))} for task, v in hits.items()}
    card = {
        "recipe": asdict(run.recipe),
        "weights_sha256": facts["weights_sha256"],
        "parameters": sum(p.numel() for p in run.params),
        "wall_s": round(run.spent + time.monotonic() - run.began),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": versions(),
        "validation_curve": run.curve,
        "test": test,
    }
    path.with_suffix(".card.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=BUNDLED)
    parser.add_argument("--work", type=Path, required=True, help="folder for the state of the run")
    for field in fields(Recipe):
        if field.name != "model":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    work = args.pop("work")
    work.mkdir(parents=True, exist_ok=True)
    args["steps"] = args["steps"] or STEPS[args["model"]]
    run = Run(Recipe(**args), work)
    bar = tqdm(initial=run.step, total=run.recipe.steps, desc=run.recipe.model, mininterval=10)
    while run.step < run.recipe.steps:
        loss = run.take_step()
        bar.update()
        if run.step % run.recipe.validate_every == 0:
            scores = {task: round(sum(v) / len(v), 4) for task, v in right(run.captioner, "validation", 500).items()}
            run.curve.append({"step": run.step, "loss": round(loss, 4)} | scores)
            print(json.dumps(run.curve[-1]), flush=True)
            run.save()
    export(run)


if __name__ == "__main__":
    main()
