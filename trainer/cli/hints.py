"""What make says of itself, and what to write in place of another program's words.

Only the standard library, and runnable as a script: make asks it before there is an environment.
"""

from __future__ import annotations

import difflib
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence

# What people write who come from timm, torchvision, Lightning or fastai, and the word for it here.
# {0} is the value that was given.
HINTS = {
    "epochs": 'set="epochs={0}"',
    "num_epochs": 'set="epochs={0}"',
    "max_epochs": 'set="epochs={0}"',
    "lr": 'set="lr.peak={0}"',
    "learning_rate": 'set="lr.peak={0}"',
    "max_lr": 'set="lr.peak={0}"',
    "lr_max": 'set="lr.peak={0}"',
    "min_lr": 'set="lr.schedule.end={0}"',
    "warmup": 'set="lr.warmup_epochs={0}"',
    "warmup_epochs": 'set="lr.warmup_epochs={0}"',
    "lr_warmup_epochs": 'set="lr.warmup_epochs={0}"',
    "cooldown_epochs": 'set="lr.cooldown_epochs={0}" (epochs counts them too)',
    "sched": 'set="lr.schedule.name={0}"',
    "scheduler": 'set="lr.schedule.name={0}"',
    "lr_scheduler": 'set="lr.schedule.name={0}"',
    "batch_size": 'set="batch.images={0}" (images per optimizer step, over all ranks)',
    "bs": 'set="batch.images={0}" (images per optimizer step, over all ranks)',
    "b": 'set="batch.images={0}" (images per optimizer step, over all ranks)',
    "train_batch_size": 'set="batch.images={0}" (images per optimizer step, over all ranks)',
    "grad_accum_steps": 'set="batch.norm_images=..." (images per micro-batch)',
    "accumulate_grad_batches": 'set="batch.norm_images=..." (images per micro-batch)',
    "wd": 'set="optimizer.weight_decay={0}"',
    "weight_decay": 'set="optimizer.weight_decay={0}"',
    "momentum": 'set="optimizer.momentum={0}"',
    "opt": 'set="optimizer={{name: {0}, ...}}", or a recipe that has it (see recipes)',
    "optimizer": 'set="optimizer={{name: {0}, ...}}", or a recipe that has it (see recipes)',
    "optim": 'set="optimizer={{name: {0}, ...}}", or a recipe that has it (see recipes)',
    "loss": 'set="loss={{name: {0}}}"',
    "criterion": 'set="loss={{name: {0}}}"',
    "smoothing": 'set="smoothing={0}"',
    "label_smoothing": 'set="smoothing={0}"',
    "mixup": 'set="mix.mixup_alpha={0}" (explain shows the mix section)',
    "cutmix": 'set="mix.cutmix_alpha={0}" (explain shows the mix section)',
    "mixup_prob": 'set="mix.mixed_share={0}"',
    "mixup_off_epoch": 'set="mix.until_epochs={0}"',
    "drop_path": 'set="drop_path={0}"',
    "clip_grad": 'set="optimizer.clip_global_norm={0}"',
    "reprob": 'set="augment=[...]" with random_erasing (explain shows the augment section)',
    "hflip": 'set="augment=[...]" with flip (explain shows the augment section)',
    "vflip": 'set="augment=[...]" with vertical_flip (explain shows the augment section)',
    "color_jitter": 'set="augment=[...]" with color_jitter (explain shows the augment section)',
    "no_aug": 'set="augment=[...]" with resize (explain shows the augment section)',
    "aa": 'set="augment=[...]" (explain shows the augment section)',
    "auto_augment": 'set="augment=[...]" (explain shows the augment section)',
    "model_ema": 'set="average={{name: ema, ...}}" (ffcv-rn50-88 and convnext have one)',
    "ema": 'set="average={{name: ema, ...}}" (ffcv-rn50-88 and convnext have one)',
    "img_size": 'set="image.train_px={0}", and image.test_px',
    "image_size": 'set="image.train_px={0}", and image.test_px',
    "input_size": 'set="image.train_px={0}", and image.test_px',
    "size": 'set="image.train_px={0}", and image.test_px',
    "train_crop_size": 'set="image.train_px={0}"',
    "val_resize_size": 'set="image.test_px=..."',
    "split": "the command split first: it makes train/ and val/ of a folder of class folders",
    "val_split": "the command split first: it makes train/ and val/, and takes val_split={0}",
    "train_split": "the command split first: it makes train/ and val/, and takes train_split={0}",
    "num_classes": "nothing: the dataset's classes are counted, or stand in a data profile",
    "pretrained": "weights=timm:<model>.<tag>, a file of weights, or a run's name",
    "kd_model_name": 'set="distill={{name: hard, share: 0.5, teacher: {0}, weights: ...}}"',
    "teacher_model": 'set="distill={{name: hard, share: 0.5, teacher: {0}, weights: ...}}"',
    "resume": "the command that was stopped, once more: it resumes",
    "checkpoint": "the command that was stopped, once more: it resumes",
    "auto_resume": "the command that was stopped, once more: it resumes",
    "amp": "precision=bf16 or precision=fp16",
    "tf32": "precision=tf32",
    "allow_tf32": "precision=tf32",
    "fp16": "precision=fp16",
    "bf16": "precision=bf16",
    "amp_dtype": "precision={0}",
    "torchcompile": "compile=1",
    "cuda_graph": "cuda_graphs=1",
    "profiler": "profile=1",
    "wandb": "track=wandb",
    "use_wandb": "track=wandb",
    "log_wandb": "track=wandb",
    "enable_wandb": "track=wandb",
    "report_to": "track={0}",
    "log_interval": "log_every={0}",
    "log_freq": "log_every={0}",
    "print_freq": "log_every={0}",
    "val_interval": "eval_every={0}",
    "eval_interval": "eval_every={0}",
    "eval_freq": "eval_every={0}",
    "validation_batch_size": "eval_batch={0}",
    "val_batch_size": "eval_batch={0}",
    "eval_batch_size": "eval_batch={0}",
    "vb": "eval_batch={0}",
    "sampler": 'set="sampling={{name: balanced}}"',
    "balanced": 'set="sampling={{name: balanced}}"',
    "class_weight": 'set="loss.class_weighting={{name: inverse, mean_over: images}}"',
    "tracker": "track={0}",
    "logger": "track={0}",
    "dataset": "data={0}",
    "data_path": "data={0}",
    "data_root": "data={0}",
    "root": "data={0}",
    "dir": "data={0}",
    "path": "data={0}",
    "arch": "model={0}",
    "backbone": "model={0}",
    "net": "model={0}",
    "config": "recipe={0}",
    "cfg": "recipe={0}",
    "num_workers": "workers={0}",
    "j": "workers={0}",
    "output": "runs={0} (run folders) and results={0} (rows)",
    "output_dir": "runs={0} (run folders) and results={0} (rows)",
    "out_dir": "runs={0} (run folders) and results={0} (rows)",
    "save_dir": "runs={0} (run folders) and results={0} (rows)",
    "gpu": "device=cuda:{0}, or gpus=<number of ranks>",
    "num_gpus": "gpus={0}",
    "ngpus": "gpus={0}",
    "nproc_per_node": "gpus={0}, or procs={0} on the CPU",
    "nproc": "gpus={0}, or procs={0} on the CPU",
    "num_processes": "gpus={0}, or procs={0} on the CPU",
    "world_size": "gpus={0}, or procs={0} on the CPU",
    "numa_binding": "numa={0} (train, lr-find)",
    # of several machines: torchrun's own words
    **dict.fromkeys(
        ("nnodes", "num_nodes"),
        "launch-slurm nodes={0}, or on each machine torchrun --nnodes={0} ... -m trainer <command>",
    ),
    **{
        word: f"on each machine torchrun --{word.replace('_', '-')}={{0}} ... -m trainer <command>"
        for word in (
            *("node_rank", "master_addr", "master_port"),
            *("rdzv_backend", "rdzv_endpoint", "rdzv_id", "rdzv_conf"),
        )
    },
    "standalone": "gpus=<number of ranks>: ranks of one machine need nothing more",
    "max_restarts": "nothing: the same command resumes, and a Slurm job queues itself again",
    "dist_url": "nothing: gpus= and procs= find a port, torchrun and srun say theirs",
    "dist_backend": "nothing: NCCL between GPUs, gloo between ranks on the CPU",
    "sync_bn": "nothing: the recipe's batch.norm_images says over how many images statistics go",
    "early_stopping": 'set="early_stopping.patience_epochs=10"',
    "patience": 'set="early_stopping.patience_epochs=10"',
    **dict.fromkeys(
        ("freeze", "freeze_backbone", "freeze_layers", "freeze_body", "linear_probe"),
        'set="model.freeze={{all_but: [head]}}" (only the classifier trains)',
    ),
    "channels_last": "nothing: on for a GPU, and on the CPU from 128 px on",
}

# Other programs' commands, and what does it here.
COMMANDS = {
    "fit": "train",
    "run": "train",
    "validate": "eval",
    "evaluate": "eval",
    "val": "eval",
    "score": "eval",
    "tests": "test",
    "pytest": "test",
    "check": "test",
    "results": "table",
    "rows": "table",
    "tables": "table",
    "report": "table",
    "plot": "figure",
    "figures": "figure",
    "list": "runs",
    "ls": "runs",
    "status": "runs",
    "monitor": "watch",
    "top": "watch",
    "sweep": "ablate",
    "ablations": "ablate",
    "lr": "lr-find",
    "lr_find": "lr-find",
    "find-lr": "lr-find",
    "install": "setup",
    "resume": "train",
    "slurm": "launch-slurm",
    "benchmark": "bench",
    "format": "lint",
    "models": "matrix",
    "recipe": "recipes",
    "inference": "predict",
    "infer": "predict",
    "onnx": "export",
    "quantize": "export",
    "push-to-hub": "push",
    "upload": "push",
    "finetune": "train",
    "all": "train",
    "trainer": "help",
    "import": "from-timm",
    "convert": "from-timm",
}

HELP = """\
examples
  make recipe=A1 model=resnet50                       train, on bundled digits
  make recipe=A3 model=resnet50 data=/path/to/images  train, on your own images
  make recipe=A3 model=resnet18 set="epochs=5 loss.name=ce"       change values
  make plan recipe=A1 model=resnet50 data=imagenet-1k      look before training
  make help of=train                                 every variable of a target

train
  train         train a model by a recipe, store its row (make without a target)
  plan          the plan of a run or of an ablation, without running it
  runs          list your runs: running, stopped, finished; epochs, score
  watch         your runs as they go: loss, score, speed, time left; page=1
  eval          evaluate a run's model, or timm weights; page=: by class
  predict       a model's answers on a folder of images
  export        a model as ONNX, OpenVINO, torch.export or TorchScript; int8=1
  latency       how long a model takes by each of these: batch 1 and 32
  push          a run's model with its card to the Hugging Face Hub
  verify        check a run folder: checksums, plan, row, curves, weights, score
  reproduce     run a stored row again and compare
  launch-slurm  write a Slurm job file that trains

recipes
  recipes       list the recipes; model=: those with a score of it, their cost
  which         the recipe that made public weights: weights=resnet50.a1_in1k
  explain       every value of a recipe and where it comes from
  diff          the values in which two recipes differ
  from-timm     make a recipe of a command of timm's train.py, or its args.yaml
  from-torchvision from-convnext     the same of the scripts of these projects

questions
  lr-find       learning-rate range test, or of another hyperparameter
  ablate        run the cells of an ablation that have no row yet
  table         an ablation's table from its rows; alone: list all ablations
  figure        an ablation's effects, curves or cost: SVG, PDF, PNG for a paper
  compare       two runs: where their rows differ, both curves; two cells: b - a

data
  check-data    decode every image, list the unreadable and unusual ones
  split         make train/ and val/, of links, of a folder of class folders
  data          pack images into .beton files, for loader=ffcv;
                format=raw: as pixels that any loader reads undecoded
  parity        loader equivalence: torch's loader against ffcv

this machine and the suite itself
  setup         create .venv (every target does by itself); ffcv=1 builds ffcv;
                torch=cpu index=<URL of CPU wheels>: without CUDA libraries
  doctor        diagnose this machine, with remedies
  bench         what each part of a run could do alone, what limits it
  matrix        one optimizer step of every recipe on every model family
  test  lint    the test suite (pytest="flags"); format, imports, types
  drill         fault injection: every fault on digits, then killed processes
  clean         remove .venv, keep runs and results

A variable is written name=value. set= takes several values of the recipe:
set="epochs=5 loss.name=ce"; make explain recipe=A1 lists them all."""


_PYTEST = {"pytest": 'Flags for pytest: "-k lamb".'}
# What the program has no command for: what the target is for, and its variables.
TARGETS: dict[str, tuple[str, dict[str, str]]] = {
    "setup": (
        "Create .venv from the lock file, or renew it where pyproject.toml or requirements.lock has"
        " changed. Every other target does so by itself.",
        {
            "ffcv": "1: build ffcv too, for loader=ffcv.",
            "torch": "cpu: torch without its CUDA libraries, from the wheels of index=.",
            "index": "URL of an index of torch's CPU wheels; torch's page on installing it has it.",
        },
    ),
    "test": ("Run the test suite: under 10 minutes on 2 cores, no network.", _PYTEST),
    "lint": ("Check format, code, imports and types: ruff, import-linter, mypy.", {}),
    "help": ("List every target, or say what one takes.", {"of": "A target: train."}),
    "clean": ("Remove .venv. Runs and results stay.", {}),
}
# Variables that make itself takes of a target, beside those of the program's command.
MORE_WORDS = {"drill": _PYTEST}


def described(target: str, text: str, words: Mapping[str, str], width: int) -> str:
    """What a target is for, in paragraphs, and the words that it takes: `seed=` and the like with
    what each says. width: columns.
    """
    indent = max(map(len, words), default=0) + 3
    lines = [f"make {target} word=value ..." if words else f"make {target}", ""]
    for paragraph in text.split("\n\n"):
        lines += [*textwrap.wrap(paragraph, width, break_on_hyphens=False), ""]
    for word, said in words.items():
        first, *others = textwrap.wrap(said, width - indent, break_on_hyphens=False) or [""]
        lines += [f"  {word:{indent - 2}}{first}", *(f"{'':{indent}}{line}" for line in others)]
    return "\n".join(lines)


def target_hint(target: str, targets: Sequence[str]) -> str:
    """One line about a target that make does not have."""
    if target in COMMANDS:
        use = COMMANDS[target]
    else:
        near = difflib.get_close_matches(target, targets, 1)
        if not near:
            return f"{target}: no such target; valid: {' '.join(targets)}"
        use = near[0]
    return f"{target}: no such target; did you mean {use}?"


def main(words: Sequence[str]) -> int:
    """What make asks: nothing for the help of all targets, `--of` and a target for its own, or the
    target that it does not have; then all that it has. Gives the exit code.
    """
    if not words or words[:2] == ["--of", ""]:
        print(HELP)
        return 0
    target, *targets = words[1:] if words[0] == "--of" else words
    if words[0] == "--of" and target in TARGETS:
        text, known = TARGETS[target]
        columns = shutil.get_terminal_size().columns
        print(described(target, text, {f"{name}=": said for name, said in known.items()}, columns))
        return 0
    print(f"error: {target_hint(target, targets)} (make help)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
