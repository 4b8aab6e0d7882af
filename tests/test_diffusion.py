"""diffusion.py and weights.py on small random checkpoints, against diffusers' pipelines on the same folders."""
import dataclasses
import gc
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ftfy
import numpy as np
import pytest
import torch
from PIL import Image
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import clip_spm
import diffusion
import finetune
import loading
import spm_train
from conftest import FACTS, assert_close
from clip_spm import CLIP, CLIPConfig
from ddim import Schedule
from diffusion import (
    decode,
    encode_empty,
    encode_prompts,
    generate,
    generate_latents,
    grid,
    negative,
    repaired,
    to_pil,
)
from loading import TINY, SINGLE_UNETS, _tokenizer, build, load_clip, load_pipeline, read_config
from helpers import PROMPTS, command
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import InputError, fetch, fetch_parquet, read_weights, weight_file

STEPS, SEEDS = 4, [3, 4, 5]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def both(request):
    """(ours, diffusers') of either shape."""
    folder = request.getfixturevalue(request.param)
    theirs = (StableDiffusionPipeline if request.param == "sd" else StableDiffusionXLPipeline).from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return load_pipeline(str(folder)), theirs


def test_prompt_encoding_equals_diffusers(both):
    ours, theirs = both
    cond = encode_prompts(ours, PROMPTS)
    uncond = negative(ours, cond, encode_empty(ours))
    want = theirs.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    assert_close(cond.prompt_embeds, want[0])
    assert_close(uncond.prompt_embeds, want[1])
    if ours.is_sdxl:
        assert_close(cond.pooled, want[2])
        assert_close(uncond.pooled, want[3])
        assert cond.time_ids.tolist() == uncond.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * len(PROMPTS)
        assert encode_prompts(ours, PROMPTS[:1], resolution=32).time_ids.tolist() == [[32, 32, 0, 0, 32, 32]]


def test_negative_is_zero_for_sdxl_and_the_empty_text_for_sd15(sd, sdxl):
    ours = load_pipeline(str(sdxl))
    uncond = negative(ours, encode_prompts(ours, PROMPTS[:2]), encode_empty(ours))
    assert encode_empty(ours) is None and not uncond.prompt_embeds.any() and not uncond.pooled.any() and uncond.time_ids.any()
    ours = load_pipeline(str(sd))
    uncond = negative(ours, encode_prompts(ours, PROMPTS[:2]), encode_empty(ours))
    assert torch.equal(uncond.prompt_embeds[1:], encode_prompts(ours, [""]).prompt_embeds) and uncond.prompt_embeds.any()


def test_sdxl_folders_that_do_not_say_are_zero_negative(sdxl, tmp_path):
    shutil.copytree(sdxl, tmp_path / "copy")
    path = tmp_path / "copy/model_index.json"
    index = json.loads(path.read_text())
    for said, want in ((None, True), (False, False)):
        path.write_text(json.dumps({k: v for k, v in index.items() if not k.startswith("force")} | ({} if said is None else {"force_zeros_for_empty_prompt": said})))
        assert load_pipeline(str(tmp_path / "copy")).zero_negative is want
        assert StableDiffusionXLPipeline.from_pretrained(tmp_path / "copy").config.force_zeros_for_empty_prompt is want


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_pictures_equal_diffusers(both, eta):
    """Same start latents, same noise in every step, guidance 5: same clean latents and same pictures."""
    ours, theirs = both
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    start = torch.stack([torch.randn(ours.latent_shape(), generator=g) for g in generators])
    states = [g.get_state() for g in generators]        # diffusers goes on drawing from the same generators
    kind = dict(num_inference_steps=STEPS, guidance_scale=5.0, eta=eta, generator=generators)
    latents = theirs(PROMPTS[:3], latents=start.clone(), output_type="latent", **kind).images
    mine = generate_latents(ours, PROMPTS[:3], SEEDS, steps=STEPS, guidance_scale=5.0, eta=eta)
    assert_close(mine, latents)
    for g, state in zip(generators, states):
        g.set_state(state)
    images = theirs(PROMPTS[:3], latents=start.clone(), output_type="pt", **kind).images
    assert_close(generate(ours, PROMPTS[:3], SEEDS, steps=STEPS, guidance_scale=5.0, eta=eta), images)
    assert_close(decode(ours, latents), theirs.vae.decode(latents / theirs.vae.config.scaling_factor, return_dict=False)[0])


def test_guidance_one_and_eta_really_matter(both):
    ours, _ = both
    runs = [generate_latents(ours, PROMPTS[:1], [0], steps=STEPS, guidance_scale=g, eta=e) for g, e in ((1, 0), (5, 0), (5, 1))]
    assert (runs[0] - runs[1]).abs().max() > 1e-2 and (runs[1] - runs[2]).abs().max() > 1e-2


@pytest.mark.parametrize("shape", ["sd", "sdxl"])
def test_a_seed_gives_the_same_picture_in_any_batch(shape, request):
    """Networks in fp64, so that only the random numbers could differ, not the rounding of a matrix product by batch size."""
    ours, seeds = load_pipeline(str(request.getfixturevalue(shape)), torch.float64), list(range(len(PROMPTS)))
    whole = generate(ours, PROMPTS, seeds, batch=7, steps=STEPS, eta=1.0)
    for batch in (1, 3):
        assert (generate(ours, PROMPTS, seeds, batch=batch, steps=STEPS, eta=1.0) - whole).abs().max() <= 1e-6
    assert (generate(ours, PROMPTS[:1] * 2, [0, 1], steps=STEPS).diff(dim=0)).abs().max() > 1e-2


def test_resolution_changes_the_size(both):
    ours, _ = both
    images = generate(ours, PROMPTS[:1], [0], steps=2, resolution=32)
    assert images.shape == (1, 3, 32, 32) and 0 <= images.min() and images.max() <= 1


def test_pictures_on_disk(tmp_path):
    """to_pil rounds to the nearest of 256 values; grid keeps order, row by row."""
    images = torch.stack([torch.full((3, 4, 4), v / 255 + 0.3 / 255) for v in (0, 100, 254)])
    assert [int(np.asarray(p)[0, 0, 0]) for p in to_pil(images)] == [0, 100, 254]
    canvas = np.asarray(grid(images, columns=2, gap=1))
    assert canvas.shape == (11, 11, 3) and (canvas[2, 2, 0], canvas[2, 7, 0], canvas[7, 2, 0], canvas[7, 7, 0]) == (0, 100, 254, 255)


def test_grid_with_labels():
    """Names at the left, captions above; the pictures' own pixels stay; what is too long is cut, what no font has is drawn somehow."""
    images = torch.arange(6 * 3 * 20 * 40).reshape(6, 3, 20, 40) % 251 / 255
    plain = np.asarray(grid(images, columns=2))
    assert np.array_equal(plain, np.asarray(grid(images, columns=2, names=[], captions=[])))
    captions = ["a red circle above a blue cross", "word " * 200, "x" * 999, "\ud800 \x00 \n 日本", ""]
    canvas = np.asarray(grid(images, columns=2, names=["base", "a rather long name", "spo"], captions=captions))
    left, lines = canvas.shape[1] - plain.shape[1], 14
    assert left == 64 and canvas.shape[0] == plain.shape[0] + (6 + 6 + 1) * lines
    tops = [4 + 6 * lines, 4 + 6 * lines + 24 + 6 * lines, 4 + 6 * lines + 24 + 6 * lines + 24 + lines]
    for i in range(6):
        y, x = tops[i // 2], left + 4 + i % 2 * 44
        assert np.array_equal(canvas[y:y + 20, x:x + 40], plain[4 + i // 2 * 24:24 + i // 2 * 24, 4 + i % 2 * 44:44 + i % 2 * 44])
        ink = (canvas[y - lines:y, x:x + 40] < 128).any()
        assert ink == (i < 4)
    assert all((canvas[top:top + 20, :left] < 128).any() for top in tops)


def test_samples_carry_their_prompts(sd, tmp_path, monkeypatch):
    """Sixteen prompts, each above its picture, in four rows of four."""
    seen = []
    monkeypatch.setattr(finetune, "grid", lambda *args, **labels: seen.append(labels["captions"]) or grid(*args, **labels))
    prompts = [f"{i} red circles" for i in range(20)]
    config = SimpleNamespace(sample_batch=16, decode_batch=16, steps=1, guidance_scale=1.0, resolution=0)
    finetune.draw_samples(load_pipeline(str(sd)), prompts, config, tmp_path / "samples.png")
    assert len({*seen[0]}) == 16 and {*seen[0]} <= {*prompts}
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (4 * 20 + 4, image.height) and image.height > 4 * (14 + 16)


def damaged(folder, tmp_path, change, part="unet/diffusion_pytorch_model.safetensors"):
    """A copy of a checkpoint in which change(tensors) has been applied to one weight file."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = load_file(copy / part)
    change(weights)
    save_file(weights, copy / part, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop("conv_in.bias"), "1 missing (conv_in.bias)"),
    (lambda w: w.update(extra=torch.ones(1)), "1 unexpected (extra)"),
    (lambda w: w.update({"conv_in.bias": torch.ones(9)}), "conv_in.bias is (9,), expected (8,)"),
    (lambda w: w.update({"conv_in.bias": torch.ones(8, dtype=torch.int64)}), "conv_in.bias holds int64"),
    (lambda w: w["conv_in.weight"].view(-1)[5:6].fill_(float("nan")), "conv_in.weight holds NaN"),
    (lambda w: w["conv_in.weight"].view(-1)[:2].copy_(torch.tensor([float("inf"), -float("inf")])), "conv_in.weight holds NaN or infinity"),
])
def test_weights_that_do_not_fit_are_one_clear_line(sd, tmp_path, change, words):
    with pytest.raises(InputError) as caught:
        load_pipeline(str(damaged(sd, tmp_path, change)))
    message = str(caught.value)
    assert words in message and "unet/diffusion_pytorch_model.safetensors" in message and "\n" not in message


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "text_encoder", "tokenizer",
                                  "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_missing_files_are_one_clear_line(sd, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(sd, copy)
    shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    with pytest.raises(InputError) as caught:
        load_pipeline(str(copy))
    assert name.split("/")[0] in str(caught.value) and "\n" not in str(caught.value)


def test_unsupported_configurations_are_refused(sd, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(sd, copy)
    for file, field, value in (("scheduler/scheduler_config.json", "prediction_type", "sample"), ("unet/config.json", "act_fn", "gelu")):
        text = (copy / file).read_text()
        (copy / file).write_text(json.dumps(json.loads(text) | {field: value}))
        with pytest.raises(InputError, match=field):
            load_pipeline(str(copy))
        (copy / file).write_text(text)
    (copy / "unet/config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_pipeline(str(copy))


@pytest.mark.parametrize("file, change", [(file, change) for file, changes in {
    "unet/config.json": ([], 3, dict(sample_size="8"), dict(block_out_channels=[8]), dict(block_out_channels=[]), dict(layers_per_block=-1),
                         dict(layers_per_block=10 ** 12), dict(norm_eps="x"), dict(attention_head_dim=3), dict(attention_head_dim=0), dict(norm_num_groups=5)),
    "vae/config.json": ([], dict(scaling_factor="1"), dict(scaling_factor=math.nan), dict(force_upcast="no"), dict(block_out_channels=4)),
    "text_encoder/config.json": ([], dict(hidden_size=[12]), dict(num_attention_heads=5), dict(hidden_act=[]), dict(layer_norm_eps=-1)),
    "scheduler/scheduler_config.json": ("x", dict(beta_start="x"), dict(beta_end=2), dict(num_train_timesteps=10 ** 12), dict(steps_offset=1.5)),
    "model_index.json": ([],), "tokenizer/tokenizer.json": (3,), "tokenizer/tokenizer_config.json": ("x",)}.items() for change in changes], ids=str)
def test_wrong_values_in_any_configuration_are_one_line(sd, tmp_path, file, change):
    copy = tmp_path / "copy"
    shutil.copytree(sd, copy)
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | change if isinstance(change, dict) else change))
    with pytest.raises(InputError, match=f"copy/{file.partition('/tok')[0]}") as caught:
        load_pipeline(str(copy))
    assert "\n" not in str(caught.value)


def test_offline_is_named_only_where_it_is_meant(monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: 1 / 0)
    for value in ("1", "True", "0", ""):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        with pytest.raises(InputError) as caught:
            load_pipeline("owner/no-such-repository-here")
        assert ("HF_HUB_OFFLINE is set" in str(caught.value)) == (value in ("1", "True"))


def test_truncated_file_and_foreign_names(sd, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(sd, copy)
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged or truncated"):
        load_pipeline(str(copy))
    for source in (str(tmp_path / "nothing"), "./nothing", "not a name", 300 * "a"):
        with pytest.raises(InputError, match="nothing|not a name|aaa: neither"):
            load_pipeline(source)
    with pytest.raises(InputError, match="as a hub id not in the cache"):
        load_pipeline("owner/no-such-repository-here")


class Hostile:
    """A pickle that would run code."""

    def __reduce__(self):
        return print, ("code ran",)


def test_pickles_load_as_data_and_never_run_code(tmp_path, capsys):
    torch.save({"a": torch.ones(2)}, tmp_path / "good.bin")
    assert read_weights(tmp_path / "good.bin")["a"].tolist() == [1, 1]
    torch.save({"a": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "old.bin")["a"].tolist() == [1, 1]
    torch.save({"a": Hostile()}, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save({"a": Hostile()}, tmp_path / "torch.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Hostile()))
    torch.save({"a": {"b": torch.ones(1)}}, tmp_path / "nested.bin")
    (tmp_path / "empty.bin").write_bytes(b"")
    torch.save({1: torch.ones(1)}, tmp_path / "numbered.bin")
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "sparse.bin")
    for name in ("torch.bin", "legacy.bin", "plain.bin", "nested.bin", "empty.bin", "numbered.bin", "sparse.bin"):
        with pytest.raises(InputError, match=name) as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans(), suffix=st.sampled_from([".safetensors", ".bin"]))
def test_any_damage_to_a_weight_file_is_one_line_or_harmless(tmp_path_factory, place, value, cut, suffix):
    """A byte changed or the end cut off: tensors, or an InputError of one line that names the file; nothing else."""
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    weights = {"a.weight": torch.ones(2, 3), "b": torch.zeros(4)}
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    data[at] = value
    path.write_bytes(data[:at] if cut else data)
    try:
        assert all(isinstance(v, torch.Tensor) for v in read_weights(path).values())
    except InputError as error:
        assert path.name in str(error) and "\n" not in str(error)


def test_every_part_may_be_an_fp16_variant(sdxl, tmp_path):
    """UNet, VAE and both text encoders under the names of the hub's half-precision files: the same model, rounded once."""
    copy = tmp_path / "half"
    shutil.copytree(sdxl, copy)
    for path in sorted(copy.rglob("*.safetensors")):
        save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}, path.with_suffix(".fp16.safetensors"))
        path.unlink()
    whole, half = load_pipeline(str(sdxl)), load_pipeline(str(copy))
    parts = [(whole.unet, half.unet), (whole.vae, half.vae), *zip(whole.text_encoders, half.text_encoders)]
    assert len(parts) == 4 == len(list(copy.rglob("*.fp16.safetensors")))
    for theirs, ours in parts:
        weights = ours.state_dict()
        assert weights and all(torch.equal(weights[k], v.half().float()) for k, v in theirs.state_dict().items())


def test_fp16_variant_and_shards_load(sd, tmp_path):
    """The variants on the hub: `.fp16.safetensors`, and several files with an index."""
    expected = load_pipeline(str(sd)).unet.state_dict()
    weights = load_file(sd / "unet/diffusion_pytorch_model.safetensors")
    half = {k: v.half() for k, v in weights.items()}
    first = sorted(weights)[:len(weights) // 2]
    for variant in ("fp16", "shards", "fp16-shards", "bin"):
        copy = tmp_path / variant
        shutil.copytree(sd, copy)
        (copy / "unet/diffusion_pytorch_model.safetensors").unlink()
        if variant == "fp16":
            save_file(half, copy / "unet/diffusion_pytorch_model.fp16.safetensors")
        elif variant == "bin":
            torch.save(weights, copy / "unet/diffusion_pytorch_model.bin")
        else:
            source, dot = (half, ".fp16") if variant == "fp16-shards" else (weights, "")
            names = [f"diffusion_pytorch_model{dot}-0000{i}-of-00002.safetensors" for i in (1, 2)]
            save_file({k: source[k] for k in first}, copy / "unet" / names[0])
            save_file({k: v for k, v in source.items() if k not in first}, copy / "unet" / names[1])
            (copy / f"unet/diffusion_pytorch_model.safetensors.index{dot}.json").write_text(
                json.dumps(dict(weight_map={k: names[k not in first] for k in source})))
        got = load_pipeline(str(copy)).unet.state_dict()
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            want = value.half().float() if "fp16" in variant else value
            assert got[key].dtype == torch.float32 and torch.equal(got[key], want)
    (copy / "unet/x.safetensors.index.json").write_text(json.dumps(dict(weight_map={"a": "../../secret.safetensors"})))
    with pytest.raises(InputError, match="leaves the folder"):
        read_weights(copy / "unet/x.safetensors.index.json")
    for wrong in ([], {}, dict(weight_map=["a"]), dict(weight_map={"a": None})):
        (copy / "unet/x.safetensors.index.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="no index of shards|no object"):
            read_weights(copy / "unet/x.safetensors.index.json")


def hub(monkeypatch, root, names):
    """A hub repository of these files; returns the list of what gets downloaded."""
    import huggingface_hub
    got = []

    def download(source, allow_patterns, repo_type):
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            got.append(name)
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("{}")
        return str(root)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return got


SDXL_FILES = """.gitattributes LICENSE.md README.md comparison.png model_index.json scheduler/scheduler_config.json sd_xl_base_1.0.safetensors
    sd_xl_base_1.0_0.9vae.safetensors sd_xl_offset_example-lora_1.0.safetensors text_encoder/config.json text_encoder/flax_model.msgpack
    text_encoder/model.fp16.safetensors text_encoder/model.onnx text_encoder/model.safetensors text_encoder/openvino_model.bin
    text_encoder_2/config.json text_encoder_2/flax_model.msgpack text_encoder_2/model.fp16.safetensors text_encoder_2/model.onnx
    text_encoder_2/model.safetensors text_encoder_2/openvino_model.bin tokenizer/merges.txt tokenizer/special_tokens_map.json
    tokenizer/tokenizer_config.json tokenizer/vocab.json tokenizer_2/merges.txt tokenizer_2/tokenizer_config.json tokenizer_2/vocab.json
    unet/config.json unet/diffusion_flax_model.msgpack unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.safetensors
    unet/model.onnx unet/openvino_model.bin vae/config.json vae/diffusion_pytorch_model.fp16.safetensors vae/diffusion_pytorch_model.safetensors
    vae_1_0/config.json vae_1_0/diffusion_pytorch_model.fp16.safetensors vae_1_0/diffusion_pytorch_model.safetensors
    vae_decoder/model.onnx vae_encoder/model.onnx""".split()


@pytest.mark.parametrize("name", ["tiny", "tiny-flow"])
def test_a_vae_by_its_models_name(name):
    """The flow's own folder says whose VAE it shares."""
    assert loading.fetch_part(name, "vae").samefile(loading.TINY / "vae")


def test_only_what_is_used_is_downloaded(tmp_path, monkeypatch):
    """Of SDXL's real files; and of repositories that hold other variants, the first of them that is there."""
    got = hub(monkeypatch, tmp_path / "a", SDXL_FILES)
    loading.fetch_model("owner/xl")
    weights = [n for n in got if n.endswith(("safetensors", "bin", "onnx", "msgpack"))]
    assert sorted(weights) == ["text_encoder/model.safetensors", "text_encoder_2/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
                               "vae/diffusion_pytorch_model.safetensors"]
    assert len(got) == len(weights) + 13 and "tokenizer_2/vocab.json" in got
    got = hub(monkeypatch, tmp_path / "b", SDXL_FILES)
    assert loading.fetch_part("owner/xl", "vae") == tmp_path / "b/vae"
    assert got == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    got = hub(monkeypatch, tmp_path / "c", [n for n in SDXL_FILES if "fp16" in n or not n.endswith("safetensors")])
    loading.fetch_part("owner/xl", "unet")
    assert got == ["unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
    shards = [f"{n}-0000{i}-of-00002.{s}" for n, s in (("model.fp16", "safetensors"), ("pytorch_model", "bin")) for i in (1, 2)]
    got = hub(monkeypatch, tmp_path / "d", ["config.json", "model.safetensors.index.fp16.json", "pytorch_model.bin.index.json", *shards])
    assert loading.fetch_part("owner/clip") == tmp_path / "d"
    assert got == ["config.json", "model.safetensors.index.fp16.json", *shards[:2]]
    got = hub(monkeypatch, tmp_path / "e", ["config.json", "diffusion_pytorch_model.bin", "sdxl_vae.safetensors"])
    loading.fetch_part("owner/vae", "vae")
    assert got == ["config.json", "diffusion_pytorch_model.bin"]
    for split, want in (("train", ["data/train-0.parquet"]), ("all", ["data/all-0.parquet", "data/test-0.parquet"])):
        got = hub(monkeypatch, tmp_path / split, [f"data/{split}-0.parquet", "data/test-0.parquet", "x.png"])
        fetch_parquet("owner/pictures")
        assert got == want


def test_an_spm_that_is_not_named_is_not_downloaded(spm, tmp_path, monkeypatch):
    """Both official files are 5.2 GB; a local folder with exactly one is taken."""
    got = hub(monkeypatch, tmp_path / "hub", ["sd-v1-5_step-aware_preference_model.bin", "sdxl_step-aware_preference_model.bin"])
    with pytest.raises(InputError, match="say which: SPO-Diffusion-Models/.*/sd-v1-5_step-aware_preference_model.bin or SPO"):
        load_clip("SPO-Diffusion-Models/Step-Aware_Preference_Models")
    assert not got
    monkeypatch.setattr(loading, "clip_h", lambda: load_clip(str(spm)).config)
    names = [tmp_path / "local" / f"{n}_step-aware_preference_model.bin" for n in ("a", "b")]
    names[0].parent.mkdir()
    weights = load_file(spm / "model.safetensors") | {"model.text_model.embeddings.position_ids": torch.arange(16)[None]}
    torch.save(weights, names[0])
    assert torch.equal(load_clip(str(names[0].parent)).t_embedder.mlp[0].weight, weights["model.t_embedder.mlp.0.weight"])
    torch.save(weights, names[1])
    with pytest.raises(InputError, match="holds several models"):
        load_clip(str(names[0].parent))


def test_logit_scale_is_not_rounded(pickscore):
    """bf16 would make a temperature of 100 one of 98.9."""
    for dtype in (torch.bfloat16, torch.float16):
        clip = load_clip(str(pickscore), dtype)
        assert clip.text_projection.weight.dtype == dtype and torch.equal(clip.logit_scale, load_clip(str(pickscore)).logit_scale)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says there which files are mapped")
def test_no_file_stays_mapped_for_a_few_of_its_numbers(pickscore, tmp_path):
    """logit_scale, fp32 beside bf16 weights, held all 5.2 GB of an SPM; a model that is used as it is stays in its file."""
    weights = load_file(pickscore / "model.safetensors")
    shutil.copy(pickscore / "config.json", tmp_path)
    save_file(weights, tmp_path / "clip.safetensors")
    torch.save(weights, tmp_path / "clip.bin")
    for file in (tmp_path / "clip.safetensors", tmp_path / "clip.bin"):
        for dtype in (torch.float32, torch.bfloat16):
            clip = load_clip(str(file), dtype)
            gc.collect()
            mapped = str(file) in Path("/proc/self/maps").read_text()
            assert mapped == (dtype == torch.float32) and torch.equal(clip.logit_scale, weights["logit_scale"])
            del clip


@pytest.mark.parametrize("change, words", [
    (lambda c: c.update(vision_config=None), "TypeError"), (lambda c: c.pop("vision_config"), "'vision_config'"),
    (lambda c: c["text_config"].update(hidden_act="relu"), "hidden_act")])
def test_clip_configurations_that_are_wrong_are_one_line(pickscore, tmp_path, change, words):
    shutil.copytree(pickscore, tmp_path / "copy")
    config = json.loads((pickscore / "config.json").read_text())
    change(config)
    (tmp_path / "copy/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"copy/config.json: .*{words}") as caught:
        load_clip(str(tmp_path / "copy"))
    assert "\n" not in str(caught.value)


def test_weight_file_prefers_full_precision(tmp_path):
    for name in ("model.fp16.safetensors", "model.safetensors"):
        (tmp_path / name).touch()
        assert weight_file(tmp_path).name == name


def test_dtype_and_freezing(sd, sdxl):
    """Loaded networks are frozen, in eval mode and of the type asked for; a bf16 UNet still returns fp32 noise."""
    for folder, dtype, want in ((sdxl, torch.bfloat16, torch.float32), (sd, torch.float16, torch.float32), (sd, torch.bfloat16, torch.bfloat16)):
        assert load_pipeline(str(folder), dtype).vae.quant_conv.weight.dtype == want        # its configuration says force_upcast
    for wanted, want in ((torch.bfloat16, torch.bfloat16), (None, torch.float16), (torch.float32, torch.float32)):
        got = load_pipeline(str(TINY), torch.bfloat16, vae_dtype=wanted)        # whose VAE does not overflow in fp16
        assert got.vae.quant_conv.weight.dtype == want and got.unet.conv_in.weight.dtype == torch.bfloat16
    plain = load_pipeline(str(TINY)).vae.quant_conv.weight
    assert torch.equal(load_pipeline(str(TINY), torch.bfloat16).vae.quant_conv.weight, plain.half()), "rounded once"
    want = load_pipeline(str(sdxl)).vae.state_dict()                # and its weights were never rounded on the way
    for got in (load_pipeline(str(sdxl), torch.bfloat16), load_pipeline(str(sdxl), torch.bfloat16, vae=str(sdxl))):
        assert all(torch.equal(v, want[k]) for k, v in got.vae.state_dict().items())
    ours = load_pipeline(str(sd), torch.bfloat16)
    for module in (ours.unet, ours.vae, *ours.text_encoders):
        assert not module.training and all(p.dtype == torch.bfloat16 and not p.requires_grad for p in module.parameters())
    assert generate(ours, PROMPTS[:1], [0], steps=2).dtype == torch.float32


def test_unet_and_vae_can_be_replaced(sd, sdxl, tmp_path):
    copy = damaged(sd, tmp_path, lambda w: w["conv_in.bias"].add_(1))
    ours = load_pipeline(str(sd), unet=str(copy), vae=str(sdxl / "vae"))
    assert torch.equal(ours.unet.conv_in.bias, load_pipeline(str(sd)).unet.conv_in.bias + 1)
    assert torch.equal(ours.vae.decoder.conv_in.weight, load_pipeline(str(sdxl)).vae.decoder.conv_in.weight)
    with pytest.raises(InputError, match="the UNet wants 20 numbers a token, the other parts have 12"):
        load_pipeline(str(sd), unet=str(sdxl))
    shutil.rmtree(copy)
    copy = damaged(sd, tmp_path, lambda w: w.update({"conv_in.weight": torch.ones(8, 9, 3, 3)}))
    (copy / "unet/config.json").write_text(json.dumps(json.loads((copy / "unet/config.json").read_text()) | dict(in_channels=9)))
    with pytest.raises(InputError, match="the UNet wants 9 channels of a latent, the other parts have 4; .* inpaints"):
        load_pipeline(str(copy))
    shutil.copytree(sdxl, tmp_path / "xl")
    (tmp_path / "xl/unet/config.json").write_text(json.dumps(json.loads((sdxl / "unet/config.json").read_text()) | dict(addition_time_embed_dim=3)))
    with pytest.raises(InputError, match="the UNet wants 46 numbers of pooled text and sizes, the other parts have 28"):
        load_pipeline(str(tmp_path / "xl"))


def test_judges_load_from_folders(pickscore, spm):
    """PickScore's and the SPM's folders tell themselves apart."""
    assert not load_clip(str(pickscore)).config.step_aware and load_clip(str(spm)).config.step_aware
    assert all(k.startswith("model.") for k in load_file(spm / "model.safetensors"))


@pytest.mark.parametrize("name, single, numbers", [("stable-diffusion-v1-5", "sd15", (859_520_964, 83_653_863, 123_060_480)),
                                                   ("stable-diffusion-xl-base-1.0", "sdxl", (2_567_463_684, 83_653_863, 123_060_480))])
def test_the_official_configurations_build_the_official_networks(name, single, numbers):
    """Their own config.json files, as they are: the parameter counts of weights.md, and the shapes that single files are read with."""
    root = FACTS.parent / "official" / name
    if not root.exists():
        pytest.skip("the official configuration files are not at hand")
    parts = [(UNet, UNetConfig, "unet"), (VAE, VAEConfig, "vae"), (CLIP, CLIPConfig, "text_encoder"), (CLIP, CLIPConfig, "text_encoder_2")]
    for (cls, kind, part), number in zip(parts, (*numbers, 694_659_840)):
        if (root / part).exists():
            config = read_config(kind, root / part / "config.json")
            module = build(cls, config, root)
            assert sum(p.numel() for p in module.parameters()) == number, part
            assert part != "unet" or json.dumps(vars(config)) == json.dumps(vars(SINGLE_UNETS[single]))
    schedule = Schedule.from_json(json.loads((root / "scheduler/scheduler_config.json").read_text()))
    assert schedule.timesteps(20) == [951 - 50 * i for i in range(20)] and schedule.final_alpha_cumprod < 1


ODD = ["", "!!!", "a " * 200, "caf\u00e9 \u4e2d\u6587 \U0001f680 na\u00efve", "<|endoftext|> x", "  tabs\tand\nlines  ", "UPPER lower", "it's 3,14 $5"]


def official_prompts() -> list[str]:
    """Odd strings and, where they are at hand, the 4k real training prompts."""
    path = FACTS.parent / "data/prompts/spo_4k_training_prompts.json"
    return ODD + ([row["caption"] for row in json.loads(path.read_text())] if path.exists() else [])


@pytest.mark.parametrize("name", ["stable-diffusion-v1-5", "stable-diffusion-xl-base-1.0"])
def test_prompts_on_the_official_tokenizers(name):
    """Token ids equal those of transformers' own slow path and of diffusers' pipelines: truncated to 77, each encoder's own padding."""
    root = FACTS.parent / "official" / name
    if not root.exists():
        pytest.skip("the official tokenizer files are not at hand")
    from transformers import AutoTokenizer
    texts = official_prompts()
    assert len(texts) > 4000
    for part in ("tokenizer", "tokenizer_2")[:1 + name.endswith("1.0")]:
        mine = _tokenizer(root / part)
        ids = torch.tensor(mine(texts, padding="max_length", truncation=True, max_length=77).input_ids)
        want = AutoTokenizer.from_pretrained(root / part)(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        assert torch.equal(ids, want) and ids.shape == (len(texts), 77)
        assert (ids[:, 0] == 49406).all() and (ids == 49407).any(1).all()
        pad = 0 if part == "tokenizer_2" else 49407
        assert ids[0].tolist() == [49406, 49407] + [pad] * 75           # the empty prompt
        if part == "tokenizer_2":                                       # "!" pads there, so "!!!" is three of them, not one token
            assert ids[1].tolist()[:5] == [49406, 0, 0, 0, 49407]
        assert ids[2, 76] == 49407 and (ids[2, 1:76] == 320).all()       # over 77 tokens: cut, the end token stays


# The vocabulary

def test_a_tokenizer_without_words_is_refused(sd, sdxl, tmp_path):
    """Only its configuration is there: every prompt would have the same embedding."""
    for n, (folder, name) in enumerate([(sd, "tokenizer"), (sdxl, "tokenizer_2")]):
        shutil.copytree(folder, tmp_path / str(n))
        for file in (tmp_path / str(n) / name).iterdir():
            if file.name != "tokenizer_config.json":
                file.unlink()
        with pytest.raises(InputError, match=f"{n}/{name}: .*vocab") as caught:
            load_pipeline(str(tmp_path / str(n)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size, words", [(579, None), (583, None), (578, "579 tokens, the net 578"), (1000, "579 tokens, the net 1000"), (49408, "different models")])
def test_a_vocabulary_is_held_against_its_network(size, words):
    tokenizer = loading.first_tokenizer("tiny")
    if words is None:
        loading.check_vocabulary(tokenizer, size, "the net")
    else:
        with pytest.raises(InputError, match=f"tiny/model/tokenizer: .*{words}"):
            loading.check_vocabulary(tokenizer, size, "the net")
    from transformers import BertTokenizer, CLIPTokenizer
    for empty in (CLIPTokenizer(), BertTokenizer()):
        with pytest.raises(InputError, match="knows no words"):
            loading.check_vocabulary(empty, len(empty), "the net")


def test_a_vocabulary_needs_its_merges(sd, tmp_path):
    """Without them each word is as many tokens as letters, all of which the encoder knows."""
    shutil.copytree(sd, tmp_path / "none")
    path = tmp_path / "none/tokenizer/tokenizer.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | dict(model=state["model"] | dict(merges=[]))))
    with pytest.raises(InputError, match="none/tokenizer: the tokenizer spells every word, .* merges"):
        load_pipeline(str(tmp_path / "none"))


def test_a_token_too_many_is_one_line(sd, tmp_path):
    """A tokenizer to which a word was added, and the encoder was not."""
    shutil.copytree(sd, tmp_path / "more")
    tokenizer = _tokenizer(sd / "tokenizer")
    tokenizer.add_tokens(["<my-style>"])
    tokenizer.save_pretrained(tmp_path / "more/tokenizer")
    with pytest.raises(InputError, match="the tokenizer has 580 tokens, its text encoder 579"):
        load_pipeline(str(tmp_path / "more"))


def scheduler_of(folder, **changes):
    """Change a folder's scheduler; its path."""
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_foreign_scheduler_is_refused_by_its_file(sd, tmp_path):
    shutil.copytree(sd, tmp_path / "flow")
    scheduler_of(tmp_path / "flow", _class_name="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(InputError, match="flow/scheduler/scheduler_config.json: .*FlowMatchEulerDiscreteScheduler"):
        load_pipeline(str(tmp_path / "flow"))


def test_the_option_wins_over_a_folders_prediction_type(sd, tmp_path):
    shutil.copytree(sd, tmp_path / "v")
    scheduler_of(tmp_path / "v", prediction_type="v_prediction")
    assert load_pipeline(str(tmp_path / "v")).schedule.prediction_type == "v_prediction"
    assert load_pipeline(str(tmp_path / "v"), prediction_type="epsilon").schedule.prediction_type == "epsilon"


def test_a_unet_of_another_noise_process_is_told_by_the_scheduler_beside_it(sd, tmp_path):
    pipe = load_pipeline(str(sd))
    shutil.copytree(sd / "scheduler", tmp_path / "x/scheduler")
    loading.check_schedule(tmp_path / "x", pipe)
    loading.check_schedule(tmp_path / "without", pipe)
    for change, words in ((dict(prediction_type="v_prediction"), "made for v_prediction, .*sd for epsilon"),
                          (dict(beta_end=0.02), "other betas"), (dict(_class_name="EDMEulerScheduler"), "EDMEulerScheduler")):
        shutil.copytree(sd / "scheduler", tmp_path / "x/scheduler", dirs_exist_ok=True)
        scheduler_of(tmp_path / "x", **change)
        with pytest.raises(InputError, match=words):
            loading.check_schedule(tmp_path / "x", pipe)


@pytest.mark.parametrize("end", [578, 2, None, [578]])
def test_the_end_token_is_not_the_largest_once_tokens_were_added(sdxl, tmp_path, end):
    """A pipeline with a textual-inversion token pools where its configuration says that prompts end; the old wrong 2 says nothing."""
    theirs = StableDiffusionXLPipeline.from_pretrained(sdxl)
    for tokenizer, encoder in ((theirs.tokenizer, theirs.text_encoder), (theirs.tokenizer_2, theirs.text_encoder_2)):
        tokenizer.add_tokens(["<my-style>"])
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            rows = encoder.get_input_embeddings().weight
            rows[-1] = torch.linspace(-0.3, 0.3, rows.shape[1])
    theirs.save_pretrained(tmp_path / "ti")
    path = tmp_path / "ti/text_encoder_2/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(eos_token_id=end)))
    prompts = ["a red circle <my-style>", "<my-style> a red circle", "a red circle"]
    got = encode_prompts(load_pipeline(str(tmp_path / "ti")), prompts)
    theirs.text_encoder_2.text_model.eos_token_id = theirs.text_encoder_2.config.eos_token_id = 578 if end == 578 else 2
    want = theirs.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert_close(got.prompt_embeds, want[0])
    assert_close(got.pooled, want[2])


# What is said, and when

@pytest.mark.parametrize("part, change", [
    ("text_encoder", dict(num_hidden_layers=90_000)), ("unet", dict(layers_per_block=90_000)), ("unet", dict(transformer_layers_per_block=90_000)),
    ("unet", dict(layers_per_block=99, transformer_layers_per_block=99)), ("vae", dict(layers_per_block=5_000))])
def test_more_layers_than_any_network_has_are_not_built(sd, tmp_path, part, change):
    copy = tmp_path / "copy"
    shutil.copytree(sd, copy)
    path = copy / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=f"copy/{part}/config.json: .*{min(change)}=.* layers"):
        load_pipeline(str(copy))


def test_what_does_not_fit_is_said_before_a_weight_is_read(sd, tmp_path, monkeypatch):
    """A missing part, a tokenizer without words, another model's VAE."""
    monkeypatch.setattr(loading, "read_weights", None)
    for name in ("vae/diffusion_pytorch_model.safetensors", "unet/config.json", "tokenizer/tokenizer.json"):
        shutil.copytree(sd, tmp_path / "copy")
        (tmp_path / "copy" / name).unlink()
        with pytest.raises(InputError, match=name.split("/")[0]):
            load_pipeline(str(tmp_path / "copy"))
        shutil.rmtree(tmp_path / "copy")


@pytest.mark.parametrize("script, option", [("spo_train", "--spm"), ("spo_train", "--vae"), ("spo_train", "--decoder"), ("spo_train", "--model"),
                                            ("spm_train", "--pickscore"), ("spm_train", "--vae"), ("baselines", "--reward"), ("baselines", "--decoder"),
                                            ("evaluate", "--vae")])
def test_a_missing_source_is_named_by_its_option_before_anything_is_read(script, option, small, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "read_weights", None)
    words = {"evaluate": ["--prompt", "a red circle"], "spm_train": []}.get(script, ["--prompts", prompts])
    done = command(script, "--model", small, *words, "--out", tmp_path / "run", "--dtype", "fp32", option, "./nowhere", "--device", "cpu")
    assert done.returncode == 2 and f"error: {option} ./nowhere: neither an existing file or folder" in done.stderr, done.stderr


def test_a_mistyped_model_is_not_blamed_on_the_prompts(tmp_path):
    done = command("spo_train", "--model", "./typo", "--out", tmp_path / "run", "--device", "cpu")
    assert done.returncode == 2 and "error: --model ./typo: neither" in done.stderr


def test_parts_are_announced(small, monkeypatch, capsys):
    load_pipeline(str(small))
    assert capsys.readouterr().out.splitlines() == [f"loading {part}, 0.00 GB" for part in ("text_encoder", "unet", "vae")]
    monkeypatch.setenv("RANK", "1")
    load_pipeline(str(small))
    assert not capsys.readouterr().out


def test_offline_it_is_said_how_to_fetch(monkeypatch):
    for source, kind, says in (("owner/name", "model", "hf download owner/name,"), ("owner/name/a/b.bin", "model", "hf download owner/name a/b.bin,"),
                               ("owner/name", "dataset", "hf download owner/name --repo-type dataset,")):
        with pytest.raises(InputError, match=f"on a machine with network: {says} .*HF_HOME"):
            fetch(source, [], kind)


def test_a_file_of_no_known_layout_is_said_in_a_sentence(sd, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="the file looks like nothing that is known here"):
        load_clip(str(tmp_path / "x.safetensors"))


# Judges

def test_a_judge_is_what_is_asked_for(sd, spm, pickscore, tmp_path):
    for wanted, source, says in ((True, pickscore, "is not step-aware; an SPM is wanted"), (False, spm, "is an SPM, which is step-aware; PickScore")):
        with pytest.raises(InputError, match=says):
            load_clip(str(source), step_aware=wanted)
    shutil.copytree(spm, tmp_path / "run/spm")              # of spm_train.py
    (tmp_path / "run/config.json").write_text('{"model": "tiny"}')
    assert load_clip(str(tmp_path / "run"), step_aware=True).config.step_aware
    with pytest.raises(InputError, match="text_encoder: a text encoder"):
        load_clip(str(sd / "text_encoder"))


@pytest.mark.parametrize("source", ["spm", "sd/text_encoder"])
def test_spm_training_starts_from_pickscore(source, small, spm, sd, tmp_path):
    path = spm if source == "spm" else sd / "text_encoder"
    done = command("spm_train", "--model", small, "--pickscore", path, "--out", tmp_path / "run", "--dtype", "fp32", "--device", "cpu")
    assert done.returncode == 2 and f"error: --pickscore {path}: " in done.stderr


def test_a_judge_of_another_vocabulary_is_refused(small, pickscore, tmp_path, prompts):
    """In both trainers, as evaluate.py has it."""
    clip = load_clip(str(pickscore))
    text = dataclasses.replace(clip.config.text, vocab_size=1000)
    other = CLIP(dataclasses.replace(clip.config, text=text))
    spm_train.save_spm(other, tmp_path / "pickscore")
    spm_train.save_spm(clip_spm.make_step_aware(other), tmp_path / "spm")
    for script, words in (("spo_train", ["--spm", tmp_path / "spm", "--prompts", prompts]), ("spm_train", ["--pickscore", tmp_path / "pickscore"])):
        done = command(script, "--model", small, *words, "--out", tmp_path / script, "--dtype", "fp32", "--device", "cpu")
        assert done.returncode == 2 and "579 tokens" in done.stderr and f"{tmp_path}/{words[0][2:]} 1000: they belong to different models" in done.stderr, done.stderr


# ftfy

CURLY = ["a “red” circle", "ｔｗｏ　ｂｌｕｅ squares！", "fish &amp; chips", "plain – text", "tab\there"]


def slow_text(text: str) -> str:
    """The text cleaning of transformers' slow CLIPTokenizer (to 4.57), with ftfy installed."""
    return re.sub(r"\s+", " ", ftfy.fix_text(text)).strip().lower()


def test_prompts_are_repaired_as_the_slow_tokenizer_does(sd):
    pipe = load_pipeline(str(sd))
    got, want = encode_prompts(pipe, CURLY), encode_prompts(pipe, [slow_text(t) for t in CURLY])
    assert torch.equal(got.prompt_embeds, want.prompt_embeds)
    plain = ["".join(map(chr, range(32, 127))).replace("&", ""), *PROMPTS]
    assert [repaired(t) for t in plain] == plain == [ftfy.fix_text(t) for t in plain]


def test_without_ftfy_it_is_said_once_and_only_where_it_matters(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    diffusion._miss_ftfy.cache_clear()
    assert [repaired(t) for t in PROMPTS] == PROMPTS and not capsys.readouterr().err
    assert [repaired(t) for t in CURLY] == CURLY
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install ftfy" in said


def test_a_network_is_planned_without_torchs_compiler(monkeypatch):
    """normal_ on the meta device would import it, seconds long."""
    def normal_(*args, **kwargs):
        raise AssertionError("drawn on the meta device")

    monkeypatch.setattr(torch.Tensor, "normal_", normal_)
    planned = loading.build(CLIP, clip_spm.clip_h(step_aware=True), Path("a file"))
    assert all(p.is_meta for p in planned.parameters())


def test_loading_leaves_torchs_compiler_alone():
    """A second of every command that trains nothing. Some calls on the meta device import it, or its algebra."""
    code = ("import sys, loading, lora; loading.load_clip('tiny/model/pickscore'); "
            "lora.add(loading.load_pipeline('tiny').unet, 4); "
            "sys.exit(not {'torch._dynamo', 'sympy'}.isdisjoint(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], cwd=TINY.parent.parent).returncode == 0
