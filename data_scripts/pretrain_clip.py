"""Train a bundled CLIP from scratch on the image packs and the rendered world.

    python data_scripts/pretrain_clip.py --model nano --data-root DIR --work DIR

Two processes of one thread each, gradients averaged over gloo, are faster on two cores than one process of two threads;
on a GPU pass --procs 1 --device cuda. A killed run goes on from its last state when the same command is given again:
every batch depends on (seed, step, rank) alone. Writes WORK/log.jsonl, WORK/state.pt and, at the end, the half
precision WORK/<model>.safetensors with WORK/recipe.json. `data_scripts/clip_card.py` then measures it.
"""

import argparse
import functools
import json
import math
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
from mixture import Mixture
from muon import Muon
from safetensors.torch import save_file
from tqdm import tqdm

from robustvlm_lite import transformer
from robustvlm_lite.clip import MEAN, STD
from robustvlm_lite.runtime import asset, sha256, versions


@dataclass
class Recipe:
    """Everything that decides the weights; design/substrate measurements led to the defaults."""

    model: str = "nano"
    steps: int = 14000
    batch: int = 128  # per process
    procs: int = 2
    seed: int = 0
    rendered: float = 0.22  # share of rendered scenes in a batch
    sizes: tuple = (
        (32, 0.42),
        (48, 0.30),
        (64, 0.28),
    )  # image side and its share of the steps: tokens are short at first
    lr_muon: float = 0.015  # block matrices
    lr_adamw: float = 0.002  # the rest
    weight_decay: float = 0.05
    warmup: int = 80
    clip_norm: float = 1.0
    ema: float = 0.995
    device: str = "cpu"


def size_at(recipe: Recipe, step: int) -> int:
    done = 0.0
    for size, share in recipe.sizes:
        done += share
        if step < done * recipe.steps - 1e-6:
            return size
    return recipe.sizes[-1][0]


def positions(visual, size: int) -> torch.Tensor:
    """The position embedding for images of another size, [1 + N, W]."""
    grid, new = visual.grid_size[0], size // visual.patch_size[0]
    pos = visual.positional_embedding
    if new == grid:
        return pos
    spatial = pos[1:].T.reshape(1, -1, grid, grid)
    spatial = F.interpolate(spatial, size=(new, new), mode="bilinear", antialias=True)
    return torch.cat([pos[:1], spatial.flatten(2)[0].T])


def image_features(model, x: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    x = (x - mean) / std
    if not hasattr(model.visual, "class_embedding"):
        return F.normalize(model.visual(x).float(), dim=-1)
    return F.normalize(
        transformer.image_tokens(model.visual, x, positions(model.visual, x.shape[-1]))[:, 0].float(), dim=-1
    )


def contrastive_loss(model, tokenizer, batch, device) -> torch.Tensor:
    """Cross-entropy of each image over the captions of its own label set."""
    x, captions, groups = batch
    image = image_features(model, x.to(device))
    text = encode_captions(model, tokenizer(captions).to(device))
    scale = model.logit_scale.exp().clamp(max=100)
    with torch.autocast(device.type, enabled=False):  # bfloat16 would round the cosines
        losses = [
            F.cross_entropy(
                scale * image[rows.to(device)] @ text[where.to(device)].T, target.to(device), reduction="sum"
            )
            for rows, target, where in groups
        ]
    return torch.stack(losses).sum() / len(x)


def encode_captions(model, ids: torch.Tensor, buckets: int = 4) -> torch.Tensor:
    """Unit text features [C, D]; captions of like length go through the text tower together, so little padding is computed."""
    order = ids.argmax(-1).argsort()
    text = torch.cat([transformer.text_features(model, part) for part in ids[order].chunk(buckets)])
    return F.normalize(text.float(), dim=-1)[order.argsort()]


def make_model(name: str):
    import open_clip

    open_clip.add_model_config(asset("clip"))
    model = open_clip.create_model(name, load_weights=False)
    encode = open_clip.get_tokenizer(name, bpe_path=str(asset("clip", "bpe.txt.gz")))
    encode_one = functools.cache(lambda text: encode(text)[0])  # captions repeat from step to step

    def tokenizer(texts: list[str]) -> torch.Tensor:
        return torch.stack([encode_one(t) for t in texts])

    with torch.no_grad():
        model.logit_scale.fill_(math.log(1 / 0.07))
        if hasattr(model.visual, "class_embedding"):  # open_clip leaves the image tower at torch's defaults
            width = model.visual.transformer.width
            torch.nn.init.normal_(model.visual.positional_embedding, std=0.02)
            for block in model.visual.transformer.resblocks:
                torch.nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
                torch.nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                for p in (block.attn.out_proj.weight, block.mlp.c_proj.weight):
                    torch.nn.init.zeros_(p)
    return model, tokenizer


def optimizers(model, recipe: Recipe):
    blocks = [(n, p) for n, p in model.named_parameters() if "resblocks" in n and p.ndim == 2]
    chosen = {n for n, _ in blocks}
    decay = [p for n, p in model.named_parameters() if n not in chosen and p.ndim >= 2]
    plain = [p for n, p in model.named_parameters() if n not in chosen and p.ndim < 2]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return Muon(blocks, lr=recipe.lr_muon), torch.optim.AdamW(groups, lr=recipe.lr_adamw, betas=(0.9, 0.98), fused=True)


def average_gradients(params, world: int) -> None:
    if world == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    flat /= world
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad.copy_(part.view_as(p))


@torch.no_grad()
def validation_accuracy(model, tokenizer, mixture: Mixture, n: int = 300) -> dict[str, float]:
    """Zero-shot accuracy on training rows that were held back; test splits are never looked at here."""
    result = {}
    for pack in mixture.packs:
        index = pack.validation[:n]
        x = torch.from_numpy(pack.images[index.numpy()]).float() / 255
        x = F.interpolate(x, size=(64, 64), mode="bilinear") if x.shape[-1] != 64 else x
        text = transformer.text_features(model, tokenizer([f"a photo of a {c}." for c in pack.class_names]))
        prediction = (image_features(model, x) @ F.normalize(text, dim=-1).T).argmax(-1)
        result[pack.name] = round(float((prediction == pack.labels[index]).float().mean()), 4)
    return result


def train(rank: int, recipe: Recipe, data_root: Path, work: Path) -> None:
    device = torch.device(recipe.device)
    if device.type == "cpu":
        torch.set_num_threads(1 if recipe.procs > 1 else os.cpu_count())
    if recipe.procs > 1:
        dist.init_process_group(
            "gloo", f"file://{work}/rendezvous", timeout=timedelta(minutes=10), rank=rank, world_size=recipe.procs
        )
    torch.manual_seed(recipe.seed)
    model, tokenizer = make_model(recipe.model)
    model = model.to(device).train()
    mixture = Mixture(data_root, work / "cache", recipe.rendered)
    params = [p for p in model.parameters() if p.requires_grad]
    muon, adamw = optimizers(model, recipe)
    ema = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    start, spent, state_file = 0, 0.0, work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"], strict=False)
        muon.load_state_dict(state["muon"])
        adamw.load_state_dict(state["adamw"])
        ema, start, spent = state["ema"], state["step"], state["seconds"]
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    began, first = time.monotonic(), rank == 0
    bar = tqdm(
        range(start, recipe.steps),
        initial=start,
        total=recipe.steps,
        desc=recipe.model,
        disable=not first,
        mininterval=10,
    )
    for step in bar:
        lr = min((step + 1) / recipe.warmup, 1 - step / recipe.steps)
        for group in muon.param_groups:
            group["lr"] = recipe.lr_muon * lr
        for group in adamw.param_groups:
            group["lr"] = recipe.lr_adamw * lr
        batch = mixture.batch(size_at(recipe, step), recipe.batch, recipe.seed, step, rank)
        with autocast:
            loss = contrastive_loss(model, tokenizer, batch, device)
        for p in params:
            p.grad = None
        loss.backward()
        if not torch.isfinite(loss):
            raise SystemExit(
                f"the loss is {loss.item()} at step {step}; lower the learning rate and resume from {state_file}"
            )
        average_gradients(params, recipe.procs)
        torch.nn.utils.clip_grad_norm_(params, recipe.clip_norm)
        muon.step()
        adamw.step()
        with torch.no_grad():
            own = model.state_dict()
            for k, v in ema.items():
                v.lerp_(own[k], 1 - min(recipe.ema, (step + 1) / (step + 10)))
        if first and (step % 50 == 49 or step + 1 == recipe.steps):
            seconds = spent + time.monotonic() - began
            line = {
                "step": step + 1,
                "loss": round(loss.item(), 4),
                "size": batch[0].shape[-1],
                "seconds": round(seconds, 1),
            }
            if step % 1000 == 999 or step + 1 == recipe.steps:
                line["validation"] = evaluate_ema(model, tokenizer, mixture, ema)
            with open(work / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
            bar.set_postfix(loss=line["loss"])
        if first and (step % 250 == 249 or step + 1 == recipe.steps):
            state = {"model": model.state_dict(), "muon": muon.state_dict(), "adamw": adamw.state_dict(), "ema": ema}
            state |= {"step": step + 1, "seconds": spent + time.monotonic() - began}
            torch.save(state, work / "state.part")
            os.replace(work / "state.part", state_file)
    if first:
        export(recipe, ema, mixture, spent + time.monotonic() - began, work)
    if recipe.procs > 1:
        dist.barrier()
        dist.destroy_process_group()


def evaluate_ema(model, tokenizer, mixture: Mixture, ema: dict) -> dict[str, float]:
    own = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(ema, strict=False)
    result = validation_accuracy(model, tokenizer, mixture) if model.logit_scale.device.type == "cpu" else {}
    model.load_state_dict(own)
    return result


def export(recipe: Recipe, ema: dict, mixture: Mixture, seconds: float, work: Path) -> None:
    weights = work / f"{recipe.model}.safetensors"
    save_file({k: v.half().contiguous().cpu() for k, v in ema.items()}, weights, metadata={"model": recipe.model})
    curve = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    made = {
        "recipe": asdict(recipe),
        "images_seen": recipe.steps * recipe.batch * recipe.procs,
        "train_images": mixture.n_images,
        "wall_s": round(seconds, 1),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}"
        if recipe.device == "cpu"
        else torch.cuda.get_device_name(),
        "versions": versions(),
        "data_sha256": mixture.data_sha256,
        "weights_sha256": sha256(weights),
        "validation_curve": [line for line in curve if "validation" in line],
    }
    (work / "recipe.json").write_text(json.dumps(made, indent=1) + "\n")


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
        torch.multiprocessing.spawn(train, (recipe, data_root, work), nprocs=recipe.procs)


if __name__ == "__main__":
    main()
