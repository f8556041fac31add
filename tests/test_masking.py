"""Block masks: everything that the loss and the reader rely on, on every grid, without a favoured corner."""

import contextlib
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wejepa.config import MaskConfig
from wejepa.errors import ConfigError
from wejepa.masking import Masks, _largest, sample_block_masks

QUICK = settings(max_examples=100, deadline=None, derandomize=True, database=None)
GRID = (8, 8)


def blocks_config(**changes) -> MaskConfig:
    """Settings of the paper's kind, spelt out so that the tests do not follow the defaults."""
    values = {
        "target_scale": (0.15, 0.2),
        "target_aspect_ratio": (0.75, 1.5),
        "context_scale": (0.85, 1.0),
        "context_aspect_ratio": (1.0, 1.0),
        "num_target_blocks": 4,
        "context_share": 0.33,
    }
    return MaskConfig(**values | changes)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def occupancy(index: torch.Tensor, patches: int) -> torch.Tensor:
    """Which patches each row of indices holds: (B, K) -> bool (B, patches)."""
    return torch.zeros(len(index), patches, dtype=torch.bool).scatter_(1, index, True)


def block_shape(block: torch.Tensor, grid) -> tuple[int, int]:
    """Height and width of one block of indices, which must be a full rectangle."""
    rows, cols = block // grid[1], block % grid[1]
    height, width = int(rows.max() - rows.min()) + 1, int(cols.max() - cols.min()) + 1
    assert height * width == len(block) == len(block.unique())
    return height, width


def check(masks: Masks, batch_size: int, grid, cfg: MaskConfig) -> None:
    """Everything that holds for any masks."""
    patches = grid[0] * grid[1]
    context, targets = masks
    assert context.dtype == targets.dtype == torch.int64
    assert context.shape == (batch_size, cfg.num_context_patches(grid))
    assert targets.shape[:2] == (batch_size, cfg.num_target_blocks) and targets.shape[2] >= 1
    for index in (context, targets):
        assert index.min() >= 0 and index.max() < patches
        assert (index.diff(dim=-1) > 0).all()  # strictly ascending, so no patch twice
    assert not (occupancy(context, patches) & occupancy(targets.flatten(1), patches)).any()
    # One shape for all blocks of a call, at any place that holds it whole.
    height, width = block_shape(targets[0, 0], grid)
    corner = targets[..., :1]
    expected = corner + (torch.arange(height)[:, None] * grid[1] + torch.arange(width)).flatten()
    assert torch.equal(targets, expected)
    assert (corner % grid[1] <= grid[1] - width).all() and (corner // grid[1] <= grid[0] - height).all()


@contextlib.contextmanager
def at_most(seconds: float):
    """Fail, rather than hang, when the body takes longer."""

    def stop(*_):
        raise AssertionError(f"still sampling after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- shape, order, disjointness


@pytest.mark.parametrize("seed", range(20))
def test_masks_on_the_usual_grid(seed):
    cfg = blocks_config()
    check(sample_block_masks(16, GRID, cfg, seeded(seed)), 16, GRID, cfg)


@st.composite
def cases(draw):
    def pair(low, high):
        return tuple(sorted(draw(st.tuples(st.floats(low, high), st.floats(low, high)))))

    grid = draw(st.tuples(st.integers(2, 12), st.integers(2, 12)))
    cfg = MaskConfig(
        target_scale=pair(0.02, 0.8),
        target_aspect_ratio=pair(0.5, 2.0),
        context_scale=pair(0.1, 1.0),
        context_aspect_ratio=pair(0.7, 1.4),
        num_target_blocks=draw(st.integers(1, 9)),
        context_share=draw(st.floats(0.05, 0.9)),
    )
    return grid, cfg, draw(st.integers(1, 9)), draw(st.integers(0, 10**6))


@QUICK
@given(cases())
def test_any_settings_on_any_grid_give_masks_or_a_refusal(case):
    grid, cfg, batch_size, seed = case
    try:
        cfg.check_grid(grid)
    except ConfigError as refused:
        with pytest.raises(ConfigError, match=r"mask\."):
            sample_block_masks(batch_size, grid, cfg, seeded(seed))
        assert f"{grid[0]} x {grid[1]}" in str(refused)
    else:
        with at_most(5):
            masks = sample_block_masks(batch_size, grid, cfg, seeded(seed))
        check(masks, batch_size, grid, cfg)


def test_most_of_those_settings_are_not_refused():
    """The property above would be empty if everything were refused."""
    cfg = blocks_config(target_scale=(0.05, 0.5), target_aspect_ratio=(0.6, 1.6), context_share=0.4, num_target_blocks=9)
    for grid in [(2, 12), (5, 3), (12, 7)]:
        check(sample_block_masks(8, grid, cfg, seeded()), 8, grid, cfg)


@pytest.mark.parametrize(("grid", "share"), [((2, 2), 0.25), ((3, 3), 0.22), ((2, 5), 0.2), ((5, 2), 0.2)])
def test_a_block_that_rounding_makes_too_large_gives_way(grid, share):
    """The largest block that is allowed, rounded to whole patches, would take some of the context's."""
    cfg = blocks_config(target_scale=(0.7, 0.7), target_aspect_ratio=(1, 1), num_target_blocks=2, context_share=share)
    with at_most(5):
        masks = sample_block_masks(32, grid, cfg, seeded())
    check(masks, 32, grid, cfg)


def test_no_grid_hangs():
    cfg, served = MaskConfig(), set()
    with at_most(60):
        for grid in ((rows, cols) for rows in range(2, 33) for cols in range(2, 33)):
            try:
                masks = sample_block_masks(2, grid, cfg, seeded(grid[0] * 33 + grid[1]))
            except ConfigError:
                continue
            check(masks, 2, grid, cfg)
            served.add(grid)
    assert {(side, side) for side in (4, 6, 7, 8, 14, 16, 32)} <= served and len(served) > 800


@pytest.mark.parametrize("grid", [(1, 1), (1, 8), (8, 1)])
def test_grids_that_cannot_hide_anything_are_refused(grid):
    with pytest.raises(ConfigError, match=f"{grid[0]} x {grid[1]} .*too small.*model.img_size"):
        sample_block_masks(2, grid, blocks_config(), seeded())


def test_blocks_too_large_are_refused():
    with pytest.raises(ConfigError, match=r"mask\.target_scale = \[0\.2, 0\.7\] does not fit .*8 x 8.*at most 0\.\d+"):
        sample_block_masks(2, GRID, blocks_config(target_scale=(0.2, 0.7), context_share=0.4), seeded())
    with pytest.raises(ConfigError, match=r"mask\.target_aspect_ratio = \[0\.2, 0\.3\].*longer than .*8 x 8"):
        sample_block_masks(2, GRID, blocks_config(target_scale=(0.4, 0.5), target_aspect_ratio=(0.2, 0.3)), seeded())


# ---------------------------------------------------------------- sizes that do not depend on the batch


def test_context_size_does_not_depend_on_the_batch():
    for cfg in (blocks_config(), blocks_config(target_scale=(0.3, 0.4), num_target_blocks=6, context_share=0.4)):
        for seed in range(5):
            sizes = {sample_block_masks(b, GRID, cfg, seeded(seed)).context.shape[1] for b in (1, 2, 64, 512)}
            assert sizes == {cfg.num_context_patches(GRID)}


def test_many_large_blocks_leave_the_context_its_size():
    cfg = blocks_config(target_scale=(0.4, 0.5), target_aspect_ratio=(1, 1), num_target_blocks=12, context_share=0.45)
    masks = sample_block_masks(512, GRID, cfg, seeded())
    check(masks, 512, GRID, cfg)
    union = occupancy(masks.targets.flatten(1), 64).sum(1)
    assert union.max() <= 64 - masks.context.shape[1]
    places = torch.tensor([len(row.unique()) for row in masks.targets[..., 0]])
    assert (places > 1).float().mean() > 0.5  # blocks repeat one another only where there is no room left


def test_blocks_do_not_repeat_while_there_is_room():
    cfg = blocks_config(target_scale=(0.06, 0.07), target_aspect_ratio=(1, 1), num_target_blocks=3, context_share=0.3)
    masks = sample_block_masks(512, GRID, cfg, seeded())  # 3 blocks of 2 x 2 among 49 places
    repeated = torch.tensor([len(row.unique()) < 3 for row in masks.targets[..., 0]]).float().mean()
    assert repeated < 0.15  # by chance alone: 1 - 48/49 * 47/49 = 6 %


# ---------------------------------------------------------------- randomness


def test_images_of_a_batch_have_masks_of_their_own():
    masks = sample_block_masks(64, GRID, blocks_config(), seeded())
    assert len(masks.context.unique(dim=0)) > 60
    assert len(masks.targets.flatten(1).unique(dim=0)) > 60
    assert len(masks.targets[0, :, 0].unique()) + len(masks.targets[1, :, 0].unique()) > 4  # and so do the blocks of an image


def test_the_generator_decides():
    cfg = blocks_config()
    first, again, other = (sample_block_masks(8, GRID, cfg, seeded(s)) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.context, other.context)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    sample_block_masks(8, GRID, cfg, seeded())
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from anywhere else
    one = sample_block_masks(8, GRID, cfg)
    torch.manual_seed(1)
    two = sample_block_masks(8, GRID, cfg)
    assert torch.equal(one.context, two.context) and torch.equal(one.targets, two.targets)


@pytest.fixture(scope="module")
def counts():
    """How often each patch of 8 x 8 is target, and context given that it is no target, over 64,000 images."""
    cfg, generator = blocks_config(), seeded(11)
    target, context = torch.zeros(64), torch.zeros(64)
    for _ in range(400):  # many calls, since a call has one block shape
        masks = sample_block_masks(160, GRID, cfg, generator)
        target += occupancy(masks.targets.flatten(1), 64).sum(0)
        context += occupancy(masks.context, 64).sum(0)
    return (target / 64000).view(8, 8), (context / (64000 - target)).view(8, 8)


def test_every_patch_is_reachable_as_target_and_as_context(counts):
    target, context = counts
    assert target.min() > 0.02  # corners are in one placement of each block only, yet they are
    assert context.min() > 0.1
    for border in (target[0], target[-1], target[:, 0], target[:, -1]):
        assert border.mean() > 0.1


def test_no_side_is_favoured(counts):
    """What happens in one place happens as often in its mirror image."""
    for share, tolerance in zip(counts, (0.015, 0.03), strict=True):
        assert (share - share.flip(0)).abs().max() < tolerance
        assert (share - share.flip(1)).abs().max() < tolerance


def test_what_the_context_drops_is_dropped_anywhere(counts):
    """Given that a patch is no target, its row says little about whether it is kept, and nothing about top or bottom."""
    rows = counts[1].mean(1)
    assert (rows[:4].mean() - rows[4:].mean()).abs() < 0.01
    assert rows.max() / rows.min() < 1.6  # cut in raster order it would be tenfold


def test_scale_and_aspect_are_drawn_independently():
    cfg = blocks_config(target_scale=(0.05, 0.3), target_aspect_ratio=(0.5, 2.0), num_target_blocks=1, context_share=0.2)
    generator = seeded(5)
    shapes = [block_shape(sample_block_masks(1, (40, 40), cfg, generator).targets[0, 0], (40, 40)) for _ in range(1500)]
    height, width = torch.tensor(shapes, dtype=torch.float64).T
    area, aspect = height * width / 1600, height / width
    assert abs(float(torch.corrcoef(torch.stack([area, aspect]))[0, 1])) < 0.1
    assert area.min() < 0.07 and area.max() > 0.28 and aspect.min() < 0.6 and aspect.max() > 1.85  # all of both ranges is used
    assert area.min() > 0.04 and area.max() < 0.32 and aspect.min() > 0.4 and aspect.max() < 2.3  # and nothing beyond


def test_the_context_block_confines_the_context():
    """A small context block holds all of the context while it has room for it."""
    cfg = blocks_config(target_scale=(0.05, 0.06), num_target_blocks=1, context_scale=(0.25, 0.25), context_share=0.06)
    masks = sample_block_masks(64, GRID, cfg, seeded())  # 4 patches out of a block of 4 x 4, at most 4 of which are targets
    for coordinate in (masks.context // 8, masks.context % 8):
        assert (coordinate.amax(1) - coordinate.amin(1) < 4).all()


def test_masks_move_together():
    masks = sample_block_masks(2, GRID, blocks_config(), seeded()).to("meta")
    assert masks.context.device.type == masks.targets.device.type == "meta"


def test_the_largest_of_each_row_also_where_numbers_are_equal():
    values = torch.rand(50, 20, generator=torch.Generator().manual_seed(0))
    by_sorting = values.argsort(1, descending=True)[:, :7].sort(1).values
    assert torch.equal(_largest(values, 7), by_sorting)
    equal = _largest(torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 5.0, 4.0, 1.0]]), 2)
    assert equal[0, 0] == 0 and equal[0, 1] in (2, 3) and equal[1].tolist() == [1, 2]
