"""lora.py against peft and diffusers' own LoRA loader."""
import copy
import json
import math
import re
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import finetune
import lora
from conftest import assert_close, randomize, sd15_shaped, sdxl_shaped, seeded
from diffusion import generate
from loading import load_pipeline
from helpers import PROMPTS, command, main_of, shell
from unet import UNet, UNetConfig
from weights import InputError, original_unet_name, read_weights

INPUTS = dict(latents=torch.randn(2, 4, 16, 16, generator=seeded(1)), timestep=torch.tensor([951, 1]),
              prompt_embeds=torch.randn(2, 7, 12, generator=seeded(2)))


def base_model() -> UNet:
    """A small UNet with random weights, the same each time."""
    return randomize(UNet(UNetConfig.from_json(sd15_shaped())))


def predict(model: torch.nn.Module) -> torch.Tensor:
    """Our UNet's or diffusers' output on fixed inputs."""
    out = model(*INPUTS.values())
    return out if torch.is_tensor(out) else out.sample


@torch.no_grad()
def fill(parameters, seed: int = 5) -> None:
    """Random LoRA weights of a size that matters."""
    g = seeded(seed)
    for p in parameters:
        p.copy_(0.3 * torch.randn(p.shape, generator=g))


def with_lora(rank: int = 3, alpha: float | None = None) -> UNet:
    """The base model with a LoRA that is not zero."""
    model = base_model()
    fill(lora.add(model, rank, alpha))
    return model


@pytest.mark.parametrize("base", [torch.nn.Linear(6, 5), torch.nn.Conv2d(6, 5, 3, stride=2, padding=1)], ids=["linear", "convolution"])
def test_without_gradients_an_fp32_layer_is_one_product(base, monkeypatch):
    """The same up to rounding. In bf16 the update stays apart, however small it is: the same bits as with gradients."""
    x = torch.randn(2, 6, 6, 6, generator=seeded(0))
    counted = []
    apply = lora._apply
    monkeypatch.setattr(lora, "_apply", lambda *args: counted.append(1) or apply(*args))
    for dtype in (torch.float32, torch.bfloat16):
        layer = lora.LoRALinear(copy.deepcopy(base).to(dtype), 2, 0.7)
        torch.nn.init.normal_(layer.lora_B.weight, std=0.3 if dtype == torch.float32 else 1e-3, generator=seeded(1))
        apart = layer(x.to(dtype)).detach()
        counted.clear()
        with torch.no_grad():
            alone = layer(x.to(dtype))
        assert len(counted) == (1 if dtype == torch.float32 else 3)
        assert torch.equal(alone, apart) if dtype == torch.bfloat16 else (alone - apart).abs().max() < 1e-5
        layer.enabled = False
        assert not torch.equal(layer(x.to(dtype)), apart)


@pytest.mark.parametrize("alpha", [3, 5, 0.7])
def test_output_and_gradients_equal_peft(alpha):
    ours = with_lora(3, alpha)
    theirs = UNet2DConditionModel(**sd15_shaped())
    theirs.load_state_dict(base_model().state_dict())
    theirs.add_adapter(LoraConfig(r=3, lora_alpha=alpha, target_modules=list(lora.TARGETS), init_lora_weights="gaussian"))
    pairs = {}
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            module, side = re.fullmatch(r"(.+)\.lora_([AB])\.default\.weight", name).groups()
            pairs[name] = (getattr(lora.layers(ours)[module], f"lora_{side}").weight, p)
    assert {id(a) for a, _ in pairs.values()} == {id(p) for p in lora.parameters(ours)}     # the same layers on both sides
    for a, p in pairs.values():
        p.data.copy_(a.data)
    out, expected = predict(ours), predict(theirs)
    assert_close(out, expected)
    assert (out - predict(base_model())).abs().max() > 0.1
    weight = torch.randn(out.shape, generator=seeded(3))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, (a, p) in pairs.items():
        size = p.grad.abs().max()
        assert size > 1e-6
        assert_close(a.grad / size, p.grad / size, what=name)


def test_only_the_lora_is_trained():
    model = base_model()
    parameters = lora.add(model, 4)
    assert isinstance(parameters, list) and len(parameters) == 2 * len(lora.layers(model)) == 2 * 4 * 2 * 16
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{m}.lora_{s}.weight" for m in lora.layers(model) for s in "AB"}
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}


def test_initial_values():
    model, again, other = base_model(), base_model(), base_model()
    for m, seed in ((model, 0), (again, 0), (other, 1)):
        lora.add(m, 4, seed=seed)
    a = torch.cat([layer.lora_A.weight.detach().flatten() for layer in lora.layers(model).values()])
    assert abs(float(a.std()) * 4 - 1) < 0.05 and abs(float(a.mean())) < 0.02         # peft's "gaussian": std 1 / rank
    assert all(not layer.lora_B.weight.any() for layer in lora.layers(model).values())
    assert all(torch.equal(p, q) for p, q in zip(lora.parameters(model), lora.parameters(again)))
    assert not torch.equal(lora.parameters(model)[0], lora.parameters(other)[0])


def test_fresh_lora_changes_nothing():
    model = base_model()
    expected = predict(model)
    lora.add(model, 4)
    assert torch.equal(predict(model), expected)


def test_disabled_is_bit_for_bit_the_base_model():
    model, expected = with_lora(), predict(base_model())
    on = predict(model)
    with lora.disabled(model) as reference:
        assert torch.equal(predict(reference), expected)
        with lora.disabled(model):
            pass
        assert torch.equal(predict(model), expected)        # the inner block does not switch the outer one back on
    assert torch.equal(predict(model), on) and not torch.equal(on, expected)
    with pytest.raises(RuntimeError), lora.disabled(model):
        raise RuntimeError
    assert torch.equal(predict(model), on)


def test_remove_restores_the_base_model():
    model, base = with_lora(), base_model()
    lora.remove(model)
    assert torch.equal(predict(model), predict(base))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in base.state_dict().items()}
    assert not lora.layers(model) and str(model) == str(base)


def test_base_weights_keep_their_names():
    state = with_lora().state_dict()
    assert all(torch.equal(v, state[k]) for k, v in base_model().state_dict().items())


def to_b(weights: dict) -> dict:
    """Format A -> B, the official releases' one."""
    return {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in weights.items()}


def to_c(weights: dict) -> dict:
    """Format A -> C, diffusers' old one."""
    return {re.sub(r"\.(to_[qkv]|to_out)(?:\.0)?\.lora\.", r".processor.\1_lora.", k): v for k, v in to_b(weights).items()}


def to_d(weights: dict, alpha: float = 2.0) -> dict:
    """Format A -> kohya's with an alpha that differs from the rank, B made up for it."""
    return {k: torch.tensor(alpha) if k.endswith("alpha") else v * 3 / alpha if "lora_up" in k else v
            for k, v in lora.to_kohya(weights).items()}


FORMATS = {"A": dict, "B": to_b, "C": to_c, "D": lora.to_kohya, "D-alpha": to_d,
           "D-no-alpha": lambda w: {k: v for k, v in lora.to_kohya(w).items() if not k.endswith("alpha")}}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read(form):
    trained, model = with_lora(), base_model()
    lora.load(model, FORMATS[form](lora.state(trained)))
    assert len(lora.layers(model)) == len(lora.layers(trained))
    assert_close(predict(model), predict(trained))
    if form != "D-alpha":       # no arithmetic: the same bits
        assert torch.equal(predict(model), predict(trained))
        state = lora.state(trained)
        assert all(torch.equal(v, state[k]) for k, v in lora.state(model).items()) and len(state) == len(lora.state(model))


@pytest.mark.parametrize("form", FORMATS)
def test_diffusers_reads_the_same_from_every_format(form):
    trained = with_lora()
    theirs = UNet2DConditionModel(**sd15_shaped())
    theirs.load_state_dict(base_model().state_dict())
    loader = StableDiffusionLoraLoaderMixin                  # what pipe.load_lora_weights calls
    weights, alphas = loader.lora_state_dict({k: v.clone() for k, v in FORMATS[form](lora.state(trained)).items()})
    loader.load_lora_into_unet(weights, network_alphas=alphas, unet=theirs)
    assert_close(predict(theirs), predict(trained))


def test_original_block_names_are_read_as_diffusers_reads_them():
    """kohya's SDXL files: input_blocks_4_1_... for down_blocks.1.attentions.0; every layer arrives, at the same strength."""
    config = UNetConfig.from_json(sdxl_shaped())
    model, plain = randomize(UNet(config)), randomize(UNet(config))
    fill(lora.add(model, 3))
    modules, up = [n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)], [True, True, False]
    names = {"lora_unet_" + m.replace(".", "_"): "lora_unet_" + original_unet_name(m + ".weight", 2, up)[:-len(".weight")].replace(".", "_")
             for m in modules if "blocks" in m or "mid" in m}
    state = {names[k.partition(".")[0]] + "." + k.partition(".")[2]: v for k, v in to_d(lora.state(model)).items()}
    assert any(k.startswith("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.") for k in state)
    theirs, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(state), unet_config=SimpleNamespace(layers_per_block=2))
    alphas = {re.sub(r"\.processor\.(to_.+)_lora\.down\.weight", lambda m: "." + m[1].replace("to_out", "to_out.0"), k): torch.tensor(v)
              for k, v in alphas.items()}
    want, got = lora.normalise(theirs | alphas, modules), lora.normalise(state, modules)
    assert got.keys() == want.keys() == lora.state(model).keys() and all(torch.equal(got[k], want[k]) for k in want)
    lora.load(plain, state)
    assert all(torch.allclose(v, lora.state(model)[k], atol=1e-6) for k, v in lora.state(plain).items())


def test_alpha_in_the_header_is_heeded(sd, tmp_path):
    """diffusers saves peft's configuration there: alpha unlike the rank, other ranks and alphas for some layers."""
    theirs = UNet2DConditionModel(**sd15_shaped())
    theirs.load_state_dict(base_model().state_dict())
    config = LoraConfig(r=3, lora_alpha=12, target_modules=list(lora.TARGETS), rank_pattern={"attn2.to_q": 2}, alpha_pattern={"attn2.to_k": 5})
    theirs.add_adapter(config)
    fill(p for p in theirs.parameters() if p.requires_grad)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(theirs),
                                              unet_lora_adapter_metadata=config.to_dict())
    model, file = base_model(), tmp_path / "pytorch_lora_weights.safetensors"
    lora.load(model, read_weights(file))
    assert_close(predict(model), predict(theirs), 1e-4)
    lora.load(model, load_file(file))
    assert (predict(model) - predict(theirs)).abs().max() > 0.1
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(InputError, match="lora_adapter_metadata cannot be read"):
        read_weights(file)


def peft_folder(folder, state: dict, **settings) -> UNet2DConditionModel:
    """diffusers' UNet with those base weights and a random adapter, which peft itself has saved into the folder."""
    theirs = UNet2DConditionModel(**sd15_shaped())
    theirs.load_state_dict(state)
    net = get_peft_model(theirs, LoraConfig(**dict(r=3, lora_alpha=12, target_modules=list(lora.TARGETS)) | settings))
    fill([p for n, p in net.named_parameters() if "lora_" in n])
    net.save_pretrained(folder)
    return net


@pytest.mark.parametrize("settings", [
    {}, dict(use_rslora=True, lora_alpha=2), dict(rank_pattern={"attn2.to_q": 2}, alpha_pattern={"attn2.to_k": 5, "attn1.to_k": 7, "to_k": 1}),
    dict(alpha_pattern={"^mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 30, r"attn2\.to_v$": 2}),
    dict(target_modules=["to_q", "proj_in", "conv1"])], ids=["alpha", "rslora", "patterns", "anchored", "convolutions"])
def test_a_peft_folder_is_read(settings, tmp_path):
    """As peft means it, where its example has it, in unet/; as a pickle, too."""
    model = base_model()
    theirs = peft_folder(tmp_path / "run/unet", model.state_dict(), **settings)
    file = lora.file_in("run", tmp_path / "run")
    assert file.name == "adapter_model.safetensors"
    lora.load(model, read_weights(file))
    assert_close(predict(model), predict(theirs), 1e-4)
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    again = base_model()
    lora.load(again, read_weights(lora.file_in("run", tmp_path / "run")))
    assert torch.equal(predict(again), predict(model))


@pytest.mark.parametrize("change, says", [
    (dict(use_dora=True), "use_dora True"), (dict(peft_type="LOHA"), "peft_type 'LOHA'"), (dict(init_lora_weights="pissa"), "'pissa'"),
    (dict(lora_alpha=None), "NoneType"), (dict(lora_alpha=[1]), "list"), ('{"r": 2}', "lora_alpha"), (dict(alpha_pattern=3), "int"), (dict(alpha_pattern={"to_q": 10 ** 400}), "too large"),
    (dict(alpha_pattern={"((a|b|_|[0-9])*)*!": 2}), "names no modules"), (dict(alpha_pattern={"to_.*": 2}), "names no modules"),
    (dict(alpha_pattern={".".join(["(.*a"] * 30) + ")" * 30: 2}), "names no modules"), (100_000 * "[", "recursion"), ("{", "Expecting"), ("[]", "list"),
    ("\xff", "Expecting")], ids=str)
def test_hostile_settings_of_peft_are_one_quick_line(change, says, tmp_path):
    """In the file beside the weights and in their header."""
    key = f"{LAYER}.lora_A.weight"
    text = change if isinstance(change, str) else json.dumps(dict(peft_type="LORA", lora_alpha=4, r=2) | change)
    weights = {key: torch.ones(2, 8), key.replace("_A", "_B"): torch.ones(8, 2)}
    save_file({f"base_model.model.{k}": v for k, v in weights.items()}, tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    save_file({f"unet.{k}": v for k, v in weights.items()}, tmp_path / "b.safetensors", metadata={"lora_adapter_metadata": text})
    begin = time.process_time()
    for name, what in (("a", "adapter_config.json: cannot be read"), ("b", "b.safetensors: its lora_adapter_metadata cannot be read")):
        with pytest.raises(InputError, match=f"{what} .*{says}") as caught:
            read_weights(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.process_time() - begin < 10


def test_many_patterns_are_quick(tmp_path):
    """As many as a header can hold, for a whole LoRA."""
    state, patterns = lora.state(with_lora()), {f"to_none.{i}": 1 for i in range(200_000)} | {"attn1.to_q": 6}
    save_file(state, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 3, "unet.alpha_pattern": patterns})})
    begin = time.process_time()
    weights = read_weights(tmp_path / "x.safetensors")
    assert time.process_time() - begin < 10
    assert float(weights[f"unet.{LAYER}.alpha"]) == 6 and float(weights[f"unet.{LAYER[:-1]}k.alpha"]) == 3


def in_original_names(key: str) -> str:
    """Format A's key as ComfyUI saves it."""
    return "diffusion_model." + original_unet_name(key.removeprefix("unet."), 2, [False, True, True, True])


WRAPPED = {"adapter": lambda k: k.replace(".weight", ".default_0.weight"), "compiled": lambda k: k.replace("unet.", "unet._orig_mod."),
           "blocks compiled": lambda k: k.replace(".transformer_blocks.0.", ".transformer_blocks.0._orig_mod."),
           "ddp": lambda k: "module." + k, "both": lambda k: k.replace("unet.", "unet.module._orig_mod."), "original": in_original_names,
           "dotted": lambda k: "lora_unet_" + k.removeprefix("unet.").replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
           "dotted down": lambda k: k.replace("lora_A", "lora_down").replace("lora_B", "lora_up")}


@pytest.mark.parametrize("form", WRAPPED)
def test_wrapped_and_dotted_names_are_read(form):
    """The same bits as under diffusers' names; an alpha, too."""
    trained, model = with_lora(), base_model()
    state = lora.state(trained)
    lora.load(model, {WRAPPED[form](k): v for k, v in state.items()})
    assert torch.equal(predict(model), predict(trained))
    if form != "adapter":
        alphas = {WRAPPED[form](k).replace("lora_A.weight", "alpha").replace("lora_down.weight", "alpha"): torch.tensor(1.5) for k in state if "lora_A" in k}
        lora.load(model, {WRAPPED[form](k): v for k, v in state.items()} | alphas)
        assert_close(predict(model), predict(with_lora(3, 1.5)))


def test_kohya_files_of_compiled_models_are_read():
    trained, model = with_lora(), base_model()
    lora.load(model, {k.replace("lora_unet_", "lora_unet__orig_mod_"): v for k, v in lora.to_kohya(lora.state(trained)).items()})
    assert torch.equal(predict(model), predict(trained))


def test_two_adapters_in_one_file_are_refused():
    state = lora.state(with_lora())
    with pytest.raises(ValueError, match="two adapters"):
        lora.load(base_model(), {k.replace(".weight", f".{name}.weight"): v for k, v in state.items() for name in ("one", "two")})


CONVOLUTIONS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv", "conv_shortcut")


def whole_kohya(model: UNet) -> dict[str, torch.Tensor]:
    """What sd-scripts writes for a whole UNet: attentions, their projections and (LoCon) the residual blocks' convolutions, alpha unlike rank."""
    out, g = {}, seeded(4)
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and name.endswith(CONVOLUTIONS):
            outer, *inner = module.weight.shape
            key = "lora_unet_" + name.replace(".", "_")
            out |= {f"{key}.lora_down.weight": torch.randn(4, *inner, generator=g) * 0.1, f"{key}.alpha": torch.tensor(2.0),
                    f"{key}.lora_up.weight": torch.randn(outer, 4, *[1] * (len(inner) - 1), generator=g) * 0.1}
    return out


@pytest.mark.parametrize("shaped", [sd15_shaped, sdxl_shaped])
def test_kohya_loras_on_convolutions_are_read(shaped):
    """SD-1.5's projections are 1x1 convolutions, SDXL's are linear; worn, merged, switched off, taken off, converted there and back."""
    base, model = (randomize(UNet(UNetConfig.from_json(shaped()))) for _ in range(2))
    inputs = (torch.randn(2, 4, 16, 16, generator=seeded(1)), torch.tensor([951, 1]), torch.randn(2, 7, base.config.cross_attention_dim, generator=seeded(2)),
              *([torch.randn(2, 10, generator=seeded(3)), torch.ones(2, 6)] if shaped is sdxl_shaped else []))
    state = whole_kohya(base)
    lora.load(model, state)
    assert len(lora.layers(model)) == len(state) // 3 and any(m.weight.shape[2:] == (3, 3) for m in lora.layers(model).values())
    worn = model(*inputs)
    back = copy.deepcopy(base)
    for weights in (lora.state(model), lora.to_kohya(lora.state(model))):
        lora.load(back, weights)
        assert torch.equal(back(*inputs), worn)
    assert lora.norm(model) > 0
    with lora.disabled(model):
        assert torch.equal(model(*inputs), base(*inputs))
    lora.merge(model)
    assert_close(model(*inputs), worn, 1e-4)
    for name, module in base.named_modules():
        key = "lora_unet_" + name.replace(".", "_")
        if f"{key}.alpha" in state:
            term = 0.5 * (state[f"{key}.lora_up.weight"].flatten(1) @ state[f"{key}.lora_down.weight"].flatten(1))
            assert_close(model.get_submodule(name).weight - module.weight, term.view_as(module.weight), 1e-6, name)
    lora.remove(back)
    assert torch.equal(back(*inputs), base(*inputs)) and str(back) == str(base)


def test_diffusers_reads_the_same_of_convolutions():
    """Both formats that are written."""
    model = base_model()
    lora.load(model, whole_kohya(model))
    for weights in (lora.state(model), lora.to_kohya(lora.state(model))):
        theirs = UNet2DConditionModel(**sd15_shaped())
        theirs.load_state_dict(base_model().state_dict())
        got, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict({k: v.clone() for k, v in weights.items()})
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(got, network_alphas=alphas, unet=theirs)
        assert_close(predict(theirs), predict(model), 1e-4)


@pytest.mark.parametrize("scale", [0, 0.7, 1, -1, 2])
def test_strength(scale):
    """0 is the base and 1 the LoRA, bit for bit; between, B is that much of itself, as in diffusers' cross_attention_kwargs scale."""
    state, model = lora.state(with_lora()), base_model()
    lora.load(model, state, scale=scale)
    if scale in (0, 1):
        assert torch.equal(predict(model), predict(with_lora() if scale else base_model()))
    lora.merge(model)
    expected, got = base_model().state_dict(), model.state_dict()
    for key in expected:
        a, b = (state.get(f"unet.{key.removesuffix('.weight')}.lora_{side}.weight") for side in "AB")
        assert_close(got[key], expected[key] if a is None else expected[key] + scale * b @ a)
    with pytest.raises(ValueError, match="nan is no strength"):
        lora.load(model, state, scale=math.nan)


def test_state_equals_peft_names():
    theirs = UNet2DConditionModel(**sd15_shaped())
    theirs.add_adapter(LoraConfig(r=3, target_modules=list(lora.TARGETS)))
    expected = {f"unet.{k}": v.shape for k, v in get_peft_model_state_dict(theirs).items()}
    state = lora.state(with_lora())
    assert {k: v.shape for k, v in state.items()} == expected
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in state.values())


def test_kohya_equals_diffusers_conversion():
    state = lora.state(with_lora())
    ours, theirs = lora.to_kohya(state), convert_state_dict_to_kohya({k: v.clone() for k, v in state.items()})
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k].float(), theirs[k].float()) for k in ours)


def test_kohya_round_trip():
    model = with_lora()
    state = lora.state(model)
    modules = [n for n, m in base_model().named_modules() if isinstance(m, torch.nn.Linear)]
    again = lora.normalise(lora.to_kohya(state), modules)
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)


@pytest.mark.parametrize("alpha", [1, 6, 2.5])
def test_alpha_other_than_rank_survives_saving(alpha):
    trained, model = with_lora(3, alpha), base_model()
    assert (predict(trained) - predict(with_lora(3, 3))).abs().max() > 1e-2
    for weights in (lora.state(trained), lora.to_kohya(lora.state(trained))):
        lora.load(model, weights)
        assert_close(predict(model), predict(trained))


def test_state_is_a_snapshot():
    model = with_lora()
    state = lora.state(model)
    before = {k: v.clone() for k, v in state.items()}
    fill(lora.parameters(model), seed=6)
    assert all(torch.equal(state[k], before[k]) for k in state)


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def without(weights: dict, *parts: str) -> dict:
    """The weights without the first layer's `parts`."""
    return {k: v for k, v in weights.items() if not (LAYER.replace(".", "_") in k.replace(".", "_") and k.endswith(parts))}


@pytest.mark.parametrize("damage, message", [
    (lambda w: {k.removeprefix("unet."): v for k, v in w.items()}, "prefix"),                                       # E
    (lambda w: {k.replace("unet.", "base_model.model."): v for k, v in w.items()}, "prefix"),                       # F
    (lambda w: w | {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(3, 8)}, "text encoder"),
    (lambda w: lora.to_kohya(w) | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(3, 8)}, "text encoder"),
    (lambda w: lora.to_kohya(w) | {"lora_unet_no_such_layer.lora_down.weight": torch.ones(3, 8)}, "no_such_layer"),
    (lambda w: w | {"unet.no.such.lora_A.weight": torch.ones(3, 8), "unet.no.such.lora_B.weight": torch.ones(8, 3)}, "no.such"),
    (lambda w: w | {f"unet.{LAYER}.lora_magnitude_vector": torch.ones(8)}, "lora_magnitude_vector"),
    (lambda w: lora.to_kohya(w) | {f"lora_unet_{LAYER.replace('.', '_')}.dora_scale": torch.ones(8)}, "dora_scale"),
    (lambda w: w | {f"unet.{LAYER}.lora_A.weight": torch.full((3, 8), float("nan"))}, LAYER),
    (lambda w: w | {f"unet.{LAYER}.lora_B.weight": torch.ones(8, 2)}, LAYER),
    (lambda w: w | {f"unet.{LAYER}.lora_B.weight": torch.ones(8)}, LAYER),
    (lambda w: without(w, "lora_A.weight"), f"{LAYER}.*lacks"),
    (lambda w: without(w, "lora_B.weight"), f"{LAYER}.*lacks"),
    (lambda w: without(lora.to_kohya(w), "lora_down.weight"), f"{LAYER}.*lacks"),
    (lambda w: without(lora.to_kohya(w), "lora_up.weight"), f"{LAYER}.*lacks"),
    (lambda w: without(lora.to_kohya(w), "lora_down.weight", "lora_up.weight"), f"{LAYER}.*lacks"),
    (lambda w: w | {f"unet.{LAYER}.lora_A.weight": torch.tensor(1.0)}, f"{LAYER}.*no matrix"),
    (lambda w: w | {f"unet.{LAYER}.lora_A.weight": torch.ones(3, 8, dtype=torch.int64)}, f"{LAYER}.*int64"),
    (lambda w: w | {f"unet.{LAYER}.lora_A.weight": torch.ones(0, 8), f"unet.{LAYER}.lora_B.weight": torch.ones(8, 0)}, f"{LAYER}.*empty"),
    (lambda w: w | {f"unet.{LAYER}.alpha": torch.ones(2)}, "alpha.*not plain LoRA"), (lambda w: w | {f"unet.{LAYER}.alpha": torch.tensor(math.nan)}, "alpha.*non-finite"),
    (lambda w: {"emb_params": torch.ones(3)}, "emb_params"), (lambda w: {}, "no LoRA"),
])
def test_other_files_are_refused_and_leave_the_model_alone(damage, message):
    model = with_lora(rank=2)
    before = predict(model)
    with pytest.raises(ValueError, match=f"(?s)some.safetensors: .*{message}"):
        lora.load(model, damage(lora.state(with_lora())), "some.safetensors")
    assert torch.equal(predict(model), before)


@pytest.mark.parametrize("form", [dict, lora.to_kohya])
@pytest.mark.parametrize("config", [sd15_shaped(block_out_channels=[16, 32, 48, 48]), sdxl_shaped(), sd15_shaped(cross_attention_dim=20)])
def test_lora_of_another_model_is_refused_by_name(config, form):
    other = UNet(UNetConfig.from_json(config))
    lora.add(other, 3)
    with pytest.raises(ValueError, match="blocks.*another"):
        lora.load(base_model(), form(lora.state(other)))


def test_load_replaces_and_ranks_may_differ():
    model, state = with_lora(rank=2), lora.state(with_lora(rank=3))
    state[f"unet.{LAYER}.lora_A.weight"], state[f"unet.{LAYER}.lora_B.weight"] = torch.randn(1, 8), torch.randn(8, 1)
    lora.load(model, state)
    assert {layer.rank for layer in lora.layers(model).values()} == {1, 3}
    assert all(torch.equal(v, state[k]) for k, v in lora.state(model).items())
    assert {id(p) for p in lora.parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}


def test_half_precision_files_are_read():
    state = {k: v.half() for k, v in lora.state(with_lora()).items()}
    model = base_model()
    lora.load(model, state)
    assert all(p.dtype == torch.float32 for p in lora.parameters(model))
    assert all(torch.equal(v, state[k].float()) for k, v in lora.state(model).items())


@pytest.mark.parametrize("alpha", [3, 5])
def test_merged_equals_unmerged(alpha):
    model = with_lora(3, alpha)
    expected = predict(model)
    lora.merge(model)
    assert not lora.layers(model) and model.state_dict().keys() == base_model().state_dict().keys()
    assert_close(predict(model), expected)
    assert (expected - predict(base_model())).abs().max() > 0.1


def test_gradient_clip_really_clips():
    model = with_lora()
    predict(model).square().sum().backward()
    before = torch.cat([p.grad.flatten() for p in lora.parameters(model)]).norm()
    assert before > 1
    total = torch.nn.utils.clip_grad_norm_(lora.parameters(model), 0.25)
    after = torch.cat([p.grad.flatten() for p in lora.parameters(model)]).norm()
    assert_close(total, before)
    assert float(after) == pytest.approx(0.25, rel=1e-4)


def test_lora_stays_fp32_beside_a_bf16_base():
    model = base_model().to(torch.bfloat16)
    parameters = lora.add(model, 4)
    fill(parameters)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    out = predict(model)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    before = [p.detach().clone() for p in parameters]
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in parameters)
    torch.optim.SGD(parameters, lr=1e-6).step()             # bf16 would round most of so small an update away
    moved = sum(int((p != b).sum()) for p, b in zip(parameters, before))
    assert moved > 0.9 * sum(p.numel() for p in parameters)


@pytest.mark.parametrize("alpha", [3, 5])
def test_norm_is_the_frobenius_norm_of_the_change(alpha):
    model = with_lora(3, alpha)
    merged, base = copy.deepcopy(model), base_model().state_dict()
    lora.merge(merged)
    change = torch.cat([(v.double() - base[k].double()).flatten() for k, v in merged.state_dict().items()])
    assert lora.norm(model) == pytest.approx(float(change.norm()), rel=1e-5)
    for layer in lora.layers(model).values():
        layer.lora_B.weight.data.zero_()
    assert lora.norm(model) == 0 and lora.norm(base_model()) == 0


def test_a_target_without_a_match_is_refused():
    """Alone, among others that match, and as an empty word; nothing has been added then."""
    model = base_model()
    for targets in (("to_nothing",), ("to_q", "to_nothing"), ("to_q", "")):
        with pytest.raises(ValueError, match=f"ends in '{targets[-1]}'"):
            lora.add(model, 4, targets=targets)
        assert not lora.layers(model)


def trained_looking(checkpoint, rank: int, file):
    """A LoRA for a checkpoint, in diffusers format, that does something."""
    unet = load_pipeline(str(checkpoint)).unet
    fill(lora.add(unet, rank))
    save_file(lora.state(unet), file)
    return file


@pytest.fixture
def lora_file(sd, tmp_path):
    """Of the minuscule SD checkpoint."""
    return trained_looking(sd, 3, tmp_path / "lora.safetensors")


def test_command_line_converts_there_and_back(sd, lora_file, tmp_path):
    kohya, back, run = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors", tmp_path / "run"
    run.mkdir()
    shutil.copy(lora_file, run / "pytorch_lora_weights.safetensors")
    shell("lora.py", "convert", run, kohya, "--model", sd, "--format", "kohya")
    done = command("lora", "convert", kohya, back, "--model", sd)
    assert "diffusers format" in done.stdout
    first, middle, last = (read_weights(f) for f in (lora_file, kohya, back))
    assert all(k.startswith("lora_unet_") for k in middle) and any(k.endswith(".alpha") for k in middle)
    assert first.keys() == last.keys() and all(torch.equal(v, last[k]) for k, v in first.items())
    refused = command("lora", "convert", lora_file, kohya, "--model", sd)
    assert refused.returncode and "exists already" in refused.stderr and "Traceback" not in refused.stderr


def test_command_line_merges_into_a_checkpoint_of_its_own(sd, lora_file, tmp_path):
    """The written folder draws what the LoRA draws, here and in diffusers, which finds no parts named that are not there."""
    official = tmp_path / "official"
    shutil.copytree(sd, official)
    index = json.loads((sd / "model_index.json").read_text())
    del index["requires_safety_checker"]
    (official / "model_index.json").write_text(json.dumps(index | dict(feature_extractor=["transformers", "CLIPImageProcessor"],
                                                                       safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])))
    assert not command("lora", "merge", lora_file, tmp_path / "merged", "--model", official).returncode
    base, worn, merged = load_pipeline(str(sd)), load_pipeline(str(sd)), load_pipeline(str(tmp_path / "merged"))
    lora.load(worn.unet, read_weights(lora_file))
    images = [generate(p, PROMPTS[:2], [0, 1], steps=3) for p in (base, worn, merged)]
    assert_close(images[2], images[1])
    assert (images[0] - images[1]).abs().max() > 1e-2
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    ours = merged.unet.state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in theirs.unet.state_dict().items())
    assert json.loads((tmp_path / "merged/model_index.json").read_text())["safety_checker"] == [None, None]
    refused = command("lora", "merge", lora_file, tmp_path / "merged", "--model", sd)
    assert refused.returncode and "exists already" in refused.stderr


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_single_file_is_merged_into_a_single_file(kind, request, tmp_path, monkeypatch):
    """Nothing but the UNet's attentions changes, and they as in a folder; the kohya file fits, too."""
    import loading
    from test_single_file import open_single, shapes_of, write_single
    folder = request.getfixturevalue(kind)
    single, target = write_single(folder, tmp_path / "in.safetensors", kind == "sdxl"), tmp_path / "out.safetensors"
    pipe = load_pipeline(str(folder))
    fill(lora.add(pipe.unet, 3))
    save_file(lora.to_kohya(lora.state(pipe.unet)), tmp_path / "lora.safetensors")
    monkeypatch.setattr(loading, "SINGLE_UNETS", {"sd15": shapes_of(folder)[0], "sdxl": shapes_of(folder)[0]})

    def run(*words):
        monkeypatch.setattr("sys.argv", ["lora.py", *map(str, words), "--model", str(single)])
        lora.command_line()
    run("merge", tmp_path / "lora.safetensors", target)
    run("convert", tmp_path / "lora.safetensors", tmp_path / "back.safetensors")
    assert read_weights(tmp_path / "back.safetensors").keys() == lora.state(pipe.unet).keys()
    lora.merge(pipe.unet)
    got = open_single(folder, target).unet.state_dict()
    assert all(torch.equal(v, got[k]) for k, v in pipe.unet.state_dict().items())
    before, after = read_weights(single), read_weights(target)
    assert before.keys() == after.keys() and 0 < sum(not torch.equal(v, after[k]) for k, v in before.items()) < len(before) / 2
    with pytest.raises(InputError, match="must end in .safetensors"):
        run("merge", tmp_path / "lora.safetensors", tmp_path / "folder")
    for words in (("convert", tmp_path / "lora.safetensors", target / "a"), ("merge", tmp_path / "lora.safetensors", target / "a.safetensors")):
        with pytest.raises(InputError, match="out.safetensors/a.*cannot be written"):
            run(*words)
    single = folder
    with pytest.raises(InputError, match="out.safetensors/a: cannot be written"):
        run("merge", tmp_path / "lora.safetensors", target / "a")
    with pytest.raises(InputError, match="see --help"):
        run("twist")


@pytest.mark.parametrize("words, message", [
    (("merge", "{lora}", "{out}", "--model", "tiny"), "another"), (("convert", "no.safetensors", "{out}"), "no such weight file"),
    (("merge", "{lora}", "{out}", "--model", "nowhere"), "neither an existing")])
def test_command_line_errors_are_one_line(lora_file, tmp_path, words, message):
    done = command("lora", *(w.format(lora=lora_file, out=tmp_path / "out") for w in words))
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def header_of(file) -> dict[str, str]:
    with safe_open(file, "pt") as handle:
        return handle.metadata()


@pytest.fixture
def small_lora(small, tmp_path):
    """Of the smallest checkpoint."""
    return trained_looking(small, 2, tmp_path / "small.safetensors")


def test_a_merge_that_fails_leaves_nothing(small, small_lora, tmp_path, monkeypatch):
    """A full disk midway: one line, no half folder, and the same command works once there is space."""
    save, home = lora.save, tmp_path / "home"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora, "save", full)
    with pytest.raises(InputError, match="home/merged: cannot be written .No space left"):
        call_lora("merge", small_lora, home / "merged", "--model", small)
    assert not list(home.iterdir())
    monkeypatch.setattr(lora, "save", save)
    call_lora("merge", small_lora, home / "merged", "--model", small)
    assert [p.name for p in home.iterdir()] == ["merged"]


def call_lora(*words) -> None:
    """lora.py's command line in this process; mistakes are raised."""
    with main_of("lora", *words) as main:
        main()


def test_a_merge_keeps_the_variant(small, small_lora, tmp_path):
    """Of a folder that has only .fp16 files diffusers opens the merge as it opens the folder, in half precision, header included."""
    half, merged = tmp_path / "half", tmp_path / "merged"
    StableDiffusionPipeline.from_pretrained(small).to(torch.float16).save_pretrained(half, variant="fp16")
    file = half / "unet/diffusion_pytorch_model.fp16.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "modelspec.title": "mine"})
    call_lora("merge", small_lora, merged, "--model", half)
    assert [p.name for p in (merged / "unet").glob("*.safetensors")] == [file.name]
    assert header_of(merged / "unet" / file.name)["modelspec.title"] == "mine"
    theirs = StableDiffusionPipeline.from_pretrained(merged, variant="fp16", torch_dtype=torch.float16).unet.state_dict()
    ours, before = load_pipeline(str(merged), torch.float16).unet.state_dict(), load_file(file)
    assert all(torch.equal(v, ours[k]) and v.dtype == torch.float16 for k, v in theirs.items())
    assert any(not torch.equal(v, before[k]) for k, v in theirs.items())


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_single_file_keeps_what_is_said_of_it(tied, small, small_lora, tmp_path, monkeypatch):
    """Header (but for hashes of the weights), marker tensors and the .yaml beside it; of a .ckpt also tensors that share memory."""
    import loading
    from test_single_file import shapes_of, write_single
    weights = load_file(write_single(small, tmp_path / "in.safetensors", False)) | {"v_pred": torch.tensor([])}
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    if tied:
        model = tmp_path / "in.ckpt"
        torch.save({"state_dict": weights | {"model_ema.copy": weights[name], "view": weights[name][1:]}}, model)
    else:
        model = tmp_path / "in.safetensors"
        save_file(weights, model, metadata={"modelspec.prediction_type": "v", "modelspec.title": "mine ü\n\"", "modelspec.hash_sha256": "0x1", "format": "np"})
    (tmp_path / "in.yaml").write_text("parameterization: v")
    monkeypatch.setattr(loading, "SINGLE_UNETS", {"sd15": shapes_of(small)[0]})
    for target in ("out", "again"):
        call_lora("merge", small_lora, tmp_path / f"{target}.safetensors", "--model", model)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert (tmp_path / "out.yaml").read_text() == "parameterization: v"
    got, header = load_file(tmp_path / "out.safetensors"), header_of(tmp_path / "out.safetensors")
    assert got.keys() - weights.keys() == ({"model_ema.copy", "view"} if tied else set()) and "v_pred" in got
    assert not torch.equal(got[name], weights[name])
    if tied:
        assert torch.equal(got["model_ema.copy"], weights[name]) and torch.equal(got["view"], weights[name][1:])
    else:
        assert header == {"modelspec.prediction_type": "v", "modelspec.title": "mine ü\n\"", "format": "pt"}


def test_command_line_strength(small, small_lora, tmp_path):
    """Of a merge and of a file: at 0 the base, at 0.5 as `load` has it."""
    base, half = load_pipeline(str(small)).unet, load_pipeline(str(small)).unet
    call_lora("merge", small_lora, tmp_path / "none", "--model", small, "--scale", "0")
    got = load_pipeline(str(tmp_path / "none")).unet.state_dict()
    assert all(torch.equal(v, got[k]) for k, v in base.state_dict().items())
    call_lora("convert", small_lora, tmp_path / "half.safetensors", "--model", small, "--scale", "0.5")
    call_lora("merge", small_lora, tmp_path / "half", "--model", small, "--scale", "0.5")
    lora.load(half, load_file(tmp_path / "half.safetensors"))
    lora.merge(half)
    got = load_pipeline(str(tmp_path / "half")).unet.state_dict()
    assert all(torch.equal(v, got[k]) for k, v in half.state_dict().items())
    with pytest.raises(InputError, match="nan is no strength"):
        call_lora("merge", small_lora, tmp_path / "nan", "--model", small, "--scale", "nan")
    assert not (tmp_path / "nan").exists()


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_run_leaves_files_that_say_what_they_are(kind, request, tmp_path):
    """kohya's with name, base and rank, the same bytes each time; diffusers' pipeline draws the same with either."""
    folder = request.getfixturevalue(kind)
    pipe = load_pipeline(str(folder))
    fill(lora.add(pipe.unet, 3))
    for out in ("one", "two"):
        finetune.save_lora(pipe, tmp_path / out)
    for name in ("lora_kohya.safetensors", "pytorch_lora_weights.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    header = header_of(tmp_path / "one/lora_kohya.safetensors")
    version, architecture = {"sd": ("sd_v1", "stable-diffusion-v1/lora"), "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora")}[kind]
    assert header["ss_base_model_version"] == version and header["modelspec.architecture"] == architecture and "modelspec.date" not in header
    assert header["ss_network_module"] == "networks.lora" and header["ss_network_dim"] == header["ss_network_alpha"] == "3"
    assert header["modelspec.sai_model_spec"] == "1.0.0" and kind in header["modelspec.title"] and str(folder.parent) not in str(header)
    assert header_of(tmp_path / "one/pytorch_lora_weights.safetensors") == {"format": "pt"}
    theirs = (StableDiffusionPipeline if kind == "sd" else StableDiffusionXLPipeline).from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    pictures = []
    for name in (None, "pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        if name:
            theirs.load_lora_weights(tmp_path / "one", weight_name=name)
        pictures.append(theirs(PROMPTS[0], num_inference_steps=2, generator=seeded(0), output_type="np").images)
        theirs.unload_lora_weights()
    assert abs(pictures[1] - pictures[2]).max() < 1e-5 and abs(pictures[0] - pictures[1]).max() > 1e-3
    call_lora("convert", tmp_path / "one", tmp_path / "k.safetensors", "--model", folder, "--format", "kohya")
    assert (tmp_path / "k.safetensors").read_bytes() == (tmp_path / "one/lora_kohya.safetensors").read_bytes()
