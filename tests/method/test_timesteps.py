import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from workbench.method.timesteps import DENSITIES, discounted, draw, uniform


def abar(timesteps):
    return torch.linspace(0.999, 0.005, timesteps)


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("timesteps", [100, 1000, 1003])
def test_every_density_is_one(name, timesteps):
    p = DENSITIES[name](abar(timesteps))
    assert p.shape == (timesteps,) and (p >= 0).all()
    assert p.sum().item() == pytest.approx(1, abs=1e-12)


def test_discounted_weighs_cells_by_powers_of_gamma_noisiest_first():
    p = discounted(abar(1000), gamma=0.9, grid=50)
    cells = p.view(50, 20).sum(1).flip(0)  # cell 0 = timesteps 980 to 999
    assert (cells[1:] / cells[:-1]).tolist() == pytest.approx([0.9] * 49)
    assert p.view(50, 20).std(1, unbiased=False).max().item() == pytest.approx(0)


def test_the_papers_default_puts_nine_tenths_of_its_mass_on_the_first_22_of_50_steps():
    assert discounted(abar(1000))[560:].sum().item() == pytest.approx(0.9, abs=0.01)


def test_on_a_grid_of_every_timestep_nearly_nothing_is_left_below_978():
    assert discounted(abar(1000), grid=1000)[978:].sum().item() == pytest.approx(0.9, abs=0.01)


@given(st.integers(1, 60))
def test_gamma_1_is_uniform_where_the_grid_divides_the_timesteps(grid):
    timesteps = grid * 7
    torch.testing.assert_close(discounted(abar(timesteps), gamma=1.0, grid=grid), uniform(abar(timesteps)))


def test_more_cells_than_timesteps_is_an_error_that_names_the_setting():
    with pytest.raises(ValueError, match=r"timesteps\.grid = 50"):
        discounted(abar(10))


@pytest.mark.parametrize("name", DENSITIES)
def test_drawn_timesteps_match_their_density(name):
    p = DENSITIES[name](abar(100))
    t = draw(p, 50_000, torch.Generator().manual_seed(0))
    observed = torch.bincount(t, minlength=100).double()
    expected = p * len(t)
    common = expected > 5
    observed, expected = observed[common], expected[common]
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.001


def test_a_density_that_is_not_the_drawn_one_is_noticed():
    """The test above can fail: uniform draws do not pass for discounted ones."""
    t = draw(uniform(abar(100)), 50_000, torch.Generator().manual_seed(0))
    expected = discounted(abar(100)) * len(t)
    assert chisquare(torch.bincount(t, minlength=100).double(), expected).pvalue < 1e-6
