"""ddim.py against diffusers' DDIMScheduler, torch.distributions and the figures of the official code."""
import pytest
import torch
from diffusers import DDIMScheduler

import ddim
from conftest import assert_close, seeded

CONFIG = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
              set_alpha_to_one=False, steps_offset=1, clip_sample=False)
STEPS_20 = [951, 901, 851, 801, 751, 701, 651, 601, 551, 501, 451, 401, 351, 301, 251, 201, 151, 101, 51, 1]
# std_dev_t of the official training code at those timesteps, eta = 1
STD_20 = [.644391, .624104, .602890, .580728, .557617, .533580, .508666, .482938, .456467, .429321,
          .401553, .373183, .344179, .314409, .283555, .250869, .214393, .167295, .040597, .020648]


def make_pair(steps: int = 20, **changes) -> tuple[ddim.Schedule, DDIMScheduler]:
    """Ours and diffusers', from the same configuration."""
    theirs = DDIMScheduler.from_config(CONFIG | changes)
    theirs.set_timesteps(steps)
    return ddim.Schedule.from_json(CONFIG | changes), theirs


def latents(seed: int, n: int = 3) -> torch.Tensor:
    """Random latents [n, 4, 5, 6]."""
    return torch.randn(n, 4, 5, 6, generator=seeded(seed))


def test_alphas_equal_diffusers():
    for changes in ({}, {"beta_schedule": "linear"}, {"set_alpha_to_one": True}, {"num_train_timesteps": 500}):
        ours, theirs = make_pair(**changes)
        assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
        assert ours.final_alpha_cumprod == float(theirs.final_alpha_cumprod)
    assert ddim.Schedule.from_json(CONFIG).final_alpha_cumprod == pytest.approx(0.99914998, abs=1e-7)
    assert float(ddim.powers_at(ddim.Schedule.from_json(CONFIG), 999)[0]) == pytest.approx(0.00466010, abs=1e-7)


def test_defaults_for_missing_fields_equal_diffusers():
    ours, theirs = ddim.Schedule.from_json({}), DDIMScheduler()
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod) and ours.final_alpha_cumprod == float(theirs.final_alpha_cumprod)
    assert ours.steps_offset == theirs.config.steps_offset and ours.prediction_type == theirs.config.prediction_type


@pytest.mark.parametrize("steps", [1, 7, 20, 50, 999])
def test_timesteps_equal_diffusers(steps):
    ours, theirs = make_pair(steps)
    assert ours.timesteps(steps) == theirs.timesteps.tolist()


def test_timesteps_by_hand():
    ours, _ = make_pair()
    assert ours.timesteps(20) == STEPS_20
    assert ours.timesteps(50) == list(range(981, 0, -20))
    for steps in (0, -1, 1000):
        with pytest.raises(ValueError, match="steps"):
            ours.timesteps(steps)


def test_std_of_the_official_code():
    ours, _ = make_pair()
    for t, expected in zip(STEPS_20, STD_20, strict=True):
        std = ddim.step_gaussian(ours, latents(1), latents(2), t, t - 50)[1]
        assert float(std) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [1.0, 0.3, 0.0])
def test_step_equals_diffusers(prediction, eta):
    ours, theirs = make_pair(prediction_type=prediction)
    x, out, noise = latents(1), latents(2), latents(3)
    for t in STEPS_20:
        mean, std = ddim.step_gaussian(ours, x, out, t, t - 50, eta)
        expected = theirs.step(out, t, x, eta=eta, variance_noise=noise)
        assert_close(mean + std * noise, expected.prev_sample, what=f"sample at {t}")
        assert_close(mean, theirs.step(out, t, x, eta=eta, variance_noise=torch.zeros_like(noise)).prev_sample, what=f"mean at {t}")
        assert_close(std, eta * theirs._get_variance(t, t - 50).sqrt(), 1e-7, f"std at {t}")
        assert_close(ddim.predict_x0(ours, x, out, t), expected.pred_original_sample, what=f"x0 at {t}")
        x = expected.prev_sample


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_vector_of_timesteps_equals_scalars(prediction):
    ours, _ = make_pair(prediction_type=prediction)
    t = torch.tensor([951, 301, 1])
    x, out = latents(1), latents(2)
    mean, std = ddim.step_gaussian(ours, x, out, t, t - 50)
    x0 = ddim.predict_x0(ours, x, out, t)
    assert std.shape == (3, 1, 1, 1)
    for i, ti in enumerate(t.tolist()):
        one_mean, one_std = ddim.step_gaussian(ours, x[i:i + 1], out[i:i + 1], ti, ti - 50)
        assert torch.equal(mean[i:i + 1], one_mean) and float(std[i]) == float(one_std)
        assert torch.equal(x0[i:i + 1], ddim.predict_x0(ours, x[i:i + 1], out[i:i + 1], ti))


@pytest.mark.parametrize("to_one, expected", [(False, 0.020648), (True, 0.0)])
def test_last_step_uses_the_final_alpha(to_one, expected):
    ours, theirs = make_pair(set_alpha_to_one=to_one)
    for t, previous in ((1, -49), (torch.tensor([1]), torch.tensor([-49]))):
        mean, std = ddim.step_gaussian(ours, latents(1, 1), latents(2, 1), t, previous)
        assert float(std) == pytest.approx(expected, abs=1e-6)
        noiseless = torch.zeros(1, 4, 5, 6)
        assert_close(mean, theirs.step(latents(2, 1), 1, latents(1, 1), eta=1.0, variance_noise=noiseless).prev_sample)
        if to_one:      # nothing but the predicted clean latent is left
            assert torch.equal(mean, ddim.predict_x0(ours, latents(1, 1), latents(2, 1), 1))


def test_half_precision_inputs_are_computed_in_fp32():
    ours, _ = make_pair()
    x, out = latents(1).bfloat16(), latents(2).bfloat16()
    mean, std = ddim.step_gaussian(ours, x, out, 501, 451)
    assert mean.dtype == std.dtype == torch.float32
    assert torch.equal(mean, ddim.step_gaussian(ours, x.float(), out.float(), 501, 451)[0])


def test_log_prob_is_the_mean_of_normal_log_densities():
    sample, mean = latents(1), latents(2)
    for std in (torch.tensor(0.3), torch.tensor([0.1, 0.5, 2.0]).view(3, 1, 1, 1)):
        expected = torch.distributions.Normal(mean, std).log_prob(sample).mean(dim=(1, 2, 3))
        assert_close(ddim.log_prob(sample, mean, std), expected, 1e-6)


def test_log_prob_gradient_flows_into_the_mean_only():
    sample, mean, std = latents(1).requires_grad_(), latents(2).requires_grad_(), torch.tensor(0.3)
    ddim.log_prob(sample, mean, std).sum().backward()
    assert sample.grad is None
    assert_close(mean.grad, (sample - mean).detach() / std ** 2 / mean[0].numel())


def test_add_noise_equals_diffusers():
    ours, theirs = make_pair()
    t = torch.tensor([0, 500, 999])
    assert_close(ddim.add_noise(ours, latents(1), latents(2), t), theirs.add_noise(latents(1), latents(2), t), 1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_predicted_x0_undoes_add_noise(prediction):
    ours, theirs = make_pair(prediction_type=prediction)
    clean, noise, t = latents(1), latents(2), torch.tensor([0, 500, 900])
    out = noise if prediction == "epsilon" else theirs.get_velocity(clean, noise, t)
    assert_close(ddim.predict_x0(ours, ddim.add_noise(ours, clean, noise, t), out, t), clean)


@pytest.mark.parametrize("field, value", [
    ("beta_schedule", "squaredcos_cap_v2"), ("prediction_type", "sample"), ("rescale_betas_zero_snr", True),
    ("trained_betas", [0.1, 0.2]), ("clip_sample", True), ("thresholding", True)])
def test_other_schedules_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        ddim.Schedule.from_json(CONFIG | {field: value})


def test_what_belongs_to_a_sampler_is_not_taken_over():
    """Folders saved with another sampler name another spacing and lack DDIM's own settings; the noise schedule is what counts."""
    theirs = {k: v for k, v in CONFIG.items() if k not in ("set_alpha_to_one", "steps_offset", "clip_sample")}
    ours, other = ddim.Schedule.from_json(CONFIG), ddim.Schedule.from_json(
        theirs | dict(_class_name="DPMSolverMultistepScheduler", timestep_spacing="linspace"))
    assert other.timesteps(20) == ours.timesteps(20) and other.final_alpha_cumprod == ours.final_alpha_cumprod
    assert torch.equal(other.alphas_cumprod, ours.alphas_cumprod)


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "ScoreSdeVeScheduler"])
def test_other_noise_processes_are_refused(name):
    """Their configurations, as diffusers writes them, have none of our betas; a flow's class is refused with some as well."""
    import diffusers
    config = dict(getattr(diffusers, name)().config)
    for more in ({}, CONFIG) if "Score" not in name else ({},):
        with pytest.raises(ValueError, match=f"_class_name='{name}'"):
            ddim.Schedule.from_json(more | config | dict(_class_name=name))
    with pytest.raises(ValueError, match="another noise process"):
        ddim.Schedule.from_json(dict(_class_name="ScoreSdeVpScheduler", beta_min=0.1, beta_max=20, num_train_timesteps=1000))


@pytest.mark.parametrize("changes", [dict(use_flow_sigmas=True, flow_shift=3.0), dict(prediction_type="flow_prediction"), dict(prediction_type="sample"),
                                     dict(timestep_type="continuous"), dict(snr_shift_scale=3.0)])
def test_options_that_change_the_noise_are_refused(changes):
    key = next(iter(changes))
    with pytest.raises(ValueError, match=f"{key}={changes[key]!r} is not supported"):
        ddim.Schedule.from_json(CONFIG | dict(_class_name="UniPCMultistepScheduler") | changes)


# Rectified flow

FLOW = dict(_class_name=ddim.FLOW, num_train_timesteps=1000, shift=1.0)


def make_flow(steps: int = 20, shift: float = 1.0):
    """Ours and diffusers', from the same configuration."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    theirs = FlowMatchEulerDiscreteScheduler.from_config(FLOW | dict(shift=shift))
    theirs.set_timesteps(steps)
    return ddim.Schedule.from_json(dict(theirs.config) | dict(_class_name=ddim.FLOW)), theirs


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_a_flow_without_noise_equals_diffusers(steps, shift):
    """All steps of eta 0, and the timesteps that the network is told."""
    ours, theirs = make_flow(steps, shift)
    assert_close(torch.tensor(ours.timesteps(steps)), theirs.timesteps, 1e-4)
    walk = ours.previous(steps)
    assert list(walk.values()) == ours.timesteps(steps)[1:] + [0.0]
    x = y = latents(1)
    for i, (t, previous) in enumerate(walk.items()):
        velocity = latents(i + 2)
        x, std = ddim.step_gaussian(ours, x, velocity, t, previous, eta=0.0)
        y = theirs.step(velocity, theirs.timesteps[i], y).prev_sample
        assert float(std) == 0
        assert_close(x, y, 1e-5, f"sample at {t}")


def test_a_flows_parts_undo_each_other():
    """x0 and noise come back from the network's right answer, at every level; the noised latent is diffusers' own."""
    ours, theirs = make_flow()
    clean, noise = latents(1, 5), latents(2, 5)
    t = torch.tensor([1.0, 250.5, 500.0, 999.0, 1000.0])
    x_t = ddim.add_noise(ours, clean, noise, t)
    sigma = (t / 1000).view(-1, 1, 1, 1)
    assert_close(x_t, (1 - sigma) * clean + sigma * noise, 1e-6)
    out = ddim.target(ours, clean, noise, t)
    assert torch.equal(out, noise - clean)
    x0, eps = ddim.predict_x0_eps(ours, x_t, out, t)
    assert_close(x0, clean)
    assert_close(eps, noise)
    for i, ti in enumerate(t.tolist()):
        assert torch.equal(ddim.predict_x0(ours, x_t[i:i + 1], out[i:i + 1], ti), x0[i:i + 1])


def exact_answer(schedule, x, t: float, mean: float, std: float):
    """What the best network says where the data is Normal(mean, std^2): E[eps - x0 | x_t], or E[eps | x_t]."""
    alpha2, sigma2 = (float(v) for v in ddim.powers_at(schedule, t))
    share = std ** 2 * alpha2 ** 0.5 / (alpha2 * std ** 2 + sigma2)
    x0 = mean + share * (x - alpha2 ** 0.5 * mean)
    if schedule.flow:                       # of sigma = 1 too, where x0 says nothing of eps
        eps = sigma2 ** 0.5 * (x - alpha2 ** 0.5 * mean) / (alpha2 * std ** 2 + sigma2)
        return eps - x0
    return (x - alpha2 ** 0.5 * x0) / sigma2 ** 0.5


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shift", [None, 1.0, 3.0])
def test_the_walk_keeps_the_exact_marginals(shift, eta):
    """Data Normal(0.7, 0.1^2), whose score is known: at every step mean and variance are those of the path.

    With a point (variance 0) they are exact at any number of steps: DDIM's family keeps q(x_t | x_0). The moments are those of the affine
    map, computed from two points, not sampled.
    """
    schedule = make_flow(20, shift)[0] if shift else ddim.stable_diffusion()
    steps, mean, std = (20, 0.7, 0.0)
    walk = schedule.previous(steps)
    first = next(iter(walk))
    alpha2, sigma2 = (float(v) for v in ddim.powers_at(schedule, first))
    m, v = alpha2 ** 0.5 * mean, alpha2 * std ** 2 + sigma2
    for t, previous in walk.items():
        x = torch.tensor([m, m + 1]).view(2, 1, 1, 1)
        after, spread = ddim.step_gaussian(schedule, x, exact_answer(schedule, x, t, mean, std), t, previous, eta)
        low, high = after.flatten().tolist()
        m, v = low, (high - low) ** 2 * v + float(spread) ** 2
        alpha2, sigma2 = (float(v) for v in ddim.powers_at(schedule, previous))
        assert m == pytest.approx(alpha2 ** 0.5 * mean, abs=2e-5), t
        assert v == pytest.approx(alpha2 * std ** 2 + sigma2, abs=2e-5), t


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_many_steps_draw_the_data(eta):
    """Data Normal(0.7, 0.3^2): its prediction is not exact within a step, so many small ones end in its mean and variance."""
    schedule, mean, std, found = make_flow(1)[0], 0.7, 0.3, []
    for steps in (50, 400):
        m, v = 0.0, 1.0
        for t, previous in schedule.previous(steps).items():
            x = torch.tensor([m, m + 1]).view(2, 1, 1, 1)
            after, spread = ddim.step_gaussian(schedule, x, exact_answer(schedule, x, t, mean, std), t, previous, eta)
            low, high = after.flatten().tolist()
            m, v = low, (high - low) ** 2 * v + float(spread) ** 2
        found.append((abs(m - mean), abs(v - std ** 2)))
    assert found[1][0] < 2e-3 and found[1][1] < 0.1 * std ** 2 and found[1][1] < found[0][1] / 4


def test_a_flow_step_is_a_diffusion_step_of_the_scaled_latent():
    """Of x / sqrt((1 - sigma)^2 + sigma^2), on the variance-preserving path with the same signal-to-noise ratios."""
    flow, steps = make_flow()[0], [900.0, 650.0]
    powers = [ddim.powers_at(flow, t) for t in steps]
    shares = [alpha2 / (alpha2 + sigma2) for alpha2, sigma2 in powers]
    scales = [float(alpha2 + sigma2) ** 0.5 for alpha2, sigma2 in powers]
    other = ddim.Schedule(torch.stack([shares[1], shares[0]]), 1.0)          # its timesteps 1 and 0
    x, velocity = latents(1), latents(2)
    eps = ddim.predict_x0_eps(flow, x, velocity, steps[0])[1]
    mean, std = ddim.step_gaussian(flow, x, velocity, *steps)
    mean_other, std_other = ddim.step_gaussian(other, x / scales[0], eps, 1, 0)
    assert_close(mean / scales[1], mean_other, 1e-5)
    assert float(std) / scales[1] == pytest.approx(float(std_other), rel=1e-5)
    sample = latents(3)
    shifted = ddim.log_prob(sample / scales[1], mean_other, std_other) - ddim.log_prob(sample, mean, std)
    assert_close(shifted, torch.full((3,), float(torch.tensor(scales[1]).log())), 1e-5)      # the same for all: ratios carry over


def test_a_flows_density_is_the_normals():
    flow = make_flow()[0]
    t = torch.tensor([1000.0, 700.0, 50.0])
    mean, std = ddim.step_gaussian(flow, latents(1), latents(2), t, t - 40)
    assert std.shape == (3, 1, 1, 1) and torch.isfinite(std).all()
    expected = torch.distributions.Normal(mean, std).log_prob(latents(3)).mean(dim=(1, 2, 3))
    assert_close(ddim.log_prob(latents(3), mean, std), expected, 1e-5)
    for i, ti in enumerate(t.tolist()):
        one_mean, one_std = ddim.step_gaussian(flow, latents(1)[i:i + 1], latents(2)[i:i + 1], ti, ti - 40)
        assert_close(mean[i:i + 1], one_mean, 1e-6)
        assert float(std[i]) == pytest.approx(float(one_std), rel=1e-6)


def test_the_first_and_the_last_step_of_a_flow():
    """From pure noise: the next noise is fresh. To the picture: no spread, so that step is nobody's sample."""
    flow = make_flow()[0]
    mean, std = ddim.step_gaussian(flow, latents(1), latents(2), 1000.0, 950.0)
    assert float(std) == pytest.approx(0.95) and torch.isfinite(mean).all()
    assert_close(mean, 0.05 * (latents(1) - latents(2)), 1e-6)
    mean, std = ddim.step_gaussian(flow, latents(1), latents(2), 1.0, 0.0)
    assert float(std) == 0 and torch.equal(mean, ddim.predict_x0(flow, latents(1), latents(2), 1.0))
    assert ddim.spread(flow, 20) == flow.timesteps(20)[:-1]
    assert ddim.spread(ddim.stable_diffusion(), 20) == STEPS_20
    assert ddim.spread(make_pair(set_alpha_to_one=True)[0], 20) == STEPS_20[:-1]


def test_what_a_judge_is_told():
    """The timestep with the same signal-to-noise ratio on its own path, there and back; its own timesteps stay as they are."""
    flow, sd = make_flow()[0], ddim.stable_diffusion()
    t = torch.tensor([0.0, 100.0, 350.0, 500.0, 650.0, 750.0, 900.0, 1000.0])
    there = ddim.told(flow, t, by_flow=False)
    assert there.tolist() == [0, 13, 186, 354, 541, 673, 914, 999]
    for ti, told in zip(t[1:-1].tolist(), there[1:-1].tolist()):
        ratio = ((1 - ti / 1000) / (ti / 1000)) ** 2
        alpha = sd.alphas_cumprod[told - 1:told + 2]
        assert alpha[2] / (1 - alpha[2]) < ratio < alpha[0] / (1 - alpha[0])
    assert_close(ddim.told(sd, there[2:-1], by_flow=True), t[2:-1], 1.0)
    assert ddim.told(sd, torch.tensor([0]), by_flow=True).tolist() == [0]          # a finished picture
    assert ddim.told(flow, t, by_flow=True) is t and ddim.told(sd, there, by_flow=False) is there


@pytest.mark.parametrize("changes", [dict(use_dynamic_shifting=True), dict(invert_sigmas=True), dict(shift_terminal=0.02), dict(num_train_timesteps=500),
                                     dict(use_karras_sigmas=True), dict(prediction_type="epsilon"), dict(shift=0.0), dict(shift=-1.0), dict(shift=float("inf")), dict(shift=1e20)])
def test_other_flows_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ddim.Schedule.from_json(FLOW | changes)


def test_steps_of_a_flow():
    flow = make_flow()[0]
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="steps"):
            flow.timesteps(steps)
    assert len(flow.timesteps(1000)) == 1000 and flow.count == 1000
    both = flow.both_ends(flow.timesteps(4)[1:3], 4)
    assert both.shape == (2, 2) and both[1].tolist() == pytest.approx(flow.timesteps(4)[2:])
    assert ddim.stable_diffusion().both_ends([951, 1], 20).tolist() == [[951, 1], [901, -49]]
