"A small training that tests start in processes of their own: train_toy.py DATA CACHE RUN [EPOCHS [KILLS SEED]]"

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from cxr_book.bodies import Body
from cxr_book.core import Run, Settings
from cxr_book.data import read
from cxr_book.layers import BatchBCELoss, Classifier
from cxr_book.learner import Learner, Stage, make_fabric
from cxr_book.loader import Augment, Loader, build_cache
from cxr_book.splits import official_split
from cxr_book.study import mean_auroc


class Toy(nn.Module):
    "Group normalisation: no image of a batch touches another, so two processes can equal one."

    def __init__(self):
        super().__init__()
        self.body = Body("small-resnet", norm="group")
        self.classifier = Classifier(self.body.channels[-1], pool="lse")
        self.bce = BatchBCELoss()

    def forward(self, x):
        return self.classifier(self.body(x)[-1])

    def loss(self, batch, stage):
        logits = self(batch.x).logits
        return dict(loss=self.bce(logits, batch.y), logits=logits.detach())

    def stages(self):
        return []


def train(data, cache, out, epochs):
    "Two stages, the second with accumulation and averaged weights."
    torch.manual_seed(0)
    drawn = read(data)
    split = official_split(drawn, valid=0.3)
    cached = build_cache(drawn, size=64, folder=cache)
    augment = Augment(flip=0.5, rotate=15, crop_scale=(0.8, 1))
    loaders = (
        Loader(cached, drawn, split.train, 8, augment, shuffle=True, drop_last=True),
        Loader(cached, drawn, split.valid, 8),
    )
    stages = [
        Stage(name="head", epochs=1, lr=1e-2, trainable=("classifier",)),
        Stage(name="all", epochs=epochs, lr=1e-3, schedule="cosine", accumulate=2, ema=0.9, clip=1.0, monitor="auroc"),
    ]
    learner = Learner(
        Toy(), *loaders, Run(out, Settings()), stages, mean_auroc, make_fabric("cpu", "32-true"), 3, save_minutes=0
    )
    learner.fit()


def fork(args):
    "The training in a process of its own; torch has not computed anything here yet, so a fork is safe."
    child = os.fork()
    if child == 0:
        train(*args)
        os._exit(0)
    return child


def killed(args, kills, seed):
    "Measure an undisturbed training, then start another one and kill it, `kills` times, at random moments."
    *given, out, epochs = args
    start = time.monotonic()
    os.waitpid(fork((*given, f"{out}-whole", epochs)), 0)
    whole, rng, died = time.monotonic() - start, random.Random(seed), 0
    while died < kills and not (Path(out) / "history.json").exists():
        child = fork(args)
        time.sleep(rng.uniform(0.05, 0.3) * whole)
        os.kill(child, signal.SIGKILL)
        died += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print(json.dumps(dict(died=died)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, cache, out, *rest = sys.argv[1:]
    numbers = [int(n) for n in rest] or [2]
    args = data, cache, out, numbers[0]
    if numbers[1:]:
        killed(args, *numbers[1:])
    train(*args)
