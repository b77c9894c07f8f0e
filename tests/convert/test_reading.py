"""Finding a command in what a user gives: words, files, args.yaml."""

import pytest

from trainer.base.errors import UserError
from trainer.convert.make import make_recipe, write_recipe
from trainer.recipe.explain import diff_rows
from trainer.recipe.schema import load_recipe

FLAGS = "--model resnet18 --aa rand-m9 -b 64"


def images(text, **named):
    return make_recipe("timm", text, **named).recipe.batch.images


@pytest.mark.parametrize(
    ("launcher", "gpus"),
    [
        ("python train.py /data", 1),
        ("CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node=2 train.py /data", 2),
        ("torchrun --nnodes 2 --nproc-per-node 4 ./train.py", 8),
        ("python -m torch.distributed.launch --nproc_per_node=4 --use_env train.py", 4),
        ("sh distributed_train.sh 8 /imagenet", 8),
        ("accelerate launch --num_processes 3 train.py", 3),
        ("torchrun --nproc_per_node=gpu train.py", 1),
    ],
)
def test_gpus_are_those_of_the_launcher(launcher, gpus):
    assert images(f"{launcher} {FLAGS} 2>&1 | tee log.txt") == 64 * gpus


def test_gpus_may_be_given_and_must_agree():
    assert images(FLAGS, gpus=8) == 512
    with pytest.raises(UserError, match="gpus=2"):
        make_recipe("timm", f"torchrun --nproc_per_node=4 train.py {FLAGS}", gpus=2)


def test_a_page_with_one_command(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(
        "# Training\n\nIt's timm's train.py, with:\n```bash\n# four GPUs\n"
        "torchrun --nproc_per_node=4 train.py /data \\\n  --model resnet18 -b=64\n"
        "    --aa 'rand-m9' --warmup-ep 3\n```\n"
    )
    recipe = make_recipe("timm", str(page)).recipe
    assert recipe.batch.images == 256 and recipe.lr.warmup_epochs == 3
    page.write_text(page.read_text() * 2)
    with pytest.raises(UserError) as error:
        make_recipe("timm", str(page))
    assert error.value.kind == "several_commands"


def test_args_yaml(tmp_path):
    path = tmp_path / "args.yaml"
    path.write_text(
        "aa: rand-m9\nlr: null\nlr_base: 0.1\nmodel: resnet18\nbatch_size: 64\nopt: sgd\n"
        "opt_betas: null\nmixup: 0\nscale:\n- 0.08\n- 1.0\ncolor_jitter: 0.4\nmodel_kwargs: {}\n"
        "warmup_lr: 1.0e-05\nlog_interval: 50\nbce_los: true\n"
    )
    found = make_recipe("timm", str(path), gpus=4)
    assert found.recipe.batch.images == 256 and found.recipe.lr.peak == 0.1
    assert [row.split(":")[0] for row, _ in found.lost] == ["bce_los"]
    assert "--bce-loss" in found.lost[0][1] or "bce_loss" in found.lost[0][1]
    assert not found.idle and not found.ignored  # at their defaults, not worth a word
    assert "lr.warmup_from" not in found.recipe.assumed


@pytest.mark.parametrize(
    ("line", "kind"), [("epochs: many", "wrong_type"), ("scale: [a, b]", "wrong_type")]
)
def test_args_yaml_of_another_type(tmp_path, line, kind):
    path = tmp_path / "args.yaml"
    path.write_text(f"model: resnet18\n{line}\n")
    with pytest.raises(UserError) as error:
        make_recipe("timm", str(path))
    assert error.value.kind == kind


def test_unknown_flags_are_all_named_with_the_nearest():
    with pytest.raises(UserError) as error:
        make_recipe("timm", "--model resnet18 --lable-smoothing 0.1 --warmup-epoch 3 --mixupp=1")
    found = str(error.value)
    assert error.value.kind == "unknown_flag"
    assert all(word in found for word in ("--lable-smoothing", "--smoothing?", "--mixup?"))
    assert "--warmup-epoch" not in found  # an abbreviation, as argparse takes it


@pytest.mark.parametrize(
    "text",
    ["--mix 0.2", "--lr fast", "--reprob --crop-pct 0.9", "nothing.yaml", "train.py is timm's",
     "--opt nonsense", "--epochs 3 --warmup-epochs 5", "--weight-decay 3"],
)  # fmt: skip
def test_refusals_are_one_line(text):
    with pytest.raises(UserError) as error:
        make_recipe("timm", text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_the_file_is_a_recipe_and_is_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = make_recipe("timm", "train.py /d --model resnet18.a1_in1k --pretrained --amp")
    path = write_recipe(found, None)
    assert path.name == "my-resnet18-a1_in1k.v1.yaml"
    assert load_recipe(path).digest == found.recipe.digest
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("--pretrained" in line for line in comments)
    assert any("--amp" in line and "precision=fp16" in line for line in comments)
    with pytest.raises(UserError, match="is there already"):
        write_recipe(found, None)
    other = write_recipe(found, tmp_path / "mine.v2.yaml")
    assert (load_recipe(other).name, load_recipe(other).version) == ("mine", 2)
    with pytest.raises(UserError, match="out="):
        write_recipe(found, tmp_path / "mine.yaml")


def test_a_command_with_odd_characters_makes_a_readable_file(tmp_path):
    found = make_recipe("timm", "train.py '/d\x1b[31m\u202e: \"#' --aa rand-m9 --model 'a/b: c'")
    path = write_recipe(found, tmp_path / "odd.v1.yaml")
    assert diff_rows(load_recipe(path), found.recipe) == []
