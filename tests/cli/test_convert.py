"""from-timm, from-torchvision and from-convnext by the command line: exit codes and files."""

import pytest

from support.commands import program, rsb


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_exit_codes(tmp_path):
    done = rsb("from-timm", "--args", "--model resnet18 --aa rand-m9", "--gpus", "2")
    assert done.exit_code == 0 and (tmp_path / "my-resnet18.v1.yaml").is_file()
    done = rsb("from-timm", "--args", "--model resnet34 --aa rand-m9 --bn-tf")
    assert done.exit_code == 1 and "--bn-tf" in done.output
    assert (tmp_path / "my-resnet34.v1.yaml").is_file()
    done = rsb("from-timm", "--args", "--model resnet18 --aa rand-m9")
    assert done.exit_code == 2 and "my-resnet18.v1.yaml" in done.output
    assert rsb("from-timm").exit_code == 2
    assert rsb("from-convnext", "--args", "--drop-path 0.1").exit_code == 2


def test_the_recipe_can_be_planned(tmp_path):
    path = tmp_path / "tv.v1.yaml"
    flags = "args=--model resnet18 --auto-augment ta_wide"  # as make passes it on
    assert program("from-torchvision", flags, f"out={path}").returncode == 0
    done = rsb("plan", "--recipe", path, "--model", "resnet18")
    assert done.exit_code == 0 and "tv.v1" in done.output
