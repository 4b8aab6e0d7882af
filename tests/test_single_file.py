"""Single-file checkpoints in the original layout, v-prediction: what diffusers' own converters read from the same tensors."""
import dataclasses
import json
import re
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils as oracle
from safetensors.torch import load_file, save_file

import loading
from conftest import assert_close
from diffusion import encode_empty, encode_prompts, generate, generate_latents, negative
from loading import load_pipeline
from helpers import PROMPTS, shell
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import InputError, original_unet_name, original_vae_name


def fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformers text tower in open_clip's names: q, k, v in one tensor, the projection stored [in, out]."""
    names = {"embeddings.token_embedding.weight": "token_embedding.weight", "embeddings.position_embedding.weight": "positional_embedding",
             "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
             "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    out = {"logit_scale": torch.tensor(4.6), "text_projection": weights["text_projection.weight"].T.contiguous()}
    for key, value in weights.items():
        key = key.removeprefix("text_model.")
        match = re.fullmatch(r"(encoder\.layers\.\d+\.self_attn\.)([qkv])_proj\.(weight|bias)", key)
        if key == "text_projection.weight" or match and match[2] != "q":
            continue
        if match:
            value = torch.cat([weights.get(f"text_model.{match[1]}{n}_proj.{match[3]}", weights.get(f"{match[1]}{n}_proj.{match[3]}")) for n in "qkv"])
            key = f"{match[1]}in_proj_{match[3]}".replace("self_attn", "attn")
        for theirs, original in names.items():
            key = key.replace(theirs, original)
        out[key] = value
    return out


def write_single(folder, file, xl: bool):
    """The folder's weights as one file in the original layout, with the clutter that such files carry."""
    pipe, out = load_pipeline(str(folder)), {}
    up = [k.startswith("CrossAttn") for k in pipe.unet.config.up_block_types]
    for key, value in pipe.unet.state_dict().items():
        out["model.diffusion_model." + original_unet_name(key, pipe.unet.config.layers_per_block, up)] = value
    for key, value in pipe.vae.state_dict().items():
        convolution = ".attentions." in key and key.endswith("weight") and value.ndim == 2
        out["first_stage_model." + original_vae_name(key, len(pipe.vae.config.block_out_channels))] = value[..., None, None] if convolution else value
    first = {k if k.startswith("text_model.") else "text_model." + k: v for k, v in load_file(folder / "text_encoder/model.safetensors").items()}
    lead = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    out |= {lead + k: v for k, v in first.items()} | {lead + "text_model.embeddings.position_ids": torch.arange(16)[None]}
    if xl:
        out |= {"conditioner.embedders.1.model." + k: v for k, v in fused(load_file(folder / "text_encoder_2/model.safetensors")).items()}
    out |= {"betas": torch.ones(3), "model_ema.decay": torch.tensor(0.9)}
    save_file({k: v.contiguous().clone() for k, v in out.items()}, file)
    return file


def shapes_of(folder) -> tuple:
    """Configurations of a folder's parts, which a minuscule single file cannot tell."""
    pipe = load_pipeline(str(folder))
    return pipe.unet.config, pipe.vae.config, *(e.config for e in pipe.text_encoders)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def single(request, tmp_path_factory):
    """(folder, single file) of either shape."""
    folder = request.getfixturevalue(request.param)
    return folder, write_single(folder, tmp_path_factory.mktemp("single") / f"{request.param}.safetensors", request.param == "sdxl")


def open_single(folder, file, **kind):
    """Through the code that reads official single files, told the minuscule shapes."""
    kind = dict(tokenizer=str(folder), prediction_type="", dtype=torch.float32, device=torch.device("cpu")) | kind
    return loading._single_file(file, shapes=shapes_of(folder), **kind)


def test_the_written_file_is_what_diffusers_calls_the_original_layout(single):
    """The converters of diffusers turn it into exactly the folder's tensors; otherwise the tests below would prove nothing."""
    folder, file = single
    weights, xl = load_file(file), (folder / "text_encoder_2").exists()
    parts = {"unet": oracle.convert_ldm_unet_checkpoint(dict(weights), json.loads((folder / "unet/config.json").read_text())),
             "vae": oracle.convert_ldm_vae_checkpoint(dict(weights), json.loads((folder / "vae/config.json").read_text()))}
    for part, got in parts.items():
        want = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        assert got.keys() == want.keys() and all(torch.equal(got[k], v) for k, v in want.items()), part
    if xl:
        class Text:
            """What the converter asks about the text model."""
            config = None
        got = oracle.convert_open_clip_checkpoint(Text, weights, prefix="conditioner.embedders.1.model.")
        want = {"text_model." + k.removeprefix("text_model.") if "projection" not in k else k: v
                for k, v in load_file(folder / "text_encoder_2/model.safetensors").items()}
        assert {k for k in got if "position_ids" not in k} >= want.keys() and all(torch.equal(got[k], v) for k, v in want.items())


def test_single_file_is_the_same_model_as_the_folder(single):
    folder, file = single
    want, got = load_pipeline(str(folder)), open_single(folder, file)
    for a, b in zip((want.unet, want.vae, *want.text_encoders), (got.unet, got.vae, *got.text_encoders), strict=True):
        assert a.state_dict().keys() == b.state_dict().keys() and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert got.zero_negative == want.zero_negative and got.is_sdxl == want.is_sdxl
    ours, theirs = dataclasses.asdict(got.schedule), dataclasses.asdict(want.schedule)
    assert torch.equal(ours.pop("alphas_cumprod"), theirs.pop("alphas_cumprod")) and ours == theirs
    assert torch.equal(*(generate(p, PROMPTS[:3], [0, 1, 2], steps=3) for p in (want, got)))


def test_a_model_knows_where_it_is(single):
    """Of a folder and of a single file: the device asked for, and text encoders that stay there."""
    folder, file = single
    for pipe in (load_pipeline(str(folder), device="meta"), open_single(folder, file, device=torch.device("meta"))):
        assert pipe.device.type == pipe.unet.conv_in.weight.device.type == "meta" and pipe.offload is False


def test_a_vae_that_would_overflow_is_never_rounded(sdxl, tmp_path):
    got, want = (open_single(sdxl, write_single(sdxl, tmp_path / "xl.safetensors", True), dtype=d) for d in (torch.bfloat16, torch.float32))
    assert got.unet.conv_in.weight.dtype == torch.bfloat16
    assert all(torch.equal(v, want.vae.state_dict()[k]) for k, v in got.vae.state_dict().items())


def test_a_pickled_checkpoint_loads_too(single, tmp_path):
    """The .ckpt of old: a state_dict inside a dictionary, read with weights_only."""
    folder, file = single
    torch.save({"state_dict": load_file(file), "global_step": 7}, tmp_path / "old.ckpt")
    got = open_single(folder, tmp_path / "old.ckpt")
    assert torch.equal(got.unet.conv_in.weight, load_pipeline(str(folder)).unet.conv_in.weight)


@pytest.mark.parametrize("damage, words", [
    (lambda w: w.pop("model.diffusion_model.time_embed.0.bias"), r"UNet: 1 missing \(time_embedding.linear_1.bias\)"),
    (lambda w: w.update({"model.diffusion_model.odd": torch.ones(1)}), r"UNet: 1 unexpected \(odd\)"),
    (lambda w: w.pop("first_stage_model.decoder.mid.attn_1.q.weight"), r"VAE: 1 missing \(decoder.mid_block.attentions.0.to_q.weight\)"),
    (lambda w: [w.pop(k) for k in list(w) if k.startswith("model.diffusion_model")], "no model.diffusion_model"),
])
def test_a_file_that_does_not_fit_is_one_clear_line(single, tmp_path, damage, words):
    folder, file = single
    weights = load_file(file)
    damage(weights)
    save_file(weights, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=words) as caught:
        open_single(folder, tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_what_training_leaves_in_a_file_does_no_harm(single, tmp_path):
    folder, file = single
    spare = {"first_stage_model.loss.logvar": torch.ones(1), "first_stage_model.model_ema.decay": torch.tensor(0.9),
             "cond_stage_model.transformer.text_projection.weight": torch.ones(2, 2)}
    save_file(load_file(file) | spare, tmp_path / "spare.safetensors")
    assert open_single(folder, tmp_path / "spare.safetensors").unet is not None


def test_a_file_without_vae_needs_another(single, tmp_path):
    folder, file = single
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("first_stage")}, tmp_path / "bare.safetensors")
    with pytest.raises(InputError, match="bare.safetensors: has no VAE .*--vae"):
        open_single(folder, tmp_path / "bare.safetensors")
    assert open_single(folder, tmp_path / "bare.safetensors", own_vae=False).vae is None
    with pytest.raises(InputError, match="wrong shape|missing"):                # the official shapes are assumed, the VAE is not missed
        load_pipeline(str(tmp_path / "bare.safetensors"), vae=str(folder))


def test_a_minuscule_file_is_not_taken_for_an_official_one(single):
    """Without the shapes the official ones are assumed, and nothing is filled with random numbers."""
    with pytest.raises(InputError, match="(missing|wrong shape).*a single-file checkpoint in the original layout"):
        load_pipeline(str(single[1]))


def test_prediction_type_of_single_files(single, tmp_path):
    """Said by option, or by the marker that v-prediction checkpoints carry; zero-terminal-SNR schedules are refused."""
    folder, file = single
    weights = load_file(file)
    assert open_single(folder, file).schedule.prediction_type == "epsilon"
    assert open_single(folder, file, prediction_type="v_prediction").schedule.prediction_type == "v_prediction"
    save_file(weights | {"v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    assert open_single(folder, tmp_path / "v.safetensors").schedule.prediction_type == "v_prediction"
    save_file(weights | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "z.safetensors")
    with pytest.raises(InputError, match="zero-terminal-SNR"):
        open_single(folder, tmp_path / "z.safetensors")


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("shape", ["sd", "sdxl"])
def test_v_prediction_pictures_equal_diffusers(shape, eta, request, tmp_path):
    """A folder whose scheduler says v_prediction: same latents as diffusers, and others than with epsilon."""
    folder = tmp_path / "v"
    shutil.copytree(request.getfixturevalue(shape), folder)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(prediction_type="v_prediction")))
    ours = load_pipeline(str(folder))
    theirs = (StableDiffusionPipeline if shape == "sd" else StableDiffusionXLPipeline).from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    assert isinstance(theirs.scheduler, DDIMScheduler)
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    start = torch.stack([torch.randn(ours.latent_shape(), generator=g) for g in generators])
    want = theirs(PROMPTS[:2], latents=start, output_type="latent", num_inference_steps=4, guidance_scale=5.0, eta=eta,
                  generator=generators).images
    got = generate_latents(ours, PROMPTS[:2], [3, 4], steps=4, guidance_scale=5.0, eta=eta)
    assert_close(got, want)
    ours.schedule = dataclasses.replace(ours.schedule, prediction_type="epsilon")
    assert (generate_latents(ours, PROMPTS[:2], [3, 4], steps=4, guidance_scale=5.0, eta=eta) - want).abs().max() > 1e-2


@pytest.mark.parametrize("name, unet, vae, tensors", [
    ("SD-1.5", UNetConfig(), VAEConfig(), 686), ("SDXL", loading.SDXL_UNET, VAEConfig(scaling_factor=0.13025), 1680)])
def test_names_of_the_official_single_files(name, unet, vae, tensors):
    """At full size: every tensor's original name is one that diffusers maps back to the same tensor. No memory is used."""
    with torch.device("meta"):
        parts = UNet(unet), VAE(vae)
    ours = [{k: torch.zeros(1).expand(v.shape) for k, v in p.state_dict().items()} for p in parts]
    up = [k.startswith("CrossAttn") for k in unet.up_block_types]
    original = {"model.diffusion_model." + original_unet_name(k, 2, up): v for k, v in ours[0].items()}
    original |= {"first_stage_model." + original_vae_name(k, 4): v for k, v in ours[1].items()}
    assert len(original) == tensors + 248
    config = dict(layers_per_block=2, addition_embed_type=unet.addition_embed_type, down_block_types=unet.down_block_types)
    for mine, theirs in ((ours[0], oracle.convert_ldm_unet_checkpoint(dict(original), config)),
                         (ours[1], oracle.convert_ldm_vae_checkpoint(dict(original), dict(down_block_types=range(4), up_block_types=range(4))))):
        assert {k: tuple(v.shape) for k, v in mine.items()} == {k: tuple(v.shape) for k, v in theirs.items()}


def test_scripts_take_a_folder(sd, tmp_path):
    """`--model FOLDER --prompt` draws a picture with a model of one's own."""
    shell("evaluate.py", "--model", sd, "--prompt", "a red circle", "--steps", 2, "--dtype", "fp32", "--out", tmp_path / "out")
    assert (tmp_path / "out/base.png").exists()


def test_negative_conditioning_of_sdxl_can_be_the_encoded_empty_prompt(sdxl):
    """The original pipelines' other choice: "" encoded by both text encoders."""
    theirs = StableDiffusionXLPipeline.from_pretrained(sdxl, force_zeros_for_empty_prompt=False)
    want = theirs.encode_prompt(PROMPTS[:2], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    ours = dataclasses.replace(load_pipeline(str(sdxl)), zero_negative=False)
    cond = encode_prompts(ours, PROMPTS[:2])
    uncond = negative(ours, cond, encode_empty(ours))
    assert_close(uncond.prompt_embeds, want[1])
    assert_close(uncond.pooled, want[3])
    assert uncond.time_ids.tolist() == cond.time_ids.tolist() and uncond.prompt_embeds.any()


@pytest.mark.parametrize("header, beside, want", [
    ({"modelspec.predict_key": "v"}, None, "v_prediction"), ({"modelspec.prediction_type": "v"}, None, "v_prediction"),
    ({"modelspec.prediction_type": "epsilon"}, "parameterization: v", "epsilon"), ({"format": "pt"}, None, "epsilon"),
    ({}, "model:\n  params:\n    parameterization: \"v\"\n", "v_prediction"), ({}, "model:\n  params:\n    parameterization: eps\n", "epsilon"),
    ({}, "model:\n  params: {}\n", "epsilon"), ({}, "model: {params: {linear_start: 0.00085, 'parameterization': v}}\n", "v_prediction"), ({}, "# parameterization: v\n", "epsilon")])
def test_a_file_says_what_it_predicts_in_its_header_or_beside_it(sd, single, tmp_path, header, beside, want):
    """As ComfyUI and sd-scripts write it, and as A1111 reads it; the option wins over both."""
    folder, file = single
    save_file(load_file(file), tmp_path / "x.safetensors", metadata=header or None)
    if beside:
        (tmp_path / "x.yaml").write_text(beside)
    assert open_single(folder, tmp_path / "x.safetensors").schedule.prediction_type == want
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[want]
    assert open_single(folder, tmp_path / "x.safetensors", prediction_type=other).schedule.prediction_type == other


@pytest.mark.parametrize("more, header, beside", [
    ({"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}, {}, ""), ({"edm_vpred.sigma_max": torch.ones(1)}, {}, ""),
    ({}, {"modelspec.prediction_type": "flow"}, ""), ({}, {}, "parameterization: x0")])
def test_single_files_of_other_noise_processes_are_refused(single, tmp_path, more, header, beside):
    folder, file = single
    save_file(load_file(file) | more, tmp_path / "x.safetensors", metadata=header or None)
    (tmp_path / "x.yaml").write_text(beside)
    with pytest.raises(InputError, match="x.safetensors: .*not supported") as caught:
        open_single(folder, tmp_path / "x.safetensors", prediction_type="epsilon" if more else "")
    assert not more or min(more)[:5] in str(caught.value)


@pytest.mark.parametrize("layout", ["original", "pickled", "diffusers", "checkpoint", "folder"])
def test_a_vae_as_one_file(sd, single, tmp_path, layout):
    """The original layout (vae-ft-mse, NAI's .vae.pt) and diffusers', without a configuration: the shape is the model's own VAE's."""
    folder, file = single
    want = load_pipeline(str(folder)).vae
    weights = {k.removeprefix("first_stage_model."): v for k, v in load_file(file).items() if k.startswith("first_stage_model.")}
    weights = {k: v + 1 if k.endswith("conv_in.bias") else v for k, v in weights.items()}
    source = tmp_path / "mine.safetensors"
    (tmp_path / "config.json").write_text('{"model": "sd15"}')          # of something else
    if layout == "original":
        save_file(weights, source)
    elif layout == "pickled":
        source = tmp_path / "nai.vae.pt"
        torch.save({"state_dict": weights | {"loss.logvar": torch.ones(1)}, "global_step": 1}, source)
    elif layout == "checkpoint":
        save_file({f"first_stage_model.{k}": v for k, v in weights.items()}, source)
    else:
        ours = want.state_dict()
        save_file({k: v.contiguous() + 1 if k.endswith("conv_in.bias") else v.contiguous() for k, v in ours.items()}, source)
    if layout == "folder":
        (tmp_path / "vae").mkdir()
        save_file(weights, tmp_path / "vae/diffusion_pytorch_model.safetensors")
        shutil.copy(folder / "vae/config.json", tmp_path / "vae")
        source = tmp_path / "vae"
    got = load_pipeline(str(folder), vae=str(source)).vae
    assert got.config == want.config
    for key, value in want.state_dict().items():
        assert torch.equal(got.state_dict()[key], value + 1 if key.endswith("conv_in.bias") else value), key
