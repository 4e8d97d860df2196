"""The published table of Newton-CG on CIFAR-10 in one command.

    python -m benchmarks.simplenn --data-dir data --device cuda

needs the python batches of CIFAR-10 in the folder, and a GPU: every row is 100 Newton steps on 50,000 images. It prints
the table as it grows; `--steps` and `--data` make it shorter.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from torchnewton.train.loop import train
from torchnewton.train.recipes import with_recipe
from torchnewton.train.runs import Settings, make_run

# Test accuracy in percent after 100 steps, squared error, C = 0.01, from the authors' repository.
PUBLISHED = {
    ("simplenn-cifar10", 0.10): 78.09,
    ("simplenn-cifar10", 0.05): 78.33,
    ("simplenn-cifar10", 0.01): 75.62,
    ("simplenn-cifar10-7layers", 0.10): 80.61,
    ("simplenn-cifar10-7layers", 0.05): 81.41,
    ("simplenn-cifar10-7layers", 0.01): 75.50,
}
HEADER = "| recipe | subset | published, % | last, % | best, % | peak GPU memory, MB | seconds | data passes |"


def row(settings: Settings, published: float) -> str:
    """One run and its line of the table."""
    _, run = make_run(settings)
    if run.data.x_train.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    train(run, settings.budget)
    memory = f"{torch.cuda.max_memory_allocated() / 1e6:.0f}" if run.data.x_train.is_cuda else "–"
    last, best = run.history[-1], max(r.metric for r in run.history)
    numbers = f"{100 * last.metric:.2f} | {100 * best:.2f} | {memory} | {run.wall_seconds:.0f} | {last.data_passes:.0f}"
    return f"{published} | {numbers} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="The published table of Newton-CG on CIFAR-10.")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--data", default="cifar10", help="another task, to try it")
    given = parser.parse_args()
    base = Settings(data=given.data, data_dir=given.data_dir, device=given.device, seed=given.seed, epochs=given.steps)
    print(HEADER + "\n" + "| --- |" + " ---: |" * 7)
    for (recipe, subset), published in PUBLISHED.items():
        settings = with_recipe(recipe, replace(base, subset=subset), {"data", "subset", "epochs"})
        print(f"| {recipe} | {subset:.0%} | {row(settings, published)}", flush=True)


if __name__ == "__main__":
    main()
