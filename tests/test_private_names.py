"""Names that other libraries keep private and that trainer/ uses: one that disappears or changes
fails here first.
"""

import inspect

import pytest
import timm
import torch
from torch import nn
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from trainer.models.edit import layer_kinds
from trainer.models.edit.layer_kinds import LayerKind, timm_class


@pytest.mark.parametrize("name", ["copy_", "add_", "mul_", "div_", "addcmul_", "lerp_", "norm"])
def test_calls_over_lists_of_tensors(name):
    assert callable(getattr(torch, f"_foreach_{name}"))


def test_a_convolution_sends_its_weight_through_conv_forward():
    seen = []

    class Watched(nn.Conv2d):
        def _conv_forward(self, images, weight, bias):
            seen.append(weight)
            return super()._conv_forward(images, weight, bias)

    layer = Watched(1, 1, 3)
    layer(torch.zeros(1, 1, 3, 3))
    assert seen[0] is layer.weight


def test_a_tensor_counts_what_is_changed_in_place():
    tensor = torch.zeros(2)
    before, view = tensor._version, tensor.view(1, 2)
    assert view._version == before
    tensor.add_(1)
    assert tensor._version == view._version == before + 1


def test_what_compiling_is_told_and_tells():
    import torch._dynamo  # two seconds

    assert isinstance(torch._dynamo.config.recompile_limit, int)
    assert isinstance(torch._dynamo.config.skip_nnmodule_hook_guards, bool)
    assert callable(torch._dynamo.on_compile_start) and callable(torch._dynamo.on_compile_end)


def test_a_module_lists_its_hooks():
    module = nn.ReLU()
    assert not module._forward_hooks
    module.register_forward_hook(lambda *_: None)
    assert module._forward_hooks


def test_a_mode_of_the_compiler_is_a_set_of_options():
    import torch._inductor  # two seconds

    assert torch._inductor.list_mode_options("default") == {}


def test_the_launcher_holds_its_processes():
    assert "_pcontext" in inspect.getsource(LocalElasticAgent._start_workers)


@pytest.mark.parametrize("model", ["convnext_atto", "regnetx_002"])
def test_timm_keeps_the_rule_of_first_weights_beside_the_class(model):
    with torch.device("meta"):
        family = inspect.getmodule(type(timm.create_model(model)))
    assert callable(family._init_weights)


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(layer_kinds).values() if isinstance(kind, LayerKind)]
)
def test_timm_has_the_classes_that_are_looked_for(kind):
    assert [name for name in kind.timm if timm_class(name) is None] == []
