"""Stochastic DDIM: noise path, predicted clean latent, a step as a Gaussian, its log-density.

SPO needs p_theta(x_{t-1} | x_t, c) as a distribution that can be sampled many times and whose
density can be evaluated (paper, Eqs. 4 and 5; DDIM with eta = 1, section 5.1). Any Gaussian path
x_t = alpha_t x_0 + sigma_t eps has such steps. Two are known:

    diffusion (SD-1.5, SDXL)    alpha_t^2 = alphas_cumprod[t], sigma_t^2 = 1 - alpha_t^2
    rectified flow (as SD3)     alpha_t = 1 - sigma_t, sigma_t = t / 1000; beyond the paper (4.6)

Pure functions of tensors, all in fp32.

Shapes: N samples, C H W latent. Timesteps are what the network is told: integers 0..999 of
diffusion, where alphas_cumprod falls from 0.9991 to 0.0047; fractions 0..1000 of a flow.
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
STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                        set_alpha_to_one=False, steps_offset=1)
FLOW = "FlowMatchEulerDiscreteScheduler"
OF_FLOW = dict(
    num_train_timesteps=(1000,), prediction_type=(None, "flow"), use_dynamic_shifting=OFF,
    invert_sigmas=OFF, shift_terminal=OFF, use_karras_sigmas=OFF, use_exponential_sigmas=OFF,
    use_beta_sigmas=OFF)


@dataclass(frozen=True)
class Schedule:
    """The noise path of a checkpoint (`scheduler/scheduler_config.json` of any class)."""
    alphas_cumprod: torch.Tensor | None     # [1000], fp32, on the CPU: looked up without a device
                                            # sync; None: a flow
    final_alpha_cumprod: float              # stands for "after the last step"
    prediction_type: str = "epsilon"        # or "v_prediction"; "flow": the network gives eps - x_0
    steps_offset: int = 1
    shift: float = 1.0                      # of a flow: more than 1 spends more steps on high noise

    @classmethod
    def from_json(cls, config: dict) -> "Schedule":
        """Build from a scheduler configuration; ValueError for what is not supported.

        How a sampler spaces its steps (`timestep_spacing`) is not part of a diffusion model and is
        ignored: SPO walks "leading". What configurations of other samplers leave out (steps_offset,
        set_alpha_to_one) is as in the official files.
        """
        name = str(config.get("_class_name", "DDIMScheduler"))
        own = name == "DDIMScheduler"           # with its defaults
        betas = own or {"beta_start", "beta_end", "beta_schedule", "trained_betas"} & config.keys()
        flow = name == FLOW
        if not flow and (re.search("Flow|EDM", name) or not betas):
            raise ValueError(f"scheduler config: _class_name={name!r} is another noise process "
                             "(EDM, another flow) than that of SD-1.5 and SDXL, which has betas, "
                             f"or {FLOW}'s")
        for key, values in (OF_FLOW if flow else SUPPORTED).items():
            if config.get(key, values[0]) not in values:
                raise ValueError(f"scheduler config: {name} with {key}={config[key]!r} is not "
                                 "supported")
        if flow:
            shift = float(config.get("shift", 1.0))
            if not 0.01 <= shift <= 100:            # timesteps would fall together
                raise ValueError(f"scheduler config: shift={shift!r} must lie in 0.01..100")
            return cls(None, 1.0, "flow", 0, shift)
        alphas_cumprod = (1 - _betas(config)).cumprod(0)
        final = 1.0 if config.get("set_alpha_to_one", own) else float(alphas_cumprod[0])
        return cls(alphas_cumprod, final, config.get("prediction_type", "epsilon"),
                   int(config.get("steps_offset", 0 if own else 1)))

    @property
    def flow(self) -> bool:
        """True on the path of rectified flow."""
        return self.alphas_cumprod is None

    @property
    def count(self) -> int:
        """How many whole timesteps there are, from 0 on: a training draws one of them."""
        return 1000 if self.flow else len(self.alphas_cumprod)

    def timesteps(self, steps: int) -> list[int] | list[float]:
        """Descending timesteps of a run of `steps`.

        Diffusion ("leading" spacing): 20 -> 951, 901, ..., 1. A flow, as diffusers spaces it: 20
        with shift 1 -> 1000.0, 947.4, ..., 1.0.
        """
        most = self.count - self.steps_offset
        if not 1 <= steps <= most:
            raise ValueError(f"steps must lie in 1..{most}, not {steps}")
        if not self.flow:
            return [i * (self.count // steps) + self.steps_offset for i in range(steps)][::-1]
        least = self._shifted(1 / 1000)             # shifted twice, as in diffusers
        return [1000 * self._shifted(1 - (1 - least) * i / max(steps - 1, 1)) for i in range(steps)]

    def previous(self, steps: int) -> dict[float, float]:
        """The timesteps of such a run, and where each step leads; the last goes behind them."""
        timesteps = self.timesteps(steps)
        behind = 0.0 if self.flow else timesteps[-1] - self.count // steps
        return dict(zip(timesteps, timesteps[1:] + [behind]))

    def both_ends(self, timesteps: list[float], steps: int) -> torch.Tensor:
        """N of these timesteps, and where their steps lead: [2, N], on the CPU."""
        previous = self.previous(steps)
        return torch.tensor([timesteps, [previous[t] for t in timesteps]])

    def _shifted(self, sigma: float) -> float:
        """SD3's shift of a flow's noise level, 0..1 -> 0..1."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)


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


def powers_at(schedule: Schedule,
              timestep: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_t^2 and sigma_t^2, of signal and noise, at timesteps [N] -> [N, 1, 1, 1] each, there.

    At a number -> 0-d, on the CPU. A negative timestep of diffusion lies behind the last step and
    has the final value.
    """
    table, final = schedule.alphas_cumprod, schedule.final_alpha_cumprod
    if schedule.flow:
        sigma = torch.as_tensor(timestep, dtype=torch.float32) / 1000
        sigma = sigma.view(-1, 1, 1, 1) if sigma.ndim else sigma
        return (1 - sigma).square(), sigma.square()
    if not isinstance(timestep, torch.Tensor):
        alpha = table[timestep] if timestep >= 0 else torch.tensor(final)
        return alpha, 1 - alpha
    alpha = _copy(table, timestep.device)[timestep.clamp(min=0)]
    alpha = torch.where(timestep >= 0, alpha, final).view(-1, 1, 1, 1)
    return alpha, 1 - alpha


def add_noise(schedule: Schedule, latents: torch.Tensor, noise: torch.Tensor,
              timestep: torch.Tensor) -> torch.Tensor:
    """q(x_t | x_0): clean latents and noise [N, C, H, W], timesteps [N] -> x_t."""
    alpha2, sigma2 = powers_at(schedule, timestep)
    return alpha2.sqrt() * latents.float() + sigma2.sqrt() * noise.float()


def target(schedule: Schedule, latents: torch.Tensor, noise: torch.Tensor,
           timestep: torch.Tensor) -> torch.Tensor:
    """What the network should say of such an x_t: noise, v or, of a flow, eps - x_0."""
    if schedule.prediction_type == "v_prediction":
        alpha2, sigma2 = powers_at(schedule, timestep)
        return alpha2.sqrt() * noise - sigma2.sqrt() * latents
    return noise - latents if schedule.flow else noise


def predict_x0_eps(schedule: Schedule, latents: torch.Tensor, noise_pred: torch.Tensor,
                   timestep: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's output at x_t -> (predicted clean latent, predicted noise), both [N, C, H, W].

    `timestep`: one number for all samples or [N]. This is DDIM's own estimate of x0, the picture
    that the SPM judges (section 4.2).
    """
    latents, noise_pred = latents.float(), noise_pred.float()
    alpha2, sigma2 = powers_at(schedule, timestep)
    a, b = alpha2.sqrt(), sigma2.sqrt()
    if schedule.flow:
        return latents - b * noise_pred, latents + a * noise_pred
    if schedule.prediction_type == "v_prediction":
        return a * latents - b * noise_pred, a * noise_pred + b * latents
    return (latents - b * noise_pred) / a, noise_pred


def predict_x0(schedule: Schedule, latents: torch.Tensor, noise_pred: torch.Tensor,
               timestep: torch.Tensor | float) -> torch.Tensor:
    """Predicted clean latent at a timestep, one number for all samples or [N]."""
    return predict_x0_eps(schedule, latents, noise_pred, timestep)[0]


def step_std(schedule: Schedule, timestep: torch.Tensor | float, previous: torch.Tensor | float,
             eta: float = 1.0) -> torch.Tensor:
    """The standard deviation of a step, as `step_gaussian` has it; no network is asked.

    eta = 1 is that of the posterior q(x_{t-1} | x_t, x_0), on any path.
    """
    alpha2, sigma2 = powers_at(schedule, timestep)
    alpha2_prev, sigma2_prev = powers_at(schedule, previous)
    # DDIM, Eq. 16; both sums are 1 in diffusion.
    gained = (alpha2 + sigma2) - alpha2 / alpha2_prev * (alpha2_prev + sigma2_prev)
    return eta * (sigma2_prev / sigma2 * gained).sqrt()


def step_gaussian(schedule: Schedule, latents: torch.Tensor, noise_pred: torch.Tensor,
                  timestep: torch.Tensor | float, previous: torch.Tensor | float,
                  eta: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """p_theta(x_{t-1} | x_t, c) of Eq. 4: mean [N, C, H, W] and std (broadcastable), fp32.

    `timestep` and `previous` (`Schedule.previous`) are numbers, or [N] each. With eta = 1 and 20
    steps sigma runs from 0.644 at t = 951 to 0.0206 at t = 1: the last step of SD-1.5 and SDXL is
    stochastic too. A flow's leads to sigma = 0 and has no spread.
    """
    x0, eps = predict_x0_eps(schedule, latents, noise_pred, timestep)
    alpha2_prev, sigma2_prev = powers_at(schedule, previous)
    std = step_std(schedule, timestep, previous, eta)
    direction = (sigma2_prev - std ** 2).clamp(min=0).sqrt()
    return alpha2_prev.sqrt() * x0 + direction * eps, std                       # DDIM, Eq. 12


def spread(schedule: Schedule, steps: int) -> list[int] | list[float]:
    """The timesteps of a run whose step has a spread: all but a last one that ends without noise.

    Nothing is lost with that one: it leads to the predicted clean latent.
    """
    return [t for t, previous in schedule.previous(steps).items()
            if step_std(schedule, t, previous) > 0]


def told(schedule: Schedule, timestep: torch.Tensor, by_flow: bool) -> torch.Tensor:
    """What a judge calls the noise of `schedule` at timesteps [N]: where its signal is as strong.

    `by_flow`: it learnt on a flow's path, else on that of SD-1.5 and SDXL.
    """
    if by_flow == schedule.flow:
        return timestep
    alpha2, sigma2 = (power.flatten() for power in powers_at(schedule, timestep))
    if by_flow:
        ratio = (sigma2 / alpha2).sqrt()                        # sigma / (1 - sigma)
        return torch.where(timestep > 0, 1000 * ratio / (1 + ratio), 0.0)       # 0: a finished one
    share = alpha2 / (alpha2 + sigma2)
    table = _copy(stable_diffusion().alphas_cumprod, timestep.device)
    return (table - share[:, None]).abs().argmin(1)


@functools.cache
def stable_diffusion() -> Schedule:
    """The noise path of SD-1.5 and SDXL."""
    return Schedule.from_json(STABLE_DIFFUSION)


def log_prob(sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """log p_theta(sample | x_t, c) per sample [N]: the *mean* over C, H, W of its log-density.

    The mean, not the sum: beta = 10 is calibrated to it (official code). `sample` gets no gradient.
    """
    std = torch.as_tensor(std)
    square = (sample.detach().float() - mean).square()
    density = -square / (2 * std ** 2) - std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    return density.mean(dim=(1, 2, 3))
