"""Train a bundled CLIP from scratch on the image packs and the rendered world.

    python data_scripts/pretrain_clip.py --model nano --data-root DIR --work DIR

Two processes of one thread each, gradients averaged over gloo, are faster on two cores than one process of two threads;
on a GPU pass --procs 1 --batch 256 --device cuda (a batch is each process's). A killed run goes on from its last state when the
same command is given again:
every batch depends on (seed, step, rank) alone. Writes WORK/log.jsonl, WORK/state.pt and, at the end, the half
precision WORK/<model>.safetensors with WORK/recipe.json. `data_scripts/clip_card.py` then measures it.
"""

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from contrastive import contrastive_loss, image_features, make_model
from grow_clip import grow
from mixture import Mixture
from muon import Muon
from safetensors.torch import save_file
from tqdm import tqdm

from robustvlm_lite import transformer
from robustvlm_lite.clip import autocast, load_clip
from robustvlm_lite.clip.registry import card_file
from robustvlm_lite.runtime import eval_mode, sha256, versions


@dataclass
class Recipe:
    """Everything that decides the weights; what was tried before: robustvlm_lite/assets/clip/notes.yml."""

    model: str = "nano"
    start: str = ""  # bundled model that it goes on from, or grows from where it is wider (grow_clip.py); empty: from scratch
    steps: int = 36000
    batch: int = 128  # per process
    procs: int = 2
    seed: int = 0
    rendered: float = 0.16  # share of rendered scenes in a batch
    # image side and its share of the steps: tokens are short at first
    sizes: tuple = ((32, 0.36), (48, 0.34), (64, 0.30))
    lr_muon: float = 0.015  # matrices and kernels of the inner layers
    lr_adamw: float = 0.002  # the rest
    # What was tried, and why 0.05 although a short trial prefers more: robustvlm_lite/assets/clip/notes.yml, chapter 10.
    weight_decay_muon: float = 0.05
    weight_decay: float = 0.05
    warmup: int = 80
    clip_norm: float = 1.0
    ema: float = 0.995
    save_every: int = 250  # steps; a killed run repeats at most so many
    device: str = "cpu"


def size_at(recipe: Recipe, step: int) -> int:
    done = 0.0
    for size, share in recipe.sizes:
        done += share
        if step < done * recipe.steps - 1e-6:
            return size
    return recipe.sizes[-1][0]


def optimizers(model, recipe: Recipe):
    """Muon for the matrices inside the towers, AdamW for the ends of both, gains and biases."""
    inner = ("resblocks", "visual.layer")  # an attention pool stays outside: its wide matrices cost Muon more than all others
    named = [(n, p) for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1]
    blocks = [(n, p) for n, p in named if any(room in n for room in inner)]
    chosen = {n for n, _ in blocks}
    decay = [p for n, p in model.named_parameters() if n not in chosen and p.ndim >= 2]
    plain = [p for n, p in model.named_parameters() if n not in chosen and p.ndim < 2]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return Muon(blocks, lr=recipe.lr_muon, weight_decay=recipe.weight_decay_muon), torch.optim.AdamW(
        groups, lr=recipe.lr_adamw, betas=(0.9, 0.98), fused=True
    )


def average_gradients(params, world: int) -> None:
    if world == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    flat /= world
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad.copy_(part.view_as(p))


@torch.no_grad()
def validation_accuracy(model, tokenizer, mixture: Mixture, device, n: int = 300) -> dict[str, float]:
    """Zero-shot accuracy on training rows that were held back; test splits are never looked at here. model: in eval mode."""
    result = {}
    for pack in mixture.packs:
        index = pack.validation[:n]
        x = torch.from_numpy(pack.images[index.numpy()]).to(device).float() / 255
        x = F.interpolate(x, size=(64, 64), mode="bilinear") if x.shape[-1] != 64 else x
        text = transformer.text_features(model, tokenizer([f"a photo of a {c}." for c in pack.class_names]).to(device))
        prediction = (image_features(model, x) @ F.normalize(text, dim=-1).T).argmax(-1)
        result[pack.name] = round(float((prediction.cpu() == pack.labels[index]).float().mean()), 4)
    return result


class Pretraining:
    """One process of a run: model, optimizers, moving average, and how far they have come. `take_step` moves them on."""

    def __init__(self, recipe: Recipe, data_root: Path, work: Path, rank: int):
        self.recipe, self.work, self.rank, self.device = recipe, work, rank, torch.device(recipe.device)
        torch.manual_seed(recipe.seed)
        self.model, self.tokenizer = make_model(recipe.model)
        if recipe.start:
            old = load_clip(recipe.start).model
            self.model = old.requires_grad_() if recipe.start == recipe.model else grow(old, self.model)
        self.model = self.model.to(self.device).train()
        self.mixture = Mixture(data_root, work / "cache", recipe.rendered)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.muon, self.adamw = optimizers(self.model, recipe)
        # Of the weights and of the batch norms' statistics, which belong to them.
        self.ema = {k: v.clone() for k, v in self.model.state_dict().items() if v.is_floating_point()}
        self.step, self.spent, self.began = 0, 0.0, time.monotonic()
        if (work / "state.pt").exists():
            self.resume()

    @property
    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.began

    def resume(self) -> None:
        state = torch.load(self.work / "state.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"], strict=False)
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.ema, self.step, self.spent = state["ema"], state["step"], state["seconds"]

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}
        state |= {"ema": self.ema, "step": self.step, "seconds": self.seconds}
        torch.save(state, self.work / "state.part")
        os.replace(self.work / "state.part", self.work / "state.pt")

    def take_step(self) -> float:
        """One batch through the loss and both optimizers; returns the loss."""
        recipe, step = self.recipe, self.step
        rate = min((step + 1) / recipe.warmup, 1 - step / recipe.steps)
        for optimizer, lr in ((self.muon, recipe.lr_muon), (self.adamw, recipe.lr_adamw)):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
        batch = self.mixture.batch(size_at(recipe, step), recipe.batch, recipe.seed, step, self.rank)
        with autocast(self.device, torch.bfloat16):
            loss = contrastive_loss(self.model, self.tokenizer, batch, self.device)
        for p in self.params:
            p.grad = None
        loss.backward()
        if not torch.isfinite(loss):
            raise SystemExit(
                f"the loss is {loss.item()} at step {step}; lower the learning rates and resume from {self.work}"
            )
        average_gradients(self.params, recipe.procs)
        torch.nn.utils.clip_grad_norm_(self.params, recipe.clip_norm)
        self.muon.step()
        self.adamw.step()
        with torch.no_grad():
            own = self.model.state_dict()
            for k, v in self.ema.items():
                v.lerp_(own[k], 1 - min(recipe.ema, (step + 1) / (step + 10)))
        self.step += 1
        return loss.item()

    def log(self, loss: float, validate: bool) -> None:
        line = {"step": self.step, "loss": round(loss, 4), "size": size_at(self.recipe, self.step - 1)}
        line["seconds"] = round(self.seconds, 1)
        if validate:
            own = {k: v.clone() for k, v in self.model.state_dict().items()}
            self.model.load_state_dict(self.ema, strict=False)
            with eval_mode(self.model):
                line["validation"] = validation_accuracy(self.model, self.tokenizer, self.mixture, self.device)
            self.model.load_state_dict(own)
        with open(self.work / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")


def trim_log(path: Path, step: int) -> None:
    """Forget what a killed run logged after its last save, at `step`: those steps come again."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    path.with_suffix(".part").write_text("".join(kept))
    os.replace(path.with_suffix(".part"), path)


def train(rank: int, recipe: Recipe, data_root: Path, work: Path) -> None:
    if recipe.procs > 1:
        torch.set_num_threads(1)
        meeting, wait = f"file://{work}/rendezvous", timedelta(minutes=10)
        dist.init_process_group("gloo", meeting, timeout=wait, rank=rank, world_size=recipe.procs)
    run, first = Pretraining(recipe, data_root, work, rank), rank == 0
    if first:
        trim_log(work / "log.jsonl", run.step)
    bar = tqdm(initial=run.step, total=recipe.steps, desc=recipe.model, disable=not first, mininterval=10)
    while run.step < recipe.steps:
        loss = run.take_step()
        bar.update()
        last = run.step == recipe.steps
        if first and (run.step % 50 == 0 or last):
            run.log(loss, validate=run.step % 1000 == 0 or last)
            bar.set_postfix(loss=round(loss, 3))
        if first and (run.step % recipe.save_every == 0 or last):
            run.save()
    if first:
        export(run)
    if recipe.procs > 1:
        dist.barrier()
        dist.destroy_process_group()


def export(run: Pretraining) -> None:
    """The averaged weights in half precision, and what made them."""
    recipe, work = run.recipe, run.work
    weights = work / f"{recipe.model}.safetensors"
    save_file({k: v.half().contiguous().cpu() for k, v in run.ema.items()}, weights, metadata={"model": recipe.model})
    on_cpu = recipe.device == "cpu"
    curve = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    made = {
        "recipe": asdict(recipe),
        "images_seen": recipe.steps * recipe.batch * recipe.procs,
        "train_images": sum(pack["train_images"] for pack in run.mixture.facts.values()),
        "packs": run.mixture.facts,
        "wall_s": round(run.seconds, 1),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}" if on_cpu else torch.cuda.get_device_name(),
        "versions": versions(),
        "data_sha256": run.mixture.data_sha256,
        "start": stage_before(recipe.start) if recipe.start else None,
        "weights_sha256": sha256(weights),
        "validation_curve": [line for line in curve if "validation" in line],
    }
    (work / "recipe.json").write_text(json.dumps(made, indent=1) + "\n")


def stage_before(name: str) -> dict:
    """What a run starts from: the recipe of a bundled model, its checksum, and in turn its own start."""
    card = json.loads(card_file(name).read_text())
    return {key: card.get(key) for key in ("recipe", "images_seen", "wall_s", "weights_sha256", "start")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder that holds cifar10/, tiny_imagenet/, …")
    parser.add_argument("--work", type=Path, required=True, help="folder for the decoded images, the log and the state")
    for field in fields(Recipe):
        if field.name != "sizes":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    data_root, work = args.pop("data_root"), args.pop("work")
    recipe = Recipe(**args)
    work.mkdir(parents=True, exist_ok=True)
    (work / "rendezvous").unlink(missing_ok=True)
    if recipe.device == "cuda" and not torch.cuda.is_available():
        sys.exit("expected a CUDA device for --device cuda, torch sees none; use --device cpu")
    Mixture(data_root, work / "cache", recipe.rendered)  # decode once, before the processes start
    if recipe.procs == 1:
        train(0, recipe, data_root, work)
    else:
        # One heap for the autograd thread too: with two, a process grows by about 8 MB a step at 64 px, else by 1.
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")
        torch.multiprocessing.spawn(train, (recipe, data_root, work), nprocs=recipe.procs)


if __name__ == "__main__":
    main()
