"""Stochastic DDIM: noise schedule, predicted clean latent, a step as a Gaussian, its log-density.

SPO needs p_theta(x_{t-1} | x_t, c) as a distribution that can be sampled many times and whose
density can be evaluated (paper, Eqs. 4 and 5; DDIM with eta = 1, section 5.1). Pure functions
of tensors, all in fp32.

Shapes: N samples, C H W latent. Timesteps are integers 0..999; alphas_cumprod[t] falls from 0.9991
to 0.0047. `alpha` below is always alphas_cumprod at some t.
"""
import functools
import re
from dataclasses import dataclass

import torch

# What options of schedulers may say; other values make the noise another one, or the pictures.
OFF = (None, False)
SUPPORTED = dict(
    prediction_type=("epsilon", "v_prediction"), beta_schedule=("linear", "scaled_linear"),
    num_train_timesteps=range(1, 1001), steps_offset=(0, 1), trained_betas=OFF, clip_sample=OFF,
    rescale_betas_zero_snr=OFF, thresholding=OFF, use_flow_sigmas=OFF,
    timestep_type=(None, "discrete"), snr_shift_scale=(None, 1.0))


@dataclass(frozen=True)
class Schedule:
    """The noise schedule of a checkpoint (`scheduler/scheduler_config.json` of any class)."""
    alphas_cumprod: torch.Tensor        # [1000], fp32, on the CPU: looked up without a device sync
    final_alpha_cumprod: float          # stands for "after the last step"
    prediction_type: str = "epsilon"    # or "v_prediction"
    steps_offset: int = 1

    @classmethod
    def from_json(cls, config: dict) -> "Schedule":
        """Build from a scheduler configuration; ValueError for what SD-1.5 and SDXL do not use.

        How a sampler spaces its steps (`timestep_spacing`) is not part of the model and is ignored:
        SPO walks "leading". What configurations of other samplers leave out (steps_offset,
        set_alpha_to_one) is as in the official files.
        """
        name = str(config.get("_class_name", "DDIMScheduler"))
        own = name == "DDIMScheduler"           # with its defaults
        betas = own or {"beta_start", "beta_end", "beta_schedule", "trained_betas"} & config.keys()
        if re.search("Flow|EDM", name) or not betas:
            raise ValueError(f"scheduler config: _class_name={name!r} is another noise process "
                             "(a flow, EDM) than that of SD-1.5 and SDXL, which has betas")
        for key, values in SUPPORTED.items():
            if config.get(key, values[0]) not in values:
                raise ValueError(f"scheduler config: {key}={config[key]!r} is not supported")
        alphas_cumprod = (1 - _betas(config)).cumprod(0)
        final = 1.0 if config.get("set_alpha_to_one", own) else float(alphas_cumprod[0])
        return cls(alphas_cumprod, final, config.get("prediction_type", "epsilon"),
                   int(config.get("steps_offset", 0 if own else 1)))

    def timesteps(self, steps: int) -> list[int]:
        """Descending timesteps of a run of `steps` ("leading" spacing): 20 -> 951, 901, ..., 1."""
        count = len(self.alphas_cumprod)
        if not 1 <= steps <= count - self.steps_offset:
            raise ValueError(f"steps must lie in 1..{count - self.steps_offset}, not {steps}")
        return [i * self.stride(steps) + self.steps_offset for i in range(steps)][::-1]

    def stride(self, steps: int) -> int:
        """From one timestep of such a run to the next: 20 -> 50."""
        return len(self.alphas_cumprod) // steps


def _betas(config: dict) -> torch.Tensor:
    """Variance of the noise that each timestep adds, [num_train_timesteps]."""
    count = config.get("num_train_timesteps", 1000)
    low, high = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if not 0 < low <= high < 1:
        raise ValueError(f"scheduler config: beta_start={low!r}, beta_end={high!r}: they must lie "
                         "between 0 and 1, in this order")
    if config.get("beta_schedule") == "scaled_linear":
        return torch.linspace(low ** 0.5, high ** 0.5, count, dtype=torch.float32).square()
    return torch.linspace(low, high, count, dtype=torch.float32)


@functools.lru_cache(maxsize=8)
def _copy(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """alphas_cumprod on a device, copied once: a copy waits for all that a GPU was given before."""
    return table.to(device)


def alphas_at(schedule: Schedule, timestep: torch.Tensor | int) -> torch.Tensor:
    """alphas_cumprod at timesteps [N] -> [N, 1, 1, 1], there; at a number -> 0-d, on the CPU.

    A negative timestep lies behind the last step and has the final value.
    """
    table, final = schedule.alphas_cumprod, schedule.final_alpha_cumprod
    if isinstance(timestep, int):
        return table[timestep] if timestep >= 0 else torch.tensor(final)
    alpha = _copy(table, timestep.device)[timestep.clamp(min=0)]
    return torch.where(timestep >= 0, alpha, final).view(-1, 1, 1, 1)


def add_noise(schedule: Schedule, latents: torch.Tensor, noise: torch.Tensor,
              timestep: torch.Tensor) -> torch.Tensor:
    """q(x_t | x_0): clean latents and noise [N, C, H, W], timesteps [N] -> x_t."""
    alpha = alphas_at(schedule, timestep)
    return alpha.sqrt() * latents.float() + (1 - alpha).sqrt() * noise.float()


def predict_x0_eps(schedule: Schedule, latents: torch.Tensor, noise_pred: torch.Tensor,
                   alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's output at x_t -> (predicted clean latent, predicted noise), both [N, C, H, W].

    `alpha` as `alphas_at` gives it. This is DDIM's own estimate of x0, the picture that the SPM
    judges (section 4.2).
    """
    latents, noise_pred = latents.float(), noise_pred.float()
    a, b = alpha.sqrt(), (1 - alpha).sqrt()
    if schedule.prediction_type == "v_prediction":
        return a * latents - b * noise_pred, a * noise_pred + b * latents
    return (latents - b * noise_pred) / a, noise_pred


def predict_x0(schedule: Schedule, latents: torch.Tensor, noise_pred: torch.Tensor,
               timestep: torch.Tensor | int) -> torch.Tensor:
    """Predicted clean latent at a timestep, one number for all samples or [N]."""
    return predict_x0_eps(schedule, latents, noise_pred, alphas_at(schedule, timestep))[0]


def step_std(schedule: Schedule, timestep: torch.Tensor | int, previous: torch.Tensor | int,
             eta: float = 1.0) -> torch.Tensor:
    """The standard deviation of a step, as `step_gaussian` has it; no network is asked."""
    alpha, alpha_prev = alphas_at(schedule, timestep), alphas_at(schedule, previous)
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)        # DDIM, Eq. 16
    return eta * variance.sqrt()


def step_gaussian(schedule: Schedule, latents: torch.Tensor, noise_pred: torch.Tensor,
                  timestep: torch.Tensor | int, previous: torch.Tensor | int,
                  eta: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """p_theta(x_{t-1} | x_t, c) of Eq. 4: mean [N, C, H, W] and std (broadcastable), fp32.

    `timestep` and `previous` (the next smaller timestep; negative behind the last step) are
    numbers, or [N] each. With eta = 1 and 20 steps sigma runs from 0.644 at t = 951 to 0.0206 at
    t = 1: the last step is stochastic too.
    """
    alpha, alpha_prev = alphas_at(schedule, timestep), alphas_at(schedule, previous)
    x0, eps = predict_x0_eps(schedule, latents, noise_pred, alpha)
    std = step_std(schedule, timestep, previous, eta)
    mean = alpha_prev.sqrt() * x0 + (1 - alpha_prev - std ** 2).sqrt() * eps    # DDIM, Eq. 12
    return mean, std


def log_prob(sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """log p_theta(sample | x_t, c) per sample [N]: the *mean* over C, H, W of its log-density.

    The mean, not the sum: beta = 10 is calibrated to it (official code). `sample` gets no gradient.
    """
    std = torch.as_tensor(std)
    square = (sample.detach().float() - mean).square()
    density = -square / (2 * std ** 2) - std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    return density.mean(dim=(1, 2, 3))
