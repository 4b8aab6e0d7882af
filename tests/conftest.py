"""Helpers of the component tests: random weights, reduced-width configurations, and one way to compare tensors."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
FACTS = Path(__file__).resolve().parents[2] / "shared" / "facts"      # full key lists of the official files; tests skip without them


def sd15_shaped(**changes) -> dict:
    """A `unet/config.json` with SD-1.5's structure and few channels."""
    return dict(block_out_channels=[8, 16, 24, 24], layers_per_block=2, in_channels=4, out_channels=4, sample_size=16,
                down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
                up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
                attention_head_dim=2, cross_attention_dim=12, norm_num_groups=4, norm_eps=1e-5) | changes


def sdxl_shaped(**changes) -> dict:
    """A `unet/config.json` with SDXL's structure and few channels."""
    return dict(block_out_channels=[8, 16, 24], layers_per_block=2, in_channels=4, out_channels=4, sample_size=16,
                down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                attention_head_dim=[1, 2, 3], transformer_layers_per_block=[1, 2, 3], cross_attention_dim=20,
                use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=6,
                projection_class_embeddings_input_dim=10 + 6 * 6, norm_num_groups=4, norm_eps=1e-5) | changes


def seeded(seed: int = 0) -> torch.Generator:
    """A CPU generator."""
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill *every* parameter with random values, norms and biases too, so that nothing is hidden by a 0 or a 1."""
    generator = seeded(seed)
    for name, p in module.named_parameters():
        value = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            value = value / (p.numel() / p.shape[0]) ** 0.5
        else:
            value = 0.3 * value + (1.0 if name.endswith("weight") else 0.0)
        p.copy_(value)
    return module


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    """Largest difference at most `tolerance`, relative to the largest entry if that is above one."""
    assert ours.shape == theirs.shape, f"{what}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    ours, theirs = ours.detach(), theirs.detach()
    error, size = float((ours - theirs).abs().max()), max(1.0, float(theirs.abs().max()))
    assert error <= tolerance * size, f"{what}: differs by {error:.2e}, entries up to {size:.2e}"


def assert_same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module, tolerance: float = 1e-5, rename=lambda k: k) -> None:
    """Every parameter's gradient agrees, relative to that gradient's own size; none is missing on one side only.

    A bias of attention keys shifts all logits of a query alike, so its true gradient is zero and only rounding remains.
    """
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        other = expected[rename(name)].grad
        assert (p.grad is None) == (other is None), f"only one side has a gradient for {name}"
        if other is not None:
            size = other.abs().max().clamp(min=1.0 if name.endswith(("to_k.bias", "k_proj.bias")) else 1e-3)
            assert_close(p.grad / size, other / size, tolerance, name)


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    """State dict keys and shapes."""
    return {k: list(v.shape) for k, v in module.state_dict().items()}


def count(module: torch.nn.Module) -> tuple[int, int]:
    """(number of tensors, number of parameters) of a state dict."""
    values = list(module.state_dict().values())
    return len(values), sum(v.numel() for v in values)


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    """Folder of a minuscule random SD-1.5-shaped checkpoint."""
    import helpers
    return helpers.write_sd(tmp_path_factory.mktemp("checkpoints") / "sd")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The same with the fewest blocks, for tests of runs: what a forward costs here is their number."""
    import helpers
    return helpers.write_sd(tmp_path_factory.mktemp("checkpoints") / "small", block_out_channels=[8, 16], layers_per_block=1,
                            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """Folder of a minuscule random SDXL-shaped checkpoint."""
    import helpers
    return helpers.write_sdxl(tmp_path_factory.mktemp("checkpoints") / "sdxl")


@pytest.fixture(scope="session")
def small_xl(tmp_path_factory):
    """And SDXL's kind of it."""
    import helpers
    return helpers.write_sdxl(
        tmp_path_factory.mktemp("checkpoints") / "small_xl", block_out_channels=[8, 16], layers_per_block=1, attention_head_dim=[1, 2],
        transformer_layers_per_block=[1, 2], down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"])


@pytest.fixture(scope="session")
def pickscore(tmp_path_factory):
    """Folder of a minuscule random CLIP of both towers."""
    import helpers
    return helpers.write_pickscore(tmp_path_factory.mktemp("checkpoints") / "pickscore")


@pytest.fixture(scope="session")
def spm(tmp_path_factory, pickscore):
    """Folder of a minuscule random step-aware preference model."""
    import helpers
    return helpers.write_spm(tmp_path_factory.mktemp("checkpoints") / "spm", pickscore)


@pytest.fixture
def compilations(monkeypatch):
    """What torch.compile has compiled since the start of the test, in any mode, in a list; traced only, which spares the compiler."""
    made, compile_ = [], torch.compile

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **settings: compile_(f, backend=backend, **settings))
    return made


@pytest.fixture
def prompts(tmp_path):
    """Seven prompts in a file: no batch size divides them."""
    import helpers
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(helpers.PROMPTS) + "\n")
    return path
