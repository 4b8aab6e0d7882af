"""The embedded checkpoint: diffusers opens it and draws the same pictures; its judges hold; SPO on it really works."""
import json

import pytest
import torch

import evaluate
import lora
from diffusion import decode, generate, generate_latents
from helpers import call
from loading import TINY, load_clip, load_pipeline
from tiny import world
from training import parse_options
from weights import preset_of, read_weights


@pytest.fixture(scope="module")
def pipe():
    """The tiny model."""
    return load_pipeline("tiny")


@pytest.fixture(scope="module")
def theirs():
    """The tiny model as diffusers opens it."""
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(theirs, latents, prompts):
    """diffusers' pictures [N, 3, H, W] in [0, 1]."""
    images = theirs(prompts, latents=latents.clone(), num_inference_steps=20, guidance_scale=3.0, eta=0.0, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_size_and_layout():
    """At most 25 MB, laid out like an official checkpoint."""
    assert sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file()) < 25e6
    for part in ("unet", "vae"):
        assert (TINY / part / "diffusion_pytorch_model.safetensors").is_file() and (TINY / part / "config.json").is_file()
    for part in ("text_encoder", "pickscore", "spm", "spm_step_blind"):
        assert (TINY / part / "model.safetensors").is_file()
    assert all(k.startswith("model.") for k in read_weights(TINY / "spm/model.safetensors"))     # as the official SPM files


def test_diffusers_draws_the_same_pictures(pipe, theirs):
    """The whole path, text to pixels, in fp32."""
    prompts = ["a red circle", "two blue squares", "a green cross above a yellow triangle"]
    seeds = [3, 4, 5]
    latents = torch.stack([torch.randn(pipe.latent_shape(), generator=torch.Generator().manual_seed(s)) for s in seeds])
    ours = generate(pipe, prompts, seeds, guidance_scale=3.0)
    torch.testing.assert_close(ours, draw(theirs, latents, prompts), atol=1e-4, rtol=0)


def test_a_saved_lora_draws_the_same_picture_in_diffusers(tmp_path, theirs):
    """Both file formats; and the picture really changes."""
    from safetensors.torch import save_file
    ours, prompts = load_pipeline("tiny"), ["a purple cross left of a cyan circle"]
    latents = torch.randn(1, *ours.latent_shape(), generator=torch.Generator().manual_seed(0))
    plain = generate(ours, prompts, [0], guidance_scale=3.0)
    lora.add(ours.unet, rank=4, seed=1)
    with torch.no_grad():
        for i, layer in enumerate(lora.layers(ours.unet).values()):
            layer.lora_B.weight.copy_(0.1 * torch.randn(layer.lora_B.weight.shape, generator=torch.Generator().manual_seed(i)))
    changed = generate(ours, prompts, [0], guidance_scale=3.0)
    assert (changed - plain).abs().mean() > 0.01
    for name, weights in (("a", lora.state(ours.unet)), ("d", lora.to_kohya(lora.state(ours.unet)))):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
        theirs.load_lora_weights(tmp_path / name)
        torch.testing.assert_close(draw(theirs, latents, prompts), changed, atol=1e-4, rtol=0)
        theirs.unload_lora_weights()


def test_base_model_draws_held_out_captions(pipe):
    """Quality gate on 64 held-out captions, well below what build.py measured."""
    _, held = world.split_captions()
    held = held[::4]
    images = generate(pipe, [c.text for c in held], list(range(len(held))), batch=64, guidance_scale=3.0)
    assert world.alignment(images, held).mean() > 0.7


def test_held_out_prompts_are_the_files():
    """The shipped prompt lists are the world's split."""
    train, held = world.split_captions()
    assert (TINY / "train_prompts.txt").read_text().splitlines() == [c.text for c in train]
    assert (TINY / "held_out_prompts.txt").read_text().splitlines() == [c.text for c in held]


def test_spm_is_step_aware_and_pickscore_is_not():
    """The shipped judges are what their names say."""
    assert load_clip(str(TINY / "spm")).config.step_aware
    assert not load_clip(str(TINY / "spm_step_blind")).config.step_aware and not load_clip(str(TINY / "pickscore")).config.step_aware


def test_latents_have_unit_scale(pipe):
    """The VAE's scaling factor does its work."""
    generator = torch.Generator().manual_seed(0)
    images = world.render(world.split_captions()[0][::40], generator)
    with torch.no_grad():
        latents = pipe.vae.encode(images * 2 - 1)
        again = decode(pipe, latents) / 2 + 0.5
    assert 0.8 < float(latents.std()) < 1.25 and float((again - images).abs().mean()) < 0.02


def test_eta_one_is_stochastic_and_keyed(pipe):
    """eta = 1 adds noise, but a seed fixes it."""
    runs = [generate_latents(pipe, ["a red circle"], [7], eta=eta, guidance_scale=3.0) for eta in (0.0, 1.0, 1.0)]
    assert torch.equal(runs[1], runs[2]) and not torch.allclose(runs[0], runs[1], atol=1e-2)


def test_two_rounds_of_spo_raise_true_aesthetics(tmp_path):
    """The effect itself, by the two commands that a user gives: paired over 48 held-out pictures, far beyond its error."""
    call("spo_train", "--rounds", 2, "--lr", "1.2e-3", "--steps", 10, "--out", tmp_path / "spo", "--grid_every", 0)
    call("evaluate", "--lora", "base=", f"spo={tmp_path / 'spo'}", "--steps", 10, "--limit", 48, "--metrics", "aesthetics",
         "--out", tmp_path / "e")
    gain = json.loads((tmp_path / "e/results.json").read_text())["results"]["spo"]["aesthetics"]
    assert gain["difference"] > 0.3 and gain["difference"] > 4 * gain["difference_standard_error"]


def test_geneval_of_the_world_by_hand():
    """Tags see what they name and nothing else: shapes without colours, places without colours, colours with shapes."""
    by_text = {c.text: c for c in world.all_captions()}
    thing = lambda colour, shape, x=32, y=32: world.Thing(colour, shape, x, y)          # noqa: E731
    single, two = by_text["a red circle"], by_text["two blue squares"]
    pair = by_text["a red circle left of a blue square"]
    assert world.geneval([thing("red", "circle")], single) == dict(single=True, colours=True)
    assert world.geneval([thing("green", "circle")], single) == dict(single=True, colours=False)
    assert world.geneval([thing("red", "square")], single) == dict(single=False, colours=False)
    for count in (1, 2, 3):
        assert world.geneval([thing("red", "square")] * count, two) == dict(counting=count == 2)
    left, right = thing("red", "circle", 16), thing("blue", "square", 48)
    assert world.geneval([left, right], pair) == dict(two=True, position=True, binding=True)
    assert world.geneval([thing("blue", "circle", 16), thing("red", "square", 48)], pair) == dict(two=True, position=True, binding=False)
    assert world.geneval([thing("red", "circle", 48), thing("blue", "square", 16)], pair) == dict(two=True, position=False, binding=True)
    assert world.geneval([left], pair) == dict(two=False, position=False, binding=False)
    same = by_text["a red circle above a blue circle"]
    assert world.geneval([thing("red", "circle", 32, 16)], same) == dict(two=False, position=False, binding=False)


def test_a_copy_of_the_tiny_model_gets_its_settings(tmp_path):
    """As lora.py merge leaves one: guidance, dtype and metrics of tiny, not of SD-1.5; another UNet is not taken for it."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text((TINY / "unet/config.json").read_text())
    parse = lambda: parse_options(evaluate.EvaluateConfig, evaluate.PRESETS, ["--model", str(tmp_path)])  # noqa: E731
    assert preset_of(str(tmp_path)) == "tiny" and (parse().guidance_scale, parse().dtype) == (3.0, "fp32")
    (tmp_path / "unet/config.json").write_text((TINY / "unet/config.json").read_text().replace("64,", "32,"))
    assert preset_of(str(tmp_path)) == "sd15" and parse().guidance_scale == 5.0
