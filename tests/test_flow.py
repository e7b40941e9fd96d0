"""Rectified flow: closed forms of noising, guidance and Euler's steps."""

import pytest
import torch

from modeling.flow import Guidance, euler, noised, shifted, timesteps


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_times_run_from_noise_to_the_picture():
    assert timesteps(5, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    moved = timesteps(5, 3.0).tolist()
    assert moved == pytest.approx([1.0, 2.25 / 2.5, 1.5 / 2, 0.75 / 1.5, 0.0])
    with pytest.raises(ValueError, match="num_timesteps=1 bounds no step"):
        timesteps(1, 1.0)


def test_a_shift_is_undone_by_its_inverse():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shifted(shifted(t, 3.0), 1 / 3), t)


def test_noising_ends_in_noise_and_its_target_is_the_derivative():
    clean, noise = random(2, 3, seed=1), random(2, 3, seed=2)
    assert torch.equal(noised(clean, noise, torch.zeros(2, 1))[0], clean)
    assert torch.equal(noised(clean, noise, torch.ones(2, 1))[0], noise)
    t = torch.tensor([[0.3], [0.8]], dtype=torch.float64)
    x, target = noised(clean, noise, t)
    ahead, _ = noised(clean, noise, t + 1e-6)
    torch.testing.assert_close((ahead - x) / 1e-6, target, atol=1e-8, rtol=1e-8)


def test_euler_recovers_the_picture_from_its_own_velocity():
    """Straight lines are exact in any number of steps."""
    clean, noise = random(2, 3, 4, seed=1), random(2, 3, 4, seed=2)
    for count in (2, 7):
        times = timesteps(count, 3.0).double()
        asked = []
        end = euler(noise, times, lambda x, t, asked=asked: asked.append(t) or noise - clean)
        torch.testing.assert_close(end, clean)
        assert asked == times[:-1].tolist()


def test_euler_is_of_first_order():
    """dx/dt = x from t = 1 to 0 ends at exp(-1); twice the steps, half the error."""
    errors = []
    for count in (101, 201):
        end = euler(torch.ones(1).double(), timesteps(count, 1.0).double(), lambda x, t: x)
        errors.append(abs(float(end) - 0.36787944117144233))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)


FULL, TEXTLESS, BLIND = random(2, 5, 4, seed=3), random(2, 5, 4, seed=4), random(2, 5, 4, seed=5)


def test_guidance_by_hand_without_renormalisation():
    """With renorm_min 1 the factor is always 1."""
    plain = Guidance(text_scale=4.0, image_scale=1.5, renorm_min=1.0)
    text = TEXTLESS + 4 * (FULL - TEXTLESS)
    torch.testing.assert_close(plain(FULL, TEXTLESS, None), text)
    torch.testing.assert_close(plain(FULL, TEXTLESS, BLIND), BLIND + 1.5 * (text - BLIND))
    assert plain(FULL, None, None) is FULL


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_renormalisation_keeps_the_norm_and_never_lengthens(renorm):
    guidance = Guidance(renorm=renorm)
    by_text = guidance(FULL, TEXTLESS, None)
    dims = (1, 2) if renorm == "global" else (2,)
    raw = Guidance(renorm_min=1.0)(FULL, TEXTLESS, None).norm(dim=dims)
    expected = torch.minimum(FULL.norm(dim=dims), raw)
    torch.testing.assert_close(by_text.norm(dim=dims), expected)
    both = guidance(FULL, TEXTLESS, BLIND)
    if renorm == "text_channel":  # the image step comes after it
        torch.testing.assert_close(both, BLIND + 1.5 * (by_text - BLIND))
    else:
        assert (both.norm(dim=dims) <= FULL.norm(dim=dims) * (1 + 1e-9)).all()


def test_two_pictures_are_guided_like_each_alone():
    for renorm in ("global", "channel", "text_channel"):
        guidance = Guidance(renorm=renorm)
        alone = [guidance(FULL[i : i + 1], TEXTLESS[i : i + 1], BLIND[i : i + 1]) for i in (0, 1)]
        torch.testing.assert_close(guidance(FULL, TEXTLESS, BLIND), torch.cat(alone))


@pytest.mark.parametrize(
    ("scales", "t", "expected"),
    [
        ((4.0, 1.5), 1.0, (True, True)),
        ((4.0, 1.5), 0.4, (False, False)),  # the interval is open below
        ((4.0, 1.5), 0.41, (True, True)),
        ((4.0, 1.0), 0.9, (True, False)),
        ((1.0, 1.5), 0.9, (False, False)),  # the image alone guides nothing
    ],
)
def test_branches_that_are_needed(scales, t, expected):
    assert Guidance(*scales).branches(t) == expected


def test_an_unknown_renormalisation_is_named():
    with pytest.raises(ValueError, match="renorm='tokens' is unknown: choose global, channel or"):
        Guidance(renorm="tokens")
