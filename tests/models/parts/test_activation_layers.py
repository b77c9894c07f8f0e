"""The nonlinearities that torch lacks, against their formulas in float64."""

import copy

import torch
from torch.nn import functional

from trainer.models.parts.activation_layers import LearnedSwish


def test_swish_is_silu_where_beta_is_one():
    given = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(LearnedSwish(1.0)(given), functional.silu(given))


def test_swish_follows_its_formula_and_beta_is_learned():
    layer = LearnedSwish(1.7).double()
    given = torch.linspace(-6, 6, 11, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        layer(given), given / (1 + torch.exp(-1.7 * given)), rtol=1e-7, atol=1e-7
    )

    def run(given, beta):
        return torch.func.functional_call(layer, {"beta": beta}, (given,))

    assert torch.autograd.gradcheck(run, (given, layer.beta.detach().clone().requires_grad_()))


def test_swish_answers_in_the_dtype_that_it_is_given():
    assert LearnedSwish(1.0)(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_swish_goes_round_and_is_copied():
    layer = LearnedSwish(0.5)
    twin = copy.deepcopy(layer)
    layer.beta.data.fill_(2.0)
    assert twin.beta.item() == 0.5
    twin.load_state_dict(layer.state_dict())
    assert twin.beta.item() == 2.0 and twin.beta.ndim == 1
