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
    assert float(ddim.alphas_at(ddim.Schedule.from_json(CONFIG), 999)) == pytest.approx(0.00466010, abs=1e-7)


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


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "ScoreSdeVeScheduler"])
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
