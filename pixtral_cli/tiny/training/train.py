"""Trains the built-in model: `python -m pixtral_cli.tiny.training.train --out runs/tiny --minutes 110`.

A checkpoint is written every two minutes. If training is stopped, the same command continues from the last one. The
recipe is the table STAGES: first the vision tower alone learns what the patches hold, then the model learns few shapes
on small pictures, then everything. Letters as in model.py.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from pixtral_cli.model.vision import VisionLanguageModel
from pixtral_cli.tiny import TRAINING_SEEDS
from pixtral_cli.tiny.scenes import Style
from pixtral_cli.tiny.training.batches import ALL_KINDS, Batch, Batches, Mix
from pixtral_cli.tiny.training.losses import Losses, TrainingHeads, looking_losses, losses
from pixtral_cli.tiny.training.model import CONFIG, new_model, quicken_norms
from pixtral_cli.tiny.training.tokenizer import build

SEED = 1
assert SEED in TRAINING_SEEDS


LEADING = ("shape", "colour", "place", "count")  # their answers decide when a stage is learned


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: ends after `steps`, or earlier when LEADING questions are right to `until`."""

    name: str
    mix: Mix
    steps: int
    until: float = 2.0
    see_only: bool = False


GLIMPSE = Style(sides=(64, 112), shapes=(1, 3), text_share=0.7)
SMALL = Style(sides=(64, 112), shapes=(1, 3), text_share=0.5)
MEDIUM = Style(sides=(64, 160), shapes=(1, 5), text_share=0.45)
STAGES = (
    Stage("look", Mix(GLIMPSE, single=1, pair=0, talk=0, plain=0, questions=1, tokens=2000), 1500, see_only=True),
    Stage("few", Mix(SMALL, single=0.78, pair=0.12, talk=0.06, plain=0.04, tokens=5000), 600, until=0.85),
    Stage("several", Mix(MEDIUM, single=0.64, pair=0.22, talk=0.11, plain=0.03, tokens=5500), 1000, until=0.95),
    Stage("all", Mix(questions=12, tokens=6000), 10**9),
)


@dataclass
class Progress:
    """Where training stands; saved with every checkpoint."""

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    batches: int = 0
    seconds: float = 0.0
    answers: int = 0
    pictures: int = 0
    right: dict[str, float] = field(default_factory=dict)  # running share of right answers per kind

    def count(self, batch: Batch, found: Losses, seconds: float) -> None:
        """Fold in one batch; its scenes are fresh, so the shares of right answers are held out."""
        self.seconds, self.step, self.stage_step = self.seconds + seconds, self.step + 1, self.stage_step + 1
        self.batches += 1
        self.pictures += sum(len(pixels) for pixels in batch.pixels)
        self.answers += len(found.right)
        right = found.right.cpu()
        for index, kind in enumerate(ALL_KINDS):
            of_kind = right[found.kinds == index].float()
            if len(of_kind):
                old, weight = self.right.get(kind, 0.0), 0.98 ** max(1.0, len(of_kind) / 8)
                self.right[kind] = old * weight + float(of_kind.mean()) * (1 - weight)


@dataclass(frozen=True)
class Options:
    """The command line."""

    out: Path
    minutes: float
    cooldown: float
    peak: float
    helping: float
    processes: int
    workers: int
    stage: int | None


class Trainer:
    """The model that computes (bfloat16), its float32 masters, the optimizers and the heads of training."""

    def __init__(self, out: Path, device: torch.device, peak: float) -> None:
        self.out, self.device, self.peak = out, device, peak
        self.model: VisionLanguageModel = new_model(SEED).to(device, torch.bfloat16)
        if device.type == "cpu":
            quicken_norms(self.model)
        text, vision = CONFIG["text_config"], CONFIG["vision_config"]
        self.heads = TrainingHeads(vision["hidden_size"], text["hidden_size"]).to(device, torch.bfloat16)
        self.working: list[torch.Tensor] = [*self.model.parameters(), *self.heads.parameters()]
        self.masters = [p.detach().float().clone() for p in self.working]
        for master, exact in zip(self.masters, new_model(SEED).parameters(), strict=False):
            master.copy_(exact.detach())
        self.optimizers = self._optimizers()
        self.progress = Progress()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        names = [name for name, _ in self.model.named_parameters()]
        hidden = [m for m, name in zip(self.masters, names, strict=False) if "layers." in name and m.ndim == 2]
        matrices = {id(m) for m in hidden}
        rest = [m for m in self.masters if id(m) not in matrices]
        return [
            torch.optim.Muon(hidden, lr=self.peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=self.peak, betas=(0.9, 0.98), weight_decay=0.01, foreach=True),
        ]

    def step(self, batch: Batch, rate: float, see_only: bool, helping: float) -> Losses:
        """One step of training at `rate` times the peak learning rate; `helping` weighs the heads of training."""
        found = (looking_losses if see_only else losses)(self.model, self.heads, batch, self.device)
        total = found.answer + helping * (found.seen.sum() + 0.5 * found.told.sum())
        total.backward()
        rate = self._share_gradients(rate)
        nn.utils.clip_grad_norm_([m for m in self.masters if m.grad is not None], 1.0, foreach=True)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.peak * rate
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.working, self.masters)
        return found

    def _share_gradients(self, rate: float) -> float:
        """Average gradients and rate over the processes; the masters get the former, the latter is returned."""
        counts = [master.numel() for master in self.masters]
        flat = torch.zeros(sum(counts) + 1, device=self.device)
        for part, working in zip(flat[:-1].split(counts), self.working, strict=True):
            if working.grad is not None:
                part.copy_(working.grad.flatten())
            working.grad = None
        flat[-1] = rate
        if dist.is_initialized():
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        for part, master in zip(flat[:-1].split(counts), self.masters, strict=True):
            master.grad = part.view_as(master) if bool(part.any()) else None
        return float(flat[-1])

    def save(self) -> None:
        """Write the checkpoint, then rename: a crash never leaves half of one."""
        state = {
            "progress": vars(self.progress),
            "masters": self.masters,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = self.out / "checkpoint.part"
        torch.save(state, partial)
        os.replace(partial, self.out / "checkpoint.pt")

    def resume(self) -> bool:
        """Go on from the checkpoint in the folder, if there is one."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.progress = Progress(**state["progress"])
        with torch.no_grad():
            torch._foreach_copy_(self.masters, state["masters"])
            torch._foreach_copy_(self.working, self.masters)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return True


def learning_rate(step: int, seconds: float, options: Options) -> float:
    """Share of the peak: 100 steps of warm-up, then constant, then down to nothing over the last `cooldown` share."""
    left = 1 - seconds / (60 * options.minutes)
    return min(1.0, (step + 1) / 100) * min(1.0, max(left, 0.0) / options.cooldown)


def train(trainer: Trainer, tokenizer_file: Path, options: Options, rank: int) -> None:
    """Run the stages until the minutes are over."""
    progress = trainer.progress
    while progress.seconds < options.minutes * 60:
        stage = STAGES[progress.stage]
        numbers = range(progress.batches * options.processes + rank, 10**9, options.processes)
        loader: DataLoader[Batch] = DataLoader(
            Batches(tokenizer_file, SEED, stage.mix, options.processes),
            batch_size=None,
            sampler=numbers,
            num_workers=options.workers,
            prefetch_factor=4 if options.workers else None,
        )
        run_stage(trainer, stage, loader, options, rank)
        progress.stage, progress.stage_step = min(progress.stage + 1, len(STAGES) - 1), 0
        if rank == 0:
            trainer.save()


def run_stage(trainer: Trainer, stage: Stage, loader: Iterable[Batch], options: Options, rank: int) -> None:
    """Train until the stage is learned or over. The first process decides; the others hear of it with the rate."""
    progress, last_saved, last = trainer.progress, time.monotonic(), time.monotonic()
    for batch in loader:
        rate = learning_rate(progress.step, progress.seconds, options)
        helping = 1.0 if stage.see_only else options.helping * max(0.3, rate)
        found = trainer.step(batch, rate, stage.see_only, helping)
        now = time.monotonic()
        progress.count(batch, found, now - last)
        last = now
        if rank == 0 and progress.step % 20 == 0:
            log(trainer, stage, found, rate)
        if rank == 0 and now - last_saved > 120:
            trainer.save()
            last_saved = now
        if agreed(stage_is_over(progress, stage, options)):
            return


def stage_is_over(progress: Progress, stage: Stage, options: Options) -> bool:
    learned = min(progress.right.get(kind, 0.0) for kind in LEADING) >= stage.until
    return progress.stage_step >= stage.steps or learned or progress.seconds >= options.minutes * 60


def agreed(over: bool) -> bool:
    """What the first process says."""
    if not dist.is_initialized():
        return over
    said = torch.tensor([float(over)])
    dist.broadcast(said, 0)
    return bool(said)


def log(trainer: Trainer, stage: Stage, found: Losses, rate: float) -> None:
    """One line on the terminal and in log.jsonl."""
    progress = trainer.progress
    line: dict[str, Any] = {
        "stage": stage.name,
        "step": progress.step,
        "minutes": round(progress.seconds / 60, 2),
        "rate": round(rate, 3),
        "pictures": progress.pictures,
        "answers": progress.answers,
        "answer": round(found.answer.item(), 3),
        "seen": _rounded(found.seen),
        "told": _rounded(found.told),
        **{kind: round(share, 3) for kind, share in progress.right.items()},
    }
    assert math.isfinite(line["answer"]), line
    with (trainer.out / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 2) for value in values.tolist()]


def run(rank: int, options: Options) -> None:
    """One process of training; several average their gradients."""
    if options.processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // options.processes))
        meeting = dist.FileStore(str(options.out / "meeting"), options.processes)
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=options.processes)
    trainer = Trainer(options.out, torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.peak)
    trainer.resume()
    if options.stage is not None and options.stage != trainer.progress.stage:
        trainer.progress.stage, trainer.progress.stage_step = options.stage, 0
    train(trainer, options.out / "tokenizer.json", options, rank)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pixtral_cli.tiny.training.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of checkpoint and log")
    parser.add_argument("--minutes", type=float, default=110, help="of training in all, resumed runs counted in")
    parser.add_argument("--cooldown", type=float, default=0.5, help="share of the minutes in which the rate falls")
    parser.add_argument("--peak", type=float, default=1.5e-3, help="learning rate")
    parser.add_argument("--helping", type=float, default=0.3, help="weight of the heads that exist only in training")
    parser.add_argument("--processes", type=int, default=1, help="on a CPU: one a core does best")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw, for each of those")
    parser.add_argument("--stage", type=int, help="go to this stage now")
    options = Options(**vars(parser.parse_args()))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "meeting").unlink(missing_ok=True)
    if not (options.out / "tokenizer.json").exists():
        build().save(str(options.out / "tokenizer.json"))
    if options.processes == 1:
        return run(0, options)
    torch.multiprocessing.spawn(run, (options,), nprocs=options.processes)


if __name__ == "__main__":
    main()
