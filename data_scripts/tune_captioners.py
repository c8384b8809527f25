"""Fine-tune the captioners whose checkpoints ship with the package, after choosing their weights on validation scenes.

    python data_scripts/tune_captioners.py tiny-vit-gpt2 --search   rate, weight of each loss, ε of adversarial training
    python data_scripts/tune_captioners.py tiny-vit-gpt2            every method of text_methods, seed 0 (make captioners)

Sizes are those of the `tiny` profile of chapter 08. --search writes assets/captioner/<model>-search.json with every run; what was
chosen stands in assets/profiles.yml and book/text_methods.py. Validation scenes are neither trained on nor tested.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import torch

from robustvlm_lite.attacks import pgd
from robustvlm_lite.attacks.captions import on_texts
from robustvlm_lite.book import captioning, text_tuning
from robustvlm_lite.book.text_methods import ADVERSARIAL, TEXT_METHODS
from robustvlm_lite.captioner import Captioner, TokenLoss, cross_entropy, load_captioner
from robustvlm_lite.captioner.loading import BUNDLED, config_file
from robustvlm_lite.defenses.caption_tuning import save_tuned
from robustvlm_lite.defenses.prsl import PrslConfig
from robustvlm_lite.defenses.token_losses import ConfidencePenalty, LabelSmoothing, LogitSqueezing
from robustvlm_lite.defenses.training import Training
from robustvlm_lite.runtime import generator, profile
from robustvlm_lite.scenes.duo import sample_duos
from robustvlm_lite.threat import ThreatModel

EPS = 1.5  # of the validation attack, in 1/255
RATES = (2e-4, 5e-4, 1e-3)
LOSSES = (  # weights of PRSL and of its rivals
    *(PrslConfig(b=b) for b in (1e-5, 1e-3, 1e-2, 1e-1, 1.0)),
    *(LabelSmoothing(w) for w in (0.1, 0.2)),
    *(PrslConfig("topk_variance", b=b) for b in (1e-2, 1e-1)),
    *(PrslConfig("topk_mass", b=b) for b in (1.0, 10.0)),
    *(ConfidencePenalty(w) for w in (0.1, 0.3)),
    *(LogitSqueezing(w) for w in (1e-2, 1e-1)),
)
WINDOWS = tuple(PrslConfig(end=k, b=b) for b in (1e-5, 1e-3) for k in (1, 6, 10, 20))  # K = 4 is above
OTHER_READINGS = (
    PrslConfig("token_axis_mean", b=1.0),
    PrslConfig("topk_uniform", b=0.1),
    PrslConfig("topk_vocab", b=0.01),
    PrslConfig("drsl_full", b=1e-8),
    PrslConfig("drsl_full", b=1e-5),
    PrslConfig("legacy_rank", b=1e-3),
)


def score(model: Captioner, n: int) -> dict[str, float]:
    """Share of right texts on validation scenes: clean, and under PGD-10 on the cross-entropy of the truth."""
    scenes = sample_duos(n, generator("tuning validation"))
    task = captioning.answer_task(scenes, 1) if model.name == "tiny-blip2" else captioning.caption_task(scenes)
    right = {"clean": 0.0, "attacked": 0.0}
    for part in torch.arange(n).split(64):
        index = part.tolist()
        x, truth, prompt = task.batch(index)
        x_adv = pgd(on_texts(model, truth, prompt), x, ThreatModel(EPS), n_steps=10, generators=[generator("v", i) for i in index])
        for name, pixels in (("clean", x), ("attacked", x_adv)):
            right[name] += task.judge(model.generate(pixels, prompt), index).all(1).sum().item() / n
    return {name: round(value, 4) for name, value in right.items()}


def search(base: Captioner, sizes: SimpleNamespace, n: int) -> None:
    path = config_file(base.name).with_name(f"{base.name}-search.json")
    before = json.loads(path.read_text()) if path.exists() else {}
    training = Training(**sizes.tuning)
    conditions = {"base_sha256": base.weights_sha256, "n": n, "eps_255": EPS, "training": asdict(training)}
    runs = before["runs"] if before.items() >= conditions.items() else []

    def run(loss: TokenLoss, lr: float, eps_255: float = 0.0) -> None:
        asked = {"loss": "cross_entropy" if loss is cross_entropy else repr(loss), "lr": lr, "eps_255": eps_255}
        if any(asked.items() <= r.items() for r in runs):
            return  # done before the script was stopped
        model = text_tuning.tune(base, loss, replace(training, lr=lr), eps_255=eps_255, progress=sys.stderr.isatty())
        runs.append(asked | score(model, n))
        print(json.dumps(runs[-1]), flush=True)
        path.write_text(json.dumps(conditions | {"runs": runs}, indent=1) + "\n")

    for lr in RATES:
        run(cross_entropy, lr)
    for eps_255 in (1.0, 2.0, 3.0):
        run(cross_entropy, training.lr, eps_255)
    answers = base.name == "tiny-blip2"  # windows and readings are compared on captions, whose texts have more than two tokens
    for loss in LOSSES if answers else (*LOSSES, *WINDOWS, *OTHER_READINGS):
        run(loss, training.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=BUNDLED)
    parser.add_argument("--search", action="store_true", help="choose instead of train")
    parser.add_argument("--n", type=int, default=256, help="validation scenes")
    parser.add_argument("--only", nargs="+", choices=TEXT_METHODS, default=list(TEXT_METHODS), help="methods to train")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    base, sizes = load_captioner(args.model), profile("08_prsl", "tiny")
    if args.search:
        return search(base, sizes, args.n)
    training = Training(**sizes.tuning)
    for method in args.only:
        eps = sizes.eps_train if method == ADVERSARIAL else 0.0
        model = text_tuning.tune(base, TEXT_METHODS[method], training, eps_255=eps, seed=args.seed, progress=sys.stderr.isatty())
        facts = {"method": text_tuning.stated(method), "eps_255": eps, "seed": args.seed, "training": asdict(training)}
        save_tuned(model, base, text_tuning.checkpoint(base, method, args.seed), **facts)
        print(json.dumps({"method": method} | score(model, args.n)), flush=True)


if __name__ == "__main__":
    main()
