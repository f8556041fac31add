"""Patches and positions against references written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from wejepa.errors import ConfigError
from wejepa.patches import PatchEmbed, resize_positions, sincos_positions, take


def test_patch_embedding_is_a_linear_map_of_each_patch():
    torch.manual_seed(0)
    embed, images = PatchEmbed(patch_size=4, in_chans=3, embed_dim=20), torch.randn(2, 3, 16, 24)
    patches = F.unfold(images, kernel_size=4, stride=4).transpose(1, 2)  # (B, N, C * 4 * 4)
    by_hand = patches @ embed.proj.weight.flatten(1).T + embed.proj.bias
    assert embed(images).shape == (2, 4 * 6, 20)
    torch.testing.assert_close(embed(images), by_hand, rtol=1e-5, atol=1e-5)


def test_tokens_come_in_raster_order():
    embed = PatchEmbed(patch_size=4, in_chans=1, embed_dim=8)
    for row in range(2):
        for col in range(3):
            images = torch.zeros(1, 1, 8, 12, requires_grad=True)
            embed(images)[0, row * 3 + col].sum().backward()
            touched = images.grad[0, 0] != 0
            assert touched[row * 4 : row * 4 + 4, col * 4 : col * 4 + 4].all() and touched.sum() == 16


def test_grid_size_is_down_and_across():
    embed = PatchEmbed(patch_size=4, in_chans=3, embed_dim=8)
    assert embed.grid_size(torch.zeros(1, 3, 16, 24)) == (4, 6)


def test_wrong_channels_are_refused():
    with pytest.raises(ConfigError, match=r"1 channels, model\.in_chans is 3"):
        PatchEmbed(patch_size=4, in_chans=3, embed_dim=8)(torch.zeros(2, 1, 16, 16))


@pytest.mark.parametrize("size", [(18, 16), (16, 18)])
def test_an_image_that_the_patch_does_not_divide_is_refused(size):
    with pytest.raises(ConfigError, match=rf"model\.patch_size = 4 .*{size[0]} x {size[1]}: resize it to 16 x 16"):
        PatchEmbed(patch_size=4, in_chans=3, embed_dim=8)(torch.zeros(2, 3, *size))


# ---------------------------------------------------------------- positions


def relative_error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def there_and_back(positions: torch.Tensor) -> torch.Tensor:
    larger = resize_positions(positions, (8, 8), (14, 14))
    assert larger.shape == (1, 196, positions.shape[-1])
    return resize_positions(larger, (14, 14), (8, 8))


def smooth_positions(rows: int, cols: int) -> torch.Tensor:
    """Six low waves over the unit square, sampled at the centres of a grid's cells: (1, N, 6)."""
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(cols) + 0.5) / cols, indexing="ij")
    return torch.stack([y, x, torch.cos(3 * y), torch.sin(3 * x), torch.cos(2 * x + 1) * y, torch.sin(2 * y) * x], dim=-1).reshape(1, -1, 6)


def test_the_same_grid_returns_the_tensor_itself():
    positions = torch.randn(1, 64, 16)
    assert resize_positions(positions, (8, 8), (8, 8)) is positions


def test_smooth_positions_survive_a_larger_grid():
    assert relative_error(there_and_back(smooth_positions(8, 8)), smooth_positions(8, 8)) < 0.01


def test_random_positions_survive_a_larger_grid():
    torch.manual_seed(0)
    positions = torch.randn(1, 64, 128)
    assert relative_error(there_and_back(positions), positions) < 0.1


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (5, 11)])
def test_resized_positions_are_those_of_the_new_grid(grid):
    """Not only close after a round trip: what was learnt at a place is found at that place, rows as rows and columns as columns."""
    resized = resize_positions(smooth_positions(8, 8), (8, 8), grid)
    assert relative_error(resized, smooth_positions(*grid)) < 0.03


def test_fixed_positions_are_sines_and_cosines_of_row_and_column():
    positions = sincos_positions((3, 5), 8)
    assert positions.shape == (1, 15, 8)
    for row in range(3):
        for col in range(5):
            expected = [f(place * frequency) for place in (row, col) for f in (math.sin, math.cos) for frequency in (1, 0.01)]
            torch.testing.assert_close(positions[0, 5 * row + col], torch.tensor(expected), rtol=0, atol=1e-6)


def test_resized_positions_carry_the_gradient_and_the_type():
    positions = torch.randn(1, 16, 8, requires_grad=True)
    resize_positions(positions, (4, 4), (6, 6)).square().sum().backward()
    assert (positions.grad != 0).all()
    assert resize_positions(positions.detach().bfloat16(), (4, 4), (6, 6)).dtype == torch.bfloat16


def test_take_picks_tokens_of_each_image():
    tokens = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    picked = take(tokens, torch.tensor([[0, 4], [3, 1]]))
    assert torch.equal(picked, torch.stack([tokens[0, [0, 4]], tokens[1, [3, 1]]]))


def test_kept_patches_are_those_of_the_whole_image():
    """Also where the channels are one in memory, as of a grey image in colour."""
    torch.manual_seed(0)
    embed, images = PatchEmbed(4, 3, 8), torch.randn(2, 1, 12, 16).expand(-1, 3, -1, -1)
    keep = torch.tensor([[0, 5, 11], [7, 2, 3]])
    torch.testing.assert_close(embed(images, keep), take(embed(images), keep), rtol=1e-4, atol=1e-5)


def test_tokens_lie_in_memory_as_later_layers_read_them():
    embed, images = PatchEmbed(4, 3, 8), torch.randn(2, 3, 16, 8)
    assert embed(images).is_contiguous() and embed(images, torch.tensor([[0, 5], [1, 2]])).is_contiguous()
